"""Losses: pure functions of logits and targets, each with its source. All average over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12  # PaddleClas adds it inside its logarithms


def ssld(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """Half the symmetric Kullback-Leibler divergence, (KL(t, s) + KL(s, t)) / 2: the loss of SSLD.

    PaddleClas calls it "JS" (`DMLLoss`), but it is Jeffreys' divergence, halved; the Jensen-Shannon divergence is
    another. Source: PaddleClas, ppcls/loss/dmlloss.py; Cui et al., "Beyond Self-Supervision", arXiv:2103.05959.

    Args:
        student_logits: (B, C), already divided by the temperature.
        teacher: (B, C) probabilities.
    """
    student = F.softmax(student_logits, dim=1)
    log_ratio = torch.log(teacher + EPSILON) - torch.log(student + EPSILON)
    return 0.5 * ((teacher - student) * log_ratio).sum(1).mean()


def kl(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(t, s): what the student's answer loses of the teacher's. Hinton et al., arXiv:1503.02531, without T squared.

    Args:
        student_logits: (B, C), already divided by the temperature.
        teacher: (B, C) probabilities.
    """
    return F.kl_div(F.log_softmax(student_logits, dim=1), teacher, reduction="batchmean")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with targets (B, C) that are probabilities: smoothed and mixed labels."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def hard_targets(labels: Tensor, partner_labels: Tensor, shares: Tensor, classes: int, smoothing: float) -> Tensor:
    """Make targets (B, C) of the labels of mixed views, smoothed.

    Label smoothing as in Szegedy et al., arXiv:1512.00567, section 7: `smoothing` of the mass goes to all classes.

    Args:
        labels, partner_labels: (B,) int64, of the sample and of the one mixed in.
        shares: (B,) float32, how much of each view is the sample's own.
    """
    own, other = (F.one_hot(which, classes).float() for which in (labels, partner_labels))
    mixed = shares[:, None] * own + (1 - shares[:, None]) * other
    return mixed * (1 - smoothing) + smoothing / classes


DISTILLATION = {"ssld": ssld, "kl": kl}
