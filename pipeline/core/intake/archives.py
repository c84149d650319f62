"""Folders, zip and tar archives seen alike: a list of named files, each with a way to read its bytes.

Read: files where they lie. Nothing is extracted, so a name inside an archive can point wherever it likes.
"""

import contextlib
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import IO

from pipeline.core import errors
from pipeline.core.data.image_files import Unreadable
from pipeline.core.data.images import SUFFIXES

# What libraries raise on a damaged archive. RuntimeError: an encrypted member; NotImplementedError: its compression.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    LZMAError,
    RuntimeError,
    OSError,
    UnicodeDecodeError,
)
MACOS = ("._", "__MACOSX")  # how names begin that macOS adds beside files and to archives
NAMELESS = "(no name)"  # in the place of an empty name, which no list of files can show


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a tree.

    Attributes:
        name: its path in the tree, "/"-separated.
        size: in bytes.
        read: gives its bytes, or raises Unreadable.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclass
class Tree:
    """The files of a folder or an archive, in the order in which they are fastest to read.

    Attributes:
        entries: all but hidden ones.
        hidden: hidden ones that are called like images.
        folders: all but hidden ones, without the root.
        repeated: names that an archive holds several files of; the last of each is in entries.
        state: of an archive, as `state_of` gave it before it was listed.
    """

    entries: list[Entry] = field(default_factory=list)
    hidden: list[Entry] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    repeated: int = 0
    state: tuple[int, int] | None = None

    def add_folder(self, name: str) -> None:
        """Note a folder and those that it lies in."""
        while name and name not in self.folders:
            self.folders.add(name)
            name = posixpath.dirname(name)

    def add(self, name: str, size: int, read: Callable[[], bytes]) -> None:
        """Note a file; hidden ones that are no images, and what macOS puts into archives, are passed over."""
        if not hidden(name):
            self.entries.append(Entry(name or NAMELESS, size, read))
            self.add_folder(posixpath.dirname(name))
        elif name.lower().endswith(tuple(SUFFIXES)) and not any(part.startswith(MACOS) for part in name.split("/")):
            self.hidden.append(Entry(name, size, read))

    def keep_last(self) -> None:
        """Of files of one name keep the last, as unpacking does: `tar -u` adds the new one and leaves the old."""
        last = {entry.name: entry for entry in self.entries}
        self.repeated = len({entry.name for entry in self.entries if entry is not last[entry.name]} - {NAMELESS})
        self.entries = [entry for entry in self.entries if entry is last[entry.name] or entry.name == NAMELESS]


def is_archive(path: Path) -> bool:
    """Tell an archive by its name."""
    return any(str(path).lower().endswith(suffix) for suffix in OPENERS)


def open_archive(path: Path) -> Tree:
    """List an archive.

    Raises:
        ValueError: it is torn, truncated or no archive.
    """
    opener = next(opener for suffix, opener in OPENERS.items() if str(path).lower().endswith(suffix))
    state = state_of(path)
    try:
        tree = opener(path)
    except PermissionError:
        raise
    except DAMAGE as error:
        if errors.of_machine(error):
            raise
        raise ValueError(
            f"{path}: not a whole archive ({errors.in_a_line(error)}); it may be cut off: compare its size with the "
            "original's, or fetch it again"
        ) from None
    tree.keep_last()
    tree.state = state
    return tree


