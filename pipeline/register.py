"""Stage register: makes the student a version of a registered model in MLflow, and the champion if it has earned that.

Reads data/prepare, data/fixres (the student) and data/evaluate, and for the tags that lead back also
data/teacher/network.json, data/cache/cache.json and dvc.lock. Writes to MLflow, and data/register/version.json, which
says what was registered. Run: python -m pipeline.register [--if-missing]
With --if-missing it only looks whether the registry has that version, and registers it where it is missing: for when
DVC skipped this stage, or took its output from its cache.
"""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pipeline.core import atomic, recorded, resume, stage
from pipeline.core.params import load
from pipeline.core.results import exporting, finished, mlflow_store, onnx_file, registry, tracking
from pipeline.core.sections import Params

if TYPE_CHECKING:  # torch and mlflow take seconds to import: --help and --if-missing should not wait for both
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from torch import nn

DATA = Path("data")
# What the student is made of; whatever else is in dvc.lock does not matter to it.
STAGES = ("prepare", "teacher", "score", "mine", "cache", "baseline", "distill", "finetune", "fixres", "evaluate")
CHECKED = 5000  # test images, at most, on which the version that is loaded back is compared with what was recorded
CHECKED_FIRST = 500  # ... on which the student is compared with what was recorded, and the ONNX file with the student
RECORD = DATA / "register" / "version.json"
TOLERANCE, TOLERANCE_GPU = 1e-4, 2e-2  # of logits, relative to the largest one; GPUs round to TF32 on the way
EVALUATE_AGAIN = "`dvc repro --force --single-item evaluate`, then `dvc repro`"
TEXT = "Image classifiers from SSLD distillation. `champion` is the best version so far, `challenger` the latest."


def run(params: Params) -> None:
    """Register the student, see whether it is what was evaluated, and promote it if it beats the champion.

    Raises:
        ValueError: an input is missing or does not fit the others, settings were edited after a stage had run, MLflow
            cannot be used, or the student, or the version that was loaded back from the registry, does not predict what
            was recorded.
    """
    recorded.check_lock(STAGES)
    with resume.only_writer("register"):
        student = finished.read(DATA)
        record = finished.describe(student, params.register_.name, params.views.test_crop)
        client = mlflow_store.connect()
        with (
            mlflow_store.exclusively(client.tracking_uri, "register"),
            mlflow_store.speaking_plainly(client.tracking_uri),
        ):
            _register(client, params, student, record)
        if _recorded() != record:
            atomic.write_json(RECORD, record)


def run_if_missing(params: Params) -> None:
    """Register what data/register/version.json describes if the registry does not have it.

    Raises:
        ValueError: as `run`; or nothing was registered yet.
    """
    record = _recorded()
    if record is None:
        raise ValueError(f"{RECORD}: not there, or damaged, so that nothing is known to be registered; run `dvc repro`")
    client = mlflow_store.connect()
    where = mlflow_store.shown(client.tracking_uri)
    with mlflow_store.speaking_plainly(client.tracking_uri):
        version = registry.find(client, record["name"], record["key"])
        champion = version and _champion(client, record["name"])
    if version is not None and champion is not None:
        _say(f"{_named(version)} is in the registry ({where}); nothing to do")
        return
    _say(f"the registry ({where}) lacks {'a champion' if version else 'this version; registering it'}")
    if finished.describe(finished.read(DATA), params.register_.name, params.views.test_crop) != record:
        raise ValueError(f"{RECORD}: describes another student than data/fixres holds; run `dvc repro`")
    run(params)


def _recorded() -> dict[str, Any] | None:
    """What an earlier run has noted of the version; None where the note is not there, or damaged."""
    try:
        return json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def differ(measured: np.ndarray, recorded: np.ndarray, tolerance: float) -> str:
    """Say how two sets of logits (N, C) differ; nothing if they do not.

    Args:
        tolerance: of a logit, relative to the largest one (but at least 1).
    """
    allowed = tolerance * max(1.0, float(np.abs(recorded).max()))
    gap = float(np.abs(measured - recorded).max())
    if not gap <= allowed:  # not so for NaN either
        return f"logits differ by up to {gap:.2g}, and {allowed:.2g} is allowed"
    return ""


def decide(challenger: float, champion: float, margin: float) -> bool:
    """Say whether a top-1 is enough to replace the champion's: it must be more, and by at least the margin."""
    return challenger > champion and challenger - champion >= margin - 1e-9


def top1_by_name(logits: np.ndarray, knows: list[str], labels: np.ndarray, classes: tuple[str, ...]) -> float:
    """Share of images whose class is named rightly by a network that has its classes in another order, or fewer."""
    return float(np.mean(np.array(knows)[logits.argmax(1)] == np.array(classes)[labels]))


