"""Larger resolution: the last layer alone is tuned on labelled images, larger, and seen as at test time.

After Touvron et al., "Fixing the train-test resolution discrepancy", arXiv:1906.06423. Where that makes it no better on
the validation split, as `training.worth` has it, the network of finetune is kept, at its own resolution.

Reads data/prepare/images/known and data/finetune. Writes data/fixres: weights.safetensors, network.json, history.csv.
Run: python -m pipeline.fixres
"""

import copy
from pathlib import Path

from torch import nn

import models
from pipeline.core import devices, stage
from pipeline.core.data.batches import CleanViews
from pipeline.core.data.dataset import ImageSet
from pipeline.core.sections import Params
from pipeline.core.train import training


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    images = ImageSet(Path("data/prepare/images/known"))
    before = training.Before.of("finetune")
    classifier = copy.deepcopy(before.classifier)
    views = CleanViews(images, params.fixres.resolution, params.views.test_crop)
    task = training.Task(
        name="fixres",
        model=before.card["model"],
        classifier=classifier,
        rows=images.rows("labelled"),
        views=views,
        loss=training.labelled_loss(images, images.labels, params.fixres.label_smoothing),
        identities={"test view": f"{views.resolution} {views.crop}"},
        part=nn.ModuleList(models.last_layers(classifier.network)),
        before=before,
    )
    training.train(task, params, processes)


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
