"""Tests of the report: it needs nothing from outside, says what the numbers say, and escapes what people named."""

import io
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.core.evaluation import charts, metrics, report

NAMES = list(report.TITLES)


class Page(HTMLParser):
    """Collects a page's elements and attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data):
        self.text += data + " "


def content(classes: tuple[str, ...] = ("cat", "dog", "owl"), images: int = 90, accuracy=None) -> dict:
    """A report's content: networks that answer `images` images at random, right in a given share of cases."""
    random, count = np.random.default_rng(0), len(classes)
    accuracy = accuracy or {"teacher": 0.95, "baseline": 0.7, "distill": 0.85, "finetune": 0.9, "fixres": 0.92}
    labels = np.arange(images) % count
    answers = {}
    for name in NAMES:
        wrong = (labels + 1 + random.integers(0, count - 1, images)) % count
        said = np.where(np.arange(images) < round(accuracy[name] * images), labels, wrong)
        answers[name] = metrics.answers(np.eye(count)[said] * 3 + random.normal(size=(images, count)) * 0.1, labels)
    student = answers["fixres"]
    errors = [
        {"id": f"{at:016x}", "source": f"test/{at}.png", "actual": classes[labels[at]], "teacher_probability": 0.5}
        | {"student": classes[student.predicted[at]], "student_probability": 0.9, "teacher": classes[labels[at]]}
        for at in np.flatnonzero(student.rank)
    ]
    costs = {"parameters": 1_000_000, "macs": 2_000_000_000, "resolution": 32, "model": "m", "digest": "d" * 64}
    history = [
        {"epoch": 1.0, "images_seen": 1024.0, "train_loss": 2.0, "val_top1": 0.5},
        {"epoch": 2.0, "images_seen": 2048.0, "train_loss": 1.0, "val_top1": 0.8},
    ]
    return {
        "classes": classes,
        "networks": {
            name: metrics.summary(each, answers["teacher"], 10)
            | costs
            | {"kept": None, "speed": 100.0, "history": history}
            for name, each in answers.items()
        },
        "matrices": {name: metrics.confusion(labels, each.predicted, count) for name, each in answers.items()},
        "diagrams": {name: metrics.reliability(each.probability, each.rank == 0, 10) for name, each in answers.items()},
        "paired": metrics.paired(student.rank == 0, answers["baseline"].rank == 0),
        "errors": errors,
        "thumbnails": [report.thumbnail(Image.new("RGB", (8, 8))) for _ in errors[:24]],
        "near_copies": report.NearCopies(dict.fromkeys(NAMES, 0.5), [], []),
        "data": {
            "digest": "e" * 64,
            "known_digest": "f" * 64,
            "splits": {"labelled": 10, "unlabelled": 20, "val": 5, "test": images},
            "refused": [("truncated", 3)],
            "mine": {"main": [("mined", "1,234")], "parts": [("per_class", [("cat", "7")])]},
            "cache": {},
        },
        "speed": {"device": "cpu", "threads": 2, "batch_size": 128},
        "params": {"seed": 0, "machine": {"workers": 3}, "distill": {"epochs": 12, "online": False}},
    }


def test_the_page_loads_nothing():
    html = report.render(**content())
    page = Page(html)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "base"}
    loaded = [value for _, key, value in page.attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
    assert loaded
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?://", html)


def test_the_same_input_gives_the_same_bytes():
    assert report.render(**content()) == report.render(**content())


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b"])
def test_what_people_named_is_text(name):
    given = content(classes=(name, "dog", "owl"))
    given["data"]["refused"] = [(name, 1)]
    given["data"]["mine"] = {"main": [(name, name)], "parts": [(name, [(name, "1")])]}
    given["networks"]["fixres"]["model"] = name
    page = Page(report.render(**given))
    assert "script" not in page.tags
    assert page.tags.count("img") == len(given["thumbnails"])
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert name in page.text


def test_it_says_what_the_numbers_say():
    text = " ".join(Page(report.render(**content())).text.split())
    assert "the student makes 7 errors; the same network trained on labels alone makes 27, the teacher 4." in text
    assert "It closes 87 % of the gap" in text  # (27 - 7) / (27 - 4)
    for words in ("truncated 3", "mined 1,234", "labelled 10", "epochs 12"):
        assert words in text
    assert "workers" not in text  # how it was run is not what was computed


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (0.95, 0.9, "more than the whole gap"),
        (0.9, 0.9, "It closes the whole gap"),
        (0.6, 0.9, "did not help"),
        (0.8, 0.7, "not ahead of the baseline"),
    ],
)
def test_the_verdict_is_honest(student, teacher, words):
    accuracy = {"teacher": teacher, "baseline": 0.7, "distill": 0.8, "finetune": 0.8, "fixres": student}
    assert words in report.render(**content(accuracy=accuracy))


