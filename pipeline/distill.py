"""Distillation: the student learns the teacher's soft labels on labelled and mined images, and no hard label.

Reads data/prepare/images, data/mine, data/cache, data/teacher, and the file of weights that `student.init` names.
Writes data/distill: weights.safetensors, network.json, history.csv. Run: python -m pipeline.distill
"""

from pathlib import Path

from pipeline.core import devices, networks, stage, teaching
from pipeline.core.data.dataset import ImageSet
from pipeline.core.sections import Params
from pipeline.core.train import distillation


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    images = ImageSet(Path("data/prepare/images"))
    classifier = networks.build(params.student.model, len(images.classes), params.seed, params.student.init)
    distillation.train(
        "distill",
        params,
        images,
        processes,
        model=params.student.model,
        classifier=classifier,
        rows=teaching.training_rows(images),
    )


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
