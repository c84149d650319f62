"""The one training loop. What a stage trains on and for arrives as batches and as a function from them to a loss.

A run is cut into steps. Everything a step needs follows from its number and the checkpoint, so a run that was killed
ends, on a CPU, in the same bytes as one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core import atomic
from pipeline.core.batches import Batch, TrainingOrder, Views, load
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.params import Recipe
from pipeline.core.progress import Progress

Loss = Callable[[nn.Module, Batch], Tensor]
History = list[dict[str, float]]


def learning_rate(step: int, steps: int, warmup_steps: float, highest: float) -> float:
    """Cosine from `highest` to 0 after a linear warm-up (Loshchilov & Hutter, arXiv:1608.03983, without restarts)."""
    if step < warmup_steps:
        return highest * (step + 1) / (warmup_steps + 1)
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1.0, steps - warmup_steps)))


def optimizer_of(part: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer of a network's trained part; weights of one dimension (biases, norms) do not decay."""
    weights = [p for p in part.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


@dataclass
class Run:
    """One training run: what to train, on what, for what, and where it keeps its checkpoint.

    Args:
        what: its name, for people.
        classifier: trained in place, and left in eval mode with the final weights.
        part: the part of it that is trained; the rest stays frozen and in eval mode.
        views, order: the batches.
        loss: (network, batch) -> mean loss of the batch.
        recipe: epochs, optimizer, schedule, average, precision.
        validate: classifier -> numbers, after each epoch.
        scratch: folder of the checkpoint.
        checkpoint_seconds: time between checkpoints.
        workers: processes that render views.
        on_epoch: told each epoch's number and figures, as they come.
    """

    what: str
    classifier: Classifier
    part: nn.Module
    views: Views
    order: TrainingOrder
    loss: Loss
    recipe: Recipe
    processes: Processes
    validate: Callable[[Classifier], dict[str, float]]
    scratch: Path
    checkpoint_seconds: float
    workers: int
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, figures: None
    history: History = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of the epoch's steps so far
    step: int = 0

    def __post_init__(self) -> None:
        self.device = self.processes.device
        self.steps = self.recipe.epochs * self.order.steps_per_epoch
        # Convolutions in channels-last order are faster on GPUs and in bfloat16, slower in float32 on CPUs.
        channels_last = self.device.type == "cuda" or self.recipe.precision == "bfloat16"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.classifier.to(self.device, memory_format=self.memory_format)
        self.classifier.requires_grad_(False)
        self.part.requires_grad_(True)
        self.optimizer = optimizer_of(self.part, self.recipe)
        decay = self.recipe.ema_decay
        self.ema = ModelEmaV3(self.classifier, decay=decay, use_warmup=True) if decay else None

    @property
    def kept(self) -> Classifier:
        """The network that is kept: the averaged one where there is an average."""
        return self.ema.module if self.ema else self.classifier

    def train(self) -> History:
        """Train from the checkpoint, or from the start, to the end; return each epoch's figures.

        Raises:
            ValueError: the loss is not finite any more; it names the step.
        """
        self._resume()
        network = self._network()
        batches = load(self.views, self.order.batches(self.step, self.steps), self.workers, self.device)
        per_epoch, saved = self.order.steps_per_epoch, time.monotonic()
        total, seen = self.steps * self.order.batch_size, self.step * self.order.batch_size
        self._set_mode()
        with Progress(total, "images", self.what, done=seen, quiet=not self.processes.first()) as progress:
            for batch in batches:
                self.losses.append(self._update(network, batch))
                self.step += 1
                if self.step % per_epoch == 0:
                    self._end_epoch()
                note = f"epoch {(self.step - 1) // per_epoch + 1}/{self.recipe.epochs}"
                progress.update(self.order.batch_size, note + self._latest())
                if time.monotonic() - saved >= self.checkpoint_seconds and self.step < self.steps:
                    self._save()
                    saved = time.monotonic()
        if self.ema:
            self.classifier.load_state_dict(self.ema.module.state_dict())
        self.classifier.eval()
        return self.history

    def _network(self) -> nn.Module:
        if self.processes.world == 1:
            return self.classifier
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.classifier, device_ids=ids)

    def _set_mode(self) -> None:
        self.classifier.eval()
        self.part.train()

    def _update(self, network: nn.Module, batch: Batch) -> Tensor:
        """Take one optimizer step; return the batch's mean loss, on the device, so that nothing waits for it."""
        rate = learning_rate(
            self.step, self.steps, self.recipe.warmup_epochs * self.order.steps_per_epoch, self.recipe.lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(
            self.order.seed * 1_000_003 + self.step * self.processes.world + self.processes.rank
        )  # dropout
        bfloat16 = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            loss = self.loss(network, batch.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.classifier, step=self.step)
        mean = loss.detach()
        if self.processes.world > 1:
            dist.all_reduce(mean)
            mean /= self.processes.world
        return mean

    def _end_epoch(self) -> None:
        self._check_losses()
        mean = torch.stack(self.losses).mean()
        epoch = self.step // self.order.steps_per_epoch
        figures = {"train_loss": mean.item(), "lr": self.optimizer.param_groups[0]["lr"], **self.validate(self.kept)}
        self._set_mode()
        self.losses = []
        self.history.append({"epoch": epoch, **figures})
        self.on_epoch(epoch, figures)

    def _check_losses(self) -> None:
        """Stop where a loss is not finite; looked at now and then, since reading it makes a GPU wait."""
        finite = torch.isfinite(torch.stack(self.losses)) if self.losses else torch.ones(1, dtype=torch.bool)
        if not finite.all():
            first = self.step - len(self.losses) + int(finite.int().argmin())
            raise ValueError(
                f"the loss is not finite at step {first:,} of {self.steps:,}; a smaller lr (now {self.recipe.lr}), "
                "a longer warm-up, or float32 may help"
            )

    def _latest(self) -> str:
        latest = self.history[-1].get("val_top1") if self.history else None
        return "" if latest is None else f", val top-1 {latest:.4f}"

    def _save(self) -> None:
        self._check_losses()
        if not self.processes.first():
            return
        state = {
            "step": self.step,
            "history": json.dumps(self.history),
            "losses": torch.stack(self.losses) if self.losses else torch.zeros(0),
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
        }
        with atomic.replacing(self.scratch / "checkpoint.pt") as beside:
            torch.save(state, beside)

    def _resume(self) -> None:
        file = self.scratch / "checkpoint.pt"
        if not file.exists():
            return
        # To the CPU first: AdamW keeps its step counts there, and would wait for a GPU at every step otherwise.
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.step, self.history = state["step"], json.loads(state["history"])
        self.losses = list(state["losses"].to(self.device))
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        if self.processes.first():
            print(f"{self.what}: going on from step {self.step:,} of {self.steps:,}", flush=True)
