"""Mining: the best of each class in, what was refused and why, counts that add up, a sheet that shows it."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from images import CLASSES, prepared, tiny
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipeline import mine, prepare
from pipeline.core import teaching
from pipeline.core.data.dataset import ImageSet
from pipeline.core.mining import contact_sheet, ranking, sheet
from pipeline.core.mining.likeness import likeness
from pipeline.core.mining.thumbnails import thumbnails


def take(classes, best, allowed=None, ids=None, per_class=2):
    """Call best_of_each_class with lists: (N, K), or (N,) for one class an image."""
    classes, best = np.array(classes), np.array(best, np.float32)
    if classes.ndim == 1:
        classes, best = classes[:, None], best[:, None]
    allowed = np.ones(classes.shape, bool) if allowed is None else np.array(allowed).reshape(classes.shape)
    ids = np.arange(len(classes), dtype=np.uint64) if ids is None else np.array(ids, np.uint64)
    return ranking.best_of_each_class(classes, best, ids, allowed, per_class)


def test_each_class_takes_its_best_of_what_is_allowed():
    taken = take([0, 0, 0, 0, 1, 1, 2], [0.9, 0.8, 0.7, 0.95, 0.6, 0.4, 0.9], [1, 1, 1, 0, 1, 0, 1])
    assert taken[:, 0].tolist() == [True, True, False, False, True, False, True]


def test_equal_scores_are_decided_by_id_not_by_place():
    assert take([0, 0, 0], [0.9, 0.9, 0.9], ids=[30, 10, 20])[:, 0].tolist() == [False, True, True]


def test_an_image_may_serve_several_classes():
    taken = take([[0, 1], [0, 1], [1, 0]], [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], per_class=2)
    assert taken.tolist() == [[True, True], [True, False], [True, False]]


def test_the_best_classes_are_those_of_the_softmax(monkeypatch):
    monkeypatch.setattr(ranking, "ROWS", 7)  # more than one part
    logits = np.random.default_rng(0).normal(0, 3, (20, 6)).astype(np.float32)
    classes, best = ranking.best_classes(logits, 3)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert (classes == np.argsort(-shares, axis=1)[:, :3]).all()
    assert np.allclose(best, -np.sort(-shares, axis=1)[:, :3], atol=1e-6)
    assert ranking.best_classes(logits, 99)[0].shape == (20, 6)


def test_an_image_is_worth_its_probability_times_its_likeness():
    assert ranking.worth(np.float32([0.5, 0.2]), np.float32([1, -2])) == pytest.approx(
        [np.log(0.5) + 1, np.log(0.2) - 2]
    )
    assert np.isfinite(ranking.worth(np.float32([0.0]), np.float32([1]))).all()


@pytest.fixture
def scored(tmp_path, monkeypatch) -> ImageSet:
    """The shapes, with made-up scores."""
    images = prepared(tmp_path, monkeypatch)
    write_scores(images)
    return images


def write_scores(images):
    rows = np.concatenate([images.rows("unlabelled"), images.rows("val", "test")])
    random = np.random.default_rng(0)
    logits = random.normal(0, 1, (len(rows), 4)).astype(np.float32)
    folder = Path("data/score")
    folder.mkdir()
    np.save(folder / "ids.npy", images.ids[rows])
    np.save(folder / "logits.npy", logits)
    np.save(folder / "embeddings.npy", random.normal(size=(len(rows), 8)).astype(np.float16))
    np.save(folder / "thumbnails.npy", thumbnails(images.image(int(row)) for row in rows))


def tables():
    return [pq.read_table(f"data/mine/{name}.parquet").to_pydict() for name in ("mined", "refused")]


def test_every_pool_image_is_mined_or_refused_for_a_reason(scored, capsys):
    mine.run(tiny(**{"mine.per_class": 3, "mine.min_score": 0.4, "mine.copy_similarity": 0.98}))
    taken, refused = tables()
    assert sorted(taken["id"] + refused["id"]) == scored.ids[scored.rows("unlabelled")].tolist()
    for reason, score, like in zip(refused["reason"], refused["score"], refused["similarity"], strict=True):
        assert reason == ("near-copy" if like >= 0.98 else "low score" if score < 0.4 else "class is full")
    assert set(refused["reason"]) == {"near-copy", "low score", "class is full"}
    assert min(taken["score"]) >= 0.4
    assert teaching.mined_ids(Path("data/mine")).tolist() == sorted(taken["id"])

    counts = json.loads(Path("data/mine/summary.json").read_text())
    assert counts["mined"] == len(taken["id"]) == sum(counts["per_class"].values())
    assert sum(counts["refused"].values()) == len(refused["id"])
    with Path("data/mine/classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    short = [row for row in rows if row["missing"] != "0"]
    assert [int(row["mined"]) for row in rows] == list(counts["per_class"].values())
    assert all(int(row["mined"]) == min(3, int(row["offered"])) for row in rows)
    full = [each for each, reason in zip(refused["class"], refused["reason"], strict=True) if reason == "class is full"]
    for number, row in enumerate(rows):
        scores = [score for score, each in zip(taken["score"], taken["class"], strict=True) if each == number]
        assert int(row["offered"]) == len(scores) + full.count(number)
        assert float(row["lowest_score"]) == pytest.approx(min(scores), abs=5e-5)
    assert 0 < len(short) == counts["classes_short"]
    said = capsys.readouterr().out
    assert all(f"{row['class']} ({row['mined']})" in said for row in short)
    assert "too unsure" not in said
    mine.run(tiny(**{"mine.per_class": 3, "mine.min_score": 0.99}))
    assert "teacher is too unsure of most pool images" in capsys.readouterr().out


def test_images_that_serve_several_classes_are_counted_in_each_and_mined_once(scored):
    mine.run(tiny(**{"mine.per_class": 50, "mine.classes_per_image": 2, "mine.min_score": 0.3}))
    taken, refused = tables()
    assert len(set(taken["id"])) < len(taken["id"])
    assert len(set(zip(taken["id"], taken["class"], strict=True))) == len(taken["id"])
    assert teaching.mined_ids(Path("data/mine")).tolist() == sorted(set(taken["id"]))
    counts = json.loads(Path("data/mine/summary.json").read_text())
    assert counts["mined"] == len(set(taken["id"]))
    assert not set(refused["id"]) & set(taken["id"])


def test_mining_again_gives_the_same_bytes(scored):
    mine.run(tiny())
    first = {file.name: file.read_bytes() for file in Path("data/mine").iterdir()}
    mine.run(tiny())
    assert {file.name: file.read_bytes() for file in Path("data/mine").iterdir()} == first
    assert set(first) == {"mined.parquet", "refused.parquet", "classes.csv", "summary.json", "sheet.png"}


def test_a_pool_without_images_is_mined_in_vain(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    prepare.run(tiny(**{"prepare.unlabelled": None, "prepare.labels_per_class": None}))
    write_scores(ImageSet(Path("data/prepare/images")))
    mine.run(tiny())
    assert len(teaching.mined_ids(Path("data/mine"))) == 0
    assert json.loads(Path("data/mine/summary.json").read_text())["per_class"] == dict.fromkeys(CLASSES, 0)


def test_scores_of_other_images_are_refused(scored):
    ids = np.load("data/score/ids.npy")
    np.save("data/score/ids.npy", ids[::-1])
    with pytest.raises(ValueError, match="the scores are of other images; run `dvc repro score`"):
        mine.run(tiny())
    Path("data/score/ids.npy").unlink()
    with pytest.raises(ValueError, match="no scores here"):
        mine.run(tiny())


def test_ranked_by_probability_each_class_takes_its_surest_images(scored):
    mine.run(tiny(**{"mine.per_class": 4, "mine.rank_by": "probability", "mine.copy_similarity": 1.0}))
    taken, refused = tables()
    assert set(taken["likeness"]) == {0.0}
    for number in range(4):
        of_class = [score for score, at in zip(taken["score"], taken["class"], strict=True) if at == number]
        left = [score for score, at in zip(refused["score"], refused["class"], strict=True) if at == number]
        assert len(of_class) == 4
        assert min(of_class) >= max(left, default=0)


def test_ranked_by_likeness_each_class_takes_what_is_worth_most(scored):
    ids, embeddings = np.load("data/score/ids.npy"), np.load("data/score/embeddings.npy")
    pool, validation = np.isin(ids, scored.ids[scored.rows("unlabelled")]), np.isin(ids, scored.ids[scored.rows("val")])
    expected = dict(zip(ids[pool], likeness(embeddings[pool], embeddings[validation], ids[pool]), strict=True))
    mine.run(tiny(**{"mine.per_class": 4, "mine.copy_similarity": 1.0}))
    worth = []
    for table in tables():
        assert table["likeness"] == pytest.approx([expected[each] for each in table["id"]], abs=1e-6)
        worth.append(np.log(table["score"]) + table["likeness"])
    taken, refused = (np.array(table["class"]) for table in tables())
    for number in range(4):
        assert (taken == number).sum() == 4
        assert worth[0][taken == number].min() >= worth[1][refused == number].max(initial=-np.inf)


def test_a_near_copy_is_named_with_the_image_that_it_copies(scored):
    thumbs, ids = np.load("data/score/thumbnails.npy"), np.load("data/score/ids.npy")
    copied = int(np.flatnonzero(ids == scored.ids[scored.rows("test")][2])[0])
    thumbs[5] = thumbs[copied]
    np.save("data/score/thumbnails.npy", thumbs)
    mine.run(tiny(**{"mine.copy_similarity": 0.9999}))
    refused = tables()[1]
    found = [
        (each, refused["nearest"][at]) for at, each in enumerate(refused["id"]) if refused["similarity"][at] > 0.9999
    ]
    assert (ids[5], ids[copied]) in found


def foreign_pool(foreign: int = 600):
    """Embeddings of a pool (600 images belong, the others differ in some directions) and of validation; ids; truth."""
    random = np.random.default_rng(0)
    shift = np.where(np.arange(32) < 6, 1.0, 0.0)
    pool = random.normal(size=(600 + foreign, 32)) + np.r_[np.zeros(600), np.ones(foreign)][:, None] * shift
    order = random.permutation(len(pool))
    ids = np.sort(random.integers(0, 2**63, len(pool), dtype=np.uint64))
    return pool[order].astype(np.float16), random.normal(size=(300, 32)).astype(np.float16), ids, order < 600


def test_likeness_tells_what_belongs_without_having_been_told():
    pool, validation, ids, belongs = foreign_pool()
    ratio = likeness(pool, validation, ids)
    assert roc_auc_score(belongs, ratio) > 0.93  # 0.96 is the most that the two densities allow
    assert belongs[np.argsort(-ratio)[:300]].mean() > 0.97


def test_likeness_is_the_same_in_parts_and_in_other_units(monkeypatch):
    pool, validation, ids, _ = foreign_pool()
    whole = likeness(pool, validation, ids)
    units = 10.0 ** (np.arange(32) % 5)
    assert np.allclose(likeness(pool * units, validation * units, ids), whole, atol=1e-4)
    monkeypatch.setattr("pipeline.core.mining.likeness.ROWS", 100)
    assert np.allclose(likeness(pool, validation, ids), whole, atol=1e-5)


def test_likeness_does_not_know_the_images_it_was_fitted_to(monkeypatch):
    monkeypatch.setattr("pipeline.core.mining.likeness.STRENGTH", 1.0)  # enough to learn 120 images by heart
    random = np.random.default_rng(0)
    pool, validation = random.normal(size=(2, 120, 32))
    ratio = likeness(pool, validation, random.integers(0, 2**63, 120, dtype=np.uint64))
    assert 0.4 < (ratio > 0).mean() < 0.6  # both sides are alike; in what it was fitted to, it is 0.3


def test_likeness_needs_images_to_learn_from():
    with pytest.raises(ValueError, match="there are 600 pool and 9 validation images"):
        likeness(np.zeros((600, 4)), np.zeros((9, 4)), np.arange(600, dtype=np.uint64))
    with pytest.raises(ValueError, match="there are 9 pool and 600 validation images"):
        likeness(np.zeros((9, 4)), np.zeros((600, 4)), np.arange(9, dtype=np.uint64))


def test_a_sheet_shows_every_tile_inside_the_page():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [contact_sheet.Tile((at % 3,), ("words",)) for at in range(40)]
    page = contact_sheet.draw(
        lambda row: Image.new("RGB", (8, 8), colours[row]),
        "A sheet",
        [contact_sheet.Part("Some", "of them", [contact_sheet.Line(tiles, "a name " * 20)])],
    )
    pixels = np.asarray(page).reshape(-1, 3)
    for at, colour in enumerate(colours):
        count = sum(tile.rows == (at,) for tile in tiles)
        assert (pixels == colour).all(1).sum() == count * (
            contact_sheet.SIDE - 2
        ) ** 2  # a frame of one pixel is drawn over each


def test_below_an_image_stands_what_ranks_it():
    table = {"score": np.array([0.5, 0.5]), "likeness": np.array([0.0, np.log(2)])}
    assert sheet._worth(table, 0) == ("0.5000",)  # ranked by probability, of which alone there is no likeness
    assert sheet._worth(table, 1) == ("0.5000", "× 2")
