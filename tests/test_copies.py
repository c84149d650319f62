"""Near-copies: what is done to images that are passed on is seen through, and other images are let be."""

import csv
import io

import numpy as np
import pytest
from images import ROOT
from made_images import photo
from PIL import Image, ImageDraw, ImageEnhance
from scipy.fft import dctn
from sklearn.datasets import load_digits

from pipeline import digits
from pipeline.core import params
from pipeline.core.data.images import decode
from pipeline.core.mining import copies
from pipeline.core.mining.thumbnails import thumbnails

PHOTOGRAPHS = 0.93  # the threshold for them


def jpeg(image):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=30)
    return Image.open(io.BytesIO(out.getvalue()))


def half_and_back(image):
    return image.resize((image.width // 2, image.height // 2)).resize(image.size)


def cropped(image):
    x, y = image.width // 10, image.height // 10
    return image.crop((x, y, image.width - x, image.height - y))


def captioned(image, covers=True, top=False, share=0.15):
    height = round(image.height * share)
    bar = Image.new("RGB", (image.width, height), "black")
    ImageDraw.Draw(bar).rectangle((4, height // 3, image.width // 2, 2 * height // 3), fill="white")
    page = Image.new("RGB", (image.width, image.height + (0 if covers else height)))
    page.paste(image, (0, height if top and not covers else 0))
    page.paste(bar, (0, 0 if top else page.height - height))
    return page


KINDS = {
    "jpeg": jpeg,
    "half and back": half_and_back,
    "cropped": cropped,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored and cropped": lambda image: cropped(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "cropped at the left": lambda image: image.crop((image.width // 10, 0, image.width, image.height)),
    "cropped to a square": lambda image: image.crop(
        (image.width // 12, 0, image.width - image.width // 12, image.height)
    ),
    "caption over": captioned,
    "caption below": lambda image: captioned(image, covers=False),
    "caption over the top": lambda image: captioned(image, top=True),
    "caption above": lambda image: captioned(image, covers=False, top=True, share=0.2),
    "another width": lambda image: image.resize((image.width * 3 // 2, image.height)),
}


@pytest.fixture(scope="module")
def guarded():
    return [photo(seed) for seed in range(30)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["pool", "guarded"])
def test_copies_are_found(guarded, kind, of):
    """Whichever of the two is the copy."""
    pair = thumbnails(map(KINDS[kind], guarded)), thumbnails(guarded)
    found = copies.nearest(*(pair if of == "pool" else pair[::-1]), PHOTOGRAPHS)
    assert (found.similarity >= PHOTOGRAPHS).all()
    assert found.which.tolist() == list(range(30))


def test_the_alignment_says_what_was_done(guarded):
    pool = thumbnails([KINDS["mirrored"](guarded[0]), KINDS["cropped"](guarded[1]), captioned(guarded[2])])
    found = copies.nearest(pool, thumbnails(guarded), PHOTOGRAPHS)
    names = [copies.ALIGNMENTS[number].name for number in found.alignment]
    assert names == ["mirrored", "inner part", "without the bottom"]
    found = copies.nearest(thumbnails(guarded), pool, PHOTOGRAPHS)
    names = [copies.ALIGNMENTS[number].name for number in found.alignment[:2]]
    assert names == ["mirrored", "its inner part"]


def test_other_images_are_no_copies(guarded):
    found = copies.nearest(thumbnails(photo(seed) for seed in range(100, 300)), thumbnails(guarded), PHOTOGRAPHS)
    assert found.similarity.max() < PHOTOGRAPHS - 0.05


def test_neither_more_images_nor_their_order_changes_an_image_s_answer(guarded, monkeypatch):
    pool = thumbnails([*map(cropped, guarded[:5]), *(photo(seed) for seed in range(100, 110))])
    whole = copies.nearest(pool, thumbnails(guarded), PHOTOGRAPHS)
    monkeypatch.setitem(copies.BLOCKS, "cpu", (4, 7))
    order = np.random.default_rng(0).permutation(len(pool))
    mixed = copies.nearest(pool[order], thumbnails(guarded), PHOTOGRAPHS)
    assert np.allclose(mixed.similarity, whole.similarity[order], atol=1e-5)
    assert (mixed.which == whole.which[order]).all()


def test_the_transform_is_a_cosine_transform():
    thumb = thumbnails([photo(3)])[0].astype(float)
    order = np.arange(copies.FREQUENCIES)
    weight = order[:, None] ** 2 + order**2
    # A pixel's integral of a cosine is its middle value times sinc: scipy's transform takes the middle value.
    smooth = np.sinc(order / 2 / 32)
    reference = dctn(thumb, norm="ortho")[:8, :8] / 32 * weight * np.outer(smooth, smooth)
    ours = thumb.ravel() @ copies.transform(copies.WHOLE)
    assert np.allclose(ours, reference.ravel()[1:], rtol=1e-4, atol=1e-3)


def test_a_span_s_transform_is_that_of_the_cropped_image():
    image = photo(4, side=320)
    inner = image.crop((32, 64, 288, 320))
    span = thumbnails([image])[0].ravel() @ copies.transform((0.1, 0.2, 0.9, 1.0))
    own = thumbnails([inner])[0].ravel() @ copies.transform(copies.WHOLE)
    assert np.corrcoef(span, own)[0, 1] > 0.99


def test_images_of_one_colour_and_empty_lists_are_no_copies():
    black, none = thumbnails([Image.new("RGB", (20, 20))]), thumbnails([])
    assert copies.nearest(black, black, PHOTOGRAPHS).similarity.tolist() == [0.0]
    assert copies.nearest(black, none, PHOTOGRAPHS).which.tolist() == [-1]
    assert len(copies.nearest(none, black, PHOTOGRAPHS).similarity) == 0


def test_progress_counts_every_image_once(guarded):
    told = []
    copies.nearest(thumbnails(guarded), thumbnails(guarded[:2]), PHOTOGRAPHS, done=told.append)
    assert sum(told) == 30


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_copies_in_the_example_are_found_and_next_to_no_other_digits(seed):
    settings, source = params.load(ROOT / "params.yaml"), load_digits()
    sizes = {"train": 130, "val": 14, "test": 30}
    files = digits.example(source.images, source.target, sizes, 60, 130, seed)
    hidden = {row["file"]: row for row in csv.DictReader(io.StringIO(files["truth.csv"].decode()))}
    guarded = [name for name in files if name.startswith(("val/", "test/"))]
    pool = [name for name in files if name.startswith(("train/", "unlabelled/"))]
    thumbs = [thumbnails(decode(files[name]) for name in names) for names in (pool, guarded)]
    threshold = settings.mine.copy_similarity
    found = copies.nearest(*thumbs, threshold)
    copied = {pool[at]: guarded[found.which[at]] for at in np.flatnonzero(found.similarity >= threshold)}
    planted = {name: row["made_from"] for name, row in hidden.items() if row["kind"] != "no class"}
    assert {name: made_from for name, made_from in copied.items() if name in planted} == planted
    assert len(copied.keys() - planted.keys()) <= 2  # of 1,430
