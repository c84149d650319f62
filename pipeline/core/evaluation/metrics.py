"""What a classifier's answers are worth: pure functions on numpy arrays, in float64.

N images, C classes. Logits are (N, C), labels and predicted classes (N,). `answers` turns logits into four numbers an
image, and every metric but the confusion matrix is made from those, so that nobody has to keep N x C numbers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.stats import binomtest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Answers(NamedTuple):
    """What a network said to N images, an array of shape (N,) each."""

    predicted: Ints  # the most probable class
    probability: Floats  # its probability
    nll: Floats  # -log of the probability of the right class
    rank: Ints  # how many classes the network puts before the right one: 0 is a right answer


class Reliability(NamedTuple):
    """A reliability diagram, an array of shape (bins,) each; NaN where a bin is empty."""

    confidence: Floats  # mean probability of the predicted class
    accuracy: Floats  # share of right answers
    count: Ints


def answers(logits: NDArray, labels: NDArray) -> Answers:
    """Condense logits to what the metrics need.

    Of classes with equal logits the first one counts as the more probable, as in `argmax`.

    Raises:
        ValueError: a logit is not finite.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits).all(axis=1)).sum())
        raise ValueError(f"the network's answer to {bad} of {len(logits)} images is not a finite number")
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1))
    right = np.take_along_axis(shifted, labels[:, None], axis=1)  # (N, 1)
    first_of_equals = (shifted == right) & (np.arange(logits.shape[1]) < labels[:, None])
    return Answers(
        predicted=shifted.argmax(axis=1),
        probability=np.exp(-log_total),  # the largest shifted logit is 0
        nll=log_total - right[:, 0],
        rank=((shifted > right) | first_of_equals).sum(axis=1),
    )


def top_k(rank: Ints, k: int) -> float:
    """Share of images whose right class is among the k most probable ones; 1 where there are no more than k."""
    return float((rank < k).mean())


def reliability(probability: Floats, right: NDArray, bins: int) -> Reliability:
    """Sort answers into bins of equal width by confidence, and compare confidence with accuracy in each.

    Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599, section 2: of M bins, bin m holds
    the confidences in ((m - 1) / M, m / M].

    Args:
        probability: of the predicted class, (N,).
        right: whether the predicted class is the label, (N,).
        bins: M.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], probability, side="left")  # (N,): the first edge that is not below
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            confidence=np.bincount(place, weights=probability, minlength=bins) / count,
            accuracy=np.bincount(place, weights=right, minlength=bins) / count,
            count=count,
        )


def ece(diagram: Reliability) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over all images' bins.

    Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    filled = diagram.count > 0
    gap = np.abs(diagram.accuracy[filled] - diagram.confidence[filled])
    return float((diagram.count[filled] * gap).sum() / diagram.count.sum())


def confusion(labels: NDArray, predicted: NDArray, classes: int) -> csr_array:
    """Count images by label (row) and predicted class (column): (C, C), sparse, since C may be tens of thousands."""
    once = np.ones(len(labels), np.int64)
    return coo_array((once, (labels, predicted)), (classes, classes)).tocsr()


def class_accuracy(matrix: csr_array) -> Floats:
    """Share of each class' images that are answered right, from a confusion matrix: (C,); NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return matrix.diagonal() / matrix.sum(axis=1)


def most_confused(matrix: csr_array, most: int) -> list[tuple[int, int, int]]:
    """List the most frequent confusions: (label, predicted class, count), the most frequent first, then by class."""
    counts = matrix.tocoo()
    triples = zip(counts.row.tolist(), counts.col.tolist(), counts.data.tolist(), strict=True)
    wrong = [(label, answer, count) for label, answer, count in triples if label != answer]
    return sorted(wrong, key=lambda pair: (-pair[2], pair))[:most]


def interval(right: int, total: int) -> tuple[float, float]:
    """Give a share's 95 % confidence interval.

    Wilson, Probable inference, the law of succession, and statistical inference, 1927. Unlike the textbook's
    interval it is of use near 100 %, where classifiers are.
    """
    low, high = binomtest(right, total).proportion_ci(method="wilson")
    return float(low), float(high)


def gap_recovered(student: float, baseline: float, teacher: float) -> float | None:
    """Say which share of the way from baseline to teacher the student went; None where the teacher is not ahead."""
    return (student - baseline) / (teacher - baseline) if teacher > baseline else None


def paired(one: NDArray, other: NDArray) -> tuple[int, int, float]:
    """Compare two networks on the same images.

    Args:
        one, other: whether each is right, (N,) bool.

    Returns:
        On how many images only the one is right, on how many only the other, and the probability of so uneven a
        split by chance (McNemar's test in its exact form, 1947: the sign test of the images they differ on).
    """
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_one + only_other
    return only_one, only_other, float(binomtest(only_one, differ).pvalue) if differ else 1.0


def summary(answers: Answers, teacher: Answers, bins: int) -> dict[str, float | int]:
    """Give a network's metrics: top1, top5, nll, ece, agreement with the teacher's predictions, and errors.

    Args:
        answers: the network's.
        teacher: the teacher's, to the same images in the same order.
        bins: confidence bins of the ECE.
    """
    right = answers.rank == 0
    return {
        "top1": top_k(answers.rank, 1),
        "top5": top_k(answers.rank, 5),
        "nll": float(answers.nll.mean()),
        "ece": ece(reliability(answers.probability, right, bins)),
        "agreement": float((answers.predicted == teacher.predicted).mean()),
        "errors": int((~right).sum()),
    }
