"""What is looked at before `make repro` or a flow starts anything, so that a mistake is named at once.

No stage imports this, so a change here reruns nothing. Run: python -m pipeline.core.running.preflight
"""

import ast
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.core import atomic, errors, stage
from pipeline.core.intake import sources
from pipeline.core.params import load, parse
from pipeline.core.running import commands, timm_weights
from pipeline.core.sections import HIGH_TEMPERATURE, TIMM, Params
from pipeline.core.sharing import images_at_once

if TYPE_CHECKING:
    from pipeline.core.networks import Classifier

PROJECT = Path(__file__).parents[3]
EXAMPLE = "data/digits"  # what stage digits makes
NOTED = Path(".scratch/preflight.json")  # the networks that were looked at last, and found good
SMALL_ENOUGH = 1e-9  # a cache.min_probability that keeps NCKD's gradients
CLASSES = 10  # the number makes no difference here, and the images' own is not known yet


class Asked(NamedTuple):
    """What the settings ask of the networks."""

    teacher: tuple[str, dict[str, int]]  # its name, and the pixels a side of what it is shown, by the key that says so
    student: tuple[str, dict[str, int]]
    from_timm: list[str]  # the keys that ask for timm's weights
    lr_multipliers: dict[str, tuple[float, ...] | None]  # by stage


def check(params: Params, root: Path) -> None:
    """Make sure that images, weights and the GPU are there, and that the networks are known and take the images.

    Args:
        root: the project's root, from which the settings' paths lead.

    Raises:
        ValueError: one line that names the key.
    """
    check_files(params, root)
    check_batches(params)
    warn_of_tails(params)
    if params.machine.device == "cuda":
        from pipeline.core import devices  # torch takes seconds to load

        devices.join(params.machine)
    check_networks(params, root)
    timm_weights.fetch(params, root, _asked(params).from_timm)


def check_git(root: Path) -> None:
    """Make sure that the project is in a Git repository, as DVC asks for.

    Raises:
        ValueError: it is in none, and DVC was not told to do without (core.no_scm).
    """
    files = (root / ".dvc" / name for name in ("config", "config.local"))
    if any("no_scm" in file.read_text(encoding="utf-8") for file in files if file.exists()):
        return
    if not any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents)):
        raise ValueError("this folder is in no Git repository, as DVC wants: clone the project, or run `git init`")


def check_files(params: Params, root: Path) -> None:
    """Make sure that files and folders are there, all but the example's, which the first stage makes.

    Raises:
        ValueError: see `check`.
    """
    written = [Path(os.path.abspath(root / "data" / name)) for name in _stages(PROJECT)]
    for key in ("labelled_root", "unlabelled_root"):
        path = getattr(params.prepare, key)
        if not _is_example(path) and not (root / path).exists():
            raise ValueError(f"prepare.{key}: {path}: no such folder or archive")
        place = Path(os.path.abspath(root / path))
        within = not _is_example(path) and any(place.is_relative_to(folder) for folder in written)
        if within or any(place in folder.parents for folder in written):
            raise ValueError(f"prepare.{key}: {path}: holds what the stages write; take a folder such as data/photos")
    train = root / params.prepare.labelled_root / params.prepare.train
    for role in ("train", "val", "test", "unlabelled"):
        path = params.prepare.unlabelled_root if role == "unlabelled" else params.prepare.labelled_root
        inner = getattr(params.prepare, role)
        if not _is_example(path) and inner is not None:
            sources.check_there(role, root / path, inner)
            sources.check_apart(role, root / path, inner, train)
    checkpoint = params.teacher.checkpoint if params.teacher.source == "checkpoint" else None
    starts = {key: init for key, init in _starts(params).items() if init != TIMM}
    for key, file in {"teacher.checkpoint": checkpoint, **starts}.items():
        if not file:
            continue
        if not (root / file).is_file():
            raise ValueError(f"{key}: {file}: no such file")
        watched = f"data/weights/{key.partition('.')[0]}"
        if not Path(os.path.abspath(root / file)).is_relative_to(os.path.abspath(root / watched)):
            raise ValueError(f"{key}: {file}: not in {watched}, where DVC sees it change; move it there, or link it")


