"""Likeness: how much likelier an image is among the validation images than in the pool, by the teacher's embedding.

A pool holds images of no class, and a teacher is sure of many of them. A logistic regression that tells validation
images from pool images estimates the logarithm of the ratio of the two densities (Sugiyama, Suzuki and Kanamori,
"Density Ratio Estimation in Machine Learning", 2012, section 4), which is highest where images belong (Elkan and Noto,
"Learning Classifiers from Only Positive and Unlabeled Data", 2008). Validation images stand for the labelled ones,
because the teacher has been fitted to those and embeds them as it does no others. The penalty on the regression's
weights is the same whatever the number of images: the fewer there are, the closer the ratios are to 1. No image is
judged by a regression that it was used for.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression

from pipeline.core.sections import LEAST_TO_LEARN

FOLDS = 5
SAMPLE = 20_000  # most images of each side that a regression is fitted to
STRENGTH = 1e-3  # inverse of the L2 penalty, for embeddings of variance 1
ROWS = 4096  # embeddings read at once: they may be many times the memory


def likeness(
    pool: np.ndarray, validation: np.ndarray, folds: np.ndarray, done: Callable[[int], object] = lambda count: None
) -> np.ndarray:
    """Give each pool image the logarithm of its density ratio.

    Args:
        pool: (N, D) embeddings; may be memory-mapped. The first ones are fitted to: their order must be random.
        validation: (V, D) embeddings, likewise.
        folds: (N,) uint64, any number that belongs to an image for good: its id.
        done: told how many more images have been judged.

    Returns:
        (N,) float32.

    Raises:
        ValueError: there are too few images to learn from.
    """
    if min(len(pool), len(validation)) < LEAST_TO_LEARN:
        raise ValueError(
            f"mine.rank_by is likeness, but there are {len(pool)} pool and {len(validation)} validation images, and it "
            f"takes {LEAST_TO_LEARN} of each to learn what belongs; set it to probability"
        )
    positive, negative = (side[:SAMPLE].astype(np.float32) for side in (validation, pool))
    both = np.concatenate([positive, negative])
    mean, spread = both.mean(0), np.maximum(both.std(0), 1e-6)
    belongs = np.arange(len(both)) < len(positive)
    fold = np.concatenate([np.arange(len(positive)) % FOLDS, folds[:SAMPLE] % np.uint64(FOLDS)]).astype(int)
    both = (both - mean) / spread
    weights, biases = np.zeros((both.shape[1], FOLDS), np.float32), np.zeros(FOLDS, np.float32)
    for number in range(FOLDS):
        kept = fold != number
        fitted = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=300).fit(both[kept], belongs[kept])
        weights[:, number], biases[number] = fitted.coef_[0], fitted.intercept_[0]
    ratios = np.zeros(len(pool), np.float32)
    for start in range(0, len(pool), ROWS):
        part = slice(start, start + ROWS)
        judged = ((pool[part].astype(np.float32) - mean) / spread) @ weights + biases  # (n, FOLDS)
        ratios[part] = judged[np.arange(len(judged)), (folds[part] % np.uint64(FOLDS)).astype(int)]
        done(len(judged))
    return ratios
