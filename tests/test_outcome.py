"""What networks' answers become: the share of the gap that is closed, and one speed for one network."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.core.evaluation import outcome


def test_where_the_teacher_is_not_ahead_there_is_no_gap():
    def shown(teacher, baseline, student):
        top1 = {"teacher": teacher, "baseline": baseline, "distill": 0.5, "finetune": 0.5, "fixres": student}
        return outcome.accuracies({name: {"top1": value} for name, value in top1.items()})

    assert shown(0.9, 0.5, 0.8)["gap_recovered"] == pytest.approx(0.75)
    assert "gap_recovered" not in shown(0.5, 0.5, 0.8)


def test_one_network_at_one_resolution_has_one_speed():
    measured = {"teacher": ("large", 8, 10), "baseline": ("small", 8, 100), "distill": ("small", 8, 140)}
    measured |= {"finetune": ("small", 8, 90), "fixres": ("small", 16, 40)}
    results = {
        name: SimpleNamespace(card={"model": model, "resolution": resolution}, images_per_second=speed)
        for name, (model, resolution, speed) in measured.items()
    }
    results["finetune"].card["resized_to"] = 12  # which is another size for the network
    found = outcome.speeds(results, torch.device("cpu"), 10)["images_per_second"]
    expected = {"teacher": 10, "baseline": 140, "distill": 140, "finetune": 90, "fixres": 40, "student": 40}
    assert found == expected
