"""The evaluation report: one HTML file that needs nothing else, for people.

`render` is pure: numbers and names in, a page out, the same page for the same input. The `read_*` functions gather
from the stages' folders what it tells of data and training. The page itself is report.html.j2.
"""

import base64
import csv
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image
from scipy.sparse import csr_array

from pipeline.core.evaluation import charts, metrics

TITLES = {  # in the order of the table
    "teacher": "Teacher",
    "baseline": "Baseline",
    "distill": "Distilled",
    "finetune": "Fine-tuned",
    "fixres": "Student",
}
NOTES = {
    "teacher": "whose answers the student learns",
    "baseline": "the student, on labels alone",
    "distill": "the student, on soft labels",
    "finetune": "then on the labelled images only",
    "fixres": "then at a larger resolution: the one that is registered",
}
STUDENT = "fixres"  # the last stage's network is the student that is registered
HIGHEST_IS_BEST = {"top1", "top5", "agreement", "speed"}
LOWEST_IS_BEST = {"errors", "nll", "ece", "parameters", "macs"}
CURVES = {"val_top1": ("validation top-1", "%"), "train_loss": ("training loss", "")}
MOST_CLASSES_DRAWN = 100  # beyond, a heatmap's names cannot be read: the most confused pairs stand for it
MOST_CLASSES_LISTED = 60
MOST_PAIRS = {True: 8, False: 20}  # with a heatmap beside them, without
LONG_PART = 6  # figures: a part of a summary that has more (one a class, say) is folded up
MOST_NEAR_COPIES = 6  # that pictures are shown of
THUMBNAIL = 112  # pixels of the longer side, at most


class NearCopies(NamedTuple):
    """Test images that are near-copies of labelled ones.

    Attributes:
        top1_without: each network's top-1 on the other test images, None where there are none.
        pairs: rows of near_copies.csv.
        pictures: data URIs of both images of the last, least alike pairs.
    """

    top1_without: dict[str, float | None]
    pairs: list[dict[str, Any]]
    pictures: list[tuple[str, str]]


def thumbnail(image: Image.Image) -> str:
    """Make a PNG of about THUMBNAIL pixels a side, as a data URI; a smaller image shows its pixels."""
    longer = max(image.size)
    if longer > THUMBNAIL:
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    else:
        times = THUMBNAIL // longer
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_history(path: Path) -> list[dict[str, float]]:
    """Read a training history's rows, numbers only; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(handle)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_data(data: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Gather what the report tells of the data: images a split, refusals, and the summaries of mine and cache.

    Args:
        data: where stages write.
        prepared: the summary of prepare.
    """
    return {
        "digest": prepared["digest"],
        "known_digest": prepared["known_digest"],
        "splits": {split: of_split["images"] for split, of_split in prepared["splits"].items()},
        "refused": sorted(prepared["refused"].items(), key=lambda item: (-item[1], item[0])),
        "mine": read_summary(data / "mine" / "summary.json"),
        "cache": read_summary(data / "cache" / "cache.json"),
    }


def read_summary(path: Path) -> dict[str, Any]:
    """Read a stage's summary as (dotted key, value) pairs: `main`, and `parts` of many figures; empty without one."""
    if not path.exists():
        return {}
    main, parts = [], []
    for key, value in json.loads(path.read_text(encoding="utf-8")).items():
        pairs = list(flat(value, key))
        if len(pairs) > LONG_PART:
            parts.append((key, list(flat(value))))
        else:
            main += pairs
    return {"main": main, "parts": parts}


