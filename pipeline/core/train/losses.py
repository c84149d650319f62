"""Losses: pure functions of logits and targets, each with its paper and equation.

Below, s and t are the student's and the teacher's probabilities (B, C), both at the temperature T: a loss takes the
student's logits already divided by T, and the teacher's probabilities at T, whose sparse form
`pipeline.core.softlabels.dense` spreads out on the student's device. (SSLD's, KL and cross-entropy could be computed
from the stored classes alone, the rest being spread evenly: on a CPU that saves half of the loss's time, nothing of a
step's, so it is not done.) A loss is a mean over the batch; DIST's part within a class looks at the batch as a whole.

T squared stands in `weighted`, in one place for all: the gradients of soft targets scale as 1/T^2, so Hinton et al.
(arXiv:1503.02531, section 2) multiply by T^2 to keep soft and hard targets in balance; DKD's and DIST's authors do too.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12  # PaddleClas adds it inside the logarithms of SSLD's loss
PEARSON_EPSILON = 1e-8  # DIST's authors and PaddleClas add it to the product of the norms


def ssld(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """Half the symmetric Kullback-Leibler divergence, (KL(t, s) + KL(s, t)) / 2: the loss of SSLD.

    PaddleClas calls it "JS" (`DMLLoss`), but it is Jeffreys' divergence, halved; the Jensen-Shannon divergence is
    another, `js`. Source: PaddleClas, ppcls/loss/dmlloss.py; Cui et al., "Beyond Self-Supervision", arXiv:2103.05959.
    """
    student = F.softmax(student_logits, dim=1)
    log_ratio = torch.log(teacher + EPSILON) - torch.log(student + EPSILON)
    return 0.5 * ((teacher - student) * log_ratio).sum(1).mean()


def js(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """The Jensen-Shannon divergence, (KL(t, m) + KL(s, m)) / 2 with m = (t + s) / 2; at most log 2.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory 37 (1991),
    section IV, with both weights 1/2.
    """
    log_student, log_teacher = F.log_softmax(student_logits, dim=1), torch.log(teacher)
    log_mean = torch.logaddexp(log_student, log_teacher) - math.log(2)
    of_teacher = torch.xlogy(teacher, teacher) - teacher * log_mean
    of_student = log_student.exp() * (log_student - log_mean)
    return 0.5 * (of_teacher + of_student).sum(1).mean()


def kl(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(t, s) = sum t log(t / s): what the student's answer loses of the teacher's.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2; their soft
    cross-entropy less the teacher's entropy, which has no gradient.
    """
    return F.kl_div(F.log_softmax(student_logits, dim=1), teacher, reduction="batchmean")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum y log s, with targets y (B, C): soft labels, or hard ones that are smoothed and mixed.

    Targets may sum to less than 1: a row of zeros adds nothing, and the mean is still over all B.
    Source: Hinton et al., arXiv:1503.02531, section 2, for targets that are a teacher's answers.
    """
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def tckd(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(b_t, b_s), where b = (p_y, 1 - p_y) for the target class y: DKD's part about the target class.

    Source, and what the target class is: as for `dkd`.
    """
    target, others, _ = _split(teacher)
    log_target = F.log_softmax(student_logits, dim=1).gather(1, target)
    log_others = _without(student_logits, target).logsumexp(1, True) - student_logits.logsumexp(1, True)
    of_target = teacher.gather(1, target)
    entropy = torch.xlogy(of_target, of_target) + torch.xlogy(others, others)
    return (entropy - of_target * log_target - others * log_others).mean()


