"""Mining: near-copies out, the best of each class in."""

import numpy as np
import pytest
from images import shape
from PIL import Image

from pipeline import mine
from pipeline.core import copies


def photo(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)


def shifted(image, right, down):
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, right, 0, 1, down))


def test_rescaled_and_shifted_copies_are_found_and_others_are_not():
    guarded = [photo(seed) for seed in range(20)]
    pool = [guarded[3].resize((48, 48)), shifted(guarded[5], 3, -3), photo(100), photo(101), guarded[7]]
    similarity, which = copies.nearest(copies.thumbnails(pool), copies.thumbnails(guarded))
    assert (similarity >= 0.95).tolist() == [True, True, False, False, True]
    assert which[[0, 1, 4]].tolist() == [3, 5, 7]


def test_similarity_is_the_best_correlation_over_shifts():
    thumbs = copies.thumbnails([shape("circle", seed, 32) for seed in range(12)])
    pool, guarded = thumbs[:8], thumbs[8:]
    similarity, _ = copies.nearest(pool, guarded)
    for at, image in enumerate(pool):
        best = -1.0
        for other in guarded:
            inner = other[2:-2, 2:-2].ravel()
            for down in range(5):
                for right in range(5):
                    best = max(best, np.corrcoef(image[down : down + 28, right : right + 28].ravel(), inner)[0, 1])
        assert similarity[at] == pytest.approx(best, abs=1e-4)


def test_images_of_one_colour_and_empty_lists_are_no_copies():
    black = copies.thumbnails([Image.new("RGB", (20, 20))])
    assert copies.nearest(black, black)[0].tolist() == [0.0]
    none = copies.thumbnails([])
    assert copies.nearest(black, none)[1].tolist() == [-1]
    assert len(copies.nearest(none, black)[0]) == 0


def test_each_class_takes_its_best():
    classes = np.array([0, 0, 0, 0, 1, 1, 2])
    best = np.array([0.9, 0.8, 0.7, 0.95, 0.6, 0.4, 0.9])
    allowed = np.array([True, True, True, False, True, True, True])
    taken = mine.best_of_each_class(classes, best, np.arange(7, dtype=np.uint64), allowed, per_class=2, min_score=0.5)
    assert taken.tolist() == [True, True, False, False, True, False, True]


def test_equal_scores_are_decided_by_id_not_by_place():
    ids = np.array([30, 10, 20], np.uint64)
    same = np.full(3, 0.9)
    taken = mine.best_of_each_class(np.zeros(3, int), same, ids, np.ones(3, bool), per_class=2, min_score=0.0)
    assert taken.tolist() == [False, True, True]


def test_the_summary_counts_every_image_once():
    counts = mine.summary(("a", "b", "c"), np.array([0, 0, 2]), np.array(["low score", "near-copy", "low score"]), 5)
    assert counts["per_class"] == {"a": 2, "b": 0, "c": 1}
    assert counts["refused"] == {"low score": 2, "near-copy": 1}
