"""The networks by name: one table of what they are, registered with timm.

Importing this file makes every name of the table known to `timm.create_model`, beside timm's own names, which stay as
they are. `python -m models` prints the table.

Names are PaddleClas'. Where timm has the very same network, the row names it, and timm builds it; else the row says
what to build it from. Mind the case: `ResNet18` is PaddleClas' network, `resnet18` timm's, and they differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, model_entrypoint, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from models.blocks import (
    FirstProjectionResNet,
    PaddleBottle2neck,
    PlainBasicBlock,
    PlainBottleneck,
    VaBottleneck,
)

WSL = "ResNeXt101_32x16d_wsl"
IG1B = "fb_wsl_ig1b_ft_in1k"  # timm's tag for the hashtag weights, which the names ending in _wsl stand for

# who published weights, and what they were trained on; None: nobody said, or no source for it was found
PADDLE = {"source": "PaddleClas, docs/en/algorithm_introduction/ImageNet_models_en.md", "data": "ImageNet-1k"}
V2 = {
    "source": "PaddleClas, docs/en/models/ResNet_and_vd_en.md (teacher and data), README.md of 2020-10 (figures)",
    "data": "ImageNet-1k",
    "teacher": "ResNet152_vd",
    "only_paddle": True,
}
SSLD = {
    "source": "PaddleClas, docs/en/advanced_tutorials/distillation/distillation_en.md (teacher and data), "
    "docs/zh_CN/models/ImageNet1k/ResNet.md (figures)",
    "data": "ImageNet-1k and 4 million images mined from ImageNet-22k, without labels",
    "teacher": WSL,
    "only_paddle": True,
}
UNTOLD = {"source": PADDLE["source"], "only_paddle": True}
HASHTAGS = {**PADDLE, "data": "public images with hashtags (arXiv:1805.00932), then ImageNet-1k"}
HE = {"source": "github.com/KaimingHe/deep-residual-networks (one centre crop)", "data": "ImageNet-1k"}
PLAIN = {"source": "arXiv:1512.03385, tables 2 and 3 (plain networks: ten crops)", "data": "ImageNet-1k"}
TORCHVISION = {"source": "torchvision's documentation of its models (first weights)", "data": "ImageNet-1k"}

D18, D34, D101, D152, D200 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 12, 48, 3)
VD = {"stem_type": "deep", "stem_width": 32, "avg_down": True}


@dataclass(frozen=True)
class Network:
    """A row of the table."""

    name: str
    built_from: str | dict[str, Any]  # timm's network of this name, or the arguments of timm's ResNet
    parameters: int  # learnable, at 1,000 classes
    macs: int  # multiply-adds of convolutions and the last layer for one image of `resolution`
    top1: float | None = None  # published, on ImageNet-1k's validation images
    top5: float | None = None
    source: str | None = None
    data: str | None = None  # that the published weights were trained on
    teacher: str | None = None
    resolution: int = 224  # pixels a side, of the published figures
    only_paddle: bool = False  # the name stands for weights that PaddleClas alone published

    @property
    def timm_name(self) -> str | None:
        """timm's name for the very same network; None where timm has none."""
        return self.built_from if isinstance(self.built_from, str) else None


def _with(block: type[nn.Module], layers: tuple[int, ...], model: type[ResNet] = ResNet, **rest: Any) -> dict[str, Any]:
    return {"model": model, "block": block, "layers": layers, **rest}


