"""Fine-tuning: the distilled student goes on learning the teacher's soft labels, on the labelled images only.

Reads data/prepare, data/cache, data/teacher and data/distill. Writes data/finetune: weights.safetensors,
network.json, history.csv. Run: python -m pipeline.finetune
"""

from pathlib import Path

from pipeline.core import devices, distillation, networks, stage
from pipeline.core.dataset import ImageSet
from pipeline.core.params import Params


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    classifier, _ = networks.load(Path("data/distill"))
    processes = devices.join(params.machine.device)
    distillation.train("finetune", params.finetune, classifier, images.rows("labelled"), params, images, processes)


if __name__ == "__main__":
    stage.main(run, __doc__, distributed=True)
