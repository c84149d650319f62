"""What benchmarks open of a project in which `dvc repro cache` has run; a student that trains there step by step."""

import copy
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from timm.task import LogitDistillationTask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from turns import silence

from pipeline import cache
from pipeline.core import devices, networks, params, small_maps
from pipeline.core.data.batches import load
from pipeline.core.labelling import Labelling
from pipeline.core.train import engine, optimizers
from pipeline.core.train.order import TrainingOrder


class Project:
    """What the stages of a project open, in the present folder."""

    def __init__(self, workers: int | None) -> None:
        """Open it.

        Args:
            workers: machine.workers in place of the project's; None for those.
        """
        self.params = params.load(Path("params.yaml"))
        if workers is not None:
            how = self.params.machine.model_copy(update={"workers": workers})
            self.params = self.params.model_copy(update={"machine": how})
        self.processes = devices.join(self.params.machine)
        self.device = self.processes.device
        self.labelling = Labelling.of(self.params, self.processes)
        self.classifier, self.views, self.rows = self.labelling.classifier, self.labelling.views, self.labelling.rows
        self.images = self.views.images

    def keys(self) -> np.ndarray:
        """Give the keys (N,) uint64 of all views."""
        with tempfile.TemporaryDirectory() as folder, silence():  # the keys stay mapped
            return cache.list_keys(self.labelling, Path(folder) / "keys.npy")

    def order(self) -> TrainingOrder:
        return TrainingOrder(self.rows, self.params.distill.batch_size, 0, self.params.cache.replicas)

    def train_with_timm(self, epochs: int) -> Generator[None, None, None]:
        """Train step by step as timm's user would write it: its task around student and teacher, on the same views.

        In the recipe's precision, channels-last; with torch's convolutions, and without an average of the weights.
        """
        mixed = self.params.distill.precision == "bfloat16"
        student = networks.build(self.params.student.model, len(self.images.classes), 0).to(self.device).train()
        student.to(memory_format=torch.channels_last)
        assert self.classifier.resized_to is None, "timm's task shows both networks the same pixels"
        teacher = copy.deepcopy(self.classifier.network)
        for network in (student, teacher):
            small_maps.restore_convolutions(network)
        task = LogitDistillationTask(
            student.network, teacher, torch.nn.CrossEntropyLoss(), task_loss_weight=0.0, verbose=False
        ).to(self.device)
        optimizer = optimizers.optimizer_of(student.network, self.params.distill)
        order = self.order()
        asked = order.batches(0, epochs * order.steps_per_epoch)
        for batch in load(self.views, asked, self.params.machine.workers, self.device):
            labels = torch.zeros(len(batch.rows), dtype=torch.long, device=self.device)
            pixels = student.normalise(batch.pixels.to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                loss = task(pixels, labels)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield

    def train(self, loss: engine.Loss, epochs: int) -> Generator[int, None, None]:
        """Train a new student step by step."""
        recipe = self.params.distill.model_copy(update={"epochs": epochs, "warmup_epochs": 0})
        student = networks.build(self.params.student.model, len(self.images.classes), 0)
        with tempfile.TemporaryDirectory() as scratch:
            yield from engine.Run(
                what="benchmark",
                classifier=student,
                part=student.network,
                views=self.views,
                order=self.order(),
                loss=loss,
                recipe=recipe,
                processes=self.processes,
                validate=lambda classifier: {},
                scratch=Path(scratch),
                machine=self.params.machine.model_copy(update={"checkpoint_seconds": 1e9}),
            ).step_by_step()
