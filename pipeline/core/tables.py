"""Tables as CSV text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Write rows as CSV, each line ended by a line feed.

    Args:
        columns: in order; needed where there may be no row.
    """
    out = io.StringIO()
    table = csv.DictWriter(out, columns or list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()