def _first(layers: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    return _with(BasicBlock, layers, FirstProjectionResNet, **rest)


def _res2(**rest: Any) -> dict[str, Any]:
    return _with(PaddleBottle2neck, D34, base_width=26, block_args={"scale": 4}, **rest)


# fmt: off
TABLE = (
    # vb: the stride on the 3x3 (of 50 layers and more)
    Network("ResNet18", _first(D18), 11_693_736, 1_826_918_400, 0.7098, 0.8992, **PADDLE),
    Network("ResNet34", _first(D34), 21_801_896, 3_676_606_464, 0.7457, 0.9214, **PADDLE),
    Network("ResNet50", "resnet50", 25_557_032, 4_089_184_256, 0.7650, 0.9300, **PADDLE),
    Network("ResNet101", "resnet101", 44_549_160, 7_801_405_440, 0.7756, 0.9364, **PADDLE),
    Network("ResNet152", "resnet152", 60_192_808, 11_513_626_624, 0.7826, 0.9396, **PADDLE),
    # va: the stride on the first 1x1, as first published
    Network("ResNet50_va", _with(VaBottleneck, D34), 25_557_032, 3_857_973_248, 0.753, 0.922, **HE),
    Network("ResNet101_va", _with(VaBottleneck, D101), 44_549_160, 7_570_194_432, 0.764, 0.929, **HE),
    Network("ResNet152_va", _with(VaBottleneck, D152), 60_192_808, 11_282_415_616, 0.770, 0.933, **HE),
    # vc: three 3x3 for the 7x7 of the stem
    Network("ResNet50_vc", "resnet50c", 25_576_264, 4_328_824_832, 0.7835, 0.9403, **PADDLE),
    # vd: and shortcuts that pool before they project
    Network("ResNet18_vd", _first(D18, **VD), 11_712_968, 2_066_558_976, 0.7226, 0.9080, **PADDLE),
    Network("ResNet34_vd", _first(D34, **VD), 21_821_128, 3_916_247_040, 0.7598, 0.9298, **PADDLE),
    Network("ResNet50_vd", "resnet50d", 25_576_264, 4_328_824_832, 0.7912, 0.9444, **PADDLE),
    Network("ResNet101_vd", "resnet101d", 44_568_392, 8_041_046_016, 0.8017, 0.9497, **PADDLE),
    Network("ResNet152_vd", "resnet152d", 60_212_040, 11_753_267_200, 0.8059, 0.9530, **PADDLE),
    Network("ResNet200_vd", _with(Bottleneck, D200, **VD), 74_738_504, 15_247_122_432, 0.8093, 0.9533, **PADDLE),
    # the same networks, distilled
    Network("ResNet50_vd_v2", "resnet50d", 25_576_264, 4_328_824_832, 0.7984, 0.9493, **V2),
    Network("ResNet34_vd_ssld", _first(D34, **VD), 21_821_128, 3_916_247_040, 0.7972, 0.9490, **UNTOLD),
    Network("ResNet50_vd_ssld", "resnet50d", 25_576_264, 4_328_824_832, 0.8300, 0.9640, **SSLD),
    Network("Fix_ResNet50_vd_ssld", "resnet50d", 25_576_264, 8_832_204_800, 0.840, 0.970, **SSLD, resolution=320),
    Network("ResNet101_vd_ssld", "resnet101d", 44_568_392, 8_041_046_016, 0.8373, 0.9669, **SSLD),
    # groups, wider blocks, splits within a block
    Network("ResNeXt50_32x4d", "resnext50_32x4d", 25_028_904, 4_230_479_872, 0.7775, 0.9382, **PADDLE),
    Network("ResNeXt50_vd_32x4d", "resnext50d_32x4d", 25_048_136, 4_470_120_448, 0.7956, 0.9462, **PADDLE),
    Network("ResNeXt101_32x8d_wsl", f"resnext101_32x8d.{IG1B}", 88_791_336, 16_414_015_488, 0.8255, 0.9674, **HASHTAGS),
    Network(WSL, f"resnext101_32x16d.{IG1B}", 194_026_792, 36_163_289_088, 0.8424, 0.9726, **HASHTAGS),
    Network("Wide_ResNet50_2", "wide_resnet50_2", 68_883_240, 11_398_021_120, 0.7847, 0.9409, **TORCHVISION),
    Network("Wide_ResNet101_2", "wide_resnet101_2", 126_886_696, 22_753_050_624, 0.7884, 0.9428, **TORCHVISION),
    Network("Res2Net50_26w_4s", _res2(), 25_699_120, 4_255_166_464, 0.7933, 0.9457, **PADDLE),
    Network("Res2Net50_vd_26w_4s", _res2(**VD), 25_718_352, 4_494_807_040, 0.7975, 0.9491, **PADDLE),
    # without shortcuts, as the residual paper's comparison
    Network("PlainNet18", _with(PlainBasicBlock, D18), 11_515_688, 1_794_805_760, 0.7206, **PLAIN),
    Network("PlainNet34", _with(PlainBasicBlock, D34), 21_623_848, 3_644_493_824, 0.7146, 0.8998, **PLAIN),
    Network("PlainNet50", _with(PlainBottleneck, D34), 22_780_456, 3_729_522_688),
)
# fmt: on

BY_NAME = {network.name: network for network in TABLE}


def _default_cfg(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1.0" if "stem_type" in parts else "conv1",
        "classifier": "fc",
    }


def _entrypoint(network: Network) -> Callable[..., nn.Module]:
    """Make what timm calls to build a network of the table."""

    def build(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        elsewhere = pretrained_cfg or kwargs.get("pretrained_cfg_overlay")
        if pretrained and not elsewhere and (network.only_paddle or network.timm_name is None):
            raise ValueError(
                f"{network.name}: timm has no weights for it; take PaddleClas' .pdparams file through "
                "`python -m models.import_paddle` and give what it writes as checkpoint"
            )
        if network.timm_name is not None:
            base, _, tag = network.timm_name.partition(".")
            return model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=pretrained_cfg or tag or None, **kwargs)
        arguments = {**network.built_from, **kwargs}
        return build_model_with_cfg(arguments.pop("model"), network.name, pretrained, pretrained_cfg, **arguments)

    build.__name__ = build.__qualname__ = network.name
    build.__doc__ = f"Build {network.name}; arguments as for timm's ResNet."
    return build


# timm looks for `default_cfgs` in the module of the function that it registers
default_cfgs = generate_default_cfgs(
    {network.name: _default_cfg(network.built_from) for network in TABLE if network.timm_name is None}
)
globals().update({network.name: register_model(_entrypoint(network)) for network in TABLE})
