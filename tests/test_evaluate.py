"""Tests of stage evaluate: five toy networks and 24 small images, against what one computes image by image."""

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix, log_loss

from pipeline import evaluate, prepare
from pipeline.core import networks, params
from pipeline.core.data import views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.evaluation import metrics, outcome
from pipeline.core.intake import image_shards
from pipeline.core.intake.refusals import Refusal
from pipeline.core.sections import Params

CLASSES = ["ant", "bee", "cow", "<i>dog</i>", "eel, grey", "fox"]
REFUSED = ("train", "half.png", "truncated", "")
RESOLUTIONS = {"teacher": 24, "baseline": 16, "distill": 16, "finetune": 16, "fixres": 24}
PROJECT = Path(__file__).parents[1]


def settings(**changes) -> Params:
    """The project's settings, quick and on the CPU."""
    quick = {"machine.device": "cpu", "machine.workers": 0, "evaluate.speed_seconds": 1e-6, "evaluate.batch_size": 10}
    data = yaml.safe_load((PROJECT / "params.yaml").read_text())
    return params.check(params.with_changes(data, quick | changes))


def write_images(folder: Path, test: int, near_copies: int = 0) -> None:
    """Prepare noisy images, a colour a class: two labelled ones each, `test` for test, and three without a label.

    The first `near_copies` test images are labelled ones, mirrored.
    """
    random = np.random.default_rng(0)
    samples, contents, drawn = [], {}, []
    splits = [*["labelled"] * 2 * len(CLASSES), *["test"] * test, *["unlabelled"] * 3]
    for at, split in enumerate(splits):
        label = at % len(CLASSES)
        pixels = random.integers(0, 120, (20, 24, 3)) + 20 * label
        buffer = io.BytesIO()
        if 0 <= at - 2 * len(CLASSES) < near_copies:
            pixels = drawn[at - 2 * len(CLASSES)][:, ::-1]
        drawn.append(pixels)
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        encoded = buffer.getvalue()
        sha256 = hashlib.sha256(encoded).hexdigest()
        told = -1 if split == "unlabelled" else label
        samples.append(image_shards.Sample(sha256, len(encoded), 24, 20, split, told, -1, f"{split}/{at}.png"))
        contents[sha256] = encoded
    (folder / "images").mkdir(parents=True)
    give = lambda given: [(each, contents[each.sha256]) for each in given]  # noqa: E731
    digests, refused = image_shards.write(folder / "images", samples, CLASSES, 10**6, give), [Refusal(*REFUSED)]
    summary = prepare.summarise(samples, CLASSES, {"train": 9}, refused, digests)
    (folder / "summary.json").write_text(json.dumps(summary))


def write_network(name: str, classes: list[str] = CLASSES) -> None:
    """Make a network of random weights whose classifier is fitted to the labelled images: it is often right."""
    seed, images = list(RESOLUTIONS).index(name), ImageSet(Path("data/prepare/images/known"))
    classifier = networks.build("test_resnet", len(classes), seed).eval()
    rows = images.rows("labelled")
    rendered = [views.render_test(images.image(row), RESOLUTIONS[name], 1.0).copy() for row in rows]
    with torch.no_grad():
        features = classifier.embed(torch.from_numpy(np.stack(rendered)))[1]  # (2 C, D)
        wanted = torch.eye(len(CLASSES))[images.labels[rows]][:, : len(classes)] * 6
        head = classifier.network.get_classifier()
        head.weight.copy_(torch.linalg.lstsq(features, wanted).solution.T)
        head.bias.zero_()
    card = {"model": "test_resnet", "classes": classes, "resolution": RESOLUTIONS[name]}
    networks.save(Path("data") / name, classifier, card)
    (Path("data") / name / "history.csv").write_text("epoch,train_loss,lr,val_top1\n1,1.5,0.1,0.5\n2,1.0,0.0,0.75\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project folder in which evaluate has run."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evaluate, "speed", lambda classifier, pixels, seconds: 100.0)
        write_images(Path("data/prepare"), test=24)
        for name in RESOLUTIONS:
            write_network(name)
        evaluate.run(settings())
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "speed", lambda classifier, pixels, seconds: 100.0)
    return tmp_path


