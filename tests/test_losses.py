"""Losses against float64 written out from the papers, and against PaddleClas' own values."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import tiny

from pipeline.core.data.batches import Batch
from pipeline.core.sections import HARD, LOSSES
from pipeline.core.softlabels import SparseLabels, dense
from pipeline.core.train import losses
from pipeline.core.train.distillation import check_compares, distillation_loss

DATA = Path(os.environ.get("SSLD_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
REFERENCE = DATA.parent / "paddleclas_reference"


def softmax64(logits):
    raised = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def kl64(p, q):
    return (p * np.log(p / q)).sum(1)


def binary64(p):
    """(B, 2): the target's probability (B,), and all others'."""
    return np.stack([p, 1 - p], 1)


def others64(p, target):
    """Probabilities among the classes other than the target."""
    rest = np.stack([np.delete(row, at) for row, at in zip(p, target, strict=True)])
    return rest / rest.sum(1, keepdims=True)


def apart64(a, b):
    """Mean of 1 - r over rows, by numpy's own correlation."""
    return np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def tckd64(s, t, target):
    rows = np.arange(len(t))
    return kl64(binary64(t[rows, target]), binary64(s[rows, target])).mean()


def nckd64(s, t, target):
    return kl64(others64(t, target), others64(s, target)).mean()


PAPERS = {
    "ssld": lambda s, t: 0.5 * (kl64(t, s) + kl64(s, t)).mean(),
    "js": lambda s, t: 0.5 * (kl64(t, (s + t) / 2) + kl64(s, (s + t) / 2)).mean(),
    "kl": lambda s, t: kl64(t, s).mean(),
    "cross_entropy": lambda s, t: -(t * np.log(s)).sum(1).mean(),
    "tckd": lambda s, t: tckd64(s, t, t.argmax(1)),
    "nckd": lambda s, t: nckd64(s, t, t.argmax(1)),
    "dkd": lambda s, t: tckd64(s, t, t.argmax(1)) + nckd64(s, t, t.argmax(1)),
    "dist_inter": apart64,
    "dist_intra": lambda s, t: apart64(s.T, t.T),
    "dist": lambda s, t: apart64(s, t) + apart64(s.T, t.T),
}
names = pytest.mark.parametrize("name", losses.DISTILLATION)


@pytest.fixture
def logits():
    """The student's and the teacher's, (16, 20)."""
    generator = np.random.default_rng(3)
    return [(2 * generator.standard_normal((16, 20))).astype(np.float32) for _ in range(2)]


def found(name, student, teacher, temperature=1.0):
    student, teacher = torch.tensor(student), torch.tensor(softmax64(teacher / temperature), dtype=torch.float32)
    return losses.weighted({name: 1.0}, student, teacher, temperature).item()


def test_every_loss_has_a_name_in_the_settings():
    assert {*losses.DISTILLATION, HARD} == set(LOSSES)
    assert losses.DISTILLATION.keys() == PAPERS.keys()


@names
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_loss_is_what_its_paper_says(name, temperature, logits):
    s, t = (softmax64(part / temperature) for part in logits)
    assert found(name, *logits, temperature) == pytest.approx(temperature**2 * PAPERS[name](s, t), rel=1e-5)


@pytest.mark.parametrize(
    ("world", "accumulate", "images", "refused"),
    [(1, 2, 8, False), (2, 2, 8, False), (2, 4, 8, True), (4, 1, 4, True), (4, 1, 8, False)],
)
def test_a_loss_that_compares_images_is_given_two(world, accumulate, images, refused):
    changes = {"distill.batch_size": 8, "distill.accumulate": accumulate}
    for loss in ("dist", "dist_intra"):
        recipe = tiny(**{"distill.loss": {"kl": 1.0, loss: 0.5}, **changes}).distill
        with pytest.raises(ValueError, match=r"^distill.loss: dist_intra") if refused else nullcontext():
            check_compares("distill", recipe, images, world)
    check_compares("distill", tiny(**{"distill.loss": "dist_inter", **changes}).distill, images, world)


def take_labels_as_targets(monkeypatch, labels):
    """Let DKD's target class be the label, as in the paper."""
    monkeypatch.setattr(losses, "_target", lambda teacher: torch.tensor(labels, dtype=torch.int64)[:, None])


