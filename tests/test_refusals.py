"""What was refused: counted, compared with the share allowed, and written as a list."""

import csv
import io
import random

import pytest

from pipeline.core.intake import refusals
from pipeline.core.intake.refusals import DUPLICATE, FURTHER_FRAMES, HIDDEN, Refusal

SOURCES = ("train", "val", "unlabelled")
REASONS = ("truncated", DUPLICATE, HIDDEN, FURTHER_FRAMES)


def some(count: int, seed: int) -> list[Refusal]:
    """Refusals of files of several sources, for several reasons."""
    draw = random.Random(seed)
    return [Refusal(draw.choice(SOURCES), f"{at}, it.png", draw.choice(REASONS), "a\nb") for at in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_no_source_may_have_a_larger_share_of_files_refused_than_allowed(seed):
    """Hidden files are no part of it, nor the pool's duplicates: refused, but no fault of the images.

    A file is kept if a frame of it is used.
    """
    refused, files = some(30, seed), dict.fromkeys(SOURCES, 10 + seed) | {"test": 0}
    shares = {}
    for source in SOURCES:
        reasons = [each.reason for each in refused if each.source == source]
        faults = ("truncated",) if source == "unlabelled" else ("truncated", DUPLICATE)
        bad = sum(reason in faults for reason in reasons)
        shares[source] = (bad, files[source] - reasons.count(HIDDEN))
    for source, (bad, seen) in shares.items():
        others = max(other / count for name, (other, count) in shares.items() if name != source)
        refusals.check_share(files, refused, max(bad / seen, others))
        if bad / seen > others:
            with pytest.raises(ValueError, match=rf"^prepare\.{source}: {bad} of {seen} files were refused \("):
                refusals.check_share(files, refused, bad / seen - 1e-9)


def test_the_first_file_refused_is_named_with_its_fault():
    refused = [
        Refusal("train", ".x.png", HIDDEN, "a dot"),
        Refusal("train", "a/1.png", DUPLICATE, "same bytes as b/2.png"),
    ]
    words = r"\(duplicate 1, such as a/1\.png: same bytes as b/2\.png\)"
    with pytest.raises(ValueError, match=words):
        refusals.check_share({"train": 4}, refused, 0.2)


def test_a_pool_of_copies_alone_is_refused_and_one_with_an_image_of_its_own_is_not():
    refused = [Refusal("unlabelled", f"{at}.png", DUPLICATE) for at in range(3)]
    refused += [Refusal("unlabelled", "bad.png", "truncated"), Refusal("unlabelled", ".x.png", HIDDEN)]
    refusals.check_share({"unlabelled": 6}, refused, 0.2)
    refusals.check_share({"unlabelled": 1}, refused[-1:], 0.0)
    with pytest.raises(ValueError, match=r"^prepare\.unlabelled: holds nothing but copies of other sources' images"):
        refusals.check_share({"unlabelled": 5}, refused, 1.0)


def test_a_source_of_hidden_files_alone_is_no_reason_to_stop():
    refusals.check_share({"train": 1}, [Refusal("train", ".x.png", HIDDEN)], 0.0)


def test_counts_are_in_words_the_most_common_first():
    refused = [Refusal("val", str(at), "duplicate" if at < 2 else "truncated") for at in range(1502)]
    assert refusals.in_words(refusals.reasons(refused, "val")) == "truncated 1,500, duplicate 2"
    assert refusals.in_words(refusals.reasons(refused, "train")) == "none"


def test_the_list_can_be_read_back_and_does_not_depend_on_the_order():
    refused = some(50, seed=0)
    text = refusals.as_csv(refused)
    assert refusals.as_csv(random.Random(1).sample(refused, 50)) == text
    read = [Refusal(**row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    assert read == sorted(refused, key=lambda each: each.file)
