"""A network as a version of a registered model in MLflow: packed, published, found again, loaded back.

A version's folder holds MLflow's own files (`MLmodel`, the exported program `data/model.pt2`, an input example) and,
beside them, whatever the stage adds: the weights as safetensors, the network's card, the report.
"""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import errors
from pipeline.core.results import exporting, mlflow_store

if TYPE_CHECKING:  # torch and mlflow take seconds to import: looking a version up should not wait for both
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from torch import nn

KEY = "key"  # the tag that says which student a version is
REFUSED = "refused"  # begins the tag `decision` of a version that did not predict what was recorded


class CardError(ValueError):
    """A version's network.json is missing or damaged."""


def pack(folder: Path, network: "nn.Module", resolution: int, classes: list[str], **link: str) -> None:
    """Write a network as an MLflow model: an exported program, which is loaded without running any of its maker's code.

    Args:
        folder: made; must not be there.
        network: on the CPU, in eval mode; pixels (B, 3, R, R) float32 -> logits (B, C).
        resolution: R.
        classes: their names.
        link: model_id, run_id and artifact_path of the logged model that this is for.

    Raises:
        OSError: the disk has too little room for it.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from pipeline.core import small_maps

    pixels = TensorSpec(np.dtype(np.float32), (-1, 3, resolution, resolution))
    logits = TensorSpec(np.dtype(np.float32), (-1, len(classes)))
    metadata = {"input": "RGB pixels, 0 to 255, as they are", "output": "logits", "classes": classes}
    model = Model(metadata=metadata, model_uuid=link.get("model_id"), **link)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    _check_room(folder.parent, 3 * weights)  # beside the program lie the weights, and those of the ONNX file
    with exporting.without_stack_traces():
        mlflow.pytorch.save_model(
            small_maps.exportable(network),
            folder,
            mlflow_model=model,
            signature=ModelSignature(inputs=Schema([pixels]), outputs=Schema([logits])),
            input_example=exporting.example(resolution),
            metadata=metadata,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"],
        )
    # An exported program stays on the device it was exported on; pyfunc would insist on CUDA where there is one.
    model.flavors["python_function"]["config"]["device"] = "cpu"
    model.save(str(folder / "MLmodel"))


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:  # torch's writer ends the process where the disk is full
        raise OSError(
            f"{folder}: {free / 1e6:,.0f} MB are free, and packing the student takes up to {needed / 1e6:,.0f} MB: set "
            "TMPDIR to a folder on another disk"
        )


def publish(
    client: "MlflowClient",
    name: str,
    run_id: str,
    tags: dict[str, str],
    metrics: dict[str, float],
    about: str,
    describe: Callable[[str], str],
    write: Any,
) -> "ModelVersion":
    """Make a new version of a registered model, which is made where it is not there.

    Args:
        name: of the registered model.
        run_id: the MLflow run that it comes from.
        tags, metrics: of the version.
        about: description of the registered model, in Markdown.
        describe: gives the description of the version, in Markdown, from its number.
        write: (folder, model_id=, run_id=, artifact_path=) -> None; writes the version's files.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    _make_registered_model(client, name, about)
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory(prefix="register-") as scratch:
        folder = Path(scratch) / "model"
        with warnings.catch_warnings():  # of torch.export, about its own files
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")
            write(folder, model_id=logged.model_id, run_id=run_id, artifact_path=logged.artifact_location)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    now = time.time_ns() // 1_000_000
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now, 0, model_id=logged.model_id, run_id=run_id) for key, value in metrics.items()],
    )
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    version = client.create_model_version(name, logged.artifact_location, run_id, tags=tags, model_id=logged.model_id)
    client.update_model_version(name, version.version, describe(version.version))
    # The name under which MLflow's pages look for the versions of a logged model.
    versions = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": versions})
    return version


def find(client: "MlflowClient", name: str, key: str) -> "ModelVersion | None":
    """Find the newest version of a registered model with this key that was not refused, its files still there."""
    versions = client.search_model_versions(f"name = '{name}' and tags.{KEY} = '{key}'")
    taken = [version for version in versions if not version.tags.get("decision", "").startswith(REFUSED)]
    whole = [version for version in taken if is_whole(client, version)]
    # A search does not give the aliases.
    return client.get_model_version(name, max(whole, key=lambda v: int(v.version)).version) if whole else None


