"""Tests of the metrics: against scikit-learn, against slow loops, and for what they promise at the edges."""

import math

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from pipeline.core.evaluation import metrics


def logits_and_labels(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    logits = random.normal(size=(images, classes)).astype(np.float32) * 2
    logits[np.arange(images), labels] += 1.5  # a network that knows something
    return logits, labels


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [6, 10, 100])
def test_top_k_and_nll_are_scikit_learns(classes):
    logits, labels = logits_and_labels(500, classes)
    answers = metrics.answers(logits, labels)
    for k in (1, 2, 5):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=np.arange(classes))
        assert metrics.top_k(answers.rank, k) == pytest.approx(expected)
    assert metrics.top_k(answers.rank, 1) == accuracy_score(labels, answers.predicted)
    assert answers.nll.mean() == pytest.approx(log_loss(labels, softmax(logits), labels=np.arange(classes)))
    assert answers.probability == pytest.approx(softmax(logits).max(axis=1))


def test_top_5_of_fewer_than_five_classes_is_one():
    logits, labels = logits_and_labels(50, 3)
    assert metrics.top_k(metrics.answers(logits, labels).rank, 5) == 1.0


def test_rank_0_is_what_argmax_says_even_where_logits_are_equal():
    logits, labels = np.zeros((4, 4)), np.arange(4)
    answers = metrics.answers(logits, labels)
    assert answers.rank.tolist() == [0, 1, 2, 3]
    assert ((answers.rank == 0) == (answers.predicted == labels)).all()


def test_large_logits_neither_overflow_nor_lose_the_loss():
    answers = metrics.answers(np.array([[5000.0, -5000.0], [5000.0, -5000.0]]), np.array([0, 1]))
    assert answers.nll.tolist() == [0.0, 10000.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_an_error(bad):
    logits, labels = logits_and_labels(5, 3)
    logits[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 5 images"):
        metrics.answers(logits, labels)


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
def test_reliability_and_ece_are_those_of_a_slow_loop(bins):
    logits, labels = logits_and_labels(400, 7)
    answers = metrics.answers(logits, labels)
    right = answers.rank == 0
    diagram = metrics.reliability(answers.probability, right, bins)
    expected = 0.0
    for m in range(bins):
        inside = [n for n in range(400) if m / bins < answers.probability[n] <= (m + 1) / bins]
        assert diagram.count[m] == len(inside)
        if not inside:
            assert math.isnan(diagram.confidence[m])
            assert math.isnan(diagram.accuracy[m])
            continue
        confidence = sum(answers.probability[n] for n in inside) / len(inside)
        accuracy = sum(right[n] for n in inside) / len(inside)
        assert (diagram.confidence[m], diagram.accuracy[m]) == (pytest.approx(confidence), pytest.approx(accuracy))
        expected += len(inside) / 400 * abs(accuracy - confidence)
    assert metrics.ece(diagram) == pytest.approx(expected)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    diagram = metrics.reliability(np.array([0.2, 0.4, 0.6, 1.0, 1.0 + 1e-15]), np.ones(5, bool), 5)
    assert diagram.count.tolist() == [1, 1, 1, 0, 2]


def test_ece_of_a_network_that_is_as_right_as_it_says_is_zero():
    diagram = metrics.reliability(np.full(4, 0.75), np.array([True, True, True, False]), 10)
    assert metrics.ece(diagram) == 0.0


def test_confusion_and_class_accuracy_are_scikit_learns():
    logits, labels = logits_and_labels(300, 8)
    predicted = metrics.answers(logits, labels).predicted
    matrix = metrics.confusion(labels, predicted, 8)
    assert (matrix.toarray() == confusion_matrix(labels, predicted, labels=np.arange(8))).all()
    expected = confusion_matrix(labels, predicted, labels=np.arange(8), normalize="true").diagonal()
    assert metrics.class_accuracy(matrix) == pytest.approx(expected)


def test_a_class_without_images_has_no_accuracy():
    matrix = metrics.confusion(np.array([0, 0]), np.array([0, 2]), 3)
    assert matrix.sum() == 2
    assert metrics.class_accuracy(matrix)[0] == 0.5
    assert np.isnan(metrics.class_accuracy(matrix)[1:]).all()


def test_most_confused_leaves_out_what_is_right_and_has_one_order():
    matrix = csr_array([[9, 2, 0], [3, 9, 2], [0, 0, 9]])
    assert metrics.most_confused(matrix, 10) == [(1, 0, 3), (0, 1, 2), (1, 2, 2)]
    assert metrics.most_confused(matrix, 1) == [(1, 0, 3)]


def test_a_confusion_matrix_takes_no_memory_for_pairs_that_there_are_not():
    matrix = metrics.confusion(np.array([7, 7, 99_999]), np.array([7, 8, 8]), 100_000)  # 80 GB of numbers
    assert metrics.class_accuracy(matrix)[7] == 0.5
    assert metrics.most_confused(matrix, 3) == [(7, 8, 1), (99_999, 8, 1)]


def test_interval_is_wilsons():
    assert metrics.interval(3, 10) == pytest.approx((0.107790, 0.603220), abs=1e-5)
    assert metrics.interval(300, 300) == pytest.approx((1 / (1 + 1.959964**2 / 300), 1.0), abs=1e-6)


def test_gap_recovered():
    assert metrics.gap_recovered(0.95, 0.90, 1.00) == pytest.approx(0.5)
    assert metrics.gap_recovered(1.00, 0.90, 0.95) == pytest.approx(2.0)
    assert metrics.gap_recovered(0.95, 0.90, 0.90) is None
    assert metrics.gap_recovered(0.95, 0.90, 0.80) is None


def test_paired_is_the_sign_test_of_the_images_that_differ():
    one, other = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 0, 0, 0, 1, 1, 0], bool)
    tail = sum(math.comb(6, k) for k in (0, 1)) / 2**6
    assert metrics.paired(one, other) == (5, 1, pytest.approx(2 * tail))
    assert metrics.paired(one, one) == (0, 0, 1.0)


def test_summary_counts_errors_and_agreement_not_only_on_right_answers():
    labels = np.array([0, 1, 2, 0])
    teacher = metrics.answers(np.eye(3)[[0, 1, 0, 1]] * 4, labels)
    student = metrics.answers(np.eye(3)[[0, 2, 0, 1]] * 4, labels)
    summary = metrics.summary(student, teacher, bins=15)
    assert (summary["errors"], summary["top1"], summary["agreement"]) == (3, 0.25, 0.75)
    assert metrics.summary(teacher, teacher, bins=15)["agreement"] == 1.0
