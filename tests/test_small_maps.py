"""Convolutions of small maps: what torch's give, to rounding, and all of the gradient."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from commands import ENVIRONMENT
from images import ROOT
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core import networks, small_maps
from pipeline.core.results import registry
from pipeline.core.small_maps import SmallMapConv2d

KERNELS = {
    "1 x 1": {"kernel_size": 1},
    "1 x 1, padded": {"kernel_size": 1, "padding": 1},
    "1 x 1, a step of two": {"kernel_size": 1, "stride": 2},
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "3 x 3, a step of two": {"kernel_size": 3, "padding": 1, "stride": 2},
    "1 x 1, in groups": {"kernel_size": 1, "groups": 2},
    "3 x 3, a step of three": {"kernel_size": 3, "padding": 1, "stride": 3},
    "3 x 3, a step of two downwards": {"kernel_size": 3, "padding": 1, "stride": (2, 1)},
    "3 x 3, no padding": {"kernel_size": 3, "padding": 0},
    "3 x 3, other padding": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "3 x 3, dilated": {"kernel_size": 3, "padding": 1, "dilation": 2},
    "3 x 3, in groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "3 x 1": {"kernel_size": (3, 1), "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same"},
}
SIZES = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2), (4, 4), (5, 5)]


def both_ways(how, bias, size, batch, memory_format):
    """Give a convolution's output and its gradients, by torch and in the other way."""
    torch.manual_seed(0)
    one = nn.Conv2d(6, 4, bias=bias, **how).double()
    other = nn.Conv2d(6, 4, bias=bias, **how).double()
    other.load_state_dict(one.state_dict())
    small_maps.replace_convolutions(other)
    assert type(other) is SmallMapConv2d
    x = torch.randn(batch, 6, *size, dtype=torch.float64).to(memory_format=memory_format)
    found = []
    for layer in (one.to(memory_format=memory_format), other.to(memory_format=memory_format)):
        given = x.clone().requires_grad_()
        y = layer(given)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        found.append((y, given.grad, *(parameter.grad for parameter in layer.parameters())))
    return zip(*found, strict=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_layer_gives_what_torchs_does_and_learns_as_it_does(kernel, bias, memory_format):
    tried = 0
    for size, batch in itertools.product(SIZES, (1, 5)):
        try:
            nn.Conv2d(6, 4, bias=bias, **KERNELS[kernel])(torch.zeros(1, 6, *size))
        except RuntimeError:  # a map that the kernel does not fit on
            continue
        for expected, given in both_ways(KERNELS[kernel], bias, size, batch, memory_format):
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-13)
        tried += 1
    assert tried >= 4


@pytest.fixture
def layers():
    """A 3 x 3 and a 1 x 1 convolution that compute small maps in the other way."""
    found = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1)
    for layer in found:
        small_maps.replace_convolutions(layer)
    return found


def test_small_maps_take_the_other_way(layers, monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: asked.append(tuple(x.shape)))
    wide, point = layers
    with torch.no_grad():
        assert wide(torch.zeros(4, 6, 2, 2)).shape == (4, 4, 2, 2)
        assert point(torch.zeros(1, 6, 4, 4)).shape == (1, 4, 4, 4)
        assert asked == []
        wide(torch.zeros(3, 6, 2, 2))
        wide(torch.zeros(4, 6, 3, 2))
        point(torch.zeros(1, 6, 5, 4))
        point(torch.zeros(6, 2, 2))
    assert asked == [(3, 6, 2, 2), (4, 6, 3, 2), (1, 6, 5, 4), (6, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16])
def test_what_torch_refuses_is_refused(layers, dtype):
    for layer in layers:
        with pytest.raises(RuntimeError, match="type"):
            layer(torch.zeros(4, 6, 2, 2, dtype=dtype))


@pytest.mark.parametrize("name", ["ResNet50_vd", "ResNet18_vd", "Res2Net50_26w_4s", "ResNeXt50_32x4d"])
def test_a_network_gives_what_timms_does(name):
    network = networks.build(name, 10, seed=0).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # the last of a block begins at nought, and nothing behind it counts
            nn.init.uniform_(module.weight, 0.2, 0.5)
    pixels = torch.randint(0, 256, (4, 3, 32, 32)).double()
    given = network(pixels)
    assert any(type(module) is SmallMapConv2d for module in network.modules())
    small_maps.restore_convolutions(network)
    assert not any(type(module) is SmallMapConv2d for module in network.modules())
    torch.testing.assert_close(given, network(pixels), rtol=1e-9, atol=1e-12)


