"""The narrow networks of the residual paper's CIFAR experiments: 6n + 2 layers, plain or residual, of timm's parts.

He et al., arXiv:1512.03385, section 4.2: a 3x3 convolution, three stages of n blocks of two 3x3 convolutions with
widths 16, 32 and 64, global average pooling, a classifier. The shortcuts that change shape are 1x1 convolutions, the
paper's option B; on CIFAR it padded with zeros, option A, which costs no parameters.
"""

from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from models.blocks import PlainBasicBlock

KINDS = ("plain", "residual", "identity")


class NarrowResNet(ResNet):
    """timm's ResNet without its fourth stage, and with one 3x3 convolution for a stem that keeps the resolution.

    Args:
        block: BasicBlock or PlainBasicBlock.
        blocks: n, of each stage.
        width: channels of the first stage, even.
        kwargs: for timm's ResNet, such as `num_classes`.
    """

    def __init__(self, block: type[BasicBlock], blocks: int, width: int = 16, **kwargs: Any):
        # of the stems that timm has, the deep one alone can be narrow; its first layer takes the place of all three
        channels = (width, 2 * width, 4 * width)
        super().__init__(block, (blocks,) * 3, channels=channels, stem_type="deep", stem_width=width // 2, **kwargs)
        self.conv1 = nn.Conv2d(self.in_chans, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        self.feature_info = [
            {"num_chs": width, "reduction": 1, "module": "act1"},
            *({"num_chs": n, "reduction": 2**at, "module": f"layer{at + 1}"} for at, n in enumerate(channels)),
        ]


def build(kind: str, depth: int, num_classes: int, width: int = 16) -> NarrowResNet:
    """Build a network of `depth` layers with random weights.

    Args:
        kind: "plain"; "residual", as published; or "identity": residual blocks whose last norm starts at zero, so that
            each starts as the identity (Goyal et al., arXiv:1706.02677, section 5.1), as this project's other networks
            do.
        depth: 6n + 2.
        num_classes: logits that it gives.
        width: channels of the first stage; the paper's is 16.

    Raises:
        ValueError: another kind, a depth that is not 6n + 2 with n from 1 on, or an odd width.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r}: no such kind of network; there are {', '.join(KINDS)}")
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth {depth}: not 6n + 2 layers, with n from 1 on, such as 8, 14, 20, 32, 44, 56 or 110")
    if width < 2 or width % 2:
        raise ValueError(f"width {width}: should be an even number of channels, from 2 on")
    block = PlainBasicBlock if kind == "plain" else BasicBlock
    blocks = (depth - 2) // 6
    return NarrowResNet(block, blocks, width, num_classes=num_classes, zero_init_last=kind == "identity")
