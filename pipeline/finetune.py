"""Fine-tuning: the distilled student goes on learning the teacher's soft labels, on the labelled images only.

Where that makes it no better on the validation split, the network of distill is kept.

Reads data/prepare/images/known, data/cache, data/teacher and data/distill. Writes data/finetune: weights.safetensors,
network.json, history.csv. Run: python -m pipeline.finetune
"""

import copy
from pathlib import Path

from pipeline.core import devices, stage
from pipeline.core.data.dataset import ImageSet
from pipeline.core.sections import Params
from pipeline.core.train import distillation, training


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    images = ImageSet(Path("data/prepare/images/known"))
    before = training.Before.of("distill")
    distillation.train(
        "finetune",
        params,
        images,
        processes,
        model=before.card["model"],
        classifier=copy.deepcopy(before.classifier),
        rows=images.rows("labelled"),
        before=before,
    )


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
