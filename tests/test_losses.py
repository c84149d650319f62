"""Losses against float64 written out from the papers, and against PaddleClas' own values."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.core import losses

DATA = Path(os.environ.get("SSLD_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
REFERENCE = DATA.parent / "paddleclas_reference"


def softmax64(logits):
    raised = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


@pytest.fixture
def logits():
    generator = np.random.default_rng(3)
    return [(4 * generator.standard_normal((16, 50))).astype(np.float32) for _ in range(2)]


def test_ssld_is_half_the_symmetric_kl_divergence(logits):
    s, t = map(softmax64, logits)
    expected = 0.5 * ((t * np.log(t / s)).sum(1) + (s * np.log(s / t)).sum(1)).mean()
    found = losses.ssld(torch.tensor(logits[0]), torch.tensor(t, dtype=torch.float32))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_kl_is_the_teachers_cross_entropy_less_its_entropy(logits):
    s, t = map(softmax64, logits)
    expected = (t * np.log(t / s)).sum(1).mean()
    found = losses.kl(torch.tensor(logits[0]), torch.tensor(t, dtype=torch.float32))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", losses.DISTILLATION)
def test_a_student_that_agrees_has_no_loss_and_no_gradient(name, logits):
    student = torch.tensor(logits[0], requires_grad=True)
    loss = losses.DISTILLATION[name](student, torch.softmax(student.detach(), 1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert student.grad.abs().max() < 1e-6


def test_a_teacher_that_is_certain_gives_a_finite_loss():
    student = torch.tensor([[50.0, -50.0]], requires_grad=True)
    for divergence in losses.DISTILLATION.values():
        loss = divergence(student, torch.tensor([[0.0, 1.0]]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


def test_hard_targets_smooth_and_mix_as_pytorch_does():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, generator=generator)
    labels = torch.randint(5, (8,), generator=generator)
    unmixed = losses.hard_targets(labels, labels, torch.ones(8), 5, smoothing=0.1)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert losses.cross_entropy(logits, unmixed).item() == pytest.approx(expected.item(), rel=1e-6)

    mixed = losses.hard_targets(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.75]), 4, smoothing=0.0)
    assert mixed.tolist() == [[0.75, 0, 0.25, 0]]


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="PaddleClas' values are not here")
@pytest.mark.parametrize("case", ["small", "imagenet", "peaked", "equal"])
def test_paddleclas_values(case):
    expected = json.loads((REFERENCE / "losses.json").read_text())[case]
    arrays = np.load(REFERENCE / "losses.npz")
    student, teacher = (torch.tensor(arrays[f"{case}_{which}"]) for which in ("student", "teacher"))
    assert losses.ssld(student, teacher.softmax(1)).item() == pytest.approx(expected["DMLLoss"], rel=1e-5)
    # PaddleClas' KLDivLoss multiplies by the temperature squared.
    kl = 16 * losses.kl(student / 4, (teacher / 4).softmax(1)).item()
    assert kl == pytest.approx(expected["KLDivLoss_T4"], rel=1e-5, abs=1e-5)
