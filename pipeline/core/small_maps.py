"""Convolutions on a CPU: of small maps as matrix products, which are faster, and all with gradients that are right.

A deep network makes of images of 32 pixels maps of 2 x 2 and 1 x 1 positions. There, a CPU's convolutions (oneDNN's) go
through the batch image by image and read all weights for each of them; a matrix product takes the whole batch at once.
What is added up is the same, so results differ by rounding alone. `python benchmarks/engine.py step` shows the gain.

Where a convolution under bfloat16 autocast takes steps that are longer than its map's side, torch 2.15 (oneDNN 3.13)
does not write the gradient of the taps that never lie on the map: whatever was in that memory stays, NaN among it. And
of a 1 x 1 convolution of few channels that takes steps of more than one, in float32 and channels-last order, it writes
past the memory that it works in (oneDNN's issue 6035): other values change, or the process dies.
"""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

# Within these, products were faster on an Intel Xeon with AMX: ResNet18_vd, ResNet50_vd and ResNet152_vd, in float32
# and bfloat16, at 32 and 64 pixels. Without the first, photographs were slower in bfloat16; without the last, single
# images were.
POINTWISE = 16  # most positions of a map of which a 1 x 1 convolution is a product
WHOLE = 2  # most positions a side of a map of which a 3 x 3 convolution is one
FEW = 4  # fewest images for which it pays to write that convolution's matrix
BLOCK = 16  # most channels that oneDNN takes at once: with fewer, a 1 x 1 convolution in steps overruns its memory


def replace_convolutions(network: nn.Module) -> None:
    """Let every convolution of a network compute small maps as this file says; parameters and names stay."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, WholeGradientConv2d):
            module.__class__ = _replacement(type(module))


def restore_convolutions(network: nn.Module) -> None:
    """Take back what `replace_convolutions` did."""
    for module in network.modules():
        if isinstance(module, WholeGradientConv2d):
            kinds = type(module).__mro__
            module.__class__ = kinds[kinds.index(WholeGradientConv2d) + 1]


def exportable(network: nn.Module) -> nn.Module:
    """Copy a network, with torch's own convolutions: of these here, an exported program would take one batch size."""
    network = copy.deepcopy(network)
    restore_convolutions(network)
    return network


class WholeGradientConv2d(nn.Conv2d):
    """A convolution all of whose gradient is written, and nothing else: in another way where torch fails in that."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve features (B, C, H, W)."""
        if self._would_overrun(x):
            steps, self.stride = self.stride, (1, 1)
            try:
                return super().forward(x[..., :: steps[0], :: steps[1]])  # all that the convolution looks at
            finally:
                self.stride = steps
        if not self._would_leave_some(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))

    def _would_overrun(self, x: Tensor) -> bool:
        points = self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid")
        return x.device.type == "cpu" and points and max(self.stride) > 1 and self.in_channels < BLOCK

    def _would_leave_some(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return False
        sides = zip(self.stride, x.shape[-2:], self.kernel_size, strict=True)
        learns = self.weight.requires_grad and (self.training or torch.is_grad_enabled())  # or, of checkpointed layers
        return learns and any(step > side and taps > 1 for step, side, taps in sides)


@functools.cache
def _replacement(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The class that takes a convolution's place; of timm's own kinds only the gradient is looked after."""
    return SmallMapConv2d if kind is nn.Conv2d else type(kind.__name__, (WholeGradientConv2d, kind), {})


class SmallMapConv2d(WholeGradientConv2d):
    """torch's Conv2d, in another way where a map is small; then its output is channels-last.

    Of a 3 x 3 convolution of 2 x 2 maps the matrix, 16/9 of the weights, is kept until the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve features (B, C, H, W)."""
        if x.device.type == "cpu" and x.ndim == 4 and self.groups == 1 and self.padding_mode == "zeros":
            batch, _, height, width = x.shape
            kind = self.kernel_size, self.padding, self.dilation
            fits = x.dtype == self.weight.dtype or torch.is_autocast_enabled("cpu")  # else torch has a word to say
            if kind == ((1, 1), (0, 0), (1, 1)) and self.stride == (1, 1) and height * width <= POINTWISE and fits:
                return self._pointwise(x)
            if kind == ((3, 3), (1, 1), (1, 1)) and max(height, width) <= WHOLE and batch >= FEW and fits:
                return self._whole_map(x)
        return super().forward(x)

    def _pointwise(self, x: Tensor) -> Tensor:
        # Not flatten(1): its gradient would have other strides than a channels-last weight, which DDP would copy.
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)  # (C', C)
        return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)

    def _whole_map(self, x: Tensor) -> Tensor:
        """Let each output position see the whole map, which a 3 x 3 kernel covers: (B, H W C) -> (B, H' W' C')."""
        batch, _, height, width = x.shape
        rows, columns = ((side - 1) // step + 1 for side, step in zip((height, width), self.stride, strict=True))
        taps = self.weight.permute(0, 2, 3, 1)  # (C', 3, 3, C), as it lies in memory where it is channels-last
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else taps.dtype
        matrix = _Matrix.apply(taps, (height, width), (rows, columns), self.stride, dtype)
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
        ctx.on_map = [  # of each output position, the rows and columns of the kernel that lie on the map
            (slice(1 - top, 1 - top + size[0]), slice(1 - left, 1 - left + size[1]))
            for top in range(0, positions[0] * stride[0], stride[0])
            for left in range(0, positions[1] * stride[1], stride[1])
        ]
        ctx.shape, ctx.dtype = taps.shape, taps.dtype
        taps = taps.to(dtype)  # before it is copied several times
        return torch.cat([taps[:, down, right].flatten(1) for down, right in ctx.on_map])

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        total = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        for (down, right), part in zip(ctx.on_map, gradient.chunk(len(ctx.on_map)), strict=True):
            place = total[:, down, right]
            place += part.view(place.shape)
        return total, None, None, None, None
