"""Training runs on the shapes of tests/images.py, small enough for a test."""

import torch
from images import tiny

from pipeline.core import networks
from pipeline.core.data.batches import Views
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.train import engine
from pipeline.core.train.order import TrainingOrder
from pipeline.core.train.training import labelled_loss

MODEL = "test_resnet"  # timm's, of a third of a million parameters
CPU = Processes(torch.device("cpu"))


def run(images, scratch, loss=None, part=None, processes=CPU, machine=None, model=MODEL, **changes):
    """Make a run of a small ResNet on the labelled shapes: 2 steps an epoch, a checkpoint after each.

    Args:
        part: classifier -> the part that is trained; None: all of it.
        model: another network.
        machine, changes: of the sections `machine` and `baseline` of the settings.
    """
    settings = {f"machine.{key}": value for key, value in {"checkpoint_seconds": 0, **(machine or {})}.items()}
    params = tiny(**settings, **{f"baseline.{key}": value for key, value in changes.items()})
    classifier = networks.build(model, len(images.classes), seed=0)
    batch_size, shared = params.baseline.batch_size, (processes.rank, processes.world)
    return engine.Run(
        what="test",
        classifier=classifier,
        part=part(classifier) if part else classifier.network,
        views=Views(images, ViewSpec.of(0, params.views)),
        order=TrainingOrder(images.rows("labelled"), batch_size, 0, 0, *shared, parts=params.baseline.accumulate),
        loss=loss or labelled_loss(images, images.labels, 0.1),
        recipe=params.baseline,
        processes=processes,
        validate=lambda classifier: {"val_top1": 0.0},
        scratch=scratch,
        machine=params.machine,
    )
