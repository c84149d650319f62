"""Charts of the report as inline SVG: plain data in, markup out.

Colours are classes and variables of the report's style sheet, so that a chart follows light and dark. ElementTree
escapes whatever text it is given, a class name included.
"""

import math
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from pipeline.core.evaluation.metrics import Reliability

LONGEST_NAME = 18  # characters of a class name that a chart shows; the whole name is in the tooltip


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `most` steps at the most."""
    if high - low < 1e-9:  # an axis needs a length, also where all figures are the same
        room = 0.1 * max(abs(low), 1e-6) if low else 0.1  # more than the rounding below
        low, high = low - room, high + room
    return [round(float(value), 10) for value in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def shorten(name: str) -> str:
    """Cut a long class name."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def percent(share: float, decimals: int = 1) -> str:
    """Write a share as a percentage; one that is short of 100 % is never rounded up to it."""
    value = round(share * 100, decimals)
    return f"{100 - 10**-decimals if value == 100 and share < 1 else value:.{decimals}f}"


def _svg(width: float, height: float, label: str, name: str) -> ElementTree.Element:
    box = f"0 0 {width:g} {height:g}"
    return ElementTree.Element("svg", {"viewBox": box, "role": "img", "aria-label": label, "class": name})


def _add(parent: ElementTree.Element, tag: str, text: str = "", **attributes: float | str) -> ElementTree.Element:
    """Add an element; `class_` is class, `text_anchor` is text-anchor, and numbers keep two decimals."""
    written = {
        key.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
        for key, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, written)
    element.text = text or None
    return element


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False))


def reliability(diagram: Reliability, label: str) -> Markup:
    """Draw accuracy over confidence: points on the dashed line are honest; columns say where the images are."""
    side, left, top = 210, 38, 8
    svg = _svg(left + side + 14, top + side + 40, f"Reliability of {label}", "reliability")
    for value in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + side * value, top + side * (1 - value)
        _add(svg, "line", x1=left, x2=left + side, y1=y, y2=y, class_="grid")
        _add(svg, "text", f"{value * 100:.0f}", x=left - 6, y=y + 4, text_anchor="end")
        _add(svg, "text", f"{value * 100:.0f}", x=x, y=top + side + 16, text_anchor="middle")
    _add(svg, "text", "confidence, %", x=left + side / 2, y=top + side + 34, text_anchor="middle")
    centre = f"rotate(-90 10 {top + side / 2:g})"
    _add(svg, "text", "accuracy, %", x=10, y=top + side / 2, transform=centre, text_anchor="middle")
    shares = diagram.count / max(1, diagram.count.sum())
    width = side / len(shares)
    drawn = max(width - 2, width / 2)  # a gap of 2 between columns, less where there are many
    for at in np.flatnonzero(diagram.count):
        x, height = left + (at + 0.5) * width - drawn / 2, side * shares[at]
        _add(svg, "rect", x=x, y=top + side - height, width=drawn, height=height, class_="mass")
    _add(svg, "line", x1=left, y1=top + side, x2=left + side, y2=top, class_="diagonal")
    filled = [
        (left + side * diagram.confidence[at], top + side * (1 - diagram.accuracy[at]), at)
        for at in np.flatnonzero(diagram.count)
    ]
    _add(svg, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in filled), class_="line")
    for x, y, at in filled:
        point = _add(svg, "circle", cx=x, cy=y, r=2.5 + 4 * math.sqrt(shares[at]), class_="point")
        told = f"confidence {percent(diagram.confidence[at])} %, accuracy {percent(diagram.accuracy[at])} %"
        _add(point, "title", f"{told}, {diagram.count[at]} images")
    return _markup(svg)


