"""The networks: their size against PaddleClas', their names beside timm's, and what sets each kind apart."""

import json
import os
from pathlib import Path

import httpx2
import pytest
import timm
import torch
from torch import nn

import models
from models.__main__ import table

DATA = Path(os.environ.get("SSLD_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
REFERENCE = DATA.parent / "paddleclas_reference"
OWN = [network.name for network in models.TABLE if network.timm_name is None]
ONE_BLOCK_A_STAGE = (1, 1, 1, 1)


def outline(name, **kwargs):
    with torch.device("meta"):
        return models.build(name, **kwargs)


def size(network):
    return sum(p.numel() for p in network.parameters())


def tiny(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return models.build(name, num_classes=5, layers=ONE_BLOCK_A_STAGE, **kwargs)


def test_parameters_equal_paddleclas():
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE} is not there")
    reference = json.loads((REFERENCE / "state_dicts.json").read_text())
    assert len(reference) == 18
    assert {name: size(outline(name)) for name in reference} == {
        name: entry["learnable_parameters"] for name, entry in reference.items()
    }


def test_teacher_and_student_have_the_published_size():
    assert size(outline("ResNet152_vd", num_classes=1000)) == 60_212_040
    assert size(outline("ResNet50_vd", num_classes=1000)) == 25_576_264


@pytest.mark.parametrize("row", models.TABLE, ids=lambda row: row.name)
def test_table_tells_the_truth(row):
    network = outline(row.name)
    assert size(network) == row.parameters
    assert models.macs(network, row.resolution) == row.macs
    if row.top1 is not None:
        assert 0.5 < row.top1 < (1 if row.top5 is None else row.top5) <= 1
        assert row.source
    assert row.teacher is None or row.teacher in models.names()


def test_the_docs_have_the_table():
    assert "\n" + table() + "\n" in (Path(__file__).parents[1] / "docs/networks.md").read_text()
    rows = [line.split(" | ") for line in table().splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {9}
    assert [row[0].removeprefix("| ") for row in rows[2:]] == list(models.names())


def test_macs_are_those_of_the_arithmetic():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10)).train()
    assert models.macs(network, resolution=8) == 4 * 4 * 8 * 3 * 3 * 3 + 8 * 4 * 4 * 10
    assert network.training
    assert next(network.parameters()).device.type == "cpu"


def test_names_stand_beside_those_of_timm():
    ours = {name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__ == "models.networks"}
    assert ours == set(models.names())
    assert not [name for name in models.names() if hasattr(timm.models, name)], "timm has a network of that name"
    assert size(outline("resnet18")) == 11_689_512, "timm's own is no longer what torchvision has"


def test_timm_builds_the_networks_by_their_names():
    network = timm.create_model("ResNet34_vd", num_classes=7, layers=ONE_BLOCK_A_STAGE)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert network.default_cfg["first_conv"] == "conv1.0"
    assert timm.create_model("ResNet50_vd", num_classes=0, layers=ONE_BLOCK_A_STAGE).num_features == 2048


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("ResNet50_vd", "resnet50d"),
        ("ResNet50_vd_ssld", "resnet50d"),
        ("ResNet152_vd", "resnet152d"),
        ("ResNet50", "resnet50"),
        ("ResNet50_vb", "resnet50"),
        ("ResNet18_vb", "ResNet18"),
        ("ResNet18", "ResNet18"),
        ("resnet18", "resnet18"),
        ("resnet50d.gluon_in1k", "resnet50d.gluon_in1k"),
        ("ResNet50_vd.gluon_in1k", "resnet50d.gluon_in1k"),
        ("ResNeXt101_32x16d_wsl", "resnext101_32x16d.fb_wsl_ig1b_ft_in1k"),
        ("ResNeXt101_32x16d_wsl.fb_swsl_ig1b_ft_in1k", "resnext101_32x16d.fb_swsl_ig1b_ft_in1k"),
    ],
)
def test_both_spellings_lead_to_the_same_network(name, timm_name):
    assert models.canonical(name) == timm_name
    assert models.canonical(timm_name) == timm_name
    assert outline(name).state_dict().keys() == outline(timm_name).state_dict().keys()


