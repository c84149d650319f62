"""Print the table of networks as Markdown: name, timm's name, size, and what was published of its weights.

It reads and writes nothing. To run it: python -m models
"""

import signal

from models.networks import TABLE, Network

HEAD = ("network", "timm", "parameters", "GMACs", "top-1", "top-5", "pixels", "teacher", "data")


def row(network: Network) -> tuple[str, ...]:
    """Give one network's cells as text."""
    return (
        network.name,
        network.timm_name or "",
        f"{network.parameters:,}",
        f"{network.macs / 1e9:.2f}",
        *("" if share is None else f"{100 * share:.2f} %" for share in (network.top1, network.top5)),
        str(network.resolution),
        network.teacher or "",
        network.data or "",
    )


def table() -> str:
    """Give the whole table, and where its figures are from."""
    rows = [HEAD, ("---",) * len(HEAD), *map(row, TABLE)]
    sources = dict.fromkeys(network.source for network in TABLE if network.source)
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([*lines, "", "Published figures from: " + "; ".join(sources) + "."])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` does not read all
    print(table())
