"""Deletion study: what a trained network loses when parts of it are deleted, and nothing is trained again.

Veit et al., arXiv:1605.06431, sections 4.1 and 4.2: a residual network of n blocks is a collection of 2^n paths, half
of which do not pass through a given block; so it loses little by little, where a plain network breaks at once.

    python studies/deletion.py                              the prepared images of the project in this folder
    python studies/deletion.py --networks residual-20 plain-20

Of a residual network, blocks of two convolutions are deleted: the shortcut stays, with the projection where it changes
shape. Of a plain one, single convolutions with their norm, those that do not change shape. First each part alone, then
n at random. Writes deletion.png and deletion.csv (a row a deletion). Networks are those of studies/depth.py, with its
options, and trained where they are not yet; kept, by whatever version of the code, in PROJECT/.scratch/studies.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
from depth import COLOURS, LABELS, Row, write
from timm.models.resnet import BasicBlock
from torch import nn
from trained import Data, Settings, check, error, main, network, positive

from models import narrow
from models.blocks import NoShortcut
from pipeline.core import atomic
from pipeline.core.progress import Progress

COLUMNS = ("network", "how", "deleted", "draw", "parts", "test_error")


def parts(network: nn.Module) -> list[str]:
    """Name what can be deleted of a narrow network, from the first layer to the last."""
    found = []
    for name, block in network.named_modules():
        if isinstance(block, BasicBlock) and not isinstance(block.downsample, NoShortcut):
            found.append(name)
        elif isinstance(block, BasicBlock):
            same = {at: getattr(block, f"conv{at}") for at in (1, 2)}
            found += [f"{name}.conv{at}" for at, conv in same.items() if keeps_shape(conv)]
    return found


def keeps_shape(convolution: nn.Conv2d) -> bool:
    return convolution.in_channels == convolution.out_channels and convolution.stride == (1, 1)


def without(network: nn.Module, deleted: list[str]) -> nn.Module:
    """Copy a network without some of its parts.

    Raises:
        ValueError: a name that is not among `parts`.
    """
    if unknown := set(deleted) - set(parts(network)):
        raise ValueError(f"{', '.join(sorted(unknown))}: no part of the network that can be deleted")
    left = copy.deepcopy(network)
    for name in deleted:
        block = left.get_submodule(name)
        if isinstance(block, BasicBlock):
            left.set_submodule(name, nn.Sequential(block.downsample or nn.Identity(), block.act2))
        else:
            left.set_submodule(name, nn.Identity())
            left.set_submodule(name.replace(".conv", ".bn"), nn.Identity())
    return left


def deletions(names: list[str], counts: list[int], draws: int, seed: int) -> list[tuple[str, int, list[str]]]:
    """List what to delete: nothing, each part alone, and of each number some random sets; all parts are one set.

    Returns:
        how ("none", "one", "random"), the draw's number, and the parts' names.
    """
    wanted = [("none", 0, []), *(("one", at, [name]) for at, name in enumerate(names))]
    for count in counts:
        for draw in range(draws if count < len(names) else 1):
            random = np.random.default_rng([seed, count, draw])
            chosen = sorted(random.choice(len(names), count, replace=False))
            wanted.append(("random", draw, [names[at] for at in chosen]))
    return wanted


def counts_up_to(most: int, points: int = 10) -> list[int]:
    """Choose numbers of parts from 1 to `most`, close together at first."""
    return sorted({round(float(value)) for value in np.geomspace(1, most, points)})


def which(name: str) -> tuple[str, int]:
    """Read a network's name: its kind and its depth.

    Raises:
        ValueError: it is not of the form KIND-DEPTH.
    """
    kind, _, depth = name.partition("-")
    if kind not in narrow.KINDS or not depth.isdigit():
        raise ValueError(
            f"{name!r}: no network's name; it should be KIND-DEPTH, as residual-56, of {', '.join(narrow.KINDS)}"
        )
    return kind, int(depth)


def summary(table: list[Row], name: str) -> tuple[float, float, float, float]:
    """Give a network's error: whole; with one part deleted, mean and worst; with about half of them, mean."""
    rows = [row for row in table if row["network"] == name]
    single = [row["test_error"] for row in rows if row["how"] == "one"]
    count = min({row["deleted"] for row in rows}, key=lambda value: abs(value - len(single) / 2))
    half = [row["test_error"] for row in rows if row["how"] == "random" and row["deleted"] == count]
    return whole(rows), sum(single) / len(single), max(single), sum(half) / len(half)


