"""The settings: `params.yaml` as typed, checked sections. A wrong key or value is one line that names it."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Range = tuple[Positive, Positive]
Spread = Annotated[float, Field(gt=0, le=1)]
HARD = "hard"  # hard labels, as a loss that is weighed beside those against the teacher
LOSSES = (
    "ssld", "js", "kl", "cross_entropy", "dkd", "tckd", "nckd", "dist", "dist_inter", "dist_intra", HARD
)  # fmt: skip


class Section(BaseModel):
    """A part of params.yaml: every key must be there, none else may be, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take for 1 or 0."""
        if cls.model_fields[str(info.field_name)].annotation is bool:
            return value
        for each in value if isinstance(value, list) else [value]:
            _refuse_bool(each)
        return value


def _refuse_bool(value: Any) -> None:
    if isinstance(value, bool):
        raise ValueError(f"should not be {str(value).lower()}, for which YAML takes yes, no, on and off, too")


def _say_both(value: Any, look: Callable[[Any], Any]) -> Any:
    """Check a value that is a number or auto; pydantic would name the two as if they were keys."""
    try:
        return look(value)
    except ValidationError as error:
        least = error.errors()[0].get("ctx", {}).get("ge")
        number = "a whole number" if least is None else f"a whole number from {least} on"
        raise ValueError(f"should be auto or {number}, not {value!r}") from None


class Machine(Section):
    device: Literal["auto", "cpu", "cuda"]
    processes: Annotated[Count | Literal["auto"], WrapValidator(_say_both)]
    restarts: CountOrZero
    workers: Annotated[CountOrZero | Literal["auto"], WrapValidator(_say_both)]
    checkpoint_seconds: NotNegative
    keep_checkpoints: Count
    checkpoint_activations: bool
    compile: bool
    cuda_graphs: bool
    cudnn_benchmark: bool
    deterministic: bool
    profile_steps: CountOrZero

    @model_validator(mode="after")
    def _one_choice_of_algorithms(self) -> "Machine":
        if self.cudnn_benchmark and self.deterministic:
            raise ValueError("cudnn_benchmark takes what is fastest that day, deterministic the same always: not both")
        return self


class Digits(Section):
    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    near_copies: CountOrZero
    no_class: CountOrZero


class Prepare(Section):
    labelled_root: str
    train: str
    val: str | None
    test: str | None
    val_share: Share
    test_share: Share
    unlabelled_root: str
    unlabelled: str | None
    images_per_class: Count | None
    labels_per_class: Count | None
    max_pixels: Count
    max_refused_share: Share
    max_side: Count | None
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] | None
    shard_mb: Count

    @model_validator(mode="after")
    def _it_can_be_done(self) -> "Prepare":
        for key in ("labelled_root", "unlabelled_root"):
            if getattr(self, key).startswith("~"):
                raise ValueError(f"{key} begins with ~: write the path out, DVC takes ~ for a folder's name")
        taken = {f"{part}_share": getattr(self, f"{part}_share") for part in ("val", "test") if not getattr(self, part)}
        if sum(taken.values()) >= 1:
            raise ValueError(f"{' and '.join(taken)} take all of train: together they must be below 1")
        if self.max_side is not None and self.jpeg_quality is None:
            raise ValueError("max_side needs jpeg_quality, 1 to 100: images are encoded anew; 90 is a usual one")
        return self


class Views(Section):
    resolution: Count
    crop_scale: Range
    crop_ratio: Range
    flip: Share
    randaugment_ops: CountOrZero
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)]
    mix_probability: Share
    mixup_alpha: NotNegative
    cutmix_alpha: NotNegative
    test_crop: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "Views":
        if not self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be [least, most] with most not above 1")
        if self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError("crop_ratio must be [least, most]")
        return self


class TrainingRecipe(Section):
    """How a network is trained: what every training stage has."""

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: Count
    optimizer: Literal["sgd", "adamw"]
    lr: Positive
    warmup_epochs: NotNegative
    weight_decay: NotNegative
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    precision: Literal["float32", "bfloat16"]

    @model_validator(mode="after")
    def _parts_have_two_images(self) -> "TrainingRecipe":
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} in {self.accumulate} parts (accumulate) leaves a part fewer than two "
                "images, and BatchNorm needs two"
            )
        return self

    @model_validator(mode="after")
    def _the_warm_up_ends(self) -> "TrainingRecipe":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs, {self.warmup_epochs:g}, must not be more than epochs, {self.epochs}")
        return self


class StudentRecipe(TrainingRecipe):
    """What a stage has besides that trains a student, which may go on from weights made elsewhere."""

    lr_multipliers: tuple[NotNegative, NotNegative, NotNegative, NotNegative, NotNegative] | None


class Teacher(TrainingRecipe):
    model: str
    source: Literal["fit", "timm", "checkpoint"]
    checkpoint: str | None
    mean: tuple[Share, Share, Share] | None
    std: tuple[Spread, Spread, Spread] | None
    fit_on: Literal["withheld", "labelled"]
    label_smoothing: Share

    @model_validator(mode="after")
    def _it_fits_its_source(self) -> "Teacher":
        if self.source == "checkpoint" and not self.checkpoint:
            raise ValueError("source checkpoint needs teacher.checkpoint, the path of a file")
        if self.source != "checkpoint" and self.checkpoint:
            raise ValueError(
                f"source {self.source} does not read the file that checkpoint names: set source to checkpoint, or "
                "checkpoint to null"
            )
        if self.source == "fit" and (self.mean or self.std):
            raise ValueError("mean and std are of a teacher trained elsewhere: set them to null to fit one here")
        return self


class Score(Section):
    batch_size: Count


class Mine(Section):
    per_class: Count
    classes_per_image: Count
    rank_by: Literal["likeness", "probability"]
    min_score: Share
    copy_similarity: Annotated[float, Field(gt=0, le=1)]


class Cache(Section):
    replicas: Count
    top_k: int = Field(ge=1, le=255)
    min_probability: Share
    bits: int = Field(ge=2, le=16)
    batch_size: Count
    shard_views: int = Field(ge=1, le=1_000_000)


class Student(Section):
    model: str
    init: str | None


class Baseline(StudentRecipe):
    label_smoothing: Share


class Distill(StudentRecipe):
    loss: dict[str, NotNegative]
    temperature: Positive
    online: bool

    @field_validator("loss", mode="before")
    @classmethod
    def _names_are_known(cls, value: Any) -> Any:
        """Take a plain name as that loss with weight 1."""
        weights = {value: 1.0} if isinstance(value, str) else value
        if not isinstance(weights, dict):
            raise ValueError(f"should be the name of a loss, or weights of several such as {{ssld: 1.0, {HARD}: 0.1}}")
        for name, weight in weights.items():
            _refuse_bool(weight)
            if name not in LOSSES:
                raise ValueError(f"no loss is called {name!r}{nearest(str(name), list(LOSSES))}")
        return weights

    @field_validator("loss")
    @classmethod
    def _a_teacher_is_heard(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weight for name, weight in weights.items() if name != HARD):
            raise ValueError(f"a weight above 0 is needed of a loss other than {HARD}: nothing else asks the teacher")
        return weights


class Fixres(TrainingRecipe):
    resolution: Count
    label_smoothing: Share


class Evaluate(Section):
    batch_size: Count
    bins: Count
    speed_seconds: Positive


class Register(Section):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]  # MLflow takes more, but not everywhere the same
    margin: Share


class Params(Section):
    """All of params.yaml, a section an attribute."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    machine: Machine
    digits: Digits
    prepare: Prepare
    views: Views
    teacher: Teacher
    score: Score
    mine: Mine
    cache: Cache
    student: Student
    baseline: Baseline
    distill: Distill
    finetune: Distill
    fixres: Fixres
    evaluate: Evaluate
    register_: Register = Field(alias="register")

    @model_validator(mode="after")
    def _fixres_is_larger(self) -> "Params":
        if self.fixres.resolution < self.views.resolution:
            raise ValueError(
                f"fixres.resolution is {self.fixres.resolution}, less than views.resolution, {self.views.resolution}"
            )
        return self


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file.

    Raises:
        ValueError: the file is missing or not YAML, or a key or a value is wrong: one line that names it.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run from the project's root, or name one with --params") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return check(data, str(path))


