"""BatchNorm over the batch of all processes, so that their number does not change what a network learns.

On CUDA it is torch's SyncBatchNorm, which works nowhere else. Elsewhere the first two moments are averaged over the
processes: some elementwise operations more than torch's own BatchNorm, and two small messages a layer and step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of a network see the batch of all processes; parameters and their names stay.

    Ioffe & Szegedy, arXiv:1502.03167, with the mean and variance of the whole batch. In eval mode nothing changes.

    Raises:
        ValueError: off CUDA, it has one of a kind that is not known here.
    """
    if device.type == "cuda":
        return convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and type(module) not in SHARED.values():
            plain = module.affine and module.track_running_stats and module.momentum is not None
            if type(module) not in SHARED or not plain:
                of = "" if plain else " without weights, running statistics or momentum"
                raise ValueError(f"{type(module).__name__}{of} cannot be shared on a CPU: set machine.processes to 1")
            module.__class__ = SHARED[type(module)]
    return network


class _Shared(_BatchNorm):
    """A BatchNorm over the batch of all processes, each of which holds as many images."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features (B, C, ...); timm's BatchNorm also applies its activation."""
        normalised = _normalise(self, x)
        return self.act(self.drop(normalised)) if isinstance(self, BatchNormAct2d) else normalised


SHARED = {
    kind: type(f"Shared{kind.__name__}", (_Shared, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
}


class _SumOverProcesses(torch.autograd.Function):
    """A tensor added up over all processes, which they all get; so is, on the way back, its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, summand: Tensor) -> Tensor:
        total = summand.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)


def _normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    wide = x.to(norm.weight.dtype)  # under autocast x is bfloat16, in which no sum is exact enough
    others = (0, *range(2, x.ndim))  # all dimensions but the channels'
    variance, mean = torch.var_mean(wide, others, correction=0)  # (C,) each, of this process
    # Processes hold as many images each, so moments can be averaged; in float64 their difference loses nothing.
    moments = torch.stack([mean.double(), variance.double() + mean.double().square()])
    first, second = _SumOverProcesses.apply(moments) / dist.get_world_size()
    mean, variance = first.to(wide.dtype), (second - first.square()).to(wide.dtype)
    count = x.numel() // x.shape[1] * dist.get_world_size()
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    scale, channels = norm.weight * torch.rsqrt(variance + norm.eps), (-1, *[1] * (x.ndim - 2))
    return ((wide - mean.view(channels)) * scale.view(channels) + norm.bias.view(channels)).to(x.dtype)