def check_batches(params: Params) -> None:
    """Make sure that processes can share each stage's batches; a stage with fewer images than one looks again itself.

    Raises:
        ValueError: see `check`.
    """
    count = stage.processes_of(params.machine)
    fitted = ["teacher"] if params.teacher.source == "fit" else []
    for name in (*fitted, "baseline", "distill", "finetune", "fixres"):
        recipe = getattr(params, name)
        with _named(name):
            images_at_once(recipe.batch_size, recipe.accumulate, count)


def warn_of_tails(params: Params) -> None:
    """Say where a loss weighs what the cache does not store class by class; a sure teacher's gradient is far off then.

    NCKD divides by the probability of all classes but the likeliest, and a high temperature evens probabilities out.
    SSLD's loss is not named: it weighs what the student finds probable, and that is soon what the teacher does.
    """
    for name in ("distill", "finetune"):
        recipe = getattr(params, name)
        if recipe.online or params.cache.min_probability <= SMALL_ENOUGH:
            continue
        losses = [loss for loss in ("dkd", "nckd") if recipe.loss.get(loss)]
        if losses or recipe.temperature > HIGH_TEMPERATURE:
            why = f"loss {losses[0]}" if losses else f"temperature {recipe.temperature:g}"
            print(
                f"preflight: warning: {name}.{why} weighs classes that the teacher finds improbable. Of those below "
                f"cache.min_probability, {params.cache.min_probability:g}, the cache stores "
                f"only the sum, so gradients may be far off. Lower it, to {SMALL_ENOUGH:.9f} say, before soft labels "
                f"are made, or set {name}.online",
                flush=True,
            )


def check_networks(params: Params, root: Path) -> None:
    """Make sure that the networks are known and fit the settings; those of the last time are not built again.

    Raises:
        ValueError: see `check`.
    """
    asked = _asked(params)
    check_own_file(PROJECT)
    note = json.loads(json.dumps(asked._asdict() | {"made_by": _made_by()}))  # as it is read: with lists for tuples
    with contextlib.suppress(OSError, ValueError):  # no note, or none that can be read
        if json.loads((root / NOTED).read_text(encoding="utf-8")) == note:
            return
    _look_at(asked, params)
    with contextlib.suppress(OSError):  # another run writes its own: no matter
        atomic.write_json(root / NOTED, note)


def _asked(params: Params) -> Asked:
    seen_by_teacher = "teacher.resolution" if params.teacher.resolution else "views.resolution"
    seen_by_student = {"views.resolution": params.views.resolution, "fixres.resolution": params.fixres.resolution}
    weights = {"teacher.source": params.teacher.source, **_starts(params)}
    return Asked(
        teacher=(params.teacher.model, {seen_by_teacher: params.teacher_sees}),
        student=(params.student.model, seen_by_student),
        from_timm=[key for key, value in weights.items() if value == TIMM],
        lr_multipliers={name: getattr(params, name).lr_multipliers for name in ("baseline", "distill", "finetune")},
    )


def _made_by() -> list[str]:
    """Say which code builds the networks and looks at them."""
    core = ("running/preflight.py", "networks.py", "network_checks.py", "small_maps.py", "train/optimizers.py")
    files = *sorted((PROJECT / "models").glob("*.py")), *(PROJECT / "pipeline/core" / name for name in core)
    code = b"".join(file.read_bytes() for file in files)
    return [version("timm"), version("torch"), hashlib.sha256(code).hexdigest()]