def check(data: Any, where: str = "params.yaml") -> Params:
    """Turn the content of a params file into typed sections.

    Raises:
        ValueError: one line with the first wrong key or value, and the nearest right key.
    """
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ValueError(f"{where}: expected sections with keys, found {found}")
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        # A misspelt key is reported twice, as unknown and as missing: the unknown one says what to mend.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ValueError(f"{where}: {_explain(first)}") from None


def with_changes(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a params file's content with some keys changed.

    Args:
        data: the content of params.yaml.
        changes: key to value; a key is dotted ("distill.epochs"), or a section's name with a dict of its keys.

    Raises:
        ValueError: a key that `data` does not have; the nearest one is named.
    """
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not name and isinstance(value, dict) and isinstance(changed.get(section), dict):
            changed = with_changes(changed, {f"{section}.{inner}": new for inner, new in value.items()})
        elif name and isinstance(changed.get(section), dict) and name in changed[section]:
            changed[section][name] = value
        elif not name and section in changed and not isinstance(changed[section], dict):
            changed[section] = value
        elif isinstance(changed.get(key), dict):
            raise ValueError(
                f"{key}: a section; name one of its keys: {', '.join(f'{key}.{name}' for name in changed[key])}"
            )
        else:
            raise ValueError(f"{key}: unknown key{nearest(key, _known_keys(data))}")
    return changed


def _known_keys(data: dict[str, Any]) -> list[str]:
    inner = [f"{section}.{name}" for section, value in data.items() if isinstance(value, dict) for name in value]
    return inner + list(data)


def nearest(key: str, known: list[str]) -> str:
    """Say what was meant by a wrong name, or what there is."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _explain(error: dict[str, Any]) -> str:
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(key, _keys_beside(place))}"
    if error["type"] == "missing" and place[-1].isdigit():
        return f"{'.'.join(place[:-1])}: should be more numbers than {place[-1]}"
    if error["type"] == "too_long":
        return f"{key}: should be {error['ctx']['max_length']} numbers, not {error['ctx']['actual_length']}"
    if error["type"] == "missing":
        return f"{key}: missing; every key must be there"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    value = error["input"]
    told = isinstance(value, dict) or error["type"] == "value_error"
    return f"{key}: {message}".removeprefix(": ") + ("" if told else f", not {value!r}")


def _keys_beside(place: list[str]) -> list[str]:
    """The right keys at the place of a wrong one, dotted."""
    sections = {field.alias or name: field.annotation for name, field in Params.model_fields.items()}
    if len(place) == 1:
        return list(sections)
    return [f"{place[0]}.{name}" for name in sections[place[0]].model_fields]