def _register(client: "MlflowClient", params: Params, student: finished.Student, record: dict[str, Any]) -> None:
    name = record["name"]
    version = registry.find(client, name, record["key"])
    if version is None:
        version = _publish(client, params, student, record)
        _say(f"made {_named(version)}")
    else:
        _say(f"{_named(version)} is this student already; no new version")
    top1 = _verified_top1(client, version, params, student)
    client.set_registered_model_alias(name, "challenger", version.version)
    champion = _champion(client, name)
    while True:
        if _number(champion) == version.version:
            _say(f"{_named(version)} is the champion already")
            return
        promoted, why, rival = _challenge(client, params, student, version, top1, champion)
        present = _champion(client, name)
        if _number(present) == _number(champion) or (champion and not promoted):
            break
        champion = present  # of somebody who registered elsewhere meanwhile
    if promoted:
        client.set_registered_model_alias(name, "champion", version.version)
    elif champion is None and rival:
        client.set_registered_model_alias(name, "champion", rival.version)
        _say(f"{_named(rival)} is the champion now: there was none, and {_named(version)} does not beat it")
    decision = f"{'promoted' if promoted else 'not promoted'}: {why}"
    client.set_model_version_tag(name, version.version, "decision", decision)
    _say(f"{_named(version)} {'is the champion now' if promoted else 'stays challenger'}: {why}")


def _publish(
    client: "MlflowClient", params: Params, student: finished.Student, record: dict[str, Any]
) -> "ModelVersion":
    from pipeline.core import networks
    from pipeline.core.results import model_card

    name, card, figures = record["name"], student.card, student.figures
    settings = params.model_dump(mode="json", by_alias=True)
    origin, taken = finished.lineage(record, params, DATA), finished.count_mined(student, params, DATA)
    classifier, _ = networks.load(DATA / "fixres")
    rows = _some(student.rows, CHECKED_FIRST)
    answers = _ask(classifier, student, rows, card["resolution"], params.views.test_crop, params, "the student")
    if difference := differ(answers, _some(student.logits, CHECKED_FIRST), _tolerance(student)):
        raise ValueError(
            f"{DATA / 'fixres'}: this student does not predict what data/evaluate recorded ({difference}); run "
            f"{EVALUATE_AGAIN}"
        )

    def write(folder: Path, **link: str) -> None:
        registry.pack(folder, classifier, card["resolution"], card["classes"], **link)
        no_onnx = _write_onnx(folder / "student.onnx", classifier, params, student, rows, answers)
        for file in (
            *(DATA / "fixres" / file for file in ("weights.safetensors", "network.json")),
            *(DATA / "evaluate" / file for file in ("report.html", "metrics.json")),
            Path("dvc.lock"),
        ):
            if file.exists() or file.name != "dvc.lock":
                atomic.write_bytes(folder / file.name, file.read_bytes())
        atomic.write_text(folder / "params.yaml", _as_written(params))
        text = model_card.in_full(name, card, figures, settings, student.counts, taken, origin, no_onnx)
        atomic.write_text(folder / "README.md", text)

    with tracking.run("register", settings, {"data": record["data"], "weights": record["weights"]}) as tracked:
        return registry.publish(
            client,
            name,
            tracked.id,
            tags={registry.KEY: record["key"], "test_crop": str(params.views.test_crop), **origin},
            metrics={
                f"{who}.{key}": float(value) for who in model_card.NETWORKS for key, value in figures[who].items()
            },
            about=TEXT,
            describe=lambda version: model_card.description(name, version, card, figures, params.teacher.model),
            write=write,
        )


