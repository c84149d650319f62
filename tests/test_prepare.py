"""Stage prepare: what becomes of good and bad files, from folders, archives, lists and torchvision's layouts."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_images import encode, picture, png, png_bomb, several, with_flipped_bit, zero_filled
from PIL import Image
from prepare_kit import (
    NEVER,
    ODD,
    SETTINGS,
    SPLITS,
    files_of,
    good,
    hash_of,
    prepared,
    read_manifest,
    with_splits,
    write,
)

from pipeline import prepare
from pipeline.core.data.dataset import ImageSet

ROOT = Path(__file__).parents[1]
DATA = ROOT / os.environ.get("SSLD_TEST_DATA", "../shared/data")
# --- bad files -------------------------------------------------------------------------------------------------------

JPEG = encode(picture(1, 60, 80), "JPEG")
BAD = {  # name: content, the reason for refusing it
    "train/a/empty.png": (b"", "zero bytes"),
    "train/b/empty too.jpg": (b"", "zero bytes"),
    "train/a/cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "train/a/zeros.jpg": (zero_filled(encode(picture(2, 60, 80), "JPEG")), "truncated"),
    "train/a/cut.png": (png(3)[:900], "truncated"),
    "train/a/text.jpg": (b"this is a text", "not an image"),
    "train/a/README.txt": (b"about these images", "not an image"),
    "train/b/README.txt": (b"about these images", "not an image"),
    "train/README.md": (b"about all of this", "not an image"),
    "train/loose.png": (png(4), "no class"),
    "train/a/bomb.png": (png_bomb(), "too many pixels"),
    "train/a/large.png": (encode(Image.new("L", (1001, 1000)), "PNG"), "too many pixels"),
    "train/a/checksum.png": (with_flipped_bit(png(5), 500), "unreadable"),
    "train/a/cut.bmp": (encode(picture(6), "BMP")[:-200], "truncated"),
    "train/a/cut.gif": (several("GIF", 7)[:1200], "truncated"),
    "train/a/cut.webp": (encode(picture(8), "WEBP")[:-30], "truncated"),
    "train/a/phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "unreadable"),
    "train/a/float.tiff": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unreadable"),
    "train/a/page.pdf": (encode(picture(9), "PDF"), "not an image"),
    "train/a/zz copy.png": (png(1000 * ord("a")), "duplicate"),
    "train/a/of test.png": (png(hash_of("test", "a", 0)), "duplicate"),
    "val/a/of test.png": (png(hash_of("test", "a", 1)), "duplicate"),
    "train/a/both.png": (png(10), "two labels"),
    "train/b/both.png": (png(10), "two labels"),
    "train/a/in test.png": (png(11), "two labels"),
    "test/b/in train.png": (png(11), "two labels"),
    "pool/of train.png": (png(1000 * ord("b") + 1), "duplicate"),
    "pool/of val.png": (png(hash_of("val", "b", 2)), "duplicate"),
    "pool/twice.png": (png(90_000), "duplicate"),
    "pool/a/empty.png": (b"", "zero bytes"),
    "train/.hidden/x.png": (png(80), "hidden"),
    "train/a/.x.png": (png(82), "hidden"),
    "pool/.cache/x.PNG": (png(81), "hidden"),
}
IGNORED = {
    "train/a/.DS_Store": b"\0\0\0\1Bud1",
    "train/__MACOSX/a/._00.png": b"\0\5\x16\7",
    "pool/.cache/settings": b"1",
    "pool/._of train.png": b"\0\5\x16\7",
}
FRAMES = {"animated.gif", "animated.webp", "animated.png", "pages.tiff", "two eyes.jpg"}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    write(root, with_splits() | ODD | IGNORED | {name: content for name, (content, _) in BAD.items()})
    (root / "train/a/gone.png").symlink_to(root / "nowhere.png")
    (root / "train/b/linked.png").symlink_to(root / "pool/linked.png")
    (root / "train/a/itself.png").symlink_to("itself.png")
    (root / "train/a/folder.png").mkdir()
    os.mkfifo(root / "train/a/pipe.png")
    return root


LINKED = {
    "train/a/gone.png": "unreadable",
    "train/a/itself.png": "unreadable",
    "train/b/linked.png": "unreadable",
    "train/a/folder.png": "not an image",
    "train/a/pipe.png": "not an image",
}


def test_every_bad_file_is_listed_and_every_other_file_is_there(bad_folder, tmp_path):
    images, refused = prepared(tmp_path / "out", bad_folder, **SPLITS, **NEVER)
    wanted = {(name, reason) for name, (_, reason) in BAD.items()} | set(LINKED.items())
    listed = {(file, reason) for file, _, reason in refused}
    assert listed == wanted | {(f"train/a/{name}", "further frames") for name in FRAMES}
    assert len(refused) == len(listed)  # nothing twice
    assert {source for file, source, _ in refused if file.startswith("pool")} == {"unlabelled"}
    kept = {name.replace("\n", "\\n"): content for name, content in (with_splits() | ODD).items()}
    assert {images.source(row) for row in range(len(images))} == set(kept)
    for row in range(len(images)):  # and none stands for another
        assert images.encoded(row) == kept[images.source(row)]
        assert images.image(row).mode == "RGB"


def test_sizes_in_the_manifest_are_those_of_the_upright_images(bad_folder, tmp_path):
    images, _ = prepared(tmp_path / "out", bad_folder, **SPLITS, **NEVER)
    rows = read_manifest(tmp_path / "out/images").to_pylist()
    for number, row in enumerate(rows):
        assert images.image(number).size == (row["width"], row["height"])
        assert row["sha256"] == hashlib.sha256(images.encoded(number)).hexdigest()
    assert {row["source"]: row["width"] for row in rows}["train/a/turned.jpg"] == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_listed(tmp_path):
    root = write(tmp_path / "in", good())
    (root / "train/a/00.png").chmod(0)
    _, refused = prepared(tmp_path / "out", root)
    assert refused == [("train/a/00.png", "train", "unreadable")]


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    root = write(tmp_path / "in", good())
    with (root / "train/a/huge.png").open("wb") as file:
        file.truncate(10**11)  # it takes no space on the disk
    _, refused = prepared(tmp_path / "out", root)
    assert refused == [("train/a/huge.png", "train", "too many bytes")]


def test_the_same_images_give_the_same_bytes(tmp_path):
    root = write(tmp_path / "in", with_splits() | ODD)
    prepared(tmp_path / "1", root, **SPLITS)
    prepared(tmp_path / "2", root, **SPLITS)
    assert sorted(files_of(tmp_path / "1")) == [
        "images/classes.json",
        "images/known/classes.json",
        "images/known/images-00000.tar",
        "images/known/manifest.arrow",
        "images/manifest.arrow",
        "images/pool/images-00000.tar",
        "refused.csv",
        "summary.json",
    ]
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_a_finished_run_keeps_what_it_decoded_and_not_what_it_encoded(tmp_path, monkeypatch):
    write(tmp_path / "in", with_splits())
    done = stage(tmp_path, labelled_root="in", unlabelled_root="in", **SPLITS, max_side=16, jpeg_quality=90)
    assert done.returncode == 0, done.stderr
    assert {path.name[:9] for path in (tmp_path / ".scratch/prepare").iterdir()} == {"lock", "examined-"}


def test_more_labels_leave_the_shards_as_they_are(tmp_path):
    root = write(tmp_path / "in", with_splits())
    folders = tmp_path / "few", tmp_path / "more"
    few, _ = prepared(folders[0], root, **SPLITS, labels_per_class=2)
    more, _ = prepared(folders[1], root, **SPLITS, labels_per_class=5)
    shards = [{name: files[name] for name in files if name.endswith(".tar")} for files in map(files_of, folders)]
    assert len(shards[0]) == 2
    assert shards[0] == shards[1]
    assert few.digest != more.digest
    assert set(few.ids[few.rows("labelled")]) < set(more.ids[more.rows("labelled")])


# --- errors ----------------------------------------------------------------------------------------------------------


def fails(tmp_path: Path, words: str, files: dict[str, bytes], **changes: object) -> None:
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "out", write(tmp_path / "in", files), **changes)


def test_too_much_refused_stops_with_counts(tmp_path):
    bad = {f"train/a/bad{at}.png": b"" for at in range(5)} | {"train/b/t.txt": b"text"}
    fails(
        tmp_path,
        r"prepare\.train: 6 of 30 .*zero bytes 5, not an image 1.*max_refused_share",
        good() | bad,
        max_refused_share=0.19,
    )
    prepared(tmp_path / "again", tmp_path / "in", max_refused_share=0.2)


def test_a_class_without_images(tmp_path):
    (tmp_path / "in/train/lonely").mkdir(parents=True)
    fails(tmp_path, "'lonely' has no file", good())


def test_a_class_of_bad_images_only(tmp_path):
    fails(tmp_path, "'c' is left without an image.*zero bytes 1", good() | {"train/c/x.png": b""})


def test_classes_that_do_not_fit_together(tmp_path):
    fails(tmp_path, r"prepare\.val.*'zebra' is not in train", good() | {"val/zebra/x.png": png(1)}, val="val")


def test_one_class_is_none(tmp_path):
    fails(
        tmp_path, "at least 2 are needed.*one folder further down", {f"x/{k}": v for k, v in good().items()}, train="x"
    )


def test_nothing_to_test_on(tmp_path):
    fails(tmp_path, r"prepare\.test: no image is left.*fewer than 3", good(2) | {"val/a/0.png": png(1)}, val="val")


# --- at the stage's door, and on real images -------------------------------------------------------------------------


def stage(folder: Path, data: dict | None = None, **changes: object) -> subprocess.CompletedProcess:
    data = data or yaml.safe_load((ROOT / "params.yaml").read_text())
    data |= {"seed": 0, "prepare": SETTINGS | changes}
    write(folder, {"params.yaml": yaml.safe_dump(data).encode()})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.prepare"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stage_stops_in_one_line_and_leaves_the_list(tmp_path):
    write(tmp_path / "in", good(4) | {f"train/a/bad{at}.png": b"" for at in range(5)})
    done = stage(tmp_path, labelled_root="in")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("prepare: error: prepare.train: 5 of 13 files were refused (zero bytes 5, such as train/a/")
    assert ".scratch/prepare/refused.csv" in last
    assert "Traceback" not in done.stderr
    assert (tmp_path / ".scratch/prepare/refused.csv").read_text().count("zero bytes") == 5
    assert not (tmp_path / "data/prepare").exists()
    done = stage(tmp_path, labelled_root="in", max_refused_share=0.5)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/prepare/refused.csv").read_text().count("zero bytes") == 5
    assert not (tmp_path / ".scratch/prepare/refused.csv").exists()


def test_a_class_without_test_images_is_named(tmp_path):
    files = good(4) | {"test/b/0.png": png(900)}
    write(tmp_path / "in", files)
    done = stage(tmp_path, labelled_root="in", test="test")
    assert done.returncode == 0, done.stderr
    assert "prepare: warning: no test image of class 'a': nothing will be known of it there\n" in done.stdout
    assert "no val image" not in done.stdout


def test_too_few_images_for_likeness_are_told_before_the_teacher_is_fitted(tmp_path):
    write(tmp_path / "in", with_splits())
    for pool, rank_by in (("pool", "likeness"), (None, "likeness"), ("pool", "probability")):
        data = yaml.safe_load((ROOT / "params.yaml").read_text())
        data["mine"]["rank_by"] = rank_by
        chosen = {"labelled_root": "in", "unlabelled_root": "in", **SPLITS, "unlabelled": pool}
        done = stage(tmp_path, data, **chosen)
        assert done.returncode == 0, done.stderr
        few = "there are 8 pool and 6 validation images, and mine.rank_by: likeness takes 10 of each" in done.stdout
        assert few == (pool == "pool" and rank_by == "likeness")
        assert ("likeness" in done.stdout) == few


@pytest.mark.skipif(not (DATA / "cifar10.zip").exists(), reason="SSLD_TEST_DATA has no cifar10.zip")
def test_cifar_by_parameters_alone(tmp_path):
    done = stage(
        tmp_path,
        labelled_root=str((DATA / "cifar10.zip").resolve()),
        test="test",
        unlabelled_root=str((DATA / "imagenet_samples.zip").resolve()),
        unlabelled="." if (DATA / "imagenet_samples.zip").exists() else None,
        images_per_class=20,
        labels_per_class=2,
        max_pixels=50_000_000,
    )
    assert done.returncode == 0, done.stderr
    images = ImageSet(tmp_path / "data/prepare/images")
    assert images.classes[:2] == ("airplane", "automobile")
    assert len(images.classes) == 10
    assert len(images.rows("labelled")) == 20
    withheld = (images.withheld >= 0).sum()
    assert 10 <= len(images.rows("val")) < 40
    assert len(images.rows("val")) + withheld == 180
    assert len(images.rows("test")) == 10_000
    assert len(images.rows("unlabelled")) in (withheld, withheld + 250)
    row = images.rows("labelled")[0]
    with zipfile.ZipFile(DATA / "cifar10.zip") as archive:
        assert archive.read(images.source(row)) == images.encoded(row)
    assert images.source(row).split("/")[1] == images.classes[images.labels[row]]


def test_a_file_that_goes_away_before_it_is_stored_is_named(tmp_path, monkeypatch):
    root, read_again = write(tmp_path / "in", with_splits()), prepare.read_again

    def later(found, samples):
        next(root.glob("train/a/*.png")).unlink()
        return read_again(found, samples)

    monkeypatch.setattr(prepare, "read_again", later)
    with pytest.raises(ValueError, match=r"train/a/.*png: the file went away while it was read; run prepare again"):
        prepared(tmp_path / "out", root, **SPLITS)
