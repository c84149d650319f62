"""Runs the pipeline once a seed, each in a workspace of its own, and prints mean and spread of every network's scores.

    python benchmarks/seeds.py                      three seeds of the settings in params.yaml
    python benchmarks/seeds.py 0 1 2 3 4 -S distill.loss=kl

A seed that has been run with the same settings, by whatever version of the code, is read from .scratch/runs and not run
again: remove that folder where the code has changed.
"""

import argparse
import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine

from pipeline.core import params
from pipeline.core.running import params_file
from pipeline.core.running.programs import Programs
from pipeline.core.sections import Params

COLUMNS = ("top1", "nll", "ece", "errors")
NETWORKS = ("teacher", "baseline", "distill", "finetune", "fixres")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("-S", "--set-param", metavar="KEY=VALUE", action="append", default=[], help="a changed setting")
    arguments = parser.parse_args()
    changes = changed_settings(arguments.set_param)
    scores = [run(seed, changes) for seed in arguments.seeds]
    print(f"{len(scores)} seeds ({', '.join(map(str, arguments.seeds))}); {machine()}\n")
    print(table(scores))


def changed_settings(given: list[str]) -> dict:
    """Read what -S gives: KEY=VALUE each."""
    return {key: params.parse(value) for key, _, value in (it.partition("=") for it in given)}


def table(scores: list[dict]) -> str:
    """Write a row a network: mean and spread of its scores over runs."""
    lines = ["| network | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for network in NETWORKS:
        cells = [cell([score[network][column] for score in scores]) for column in COLUMNS]
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(seed: int, changes: dict, *options: str) -> dict:
    """Give the metrics of a run with a seed; run it where that has not been done, with more options for the flow."""
    found = known(seed, changes)
    if found is None:
        settings = [f"-S{key}={json.dumps(value)}" for key, value in {**changes, "seed": seed}.items()]
        command = [sys.executable, "-m", "pipeline.flow", *settings, *options]
        with Programs(Path.cwd(), os.environ, grace=10) as programs:  # it ends with this program, however this one ends
            code = programs.run(command, partial(print, flush=True))
        if code:
            sys.exit(f"seed {seed}: the flow ended with exit code {code}; its last lines above say why")
        found = known(seed, changes)
    assert found is not None
    return found


def known(seed: int, changes: dict) -> dict | None:
    """Give the metrics of a run with a seed that has been done; None: it has not."""
    settings = params_file.changed(Path(), {**changes, "seed": seed})
    folder = finished(params.check(settings))
    return folder and json.loads((folder / "metrics.json").read_text())


def finished(wanted: Params) -> Path | None:
    """The folder of a run that ended well with these settings, the machine's own left out."""
    for file in Path(".scratch/runs").glob("[!.]*/params.yaml"):
        try:
            same = params.load(file).model_copy(update={"machine": wanted.machine}) == wanted
            if same and (file.parent / "metrics.json").exists():
                return file.parent
        except ValueError:  # of another version of the settings
            continue
    return None


def cell(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    digits = 1 if statistics.mean(values) >= 2 else 4
    return f"{statistics.mean(values):.{digits}f} ± {spread(values):.{digits}f}"


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