def _as_written(params: Params) -> str:
    """Give params.yaml as it is, since DVC compares values as they are written; as read, where it has changed since."""
    file = Path("params.yaml")
    with contextlib.suppress(OSError, ValueError):
        text = file.read_text(encoding="utf-8")
        if load(file) == params:
            return text
    return yaml.safe_dump(params.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def _write_onnx(
    file: Path, classifier: "nn.Module", params: Params, student: finished.Student, rows: np.ndarray, wanted: np.ndarray
) -> str:
    """Write the student as ONNX, if that answers as the student does. If not, leave no file and give the reason.

    Args:
        rows: (N,) test images.
        wanted: (N, C) float32: the student's logits for them.
    """
    resolution, crop = student.card["resolution"], params.views.test_crop
    try:
        onnx_file.write(file, classifier, exporting.example(resolution), student.card["classes"])
        found = _ask(onnx_file.load(file), student, rows, resolution, crop, params, file.name)
        reason = differ(found, wanted, TOLERANCE)
    except ValueError as error:
        reason = str(error).rstrip(".")
    if reason:
        file.unlink(missing_ok=True)
        _say(f"the version goes without {file.name}: {reason}")
    else:
        _say(f"{file.name} answers as the student does")
    return reason


def _some(rows: np.ndarray, most: int) -> np.ndarray:
    """Take at most so many of an array's rows, spread evenly."""
    return rows[:: max(1, -(-len(rows) // most))]


def _verified_top1(client: "MlflowClient", version: "ModelVersion", params: Params, student: finished.Student) -> float:
    """Load a version back and compare what it predicts with what was recorded; give its top-1."""
    if "top1" in version.tags:  # an earlier run got this far
        return float(version.tags["top1"])
    rows, resolution, crop = _some(student.rows, CHECKED), student.card["resolution"], params.views.test_crop
    with registry.loaded(client, version) as model:
        logits = _ask(model, student, rows, resolution, crop, params, "the version loaded back")
    if difference := differ(logits, _some(student.logits, CHECKED), _tolerance(student)):
        client.set_model_version_tag(version.name, version.version, "decision", f"{registry.REFUSED}: {difference}")
        raise ValueError(
            f"{_named(version)} was loaded back from the registry, and does not predict what data/evaluate recorded "
            f"({difference}); run {EVALUATE_AGAIN}"
        )
    top1 = top1_by_name(student.logits, student.card["classes"], student.labels, student.images.classes)
    client.set_model_version_tag(version.name, version.version, "top1", repr(top1))
    _say(f"{_named(version)} was loaded back and predicts what was recorded: top-1 {top1:.4f}")
    return top1


def _champion(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """Give the champion; None where there is none, as after it was deleted in MLflow, or its files are gone."""
    champion = registry.by_alias(client, name, "champion")
    if champion and not registry.is_whole(client, champion):
        _say(f"of the champion before, version {champion.version}, the files are gone")
        return None
    return champion


def _challenge(
    client: "MlflowClient",
    params: Params,
    student: finished.Student,
    version: "ModelVersion",
    top1: float,
    champion: "ModelVersion | None",
) -> tuple[bool, str, "ModelVersion | None"]:
    """Compare a version with the champion; where there is none, with the best of the others, which need no margin.

    Returns:
        whether it becomes the champion, why, and with which version it was compared last.
    """
    if champion:
        return *_compare(client, params, student, top1, champion, params.register_.margin), champion
    promoted, why, rival = True, f"top-1 {top1:.4f}, and there is no other to compare it with", None
    for rival in registry.best(client, version, student.test_digest, student.images.classes):
        promoted, why = _compare(client, params, student, top1, rival, margin=0.0)
        if not promoted:
            break
    return promoted, why, rival


def _compare(
    client: "MlflowClient",
    params: Params,
    student: finished.Student,
    top1: float,
    champion: "ModelVersion",
    margin: float,
) -> tuple[bool, str]:
    """Say whether the challenger replaces the champion, or another version that stands in for one, and why.

    A champion that was tested on other images is tested anew, on these. One that knows classes which the challenger
    lacks is not replaced, whatever its top-1: who relies on it would miss them.
    """
    card = registry.card_of(client, champion)
    lost = sorted(set(card["classes"]) - set(student.images.classes))
    if lost:
        return False, (
            f"version {champion.version} knows classes that this one lacks ({len(lost)}, such as {lost[0]!r}); "
            "give this one another register.name, or set the alias by hand"
        )
    if champion.tags.get("digest.test") == student.test_digest and "top1" in champion.tags:
        best = float(champion.tags["top1"])
    else:
        with registry.loaded(client, champion) as model:
            crop = float(champion.tags.get("test_crop", params.views.test_crop))
            what = "the champion on these test images"
            logits = _ask(model, student, student.rows, card["resolution"], crop, params, what)
        best = top1_by_name(logits, card["classes"], student.labels, student.images.classes)
    promoted = decide(top1, best, margin)
    verb = "beats" if promoted else "does not beat"
    by = f" by the margin of {margin:g}" if margin > 0 else ""
    if champion.tags.get("digest.test") != student.test_digest:
        by += "; that one had other test images: its score is too good if it learned from some of these"
    return promoted, f"top-1 {top1:.4f} {verb} version {champion.version}'s {best:.4f}{by}"


def _ask(
    model: Any, student: finished.Student, rows: np.ndarray, resolution: int, crop: float, params: Params, what: str
) -> np.ndarray:
    """Give a loaded network's logits (N, C) for test images."""
    import torch

    from pipeline.core.data import batches
    from pipeline.core.progress import Progress

    views, found = batches.CleanViews(student.images, resolution, crop), []
    with Progress(len(rows), "images", f"register: {what}") as progress:
        for batch, logits in batches.ask(model, views, rows, params.machine.workers, torch.device("cpu")):
            found.append(logits.numpy())
            progress.update(len(batch.rows))
    return np.concatenate(found)


def _tolerance(student: finished.Student) -> float:
    return TOLERANCE_GPU if student.evaluated_on_gpu else TOLERANCE


def _number(version: "ModelVersion | None") -> str | None:
    return version.version if version else None


def _named(version: "ModelVersion") -> str:
    return f"{version.name} version {version.version}"


def _say(words: str) -> None:
    print(f"register: {words}", flush=True)


if __name__ == "__main__":
    stage.main(run, __doc__, instead={"--if-missing": run_if_missing})