def test_the_parts_of_dkd_and_dist_can_be_weighed_apart_and_dkds_target_may_be_the_label(logits, monkeypatch):
    s, t = map(softmax64, logits)
    student, teacher = torch.tensor(logits[0]), torch.tensor(t, dtype=torch.float32)
    labels = np.random.default_rng(0).integers(20, size=16)
    take_labels_as_targets(monkeypatch, labels)
    dkd = losses.weighted({"tckd": 2.0, "nckd": 8.0}, student, teacher, 1.0)
    assert dkd.item() == pytest.approx(2 * tckd64(s, t, labels) + 8 * nckd64(s, t, labels), rel=1e-5)
    dist = losses.weighted({"dist_inter": 2.0, "dist_intra": 0.5}, student, teacher, 1.0)
    assert dist.item() == pytest.approx(2 * apart64(s, t) + 0.5 * apart64(s.T, t.T), rel=1e-5)


def test_kl_is_tckd_and_nckd_by_what_the_teacher_leaves_to_the_others(logits):
    student, teacher = torch.tensor(logits[0][:1]), torch.tensor(logits[1][:1]).softmax(1)
    parts = losses.tckd(student, teacher) + (1 - teacher.max()) * losses.nckd(student, teacher)
    assert losses.kl(student, teacher).item() == pytest.approx(parts.item(), rel=1e-5)


def test_what_a_sure_teacher_says_of_the_other_classes_is_kept(logits):
    teacher = logits[1].copy()
    teacher[:, 0] += 40  # its probability is 1 in float32
    s, t = map(softmax64, (logits[0], teacher))
    assert found("nckd", logits[0], teacher) == pytest.approx(nckd64(s, t, t.argmax(1)), rel=1e-5)


@names
def test_a_student_that_agrees_has_no_gradient_and_no_loss_that_it_could_lower(name, logits):
    student = torch.tensor(logits[0], requires_grad=True)
    teacher = torch.softmax(student.detach(), 1)
    loss = losses.DISTILLATION[name](student, teacher)
    loss.backward()
    entropy = -(teacher * teacher.log()).sum(1).mean().item()
    assert loss.item() == pytest.approx(entropy if name == "cross_entropy" else 0, abs=1e-5)
    assert student.grad.abs().max() < 1e-6


def test_js_of_two_that_are_sure_of_different_things_is_log_2():
    teacher = torch.tensor([[0.0, 1.0, 0.0]])
    assert losses.js(torch.tensor([[200.0, 0.0, 0.0]]), teacher).item() == pytest.approx(np.log(2))


@names
@pytest.mark.parametrize("size", [1, 3])
def test_probabilities_of_zero_give_a_finite_loss_and_finite_gradients(name, size):
    student = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, -300.0]])[:size].requires_grad_()
    for teacher in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [1.0, 1e-45, 0.0]):
        student.grad = None
        loss = losses.DISTILLATION[name](student, torch.tensor([teacher] * size))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


def test_gradients_keep_their_size_as_the_temperature_grows(logits):
    """Hinton et al., arXiv:1503.02531, equation 4: at high T, the gradient of KL by z is (z - v) / (C T^2)."""
    z, v = (torch.tensor(part, dtype=torch.float64) for part in logits)
    z, v = (part - part.mean(1, keepdim=True) for part in (z, v))
    z.requires_grad_()
    losses.weighted({"kl": 1.0}, z, torch.softmax(v / 1e4, 1), 1e4).backward()
    assert torch.allclose(16 * z.grad, (z - v).detach() / 20, atol=1e-3)


def test_a_weighted_sum(logits):
    student, teacher = torch.tensor(logits[0]), torch.tensor(logits[1] / 3).softmax(1)
    one, two = (losses.weighted({name: 1.0}, student, teacher, 3.0).item() for name in ("kl", "dkd"))
    both = losses.weighted({"kl": 0.25, "dkd": 2.0}, student, teacher, 3.0)
    assert both.item() == pytest.approx(0.25 * one + 2 * two, rel=1e-6)


# --- sparse soft labels


def sparse(logits, k):
    """The k most probable classes of each row as they are, and the rest's mass."""
    logs = np.log(softmax64(logits))
    order = np.argsort(-logs, 1)
    classes = np.sort(order[:, :k], 1)
    rest = np.exp(np.take_along_axis(logs, order[:, k:], 1)).sum(1)
    with np.errstate(divide="ignore"):
        return SparseLabels(
            counts=np.full(len(logs), k),
            classes=classes.ravel(),
            log_probabilities=np.take_along_axis(logs, classes, 1).ravel().astype("f4"),
            log_rest=np.log(rest).astype("f4"),
        )


