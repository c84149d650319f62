"""What soft labels depend on, and how the teacher answers: for the stages that store them and those that learn."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.core import errors
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.networks import Classifier
from pipeline.core.sections import HIGH_TEMPERATURE, Params
from pipeline.core.softlabels import Description, SoftLabels, read_description

TEACHER = Path("data/teacher")


def description(params: Params, card: dict) -> Description:
    """Say what soft labels depend on: the teacher (its network's card), the views, and what is stored of an answer."""
    teacher = {key: card[key] for key in ("model", "digest", "mean", "std", "num_classes")}
    # Absent where it sees views as they are: so caches stay valid that were made before there was such a setting.
    teacher |= {"resized_to": card["resized_to"]} if "resized_to" in card else {}
    return Description(
        teacher={**teacher, "precision": params.teacher.precision},
        views=ViewSpec.of(params.seed, params.views).description(),
        num_classes=card["num_classes"],
        top_k=params.cache.top_k,
        min_probability=params.cache.min_probability,
        bits=params.cache.bits,
    )


def answer(classifier: Classifier, pixels: Tensor, precision: str) -> Tensor:
    """Give the teacher's logits (B, C) float32 for pixels (B, 3, R, R), as the cache and the online mode both do."""
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return classifier(pixels).float()


def open_labels(wanted: Description) -> SoftLabels:
    """Open data/cache, if it holds what `wanted` describes: what one teacher says about some views.

    Raises:
        ValueError: it holds something else; what differs is named.
    """
    folder = Path("data/cache")
    found = read_description(folder)
    if wanted != found:
        raise ValueError(
            f"{folder}: soft labels of something else ({found.difference(wanted)} differ); run `dvc repro cache`"
        )
    return SoftLabels(folder, wanted)


def warn_of_top_k(
    stage: str, params: Params, classes: int, learners: tuple[str, ...] = ("distill", "finetune")
) -> None:
    """Say where a high temperature evens out what the cache does not store class by class.

    Args:
        stage: which says so.
        classes: how many there are.
        learners: the stages whose temperature to look at.
    """
    for name in learners:
        recipe = getattr(params, name)
        if recipe.temperature > HIGH_TEMPERATURE and classes > params.cache.top_k and not recipe.online:
            print(
                f"{stage}: warning: {name}.temperature {recipe.temperature:g} weighs all {classes:,} classes, of which "
                f"the cache stores the {params.cache.top_k} most probable (cache.top_k), and of the others only the "
                f"sum, so gradients may be far off: set {name}.online, or a temperature up to {HIGH_TEMPERATURE:g}",
                flush=True,
            )


def training_rows(images: ImageSet) -> np.ndarray:
    """Give the rows, ascending, of the labelled and the mined samples.

    Raises:
        ValueError: mining has not been done, or was done with another pool: its images may be test images now.
    """
    folder = Path("data/mine")
    mined = images.row_of(mined_ids(folder))
    if not np.isin(mined, images.rows("unlabelled")).all():
        raise ValueError(f"{folder}: some of these are not in the present pool; run `dvc repro mine`")
    return np.sort(np.concatenate([images.rows("labelled"), mined]))


def mined_ids(folder: Path) -> np.ndarray:
    """Give the ids (M,) uint64 of the mined samples, ascending, each once.

    Raises:
        ValueError: mining has not been done, or its file is damaged.
    """
    try:
        return np.unique(pq.read_table(folder / "mined.parquet", columns=["id"])["id"].to_numpy())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no mined.parquet here; run `dvc repro mine`, or `dvc pull`") from None
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{folder}/mined.parquet: {errors.in_a_line(error)}; remove {folder}, and run `dvc checkout {folder}`, or "
            "`dvc repro`"
        ) from None
