"""Print the table of networks as Markdown: name, timm's name, size, and what was published of its weights.

It reads and writes nothing. To run it: python -m models
"""

from models.networks import TABLE, Network

HEAD = ("network", "timm", "parameters", "GMACs", "top-1", "top-5", "pixels", "teacher", "data")


def row(network: Network) -> tuple[str, ...]:
    """Give one network's cells as text."""
    published = network.top1 is not None
    return (
        network.name,
        network.same_as if isinstance(network.same_as, str) else "",
        f"{network.parameters:,}",
        f"{network.macs / 1e9:.2f}",
        f"{100 * network.top1:.2f} %" if published else "",
        f"{100 * network.top5:.2f} %" if published else "",
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
    print(table())
