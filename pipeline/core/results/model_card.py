"""The model card: what a registered network is, what it is worth, where it comes from, how to use it, in Markdown.

After Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993. The card's text is model_card.md.j2.
"""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

import models
from pipeline.core.sections import TIMM

NETWORKS = {"teacher": "teacher", "baseline": "student on labels alone", "student": "**this network**"}
COLUMNS = {"top1": "top-1", "top5": "top-5", "nll": "NLL", "ece": "ECE"}
RECIPE = ("seed", "views", "teacher", "mine", "cache", "student", "distill", "finetune", "fixres")
MOST_CLASSES = 20  # whose names are written out


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # of Markdown
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    model = network["model"].partition(".")[0]
    return environment.get_template("model_card.md.j2").render(
        name=name,
        summary=summary(network, figures, params["teacher"]["model"]),
        results=results(figures),
        resolution=network["resolution"],
        count=network["num_classes"],
        named=[_code(one) for one in network["classes"][:MOST_CLASSES]],
        near_copies=figures.get("near_copies"),
        agreement=figures["student"]["agreement"],
        kept=network.get("kept"),
        rank_by=params["mine"]["rank_by"],
        crop=params["views"]["test_crop"],
        init=params["student"]["init"],
        teacher=params["teacher"],
        TIMM=TIMM,
        recipe=yaml.safe_dump({key: params[key] for key in RECIPE}, sort_keys=False, allow_unicode=True),
        images=images,
        mined=mined,
        lineage=lineage,
        dirty=lineage.get("git.dirty"),
        no_onnx=no_onnx,
        model=model,
        own=models.is_own(model),
        timm_name=_timm_name(model),
    )


def _code(name: str) -> str:
    """A name as Markdown shows it unread; of backticks in it, the longest row is shorter than those around it."""
    rows = re.findall("`+", name)
    fence = "`" * (1 + max(map(len, rows), default=0))
    return f"{fence} {name} {fence}" if rows else f"`{name}`"


def _timm_name(model: str) -> str | None:
    """The network of timm's that takes a network's weights, without the name of weights; None where none does."""
    name = models.BY_NAME[model].timm_name if model in models.BY_NAME else model
    return name and name.partition(".")[0]
