"""What was left out of a data set, and why: counted, compared with a limit, and written as a list."""

from collections import Counter
from dataclasses import dataclass

from pipeline.core import tables

HIDDEN = "hidden"  # no fault of the images: many programs keep hidden ones of their own
DUPLICATE = "duplicate"  # in the source unlabelled no fault either: a labelled image stays, and of equal ones the first
FURTHER_FRAMES = "further frames"  # the one reason for which the file itself is kept


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that was left out, or of which something was.

    Attributes:
        source: train, val, test or unlabelled.
        file: its name in that source.
        reason: one of a few fixed phrases.
        detail: what exactly was found.
    """

    source: str
    file: str
    reason: str
    detail: str = ""


def reasons(refusals: list[Refusal], source: str) -> Counter[str]:
    """Count why files of a source were left out."""
    return Counter(each.reason for each in refusals if each.source == source and each.reason != FURTHER_FRAMES)


def in_words(counts: Counter[str]) -> str:
    """Write counts as "truncated 3, duplicate 1"."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()) or "none"


def check_share(files: dict[str, int], refusals: list[Refusal], most: float) -> None:
    """Stop where too large a share of a source was refused, harmless files aside.

    Args:
        files: how many files of each source were looked at.
        refusals: all refusals.
        most: the largest share allowed.

    Raises:
        ValueError: a source, its share, and how often each reason was given; or the pool has nothing of its own.
    """
    for source, count in files.items():
        counts = reasons(refusals, source)
        seen = count - counts.pop(HIDDEN, 0)
        copies = counts.pop(DUPLICATE, 0) if source == "unlabelled" else 0
        if copies and copies + counts.total() == seen:
            raise ValueError(f"prepare.{source}: holds nothing but copies of other sources' images; null is for none")
        if seen and counts.total() / seen > most:
            first = next(each for each in refusals if each.source == source and each.reason in counts)
            such_as = f", such as {first.file}{f': {first.detail}' if first.detail else ''}"
            raise ValueError(
                f"prepare.{source}: {counts.total():,} of {seen:,} files were refused ({in_words(counts)}{such_as}), a "
                f"larger share than prepare.max_refused_share allows ({most}): mend them, take them out, or raise it"
            )


def as_csv(refusals: list[Refusal]) -> str:
    """Write the list of refusals as CSV, sorted by file and source."""
    columns = ("file", "source", "reason", "detail")
    rows = sorted((each.file, each.source, each.reason, each.detail) for each in refusals)
    return tables.as_csv([dict(zip(columns, row, strict=True)) for row in rows], columns)