def best(
    client: "MlflowClient", other_than: "ModelVersion", test_digest: str, classes: tuple[str, ...]
) -> list["ModelVersion"]:
    """Find the versions of the highest top-1 beside one: of those that were tested on the same images, and of others.

    A version whose files are not whole, or that knows classes that are not among these, is passed over.

    Args:
        test_digest: of the test images.
    """

    def fits(version: "ModelVersion") -> bool:
        with suppress(CardError):
            return is_whole(client, version) and set(card_of(client, version)["classes"]) <= set(classes)
        return False

    versions = client.search_model_versions(f"name = '{other_than.name}'")
    others = [one for one in versions if "top1" in one.tags and one.version != other_than.version]
    others.sort(key=lambda one: (float(one.tags["top1"]), int(one.version)), reverse=True)
    found = []
    for same in (True, False):
        tested_so = (one for one in others if (one.tags.get("digest.test") == test_digest) == same)
        found += islice(filter(fits, tested_so), 1)
    return found


def by_alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """Give the version that has an alias, if there is one; its files may be gone."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            return None
        raise


def is_whole(client: "MlflowClient", version: "ModelVersion") -> bool:
    """Say whether a version's files are where the registry says."""
    return "MLmodel" in _files(client, version)


def card_of(client: "MlflowClient", version: "ModelVersion") -> dict[str, Any]:
    """Read a version's network.json, and nothing else of its files.

    Raises:
        CardError: it is not there, or damaged.
        ValueError: what keeps the files does not answer.
    """
    import mlflow.artifacts

    with tempfile.TemporaryDirectory(prefix="register-") as scratch, mlflow_store.speaking_plainly(client.tracking_uri):
        if "network.json" in _files(client, version):
            file = mlflow.artifacts.download_artifacts(
                f"{_address(client, version)}/network.json", dst_path=scratch, tracking_uri=client.tracking_uri
            )
            with suppress(ValueError):  # no JSON, or no text
                return json.loads(Path(file).read_text(encoding="utf-8"))
    raise CardError(
        f"models:/{version.name}/{version.version}: its network.json is missing or damaged; give its aliases to "
        "another version, or take them away"
    )


@contextmanager
def loaded(client: "MlflowClient", version: "ModelVersion") -> Iterator[Any]:
    """Load a version back from the registry: pixels -> logits. Nothing is unpickled.

    Raises:
        ValueError: it cannot be loaded.
    """
    import mlflow.artifacts
    import mlflow.pytorch
    from mlflow.exceptions import MlflowException
    from yaml import YAMLError

    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    where = f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory(prefix="register-") as scratch, mlflow_store.speaking_plainly(client.tracking_uri):
        folder = mlflow.artifacts.download_artifacts(
            _address(client, version), dst_path=scratch, tracking_uri=client.tracking_uri
        )
        try:
            model = mlflow.pytorch.load_model(folder)
        except (
            MlflowException,
            YAMLError,
            OSError,
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            words = errors.in_a_line(error)
            if "pickle" in words.lower():  # for which MLflow takes what it does not know, and advises to allow it
                words = "its model is damaged, or no program of torch.export"
            raise ValueError(f"{where}: cannot be loaded: {words[:300]}") from None
        yield model


def _address(client: "MlflowClient", version: "ModelVersion") -> str:
    """Say where a version's files lie. (MLflow would look `models:/...` up in a store of its own choice.)"""
    return client.get_model_version_download_uri(version.name, version.version)


def _files(client: "MlflowClient", version: "ModelVersion") -> set[str]:
    """The names of what lies in a version's folder; none where that is gone."""
    import mlflow.artifacts

    files = mlflow.artifacts.list_artifacts(_address(client, version), tracking_uri=client.tracking_uri)
    return {Path(file.path).name for file in files}


def _make_registered_model(client: "MlflowClient", name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