def nckd(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(q_t, q_s), where q_i = p_i / (1 - p_y) for the classes i other than y: DKD's part about the other classes.

    A teacher that gives the other classes nothing at all says nothing of them: 0. Source and target: as for `dkd`.
    """
    target, others, rest = _split(teacher)
    share = rest / others.clamp(min=torch.finfo(rest.dtype).tiny)  # (B, C), 0 at the target
    log_share = student_logits - _without(student_logits, target).logsumexp(1, True)
    return (torch.xlogy(share, share) - share * log_share).sum(1).mean()


def dkd(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """TCKD + NCKD: decoupled knowledge distillation. (KL(t, s) is TCKD + (1 - t_y) NCKD, sample by sample.)

    Source: Zhao et al., "Decoupled Knowledge Distillation", arXiv:2203.08679: alpha TCKD + beta NCKD. PaddleClas takes
    1 and 1, as here; on ImageNet the authors take 1 and 0.5 (`{tckd: 1.0, nckd: 0.5}` in the settings), at T = 1 beside
    hard labels (megvii-research/mdistiller).

    The target class y is the one that the teacher finds most probable, as an image without label has no other
    (PaddleClas' `use_target_as_gt`); in the paper it is the label.
    """
    return tckd(student_logits, teacher) + nckd(student_logits, teacher)


def dist_inter(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """1 - mean over samples of Pearson's r(s_i, t_i): DIST's relations between classes. Source: as for `dist`."""
    return 1 - _pearson(F.softmax(student_logits, dim=1), teacher).mean()


def dist_intra(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """1 - mean over classes of Pearson's r between columns (B,) of s and t: DIST's relations within a class.

    It compares the samples of a batch with one another: those of this process, and of this part of the batch.
    Source: as for `dist`.
    """
    return 1 - _pearson(F.softmax(student_logits, dim=1).T, teacher.T).mean()


def dist(student_logits: Tensor, teacher: Tensor) -> Tensor:
    """Relations between classes, and relations within a class, each 1 less a mean Pearson correlation.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536, with beta = gamma = 1; for
    others, weigh `dist_inter` and `dist_intra` apart. On ImageNet PaddleClas takes `dist` twice at T = 1, beside hard
    labels.
    """
    return dist_inter(student_logits, teacher) + dist_intra(student_logits, teacher)


def hard_targets(labels: Tensor, partner_labels: Tensor, shares: Tensor, classes: int, smoothing: float) -> Tensor:
    """Make targets (B, C) of the labels of mixed views, smoothed.

    A sample without label adds nothing: where one of the two mixed has a label, the row sums to its share alone, and
    where neither has, to 0. So each label weighs as much as its share of the pixels, whatever else is in the batch.

    Label smoothing as in Szegedy et al., arXiv:1512.00567, section 7: `smoothing` of the mass goes to all classes.

    Args:
        labels, partner_labels: (B,) int64, of the sample and of the one mixed in; -1: none.
        shares: (B,) float32, how much of each view is the sample's own.
    """
    mixed = shares.new_zeros(len(labels), classes)
    for which, share in ((labels, shares), (partner_labels, 1 - shares)):
        mixed.scatter_add_(1, which.clamp(min=0)[:, None], (share * (which >= 0))[:, None])
    return mixed * (1 - smoothing) + mixed.sum(1, keepdim=True) * (smoothing / classes)


def weighted(weights: Mapping[str, float], logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the weighted sum of distillation losses at temperature T.

    Args:
        weights: of names in `DISTILLATION`.
        logits: (B, C), the student's.
        teacher: (B, C), probabilities at the temperature.
    """
    terms = [weight * DISTILLATION[name](logits / temperature, teacher) for name, weight in weights.items()]
    return temperature**2 * torch.stack(terms).sum()


def _target(teacher: Tensor) -> Tensor:
    """Give the target class (B, 1) of DKD."""
    return teacher.argmax(1, keepdim=True)


def _split(teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the target class (B, 1), the mass of all others (B, 1), and the probabilities (B, C) with 0 at the target.

    The mass is summed, not 1 less the target's, which float32 rounds to 0 where a teacher is sure.
    """
    target = _target(teacher)
    rest = teacher.scatter(1, target, 0.0)
    return target, rest.sum(1, keepdim=True), rest


def _without(logits: Tensor, target: Tensor) -> Tensor:
    """Give the logits (B, C) with -inf at the target class (B, 1)."""
    return logits.scatter(1, target, -torch.inf)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation (N,) of the rows of two (N, M)."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + PEARSON_EPSILON)


DISTILLATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ssld": ssld,
    "js": js,
    "kl": kl,
    "cross_entropy": cross_entropy,
    "dkd": dkd,
    "tckd": tckd,
    "nckd": nckd,
    "dist": dist,
    "dist_inter": dist_inter,
    "dist_intra": dist_intra,
}
