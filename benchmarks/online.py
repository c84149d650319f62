"""The soft-label cache against the teacher in the loop: what training gains by it, and what it loses.

    python benchmarks/online.py epoch --project DIR    an epoch's time: on labels alone, cached, online, timm's online
    python benchmarks/online.py loss --project DIR     a step's loss from the cache, against that with the teacher asked

A project's folder is one in which `dvc repro cache` has run (for `loss`, `dvc repro distill`); nothing in it is
changed. Each command prints a Markdown table and names the machine.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine
from project import Project
from turns import header, row, show_rates, silence, take_turns

from pipeline.core import networks, teaching
from pipeline.core.data.batches import load
from pipeline.core.train import distillation, losses, training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COMMANDS))
    parser.add_argument("--project", type=Path, default=Path(), help="where the stages have run (default: here)")
    parser.add_argument("--workers", type=int, help="machine.workers, in place of the project's")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of `epoch` (default: 3)")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    os.chdir(arguments.project)
    COMMANDS[arguments.what](Project(arguments.workers), arguments.rounds)


def epoch(project: Project, rounds: int) -> None:
    """Epochs of the student on the same views in the same order; the ways take turns, step by step."""
    stored, _ = distillation.open_teacher(project.params, project.images, False, project.device)
    asked, _ = distillation.open_teacher(project.params, project.images, True, project.device)
    labels = np.where(project.images.labels >= 0, project.images.labels, 0)  # of any class: the work is the same
    ways = {
        "plain training on hard labels": training.labelled_loss(project.images, labels, 0.0),
        "from the cache": distillation.distillation_loss({"ssld": 1.0}, 1.0, stored, project.images),
        "online, teacher in the loop": distillation.distillation_loss({"ssld": 1.0}, 1.0, asked, project.images),
    }
    loops = {name: project.train(loss, rounds + 1) for name, loss in ways.items()}
    loops["online, timm's LogitDistillationTask"] = project.train_with_timm(rounds + 1)
    order = project.order()
    with silence():
        seconds = take_turns(loops, rounds * order.steps_per_epoch, steps=1, warm_up=3)
    show_rates(seconds, order.batch_size, "images/s")


@torch.no_grad()
def loss(project: Project, _: int) -> None:
    """SSLD's loss on an epoch's batches, of a new student and of the distilled one: what the records' rounding does."""
    cached, _ = distillation.open_teacher(project.params, project.images, False, project.device)
    new = networks.build(project.params.student.model, len(project.images.classes), 0).to(project.device).eval()
    students = {"a new one": new, "the distilled one": networks.load(Path("data/distill"), project.device)[0]}
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    order = project.order()
    for batch in load(project.views, order.batches(0, order.steps_per_epoch), 0, project.device):
        batch = batch.to(project.device)
        answers = teaching.answer(project.classifier, batch.pixels, project.params.teacher.precision)
        for name, student in students.items():
            logits = student(batch.pixels).float()
            for temperature in (1.0, 4.0):
                asked, stored = (
                    losses.weighted({"ssld": 1.0}, logits, targets, temperature).item()
                    for targets in (torch.softmax(answers / temperature, dim=1), cached(batch, temperature))
                )
                found.setdefault((name, temperature), []).append((asked, stored))
    header(
        "student", "temperature", "steps", "loss with the teacher asked, mean", "cached less asked: mean; most, a step"
    )
    for (name, temperature), pairs in found.items():
        asked, stored = np.array(pairs).T
        apart = stored - asked
        row(name, temperature, len(pairs), f"{asked.mean():.4f}", f"{apart.mean():+.1e}; {np.abs(apart).max():.1e}")


COMMANDS = {"epoch": epoch, "loss": loss}

if __name__ == "__main__":
    main()