@names
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sparse_labels_of_all_classes_are_dense_ones(name, temperature, logits):
    teacher = dense(sparse(logits[1], 20), 20, temperature)
    loss = losses.weighted({name: 1.0}, torch.tensor(logits[0]), teacher, temperature).item()
    assert loss == pytest.approx(found(name, *logits, temperature), rel=1e-6)


@names
def test_sparse_labels_of_few_classes_spread_the_rest_evenly(name, logits):
    s, t = map(softmax64, logits)
    least_stored = -np.sort(-t, 1)[:, 4:5]
    small = t < least_stored
    even = np.where(small, (t * small).sum(1, keepdims=True) / 15, t)
    loss = losses.DISTILLATION[name](torch.tensor(logits[0]), dense(sparse(logits[1], 5), 20))
    assert loss.item() == pytest.approx(PAPERS[name](s, even), rel=1e-5)


# --- hard labels


def test_hard_targets_smooth_and_mix_as_pytorch_does():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, generator=generator)
    labels = torch.randint(5, (8,), generator=generator)
    unmixed = losses.hard_targets(labels, labels, torch.ones(8), 5, smoothing=0.1)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert losses.cross_entropy(logits, unmixed).item() == pytest.approx(expected.item(), rel=1e-6)

    mixed = losses.hard_targets(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.75]), 4, smoothing=0.0)
    assert mixed.tolist() == [[0.75, 0, 0.25, 0]]


def test_a_sample_without_label_has_no_hard_target():
    own, other = torch.tensor([-1, -1, 1]), torch.tensor([-1, 2, -1])
    found = losses.hard_targets(own, other, torch.tensor([1.0, 0.75, 0.75]), 4, smoothing=0.0)
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 0.25, 0], [0, 0.75, 0, 0]]
    smoothed = losses.hard_targets(own, other, torch.tensor([1.0, 0.75, 0.75]), 4, smoothing=0.4)
    assert torch.allclose(smoothed.sum(1), torch.tensor([0.0, 0.25, 0.75]))
    assert smoothed[2].tolist() == pytest.approx([0.075, 0.525, 0.075, 0.075])


def test_hard_labels_beside_the_teacher_count_by_their_share_of_all_views(logits):
    """Four views: labelled; labelled and mixed; unlabelled, with a labelled one mixed in; unlabelled."""
    images = SimpleNamespace(labels=np.array([3, -1, 7], np.int32), classes=("",) * 20)
    rows, partner_rows = np.array([0, 0, 1, 1]), np.array([0, 2, 2, 1])
    shares = torch.tensor([1.0, 0.75, 0.5, 1.0])
    student, answers = torch.tensor(logits[0][:4]), torch.tensor(logits[1][:4] / 2).softmax(1)
    batch = Batch(rows, np.zeros(4, int), student, partner_rows, shares)
    asked = []

    def teacher(batch, temperature):
        asked.append(temperature)
        return answers

    loss = distillation_loss({"ssld": 2.0, "hard": 0.5}, 2.0, teacher, images)(lambda pixels: pixels, batch)
    surprise = -np.log(softmax64(logits[0][:4]))
    hard = (surprise[0, 3] + 0.75 * surprise[1, 3] + 0.25 * surprise[1, 7] + 0.5 * surprise[2, 7]) / 4
    soft = 2.0 * losses.weighted({"ssld": 1.0}, student, answers, 2.0).item()
    assert loss.item() == pytest.approx(soft + 0.5 * hard, rel=1e-6)
    assert asked == [2.0]


# --- PaddleClas


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="PaddleClas' values are not here")
@pytest.mark.parametrize("case", ["small", "imagenet", "peaked", "equal"])
def test_paddleclas_values(case, monkeypatch):
    expected = json.loads((REFERENCE / "losses.json").read_text())[case]
    arrays = np.load(REFERENCE / "losses.npz")
    student, teacher = (torch.tensor(arrays[f"{case}_{which}"]) for which in ("student", "teacher"))
    answers = teacher.softmax(1)
    take_labels_as_targets(monkeypatch, arrays[f"{case}_label"])
    found = {
        "DMLLoss": losses.ssld(student, answers),
        "KLDivLoss_T4": losses.weighted({"kl": 1.0}, student, (teacher / 4).softmax(1), 4.0),
        "DKDLoss_T1_a1_b1": losses.dkd(student, answers),
        "DIST_b1_g1_T1": losses.dist(student, answers),
    }
    # Where both agree, what is left is rounding: of the order of 1e-6 here and there.
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5, abs=5e-6)
