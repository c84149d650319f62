"""Stage digits: the embedded example, scikit-learn's 1,797 handwritten digits (8x8) as image files of 32x32 pixels.

Read: nothing but scikit-learn's wheel.
Write: data/digits/{train,val,test}/<class>/NNNN.png (NNNN: the digit's number in scikit-learn's set), and
data/digits/unlabelled/NNNN.png or .jpg: copies of test images (encoded anew as JPEG, scaled to half and back, or
shifted by a pixel) and images of no class (a training digit cut in 16 tiles, all of them moved). Which is which stands
in data/digits/truth.csv, outside of what the pipeline reads.
Run: python -m pipeline.digits [--params FILE]
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.core import atomic, stage
from pipeline.core.data.dataset import rank, sample_id
from pipeline.core.data.images import encode_png
from pipeline.core.sections import Params
from pipeline.core.tables import as_csv

OUT = Path("data/digits")
SIDE, TILES = 32, 4  # pixels a side; tiles a side of an image of no class
SPLITS = ("train", "val", "test")


def run(params: Params) -> None:
    """Write the digits as the settings say. Raises ValueError where more are asked for than there are."""
    settings = params.digits
    digits = load_digits()
    files = example(
        digits.images,
        digits.target,
        per_class={"train": settings.train_per_class, "val": settings.val_per_class, "test": settings.test_per_class},
        near_copies=settings.near_copies,
        no_class=settings.no_class,
        seed=params.seed,
    )
    with atomic.replacing_folder(OUT) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    print(f"digits: {len(files) - 1:,} images in {OUT}")


def example(
    pixels: np.ndarray, classes: np.ndarray, per_class: dict[str, int], near_copies: int, no_class: int, seed: int
) -> dict[str, bytes]:
    """Make the files of the example.

    Args:
        pixels: (N, 8, 8), 0 to 16.
        classes: (N,) the class of each.
        per_class: digits a class of train, val and test.
        near_copies: copies of test images for the unlabelled folder.
        no_class: images of no class for the unlabelled folder.
        seed: of all choices.

    Returns:
        Name to content, truth.csv last.

    Raises:
        ValueError: more is asked for than there are digits.
    """
    drawn = [enlarge(one) for one in pixels]
    encoded = [encode_png(one) for one in drawn]
    parts = split(encoded, classes, per_class, seed)
    files = {f"{part}/{classes[number]}/{number:04d}.png": encoded[number] for part in SPLITS for number in parts[part]}
    copied = pick(files, "test", near_copies, "digits.near_copies", seed)
    cut = pick(files, "train", no_class, "digits.no_class", seed)
    kinds = [*(list(KINDS)[at % 3] for at in range(near_copies)), *(["no class"] * no_class)]
    hidden = []
    for kind, source in zip(kinds, copied + cut, strict=True):
        number = int(Path(source).stem)
        make, suffix = KINDS[kind]
        hidden.append((make(drawn[number], np.random.default_rng([seed, number])), suffix, kind, source))
    hidden.sort(key=lambda one: rank(seed, "order", sample_id(one[0])))  # a file's number tells nothing
    truth = []
    for number, (content, suffix, kind, source) in enumerate(hidden):
        name = f"unlabelled/{number:04d}{suffix}"
        files[name] = content
        truth.append({"file": name, "kind": kind, "made_from": source})
    return {**files, "truth.csv": as_csv(truth, ("file", "kind", "made_from")).encode()}


def enlarge(one: np.ndarray) -> Image.Image:
    """Turn a digit (8, 8) of 0 to 16 into an 8-bit grey image."""
    grey = np.round(one * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def split(encoded: list[bytes], classes: np.ndarray, per_class: dict[str, int], seed: int) -> dict[str, list[int]]:
    """Share the digits out, so many of each class a part; give their numbers.

    Raises:
        ValueError: a class has fewer digits than that.
    """
    ranks = np.array([rank(seed, "digits", sample_id(one)) for one in encoded])
    parts: dict[str, list[int]] = {part: [] for part in SPLITS}
    for name in np.unique(classes):
        numbers = np.flatnonzero(classes == name)
        numbers = numbers[np.argsort(ranks[numbers])]
        wanted = sum(per_class.values())
        if wanted > len(numbers):
            each = " + ".join(f"{part}_per_class {per_class[part]}" for part in SPLITS)
            raise ValueError(f"digits: {each} = {wanted}, but class {name} has {len(numbers)} images; ask for fewer")
        start = 0
        for part in SPLITS:
            parts[part] += numbers[start : start + per_class[part]].tolist()
            start += per_class[part]
    return {part: sorted(numbers) for part, numbers in parts.items()}


def pick(files: dict[str, bytes], part: str, count: int, setting: str, seed: int) -> list[str]:
    """Draw files of a part at random. Raises ValueError, naming the setting, where there are too few."""
    names = [name for name in files if name.startswith(f"{part}/")]
    if count > len(names):
        raise ValueError(f"{setting}: {count} of {len(names)} {part} images; ask for fewer")
    return sorted(names, key=lambda name: rank(seed, setting, sample_id(files[name])))[:count]


def as_jpeg(image: Image.Image, random: np.random.Generator) -> bytes:
    """Encode with loss."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=50)
    return out.getvalue()


def rescaled(image: Image.Image, random: np.random.Generator) -> bytes:
    """Scale to half and back."""
    half = image.resize((SIDE // 2, SIDE // 2), Image.Resampling.BILINEAR)
    return encode_png(half.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def shifted(image: Image.Image, random: np.random.Generator) -> bytes:
    """Shift by a pixel to one of four sides; what enters is black, as the background is."""
    x, y = [(1, 0), (-1, 0), (0, 1), (0, -1)][random.integers(4)]
    return encode_png(image.transform(image.size, Image.Transform.AFFINE, (1, 0, -x, 0, 1, -y)))


def shuffled(image: Image.Image, random: np.random.Generator) -> bytes:
    """Cut in 16 tiles and put each where another was."""
    side, count = SIDE // TILES, TILES * TILES
    order = random.permutation(count)
    while (order == np.arange(count)).any():
        order = random.permutation(count)
    tiles = np.asarray(image).reshape(TILES, side, TILES, side).swapaxes(1, 2).reshape(count, side, side)
    mixed = tiles[order].reshape(TILES, TILES, side, side).swapaxes(1, 2).reshape(SIDE, SIDE)
    return encode_png(Image.fromarray(mixed))


KINDS: dict[str, tuple[Callable[[Image.Image, np.random.Generator], bytes], str]] = {
    "jpeg": (as_jpeg, ".jpg"),
    "rescaled": (rescaled, ".png"),
    "shifted": (shifted, ".png"),
    "no class": (shuffled, ".png"),
}


if __name__ == "__main__":
    stage.main(run, __doc__)
