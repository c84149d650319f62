"""Compares records of soft labels: bytes a view against what they lose of the teacher's answer, KL(dense, stored).

    python benchmarks/records.py                        1,000-class answers, made as said below
    python benchmarks/records.py --smooth               the same of a teacher trained with label smoothing
    python benchmarks/records.py --temperature 4        the same as a loss at this temperature sees it
    python benchmarks/records.py --project . ../other   also answers of data/teacher about views of data/prepare there
    python benchmarks/records.py --plot docs/records.png

The made answers are a linear classifier's over features, as a network's last layer is. 1,000 class vectors in 2,048
dimensions have three levels of likeness (20 groups of 5 groups of 10 classes). An image's feature is its class' vector
and noise with a power-law spectrum (the variance of the i-th direction is as 1/i: Stringer et al., Nature 2019, found
it in cortex and in networks), of a size that differs between images (log-normal, sigma 0.5). The noise is set so that
top-1 is 0.84, as published for ResNeXt101_32x16d_wsl, the logits' scale so that the mean confidence is 0.80. --smooth
mixes in a tenth of an answer eight times as flat.

The others: TinyViT's record, k classes as int16 and probabilities as float16 and 4 bytes of seed, the rest spread
evenly (Wu et al., arXiv:2207.10666, and its code); FKD's marginal smoothing, k classes and probabilities as float16
(Shen and Xing, arXiv:2112.01528, section 3.3), its crop's coordinates not counted. This project's sizes are those of
the record; a view's key and count, 9 bytes, and its place in the index, 12, stand apart: the others find a view by its
place in a file.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.core import devices, networks, params, teaching
from pipeline.core.data.batches import Views, load
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.softlabels.records import MOST_CLASSES, Coding, dense

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Record(NamedTuple):
    """One way to store answers."""

    kind: str
    setting: str
    size: float  # bytes a record, mean
    stored: Tensor  # (B, C) what can be read from it


class Measured(NamedTuple):
    """What one way to store answers costs and loses."""

    kind: str
    setting: str
    size: float  # bytes a record, mean
    lost: float  # KL(dense, stored), nats, mean
    lost_back: float  # KL(stored, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=8192, help="answers to compare on (default: 8192)")
    parser.add_argument("--smooth", action="store_true", help="a teacher trained with label smoothing")
    parser.add_argument(
        "--project", type=Path, nargs="+", default=[], help="also the answers of these projects' teachers"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="compare what a loss at it sees (default: 1)")
    parser.add_argument("--plot", type=Path, help="draw the tables as a PNG file")
    arguments = parser.parse_args()
    made = made_logits(arguments.views, arguments.smooth)
    tables = {"made answers": compare("made answers", made, arguments.temperature)}
    for project in arguments.project:
        name = project.resolve().name
        tables[name] = compare(name, real_logits(project, arguments.views), arguments.temperature)
    if arguments.plot:
        plot(tables, arguments.plot)


def compare(name: str, logits: Tensor, temperature: float) -> list[Measured]:
    """Print and give the table of all records of some answers (B, C)."""
    teacher = torch.softmax(logits.double(), 1)
    beyond = 1 - teacher.topk(min(10, logits.shape[1])).values.sum(1).mean()
    print(
        f"\n{name}: {len(logits):,} over {logits.shape[1]:,} classes; mean confidence "
        f"{teacher.max(1).values.mean():.3f}, mass beyond the 10 most probable {beyond:.4f}\n"
    )
    print("| record | setting | bytes | KL(dense, stored) | KL(stored, dense) |\n|---|---|---|---|---|")
    table = []
    for record in [*others(teacher), *ours(logits)]:
        measured = measure(record, teacher, temperature)
        table.append(measured)
        print(
            f"| {measured.kind} | {measured.setting} | {measured.size:.1f} | {measured.lost:.2e} | "
            f"{measured.lost_back:.2e} |"
        )
    return table


def made_logits(count: int, smooth: bool, classes: int = 1000, dimensions: int = 2048) -> Tensor:
    """Make logits (count, classes) as the docstring says."""
    random = np.random.default_rng(0)
    groups, parts, own = (random.standard_normal((n, dimensions)) for n in (20, 100, classes))
    vectors = 0.6 * groups[np.arange(classes) % 20] + 0.5 * parts[np.arange(classes) % 100] + 0.62 * own
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    basis, _ = np.linalg.qr(random.standard_normal((dimensions, dimensions)))
    spectrum = np.arange(1, dimensions + 1) ** -0.5
    labels = random.integers(0, classes, count)
    noise = (random.standard_normal((count, dimensions)) * (spectrum / np.linalg.norm(spectrum))) @ basis.T
    noise = noise @ vectors.T * np.exp(random.normal(0, 0.5, (count, 1)))
    clean = (vectors @ vectors.T)[labels]
    size = bisect(lambda size: -((clean + size * noise).argmax(1) == labels).mean(), -0.84, 0.1, 100)
    logits = torch.from_numpy(clean + size * noise)
    scale = bisect(lambda scale: torch.softmax(scale * logits, 1).max(1).values.mean().item(), 0.80, 1, 200)
    if not smooth:
        return (scale * logits).float()
    return (0.9 * torch.softmax(scale * logits, 1) + 0.1 * torch.softmax(scale * logits / 8, 1)).log().float()


def bisect(rising, wanted: float, low: float, high: float) -> float:
    """Find where a rising function has a value."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return low