@pytest.mark.parametrize(
    ("student", "tile", "words"),
    [
        (0.8992, "99 %", "It closes 99 % of the gap"),  # 99.6 %
        (0.9, "100 %", "It closes the whole gap"),
        (0.9008, "100 %", "It closes more than the whole gap"),
        (0.7008, "1 %", "It closes 1 % of the gap"),
        (0.7, "0 %", "It closes 0 % of the gap"),
        (0.6992, "0 %", "did not help"),
    ],
)
def test_a_gap_is_never_rounded_to_none_or_the_whole(student, tile, words):
    given = content()
    for name, top1 in {"fixres": student, "baseline": 0.7, "teacher": 0.9}.items():
        given["networks"][name]["top1"] = top1
    text = " ".join(Page(report.render(**given)).text.split())
    assert f"Gap recovered {tile} of the way" in text
    assert words in text


@pytest.mark.parametrize(
    ("reached", "before", "because", "words"),
    [
        (0.5, 0.75, "top1", "50.0 % on the validation split, less than the 75.0 % before"),
        (0.98601, 0.98602, "top1", "98.601 % on the validation split, less than the 98.602 % before"),
        (0.999999, 1.0, "top1", "99.9 % on the validation split, less than the 100.0 % before"),
        (
            0.985714,
            0.985714,
            "resolution",
            "98.6 % on the validation split, as much as the network before, which takes fewer pixels",
        ),
        (
            0.985714,
            0.985714,
            "nll",
            "98.6 % on the validation split, as much as the network before, whose NLL is lower",
        ),
    ],
)
def test_it_is_told_why_the_network_before_is_kept(reached, before, because, words):
    given, why = content(), {"val_top1": before, "instead_of": reached, "because": because}
    given["networks"]["fixres"]["kept"] = {"stage": "finetune", **why}
    assert f"{words}: that of finetune is kept" in report.render(**given)


def test_a_network_that_was_kept_before_reasons_were_noted_is_shown():
    given = content()
    given["networks"]["fixres"]["kept"] = {"stage": "finetune", "val_top1": 0.75, "instead_of": 0.5}
    assert "50.0 % on the validation split, less than the 75.0 % before" in report.render(**given)


def test_what_the_networks_were_given_is_told():
    given = content()
    text = " ".join(Page(report.render(**given)).text.split())
    assert text.count("2,048 images seen in 2 epochs") == len(NAMES)
    given["networks"]["teacher"]["history"] = [{"epoch": 1.0, "val_top1": 0.5}]  # of before they were counted
    assert report.render(**given).count("images seen in") == len(NAMES) - 1
    assert "pixels a side" not in text
    given["networks"]["fixres"]["resolution"] = 48
    text = " ".join(Page(report.render(**given)).text.split())
    assert "The student sees 48 pixels a side, the baseline 32." in text


def test_a_small_difference_is_called_one():
    accuracy = dict.fromkeys(NAMES, 0.8) | {"fixres": 0.82, "teacher": 0.9}
    assert "too small to tell them apart" in report.render(**content(accuracy=accuracy))
    accuracy = dict.fromkeys(NAMES, 0.5) | {"fixres": 0.9, "teacher": 0.95}
    assert "too small to tell them apart" not in report.render(**content(accuracy=accuracy))