def flat(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested dicts to (dotted key, value as text)."""
    if isinstance(content, dict) and content:
        return [pair for key, value in content.items() for pair in flat(value, f"{prefix}.{key}" if prefix else key)]
    if content == {}:
        return [(prefix, "none")]
    if isinstance(content, bool) or content is None:
        return [(prefix, json.dumps(content))]
    if isinstance(content, int):
        return [(prefix, f"{content:,}")]
    if isinstance(content, list):
        return [(prefix, ", ".join(str(value) for value in content))]
    return [(prefix, f"{content:.6g}" if isinstance(content, float) else str(content))]


def best(networks: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Say which networks are best in each column of the table; none where all are equal.

    The teacher agrees with itself: it does not compete for agreement.
    """
    found = {}
    for column in sorted(HIGHEST_IS_BEST | LOWEST_IS_BEST):
        values = {
            name: network[column] for name, network in networks.items() if (column, name) != ("agreement", "teacher")
        }
        top = (max if column in HIGHEST_IS_BEST else min)(values.values())
        winners = {name for name, value in values.items() if value == top}
        found[column] = winners if len(winners) < len(values) else set()
    return found


def intervals(networks: dict[str, dict[str, Any]], total: int) -> dict[str, Any]:
    """Place each network's top-1 and its 95 % interval on a common axis, in % of the axis' length."""
    ends = {name: metrics.interval(total - network["errors"], total) for name, network in networks.items()}
    marks = charts.ticks(min(low for low, _ in ends.values()), max(high for _, high in ends.values()), 6)
    marks = [mark for mark in marks if mark <= 1]
    first, span = marks[0], marks[-1] - marks[0]

    def place(value: float) -> float:
        return round(100 * (value - first) / span, 3)

    return {
        "ticks": [{"at": place(mark), "text": f"{100 * mark:g}"} for mark in marks],
        "rows": {
            name: {"low": low, "high": high, "from": place(low), "to": place(high), "at": place(networks[name]["top1"])}
            for name, (low, high) in ends.items()
        },
    }


def verdict(networks: dict[str, dict[str, Any]], total: int, paired: tuple[int, int, float]) -> dict[str, Any]:
    """Say in a sentence or two what came of the distillation.

    Args:
        networks: each network's numbers.
        total: test images.
        paired: what `metrics.paired` says of student and baseline.
    """
    student, baseline, teacher = networks[STUDENT], networks["baseline"], networks["teacher"]
    gap = metrics.gap_recovered(student["top1"], baseline["top1"], teacher["top1"])
    only_student, only_baseline, chance = paired
    if gap is None:
        outcome = "The teacher is not ahead of the baseline here, so there is no gap to recover."
    elif gap < 0:
        outcome = "The student is further from the teacher than the baseline is: distillation did not help here."
    elif gap > 1:
        outcome = "It closes more than the whole gap between baseline and teacher."
    elif gap == 1:
        outcome = "It closes the whole gap between baseline and teacher."
    else:
        outcome = f"It closes {whole_percent(gap)} % of the gap between baseline and teacher."
    if student["resolution"] != baseline["resolution"]:
        outcome += f" The student sees {student['resolution']} pixels a side, the baseline {baseline['resolution']}."
    if only_student + only_baseline == 0:
        doubt = "Student and baseline are right on the very same images."
    else:
        doubt = (
            f"Of the test images, {only_student} are answered right by the student alone and {only_baseline} by the "
            f"baseline alone; a split so uneven would come about by chance with probability {_chance(chance)} "
            "(exact McNemar test)."
        )
    return {"gap": gap, "outcome": outcome, "doubt": doubt, "unsure": chance > 0.05}


def whole_percent(share: float) -> int:
    """Round a share to a percentage; what is more than nothing and less than all stays so."""
    value = round(100 * share)
    return min(max(value, 1), 99) if 0 < share < 1 else value


def apart(one: float, other: float) -> tuple[str, str]:
    """Write two shares as percentages, with one decimal or as many as tell them apart; they are kept with six."""
    for decimals in range(1, 5) if one != other else (1,):
        texts = charts.percent(one, decimals), charts.percent(other, decimals)
        if texts[0] != texts[1]:
            break
    return texts


def _chance(p: float) -> str:
    return "below 0.0001" if p < 0.0001 else f"{p:.2g}"


def class_rows(matrices: dict[str, csr_array], classes: tuple[str, ...]) -> dict[str, Any]:
    """List classes with each network's accuracy, the student's worst class first; of many classes only those."""
    accuracy = {name: metrics.class_accuracy(matrix) for name, matrix in matrices.items()}
    images = matrices[STUDENT].sum(axis=1)
    rows = [
        {"name": classes[label], "images": int(images[label])}
        | {name: float(values[label]) for name, values in accuracy.items()}
        for label in np.flatnonzero(images)
    ]
    rows.sort(key=lambda row: row[STUDENT])
    shown = rows if len(rows) <= MOST_CLASSES_LISTED else rows[:MOST_CLASSES_LISTED]
    low = min((row[name] for row in shown for name in ("teacher", "baseline", STUDENT)), default=0.0)
    return {
        "rows": shown,
        "all": len(rows),
        "longest": max((len(row["name"]) for row in shown), default=0),
        "low": math.floor(low * 10 - 1e-9) / 10 if low > 0 else 0.0,
    }


def curves(networks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw each stage's training history; a figure's axis is the same for all stages where it is a share."""
    drawn = []
    found = {
        (name, key): [(row["epoch"], row[key]) for row in network["history"] if key in row and "epoch" in row]
        for name, network in networks.items()
        for key in CURVES
    }
    for name in networks:
        panels = []
        for key, (label, unit) in CURVES.items():
            shared = [key_points for (other, k), key_points in found.items() if k == key and (unit or other == name)]
            figures = [figure for points in shared for _, figure in points]
            if found[name, key]:
                chart = charts.curve(found[name, key], min(figures), max(figures), unit, f"{TITLES[name]}: {label}")
                panels.append({"label": label, "chart": chart, "last": found[name, key][-1][1], "unit": unit})
        if panels:
            last = [row for row in networks[name]["history"] if "epoch" in row][-1]
            drawn.append(
                {"name": name, "epochs": int(last["epoch"]), "images_seen": last.get("images_seen"), "panels": panels}
            )
    return drawn


def _sections(params: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Flatten params.yaml's sections, without how to run (machine) and what comes later (register)."""
    return {
        key: list(flat(value, "" if isinstance(value, dict) else key))
        for key, value in params.items()
        if key not in ("machine", "register")
    }


def render(
    *,
    classes: tuple[str, ...],
    networks: dict[str, dict[str, Any]],
    matrices: dict[str, csr_array],
    diagrams: dict[str, metrics.Reliability],
    paired: tuple[int, int, float],
    errors: list[dict[str, Any]],
    thumbnails: list[str],
    near_copies: NearCopies,
    data: dict[str, Any],
    speed: dict[str, Any],
    params: dict[str, Any],
) -> str:
    """Write the report.

    Args:
        classes: names, by label.
        networks: for each of TITLES: metrics.json's numbers, `model`, `digest`, `kept`, `history`, and `speed`
            (images/s).
        matrices: each network's confusion matrix, (C, C).
        diagrams: each network's reliability diagram.
        paired: what `metrics.paired` says of student and baseline.
        errors: rows of errors.csv, in the order to show them in.
        thumbnails: data URIs of the first of them.
        near_copies: what there is of labelled images among the test images.
        data: what `read_data` gave.
        speed: speed.json's content.
        params: params.yaml's content.
    """
    total, student = int(matrices[STUDENT].sum()), matrices[STUDENT]
    drawable = len(classes) <= MOST_CLASSES_DRAWN
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = charts.percent
    return environment.get_template("report.html.j2").render(
        titles=TITLES,
        notes=NOTES,
        student=STUDENT,
        classes=classes,
        total=total,
        networks=networks,
        best=best(networks),
        intervals=intervals(networks, total),
        verdict=verdict(networks, total, paired),
        reliability={name: charts.reliability(diagram, TITLES[name]) for name, diagram in diagrams.items()},
        heatmap=charts.heatmap(student.toarray(), classes) if drawable else "",
        pairs=[(classes[a], classes[b], n) for a, b, n in metrics.most_confused(student, MOST_PAIRS[drawable])],
        by_class=class_rows(matrices, classes),
        curves=curves(networks),
        errors=errors,
        thumbnails=thumbnails,
        near_copies=near_copies,
        data=data,
        speed=speed,
        params=_sections(params),
        whole_percent=whole_percent,
        apart=apart,
    )
