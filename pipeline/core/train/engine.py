"""The one training loop. What a stage trains on and for arrives as batches and as a function from them to a loss.

A run is cut into steps. Everything a step needs follows from its number and the checkpoint, so a run that was killed
ends, on a CPU, in the same bytes as one that was not.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.core import devices, signals
from pipeline.core.data.batches import Batch, CleanViews, Views, load
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.progress import Progress
from pipeline.core.sections import Machine, TrainingRecipe
from pipeline.core.train import checkpoints, cuda_graphs, finite, norms, optimizers, trace
from pipeline.core.train.meter import Meter
from pipeline.core.train.order import TrainingOrder

Loss = Callable[[nn.Module, Batch], Tensor]
History = list[dict[str, float]]


@dataclass
class Run:
    """One training run: what to train, on what, for what, and where it keeps its checkpoints.

    Args:
        what: its name, for people; the recipe's section in params.yaml.
        classifier: trained in place, and left in eval mode with the final weights.
        part: the part of it that is trained; the rest stays frozen and in eval mode.
        views, order: the batches.
        loss: (network, batch) -> mean loss of the batch.
        recipe: epochs, optimizer, schedule, average, precision, accumulation.
        validate: classifier -> numbers, after each epoch.
        scratch: folder of the checkpoints.
        machine: workers, checkpoints, compilation, profile: how to run, not what is computed.
        on_epoch: told each epoch's number and figures, as they come, with what the epoch cost.

    Raises:
        ValueError: the network cannot compute activations again, and is asked to.
    """

    what: str
    classifier: Classifier
    part: nn.Module
    views: Views | CleanViews
    order: TrainingOrder
    loss: Loss
    recipe: TrainingRecipe
    processes: Processes
    validate: Callable[[Classifier], dict[str, float]]
    scratch: Path
    machine: Machine
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, figures: None

    def __post_init__(self) -> None:
        self.device = self.processes.device
        self.steps = self.recipe.epochs * self.order.steps_per_epoch
        self.classifier.to(self.device, memory_format=torch.channels_last)  # convolutions are faster so
        trained = {*self.part.parameters()}
        for weight in self.classifier.parameters():  # what the network itself has frozen stays frozen
            weight.requires_grad_(weight.requires_grad and weight in trained)
        if self.processes.world > 1:
            norms.synchronise(self.classifier, self.device)
        if self.machine.checkpoint_activations:
            try:
                self.classifier.network.set_grad_checkpointing(True)
            except (AssertionError, AttributeError):
                raise ValueError(
                    f"{self.what}: its network cannot compute activations again; set machine.checkpoint_activations "
                    "to false"
                ) from None
        self.optimizer = optimizers.optimizer_of(self.part, self.recipe)
        decay = self.recipe.ema_decay
        self.ema = optimizers.Average(self.classifier, decay) if decay else None
        self.meter = Meter(self.device.type)
        self.step = 0  # how many are done
        self.between_steps = False  # all that belongs to `step` steps is done, and no more: a checkpoint may hold it
        self.losses = finite.Losses()
        self.history: History = []
        self.cost: dict[str, float] = {}  # of the last epoch's steps, as Meter gives it

    @property
    def kept(self) -> Classifier:
        """The network that is kept: the averaged one where there is an average."""
        return self.ema.module if self.ema else self.classifier

    def train(self) -> History:
        """Train from the checkpoint, or from the start, to the end; return each epoch's figures.

        Raises:
            ValueError: the loss is not finite any more; it names the step and the samples. Or the weights are not.
            KeyboardInterrupt: it was stopped; a checkpoint was written, but where a validation had begun or other
                processes take part: then what came after the last one is done again.
        """
        try:
            for _ in self.step_by_step():
                pass
        except KeyboardInterrupt:
            if self.between_steps and self.processes.world == 1:
                self._save()
            raise
        return self.history

    def step_by_step(self) -> Iterator[int]:
        """Train as `train` does, but pause after each step, with its number, for who has something to do meanwhile."""
        self._resume()
        self._set_mode()
        network = self._network()
        batches = load(self.views, self.order.batches(self.step, self.steps), self.machine.workers, self.device)
        size, saved = self.order.batch_size, time.monotonic()
        self.meter.restart()
        progress = Progress(
            self.steps * size, "images", self.what, done=self.step * size, quiet=not self.processes.first()
        )
        progress.note = self._note
        self.between_steps = True  # not before: an interrupt while a checkpoint is read finds half of it in place
        with progress, self._profile() as profile:
            for batch in self.meter.batches(batches):
                with signals.finish_first() if self.processes.world == 1 else nullcontext():
                    self.between_steps = False
                    self.losses.add(self._update(network, batch))
                    self.step += 1
                    self.between_steps = self.step % self.order.steps_per_epoch != 0
                if self.step % finite.LOOK_EVERY[self.device.type] == 0:
                    self._check_losses()
                if self.step % self.order.steps_per_epoch == 0:
                    self._end_epoch()
                    self.between_steps = True
                progress.update(size)
                if time.monotonic() - saved >= self.machine.checkpoint_seconds and self.step < self.steps:
                    self._save()
                    saved = time.monotonic()
                if profile:
                    profile.step()
                yield self.step
        if self.ema:
            self.classifier.load_state_dict(self.ema.module.state_dict())
        self.classifier.eval()

    def _network(self) -> nn.Module:
        """The classifier as it is called: shared with other processes, compiled, or captured as CUDA graphs."""
        network: nn.Module = self.classifier
        if self.processes.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # BatchNorm's buffers need no exchange: every process computes the same ones.
            network = DistributedDataParallel(network, device_ids=ids, forward_sync_buffers=False)
        if self.machine.compile:
            return torch.compile(network)
        if not self._captures():
            return network
        rows, replicas = self.order.whole_batch(self.step)
        one = self.views[rows[:1], replicas[:1]].pixels.to(self.device)  # for its shape
        with torch.autocast("cuda", torch.bfloat16, enabled=self._mixed, cache_enabled=False):
            return cuda_graphs.capture(network, one.repeat(len(rows), 1, 1, 1))

    def _captures(self) -> bool:
        """Whether a step is one forward and one backward pass of one process on a GPU, and nobody looks into it."""
        alone = self.processes.world == self.order.parts == 1
        looked_into = self.machine.checkpoint_activations or self.machine.profile_steps
        return self.device.type == "cuda" and self.machine.cuda_graphs and alone and not looked_into

    @property
    def _mixed(self) -> bool:
        return self.recipe.precision == "bfloat16"

    def _set_mode(self) -> None:
        self.classifier.eval()
        self.part.train()

    def _update(self, network: nn.Module, batch: Batch) -> Tensor:
        """Take one optimizer step; return the batch's mean loss, on the device, so that nothing waits for it."""
        rate = optimizers.learning_rate(
            self.step, self.steps, self.recipe.warmup_epochs * self.order.steps_per_epoch, self.recipe.lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        torch.manual_seed(
            self.order.seed * 1_000_003 + self.step * self.processes.world + self.processes.rank
        )  # dropout
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.to(self.device).parts(self.order.parts)
        losses = []
        for number, part in enumerate(parts, start=1):
            apart = self.processes.world > 1 and number < len(parts)  # gradients are exchanged once a step
            with network.no_sync() if apart else nullcontext():
                losses.append(self._gradients(network, part, share=len(part.rows) / len(batch.rows)))
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.classifier, step=self.step + 1)
        mean = torch.stack(losses).sum()
        if self.processes.world > 1:
            dist.all_reduce(mean)
            mean /= self.processes.world
        return mean

    def _gradients(self, network: nn.Module, part: Batch, share: float) -> Tensor:
        """Add a part's share to the gradients; return its share of the batch's loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed):
            loss = self.loss(network, part) * share
        if not self.machine.checkpoint_activations:
            loss.backward()
            return loss.detach()
        # Checkpointed layers run once more in the backward pass: BatchNorm's statistics must not move twice.
        statistics = [buffer for m in self.part.modules() if isinstance(m, _BatchNorm) for buffer in m.buffers()]
        before = [buffer.clone() for buffer in statistics]
        loss.backward()
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
        return loss.detach()

    def _end_epoch(self) -> None:
        self._check_losses()
        if not finite.weights_are_finite(self.part):  # of which no loss speaks where the last step made them so
            where = f"after step {self.step:,} of {self.steps:,}"
            raise ValueError(f"weights are not finite {where}, though its loss was; {self._remedy()}")
        self.cost = self.meter.figures(self.order.batch_size)
        epoch = self.step // self.order.steps_per_epoch
        figures = {
            "images_seen": self.step * self.order.batch_size,
            "train_loss": self.losses.stacked().mean().item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.validate(self.kept),
        }
        self._set_mode()
        self.losses = finite.Losses()
        self.history.append({"epoch": epoch, **figures})
        self.on_epoch(epoch, {**figures, **self.cost})
        self.meter.restart()

    def _check_losses(self) -> None:
        """Stop where a loss is not finite. Every process sees the same mean losses, so all of them stop."""
        bad = self.losses.not_finite()
        if bad is None:
            return
        step = self.step - len(self.losses.each) + bad
        rows, replicas = self.order.whole_batch(step)
        images, listed = self.views.images, self.scratch / f"not-finite-{step}.csv"
        if self.processes.first():
            finite.list_samples(listed, images, (rows, replicas))
        devices.wait_for_all(self.processes)  # until the list is written: the first that ends will end all others
        some = ", ".join(f"{images.ids[row]:016x}" for row in rows[:4])
        raise ValueError(
            f"the loss is not finite at step {step:,} of {self.steps:,}, whose batch is {some}"
            f"{', ...' if len(rows) > 4 else ''} ({listed} names all {len(rows)} samples); {self._remedy()}"
        )

    def _remedy(self) -> str:
        return f"a smaller {self.what}.lr (now {self.recipe.lr}), a longer warm-up, or float32 may help"

    def _note(self) -> str:
        """What stands at the end of the progress line: the epoch, how good it is, and what a step costs."""
        cost = self.meter.figures(self.order.batch_size) if self.meter.steps else self.cost
        words = [f"epoch {max(self.step - 1, 0) // self.order.steps_per_epoch + 1}/{self.recipe.epochs}"]
        latest = self.history[-1].get("val_top1") if self.history else None
        words += [] if latest is None else [f"val top-1 {latest:.4f}"]
        if cost:
            words += [f"{1000 * cost['step_seconds']:,.0f} ms a step, {cost['data_wait_share']:.0%} of it for images"]
            words += [f"{cost['memory_gb']:.1f} GB"]
        return ", ".join(words)

    def _profile(self) -> Any:
        """Trace a few steps into a file beside the run's scratch folder."""
        if not self.machine.profile_steps:
            return nullcontext()
        file = self.scratch.parent / f"trace-{self.processes.rank}.json.gz"
        return trace.profiled(self.device, self.machine.profile_steps, file)

    def _save(self) -> None:
        """Write a checkpoint, unless a loss or a weight is not finite: the next look at them stops all processes."""
        if not self.processes.first():
            return
        if self.losses.not_finite() is not None or not finite.weights_are_finite(self.part):
            return
        state = {
            "step": self.step,
            "history": json.dumps(self.history),
            "losses": self.losses.stacked(),
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
        }
        checkpoints.save(self.scratch, self.step, state, self.machine.keep_checkpoints)

    def _resume(self) -> None:
        # The first process reads, so that all go on from the same step, whichever machine they run on.
        state = devices.from_first(self.processes, checkpoints.load(self.scratch) if self.processes.first() else None)
        if state is None:
            return
        self.step, self.history = state["step"], json.loads(state["history"])
        self.losses = finite.Losses(state["losses"].to(self.device))
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        if self.processes.first():
            print(f"{self.what}: going on from step {self.step:,} of {self.steps:,}", flush=True)