def test_under_autocast_both_ways_answer_in_bfloat16_and_add_gradients_up_in_float32(layers):
    torch.manual_seed(0)
    for layer in layers:
        x = torch.randn(64, 6, 2, 2)
        layer(x).square().sum().backward()
        exact = layer.weight.grad.clone()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        assert (layer.weight.grad - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame, ScaledStdConv2d])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (7, 2), (3, 4), ((3, 1), (2, 1))])
def test_all_of_a_gradient_is_written_where_a_step_is_longer_than_the_map(kind, kernel, stride):
    """torch leaves in bfloat16 what was in the memory, which is NaN here."""
    torch.manual_seed(0)
    padding = tuple(side // 2 for side in kernel) if isinstance(kernel, tuple) else kernel // 2
    for groups, batch, side in itertools.product((1, 4), (1, 8), (1, 2, 3)):
        layer = nn.Sequential(kind(64, 32, kernel, stride=stride, padding=padding, groups=groups))
        layer = layer.to(memory_format=torch.channels_last)
        small_maps.replace_convolutions(layer)
        pixels, found = torch.randn(batch, 64, side, side).to(memory_format=torch.channels_last), []
        for low in (True, False):
            layer.zero_grad()
            left = [torch.full((layer[0].weight.numel() * n,), torch.nan, dtype=torch.bfloat16) for n in (1, 2, 4)]
            del left
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                y = layer(pixels)
            assert (y.dtype == torch.bfloat16) == low
            (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            found.append(layer[0].weight.grad)
        assert (found[0] - found[1]).norm() <= 0.02 * found[1].norm() + 1e-6, (groups, batch, side)


def test_every_kind_of_convolution_is_itself_again():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Conv2dSame(4, 4, 3), ScaledStdConv2d(4, 4, 3), nn.Conv1d(4, 4, 3))
    kinds = [type(module) for module in network]
    for _ in range(2):  # the second time there is nothing to do
        small_maps.replace_convolutions(network)
    replaced = [type(module) for module in network]
    assert [new is old for new, old in zip(replaced, kinds, strict=True)] == [False, False, False, True]
    small_maps.restore_convolutions(network)
    assert [type(module) for module in network] == kinds


def test_gradients_lie_as_the_weights_do_so_that_several_processes_need_not_copy_them(layers, alone):
    network = nn.Sequential(layers[1], nn.Conv2d(4, 6, 1, bias=False), layers[0]).to(memory_format=torch.channels_last)
    small_maps.replace_convolutions(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # DDP's, of strides
        DistributedDataParallel(network)(torch.randn(8, 6, 2, 2)).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_a_network_to_export_is_a_copy_with_torchs_convolutions():
    network = networks.build("test_resnet", 3, seed=0).eval()
    kinds = [type(module) for module in network.modules()]
    copied = small_maps.exportable(network)
    assert SmallMapConv2d in kinds
    assert [type(module) for module in network.modules()] == kinds
    plain = [nn.Conv2d if kind is SmallMapConv2d else kind for kind in kinds]
    assert [type(module) for module in copied.modules()] == plain
    assert copied.state_dict().keys() == network.state_dict().keys()
    assert not {*map(id, copied.parameters())} & {*map(id, network.parameters())}


def test_a_packed_network_takes_batches_of_any_size(tmp_path):
    network = networks.build("test_resnet", 3, seed=0).eval()
    registry.pack(tmp_path / "model", network, 32, ["a", "b", "c"])
    assert any(type(module) is SmallMapConv2d for module in network.modules()), "packing changed the network"
    import mlflow.pytorch

    packed = mlflow.pytorch.load_model(str(tmp_path / "model"))
    for count in (1, 3, 8):
        pixels = torch.rand(count, 3, 32, 32) * 255
        torch.testing.assert_close(packed(pixels), network(pixels), rtol=1e-4, atol=1e-4)


CONVOLUTIONS = """
import timm.layers
import torch
from torch import nn
from pipeline.core import small_maps

for kind, channels, stride in ((nn.Conv2d, 13, 2), (nn.Conv2d, 3, 4), (timm.layers.Conv2dSame, 3, 2)):
    print(kind.__name__, channels, stride, flush=True)
    network = nn.Sequential(kind(channels, 48, 1, stride, bias=False)).to(memory_format=torch.channels_last)
    small_maps.replace_convolutions(network)
    x = torch.rand(3, channels, 256, 256).to(memory_format=torch.channels_last)
    for _ in range(20):
        network.zero_grad()
        network(x).sum().backward()
    expected = x[..., ::stride, ::stride].sum((0, 2, 3)).expand(48, channels)
    torch.testing.assert_close(network[0].weight.grad[:, :, 0, 0], expected, rtol=1e-4, atol=0)
"""


def test_nothing_is_written_past_the_memory_that_a_gradient_needs():
    """torch would: the process dies of it, or other values change."""
    variables = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CONVOLUTIONS]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr}"
