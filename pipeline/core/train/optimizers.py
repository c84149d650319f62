"""What moves the weights: a recipe's optimizer, the learning rate of each network stage, its schedule, the average."""

import contextlib
import math

import torch
from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import nn

import models
from pipeline.core.sections import StudentRecipe, TrainingRecipe


def learning_rate(step: int, steps: int, warmup_steps: float, highest: float) -> float:
    """Cosine from `highest` to 0 after a linear warm-up (Loshchilov & Hutter, arXiv:1608.03983, without restarts)."""
    if step < warmup_steps:
        return highest * (step + 1) / (warmup_steps + 1)
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1.0, steps - warmup_steps)))


def optimizer_of(part: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Make the optimizer of a network's trained part; weights of one dimension (biases, norms) do not decay.

    Each group's `lr_multiplier` is that of its network stage; the last layer's is 1.
    """
    groups = []
    for multiplier, weights in multipliers_and_weights(part, recipe):
        decayed, others = [p for p in weights if p.ndim >= 2], [p for p in weights if p.ndim < 2]
        groups.append({"params": decayed, "weight_decay": recipe.weight_decay, "lr_multiplier": multiplier})
        groups.append({"params": others, "weight_decay": 0.0, "lr_multiplier": multiplier})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def multipliers_and_weights(part: nn.Module, recipe: TrainingRecipe) -> list[tuple[float, list[nn.Parameter]]]:
    """Give the learning-rate multipliers and the trained weights of each, the last layer's first.

    Five numbers, as PaddleClas' lr_mult_list: for the stem (a vd network's three convolutions), then for each of the
    four residual stages, norms and shortcuts included (ppcls/arch/backbone/legendary_models/resnet.py). timm says which
    weight is of which stage; networks of another family with five stages are cut in the same way.

    Raises:
        ValueError: the network has another number of stages, as most that are no ResNet's kin have.
    """
    multipliers = recipe.lr_multipliers if isinstance(recipe, StudentRecipe) else None
    if multipliers is None:
        return [(1.0, [p for p in part.parameters() if p.requires_grad])]
    stage_of: dict[str, int] = {}
    if hasattr(part, "group_matcher"):  # most of timm's networks
        with contextlib.suppress(AssertionError):  # of those that have no coarse grouping
            stage_of = group_parameters(part, part.group_matcher(coarse=True), reverse=True)
    count = len(set(stage_of.values()))
    if count != len(multipliers) + 1:
        groups = f"{count - 1} groups" if stage_of else "no known groups"
        raise ValueError(
            f"lr_multipliers has {len(multipliers)} numbers, for a stem and four stages; {type(part).__name__} has "
            f"{groups} of layers before its last: set it to null"
        )
    of_last_layer = {p for layer in models.last_layers(part) for p in layer.parameters()}
    weights: list[list[nn.Parameter]] = [[] for _ in range(count)]
    for name, p in part.named_parameters():
        if p.requires_grad:  # what timm puts between the last stage and the last layer belongs to that stage here
            weights[-1 if p in of_last_layer else min(stage_of[name], count - 2)].append(p)
    return [(1.0, weights[-1]), *zip(multipliers, weights[:-1], strict=True)]


class Average(ModelEmaV3):
    """timm's average of a network's weights over the steps; a module that stands in several places is averaged once.

    The decay of step n is min(decay, 1 - (1 + n)^(-2/3)), timm's warm-up: what began at random is soon forgotten.

    timm goes through the state dict, where such a module's weights are found under each of its names: in a CoaT, those
    of some would be averaged nine times a step.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, decay, use_warmup=True)

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards a network by 1 - decay; what is counted, as BatchNorm's batches, is taken over."""
        states = (network.state_dict(keep_vars=True).values() for network in (self.module, model))
        pairs = {id(own): (own, new) for own, new in zip(*states, strict=True)}.values()
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        self._foreach_lerp_([own for own, _ in moved], [new for _, new in moved], 1 - decay)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)