def curve(points: list[tuple[float, float]], low: float, high: float, unit: str, label: str) -> Markup:
    """Draw a figure over epochs.

    Args:
        points: (epoch, figure), by epoch.
        low, high: of the vertical axis.
        unit: "%" multiplies by 100.
        label: what it is.
    """
    marks = [mark for mark in ticks(low, high, 3) if unit != "%" or mark <= 1]
    texts = [f"{value * (100 if unit == '%' else 1):g}" for value in marks]
    width, height, top = 240, 96, 10
    left = 38 + 7 * max(0, *(len(text) - 5 for text in texts))  # room for the longest
    svg = _svg(left + width + 10, top + height + 24, label, "curve")
    low, high = marks[0], marks[-1]
    last = max(points[-1][0], 2)
    place = [(left + width * (x - 1) / (last - 1), top + height * (high - y) / (high - low)) for x, y in points]
    for value, text in zip(marks, texts, strict=True):
        y = top + height * (high - value) / (high - low)
        _add(svg, "line", x1=left, x2=left + width, y1=y, y2=y, class_="grid")
        _add(svg, "text", text, x=left - 6, y=y + 4, text_anchor="end")
    for epoch in sorted({1, int(points[-1][0])}):
        x = left + width * (epoch - 1) / (last - 1)
        _add(svg, "text", f"{epoch}", x=x, y=top + height + 16, text_anchor="middle")
    _add(svg, "text", "epoch", x=left + width / 2, y=top + height + 16, text_anchor="middle")
    _add(svg, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in place), class_="line")
    for (x, y), (epoch, figure) in zip(place, points, strict=True):
        end = epoch == points[-1][0]
        point = _add(svg, "circle", cx=x, cy=y, r=3.5 if end else 5, class_="point" if end else "hover")
        shown = f"{percent(figure, 2)} %" if unit == "%" else f"{figure:.4g}"
        _add(point, "title", f"epoch {epoch:g}: {shown}")
    return _markup(svg)


def heatmap(matrix: np.ndarray, classes: tuple[str, ...]) -> Markup:
    """Draw a confusion matrix: a row a label, a column an answer; a colour says which share of the row it is."""
    count = len(classes)
    cell = max(9.0, min(40.0, 860 / count))
    size = min(12.0, max(7.0, cell * 0.8))
    margin = max(len(shorten(name)) for name in classes) * size * 0.62 + 12
    upright = all(len(name) * size * 0.62 < cell for name in classes)
    head = size + 8 if upright else margin
    width = margin + cell * count + 2
    svg = _svg(width, head + cell * count + 2, "Confusion matrix", "heatmap")
    # It may shrink a little on a narrow screen; beyond, it scrolls rather than lose its names.
    svg.set("style", f"width:{width:.0f}px;min-width:{0.7 * width:.0f}px;font-size:{size:g}px")
    _add(svg, "rect", x=margin, y=head, width=cell * count, height=cell * count, class_="field")
    for at, name in enumerate(classes):
        middle = (at + 0.5) * cell
        row = _add(svg, "text", shorten(name), x=margin - 6, y=head + middle + size * 0.35, text_anchor="end")
        x, y = margin + middle + (0 if upright else size * 0.35), head - 6
        column = _add(svg, "text", shorten(name), x=x, y=y, text_anchor="middle" if upright else "start")
        if not upright:
            column.set("transform", f"rotate(-90 {x:.2f} {y:.2f})")
        for text in (row, column):
            _add(text, "title", name)
    totals = matrix.sum(axis=1)
    for row_at, column_at in np.argwhere(matrix):
        images = int(matrix[row_at, column_at])
        share, right = images / totals[row_at], row_at == column_at
        opacity = share if right else 0.5 + 0.5 * math.sqrt(share)  # one wrong image of many must be seen too
        x, y = margin + column_at * cell, head + row_at * cell
        group = _add(svg, "g", class_="right" if right else "wrong")
        box = {"x": x + 0.5, "y": y + 0.5, "width": cell - 1, "height": cell - 1, "rx": min(3.0, cell / 6)}
        _add(group, "rect", fill_opacity=opacity, **box)
        if cell >= 20:
            strong = "strong" if opacity > 0.55 else "weak"
            where = {"x": x + cell / 2, "y": y + cell / 2 + size * 0.35}
            _add(group, "text", f"{images}", text_anchor="middle", class_=strong, **where)
        told = f"{classes[row_at]} answered as {classes[column_at]}: {images} of {totals[row_at]}"
        _add(group, "title", told)
    return _markup(svg)