@pytest.fixture(scope="module")
def asked(made):
    """What each network says to each test image, asked one image at a time: (N, C) logits."""
    images = ImageSet(made / "data/prepare/images/known")
    said = {}
    for name, resolution in RESOLUTIONS.items():
        classifier, _ = networks.load(made / "data" / name)
        rendered = [views.render_test(images.image(row), resolution, 1.0).copy() for row in images.rows("test")]
        with torch.inference_mode():
            said[name] = np.concatenate([classifier(torch.from_numpy(pixels)[None]).numpy() for pixels in rendered])
    return said, images.labels[images.rows("test")], images


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_metrics_are_those_of_answers_given_one_image_at_a_time(made, asked):
    said, labels, _ = asked
    figures = json.loads((made / "data/evaluate/metrics.json").read_text())
    assert (figures["test_images"], figures["near_copies"]) == (24, 0)
    assert figures["student"] == figures["fixres"]
    teacher = said["teacher"].argmax(1)
    for name, logits in said.items():
        right = int((logits.argmax(1) == labels).sum())
        ranks = (logits > logits[np.arange(24), labels][:, None]).sum(1)
        probabilities = torch.from_numpy(logits.astype(np.float64)).softmax(1).numpy()
        found = figures[name]
        assert found["errors"] == 24 - right
        assert found["top1"] == pytest.approx(right / 24, abs=1e-6)
        assert found["top5"] == pytest.approx((ranks < 5).mean(), abs=1e-6)
        assert found["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(6)), abs=1e-4)
        assert found["agreement"] == pytest.approx((logits.argmax(1) == teacher).mean(), abs=1e-6)
        assert found["resolution"] == RESOLUTIONS[name]
        assert found["parameters"] == 373_270
        assert found["macs"] > 0
    assert figures["baseline"]["macs"] < figures["fixres"]["macs"]  # the same network, at fewer pixels
    assert 0 < figures["student"]["errors"] < 24, "the toy networks should be neither right nor wrong throughout"


def test_predictions_are_what_a_fresh_network_says_in_batches_of_any_size(made, asked):
    said, labels, images = asked
    table = pyarrow.parquet.read_table(made / "data/evaluate/predictions.parquet")
    assert np.array_equal(table["id"].to_numpy(), images.ids[images.rows("test")])
    assert np.array_equal(table["label"].to_numpy(), labels)
    for name, logits in said.items():
        assert np.array_equal(table[name].to_numpy(), logits.argmax(1))
        probabilities = torch.from_numpy(logits).softmax(1).amax(1).numpy()
        assert table[f"{name}_probability"].to_numpy() == pytest.approx(probabilities, abs=1e-4)
    recorded = np.stack(table["student_logits"].to_numpy())
    assert recorded.dtype == np.float32
    assert recorded == pytest.approx(said["fixres"], abs=1e-3)
    classifier, _ = networks.load(made / "data/fixres")
    pixels = np.stack([views.render_test(images.image(row), 24, 1.0) for row in images.rows("test")[:7]])
    with torch.inference_mode():
        assert recorded[:7] == pytest.approx(classifier(torch.from_numpy(pixels)).numpy(), abs=1e-3)


def test_tables_say_the_same_as_the_answers(made, asked):
    said, labels, images = asked
    folder = made / "data/evaluate"
    student, confusion = said["fixres"].argmax(1), read_csv(folder / "confusion.csv")
    assert [row["actual"] for row in confusion] == [CLASSES[label] for label in labels]
    assert [row["predicted"] for row in confusion] == [CLASSES[answer] for answer in student]
    matrix = confusion_matrix(labels, student, labels=range(6), normalize="true")
    listed = read_csv(folder / "per_class.csv")
    assert [row["class"] for row in listed] == CLASSES
    assert [int(row["images"]) for row in listed] == np.bincount(labels).tolist() != np.bincount(student).tolist()
    assert [float(row["fixres"]) for row in listed] == pytest.approx(matrix.diagonal(), abs=1e-6)
    bins = read_csv(folder / "reliability.csv")
    for name in RESOLUTIONS:
        mine = [row for row in bins if row["network"] == name]
        assert sum(int(row["count"]) for row in mine) == 24
        right = sum(int(row["count"]) * float(row["accuracy"]) for row in mine)
        assert right == pytest.approx((said[name].argmax(1) == labels).sum(), abs=1e-3)
    errors = read_csv(folder / "errors.csv")
    wrong = images.ids[images.rows("test")][student != labels]
    assert {int(row["id"], 16) for row in errors} == set(wrong.tolist())
    place = {f"{sample:016x}": at for at, sample in enumerate(images.ids[images.rows("test")].tolist())}
    for row in errors:
        at = place[row["id"]]
        assert row["source"] == images.source(images.rows("test")[at])
        assert row["actual"] == CLASSES[labels[at]]
        for name, network in {"student": "fixres", "teacher": "teacher"}.items():
            probabilities = torch.from_numpy(said[network][at]).softmax(0)
            assert row[name] == CLASSES[int(probabilities.argmax())]
            assert float(row[f"{name}_probability"]) == pytest.approx(float(probabilities.max()), abs=1e-4)
    sureness = [float(row["student_probability"]) for row in errors]
    assert sureness == sorted(sureness, reverse=True)


def test_the_report_shows_networks_errors_and_names(made):
    html = (made / "data/evaluate/report.html").read_text(encoding="utf-8")
    errors = read_csv(made / "data/evaluate/errors.csv")
    assert html.count("<img ") == min(len(errors), outcome.MOST_THUMBNAILS)
    assert "&lt;i&gt;dog&lt;/i&gt;" in html
    assert "<i>dog" not in html
    for name in RESOLUTIONS:
        assert json.loads((made / "data" / name / "network.json").read_text())["digest"] in html
    summary = json.loads((made / "data/prepare/summary.json").read_text())
    assert summary["digest"] != summary["known_digest"]
    assert summary["digest"] in html
    assert summary["known_digest"] in html
    assert "truncated" in html


def test_what_dvc_shows_is_top1_and_the_share_of_the_gap(made):
    figures = json.loads((made / "data/evaluate/metrics.json").read_text())
    shown = json.loads((made / "data/evaluate/top1.json").read_text())
    gap = shown.pop("gap_recovered", None)
    assert shown == {name: figures[name]["top1"] for name in RESOLUTIONS}
    if shown["teacher"] > shown["baseline"]:
        closed = (shown["fixres"] - shown["baseline"]) / (shown["teacher"] - shown["baseline"])
        assert gap == pytest.approx(closed, abs=1e-6)
    else:
        assert gap is None


def test_settings_of_crop_bins_and_thumbnails_are_followed(project, monkeypatch):
    given = {}
    monkeypatch.setattr(evaluate.report, "render", lambda **parts: given.update(parts) or "a page")
    monkeypatch.setattr(outcome, "MOST_THUMBNAILS", 2)
    card = json.loads(Path("data/distill/network.json").read_text())
    Path("data/distill/network.json").write_text(json.dumps(card | {"resized_to": 20}))
    evaluate.run(settings(**{"views.test_crop": 0.5, "evaluate.bins": 7}))
    assert json.loads(Path("data/evaluate/metrics.json").read_text())["distill"]["resolution"] == 20
    images, right = ImageSet(Path("data/prepare/images/known")), {}
    rows = images.rows("test")
    for name in ("baseline", "fixres"):
        classifier, _ = networks.load(Path("data") / name)
        rendered = [views.render_test(images.image(row), RESOLUTIONS[name], 0.5).copy() for row in rows]
        with torch.inference_mode():
            right[name] = classifier(torch.from_numpy(np.stack(rendered))).argmax(1).numpy() == images.labels[rows]
    assert given["paired"] == metrics.paired(right["fixres"], right["baseline"])
    assert {len(diagram.count) for diagram in given["diagrams"].values()} == {7}
    errors = read_csv(Path("data/evaluate/errors.csv"))
    assert len(errors) > 2
    surest = [images.image(images.row_of([int(error["id"], 16)])[0]) for error in errors[:2]]
    assert given["thumbnails"] == [evaluate.report.thumbnail(image) for image in surest]


def test_a_second_run_writes_the_same_bytes(project):
    before = {file.name: file.read_bytes() for file in (project / "data/evaluate").iterdir()}
    evaluate.run(settings())
    assert {file.name: file.read_bytes() for file in (project / "data/evaluate").iterdir()} == before
    assert set(before) == {
        "confusion.csv",
        "errors.csv",
        "metrics.json",
        "near_copies.csv",
        "per_class.csv",
        "predictions.parquet",
        "reliability.csv",
        "report.html",
        "speed.json",
        "top1.json",
    }


def test_test_images_that_are_near_copies_of_labelled_ones_are_told(project, capsys):
    shutil.rmtree("data/prepare")
    write_images(Path("data/prepare"), test=24, near_copies=5)
    evaluate.run(settings())
    said = capsys.readouterr().out
    assert "evaluate: warning: of the 24 test images, 5 are near-copies of labelled images (mine.copy_sim" in said
    folder = project / "data/evaluate"
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["near_copies"] == 5
    pairs = {row["source"]: row["labelled_source"] for row in read_csv(folder / "near_copies.csv")}
    assert pairs == {f"test/{12 + at}.png": f"labelled/{at}.png" for at in range(5)}
    answers = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    images = ImageSet(Path("data/prepare/images/known"))
    expected = [images.source(row) in pairs for row in images.rows("test")]
    assert answers["near_copy"] == expected
    right = np.array(answers["label"]) == np.array(answers["fixres"])
    others = right[~np.array(expected)].mean()
    assert others != figures["student"]["top1"]
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "5 test images are near-copies" in html
    assert f"On the others the student's top‑1 is {100 * others:.2f}&nbsp;%" in html


def test_speed_alone_depends_on_the_clock(project, monkeypatch):
    before = (project / "data/evaluate/metrics.json").read_bytes()
    monkeypatch.setattr(evaluate, "speed", lambda classifier, pixels, seconds: 200.0)
    evaluate.run(settings())
    assert (project / "data/evaluate/metrics.json").read_bytes() == before
    speed = json.loads((project / "data/evaluate/speed.json").read_text())
    assert speed["images_per_second"] == dict.fromkeys([*RESOLUTIONS, "student"], 200.0)
    assert (speed["device"], speed["batch_size"]) == ("cpu", 10)


def test_metrics_do_not_depend_on_the_batch_size(project):
    before = json.loads((project / "data/evaluate/metrics.json").read_text())
    evaluate.run(settings(**{"evaluate.batch_size": 7}))
    after = json.loads((project / "data/evaluate/metrics.json").read_text())
    for name in RESOLUTIONS:
        assert after[name] == pytest.approx(before[name], abs=1e-4)


def test_speed_is_images_over_seconds_of_the_median_batch_without_the_first(monkeypatch):
    seconds, clock = iter([9.0, 0.1, 0.2, 5.0]), [0.0]
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])

    def network(pixels):
        clock[0] += next(seconds)
        return pixels

    assert evaluate.speed(network, torch.zeros(10, 3, 2, 2), 14) == pytest.approx(10 / 0.2)


