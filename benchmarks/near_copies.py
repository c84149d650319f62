"""Looks for test images that are near-copies of training images in a data set, as stage evaluate does.

    python benchmarks/near_copies.py cifar10.zip --sheet near_copies.png

The archive holds images as train/<class>/<name> and test/<class>/<name>. All training images count as labelled, but for
the thousandth that prepare takes for validation. --sheet draws the pairs that are least alike, to judge by eye.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine

from pipeline import prepare
from pipeline.core import params
from pipeline.core.data.dataset import ImageSet
from pipeline.core.evaluation import near_copies
from pipeline.core.mining import contact_sheet

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 96  # pairs on the sheet
THRESHOLDS = [0.93, 0.95, 0.98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, help="default: 0.93 0.95 0.98")
    parser.add_argument("--sheet", type=Path, help="draw the least alike pairs to this .png")
    arguments = parser.parse_args()
    archive, sheet = arguments.archive.resolve(), arguments.sheet and arguments.sheet.resolve()
    changes = {"labelled_root": str(archive), "train": "train", "val": None, "test": "test", "unlabelled": None}
    changes |= {"val_share": 0.001, "images_per_class": None, "labels_per_class": None}
    settings = params.with_changes(
        yaml.safe_load((ROOT / "params.yaml").read_text()), {f"prepare.{key}": value for key, value in changes.items()}
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare.run(params.check(settings))
        images = ImageSet(Path("data/prepare/images/known"))
        begin = time.monotonic()
        pairs = near_copies.find(images, min(arguments.thresholds), "auto", torch.device("cpu"))
        seconds = time.monotonic() - begin
        test, labelled = (len(images.rows(split)) for split in ("test", "labelled"))
        print(f"\n{machine()}\n{test:,} test images, {labelled:,} labelled ones, {seconds:.0f} s\n")
        print("| similarity from | test images with a near-copy | of its class |\n|---|---|---|")
        for threshold in sorted(arguments.thresholds):
            found = [pair for pair in pairs if pair.similarity >= threshold]
            same = sum(images.labels[pair.test] == images.labels[pair.labelled] for pair in found)
            print(f"| {threshold:g} | {len(found):,}, {len(found) / test:.1%} | {same:,} |")
        if sheet:
            tiles = [
                contact_sheet.Tile((pair.test, pair.labelled), (f"{pair.similarity:.4f}", pair.alignment))
                for pair in reversed(pairs[-SHOWN:])
            ]
            part = contact_sheet.Part("The least alike", "test image, training image", [contact_sheet.Line(tiles)])
            contact_sheet.draw(images.image, "Near-copies of training images in the test split", [part]).save(sheet)


if __name__ == "__main__":
    main()
