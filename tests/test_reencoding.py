"""Images encoded anew at preparation: smaller, upright, and of the same splits, labels and refusals."""

import hashlib
import io

import numpy as np
import pytest
from images import tiny
from made_images import encode, picture, png, rotated_jpeg
from PIL import Image
from prepare_kit import ODD, SPLITS, prepared, read_manifest, with_splits, write
from pydantic import ValidationError

from pipeline.core import images as decoding
from pipeline.core import params, reencoding

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
    for row, listed in enumerate(read_manifest(tmp_path / "after").to_pylist()):
        content = after.encoded(row)
        assert listed["sha256"] == hashlib.sha256(content).hexdigest()
        assert after.ids[row] == int(listed["sha256"][:16], 16)
        assert decoding.decode(content).size == (listed["width"], listed["height"])
        assert max(listed["width"], listed["height"]) <= 16
    sizes = {row["source"]: (row["width"], row["height"]) for row in read_manifest(tmp_path / "after").to_pylist()}
    assert sizes["train/a/turned too.jpg"] == (11, 16)
    assert sizes["train/a/00.png"] == (16, 11)
    assert not {path.suffix for path in (tmp_path / "after").iterdir()} - {".tar", ".arrow", ".json", ".csv"}


def test_the_same_images_give_the_same_bytes_in_any_order(tmp_path):
    files = with_splits()
    prepared(tmp_path / "1", write(tmp_path / "in", files), **SPLITS, **SMALLER)
    prepared(tmp_path / "2", write(tmp_path / "also", dict(reversed(files.items()))), **SPLITS, **SMALLER)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_files_that_become_the_same_bytes_are_one_image_the_tests(tmp_path):
    same = {
        "train/a/x.bmp": encode(picture(5), "BMP"),
        "test/a/x.png": png(5),
        "pool/x.tiff": encode(picture(5), "TIFF"),
    }
    root = write(tmp_path / "in", with_splits() | same)
    images, refused = prepared(tmp_path / "out", root, **SPLITS, **SMALLER)
    assert refused == [("pool/x.tiff", "unlabelled", "duplicate"), ("train/a/x.bmp", "train", "duplicate")]
    row = [images.source(row) for row in range(len(images))].index("test/a/x.png")
    assert images.splits[row] == "test"
    assert not prepared(tmp_path / "before", root, **SPLITS)[1]


def test_a_side_without_a_quality_is_refused():
    section = tiny().prepare.model_dump()
    assert params.Prepare(**section | SMALLER).max_side == 16
    with pytest.raises(ValidationError, match="max_side needs jpeg_quality"):
        params.Prepare(**section | {"max_side": 16})