def test_a_missing_stage_is_named(project):
    shutil.rmtree("data/finetune")
    with pytest.raises(ValueError, match=r"data/finetune.*dvc repro finetune"):
        evaluate.run(settings())
    assert (project / "data/evaluate/metrics.json").exists(), "an error leaves the last result alone"


@pytest.mark.parametrize(
    ("classes", "words"), [(CLASSES[:5], "5 classes.* has 6 classes"), (CLASSES[::-1], "classes of other names")]
)
def test_a_network_of_other_classes_is_refused(project, classes, words):
    write_network("baseline", classes)
    with pytest.raises(ValueError, match=f"data/baseline.*{words}.*dvc repro baseline"):
        evaluate.run(settings())


def test_an_empty_test_split_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("data/prepare"), test=0)
    with pytest.raises(ValueError, match=r"no test image; set prepare\.test"):
        evaluate.run(settings())


def test_a_network_that_answers_nonsense_is_an_error(project):
    classifier, card = networks.load(Path("data/distill"))
    with torch.no_grad():
        classifier.network.get_classifier().bias[0] = float("nan")
    networks.save(Path("data/distill"), classifier, {key: card[key] for key in ("model", "classes", "resolution")})
    with pytest.raises(ValueError, match="not a finite number"):
        evaluate.run(settings())
