"""The settings: `params.yaml`, read and checked. A wrong key or value is one line that names it."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import DuplicateKeyError

from pipeline.core.sections import Params, nearest

IN_PLAIN_WORDS = {  # what pydantic says in Python's words
    "tuple_type": "should be a list of numbers",
    "model_type": "should be a section with keys",
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "string_pattern_mismatch": "should be letters, digits, - and _ alone",
}


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file.

    Raises:
        ValueError: the file is missing or not YAML, or a key or a value is wrong: one line that names it.
    """
    try:
        data = parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run from the project's root, or name one with --params") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not YAML: {error}; save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return check(data, str(path))


def parse(text: str) -> Any:
    """Read YAML as DVC does, which compares and writes params.yaml: YAML 1.2, where 1e-4 is a number and no is a text.

    Raises:
        ValueError: it is not YAML, or a key stands twice: one line that says where.
    """
    try:
        return YAML(typ="safe").load(text)
    except DuplicateKeyError as error:
        key = re.search('key "(.*)" with value', error.problem, re.DOTALL)[1].strip()
        line = error.problem_mark.line + 1
        raise ValueError(f"{key}: stands twice, the second time in line {line}; remove one") from None
    except (YAMLError, ValueError, KeyError) as error:  # the latter two of a month 13, and of !!bool maybe
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def check(data: Any, where: str = "params.yaml") -> Params:
    """Turn the content of a params file into typed sections.

    Raises:
        ValueError: one line that says what is wrong, and names the nearest right key.
    """
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ValueError(f"{where}: expected sections with keys, found {found}")
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {'; also '.join(_explanations(error))}") from None


def with_changes(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a params file's content with some keys changed.

    Args:
        data: the content of params.yaml.
        changes: key to value; a key is dotted ("distill.epochs"), or a section's name with a dict of its keys.

    Raises:
        ValueError: a key that `data` does not have; the nearest one is named.
    """
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not name and isinstance(value, dict) and isinstance(changed.get(section), dict):
            changed = with_changes(changed, {f"{section}.{inner}": new for inner, new in value.items()})
        elif name and isinstance(changed.get(section), dict) and name in changed[section]:
            changed[section][name] = value
        elif not name and section in changed and not isinstance(changed[section], dict):
            changed[section] = value
        elif isinstance(changed.get(key), dict):
            raise ValueError(
                f"{key}: a section; name one of its keys: {', '.join(f'{key}.{name}' for name in changed[key])}"
            )
        else:
            raise ValueError(f"{key}: unknown key{nearest(key, _known_keys(data))}")
    return changed


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Give settings with dotted keys alone, some of which may be dotted already; a dotted key may have a table."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "." not in key:  # a section
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


def _known_keys(data: dict[str, Any]) -> list[str]:
    inner = [f"{section}.{name}" for section, value in data.items() if isinstance(value, dict) for name in value]
    return inner + list(data)


def _explanations(error: ValidationError) -> Iterator[str]:
    """Put each error of pydantic's in words; of a misspelt key, which is unknown and missing, the former alone."""
    errors = error.errors()
    unknown = {one["loc"][:-1] for one in errors if one["type"] == "extra_forbidden"}
    missing = [one["loc"] for one in errors if one["type"] == "missing" and one["loc"][:-1] not in unknown]
    keys = [".".join(place) for place in missing if isinstance(place[-1], str)]
    yield from [f"{', '.join(keys)}: missing; every key must be there"] if keys else []
    lacking = Counter(place[:-1] for place in missing)
    told = [one for one in errors if one["type"] != "missing" or isinstance(one["loc"][-1], int)]
    yield from dict.fromkeys(_explain(one, lacking[one["loc"][:-1]]) for one in told)  # one for each missing number


def _explain(error: dict[str, Any], missing: int) -> str:
    """Put an error of pydantic's in words; missing: how many numbers of a list are missing where it is."""
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(key, _keys_beside(place))}"
    if error["type"] == "missing":
        given = len(error["input"])
        return f"{'.'.join(place[:-1])}: should be {given + missing} numbers, not {given}"
    if error["type"] == "too_long":
        return f"{key}: should be {error['ctx']['max_length']} numbers, not {error['ctx']['actual_length']}"
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    message = IN_PLAIN_WORDS.get(error["type"], said)
    value = error["input"]
    told = isinstance(value, dict) or error["type"] == "value_error"
    return f"{key}: {message}".removeprefix(": ") + ("" if told else f", not {value!r}")


def _keys_beside(place: list[str]) -> list[str]:
    """The right keys at the place of a wrong one, dotted."""
    sections = {field.alias or name: field.annotation for name, field in Params.model_fields.items()}
    if len(place) == 1:
        return list(sections)
    return [f"{place[0]}.{name}" for name in sections[place[0]].model_fields]
