"""Which images a data set is made of: no image twice, none under two labels, at most so many a class.

Nothing here reads a file, and nothing depends on the order of files: choices follow from each image's content and the
seed, so that they stay as they are, or nearly so, when images are added.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.core.data.dataset import id_of, rank
from pipeline.core.data.image_files import Unreadable
from pipeline.core.intake.refusals import DUPLICATE, Refusal
from pipeline.core.intake.sources import SourceFile

ROLES = ("test", "val", "train", "unlabelled")  # where an image stands in several, it stays in the first


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was read.

    Attributes:
        role: of its source, one of ROLES.
        file: the file.
        sha256: of its bytes, as text.
        length: of its bytes.
    """

    role: str
    file: SourceFile
    sha256: str
    length: int

    @property
    def id(self) -> int:
        """The first 8 bytes of the file's SHA-256; the sample's id, unless the image is encoded anew."""
        return id_of(self.sha256)

    @property
    def pooled(self) -> bool:
        """Whether it is an unlabelled image: in the pool, or without a label in the list of train."""
        return self.role == "unlabelled" or (self.role == "train" and self.file.class_name is None)


@dataclass(frozen=True, slots=True)
class Picture:
    """What decoding an image's content showed; the upright image's size."""

    width: int
    height: int
    frames: int


class Stored(NamedTuple):
    """What the data set holds of a file: the bytes' SHA-256 and length, and the upright image's size."""

    sha256: str
    length: int
    width: int
    height: int


Parts = dict[str, list[Found]]  # the images of labelled, withheld, unlabelled, val and test
Pictures = dict[str, Picture | Unreadable]  # by SHA-256; what was not decoded yet is not in it


def select(
    found: list[Found],
    pictures: Pictures,
    decode: Callable[[list[Found]], None],
    *,
    seed: int,
    images_per_class: int | None,
    labels_per_class: int | None,
    shares: dict[str, float],
) -> tuple[Parts, list[Refusal]]:
    """Choose the images of each part of the data set.

    Args:
        found: every file that could be read.
        pictures: what is known of their contents.
        decode: adds to `pictures` what the contents of some files are.
        seed: of the choices.
        images_per_class: at most so many of train; None: all.
        labels_per_class: keep so many labels; None: all.
        shares: of train, to hold out for val and test.

    Returns:
        The images of labelled, withheld, unlabelled, val and test, and the files refused.
    """
    decode([group[0] for group in by_content(found).values() if len(group) > 1])
    kept, refusals = sort_out(found, pictures)
    train = [each for each in kept if each.role == "train" and not each.pooled]
    train, refused = at_most(train, images_per_class, seed, pictures, decode)
    refusals += refused
    parts = split(train, shares, labels_per_class, seed)
    for role in ("val", "test"):
        parts[role] += [each for each in kept if each.role == role]
    labelled = [each for part in parts.values() for each in part]
    pool, refused = not_in_use([each for each in kept if each.pooled], labelled)
    return {**parts, "unlabelled": pool}, refusals + refused


def refuse(found: Found, reason: str, detail: str = "") -> Refusal:
    """Refuse a file that was read."""
    return Refusal(found.role, found.file.name, reason, detail)


def by_content(found: list[Found]) -> dict[str, list[Found]]:
    """Group files by content, the one to keep first: of test before val before train, then the first by name."""
    groups = defaultdict(list)
    for each in found:
        groups[each.sha256].append(each)
    for group in groups.values():
        group.sort(key=lambda each: (each.pooled, ROLES.index(each.role), each.file.name))
    return groups


def sort_out(found: list[Found], pictures: Pictures) -> tuple[list[Found], list[Refusal]]:
    """Keep one file of each content, none that is unreadable or stands under two labels.

    A copy in the pool of a labelled image is kept here: whether that image is used is not known yet.
    """
    kept, refusals = [], []
    for sha256, group in by_content(found).items():
        picture = pictures.get(sha256)
        if isinstance(picture, Unreadable):
            refusals += [refuse(each, picture.reason, picture.detail) for each in group]
            continue
        refusals += [refuse(each, "no class") for each in group if not each.pooled and not each.file.class_name]
        pool = [each for each in group if each.pooled]
        labelled = [each for each in group if not each.pooled and each.file.class_name]
        labels = sorted({each.file.class_name for each in labelled})
        if len(labels) > 1:
            refusals += [refuse(each, "two labels", " and ".join(labels)) for each in labelled]
            labelled = []
        for same in (labelled, pool):
            kept += same[:1]
            refusals += [_duplicate(each, same[0]) for each in same[1:]]
    return kept, refusals


def not_in_use(pool: list[Found], used: list[Found]) -> tuple[list[Found], list[Refusal]]:
    """Leave out of the pool what is in use with a label."""
    labelled = {each.sha256: each for each in used}
    kept = [each for each in pool if each.sha256 not in labelled]
    return kept, [_duplicate(each, labelled[each.sha256]) for each in pool if each.sha256 in labelled]


