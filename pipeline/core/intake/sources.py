"""Where images come from: folders, archives, lists and torchvision's data sets, as one list of named files.

Read: what `prepare`'s settings name. In a labelled source, the folder just below it is the class's name; in a list
(.csv with the columns file and label, paths relative to the list), the label is.
"""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from pipeline.core.data.image_files import Unreadable
from pipeline.core.intake import archives, lists
from pipeline.core.intake.archives import Entry, Tree
from pipeline.core.intake.refusals import HIDDEN

TORCHVISION = "torchvision:"
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # of which some end a line
ONE_ROOT = "name a root that holds all of it"
IN_ITS_PLACE = {  # what the setting null means
    "val": "; prepare.val: null takes a share of train",
    "test": "; prepare.test: null takes a share of train",
    "unlabelled": "; prepare.unlabelled: null is for none",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that may be an image.

    Attributes:
        name: its path below the source's root, the same whether that is a folder or an archive of it.
        class_name: the class it stands under; "": none, though it should have one; None: it is unlabelled.
        size: in bytes.
        read: gives its bytes, or raises image_files.Unreadable.
    """

    name: str
    class_name: str | None
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """All files of one source.

    Attributes:
        role: train, val, test or unlabelled; prepare's setting of that name names the source.
        place: where it is, for messages.
        files: in the order in which they are fastest to read.
        classes: names of classes, those without a file too.
        archive: the archive that holds it, if one does.
    """

    role: str
    place: str
    files: list[SourceFile]
    classes: set[str]
    archive: Path | None


def open_source(role: str, root: str, inner: str, opened: dict[Path, Tree]) -> Source:
    """List the files of a source.

    Args:
        role: train, val, test or unlabelled; the last has no classes.
        root: a folder or an archive.
        inner: a path in it: a folder, an archive, a .csv list; or torchvision:NAME.
        opened: archives that are open already, as several sources may lie in one; those opened here are added.

    Raises:
        ValueError: there is no such thing, it is damaged, or no file is in it.
    """
    base, path = Path(root), None
    if inner.startswith(TORCHVISION):
        from pipeline.core.intake import torchvision_sets  # importing torchvision takes seconds

        place = f"{inner} in {base}"
        files, classes = torchvision_sets.files(inner.removeprefix(TORCHVISION), base, role)
    else:
        if not _inside(base / inner, base):
            raise ValueError(f"prepare.{role}: {inner} leads out of {base}, which is all that DVC watches: {ONE_ROOT}")
        check_there(role, base, inner)
        path, inside = _locate(base, inner)
        place = f"{path}: {inside}" if inside else str(path)
        columns = ["file"] if role == "unlabelled" else ["file", "label"]  # that a list must have
        try:
            files, classes = _files(path, inside, base, f"prepare.{role}: {place}", opened, columns)
        except FileNotFoundError as error:
            raise ValueError(f"{error}{IN_ITS_PLACE.get(role, '')}") from None
    if role == "unlabelled":
        files, classes = [replace(file, class_name=None) for file in files], set()
    if role != "train" and not files:  # of train, class_names says it
        raise ValueError(f"prepare.{role}: {place}: no file there{IN_ITS_PLACE[role]}")
    return Source(role, place, files, classes, path if path in opened else None)


def check_there(role: str, root: Path, inner: str) -> None:
    """Make sure that what a setting names is below a root; what an archive holds is not looked at.

    Args:
        role, root, inner: see `open_source`.

    Raises:
        ValueError: there is no such folder, archive or list.
    """
    path = _locate(root, inner)[0]
    if not inner.startswith(TORCHVISION) and not path.exists():
        if file := next((above for above in path.parents if above.is_file()), None):
            raise ValueError(f"prepare.{role}: {file}: not a folder, nor an archive ({', '.join(archives.OPENERS)})")
        hint = f"{_beside(path)}{IN_ITS_PLACE.get(role, '')}"
        raise ValueError(f"prepare.{role}: {path}: no such folder, archive or list{hint}")


def check_apart(role: str, root: Path, inner: str, train: Path) -> None:
    """Make sure that a source is no folder among those of train's classes, and so taken for one of them.

    Args:
        role, root, inner: see `open_source`.
        train: the path of that source.

    Raises:
        ValueError: it is.
    """
    path, inside = _locate(root, inner)
    is_folder = path.is_dir() or (inside and not inside.lower().endswith(".csv"))
    above, whole = _as_spelled(Path(os.path.normpath(train))), path / inside
    if not is_folder or above not in whole.parents or (inside and above in path.parents):
        return  # the last: an archive among the classes' folders is none of them, nor what is in it
    if not archives.hidden(whole.relative_to(above).as_posix()):
        raise ValueError(
            f"prepare.{role}: {path / inside} lies in {above}, whose folders are classes of prepare.train: put the "
            "classes into a folder of their own, and name that one"
        )


def class_names(sources: list[Source]) -> list[str]:
    """Give the classes of train in the order of their labels.

    Raises:
        ValueError: there are none, one has no file, or val or test has others.
    """
    train = next(source for source in sources if source.role == "train")
    where = f"prepare.train: {train.place}"
    classes = sorted(train.classes)
    if len(classes) < 2:
        raise ValueError(
            f"{where}: found {f'one class, {classes[0]},' if classes else 'no class'} and at least 2 are needed: a "
            "folder each, or a label each in a list; if the classes lie one folder further down, name that folder"
        )
    if empty := sorted(train.classes - {file.class_name for file in train.files}):
        raise ValueError(f"{where}: class {names(empty)} has no file; add images or remove the folder")
    for source in sources:
        others = {file.class_name for file in source.files if file.class_name} - train.classes
        if others:
            raise ValueError(
                f"prepare.{source.role}: {source.place}: class {names(sorted(others))} is not in train "
                f"({names(classes)}); classes of the same name are the same class"
            )
    return classes


def _locate(base: Path, inner: str) -> tuple[Path, str]:
    """Split a path into what is on the disk and what is inside an archive there."""
    whole = Path(os.path.normpath(base / inner))
    whole = _as_spelled(whole) if base.exists() else whole  # the root itself is named as it is spelled
    for part in (*reversed(whole.parents), whole):
        if archives.is_archive(part) and part.is_file():
            inside = whole.relative_to(part).as_posix()
            return part, "" if inside == "." else inside
    return whole, ""


def _files(
    path: Path, inside: str, base: Path, where: str, opened: dict[Path, Tree], columns: list[str]
) -> tuple[list[SourceFile], set[str]]:
    if path.is_dir():
        return _by_folder(archives.open_folder(path), "", _below(path, base))
    if archives.is_archive(path):
        if path not in opened:
            opened[path] = archives.open_archive(path)
        tree, above = opened[path], _below(path, base)
        listed = [*tree.hidden, *tree.entries] if inside.lower().endswith(".csv") else []
        entries = {_nfc(entry.name): entry for entry in listed} | {entry.name: entry for entry in listed}
        if found := entries.get(inside) or entries.get(_nfc(inside)):
            try:
                content = found.read()
            except Unreadable as error:
                raise ValueError(f"{where}: {error}; fetch or make the archive again") from None
            rows = lists.rows(content, where, columns)
            files, classes = _by_list(rows, partial(_in_archive, entries, posixpath.dirname(inside)), above)
            places = {entry.read: place for place, entry in enumerate(listed)}  # to go back in a .tar.gz is slow
            return sorted(files, key=lambda file: places.get(file.read, 0)), classes
        if inside not in tree.folders:  # but it may be there in another spelling
            inside = next((name for name in sorted(tree.folders) if _nfc(name) == _nfc(inside)), inside)
        if inside and inside not in tree.folders:
            top = {name.split("/")[0] for name in (*tree.folders, *(entry.name for entry in tree.entries))}
            raise FileNotFoundError(f"{where}: no such folder or list in the archive{_some(top)}")
        return _by_folder(tree, inside, above)
    if path.suffix.lower() == ".csv":
        rows = lists.rows(path.read_bytes(), where, columns)
        return _by_list(rows, partial(_on_disk, path.parent, base, where, cache(_spellings)), "")
    raise ValueError(f"{where}: not a folder, an archive ({', '.join(archives.OPENERS)}) or a list (.csv)")


def _by_folder(tree: Tree, inside: str, above: str) -> tuple[list[SourceFile], set[str]]:
    """Take the files below a folder of a tree; the next folder's name is the class."""
    start = f"{inside}/" if inside else ""
    files = []
    for entry in tree.entries:
        if entry.name.startswith(start):
            first, slash, _ = entry.name[len(start) :].partition("/")
            name = _text(posixpath.join(above, entry.name))
            files.append(SourceFile(name, class_name(first) if slash else "", entry.size, entry.read))
    for entry in tree.hidden:
        if entry.name.startswith(start):
            read = partial(archives.no_content, HIDDEN, "its name, or its folder's, begins with a dot")
            files.append(SourceFile(_text(posixpath.join(above, entry.name)), "", 0, read))
    below = {name[len(start) :] for name in tree.folders if name.startswith(start)}
    return files, {class_name(name) for name in below if name and "/" not in name}


def _by_list(
    rows: list[tuple[str, str]], find: Callable[[str], Entry], above: str
) -> tuple[list[SourceFile], set[str]]:
    """Take the files that a list names."""
    files = []
    for name, label in rows:
        entry = find(name)
        files.append(
            SourceFile(
                _text(posixpath.join(above, entry.name)),
                class_name(label) if label else None,
                entry.size,
                entry.read,
            )
        )
    return files, {file.class_name for file in files if file.class_name}


def _on_disk(folder: Path, base: Path, where: str, spellings: Callable[[Path], dict[str, str]], name: str) -> Entry:
    if "\\" in name and not os.path.lexists(folder / name):
        name = name.replace("\\", "/")  # of a list made on Windows
    if not _inside(folder / name, base):
        raise ValueError(f"{where}: {name} lies outside {base}, which is all that DVC watches: {ONE_ROOT}")
    path = _as_spelled(Path(os.path.normpath(folder / name)), spellings)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return Entry(Path(os.path.relpath(path, base)).as_posix(), size, partial(archives.read_file, path))


def _in_archive(entries: dict[str, Entry], folder: str, name: str) -> Entry:
    name = archives.plain(posixpath.join(folder, name))
    found = entries.get(name) or entries.get(_nfc(name))
    return found or Entry(name, 0, partial(archives.no_content, "unreadable", "not in the archive"))


def _spellings(folder: Path) -> dict[str, str]:
    """Give the names in a folder by their one spelling."""
    try:
        return {_nfc(name): name for name in sorted(os.listdir(folder))}
    except OSError:  # no folder
        return {}


def _as_spelled(path: Path, spellings: Callable[[Path], dict[str, str]] = _spellings) -> Path:
    """Find a path whose accented letters are spelled otherwise on the disk, as in a folder copied from a Mac."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    folder = _as_spelled(path.parent, spellings)
    return folder / spellings(folder).get(_nfc(path.name), path.name)


def _inside(path: Path, base: Path) -> bool:
    """Whether a path, which may be absolute, stays below the root."""
    return os.path.relpath(path, base).split(os.sep)[0] != os.pardir


def _below(path: Path, base: Path) -> str:
    """Give a path as seen from the root; "" for the root itself."""
    below = Path(os.path.relpath(path, base)).as_posix()
    return "" if below == "." else below


def _text(name: str) -> str:
    """Make any name printable and storable, and tell them apart: "a\\n" for a line break, "\\xe9" for no UTF-8."""
    valid = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), valid)


def class_name(name: str) -> str:
    """Write a class's name in one way."""
    return _nfc(_text(name))


def _nfc(name: str) -> str:
    """Spell accented letters in one way: macOS and Linux do it differently."""
    return unicodedata.normalize("NFC", name)


def names(found: list[str]) -> str:
    """Write names for a message, the first few of them."""
    return ", ".join(f"'{name}'" for name in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _beside(path: Path) -> str:
    """Say what there is where a path was looked for."""
    return _some({item.name for item in path.parent.iterdir()}) if path.parent.is_dir() else ""


def _some(names: set[str]) -> str:
    shown = sorted(name for name in names if not archives.hidden(name))
    return f"; there are {', '.join(shown[:10])}{' …' if len(shown) > 10 else ''}" if shown else ""
