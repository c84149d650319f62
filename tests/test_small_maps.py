"""Convolutions of small maps as matrix products: what torch's convolutions give, to rounding."""

import itertools

import pytest
import torch
from torch import nn

import models
from pipeline.core import networks, small_maps
from pipeline.core.small_maps import SmallMapConv2d

KERNELS = {
    "1 x 1": {"kernel_size": 1},
    "1 x 1, padded": {"kernel_size": 1, "padding": 1},
    "1 x 1, a step of two": {"kernel_size": 1, "stride": 2},
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "3 x 3, a step of two": {"kernel_size": 3, "padding": 1, "stride": 2},
    "3 x 3, a step of two downwards": {"kernel_size": 3, "padding": 1, "stride": (2, 1)},
    "3 x 3, no padding": {"kernel_size": 3, "padding": 0},
    "3 x 3, other padding": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "3 x 3, dilated": {"kernel_size": 3, "padding": 1, "dilation": 2},
    "3 x 3, in groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "3 x 1": {"kernel_size": (3, 1), "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same"},
}
SIZES = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2), (4, 4), (5, 5)]


def both_ways(how, bias, size, batch):
    """Give a convolution's output and its three gradients, by torch and in the other way."""
    torch.manual_seed(0)
    one = nn.Conv2d(6, 4, bias=bias, **how).double()
    other = nn.Conv2d(6, 4, bias=bias, **how).double()
    other.load_state_dict(one.state_dict())
    small_maps.as_products(other)
    assert type(other) is SmallMapConv2d
    x = torch.randn(batch, 6, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    found = []
    for layer in (one, other):
        given = x.clone().requires_grad_()
        y = layer(given)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        found.append((y, given.grad, *(parameter.grad for parameter in layer.parameters())))
    return zip(*found, strict=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_what_torchs_does_and_learns_as_it_does(kernel, bias):
    tried = 0
    for size, batch in itertools.product(SIZES, (1, 5)):
        try:
            nn.Conv2d(6, 4, bias=bias, **KERNELS[kernel])(torch.zeros(1, 6, *size))
        except RuntimeError:  # a map that the kernel does not fit on
            continue
        for expected, given in both_ways(KERNELS[kernel], bias, size, batch):
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-13)
        tried += 1
    assert tried >= 4


def test_small_maps_take_the_other_way(monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: asked.append(tuple(x.shape)))
    wide = small_maps.as_products(nn.Conv2d(6, 4, 3, padding=1))
    point = small_maps.as_products(nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        assert wide(torch.zeros(4, 6, 2, 2)).shape == (4, 4, 2, 2)
        assert point(torch.zeros(1, 6, 4, 4)).shape == (1, 4, 4, 4)
        assert asked == []
        wide(torch.zeros(3, 6, 2, 2))
        wide(torch.zeros(4, 6, 3, 2))
        point(torch.zeros(1, 6, 5, 4))
    assert asked == [(3, 6, 2, 2), (4, 6, 3, 2), (1, 6, 5, 4)]


@pytest.mark.parametrize("name", ["ResNet50_vd", "ResNet18_vd", "Res2Net50_26w_4s", "ResNeXt50_32x4d"])
def test_a_network_gives_what_timms_does(name):
    torch.manual_seed(0)
    network = models.build(name, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # the last of a block begins at nought, and nothing behind it counts
            nn.init.uniform_(module.weight, 0.2, 0.5)
    plain = networks.Classifier(network).double().eval()
    pixels = torch.randint(0, 256, (4, 3, 32, 32)).double()
    given = plain(pixels)
    assert any(type(module) is SmallMapConv2d for module in plain.modules())
    small_maps.as_convolutions(plain)
    assert not any(type(module) is SmallMapConv2d for module in plain.modules())
    torch.testing.assert_close(given, plain(pixels), rtol=1e-9, atol=1e-12)


def test_in_bfloat16_the_gradient_of_the_weights_is_added_up_in_float32():
    torch.manual_seed(0)
    layer = small_maps.as_products(nn.Conv2d(8, 8, 3, padding=1, bias=False))
    x = torch.randn(64, 8, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.bfloat16()).float().square().sum().backward()
    given = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert given.dtype == torch.float32
    assert (given - layer.weight.grad).norm() < 0.01 * layer.weight.grad.norm()
