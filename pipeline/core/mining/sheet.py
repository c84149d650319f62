"""The contact sheet of mining: some images that were mined and some that were refused, and why."""

import numpy as np
from PIL import Image

from pipeline.core.data.dataset import ImageSet
from pipeline.core.mining import contact_sheet, ranking
from pipeline.core.mining.contact_sheet import Line, Part, Tile
from pipeline.core.mining.ranking import ClassCount

CLASSES = 20  # shown at most, evenly spread
TILES = 6  # of a class: the first and the last that it took, so many of each
COPIES, KEPT, REFUSED = 24, 12, 24  # pairs of near-copies and of the most alike of the rest; images for a reason

Table = dict[str, np.ndarray]
SCORE = "Below: the teacher's score, which ranks it."
WORTH = "Below: what ranks it, the teacher's score times how much likelier the image is in validation than in the pool."


def draw(images: ImageSet, mined: Table, judged: Table, refused: np.ndarray, counts: list[ClassCount]) -> Image.Image:
    """Draw the sheet.

    Args:
        images: all of them.
        mined: id, class, score and likeness; a row an image and class.
        judged: id, reason, class, score, likeness, similarity, nearest and alignment of all pool images.
        refused: (N,) bool, whether no class took the image.
        counts: of each class.
    """
    copied, below = judged["reason"] == "near-copy", WORTH if judged["likeness"].any() else SCORE
    like = np.argsort(-judged["similarity"], kind="stable")
    copies, others = like[copied[like]][::-1], like[~copied[like] & (judged["nearest"][like] > 0)]
    parts = [
        _classes(images, mined, counts, below),
        Part(
            f"Refused: near-copy ({len(copies):,})",
            "Left the pool image, right the validation or test image it copies; the least alike first.",
            [Line([_pair(images, judged, at) for at in _some(copies, COPIES)])],
        ),
        Part(
            "Not taken for copies: the most alike of the rest",
            "If these are copies, mine.copy_similarity is too high; if some of those above are none, it is too low.",
            [Line([_pair(images, judged, at) for at in others[:KEPT]])],
        ),
    ]
    for reason in ("low score", "class is full"):
        found = np.flatnonzero(refused & (judged["reason"] == reason))
        found = found[np.argsort(-judged["score"][found], kind="stable")]
        tiles = [_scored(images, judged, at, counts) for at in _some(found, REFUSED)]
        note = f"{below} The class is the most probable one; the highest score first."
        parts.append(Part(f"Refused: {reason} ({len(found):,})", note, [Line(tiles)]))
    title = f"Mining: {len(np.unique(mined['id'])):,} of {len(judged['id']):,} pool images taken"
    return contact_sheet.draw(images.image, title, [each for each in parts if any(line.tiles for line in each.lines)])


def _classes(images: ImageSet, mined: Table, counts: list[ClassCount], below: str) -> Part:
    """A line a class: the first images that it took, then the last."""
    lines = []
    for number in _some(np.arange(len(counts)), CLASSES).tolist():
        of_class = np.flatnonzero(mined["class"] == number)
        worth = ranking.worth(mined["score"][of_class], mined["likeness"][of_class])
        order = of_class[np.lexsort((mined["id"][of_class], -worth))]
        split = min(TILES, -(-len(order) // 2))
        first, last = (
            [Tile(_rows(images, mined["id"][at]), _worth(mined, at)) for at in part]
            for part in (order[:split], order[max(split, len(order) - TILES) :])
        )
        gap = [Tile((), ())] if len(order) > 2 * TILES else []
        tiles = [*first, *gap, *last]
        note = f"{counts[number].mined:,} of {counts[number].wanted:,}"
        lines.append(Line(tiles, counts[number].name, note))
    which = f"{len(lines)} of {len(counts):,} classes" if len(lines) < len(counts) else "each class"
    note = f"For {which}: the first {TILES} images that it took and the last {TILES}. {below}"
    return Part("Mined", note, lines)


def _pair(images: ImageSet, judged: Table, at: int) -> Tile:
    rows = _rows(images, judged["id"][at], judged["nearest"][at])
    return Tile(rows, (f"{judged['similarity'][at]:.4f} {judged['alignment'][at]}",))


def _scored(images: ImageSet, judged: Table, at: int, counts: list[ClassCount]) -> Tile:
    return Tile(_rows(images, judged["id"][at]), (*_worth(judged, at), counts[judged["class"][at]].name))


def _worth(table: Table, at: int) -> tuple[str, ...]:
    """What stands below an image; its likeness where there is one, which is nowhere or nearly everywhere."""
    score, likeness = table["score"][at], table["likeness"][at]
    return f"{score:.4f}", *([f"× {np.exp(likeness):.3g}"] if likeness else [])


def _rows(images: ImageSet, *ids: int) -> tuple[int, ...]:
    return tuple(images.row_of(np.array(ids, np.uint64)).tolist())


def _some(places: np.ndarray, most: int) -> np.ndarray:
    """Choose evenly, the first and the last among them."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).round().astype(int)]