def _look_at(asked: Asked, params: Params) -> None:
    import torch  # with timm, it takes seconds to load

    import models
    from pipeline.core import networks
    from pipeline.core.network_checks import RESIZE_TEACHER, check_takes
    from pipeline.core.train import optimizers

    built = {}
    for who, (name, resolutions), remedy in (
        ("teacher", asked.teacher, RESIZE_TEACHER),
        ("student", asked.student, ": set views.resolution and fixres.resolution to that"),
    ):
        with _named(f"{who}.model"), torch.device("cpu" if models.is_own(name) else "meta"):  # there, none is drawn
            built[who] = networks.build(name, CLASSES, seed=0)
        for key, resolution in resolutions.items():
            with _named(f"{who}.model, {key}"):
                check_takes(built[who], name, resolution, CLASSES, remedy)
                if models.is_own(name):
                    show_black_images(built[who], name, resolution)
    student, resolutions = asked.student
    for resolution in set(resolutions.values()):  # the student may end with either
        with _named("student.model"):
            check_exports(built["student"], student, resolution)
    for key in asked.from_timm:
        model = getattr(params, key.partition(".")[0]).model
        if not models.has_pretrained(model):
            raise ValueError(f"{key}: timm has no pretrained weights of {model}")
    for stage_name, numbers in asked.lr_multipliers.items():
        if numbers is not None:
            with _named(stage_name):
                optimizers.multipliers_and_weights(built["student"].network, getattr(params, stage_name))


def check_own_file(project: Path) -> None:
    """Make sure that models/own.py imports nothing of the project that DVC does not watch with it.

    Raises:
        ValueError: it does.
    """
    file = project / "models/own.py"
    with_it = [deps for deps in _stages(project).values() if "models/own.py" in deps]
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            of = f"models.{node.module or ''}".rstrip(".") if node.level else str(node.module)
            names = [of, *(f"{of}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = project.joinpath(*name.split("."))
            for source in (place.with_suffix(".py"), place / "__init__.py"):
                if source.is_file() and not all(str(source.relative_to(project)) in deps for deps in with_it):
                    unseen = f"models/own.py imports {name}, whose changes DVC would not see"
                    raise ValueError(f"{unseen}: have its code in models/own.py, or install it")


def _stages(project: Path) -> dict[str, set[str]]:
    """What each stage of dvc.yaml reads.

    Raises:
        ValueError: the file is not as it should be.
    """
    try:
        stages = parse((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        return {name: set(stage.get("deps", ())) for name, stage in stages.items()}
    except ValueError as error:
        raise ValueError(f"dvc.yaml: {error}") from None
    except (TypeError, KeyError, AttributeError):
        raise ValueError("dvc.yaml: expected stages, and of each what it runs and reads") from None


def show_black_images(classifier: "Classifier", name: str, resolution: int) -> None:
    """Ask a network of one's own about two black images, as the stages do: its weights and maps are channels-last.

    Raises:
        ValueError: it fails, or answers with probabilities.
    """
    import torch

    classifier.eval().to(memory_format=torch.channels_last)
    black = torch.zeros(2, 3, resolution, resolution).to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            logits, _ = classifier.embed(black)
    except Exception as error:  # whatever its code may raise
        words = f"{type(error).__name__}: {errors.in_a_line(error)}"
        raise ValueError(f"{name} fails on black images of {resolution} pixels ({words}); see models/own.py") from None
    if (logits >= 0).all() and torch.allclose(logits.float().sum(1), torch.ones(2), atol=1e-3):
        raise ValueError(f"{name} answers with probabilities, not with logits: leave out the softmax at its end")


def check_exports(student: "Classifier", name: str, resolution: int) -> None:
    """Make sure that a network can be exported, for any number of images, as the registry has it; nothing is computed.

    Raises:
        ValueError: it cannot.
    """
    import torch

    from pipeline.core import small_maps

    student = small_maps.exportable(student).to("meta").eval()
    pixels = torch.empty(2, 3, resolution, resolution, device="meta")
    try:
        with torch.no_grad():
            torch.export.export(student, (pixels,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:  # torch's own classes for it, and whatever its code may raise
        words = f"{type(error).__name__}: {errors.in_a_line(error)}"
        raise ValueError(f"{name} cannot be exported, so it could not be registered ({words[:300]})") from None


def _is_example(path: str) -> bool:
    return os.path.normpath(path) == EXAMPLE


def _starts(params: Params) -> dict[str, str | None]:
    """The weights that teacher and student are to go on from."""
    return {"teacher.init": params.teacher.init, "student.init": params.student.init}


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Say of what key an error speaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def main() -> None:
    """Check params.yaml, and what it names."""
    with commands.ending("preflight"):
        check(load(), Path())
        check_git(Path())


if __name__ == "__main__":
    main()
