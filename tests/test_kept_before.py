"""Which of two networks a stage writes: what it trained, or the network that it started from."""

import math
from types import SimpleNamespace

import pytest
import torch
from images import tiny
from runs import MODEL

from pipeline.core import networks
from pipeline.core.devices import Processes
from pipeline.core.train import training
from pipeline.core.train.training import Before, kept_before, validator


def test_the_network_before_is_kept_unless_the_trained_one_is_better_on_validation(images, capsys):
    params, cpu = tiny(), torch.device("cpu")
    validate, larger = (validator(params, images, side, Processes(cpu)) for side in (16, 24))
    networks_of_seeds = [networks.build(MODEL, 4, seed) for seed in range(12)]
    networks_of_seeds.sort(key=lambda it: validate(it)["val_top1"] + larger(it)["val_top1"])
    worst, best = networks_of_seeds[0], networks_of_seeds[-1]
    assert max(top1(worst)["val_top1"] for top1 in (validate, larger)) < larger(best)["val_top1"]
    assert larger(best) != validate(best)

    def kept_of(before, trained, kept=None):
        task = SimpleNamespace(
            name="fixres",
            before=Before("finetune", before, {"resolution": 24, "kept": kept}),
            views=SimpleNamespace(images=images, resolution=32),
        )
        return kept_before(task, [{"val_top1": 1.0, "val_nll": 0.0}, validate(trained)], params, cpu)

    assert kept_of(worst, trained=best) is None
    assert "is kept" not in capsys.readouterr().out
    assert kept_of(best, trained=worst, kept={"stage": "distill"})["stage"] == "distill"
    kept = kept_of(best, trained=worst)
    assert kept["stage"] == "finetune"
    assert kept["val_top1"] == pytest.approx(larger(best)["val_top1"])
    assert kept["instead_of"] == pytest.approx(validate(worst)["val_top1"])
    assert "of finetune: the network of finetune is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trained", "before", "because", "words"),
    [
        ((0.5, 16, 1.0), (0.5, 16, 1.0), None, ""),
        ((0.5, 16, 0.9), (0.5, 16, 1.0), None, ""),
        ((0.6, 24, 1.1), (0.5, 16, 1.0), None, ""),
        ((0.5, 16, 0.9), (0.5, 16, math.nan), None, ""),
        (
            (0.4, 16, 0.9),
            (0.5, 16, 1.0),
            "top1",
            "below the 0.5000 of distill: the network of distill is kept",
        ),
        (
            (0.5, 24, 0.9),
            (0.5, 16, 1.0),
            "resolution",
            "that of distill, which needs 16 pixels a side, not 24",
        ),
        ((0.5, 16, 1.1), (0.5, 16, 1.0), "nll", "0.5000 is that of distill, whose NLL is lower"),
        ((0.5, 16, math.nan), (0.5, 16, 1.0), "nll", "0.5000 is that of distill, whose NLL is lower"),
    ],
)
def test_of_networks_right_as_often_the_cheaper_is_kept_then_the_less_surprised(
    images, monkeypatch, capsys, trained, before, because, words
):
    trained, before = (({"val_top1": top1, "val_nll": nll}, side) for top1, side, nll in (trained, before))
    monkeypatch.setattr(training, "validator", lambda *_: lambda _: before[0])
    task = SimpleNamespace(
        name="finetune",
        before=Before("distill", networks.build(MODEL, 4, 0), {"resolution": before[1], "kept": None}),
        views=SimpleNamespace(images=images, resolution=trained[1]),
    )
    kept = kept_before(task, [trained[0]], tiny(), torch.device("cpu"))
    assert (kept and kept["because"]) == because
    assert words in capsys.readouterr().out