def real_logits(project: Path, count: int) -> Tensor:
    """Ask a project's teacher about views of its training images."""
    settings = params.load(project / "params.yaml")
    images = ImageSet(project / "data/prepare/images")
    device = devices.join(settings.machine).device
    classifier, _ = networks.load(project / "data/teacher", device)
    rows = images.rows("labelled", "unlabelled")
    replicas, rows = np.arange(count) // len(rows), np.resize(rows, count)
    batches = [(rows[at : at + 128], replicas[at : at + 128]) for at in range(0, count, 128)]
    views = Views(images, ViewSpec.of(settings.seed, settings.views))
    answers = [
        teaching.answer(classifier, batch.pixels.to(device), settings.teacher.precision).cpu()
        for batch in load(views, batches, 0, device)
    ]
    return torch.cat(answers)


def others(teacher: Tensor) -> Iterator[Record]:
    """TinyViT's record and FKD's."""
    values, order = teacher.sort(1, descending=True)
    for kind, k, size in [
        *(("TinyViT", k, 4 * k + 4) for k in (10, 50, 100)),
        *(("FKD, marginal smoothing", k, 4 * k) for k in (5, 10)),
    ]:
        if k <= teacher.shape[1]:
            top = values[:, :k].half().double()
            each = (1 - top.sum(1, keepdim=True)).clamp(min=0) / max(1, teacher.shape[1] - k)
            stored = each.repeat(1, teacher.shape[1]).scatter(1, order[:, :k], top)
            yield Record(kind, f"k = {k}", size, stored)


def ours(logits: Tensor) -> Iterator[Record]:
    """This project's record: with a fixed number of classes, and with those above a probability."""
    classes = logits.shape[1]
    fixed = [("fixed number", Coding(classes, k, 0, 5), f"k = {k}, 5 bits") for k in (10, 32, 64, 100) if k < classes]
    by_probability = [
        ("above a probability", Coding(classes, MOST_CLASSES, least, bits), f"from {least:g} on, {bits} bits")
        for bits in (4, 5, 6, 8, 12)
        for least in (1e-3, 3e-4, 2e-4, 1e-4, 5e-5, 1e-5)
    ]
    for kind, coding, setting in fixed + by_probability:
        records = coding.encode(logits)
        stored = dense(coding.decode(records), classes).double()
        yield Record(f"ours, {kind}", setting, len(records.content) / len(logits), stored)


def measure(record: Record, teacher: Tensor, temperature: float) -> Measured:
    """Compare what is stored with what the teacher said, both at a temperature."""
    stored = (record.stored / record.stored.sum(1, keepdim=True)).clamp(min=1e-12)  # some keep nothing of the rest
    expected, stored = (torch.softmax(each.log() / temperature, 1) for each in (teacher.clamp(min=1e-300), stored))
    ratio = expected.clamp(min=1e-300).log() - stored.log()
    lost, lost_back = (expected * ratio).sum(1).mean().item(), -(stored * ratio).sum(1).mean().item()
    return Measured(record.kind, record.setting, record.size, lost, lost_back)


def plot(tables: dict[str, list[Measured]], path: Path) -> None:
    """Draw bytes against loss, both on logarithmic axes, a panel for each teacher's answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 8 if len(tables) == 1 else 5 * len(tables)
    figure, panels = pyplot.subplots(1, len(tables), figsize=(width, 5), layout="constrained", squeeze=False)
    for axes, (name, table) in zip(panels[0], tables.items(), strict=True):
        draw(axes, table)
        axes.set(title=name, xlabel="bytes a record")
    panels[0, 0].set_ylabel("KL(dense, stored), nats")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def draw(axes: "Axes", table: list[Measured]) -> None:
    """Draw one panel."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    kinds = {
        "TinyViT": "s",
        "FKD, marginal smoothing": "D",
        "ours, fixed number": "o",
        "ours, above a probability": "^",
    }
    for number, (kind, marker) in enumerate(kinds.items()):
        rows = [row for row in table if row.kind == kind]
        if rows:
            sizes, lost = [row.size for row in rows], [row.lost for row in rows]
            axes.scatter(sizes, lost, marker=marker, color=f"C{number}", label=kind)
    peer = next((row for row in table if (row.kind, row.setting) == ("TinyViT", "k = 100")), None)
    if peer:
        line = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}
        axes.axhline(peer.lost, **line, label="TinyViT's k = 100: its loss, and a quarter of its bytes")
        axes.axvline(peer.size / 4, **line)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    main()
