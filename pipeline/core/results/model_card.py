"""The model card: what a registered network is, what it is worth, where it comes from, how to use it, in Markdown.

After Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993.
"""

import re
from typing import Any

import yaml

import models
from pipeline.core.sections import TIMM

NETWORKS = {"teacher": "teacher", "baseline": "student on labels alone", "student": "**this network**"}
COLUMNS = {"top1": "top-1", "top5": "top-5", "nll": "NLL", "ece": "ECE"}
RECIPE = ("seed", "views", "teacher", "mine", "cache", "student", "distill", "finetune", "fixres")
SPLITS = {
    "labelled": "with labels",
    "unlabelled": "in the pool, of which mining took {mined:,}",
    "val": "for validation, to choose between networks and to rank the pool; no network learned their labels",
    "test": "for the numbers above, not learned from",
}
TEACHERS = {
    "fit": "The teacher was fitted here{start}, {on}.",
    "timm": "The teacher has timm's pretrained weights.",
    "checkpoint": "The teacher's weights came from a checkpoint, `{checkpoint}`.",
}
FITTED_ON = {
    "withheld": "with the labels of all training images, of those too, if any, that the student saw without",
    "labelled": "with the same labels",
}
BACK = """Check out the commit, put these two in place of its own, and `dvc pull` brings those very files back, where
they were pushed."""
COMMIT = {  # by what the tag git.dirty says
    "false": BACK,
    "true": f"{BACK} But settings, code, packages or .dvc files had changes that are in no commit (`git.dirty`); of "
    "those, the settings alone are here.",
    "unknown": f"{BACK} But whether settings, code, packages or .dvc files had changes that are in no commit is not "
    "known (`git.dirty`).",
    None: "The code was in no commit.",
}
MOST_CLASSES = 20  # whose names are written out

ONNX = """`student.onnx` is
the same network for where torch is not: for ONNX Runtime, TensorRT, OpenVINO and others.

```python
import mlflow, numpy as np, onnxruntime
mlflow.set_tracking_uri("sqlite:///mlflow.db")  # or the server's address
file = mlflow.artifacts.download_artifacts("models:/{name}@champion/student.onnx")
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])  # "CUDAExecutionProvider": on a GPU
(logits,) = session.run(["logits"], {{"pixels": np.zeros((7, 3, {resolution}, {resolution}), np.float32)}})
```"""

CARD = """# {name}

{summary}

## What it is worth

On the {test:,} images of the test split:

{results}

`report.html` beside this card says more: accuracy by class, confusions, calibration, the wrong answers, speed.

## What goes in, what comes out

- In: `float32`, shape (B, 3, {resolution}, {resolution}), RGB, channels first, any batch size. **Values are 0 to 255,
  as in the image**: the network normalises them itself, so neither divide by 255 nor subtract a mean.
- An image becomes such an input as `pixels_of` below says: turned upright by its EXIF tag, converted to 8-bit RGB
  (transparency on white), {square} cut out, resized with Pillow's bicubic filter.
- Out: logits, shape (B, {count}). `softmax` makes probabilities of them, `argmax` a class. The classes, in order:
  {classes}.

## How to load it

Nothing is unpickled: `MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false` may be set.

```python
import mlflow, numpy as np
mlflow.set_tracking_uri("sqlite:///mlflow.db")  # or the server's address
model = mlflow.pyfunc.load_model("models:/{name}@champion")
logits = model.predict(np.zeros((1, 3, {resolution}, {resolution}), np.float32))  # (1, {count}) numpy array
```

```python
import mlflow, torch
network = mlflow.pytorch.load_model("models:/{name}@champion")
with torch.inference_mode():
    logits = network(torch.zeros(7, 3, {resolution}, {resolution}))  # (7, {count})
```

```python
import numpy as np, torch
from PIL import Image, ImageOps

def pixels_of(file):  # an image of 8 bits a channel; gives (1, 3, {resolution}, {resolution})
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    side = {crop:.10g} * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = left, top, left + side, top + side
    image = image.resize(({resolution}, {resolution}), Image.Resampling.BICUBIC, square)
    return torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None]
```

Both are an exported program: it runs on the CPU, and cannot be trained further. {onnx}

The weights alone are in `weights.safetensors`, and `network.json` says what they are of. With this project's code they
make a network that can be moved to a GPU and trained further: `pipeline.core.networks.load(folder, device="cuda")[0]`.
Without it, {elsewhere}.

## What it was trained on

{data}

Only the labelled images' labels reached the student; of all others it learned what the teacher says. {start}{teacher}

## Recipe

```yaml
{recipe}```

## Where it comes from

{lineage}

`params.yaml` beside this card holds every setting, `dvc.lock` (where the pipeline ran through DVC) the digest of every
file that went in. {commit}

## Limits

- It knows the classes above and no others, and gives one of them to any image whatever.
- The numbers hold for images like those of the test split. How it does on others, or on groups of people or things that
  are rare in it, nobody has measured.
- It inherits its teacher's mistakes: it agrees with the teacher on {agreement} of the test images.
- A probability of it is as good as its ECE says, on images like the test split's; on others usually worse.

## Licence

The code has the project's licence. The weights were learned from the images and from the teacher's answers: what their
licences ask for (the images', and that of weights which teacher or student started from) holds for these weights, too.
"""


