"""Print what a soft-label cache holds, and check every byte of it.

    python -m pipeline.core.softlabels [FOLDER]      default: data/cache

It needs neither the teacher nor the images. Whether the teacher still says the same: python -m pipeline.audit
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipeline.core.softlabels import SoftLabels, read_description, read_summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.core.softlabels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/cache"), help="default: data/cache")
    arguments = parser.parse_args()
    try:
        summary = read_summary(arguments.folder)
        SoftLabels(arguments.folder, read_description(arguments.folder)).verify()
    except (ValueError, OSError) as error:
        sys.exit(f"softlabels: error: {error}")
    except KeyboardInterrupt:
        print("softlabels: stopped", file=sys.stderr)
        sys.exit(130)
    print(describe(arguments.folder, summary))


def describe(folder: Path, summary: dict[str, Any]) -> str:
    """Say for people what `cache.json` says."""
    teacher, views = summary["teacher"], summary["views"]
    stored, wanted = summary["stored_views"], summary["wanted_views"]
    others = f", and {stored - wanted:,} others" if stored > wanted else ""
    coding = f"at most {summary['top_k']} classes from {summary['min_probability']:g} on, {summary['bits']} bits each"
    sees = f", sees views of {teacher['resized_to']} pixels" if "resized_to" in teacher else ""
    shards = f"{summary['shards']:,} shard{'' if summary['shards'] == 1 else 's'}"
    lines = {
        "folder": f"{folder}, format {summary['format']}, fingerprint {summary['fingerprint'][:16]}",
        "teacher": f"{teacher['model']}, {summary['num_classes']:,} classes, weights {teacher['digest'][:16]}{sees}",
        "views": ", ".join(f"{key} {value}" for key, value in views.items()),
        "stored": f"{stored:,} views in {shards}",
        "coverage": f"all {wanted:,} that the last run asked for{others}",
        "coding": coding,
        "bytes": f"{summary['bytes']:,}, {summary['bytes_per_view']} a view with its key and its place in the index",
        "checksums": "all hold",
    }
    return "\n".join(f"{name:10} {value}" for name, value in lines.items())


if __name__ == "__main__":
    main()
