"""Lists of images: CSV files with a row an image, of which the column file gives a path, and label a class."""

import csv
import io


def rows(content: bytes, where: str, needed: list[str]) -> list[tuple[str, str]]:
    """Give (file, label) of each row of a list; the label may be empty.

    Args:
        content: of the list's file.
        where: its place, for messages.
        needed: the columns that it must have.

    Raises:
        ValueError: it is not such a list, or a row names no file.
    """
    try:
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig")), skipinitialspace=True, strict=True)
        columns = table.fieldnames or []
        if not {*needed} <= {*columns}:
            wanted = "columns file and label" if len(needed) > 1 else "column file"
            raise ValueError(f"its first line must name the {wanted}, not {', '.join(columns) or 'none'}")
        found = []
        for number, row in enumerate(table, start=1):
            if any(surplus := row.get(None, [])):
                raise ValueError(
                    f"row {number} below the heading has {len(columns) + len(surplus)} fields, not {len(columns)}; a "
                    'name that holds a comma stands in quotation marks: "cat, small"'
                )
            found.append(((row["file"] or "").strip(), (row.get("label") or "").strip()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not a list of images: {error}; save it as UTF-8") from None
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{where}: not a list of images: {error}") from None
    for number, (name, _) in enumerate(found, start=1):
        if not name:
            raise ValueError(f"{where}: row {number} below the heading names no file")
        if "\0" in name:
            raise ValueError(f"{where}: row {number} below the heading: no file's name holds a zero byte")
    return found