@pytest.mark.parametrize(("pairs", "words"), [(1, "All of them, the test"), (9, "The least alike, the test")])
def test_near_copies_are_told_with_what_is_left_without_them(pairs, words):
    given = content()
    assert "near-copies of labelled images in test 0" in " ".join(Page(report.render(**given)).text.split())
    rows = [
        {"source": f"test/<i>{at}.png", "labelled_source": f"train/{at}.png", "class": "cat", "labelled_class": "dog"}
        | {"similarity": f"0.99{9 - at}"}
        for at in range(pairs)
    ]
    picture = report.thumbnail(Image.new("RGB", (8, 8)))
    shown = min(pairs, 6)
    rest = {"teacher": 0.9, "baseline": 0.625, "distill": 0.7, "finetune": 0.75, "fixres": 0.8125}
    given["near_copies"] = report.NearCopies(rest, rows, [(picture, picture)] * shown)
    page = Page(report.render(**given))
    text = " ".join(page.text.split())
    assert f"{pairs} test image" in text
    assert "On the others the student's top‑1 is 81.25 %, the baseline's 62.50 %, the teacher's 90.00 %." in text
    assert words in text
    assert ("near_copies.csv" in text) == (pairs > shown)
    assert page.tags.count("img") == len(given["thumbnails"]) + 2 * shown
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("figure", "title") and "<i>" in value]
    assert titles == [f"test/<i>{at}.png and train/{at}.png" for at in range(pairs - shown, pairs)]
    given["near_copies"] = report.NearCopies(dict.fromkeys(NAMES), rows, [])
    assert "On the others" not in Page(report.render(**given)).text


def test_a_student_without_errors_and_networks_without_history_are_shown():
    given = content(accuracy=dict.fromkeys(NAMES, 1.0))
    for network in given["networks"].values():
        network["history"] = []
    html = report.render(**given)
    assert "it answers every test image right" in html
    assert "<h2>Training</h2>" not in html
    assert "100.00&nbsp;%" in html


@pytest.mark.parametrize(("count", "drawn"), [(2, True), (100, True), (101, False)])
def test_a_heatmap_is_drawn_while_its_names_can_be_read(count, drawn):
    html = report.render(**content(classes=tuple(f"class number {i}" for i in range(count)), images=20 * count))
    assert ('class="heatmap"' in html) == drawn
    assert "Most confused" in html


def test_best_in_column_leaves_out_what_is_equal_and_the_teachers_agreement_with_itself():
    networks = content()["networks"]
    best = report.best(networks)
    assert best["top1"] == {"teacher"}
    assert best["errors"] == {"teacher"}
    assert best["parameters"] == set()  # all are equal
    assert "teacher" not in best["agreement"]


def test_intervals_lie_on_the_axis():
    intervals = report.intervals(content()["networks"], 90)
    places = [row[end] for row in intervals["rows"].values() for end in ("from", "at", "to")]
    places += [tick["at"] for tick in intervals["ticks"]]
    assert all(0 <= place <= 100 for place in places)
    assert all(row["from"] <= row["at"] <= row["to"] for row in intervals["rows"].values())


def test_classes_come_worst_first_and_many_are_cut():
    matrices = content(classes=tuple(f"c{i}" for i in range(80)), images=800)["matrices"]
    listed = report.class_rows(matrices, tuple(f"c{i}" for i in range(80)))
    accuracy = [row["fixres"] for row in listed["rows"]]
    assert (len(accuracy), listed["all"]) == (report.MOST_CLASSES_LISTED, 80)
    assert accuracy == sorted(accuracy)


