"""Images encoded anew at preparation: smaller, upright, and of the same splits, labels and refusals."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import tiny
from made_images import encode, picture, png, rotated_jpeg, several
from PIL import Image
from prepare_kit import ODD, SPLITS, files_of, prepared, read_manifest, with_splits, write
from pydantic import ValidationError

from pipeline.core.data import images as decoding
from pipeline.core.intake import reencoding, sources
from pipeline.core.sections import Prepare

SMALLER = {"max_side": 16, "jpeg_quality": 90}


def photo(width, height):
    """A smooth image, on which JPEG loses little."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize(("size", "wanted"), [((60, 40), (16, 11)), ((40, 60), (11, 16)), ((1600, 2), (16, 1))])
def test_the_longer_side_is_as_long_as_allowed(size, wanted):
    content, *found = reencoding.encode(encode(photo(*size), "PNG"), 16, 90)
    assert tuple(found) == wanted
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", wanted)


def test_no_side_is_longer_than_a_jpeg_file_can_have():
    long = encode(Image.new("L", (2, 70_000)), "PNG")
    for most in (None, 69_000):
        content, *size = reencoding.encode(long, most, 90)
        assert size == [2, 65_500]
        assert decoding.decode(content).size == (2, 65_500)


@pytest.mark.parametrize("quality", [40, 95])
def test_the_bytes_are_those_that_pillow_makes_of_the_smaller_image(quality):
    image = picture(0, 40, 60)
    wanted = encode(image.resize((16, 11), Image.Resampling.BICUBIC), "JPEG", quality=quality)
    assert reencoding.encode(encode(image, "PNG"), 16, quality) == (wanted, 16, 11)


def test_small_images_keep_their_bytes_where_jpeg_takes_more():
    small = encode(photo(12, 16), "JPEG", quality=50)
    assert reencoding.encode(small, 16, 90) == (small, 12, 16)
    large = encode(photo(60, 40), "JPEG", quality=100)
    content, *size = reencoding.encode(large, None, 80)
    assert size == [60, 40]
    assert len(content) < len(large)
    before, after = (np.asarray(decoding.decode(each)).astype(float) for each in (large, content))
    assert np.abs(before - after).mean() < 3


def test_a_turned_image_stays_upright_and_loses_its_metadata():
    exif = Image.Exif()
    exif[0x112] = 6
    turned = encode(photo(60, 40), "JPEG", exif=exif, comment=b"secret")
    content, width, height = reencoding.encode(turned, 30, 95)
    assert (width, height) == (20, 30)
    assert b"Exif" not in content
    assert b"secret" not in content
    upright = decoding.decode(turned).resize((20, 30), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(decoding.decode(content)).astype(float) - np.asarray(upright)).mean() < 5


def test_splits_labels_and_refusals_are_those_of_the_originals(tmp_path):
    files = with_splits() | ODD | {"train/a/turned too.jpg": rotated_jpeg(90), "train/b/broken.jpg": b"\xff\xd8\xff"}
    files |= {"train/a/twice.png": files["train/a/00.png"]}
    root = write(tmp_path / "in", files)
    before, refused = prepared(tmp_path / "before", root, **SPLITS)
    after, also_refused = prepared(tmp_path / "after", root, **SPLITS, **SMALLER)
    assert also_refused == refused
    assert {("train/b/broken.jpg", "train", "truncated"), ("train/a/twice.png", "train", "duplicate")} <= set(refused)
    told = [
        {images.source(row): (images.labels[row], images.splits[row]) for row in range(len(images))}
        for images in (before, after)
    ]
    assert told[0] == told[1]
    rows = read_manifest(tmp_path / "after/images").to_pylist()
    for row, listed in enumerate(rows):
        content = after.encoded(row)
        assert listed["sha256"] == hashlib.sha256(content).hexdigest()
        assert after.ids[row] == int(listed["sha256"][:16], 16)
        assert decoding.decode(content).size == (listed["width"], listed["height"])
        assert max(listed["width"], listed["height"]) <= 16
    sizes = {row["source"]: (row["width"], row["height"]) for row in rows}
    assert sizes["train/a/turned too.jpg"] == (11, 16)
    assert sizes["train/a/00.png"] == (16, 11)
    assert not {Path(name).suffix for name in files_of(tmp_path / "after")} - {".tar", ".arrow", ".json", ".csv"}


