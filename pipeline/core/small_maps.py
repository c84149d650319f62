"""Convolutions of small maps as matrix products, on a CPU.

A deep network makes of 32 pixels a side maps of 2 x 2 and 1 x 1. There, a CPU's convolutions (oneDNN's) go through the
batch image by image and read all weights for each of them; a matrix product takes the whole batch at once. What is
added up is the same, so results differ by rounding alone. `python benchmarks/engine.py step` shows what it gains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

POINTWISE = 16  # largest map, in positions, of which a 1 x 1 convolution is a matrix product
WHOLE = 2  # most positions a side of a map of which a 3 x 3 convolution is one
FEW = 4  # fewest images for which it pays to write that convolution's weights out


def as_products(network: nn.Module) -> nn.Module:
    """Let every plain convolution of a network compute as this file says; its parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallMapConv2d
    return network


def as_convolutions(network: nn.Module) -> nn.Module:
    """Take back what `as_products` did."""
    for module in network.modules():
        if type(module) is SmallMapConv2d:
            module.__class__ = nn.Conv2d
    return network


class SmallMapConv2d(nn.Conv2d):
    """torch's Conv2d, in another way where a map is small."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve features (B, C, H, W)."""
        height, width = x.shape[2:]
        if x.device.type == "cpu" and self.groups == 1 and self.padding_mode == "zeros":
            how = self.kernel_size, self.padding
            if how == ((1, 1), (0, 0)) and self.stride == (1, 1) and height * width <= POINTWISE:
                y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)  # (B, H, W, C')
                return y.permute(0, 3, 1, 2)
            small = max(height, width) <= WHOLE and len(x) >= FEW
            if how == ((3, 3), (1, 1)) and self.dilation == (1, 1) and small:
                return self._of_the_whole_map(x)
        return super().forward(x)

    def _of_the_whole_map(self, x: Tensor) -> Tensor:
        """Have each output position see all of the map, which a 3 x 3 kernel covers: (B, H W C) -> (B, H' W' C')."""
        batch, _, height, width = x.shape
        rows, columns = ((side - 1) // step + 1 for side, step in zip((height, width), self.stride, strict=True))
        taps = self.weight.permute(0, 2, 3, 1)  # (C', 3, 3, C), as it lies in memory where it is channels-last
        matrix = _Matrix.apply(taps, (height, width), (rows, columns), self.stride, x.dtype)
        bias = None if self.bias is None else self.bias.repeat(rows * columns)
        y = F.linear(x.permute(0, 2, 3, 1).reshape(batch, -1), matrix, bias)
        return y.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


class _Matrix(torch.autograd.Function):
    """The weights (H' W' C', H W C) by which a convolution makes an output map of an input map, from its taps.

    As a function of its own, since the gradient of slices would fill and add a tensor for each.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        taps: Tensor,
        size: tuple[int, int],
        positions: tuple[int, int],
        stride: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.seen = [
            (slice(1 - top, 1 - top + size[0]), slice(1 - left, 1 - left + size[1]))  # of the kernel, on the map
            for top in range(0, positions[0] * stride[0], stride[0])
            for left in range(0, positions[1] * stride[1], stride[1])
        ]
        ctx.taps, ctx.dtype = taps.shape, taps.dtype
        taps = taps.to(dtype)  # before it is copied several times
        return torch.cat([taps[:, down, right].flatten(1) for down, right in ctx.seen])

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        total = gradient.new_zeros(ctx.taps, dtype=ctx.dtype)
        for (down, right), part in zip(ctx.seen, gradient.chunk(len(ctx.seen)), strict=True):
            place = total[:, down, right]
            place += part.view(place.shape)
        return total, None, None, None, None
