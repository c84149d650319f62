"""Depth study: plain against residual networks as depth grows, the error on training images too.

He et al., arXiv:1512.03385, section 1 and figure 6: past some depth a plain network gets worse, on the very images that
it is trained on, so it is not overfitting; a residual one does not. Goyal et al., arXiv:1706.02677, section 5.1: blocks
that start as the identity (their last norm is zero) are easier still.

    python studies/depth.py                                 the prepared images of the project in this folder
    python studies/depth.py --project DIR --depths 8 20     of another, with these depths

Writes depth.png and depth.csv (a row an epoch of each network). Networks that are trained are kept, by whatever version
of the code, in PROJECT/.scratch/studies: remove that folder where the code has changed.
"""

import argparse
import csv
from pathlib import Path

from trained import Data, Settings, check, main, network, positive

from models import narrow
from pipeline.core import atomic

COLOURS = {"plain": "tab:red", "residual": "tab:blue", "identity": "tab:green"}
LABELS = {"plain": "plain", "residual": "residual", "identity": "residual, identity at first"}
FIGURES = ("train_loss", "train_error", "test_error")
COLUMNS = ("kind", "depth", "seed", "epoch", *FIGURES)
Row = dict[str, str | float]


def write(path: Path, columns: tuple[str, ...], table: list[Row]) -> None:
    """Write rows as CSV."""
    with atomic.replacing(path) as beside, beside.open("w", newline="") as file:
        rows = csv.DictWriter(file, columns, lineterminator="\n")
        rows.writeheader()
        rows.writerows(table)


def mean(table: list[Row], kind: str, depth: int, what: str) -> float:
    """Average a figure of the last epoch over seeds."""
    last = max(row["epoch"] for row in table)
    values = [row[what] for row in table if (row["kind"], row["depth"], row["epoch"]) == (kind, depth, last)]
    return sum(values) / len(values)


def plot(table: list[Row], path: Path) -> None:
    """Draw the last epoch's errors over depth, and the training error over epochs; lines are means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    depths, kinds = sorted({row["depth"] for row in table}), list(dict.fromkeys(row["kind"] for row in table))
    figure, (left, *others) = pyplot.subplots(
        1, 1 + len(kinds), figsize=(5 + 2.8 * len(kinds), 4.8), layout="constrained", sharey=True,
        width_ratios=[1.6, *[1] * len(kinds)],
    )  # fmt: skip
    for kind in kinds:
        for what, style in (("train_error", "--"), ("test_error", "-")):
            values = [100 * mean(table, kind, depth, what) for depth in depths]
            label = f"{LABELS[kind]}: {'training' if what == 'train_error' else 'test'} images"
            left.plot(depths, values, style, marker="o", markersize=4, color=COLOURS[kind], label=label)
    left.set(xlabel="layers", ylabel="error, %", title="After the last epoch", xticks=depths)
    for kind, axes in zip(kinds, others, strict=True):
        for at, depth in enumerate(depths):
            rows = [row for row in table if (row["kind"], row["depth"]) == (kind, depth)]
            epochs = sorted({row["epoch"] for row in rows})
            of = {epoch: [100 * row["train_error"] for row in rows if row["epoch"] == epoch] for epoch in epochs}
            strength = (at + 1) / len(depths)
            line = {"color": COLOURS[kind], "alpha": 0.25 + 0.75 * strength, "linewidth": 0.8 + 1.6 * strength}
            axes.plot(epochs, [sum(of[epoch]) / len(of[epoch]) for epoch in epochs], label=f"{depth} layers", **line)
        axes.set(xlabel="epoch", title=f"{LABELS[kind]}:\ntraining images".replace(", ", ",\n"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, loc="lower left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def study(arguments: argparse.Namespace, settings: Settings, data: Data) -> None:
    """Train the networks that are asked for; write the table and the plot, and print the last epoch's errors."""
    wanted = [(kind, depth, seed) for seed in arguments.seeds for depth in arguments.depths for kind in arguments.kinds]
    check([(kind, depth) for kind, depth, _ in wanted], settings)
    table: list[Row] = []
    for number, (kind, depth, seed) in enumerate(wanted, start=1):
        print(f"depth: network {number} of {len(wanted)}: {kind}, {depth} layers, seed {seed}", flush=True)
        _, history = network(kind, depth, seed, settings, data)
        for epoch in history:
            figures = {key: round(epoch[key], 6) for key in FIGURES}
            table.append({"kind": kind, "depth": depth, "seed": seed, "epoch": int(epoch["epoch"]), **figures})
    write(arguments.out / "depth.csv", COLUMNS, table)
    with atomic.replacing(arguments.out / "depth.png") as beside:
        plot(table, beside)
    print(
        "\n| layers | "
        + " | ".join(f"{kind}: {what}" for kind in arguments.kinds for what in ("training", "test"))
        + " |"
    )
    print("|---" * (1 + 2 * len(arguments.kinds)) + "|")
    for depth in arguments.depths:
        means = [mean(table, kind, depth, what) for kind in arguments.kinds for what in ("train_error", "test_error")]
        print(f"| {depth} | " + " | ".join(f"{100 * value:.1f} %" for value in means) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--depths", type=positive, nargs="+", default=[8, 20, 32, 56], help="6n + 2 (default: 8 20 32 56)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=narrow.KINDS, default=narrow.KINDS[:2], help="default: plain residual"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and order (default: 0)")
    main(study, parser)
