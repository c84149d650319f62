"""The parts that timm lacks: what sets PaddleClas' and the residual papers' networks apart, made from timm's own.

Each class changes what timm built instead of building it again, so keys of the state dict are timm's.
"""

from typing import Any

from timm.layers import get_norm_layer
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_avg, downsample_conv
from torch import Tensor, nn


class FirstProjectionResNet(ResNet):
    """A ResNet that projects the shortcut of its very first block too, though nothing changes its shape there.

    PaddleClas' networks of 18 and 34 layers have it, and timm's have not: 64 x 64 weights and a batch norm more.
    """

    def __init__(self, *args: Any, avg_down: bool = False, norm_layer: Any = nn.BatchNorm2d, **kwargs: Any):
        super().__init__(*args, avg_down=avg_down, norm_layer=norm_layer, **kwargs)
        block = self.layer1[0]
        assert block.downsample is None, "timm now projects the first shortcut itself: take its own network"
        make = downsample_avg if avg_down else downsample_conv
        block.downsample = make(
            block.conv1.in_channels,
            block.conv2.out_channels,
            kernel_size=1,
            norm_layer=get_norm_layer(norm_layer),
            device=kwargs.get("device"),
            dtype=kwargs.get("dtype"),
        )
        convolution = block.downsample[-2]
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as timm does all others


class VaBottleneck(Bottleneck):
    """The first published bottleneck (arXiv:1512.03385): the stride is on the first 1x1, dropping 3/4 of its input."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride


class PaddleBottle2neck(Bottle2neck):
    """The Res2Net block as PaddleClas has it: only a stride, not also the first place in a stage, cuts the hierarchy.

    So the first block of stage 1 passes its splits on, where the paper's code pools; and the pooling of the other
    stages leaves the padding out of the mean. The parameters are the same.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, **kwargs: Any):
        super().__init__(inplanes, planes, stride, downsample, **kwargs)
        self.is_first = stride > 1
        pool = nn.AvgPool2d(kernel_size=3, stride=stride, padding=1, count_include_pad=False)
        self.pool = pool if self.is_first else None


class NoShortcut(nn.Module):
    """In a shortcut's place: nothing is added."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class _Plain:
    """Makes a residual block plain: the same layers in the same order, and no shortcut around them."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, **kwargs: Any):
        super().__init__(inplanes, planes, stride, NoShortcut(), **kwargs)

    def zero_init_last(self) -> None:
        """Leave the last batch norm at 1: a residual block may start as the identity, a plain one at zero is dead."""


class PlainBasicBlock(_Plain, BasicBlock):
    """Two 3x3 convolutions without a shortcut."""


class PlainBottleneck(_Plain, Bottleneck):
    """A bottleneck without a shortcut."""