def whole(rows: list[Row]) -> float:
    """Give the error of the whole network."""
    return next(row["test_error"] for row in rows if row["how"] == "none")


def plot(table: list[Row], chance: float, path: Path) -> None:
    """Draw the error over the number deleted (mean and range of the draws), and over the place of a single one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    names = sorted({row["network"] for row in table}, key=lambda name: (which(name)[0], -which(name)[1]))
    for name in names:
        rows = [row for row in table if row["network"] == name]
        kind, depth = which(name)
        deepest = depth == max(which(other)[1] for other in names if which(other)[0] == kind)
        line = {"color": COLOURS[kind], "linestyle": "-" if deepest else "--", "linewidth": 1.5}
        by_count: dict[int, list[float]] = {0: [100 * whole(rows)]}
        for row in rows:
            if row["how"] == "random":
                by_count.setdefault(row["deleted"], []).append(100 * row["test_error"])
        counts = sorted(by_count)
        means = [np.mean(by_count[count]) for count in counts]
        what = f"{depth} layers ({counts[-1]} {'layers' if kind == 'plain' else 'blocks'} can go)"
        left.plot(counts, means, marker="o", markersize=4, label=f"{LABELS[kind]}, {what}", **line)
        low, high = ([edge(by_count[count]) for count in counts] for edge in (min, max))
        left.fill_between(counts, low, high, color=COLOURS[kind], alpha=0.1, linewidth=0)
        single = [row for row in rows if row["how"] == "one"]
        places = np.linspace(0, 1, len(single)) if len(single) > 1 else [0.5]
        values = [100 * row["test_error"] for row in single]
        right.plot(places, values, marker="o", markersize=4, **line)
        # a stage's first block, where a residual network changes the shape
        first = [at for at, row in enumerate(single) if row["parts"] in ("layer2.0", "layer3.0")]
        right.plot([places[at] for at in first], [values[at] for at in first], "s", markersize=9, color=COLOURS[kind])
        right.axhline(100 * whole(rows), linewidth=0.8, color=COLOURS[kind], linestyle=":")
    for axes in (left, right):
        axes.axhline(100 * chance, color="grey", linewidth=0.8, label="the most frequent class, always")
    left.set(
        xlabel="parts deleted, at random", ylabel="test error, %", title="Several deleted: mean and range of draws"
    )
    title = "One deleted (dotted: none; square: changes the shape)"
    right.set(xlabel="its place", title=title, xticks=[0, 1], xticklabels=["first", "last"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def study(arguments: argparse.Namespace, settings: Settings, data: Data) -> None:
    """Measure the networks that are asked for, with parts deleted; write the table and the plot, and print means."""
    wanted = [which(name) for name in arguments.networks]
    check(wanted, settings)
    table: list[Row] = []
    for name, (kind, depth) in zip(arguments.networks, wanted, strict=True):
        classifier, _ = network(kind, depth, arguments.seed, settings, data)
        names = parts(classifier)
        todo = deletions(names, counts_up_to(len(names)), arguments.draws, arguments.seed)
        with Progress(len(todo), "deletions", f"deletion: {name}") as progress:
            for how, draw, deleted in todo:
                figure = round(error(without(classifier, deleted), data.test), 6)
                chosen = " ".join(part.removeprefix("network.") for part in deleted)
                values = (name, how, len(deleted), draw, chosen, figure)
                table.append(dict(zip(COLUMNS, values, strict=True)))
                progress.update()
    write(arguments.out / "deletion.csv", COLUMNS, table)
    chance = 1 - data.test[1].bincount().max().item() / len(data.test[1])
    with atomic.replacing(arguments.out / "deletion.png") as beside:
        plot(table, chance, beside)
    print("\n| network | whole | one part deleted, mean | worst | half of them deleted, mean |\n|---|---|---|---|---|")
    for name in arguments.networks:
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in summary(table, name)) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["residual-56", "residual-20", "plain-20", "plain-8"]
    parser.add_argument("--networks", nargs="+", default=networks, help=f"default: {' '.join(networks)}")
    parser.add_argument("--draws", type=positive, default=10, help="random sets of each number (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and draws (default: 0)")
    main(study, parser)