def state_of(file: Path) -> tuple[int, int]:
    """Give the size of a file in bytes, and the time of its last change in nanoseconds."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def open_folder(path: Path) -> Tree:
    """List a folder and the folders in it; links to folders are followed."""
    tree = Tree()
    _walk(path, "", tree, ())
    return tree


def links_out(root: Path) -> list[Path]:
    """List the links below a folder that lead to folders outside of it."""
    whole = os.path.realpath(root)
    links = (Path(folder, name) for folder, folders, _ in os.walk(root) for name in folders)
    return sorted(one for one in links if one.is_symlink() and not Path(os.path.realpath(one)).is_relative_to(whole))


def read_file(path: Path | str) -> bytes:
    """Read a file.

    Raises:
        Unreadable: it is not there, or may not be read.
        OSError: too many files are open, or no memory is left.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise Unreadable("not an image", "not a file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if errors.of_machine(error):
            raise
        broken = os.path.islink(path) and not os.path.exists(path)
        raise Unreadable("unreadable", "broken link" if broken else f"{error.strerror}".lower()) from None


def hidden(name: str) -> bool:
    """Tell hidden files (.DS_Store) and the copies of metadata that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def plain(name: str) -> str:
    """Write a path in an archive as one below its root: no "./", "..", leading "/" or backslash."""
    return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def _walk(path: Path | str, prefix: str, tree: Tree, above: tuple[tuple[int, int], ...]) -> None:
    here = os.stat(path)
    if (here.st_dev, here.st_ino) in above:  # a link back to a folder that we are in
        return
    above += ((here.st_dev, here.st_ino),)
    with os.scandir(path) as found:
        items = sorted(found, key=lambda item: item.name)
    if not items and Path(path).suffix.lower() in SUFFIXES and prefix:
        tree.add(prefix, 0, partial(no_content, "not an image", "an empty folder"))
    for item in items:
        name = f"{prefix}/{item.name}" if prefix else item.name
        if _is_folder(item) and hidden(name):
            with contextlib.suppress(OSError):  # other programs' own: it need not be readable
                _walk(item.path, name, tree, above)
        elif _is_folder(item):
            tree.add_folder(name)
            _walk(item.path, name, tree, above)
        else:
            tree.add(name, _size(item), partial(read_file, item.path))


def _is_folder(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads to itself; reading it says so
        return False


def _size(item: os.DirEntry) -> int:
    try:
        return item.stat().st_size
    except OSError:  # a broken link; reading it says so
        return 0


def _open_zip(path: Path) -> Tree:
    tree = Tree()
    archive = zipfile.ZipFile(path)
    _check_zip_count(archive)
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        # zipfile cuts a name off at a zero byte, and what is left may be nothing, or a folder's.
        cut_off = "\0" in info.orig_filename
        name = plain(info.orig_filename if cut_off else info.filename)
        if cut_off or not info.filename.endswith(("/", "\\")):  # programs of Windows write backslashes
            tree.add(name, info.file_size, partial(_from_archive, archive.read, info))
        elif not hidden(name):
            tree.add_folder(name)
    return tree


def _check_zip_count(archive: zipfile.ZipFile) -> None:
    """Find entries that were lost: where one says that its name or comment is longer, zipfile skips those behind it."""
    # It is private, but how ZipFile itself has found its list; ZipFile keeps neither the count nor where it stands.
    signature, *_, count = zipfile._EndRecData(archive.fp)[:5]
    listed = len(archive.infolist())
    if signature == zipfile.stringEndArchive:  # not the one of zip64: it has 16 bits for the count
        listed %= 1 << 16
    if listed != count:
        raise zipfile.BadZipFile(f"it should list {count:,} files and folders, and lists {listed:,}")


def _open_tar(path: Path) -> Tree:
    tree = Tree()
    archive = tarfile.open(path)  # noqa: SIM115 (it stays open: entries read from it)
    members: dict[str, tarfile.TarInfo] = {}  # by name, for links: to find one, tarfile goes through all
    for member in archive:
        name = plain(member.name)
        if member.islnk():  # another name of a file that stands before it
            member = members.get(plain(member.linkname), member)
        members[name] = member
        if not member.isdir():
            tree.add(name, member.size, partial(_from_archive, partial(_tar_member, archive, members), member))
        elif not hidden(name):
            tree.add_folder(name)
    _check_tar_end(path, archive.fileobj, archive.offset)
    return tree


def _check_tar_end(path: Path, file: IO[bytes], end: int) -> None:
    """Find the empty block that ends an archive: without it tarfile takes a torn archive for a whole one.

    It also takes what is in front of the first such block for all there is.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise tarfile.ReadError("the block that ends a tar archive is missing")
    while block := file.read(1 << 20):  # to the very end: a compressed file has its checksum there
        if block.strip(b"\0"):
            raise ValueError(
                f"{path}: more stands behind the block that ends a tar archive: these are several archives, one behind "
                "another (tar -xif unpacks them all), or a damaged one (fetch it again)"
            )


def _tar_member(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], member: tarfile.TarInfo) -> bytes:
    followed = set()
    while member.issym() or member.islnk():
        folder = posixpath.dirname(plain(member.name)) if member.issym() else ""
        name = posixpath.normpath(posixpath.join(folder, member.linkname))
        if name in followed or name.startswith("../"):  # a loop, or a way out of the archive
            raise KeyError(name)
        followed.add(name)
        member = members[plain(name)]
    file = archive.extractfile(member)
    if file is None:
        raise Unreadable("not an image", "not a file")
    return file.read()


def _from_archive(read: Callable[..., bytes], member: zipfile.ZipInfo | tarfile.TarInfo) -> bytes:
    try:
        return read(member)
    except KeyError:
        raise Unreadable("unreadable", "broken link") from None
    except DAMAGE as error:
        if errors.of_machine(error):
            raise
        raise Unreadable("unreadable", f"in the archive: {' '.join(str(error).split())}") from None


def no_content(reason: str, detail: str) -> bytes:
    """Stand in for reading a file that has no bytes to give. Raises Unreadable."""
    raise Unreadable(reason, detail)


OPENERS: dict[str, Callable[[Path], Tree]] = {
    ".zip": _open_zip,
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"), _open_tar),
}
