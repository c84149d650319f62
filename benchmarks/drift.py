"""How far the losses of a run drift from those of the same run in one process, in float32: with two processes, and with
one process in whose network every weight was moved by its last bit, as rounding moves them at each step.

Where the second drifts as far as the first, no order of sums would keep them together. The student is timm's smallest
ResNet on 64 made images of 16 pixels in 4 classes, in batches of 8; the processes meet through gloo, on the CPU.
Prints a Markdown table. Run: python benchmarks/drift.py [--steps 50]
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import machine
from turns import silence

from pipeline.core import networks, params
from pipeline.core.data.batches import Batch
from pipeline.core.devices import Processes
from pipeline.core.train import engine
from pipeline.core.train.order import TrainingOrder
from pipeline.core.train.training import labelled_loss

ROOT = Path(__file__).parent.parent
COUNT, CLASSES, BATCH = 64, 4, 8
RECIPES = {
    "AdamW, 0.001": {"optimizer": "adamw", "lr": 0.001, "warmup_epochs": 1},
    "AdamW, 0.0001": {"optimizer": "adamw", "lr": 0.0001, "warmup_epochs": 1},
    "SGD, 0.1 for 256 images": {"optimizer": "sgd", "lr": 0.1 * BATCH / 256, "warmup_epochs": 5},
    "SGD, 0.4 for 256 images": {"optimizer": "sgd", "lr": 0.4 * BATCH / 256, "warmup_epochs": 5},
}


class Made(Dataset):
    """Noise, with a colour of its own for each class."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.labels = np.arange(COUNT, dtype=np.int32) % CLASSES
        colour = random.integers(0, 128, (CLASSES, 3, 1, 1))
        self.pixels = torch.from_numpy((random.integers(0, 128, (COUNT, 3, 16, 16)) + colour[self.labels]).astype("u1"))
        self.images = SimpleNamespace(ids=np.arange(COUNT, dtype=np.uint64), classes=["class"] * CLASSES)

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> Batch:
        rows, replicas = batch
        return Batch(rows, replicas, self.pixels[rows], rows, torch.ones(len(rows)))


def losses(changes: dict, steps: int, processes: Processes, moved: bool = False) -> np.ndarray:
    """Train some steps, and give their losses (S,)."""
    settings, made, found = params.load(ROOT / "params.yaml"), Made(), []
    classifier = networks.build("test_resnet", CLASSES, seed=0)
    if moved:
        for weight in classifier.network.parameters():
            weight.data = torch.nextafter(weight.data, torch.full_like(weight, torch.inf))
    epochs = -(-steps // (COUNT // BATCH))
    with tempfile.TemporaryDirectory() as scratch, silence():
        run = engine.Run(
            what="benchmark",
            classifier=classifier,
            part=classifier.network,
            views=made,
            order=TrainingOrder(np.arange(COUNT), BATCH, 0, 0, processes.rank, processes.world),
            loss=labelled_loss(made.images, made.labels, 0.1),
            recipe=settings.baseline.model_copy(update={"epochs": epochs, "batch_size": BATCH, **changes}),
            processes=processes,
            validate=lambda classifier: {},
            scratch=Path(scratch),
            machine=settings.machine.model_copy(update={"checkpoint_seconds": 1e9, "workers": 0}),
        )
        update = run._update
        run._update = lambda *batch: found.append(update(*batch)) or found[-1]
        run.train()
    return torch.stack(found)[:steps].numpy()


def of_two(rank: int, folder: str, steps: int) -> None:
    """One of two processes; the first writes the losses of each recipe."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = [losses(changes, steps, Processes(torch.device("cpu"), rank, 2)) for changes in RECIPES.values()]
    if rank == 0:
        np.save(Path(folder) / "losses.npy", np.stack(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(of_two, (folder, steps), nprocs=2, start_method="spawn")
        shared = np.load(Path(folder) / "losses.npy")
    print(f"float32, {steps} steps; {machine()}\n")
    print("| optimizer, highest rate | loss: first, last | 2 processes: at most | every weight's last bit: at most |")
    print("|---|---|---|---|")
    for (name, changes), two in zip(RECIPES.items(), shared, strict=True):
        one = losses(changes, steps, Processes(torch.device("cpu")))
        moved = losses(changes, steps, Processes(torch.device("cpu")), moved=True)
        drifts = (f"{np.abs(other - one).max():.1e}" for other in (two, moved))
        print(f"| {name} | {one[0]:.3f}, {one[-1]:.3f} | {' | '.join(drifts)} |")


if __name__ == "__main__":
    main()
