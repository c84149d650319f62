"""Looks for planted copies (planted.py) by SIFT, by pHash with a teacher's embedding, and by this project's search.

    python benchmarks/copies.py cifar10.zip --images 2000 --plant 500   half of them guarded
    python benchmarks/copies.py photographs.zip --plant 125             250 photographs
    python benchmarks/copies.py cifar10.zip --images 2000 --plant 500 --teacher PROJECT/data/teacher

SIFT, which SSLD's authors used, needs OpenCV: pip install --no-deps opencv-python-headless==5.0.0.93. A keypoint of a
pool image votes for the guarded image (or its mirror image) with the nearest descriptor, if no other guarded image has
one nearly as near (Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", 2004, section 7.1: a ratio of
distances of at most 0.8). An image's similarity is the number of votes for the image that gets most of them. The
authors' rule is not published; this one does not look at where the keypoints are.

With --teacher, also by pHash and that teacher's embedding: the sum of both cosines, each with the guarded image or its
mirror image. Other methods get the threshold at which they take at most 1 in 1,000 of the pool (one, of a smaller pool)
for a copy of an image of another class; this project's search has its own, 0.93.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine
from planted import Answer, Method, hash_bits, ours, read, search, show, unit

from pipeline.core import networks
from pipeline.core.data.views import render_test
from pipeline.core.mining.thumbnails import thumbnails
from pipeline.core.networks import Classifier

try:
    import cv2
except ImportError:
    sys.exit("copies: error: OpenCV is not here: pip install --no-deps opencv-python-headless==5.0.0.93")

SHORTEST, LONGEST = 128, 256  # pixels of an image's longer side: SIFT finds little in smaller images
KEYPOINTS = 64  # of an image, the strongest
RATIO = 0.8  # of the distances to the nearest image and the next
NEAREST = 8  # descriptors among which another image's is looked for
QUERIES = 1024  # descriptors compared at a time


class Described:
    """Descriptors of images, and the image of each."""

    def __init__(self, images: Iterable[Image.Image]):
        sift = cv2.SIFT_create(nfeatures=KEYPOINTS)
        found, of = [np.zeros((0, 128), np.float32)], [np.zeros(0, np.int64)]
        for number, image in enumerate(images):
            _, descriptors = sift.detectAndCompute(np.array(resized(image).convert("L")), None)
            if descriptors is not None:
                found.append(descriptors[:KEYPOINTS])
                of.append(np.full(len(found[-1]), number))
        whole = torch.from_numpy(np.concatenate(found))
        self.descriptors = whole / whole.norm(dim=1, keepdim=True).clamp(min=1e-6)  # (K, 128), of length 1
        self.of = torch.from_numpy(np.concatenate(of))  # (K,)


def resized(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    factor = min(max(longer, SHORTEST), LONGEST) / longer
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)


def votes(pool: Described, count: int, guarded: Described, guarded_count: int) -> Answer:
    """The most votes that each of `count` pool images gives to one of the guarded images, and to which."""
    ballots = torch.zeros(count, guarded_count, dtype=torch.int16)
    for start in range(0, len(pool.of), QUERIES):
        part = slice(start, start + QUERIES)
        cosines, places = (pool.descriptors[part] @ guarded.descriptors.T).topk(NEAREST, dim=1)
        distances = (2 - 2 * cosines).clamp(min=0).sqrt()  # (q, NEAREST)
        named = guarded.of[places] % guarded_count  # the second half are mirror images
        other = torch.where(named != named[:, :1], distances, torch.inf).min(dim=1).values
        sure = distances[:, 0] <= RATIO * other  # inf where all near ones are of one image
        cast = torch.ones(int(sure.sum()), dtype=torch.int16)
        ballots.index_put_((pool.of[part][sure], named[sure, 0]), cast, accumulate=True)
    most, which = ballots.max(dim=1)
    return most.numpy(), which.numpy()


@torch.inference_mode()
def embeddings(classifier: Classifier, images: list[Image.Image], side: int) -> np.ndarray:
    """(N, D), each about its mean and of length 1."""
    views = (
        np.stack([render_test(image, side, 1.0) for image in images[at : at + 128]])
        for at in range(0, len(images), 128)
    )
    return unit(np.concatenate([classifier.embed(torch.from_numpy(part))[1].float().numpy() for part in views]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="a .zip of images, .../<class>/<name>")
    parser.add_argument("--images", type=int, default=10000, help="of the archive (default: 10000)")
    parser.add_argument("--plant", type=int, default=1000, help="copies of each kind (default: 1000)")
    parser.add_argument("--teacher", type=Path, help="folder of a fitted teacher; its views have --side pixels")
    parser.add_argument("--side", type=int, default=32, help="pixels of the teacher's views (default: 32)")
    arguments = parser.parse_args()
    images, classes = read(arguments.archive, arguments.images)
    half_way = len(images) // 2
    plant = min(arguments.plant, half_way)
    guarded = images[:half_way]
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in guarded]
    thumbs, described = thumbnails(guarded), Described([*guarded, *mirrored])

    def by_sift(pool: list[Image.Image]) -> Answer:
        return votes(Described(pool), len(pool), described, half_way)

    def by_this_project(pool: list[Image.Image]) -> Answer:
        return ours(thumbnails(pool), thumbs)

    methods: dict[str, Method] = {"this project's": by_this_project, "SIFT": by_sift}
    if arguments.teacher:
        classifier, _ = networks.load(arguments.teacher, torch.device("cpu"))

        def described_twice(images: list[Image.Image]) -> list[np.ndarray]:
            return [hash_bits(thumbnails(images)), embeddings(classifier, images, arguments.side)]

        targets = [described_twice(guarded), described_twice(mirrored)]

        def by_hash_and_embedding(pool: list[Image.Image]) -> Answer:
            pairs = zip(described_twice(pool), *targets, strict=True)
            total = sum(np.maximum(mine @ plain.T, mine @ turned.T) for mine, plain, turned in pairs)
            return total.max(1), total.argmax(1)

        methods["pHash and embedding"] = by_hash_and_embedding
    found = {
        name: search(images, classes, plant, method, 0.93 if method is by_this_project else None)
        for name, method in methods.items()
    }
    print(f"\n{machine()}; {len(images) - half_way:,} pool images, {half_way:,} guarded, {plant:,} copies of each kind")
    print(f"keypoints of a guarded image, in the mean: {len(described.of) / len(guarded) / 2:.1f}\n")
    show(found, half_way)


if __name__ == "__main__":
    main()
