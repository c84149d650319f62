"""Recipes: settings of whole runs, each a file in recipes/ that holds what differs from the default's params.yaml.

A recipe's first lines say what it gives, what it costs, and which of its settings were published. `digits` is the
default: it holds the default's values of all keys that any recipe sets. Applying a recipe sets those keys first, then
its own, so that it does not matter which recipe was applied before; what no recipe sets stays as it is in params.yaml.

    python -m pipeline.recipes                  list them
    python -m pipeline.recipes apply NAME       write params.yaml; its comments stay
    python -m pipeline.plan NAME                say what it would cost, without running anything
    python -m pipeline.flow --recipe NAME       run it in a workspace of its own; params.yaml stays as it is
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core import params
from pipeline.core.running import commands, params_file
from pipeline.core.sections import nearest

FOLDER = "recipes"
DEFAULT = "digits"
PLAN = "plan"  # the section that is no setting: how many images there are, and how fast they were handled


class Recipe(NamedTuple):
    """A recipe as its file has it."""

    title: str
    settings: dict[str, Any]  # section to its changed keys
    plan: dict[str, Any]


def names(root: Path = Path(".")) -> list[str]:
    """Name the recipes, the default first."""
    found = sorted(file.stem for file in (root / FOLDER).glob("*.yaml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def read(name: str, root: Path = Path(".")) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: there is none of this name, or its file is not YAML with sections.
    """
    known = names(root)
    if not known:
        raise ValueError(f"{root / FOLDER}: no recipes here; run from the project's root")
    if name not in known:
        raise ValueError(f"no recipe is called {name!r}{nearest(name, known)}")
    text = (root / FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        content = params.parse(text)
    except ValueError as error:
        raise ValueError(f"{FOLDER}/{name}.yaml: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(it, dict) for it in (*content.values(), content.get(PLAN))):
        raise ValueError(f"{FOLDER}/{name}.yaml: expected sections with keys, {PLAN!r} among them")
    plan = content.pop(PLAN)
    return Recipe(text.partition("\n")[0].removeprefix("# "), content, plan)


def changes(name: str, root: Path = Path(".")) -> dict[str, Any]:
    """Give what a recipe sets in params.yaml, checked: dotted keys and their values.

    Raises:
        ValueError: no such recipe, or a wrong key or value in it: one line that names the file and the nearest key.
    """
    params.load(root / "params.yaml")
    data, flat = params_file.read(root), {}
    for each in dict.fromkeys((DEFAULT, name)):
        settings = read(each, root).settings
        try:
            data = params.with_changes(data, settings)
        except ValueError as error:
            raise ValueError(f"{FOLDER}/{each}.yaml: {error}") from None
        flat |= {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    params.check(data, f"{FOLDER}/{name}.yaml")
    return flat


def apply(name: str, root: Path = Path(".")) -> dict[str, tuple[Any, Any]]:
    """Write a recipe's settings into params.yaml; give what changed: key to its value before and now.

    Raises:
        ValueError: as `changes`.
    """
    new, before = changes(name, root), params_file.read(root)
    params_file.write(root, root, new)
    old = {key: before[key.partition(".")[0]][key.partition(".")[2]] for key in new}
    return {key: (old[key], value) for key, value in new.items() if value != old[key]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="command")
    actions.add_parser("list", help="list the recipes")
    actions.add_parser("apply", help="write a recipe's settings into params.yaml").add_argument("name")
    arguments = parser.parse_args()
    with commands.ending("recipes"):
        if arguments.command == "apply":
            changed = apply(arguments.name)
            for key, (old, new) in changed.items():
                print(f"{key}: {json.dumps(old)} -> {json.dumps(new)}")
            print(f"params.yaml is set to {arguments.name}: {len(changed)} keys changed")
        else:
            for name in names():
                print(read(name).title)


if __name__ == "__main__":
    main()
