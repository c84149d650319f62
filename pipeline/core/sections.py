"""The sections of `params.yaml`, as types: what keys each has, and what values a key takes."""

import difflib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from pipeline.core.sharing import images_at_once

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Range = tuple[Positive, Positive]
Spread = Annotated[float, Field(gt=0, le=1)]
TIMM = "timm"  # in the place of a file of weights: timm's pretrained ones
HARD = "hard"  # hard labels, as a loss that is weighed beside those against the teacher
HIGH_TEMPERATURE = 2.0  # above it, losses weigh classes that the teacher finds improbable
# the names of losses.DISTILLATION; importing that would load torch, which takes seconds
LOSSES = (
    "ssld", "js", "kl", "cross_entropy", "dkd", "tckd", "nckd", "dist", "dist_inter", "dist_intra", HARD
)  # fmt: skip


class Section(BaseModel):
    """A part of params.yaml: every key must be there, none else may be, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _refuse_true_for_a_number(cls, value: Any, look: ValidatorFunctionWrapHandler) -> Any:
        """Refuse true and false where pydantic has made 1 and 0 of them; where they are meant, it leaves them."""
        checked = look(value)
        if checked is not value:
            for each in value if isinstance(value, list) else [value]:
                _refuse_bool(each)
        return checked


def _refuse_bool(value: Any) -> None:
    if isinstance(value, bool):
        raise ValueError(f"should be a number, not {str(value).lower()}")


def _say_both(value: Any, look: Callable[[Any], Any]) -> Any:
    """Check a value that is a number or auto; pydantic would name the two as if they were keys."""
    try:
        return look(value)
    except ValidationError as error:
        least = error.errors()[0].get("ctx", {}).get("ge")
        number = "a whole number" if least is None else f"a whole number from {least} on"
        raise ValueError(f"should be auto or {number}, not {value!r}") from None


def nearest(key: str, known: list[str]) -> str:
    """Say what was meant by a wrong name, or what there is."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


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
    labelled_root: Text
    train: str
    val: str | None
    test: str | None
    val_share: Share
    test_share: Share
    unlabelled_root: Text
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
        taken = {
            f"{part}_share": getattr(self, f"{part}_share") for part in ("val", "test") if getattr(self, part) is None
        }
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
            raise ValueError(f"crop_scale must be [least, most], ascending and at most 1, not {list(self.crop_scale)}")
        if self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be [least, most], ascending, not {list(self.crop_ratio)}")
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
        images_at_once(self.batch_size, self.accumulate)
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
    checkpoint: Text | None
    init: Text | None
    resolution: Count | None
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
        if self.source != "fit" and self.init:
            raise ValueError(
                f"source {self.source} takes a teacher as it is: set source to fit to train it further, or init to null"
            )
        if self.source == "fit" and (self.mean or self.std):
            raise ValueError("mean and std are of a teacher trained elsewhere: set them to null to fit one here")
        return self


class Score(Section):
    batch_size: Count


LEAST_TO_LEARN = 10  # fewest pool and fewest validation images that `mine.rank_by: likeness` learns from


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
    init: Text | None


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
    register_: Register = Field(alias="register")  # `register` is a method of pydantic's models

    @property
    def teacher_sees(self) -> int:
        """The pixels a side of the images that the teacher's network sees."""
        return self.teacher.resolution or self.views.resolution

    @model_validator(mode="after")
    def _fixres_is_larger(self) -> "Params":
        if self.fixres.resolution < self.views.resolution:
            raise ValueError(
                f"fixres.resolution is {self.fixres.resolution}, less than views.resolution, {self.views.resolution}"
            )
        return self
