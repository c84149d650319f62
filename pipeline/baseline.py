"""The baseline: the student trained on the labelled images alone, what distillation is compared with.

Reads data/prepare/images/known, and the file of weights that `student.init` names. Writes data/baseline:
weights.safetensors, network.json, history.csv. Run: python -m pipeline.baseline
"""

from pathlib import Path

from pipeline.core import devices, networks, stage
from pipeline.core.data.batches import Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.sections import Params
from pipeline.core.train import training


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    images = ImageSet(Path("data/prepare/images/known"))
    spec = ViewSpec.of(params.seed, params.views)
    classifier = networks.build(params.student.model, len(images.classes), params.seed, params.student.init)
    task = training.Task(
        name="baseline",
        model=params.student.model,
        classifier=classifier,
        rows=images.rows("labelled"),
        views=Views(images, spec),
        loss=training.labelled_loss(images, images.labels, params.baseline.label_smoothing),
        identities={"views": spec.digest},
    )
    training.train(task, params, processes)


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