def test_the_same_images_give_the_same_bytes_in_any_order(tmp_path):
    files = with_splits()
    prepared(tmp_path / "1", write(tmp_path / "in", files), **SPLITS, **SMALLER)
    prepared(tmp_path / "2", write(tmp_path / "also", dict(reversed(files.items()))), **SPLITS, **SMALLER)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_files_that_become_the_same_bytes_are_one_image_the_tests(tmp_path):
    same = {
        "train/a/x.bmp": encode(picture(5), "BMP"),
        "test/a/x.png": png(5),
        "pool/x.tiff": several("TIFF", 5),  # refused once, not for its further frames as well
    }
    root = write(tmp_path / "in", with_splits() | same)
    images, refused = prepared(tmp_path / "out", root, **SPLITS, **SMALLER)
    assert refused == [("pool/x.tiff", "unlabelled", "duplicate"), ("train/a/x.bmp", "train", "duplicate")]
    row = [images.source(row) for row in range(len(images))].index("test/a/x.png")
    assert images.splits[row] == "test"
    assert prepared(tmp_path / "before", root, **SPLITS)[1] == [("pool/x.tiff", "unlabelled", "further frames")]


@pytest.mark.parametrize(
    ("emptied", "told"),
    [("train/b", "train: class 'b' is left without an image .*duplicate 1"), ("val", "val: no image is left for it")],
)
def test_no_class_and_no_split_is_lost_to_the_same_bytes(tmp_path, emptied, told):
    """The only image of a class in train, or of val, has the pixels of a test image."""
    files = {name: content for name, content in with_splits().items() if not name.startswith(f"{emptied}/")}
    same = {"test/b/x.png": png(5), f"{emptied.split('/')[0]}/b/x.bmp": encode(picture(5), "BMP")}
    root = write(tmp_path / "in", files | same)
    assert not prepared(tmp_path / "as they are", root, **SPLITS)[1]
    with pytest.raises(ValueError, match=told):
        prepared(tmp_path / "out", root, **SPLITS, **SMALLER)


def test_files_that_become_the_same_bytes_under_two_labels_are_refused(tmp_path):
    same = {"train/a/x.png": png(5), "train/b/x.bmp": encode(picture(5), "BMP")}
    also = {"train/a/y.tiff": several("TIFF", 20), "test/b/y.png": several("PNG", 20)}
    pool = {"pool/x.tiff": encode(picture(5), "TIFF")}
    root = write(tmp_path / "in", with_splits() | same | also | pool)
    images, refused = prepared(tmp_path / "out", root, **SPLITS, **SMALLER)
    assert refused == [(name, name.split("/")[0], "two labels") for name in sorted(same | also)]
    assert "a and b" in (tmp_path / "out/refused.csv").read_text()
    assert {images.source(row) for row in range(len(images))} == set(with_splits() | pool)


def test_files_are_read_in_the_order_of_their_sources(tmp_path, monkeypatch):
    """Reading a compressed archive in any other order takes time that grows with the square of its size."""
    read = []

    def listing(*arguments):
        found = sources.open_source(*arguments)

        def noting(file):
            return replace(file, read=lambda: read.append((found.role, file.name)) or file.read())

        return replace(found, files=[noting(file) for file in found.files])

    monkeypatch.setattr("pipeline.core.intake.inputs.open_source", listing)
    prepared(tmp_path / "out", write(tmp_path / "in", with_splits()), **SPLITS, **SMALLER)
    assert len(read) == 2 * len(with_splits())
    assert read[len(read) // 2 :] == read[: len(read) // 2]


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(png(999))])
def test_a_file_that_changes_before_it_is_encoded_is_named(tmp_path, monkeypatch, change):
    root, add = write(tmp_path / "in", with_splits()), reencoding.Reencoded.add

    def later(*arguments):
        change(root / "train/a/00.png")
        return add(*arguments)

    monkeypatch.setattr(reencoding.Reencoded, "add", later)
    with pytest.raises(ValueError, match=r"train/a/00\.png: the file changed while it was read; run prepare again$"):
        prepared(tmp_path / "out", root, **SPLITS, **SMALLER)


def test_members_of_shards_are_named_after_what_they_are(tmp_path):
    kept = {"train/a/small.png": encode(photo(12, 16), "JPEG", quality=50)}
    root = write(tmp_path / "in", with_splits() | ODD | kept)
    for folder, changes in (("before", {}), ("after", SMALLER)):
        images, _ = prepared(tmp_path / folder, root, **SPLITS, **changes)
        files = {images.ids[row]: images.source(row) for row in range(len(images))}
        suffixes = {}
        for shard in (tmp_path / folder).rglob("*.tar"):
            with tarfile.open(shard) as archive:
                suffixes |= {files[int(name[:16], 16)]: name[16:] for name in archive.getnames()}
        own = {name: Path(name).suffix for name in suffixes}
        assert len(suffixes) == len(images)
        if folder == "before":
            assert suffixes == own
        else:
            assert {name: suffixes[name] for name in kept} == dict.fromkeys(kept, ".png"), "its bytes are kept"
            assert {suffix for name, suffix in suffixes.items() if name not in kept} == {".jpg"}


def test_a_side_without_a_quality_is_refused():
    section = tiny().prepare.model_dump()
    assert Prepare(**section | SMALLER).max_side == 16
    with pytest.raises(ValidationError, match="max_side needs jpeg_quality"):
        Prepare(**section | {"max_side": 16})
