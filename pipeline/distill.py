"""Distillation: the student learns the teacher's soft labels on labelled and mined images, and no hard label.

Reads data/prepare, data/mine, data/cache and data/teacher. Writes data/distill: weights.safetensors, network.json,
history.csv. Run: python -m pipeline.distill
"""

from pathlib import Path

from pipeline.core import devices, distillation, networks, stage, teaching
from pipeline.core.dataset import ImageSet
from pipeline.core.sections import Params


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    classifier = networks.build_from(params.student.model, params.student.init, len(images.classes), params.seed)
    rows = teaching.training_rows(images)
    processes = devices.join(params.machine)
    distillation.train("distill", params.distill, params.student.model, classifier, rows, params, images, processes)


if __name__ == "__main__":
    stage.main(run, __doc__, training=True)
