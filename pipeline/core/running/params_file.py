"""params.yaml as a file: read as it stands, checked with changes, and written with them and its comments.

What the stages import is params.py; no stage imports this, so a change here reruns nothing.
"""

from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline.core import atomic, params
from pipeline.core.sections import Params


def read(root: Path) -> dict[str, Any]:
    """Give what a tree's params.yaml holds, unchecked."""
    return params.parse((root / "params.yaml").read_text(encoding="utf-8"))


def changed(root: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Give what a tree's params.yaml holds, with the changes; neither is checked for more than unknown keys.

    Raises:
        ValueError: an unknown key.
    """
    return params.with_changes(read(root), changes)


def check(root: Path, changes: dict[str, Any]) -> Params:
    """Make sure that params.yaml is right, and so with the changes; give the settings with them.

    Raises:
        ValueError: one line that names the wrong key or value, and the nearest right key.
    """
    params.load(root / "params.yaml")
    return params.check(changed(root, changes), "params.yaml with the changes")


def write(root: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Write a tree's params.yaml with the changes into a folder, which may be the tree itself; comments stay.

    Raises:
        ValueError: its sections share values, so that a change of one would be one of others.
    """
    text = YAML()
    text.width, text.preserve_quotes = 4096, True
    text.Representer = _Representer
    document, wanted = text.load((root / "params.yaml").read_text(encoding="utf-8")), changed(root, changes)
    for name, section in wanted.items():
        _replace(document, name, section)
    with atomic.replacing(folder / "params.yaml") as beside, beside.open("w", encoding="utf-8") as file:
        text.dump(document, file)
        file.flush()
        if params.parse(beside.read_text(encoding="utf-8")) != wanted:
            raise ValueError(
                "params.yaml: what its sections share (&, *, <<) cannot be changed in one of them: write it out in each"
            )


def _replace(document: CommentedMap, name: str, new: Any) -> None:
    """Write what differs of a section, or of a key outside of sections, into a commented document, in place."""
    where, values = (document[name], new) if isinstance(new, dict) else (document, {name: new})
    for key, value in values.items():
        if where.get(key) != value:
            where[key] = _on_one_line(value) if isinstance(value, list | dict) else value
            if key in where.ca.items:
                where.ca.items[key][3] = None  # what stood between the key and a list of a line each
            _align(where, key)


def _align(section: CommentedMap, key: str) -> None:
    """Put a key's comment below the section's others: a value that was too long for their column may be gone."""
    comments = {name: tokens[2] for name, tokens in section.ca.items.items() if tokens[2]}
    if key in comments and len(comments) > 1:
        comments[key].column = mode(comment.column for name, comment in comments.items() if name != key)


def _on_one_line(values: list[Any] | dict[str, Any]) -> CommentedSeq | CommentedMap:
    line = CommentedMap(values) if isinstance(values, dict) else CommentedSeq(values)
    line.fa.set_flow_style()
    return line


class _Representer(RoundTripRepresenter):
    """How values are written: a class of its own, since what is added to ruamel's counts for all that it writes."""

    def number(self, value: float) -> ScalarNode:
        """Write it without an exponent, which not every reader of YAML takes for one: to PyYAML, 7e-05 is a text."""
        return self.represent_scalar("tag:yaml.org,2002:float", np.format_float_positional(value, trim="0"))

    def text(self, value: str) -> ScalarNode:
        """Write it in quotes where without them it would be read as something else."""
        try:
            read = params.parse(value)
        except ValueError:
            read = None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if read == value else '"')

    def null(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(float, _Representer.number)
_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(type(None), _Representer.null)
