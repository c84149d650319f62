"""The golden losses: 20 steps of a shrunken recipe in float64 on one thread.

They pin down what a training run computes, from the draw of a view to the optimizer: a change that is meant to change
nothing must leave them as they are, and one that is meant to must say so by making them anew.
Run: PYTHONPATH=. python tests/golden.py (writes tests/golden.json)
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from images import prepared
from runs import run
from torch import Tensor

from pipeline.core.data.dataset import ImageSet
from pipeline.core.train import losses
from pipeline.core.train.training import labelled_loss

FILE = Path(__file__).with_name("golden.json")
RECIPES = {
    "labels, sgd": {"optimizer": "sgd", "lr": 0.02},
    "labels, adamw, accumulated, averaged": {"optimizer": "adamw", "lr": 0.001, "accumulate": 2, "ema_decay": 0.9},
    "soft labels, adamw": {"optimizer": "adamw", "lr": 0.001},
}


def steps(images: ImageSet, name: str, scratch: Path) -> list[float]:
    """Train 20 steps, and give their losses."""
    loss = labelled_loss(images, images.labels, 0.1)
    if name.startswith("soft"):
        # Any answers do, so long as they follow from the samples alone.
        random = np.random.default_rng(0).dirichlet(np.full(len(images.classes), 0.3), len(images))
        answers = torch.from_numpy(random)

        def loss(network: torch.nn.Module, batch) -> Tensor:
            return losses.ssld(network(batch.pixels), answers[batch.rows])

    training = run(
        images, scratch, loss=loss, epochs=10, warmup_epochs=5, machine={"checkpoint_seconds": 1e9}, **RECIPES[name]
    )
    training.classifier.double()
    random = np.random.default_rng(0)  # torch's own random weights depend on the processor in their last digits
    for name, weight in training.part.named_parameters():
        if weight.ndim >= 2:
            weight.data.copy_(torch.from_numpy(random.normal(0, weight[0].numel() ** -0.5, weight.shape)))
        elif name.endswith("bias"):
            weight.data.zero_()
    if training.ema:
        training.ema.module.load_state_dict(training.classifier.state_dict())
    found, update = [], training._update
    training._update = lambda network, batch: found.append(update(network, batch)) or found[-1]
    training.train()
    return torch.stack(found).tolist()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        images = prepared(Path(folder), patch)
        made = {name: steps(images, name, Path(folder) / "runs" / name) for name in RECIPES}
    FILE.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
