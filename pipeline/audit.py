"""Ask the teacher again about a random share of the soft-label cache, and compare.

Reads data/prepare, data/mine, data/teacher and data/cache; writes nothing. Other arithmetic (another processor, another
number of threads) may move a stored number by a step of its rounding; a view whose stored answer has lost more than
the coding loses, by 0.001 nat of KL(teacher now, stored), is wrong: it is named, and the command ends with 1.

    python -m pipeline.audit                        a hundredth of the views, at least 256
    python -m pipeline.audit --share 0.1 --seed 3
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from pipeline.core import devices, errors, teaching
from pipeline.core.labelling import Labelling
from pipeline.core.params import load
from pipeline.core.recheck import Findings, recheck
from pipeline.core.running import commands
from pipeline.core.sections import Params

LEAST_VIEWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.01, help="of the cache's views (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of views (default: 0)")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings file (default: params.yaml)")
    arguments = parser.parse_args()
    if not 0 < arguments.share <= 1:
        parser.error("--share is a number above 0, up to 1")
    with commands.ending("audit"):
        try:
            findings = audit(load(arguments.params), arguments.share, arguments.seed)
        except (RuntimeError, MemoryError) as error:
            if not errors.out_of_memory(error):
                raise
            raise ValueError("out of memory: halve cache.batch_size, or set machine.device to cpu") from None
    print(report(findings))
    sys.exit(1 if findings.wrong.any() else 0)


def audit(params: Params, share: float, seed: int) -> Findings:
    """Compare a random share of the views that training would read with what the teacher says now.

    Raises:
        ValueError: the cache is not there, damaged, or of another teacher or other views.
    """
    labelling = Labelling.of(params, devices.join(params.machine))
    labels = teaching.open_labels(labelling.description)
    total = len(labelling)
    chosen = spread(total, min(total, max(LEAST_VIEWS, round(share * total))), seed)
    return recheck(labelling, labels, chosen, "audit")


def spread(total: int, count: int, seed: int) -> np.ndarray:
    """Draw (count,) int64 numbers below `total`, ascending, one of each of as many equal parts.

    To draw from all at once would take 8 bytes for each of them, and they may be billions.
    """
    bounds = np.linspace(0, total, count + 1).astype(np.int64)
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])


def report(findings: Findings) -> str:
    """Say for people what was found."""
    lines = [
        f"audit: {len(findings.same):,} views asked again, {findings.same.sum():,} of them the same to the bit",
        f"audit: KL(teacher now, stored) {findings.lost.mean():.2e} nats a view, at most {findings.lost.max():.2e}; "
        f"the coding alone loses {findings.lost_by_coding.mean():.2e}",
    ]
    bad = np.flatnonzero(findings.wrong)
    for at in bad[:10]:
        sample, replica = findings.samples[at], findings.replicas[at]
        lines.append(f"audit: wrong: sample {sample:016x}, replica {replica}: {findings.lost[at]:.2e} nats")
    if len(bad):
        lines.append(
            f"audit: {len(bad):,} views are wrong: `dvc repro --force --single-item cache` mends damage; where it says "
            "that the teacher answers otherwise, remove data/cache first"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
