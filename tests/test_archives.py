"""Archives as sources: torn, damaged, or with names and links that are odd."""

import hashlib
import io
import os
import resource
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import at_most
from made_images import png, with_flipped_bit
from prepare_kit import as_tar, as_zip, content_of, good, prepared, write

from pipeline.core.intake import archives


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def test_torn_archives_are_one_clear_error(tmp_path):
    files = good()
    one = as_tar(tmp_path / "x.tar", files)
    size = one.stat().st_size
    block = 512 * (1 + -(-len(png(0)) // 512))  # a member: header and content, padded
    torn = [
        cut(as_zip(tmp_path / "1.zip", files), 5000),
        cut(as_tar(tmp_path / "2.tar", files), size // 2),
        cut(as_tar(tmp_path / "3.tar", files), 10 * block),  # between two members
        cut(as_tar(tmp_path / "4.tar", files), 10 * block + 100),  # in a header
        cut(as_tar(tmp_path / "5.tar.gz", files), 20_000),
        cut(as_tar(tmp_path / "6.tar.gz", files), -4),
        write(tmp_path, {"7.zip": b"no archive at all"}) / "7.zip",
        write(tmp_path, {"8.tar": b""}) / "8.tar",
        write(tmp_path, {"9.tar": one.read_bytes()[: 10 * block] + b"garbage" * 100}) / "9.tar",
    ]
    for number, path in enumerate(torn):
        with pytest.raises(ValueError, match="not a whole archive"):
            prepared(tmp_path / f"out{number}", path)


def test_more_than_one_tar_archive_in_a_file_is_refused_and_padding_is_not(tmp_path):
    one, two = as_tar(tmp_path / "1.tar", good()), as_tar(tmp_path / "2.tar", good(start=100))
    packed = as_tar(tmp_path / "1.tar.gz", good()), as_tar(tmp_path / "2.tar.gz", good(start=100))
    whole = one.read_bytes()
    half = len(whole) // 1024 * 512
    wrong = {
        "3.tar": whole + two.read_bytes(),  # cat 1.tar 2.tar > 3.tar
        "4.tar.gz": packed[0].read_bytes() + packed[1].read_bytes(),
        "5.tar": whole[:half] + bytes(3_000_000) + whole[half:],  # a part that was never written
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="several archives, one behind another"):
            prepared(tmp_path / f"out {name}", tmp_path / name)
    (tmp_path / "6.tar").write_bytes(whole + bytes(3_000_000))
    assert len(prepared(tmp_path / "out", tmp_path / "6.tar")[0]) == 24


def first_listed(zipped: bytes) -> int:
    """Where the list of a zip archive begins."""
    return zipped.index(b"PK\1\2")


@pytest.mark.parametrize("most", [65_535, 3])
def test_a_zip_archive_that_has_lost_entries_is_refused(tmp_path, monkeypatch, most):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", most)  # with more, the count is written as zip64 has it
    whole = bytearray(as_zip(tmp_path / "x.zip", good()).read_bytes())
    assert (b"PK\6\6" in whole) == (most == 3)
    assert len(archives.open_archive(tmp_path / "x.zip").entries) == 24
    whole[first_listed(whole) + 32] = 46 + len("train/a/01.png")  # the first entry's comment: all of the second entry
    (tmp_path / "x.zip").write_bytes(whole)
    with pytest.raises(ValueError, match="it should list 24 files and folders, and lists 23"):
        prepared(tmp_path / "out", tmp_path / "x.zip")


def test_a_zip_archive_without_zip64_may_have_more_entries_than_it_can_say(tmp_path):
    path = as_zip(tmp_path / "x.zip", {"a.png": png(0)})
    whole = path.read_bytes()
    at, count = first_listed(whole), 65_538
    listed = whole[at : whole.rindex(b"PK\5\6")] * count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count % 65_536, count % 65_536, len(listed), at, 0)
    path.write_bytes(whole[:at] + listed + end)
    tree = archives.open_archive(path)  # all of one name
    assert (len(tree.entries), tree.repeated) == (1, 1)
    path.write_bytes(whole[:at] + listed + end.replace(b"\2\0\2\0", b"\3\0\3\0"))
    with pytest.raises(ValueError, match="it should list 3 "):
        archives.open_archive(path)


class OddZipInfo(zipfile.ZipInfo):
    """A name that zipfile does not write of itself."""

    def __init__(self, name: str):
        super().__init__()
        self.filename = name

    def is_dir(self) -> bool:
        return False


def with_odd_names(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(OddZipInfo(name), content)
    return path


def test_that_no_more_files_can_be_opened_is_no_fault_of_a_file(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    archive = as_zip(tmp_path / "x.zip", good())
    free = os.dup(0)
    os.close(free)
    for read, file in ((archives.read_file, tmp_path / "a.png"), (archives.open_archive, archive)):
        with at_most(resource.RLIMIT_NOFILE, free), pytest.raises(OSError, match="Too many open files"):
            read(file)


def test_names_in_a_zip_archive_that_are_empty_or_hold_a_zero_byte(tmp_path):
    files = {name.removeprefix("train/"): content for name, content in good().items()}
    odd = {"": b"", "a/\0.png": png(0)}  # of which zipfile says "" and "a/", a folder
    images, refused = prepared(tmp_path / "out", with_odd_names(tmp_path / "x.zip", files | odd), train=".")
    assert len(images) == 25
    assert refused == [("(no name)", "train", "zero bytes")]


def test_folders_in_a_zip_archive_of_windows_are_no_refused_images(tmp_path):
    files = {name.replace("/", "\\"): content for name, content in good().items()}
    folders = {"train\\": b"", "train\\a\\": b"", "train\\b\\": b""}
    images, refused = prepared(tmp_path / "out", with_odd_names(tmp_path / "x.zip", folders | files))
    assert (len(images), refused, images.classes) == (24, [], ("a", "b"))


def test_a_damaged_member_of_an_archive_is_refused_alone(tmp_path):
    files = good()
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored
        for name, content in files.items():
            archive.writestr(name, content)
    whole = path.read_bytes()
    at = whole.index(files["train/a/03.png"]) + 700
    path.write_bytes(with_flipped_bit(whole, at))
    _, refused = prepared(tmp_path / "out", path)
    assert refused == [("train/a/03.png", "train", "unreadable")]


def test_a_damaged_list_in_an_archive_is_named(tmp_path):
    path, listed = tmp_path / "x.zip", b"file,label\n" + b"".join(f"{name},{name[6]}\n".encode() for name in good())
    with zipfile.ZipFile(path, "w") as archive:  # stored
        for name, content in {"list.csv": listed, **good()}.items():
            archive.writestr(name, content)
    whole = path.read_bytes()
    path.write_bytes(with_flipped_bit(whole, whole.index(listed) + 30))
    words = r"^prepare\.train: .*x\.zip: list\.csv: unreadable: in the archive: Bad CRC-32 .*; fetch or make"
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "out", path, train="list.csv")


def test_links_in_a_tar_archive_are_followed_inside_it(tmp_path):
    files = good()
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo("store/" + hashlib.sha256(content).hexdigest())
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, info.name
            archive.addfile(link)
        gone = tarfile.TarInfo("train/a/gone.png")
        gone.type, gone.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(gone)
    images, refused = prepared(tmp_path / "out", path)
    assert refused == [("train/a/gone.png", "train", "unreadable")]
    assert content_of(images) == content_of(prepared(tmp_path / "2", write(tmp_path / "in", files))[0])


def test_symbolic_links_in_a_tar_archive_are_followed_from_where_they_stand(tmp_path):
    files, path = good(), tmp_path / "x.tar"
    links = {name: f"../../store/{name}" for name in files}
    links |= {"train/a/again.png": "07.png", "train/a/round.png": "about.png", "train/a/about.png": "round.png"}
    links |= {"train/a/folder.png": "../../store", "train/a/outside.png": "../../../store/train/b/07.png"}
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("store")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, target in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(f"store/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    images, refused = prepared(tmp_path / "out", path)
    assert set(refused) == {
        ("train/a/again.png", "train", "duplicate"),
        ("train/a/round.png", "train", "unreadable"),
        ("train/a/about.png", "train", "unreadable"),
        ("train/a/folder.png", "train", "not an image"),
        ("train/a/outside.png", "train", "unreadable"),
    }
    assert content_of(images) == content_of(prepared(tmp_path / "2", write(tmp_path / "in", files))[0])


def test_of_an_updated_archive_the_last_version_of_each_file_is_used(tmp_path, capsys):
    """As `tar -u` and zip programs that append leave them."""
    old, new = good(), good(start=100)
    later = {name: new[name] for name in [*new][:6]}
    expected = content_of(prepared(tmp_path / "0", write(tmp_path / "in", old | later))[0])
    tar = as_tar(tmp_path / "x.tar", old)
    with tarfile.open(tar, "a") as archive:
        for name, content in later.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, next(iter(later)).rpartition("/")[2]
        archive.addfile(link)
    zipped = as_zip(tmp_path / "x.zip", old)
    with zipfile.ZipFile(zipped, "a") as archive:
        for name, content in later.items():
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(name, content)
    capsys.readouterr()
    for number, (path, refusals) in enumerate({tar: [("train/a/link.png", "train", "duplicate")], zipped: []}.items()):
        images, refused = prepared(tmp_path / f"out{number}", path)
        assert refused == refusals
        assert content_of(images) == expected
        assert f"{path} holds 6 of its files more than once, as after `tar -u`: the last of" in capsys.readouterr().err


def test_folders_whose_names_are_not_utf8_stay_apart(tmp_path):
    """As a tar archive from a machine with another encoding has them."""
    files = {name.replace("/a/", "/д/").replace("/b/", "/ж/"): content for name, content in good().items()}
    path = tmp_path / "in.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="cp1251") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    images, refused = prepared(tmp_path / "out", path)
    assert images.classes == ("\\xe4", "\\xe6")
    assert (len(images), refused) == (24, [])