def test_charts_are_xml_whatever_the_names():
    diagram = metrics.reliability(np.array([0.3, 0.9, 0.95]), np.array([True, False, True]), 15)
    matrix = np.array([[3, 1], [0, 0]])
    for chart in (
        charts.reliability(diagram, "<&>"),
        charts.curve([(1.0, 0.5)], 0.5, 0.5, "%", "a > b"),
        charts.curve([(1.0, 2.0), (2.0, 1.0)], 1.0, 2.0, "", "loss"),
        charts.heatmap(matrix, ("<b>", "a very long name & nothing else")),
    ):
        root = ElementTree.fromstring(chart)
        assert root.tag == "svg"
        assert "nan" not in chart.lower()


@pytest.mark.parametrize("figure", [0.0, 2e-10, 1e-6, 0.5, 3e9])
@pytest.mark.parametrize("most", [3, 6])
def test_ticks_of_a_constant_figure_differ(figure, most):
    ticks = charts.ticks(figure, figure, most)
    assert ticks == sorted(set(ticks))
    assert ticks[0] < figure < ticks[-1]
    ElementTree.fromstring(charts.curve([(1, figure)], figure, figure, "", "loss"))


@pytest.mark.parametrize("bins", [1, 15, 105, 1000])
def test_columns_of_many_bins_are_seen_and_lie_within_theirs(bins):
    diagram = metrics.reliability(np.linspace(0, 1, 4 * bins), np.ones(4 * bins, bool), bins)
    root = ElementTree.fromstring(charts.reliability(diagram, "network"))
    columns = [(float(rect.get("x")), float(rect.get("width"))) for rect in root.iter("rect")]
    assert len(columns) == bins
    assert all(width > 0 for _, width in columns)
    ends = [x + width for x, width in columns]
    assert all(end <= begin for end, (begin, _) in zip(ends[:-1], columns[1:], strict=True))


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.00"), (0.99999, "99.99"), (0.996667, "99.67"), (0.5, "50.00"), (0.0, "0.00")]
)
def test_percent_rounds_but_never_up_to_100(share, text):
    assert charts.percent(share, 2) == text


@pytest.mark.parametrize("size", [(8, 8), (1, 300), (640, 480), (112, 112)])
def test_thumbnails_are_small_pngs_that_leave_the_image_alone(size):
    image = Image.new("RGB", size, "red")
    encoded = b64decode(report.thumbnail(image).removeprefix("data:image/png;base64,"))
    small = Image.open(io.BytesIO(encoded))
    assert small.format == "PNG"
    assert report.THUMBNAIL / 2 < max(small.size) <= report.THUMBNAIL
    assert image.size == size


def test_a_history_is_read_as_far_as_it_holds_numbers(tmp_path: Path):
    file = tmp_path / "history.csv"
    assert report.read_history(file) == []
    file.write_text("epoch,train_loss,val_top1,note\n1,0.5,,x\n2,nan,0.25,\n")
    assert report.read_history(file) == [{"epoch": 1.0, "train_loss": 0.5}, {"epoch": 2.0, "val_top1": 0.25}]


def test_a_summary_folds_its_long_parts(tmp_path: Path):
    file = tmp_path / "summary.json"
    assert report.read_summary(file) == {}
    per_class = ", ".join(f'"class.{i}": {i}' for i in range(9))
    file.write_text(f'{{"per_class": {{{per_class}}}, "mined": 1234, "why": {{"copy": 2}}, "rest": 0.25, "ok": true}}')
    summary = report.read_summary(file)
    assert summary["main"] == [("mined", "1,234"), ("why.copy", "2"), ("rest", "0.25"), ("ok", "true")]
    assert [key for key, _ in summary["parts"]] == ["per_class"]
    assert summary["parts"][0][1][3] == ("class.3", "3")


def test_a_summary_of_nothing_says_none():
    assert report.flat({}, "refused") == [("refused", "none")]


def test_a_curves_axis_has_room_for_its_numbers():
    drawn = str(charts.curve([(1.0, 0.034), (2.0, 0.041)], 0.034, 0.041, "", "training loss"))
    ends = {text: float(x) for x, text in re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end"[^>]*>([^<]+)<', drawn)}
    assert max(map(len, ends)) > 5
    assert all(x >= 6.5 * len(text) for text, x in ends.items())