def test_a_name_of_paddleclas_gives_just_what_timm_builds():
    theirs, ours = tiny("resnet50d"), tiny("ResNet50_vd_ssld")
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in ours.state_dict().items())
    assert outline("ResNeXt101_32x16d_wsl").pretrained_cfg["tag"] == "fb_wsl_ig1b_ft_in1k"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("ResNet50vd", "ResNet50_vd"),
        ("resnet50_vd", "ResNet50_vd"),
        ("resnet51d", "resnet50d"),
        ("ResNet152_vd_v2", "ResNet152_vd"),
        ("ig_resnext101_32x16d", "resnext101_32x16d"),  # timm's old name, which it now maps to another network
        ("resnet50d.gluon", "resnet50d.gluon_in1k"),
        ("ResNet18.a1_in1k", "none"),
        ("", "ResNet50"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(wrong, nearest):
    for function in (models.canonical, models.build):
        with pytest.raises(ValueError, match=nearest) as caught:
            function(wrong)
        assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("name", ["ResNet18", "ResNet200_vd", "ResNet50_vd_ssld", "ResNet50_vd_v2", "PlainNet34"])
def test_weights_that_timm_lacks_are_not_replaced_by_others(name):
    with pytest.raises(ValueError, match="import_paddle"):
        models.build(name, pretrained=True)


@pytest.mark.parametrize("error", [httpx2.ReadError("reset by peer"), httpx2.ProxyError("407"), OSError("none")])
def test_a_download_that_fails_is_an_error_of_a_line(monkeypatch, error):
    def create(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match=f"^resnet18: its pretrained weights cannot be had .*: {error}$"):
        models.build("resnet18", pretrained=True)


@pytest.mark.parametrize("name", OWN)
def test_every_weight_learns(name):
    network = tiny(name, **({} if name.startswith("Plain") else {"zero_init_last": False}))
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_the_first_shortcut_projects_in_18_and_34_layers_only():
    for name in ("ResNet18", "ResNet34", "ResNet18_vd", "ResNet34_vd"):
        network = tiny(name)
        assert len(network.layer1[0].downsample) == (3 if name.endswith("vd") else 2)
        weight = network.layer1[0].downsample[-2].weight
        assert weight.shape == (64, 64, 1, 1)
        assert 0.8 < weight.std().item() / (2 / 64) ** 0.5 < 1.2, "not initialised as the other convolutions"
    assert timm.create_model("resnet18", layers=ONE_BLOCK_A_STAGE).layer1[0].downsample is None


def test_the_va_form_has_its_stride_on_the_first_convolution():
    va, vb = tiny("ResNet50_va").eval(), tiny("ResNet50").eval()
    va.load_state_dict(vb.state_dict())
    assert [stage[0].conv1.stride[0] for stage in (va.layer1, va.layer2, va.layer3, va.layer4)] == [1, 2, 2, 2]
    assert [stage[0].conv2.stride[0] for stage in (va.layer1, va.layer2, va.layer3, va.layer4)] == [1, 1, 1, 1]
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(va.layer1(x), vb.layer1(x))
    x = torch.randn(1, 256, 8, 8)
    nn.init.ones_(va.layer2[0].bn3.weight)  # timm's residual branches start out at zero
    out_of_sight = torch.zeros_like(x)
    out_of_sight[:, :, 1::2, 1::2] = 1  # what neither 1x1 convolution of stride 2 looks at
    assert torch.equal(va.layer2(x), va.layer2(x + out_of_sight))
    vb.load_state_dict(va.state_dict())
    assert not torch.equal(vb.layer2(x), vb.layer2(x + out_of_sight))


@pytest.mark.parametrize(("plain", "residual"), [("PlainNet18", "ResNet18"), ("PlainNet50", "ResNet50")])
def test_a_plain_network_has_no_way_round_its_blocks(plain, residual):
    x = torch.rand(2, 64, 8, 8)
    for name, passes in ((plain, False), (residual, True)):
        block = tiny(name).eval().layer1[0]
        last = block.bn2 if "18" in name else block.bn3
        nn.init.zeros_(last.weight)
        assert bool(block(x).any()) == passes
    assert not [key for key in tiny(plain).state_dict() if "downsample" in key]
    assert tiny(plain)(torch.rand(2, 3, 32, 32)).std() > 0, "a plain network must not start out dead"


def test_depth_and_width_can_be_set_for_a_study():
    shallow, deep = (models.build("PlainNet18", num_classes=10, layers=(n,) * 4) for n in (1, 3))
    assert sum(isinstance(m, nn.Conv2d) for m in deep.modules()) == 1 + 2 * 3 * 4
    assert size(deep) > size(shallow)
