"""A contact sheet: images with a few words beneath each, in named rows under headings, as one picture."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, LABEL = 1240, 24, 170  # pixels: the sheet, its border, the column of names
SIDE, GAP, CAPTION = 72, 10, 15  # pixels: a tile, between tiles, a line beneath it
INK, PALE, PAPER, FRAME = "#1b1f24", "#6a7480", "#ffffff", "#d5dae0"


@dataclass(frozen=True)
class Tile:
    """One image, or two to compare side by side; or none, a gap.

    Attributes:
        rows: of the image set.
        captions: lines beneath.
    """

    rows: tuple[int, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """Tiles with a name before them; what does not fit goes on in the next line of the sheet.

    Attributes:
        tiles: from left to right.
        name: of the line; may be empty.
        note: pale, below the name.
    """

    tiles: list[Tile]
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A heading, a sentence that says what is seen, and lines of tiles."""

    title: str
    note: str
    lines: list[Line]


def draw(image: Callable[[int], Image.Image], title: str, parts: list[Part]) -> Image.Image:
    """Draw a sheet; the same images and words give the same pixels.

    Args:
        image: gives the RGB image of a row.
        title: of the sheet.
        parts: from top to bottom.
    """
    marks: list[Callable[[ImageDraw.ImageDraw, Image.Image], object]] = []

    def text(x: float, y: float, words: str, size: int, colour: str = INK, bold: bool = False) -> None:
        marks.append(lambda pen, page: pen.text((x, y), words, colour, _font(size, bold)))

    y = MARGIN
    text(MARGIN, y, title, 22, bold=True)
    y += 40
    for section in parts:
        text(MARGIN, y, section.title, 16, bold=True)
        text(MARGIN, y + 23, section.note, 12, PALE)
        y += 52
        for line in section.lines:
            text(MARGIN, y + 18, shorten(line.name, LABEL - 8, 13), 13)
            text(MARGIN, y + 36, shorten(line.note, LABEL - 8, 11), 11, PALE)
            y = _tiles(image, line, y, marks, text)
        y += 20
    page = Image.new("RGB", (WIDTH, y), PAPER)
    pen = ImageDraw.Draw(page)
    for mark in marks:
        mark(pen, page)
    return page


def _tiles(image: Callable, line: Line, y: int, marks: list[Callable], text: Callable) -> int:
    """Place the tiles of a line from `y` on; give the y of what follows."""
    left = MARGIN + (LABEL if line.name or line.note else 0)
    x, height = left, SIDE + CAPTION * max((len(tile.captions) for tile in line.tiles), default=0) + GAP
    for tile in line.tiles:
        width = (SIDE + 2) * len(tile.rows) - 2 if tile.rows else GAP
        if x + width > WIDTH - MARGIN:
            x, y = left, y + height
        for at, row in enumerate(tile.rows):
            place = (x + at * (SIDE + 2), y)
            marks.append(lambda pen, page, row=row, place=place: _paste(pen, page, image(row), place))
        for at, words in enumerate(tile.captions):
            text(x, y + SIDE + 2 + at * CAPTION, shorten(words, width + GAP - 3, 11), 11, PALE if at else INK)
        x += width + GAP
    return y + height


def _paste(pen: ImageDraw.ImageDraw, page: Image.Image, image: Image.Image, place: tuple[int, int]) -> None:
    """Paste an image, whole, into the middle of a framed tile; a small one is enlarged without smoothing."""
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    shown = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS, reducing_gap=3.0)
    page.paste(shown, (place[0] + (SIDE - size[0]) // 2, place[1] + (SIDE - size[1]) // 2))
    pen.rectangle((place[0], place[1], place[0] + SIDE - 1, place[1] + SIDE - 1), outline=FRAME)


def shorten(words: str, width: float, size: int) -> str:
    """Cut words that are wider than so many pixels."""
    if _font(size, False).getlength(words) <= width:
        return words
    while words and _font(size, False).getlength(words + "…") > width:
        words = words[:-1]
    return words.rstrip() + "…"


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Matplotlib's own DejaVu Sans: the same on every machine, with Latin, Greek and Cyrillic letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / name, size)