def description(name: str, version: str, network: dict[str, Any], figures: dict[str, Any], teacher: str) -> str:
    """Write what the registry's page of a version says: the card's essence, in MLflow's 5,000 characters."""
    size = network["resolution"]
    return f"""{summary(network, figures, teacher)}

{results(figures)}

In: RGB pixels (B, 3, {size}, {size}) float32, 0 to 255 as in the image. Out: logits (B, {network["num_classes"]}).

```python
model = mlflow.pyfunc.load_model("models:/{name}/{version}")
```

More in this version's files: `README.md` (the model card, with other ways to load it), `report.html`,
`weights.safetensors`, `params.yaml`.
"""


def summary(network: dict[str, Any], figures: dict[str, Any], teacher: str) -> str:
    """Say in two sentences what the network is and what it is worth."""
    student, alone = figures["student"]["top1"], figures["baseline"]["top1"]
    return (
        f"{network['model']}, {network['parameters']:,} parameters, for {network['num_classes']} classes at "
        f"{network['resolution']} pixels, distilled from {teacher} (SSLD). "
        f"Top-1 on the test split: {student:.4f} (the teacher {figures['teacher']['top1']:.4f}, "
        f"the same network on labels alone {alone:.4f})."
    )


def results(figures: dict[str, Any]) -> str:
    """Make the table of metrics, a network a row."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | parameters |", "|---|" + "---|" * (len(COLUMNS) + 1)]
    for name, words in NETWORKS.items():
        numbers = " | ".join(f"{figures[name][key]:.4f}" for key in COLUMNS)
        lines.append(f"| {words} | {numbers} | {figures[name]['parameters']:,} |")
    return "\n".join(lines)


def in_full(
    name: str,
    network: dict[str, Any],
    figures: dict[str, Any],
    params: dict[str, Any],
    images: dict[str, int],
    mined: int,
    lineage: dict[str, str],
    no_onnx: str = "",
) -> str:
    """Write the card.

    Args:
        name: of the registered model.
        network: the student's network.json.
        figures: the evaluation's metrics.json.
        params: all settings.
        images: how many there are in each split.
        mined: how many the student learned from of those without labels.
        lineage: what leads back to data, teacher, labels, settings and commit: the version's tags.
        no_onnx: why the version has no ONNX file, where it has none.
    """
    teacher = params["teacher"]
    crop = params["views"]["test_crop"]
    known = [_code(one) for one in network["classes"][:MOST_CLASSES]]
    rest = network["num_classes"] - len(known)
    return CARD.format(
        name=name,
        summary=summary(network, figures, teacher["model"]),
        test=images["test"],
        results=results(figures),
        resolution=network["resolution"],
        crop=crop,
        square="the largest centre square" if crop == 1 else f"a centre square of {crop:.4g} of the shorter side",
        count=network["num_classes"],
        classes=", ".join(known) + (f" and {rest:,} more (`network.json`)" if rest else ""),
        data="\n".join(f"- {count:,} images {SPLITS[split].format(mined=mined)}" for split, count in images.items()),
        start=_start(params["student"]["init"]),
        teacher=_teacher(teacher),
        commit=COMMIT[lineage.get("git.dirty")],
        recipe=yaml.safe_dump({key: params[key] for key in RECIPE}, sort_keys=False, allow_unicode=True),
        lineage="\n".join(f"- {key}: `{value}`" for key, value in lineage.items()),
        onnx=_onnx(name, network["resolution"], no_onnx),
        elsewhere=_elsewhere(network),
        agreement=f"{figures['student']['agreement']:.1%}",
    )


def _code(name: str) -> str:
    """A name as Markdown shows it unread; of backticks in it, the longest row is shorter than those around it."""
    rows = re.findall("`+", name)
    fence = "`" * (1 + max(map(len, rows), default=0))
    return f"{fence} {name} {fence}" if rows else f"`{name}`"


def _start(init: str | None) -> str:
    """Say what weights the student started from, if any."""
    if init is None:
        return ""
    weights = "timm's pretrained weights" if init == TIMM else f"the weights in `{init}`"
    return f"But it started from {weights}, and so from what those had learned, labels included. "


def _teacher(settings: dict[str, Any]) -> str:
    """Say where the teacher comes from."""
    init = settings["init"]
    start = "" if init is None else " from timm's pretrained weights" if init == TIMM else f" from `{init}`"
    words = {"start": start, "on": FITTED_ON[settings["fit_on"]], "checkpoint": settings["checkpoint"]}
    return TEACHERS[settings["source"]].format(**words)


def _onnx(name: str, resolution: int, missing: str) -> str:
    """Say how the ONNX file is used, or why there is none."""
    return f"There is no ONNX file of it: {missing}." if missing else ONNX.format(name=name, resolution=resolution)


def _elsewhere(network: dict[str, Any]) -> str:
    """Say what takes the weights where this project's code is not."""
    model = network["model"].partition(".")[0]
    if models.is_own(model):
        return f"code of its makers takes them: `{model}`, in `models/own.py` of that commit"
    timm_name = models.BY_NAME[model].timm_name if model in models.BY_NAME else model
    if timm_name is None:
        return f"nothing takes them: timm has no {model}"
    timm_name = timm_name.partition(".")[0]
    return (
        f'`timm.create_model("{timm_name}", num_classes={network["num_classes"]})` takes them, for pixels from 0 to 1, '
        "less the `mean` and divided by the `std` of `network.json`"
    )
