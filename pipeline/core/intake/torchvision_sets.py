"""torchvision's data sets as lists of files; nothing is downloaded.

Read: a data set's files as torchvision lays them out in a root folder. Sets that store arrays give their images as PNG
files; sets that store image files give those. CIFAR is stored as pickles, and a pickle can run code when it is read:
torchvision compares each file's checksum first, and so reads only those that were published.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.data import images
from pipeline.core.intake.archives import read_file
from pipeline.core.intake.sources import SourceFile, class_name

# The constructor's arguments for the part of a set that serves as train, val, test or unlabelled. Sets that lie in a
# folder a class (ImageNet, Imagenette, EuroSAT) are not here: they are read as any folder.
FLAG = {"train": {"train": True}, "unlabelled": {"train": True}, "test": {"train": False}}
SPLIT = {"train": {"split": "train"}, "unlabelled": {"split": "train"}, "test": {"split": "test"}}
SPLIT_VAL = {**SPLIT, "val": {"split": "val"}}
ARRAYS: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"), FLAG),
    "STL10": {**SPLIT, "unlabelled": {"split": "unlabeled"}},
    "SVHN": {**SPLIT, "unlabelled": {"split": "extra"}},
}
FILES = {"Food101": SPLIT, "DTD": SPLIT_VAL, "FGVCAircraft": SPLIT_VAL, "Flowers102": SPLIT_VAL}


def files(name: str, root: Path, role: str) -> tuple[list[SourceFile], set[str]]:
    """List the images of a part of a torchvision data set, and its classes.

    Args:
        name: the class's name in torchvision.datasets.
        root: the folder that torchvision calls root.
        role: train, val, test or unlabelled.

    Raises:
        ValueError: the set is not known, has no such part, or is not in the folder.
    """
    where = f"prepare.{role}: torchvision:{name}"
    parts = {**ARRAYS, **FILES}.get(name)
    if parts is None:
        known = ", ".join(sorted({**ARRAYS, **FILES}))
        raise ValueError(f"{where}: known are {known}; of another, name the folder or list of its images instead")
    if role not in parts:
        raise ValueError(f"{where}: it has no such part; prepare.{role}: null takes prepare.{role}_share of train")
    from torchvision import datasets  # it takes seconds to load

    # A set of image files is told to "load" an image as the path of its file.
    arguments = {**parts[role], **({"loader": str} if name in FILES else {})}
    try:
        dataset = getattr(datasets, name)(root, download=False, **arguments)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split(". You can use download=True")[0].split())
        raise ValueError(f"{where}: not in {root}, or damaged ({reason}); put its files there first") from None
    labels = _labels(dataset)  # (N,)
    names = getattr(dataset, "classes", None) or [str(label) for label in range(max(labels, default=-1) + 1)]
    found = []
    for index, label in enumerate(labels):
        label_name = class_name(names[label]) if label >= 0 else None
        if name in FILES:
            path = Path(dataset[index][0])
            size = path.stat().st_size if path.is_file() else 0
            found.append(SourceFile(path.relative_to(root).as_posix(), label_name, size, partial(read_file, path)))
        else:
            number = f"torchvision:{name}/{role}/{index:06d}.png"
            found.append(SourceFile(number, label_name, 0, partial(_as_png, dataset, index)))
    return found, {file.class_name for file in found if file.class_name}


def _labels(dataset: Any) -> list[int]:
    """Give all labels; the sets spell the attribute differently. -1: none."""
    attribute = next(name for name in ("targets", "labels", "_labels") if getattr(dataset, name, None) is not None)
    return np.asarray(getattr(dataset, attribute)).astype(int).tolist()


def _as_png(dataset: Any, index: int) -> bytes:
    return images.encode_png(dataset[index][0])