def at_most(
    train: list[Found],
    most: int | None,
    seed: int,
    pictures: Pictures,
    decode: Callable[[list[Found]], None],
) -> tuple[list[Found], list[Refusal]]:
    """Take the images of each class that come first in the seed's order, as many as are allowed.

    An image is decoded only when its turn comes; the result is the same as if all had been.

    Args:
        train: labelled images.
        most: how many of a class; None: all.
        seed: of the order.
        pictures: what is known of contents.
        decode: adds what it finds to `pictures`; asked in the order of `train`, as archives are fastest to read.
    """
    place = {each.sha256: number for number, each in enumerate(train)}
    waiting: dict[str, list[Found]] = by_class(train)
    for queue in waiting.values():
        queue.sort(key=lambda each: rank(seed, "images", each.id), reverse=True)
    taken: dict[str, list[Found]] = {name: [] for name in waiting}
    refusals = []
    while True:
        turn = []
        for name, queue in waiting.items():
            count = len(queue) if most is None else min(len(queue), most - len(taken[name]))
            turn += [queue.pop() for _ in range(count)]
        if not turn:
            return [each for of_class in taken.values() for each in of_class], refusals
        new = [each for each in turn if each.sha256 not in pictures]
        decode(sorted(new, key=lambda each: place[each.sha256]))
        for each in turn:
            picture = pictures[each.sha256]
            if isinstance(picture, Unreadable):
                refusals.append(refuse(each, picture.reason, picture.detail))
            else:
                taken[each.file.class_name].append(each)


def split(train: list[Found], shares: dict[str, float], labels: int | None, seed: int) -> Parts:
    """Share out the training images, each by its own place in the seed's order.

    Images that are added make no test image of what was for training or val: a network of before may have learned from
    that. The exception are classes of fewer than three, which are all for training until they grow, and those of hardly
    more where chance leaves training without an image: a held-out one stays there until they grow.

    Args:
        train: labelled images.
        shares: for val and test: the chance of each image. Of a class of three or more a part with a share has one at
            least, and one is left to train on; of a smaller one all are.
        labels: how many labels a class to keep; None: all.
        seed: of the order.

    Returns:
        test, val, labelled and withheld: the last are those whose labels the student may not see.
    """
    parts: Parts = {"test": [], "val": [], "labelled": [], "withheld": []}
    for of_class in by_class(train).values():
        ranks = {each.sha256: rank(seed, "held out", each.id) for each in of_class}
        of_class.sort(key=lambda each: ranks[each.sha256])
        test, val = _held_out(sorted(ranks.values()), shares)
        end = len(of_class) - val
        rest = sorted(of_class[test:end], key=lambda each: rank(seed, "images", each.id))
        parts["test"] += of_class[:test]
        parts["val"] += of_class[end:]
        parts["labelled"] += rest[:labels]
        parts["withheld"] += [] if labels is None else rest[labels:]
    return parts


def one_of_each(parts: Parts, stored: dict[str, Stored]) -> tuple[Parts, list[Refusal]]:
    """Keep one image of those that became the same bytes when they were encoded, none that stands under two labels.

    Args:
        parts: the images chosen.
        stored: what is stored of each, by the SHA-256 of its file.
    """
    groups = defaultdict(list)  # by what is stored; the first of a group is the one to keep
    for part in ("test", "val", "labelled", "withheld", "unlabelled"):
        for each in sorted(parts[part], key=lambda each: each.sha256):
            groups[stored[each.sha256].sha256].append((part, each))
    kept: Parts = {part: [] for part in parts}
    refusals = []
    for group in groups.values():
        labels = sorted({each.file.class_name for part, each in group if part != "unlabelled"})
        if len(labels) > 1:
            labelled = [each for part, each in group if part != "unlabelled"]
            refusals += [refuse(each, "two labels", " and ".join(labels)) for each in labelled]
            group = [(part, each) for part, each in group if part == "unlabelled"]
        for part, each in group[:1]:
            kept[part].append(each)
        for _, each in group[1:]:
            detail = f"of {group[0][1].file.name}, once both are encoded anew"
            refusals.append(refuse(each, DUPLICATE, detail))
    return kept, refusals


def by_class(found: list[Found]) -> dict[str, list[Found]]:
    """Group labelled files by class, in the order of their names."""
    groups: dict[str, list[Found]] = {name: [] for name in sorted({each.file.class_name for each in found})}
    for each in found:
        groups[each.file.class_name].append(each)
    return groups


def _held_out(ranks: list[int], shares: dict[str, float]) -> tuple[int, int]:
    """Say how many of a class' images, from the first on, are for test, and how many, up to the last, for val.

    Args:
        ranks: of its images, below 2**64.
        shares: for val and test; see `split`.
    """
    if len(ranks) < 3:
        return 0, 0
    test = sum(each < shares["test"] * 2**64 for each in ranks)
    val = sum(each >= (1 - shares["val"]) * 2**64 for each in ranks)
    least = {part: int(share > 0) for part, share in shares.items()}
    test = min(max(test, least["test"]), len(ranks) - 1 - least["val"])
    return test, min(max(val, least["val"]), len(ranks) - 1 - test)


def _duplicate(found: Found, kept: Found) -> Refusal:
    return refuse(found, DUPLICATE, f"same bytes as {kept.file.name} in {kept.role}")
