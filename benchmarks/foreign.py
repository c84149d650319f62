"""Mines a pool of which half the images belong to no class of the labelled set, and says how many of the mined belong.

    python benchmarks/foreign.py cifar10.zip
    python benchmarks/foreign.py cifar10.zip --classes bird,cat,deer,dog,frog --train 1000

The archive holds images as <split>/<class>/<name>. A small teacher is fitted to some of its classes. It has not seen
the pool, of which half the images are of as many other classes. The pool is scored and mined as in the pipeline, by
the teacher's probability alone and by likeness, for several numbers of images a class. All this lies in
.scratch/foreign; what another run with the same arguments did is not done again. On one core with AMX the teacher takes
50 minutes.
"""

import argparse
import contextlib
import hashlib
import io
import os
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline import mine, prepare, score, teacher
from pipeline.core import atomic, params
from pipeline.core.data.dataset import ImageSet
from pipeline.core.evaluation import report
from pipeline.core.running import params_file
from pipeline.core.sections import Params

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "prepare.labelled_root": "photos",
    "prepare.val": None,
    "prepare.test": None,
    "prepare.val_share": 0.095,
    "prepare.test_share": 0.005,
    "prepare.unlabelled_root": "photos",
    "prepare.labels_per_class": None,
    "views.resolution": 32,
    "views.crop_scale": [0.4, 1.0],
    "views.flip": 0.5,
    "views.mix_probability": 0.3,
    "views.randaugment_ops": 0,
    "teacher.model": "ResNet18_vd",
    "teacher.fit_on": "labelled",
    "teacher.precision": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="a .zip of images, <split>/<class>/<name>")
    parser.add_argument("--classes", help="of the labelled set, with commas (default: the first half, by name)")
    parser.add_argument("--train", type=int, default=4000, help="labelled images a class (default: 4000)")
    parser.add_argument("--pool", type=int, default=1000, help="images a class in the pool (default: 1000)")
    parser.add_argument("--epochs", type=int, default=31, help="of the teacher (default: 31)")
    parser.add_argument(
        "--per-class", type=int, nargs="+", default=[50, 100, 200, 400], metavar="IMAGES", help="to mine"
    )
    arguments = parser.parse_args()
    settings = {**SETTINGS, "teacher.epochs": arguments.epochs}
    wanted = params.check(params_file.changed(ROOT, settings))
    archive = arguments.archive.resolve()
    key = f"{archive.stem}-{arguments.classes or 'half'}-{arguments.train}-{arguments.pool}-{arguments.epochs}"
    workspace = ROOT / ".scratch/foreign" / key
    workspace.mkdir(parents=True, exist_ok=True)
    os.chdir(workspace)
    if not Path("photos").exists():
        try:
            with atomic.replacing_folder(Path("photos")) as beside:
                spread(archive, arguments.classes, arguments.train, arguments.pool, beside)
        except (ValueError, OSError) as error:
            sys.exit(f"foreign: error: {error}")
    for stage in (prepare, teacher, score):
        if not Path("data", stage.__name__.split(".")[-1]).exists():
            stage.run(wanted)
    images = ImageSet(Path("data/prepare/images"))
    truth = np.array([images.source(row).split("/")[-2] for row in images.rows("unlabelled")])
    known = np.isin(truth, images.classes)
    labelled = len(images.rows("labelled"))
    last = report.read_history(Path("data/teacher/history.csv"))[-1]
    print(
        f"{wanted.teacher.model} at {wanted.views.resolution} pixels, {labelled:,} images of "
        f"{', '.join(images.classes)}, {arguments.epochs} epochs: top-1 {last['val_top1']:.3f} on "
        f"{len(images.rows('val')):,} validation images; pool: {len(known):,} images, {known.sum():,} of these "
        "classes\n"
    )
    print("| ranked by | wanted a class | mined | belong | in their own class | fewest and most of a class |")
    print("|---|---|---|---|---|---|")
    for rank_by in ("probability", "likeness"):
        for per_class in arguments.per_class:
            print(
                f"| {rank_by} | {per_class:,} | " + mined_well(images, truth, wanted, rank_by, per_class) + " |",
                flush=True,
            )


def mined_well(images: ImageSet, truth: np.ndarray, wanted: Params, rank_by: str, per_class: int) -> str:
    """Mine, and give the cells of a row: how many were mined, what share belongs, is right, and the class balance."""
    changed = wanted.mine.model_copy(update={"rank_by": rank_by, "per_class": per_class, "copy_similarity": 0.93})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mine.run(wanted.model_copy(update={"mine": changed}))
    mined = pq.read_table("data/mine/mined.parquet").to_pydict()
    place = {row: at for at, row in enumerate(images.rows("unlabelled").tolist())}
    real = truth[[place[row] for row in images.row_of(np.array(mined["id"], np.uint64)).tolist()]]
    belong = np.isin(real, images.classes).mean()
    right = (real == np.array(images.classes)[mined["class"]]).mean()
    counts = np.bincount(mined["class"], minlength=len(images.classes))
    return f"{len(real):,} | {belong:.3f} | {right:.3f} | {counts.min():,} and {counts.max():,}"


def spread(archive: Path, classes: str | None, train: int, pool: int, photos: Path) -> None:
    """Write train/<class> and unlabelled to the folder `photos`; images are drawn by a hash of their names.

    Raises:
        ValueError: a class that the archive does not have.
    """
    with zipfile.ZipFile(archive) as source:
        of_class = defaultdict(list)
        for name in source.namelist():
            if name.count("/") == 2 and not name.endswith("/"):
                of_class[name.split("/")[1]].append(name)
        labelled = classes.split(",") if classes else sorted(of_class)[: len(of_class) // 2]
        if unknown := set(labelled) - set(of_class):
            raise ValueError(
                f"{archive}: no class {', '.join(sorted(unknown))}; there are {', '.join(sorted(of_class))}"
            )
        foreign = sorted(set(of_class) - set(labelled))[: len(labelled)]
        for class_name in [*labelled, *foreign]:
            names = sorted(of_class[class_name], key=lambda name: hashlib.sha256(name.encode()).digest())
            known = class_name in labelled
            for at, name in enumerate(names[: train + pool if known else pool]):
                in_pool = not known or at >= train
                place = photos / ("unlabelled" if in_pool else "train") / class_name / name.replace("/", "-")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(source.read(name))


if __name__ == "__main__":
    main()
