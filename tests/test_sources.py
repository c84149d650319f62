"""Sources of images: the same data set from folders, archives and lists; what is not there, or damaged."""

import hashlib
import io
import random
import struct
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from made_images import encode, picture, png, with_flipped_bit
from prepare_kit import ODD, SPLITS, content_of, good, prepared, with_splits, write

from pipeline import prepare as stage_prepare
from pipeline.core import archives

# --- the same images, whatever holds them ----------------------------------------------------------------------------


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_tar(path: Path, files: dict[str, bytes], before: str = "") -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(before + name)
            info.size, info.mtime = len(content), random.randrange(10**9)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_lists(folder: Path, files: dict[str, bytes]) -> Path:
    write(folder / "all", files)
    for part in ("train", "val", "test", "pool"):
        rows = ["file,label"]
        rows += [
            f'"../all/{name}",{name.split("/")[1] if part != "pool" else ""}' for name in files if name.startswith(part)
        ]
        write(folder, {f"lists/{part}.csv": "\n".join(rows).encode()})
    return folder


def shuffled(files: dict[str, bytes], seed: int) -> dict[str, bytes]:
    names = list(files)
    random.Random(seed).shuffle(names)
    return {name: files[name] for name in names}


def test_folder_zip_tar_and_list_give_the_same_data_set(tmp_path):
    files = with_splits() | ODD
    chosen = {**SPLITS, "labels_per_class": 4, "images_per_class": 9}
    first, refused = prepared(tmp_path / "0", write(tmp_path / "folder", files), **chosen)
    holders = {
        "zip": as_zip(tmp_path / "x.zip", shuffled(files, 1)),
        "tar": as_tar(tmp_path / "x.tar", shuffled(files, 2), before="./"),
        "tar.gz": as_tar(tmp_path / "x.tar.gz", shuffled(files, 3), before="/"),
        "TGZ": as_tar(tmp_path / "x.tgz", shuffled(files, 4), before="../../"),
    }
    for number, (kind, path) in enumerate(holders.items(), 1):
        images, also_refused = prepared(tmp_path / str(number), path, **chosen)
        assert also_refused == refused, kind
        assert content_of(images) == content_of(first)
        assert images.digest == first.digest
        for name in ("manifest.arrow", "images-00000.tar", "summary.json"):  # the very same bytes
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "0" / name).read_bytes(), (kind, name)
    lists = as_lists(tmp_path / "listed", shuffled(files, 5))
    names = {
        "train": "lists/train.csv",
        "val": "lists/val.csv",
        "test": "lists/test.csv",
        "unlabelled": "lists/pool.csv",
    }
    images, _ = prepared(tmp_path / "9", lists, **{**chosen, **names})
    assert content_of(images) == content_of(first)
    assert images.digest == first.digest
    assert not (tmp_path / "evil").exists()
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name in ("train", "pool")) == []


def test_an_archive_for_each_part_and_lists_inside_an_archive(tmp_path):
    files = with_splits()
    first, _ = prepared(tmp_path / "0", write(tmp_path / "folder", files), **SPLITS)
    root = tmp_path / "parts"
    root.mkdir()
    for part in ("train", "val", "test", "pool"):
        inside = {name.partition("/")[2]: content for name, content in files.items() if name.startswith(part)}
        as_zip(root / f"{part}.zip", inside)
    names = {"train": "train.zip", "val": "val.zip", "test": "test.zip", "unlabelled": "pool.zip"}
    images, _ = prepared(tmp_path / "1", root, **names)
    assert content_of(images) == content_of(first)
    assert images.source(0).split("/")[0].endswith(".zip")

    lists = {}
    for part in ("train", "val", "test", "pool"):
        rows = [f"../{name},{name.split('/')[1]}" for name in files if name.startswith(part)]
        lists[f"lists/{part}.csv"] = "\n".join(["file,label", *rows]).encode()
    path = as_zip(tmp_path / "lists.zip", lists | files)
    names = {role: f"lists/{part}.csv" for role, part in {"train": "train", **SPLITS}.items()}
    images, _ = prepared(tmp_path / "2", path, **names)
    assert content_of(images) == content_of(first)


def test_labelled_and_unlabelled_images_may_lie_in_different_archives(tmp_path):
    labelled = as_zip(tmp_path / "labelled.zip", good())
    pool = as_tar(tmp_path / "pool.tar", {f"some/where/{at}.jpg": encode(picture(at), "JPEG") for at in range(5)})
    images, _ = prepared(tmp_path / "out", labelled, unlabelled_root=str(pool), unlabelled=".")
    assert len(images.rows("unlabelled")) == 5
    assert images.source(images.rows("unlabelled")[0]).startswith("some/where/")


def test_a_list_may_name_files_by_their_whole_paths_and_in_windows_way(tmp_path, monkeypatch):
    root = write(tmp_path / "in", good())
    below = sorted(path.relative_to(root).as_posix() for path in (root / "train").rglob("*.png"))
    rows = [(name, name.split("/")[1]) for name in below]
    for file, before in (("short.csv", ""), ("whole.csv", f"{root}/")):
        (root / file).write_text("\n".join(["file,label", *(f"{before}{name},{label}" for name, label in rows)]))
    windows = ["file,label", *(f"{name},{label}".replace("/", "\\") for name, label in rows)]
    (root / "windows.csv").write_text("\r\n".join(windows))
    monkeypatch.chdir(tmp_path)
    made = [prepared(tmp_path / out, Path("in"), train=f"{out}.csv") for out in ("short", "whole", "windows")]
    assert len(made[0][0]) == 24
    assert made[0][0].digest == made[1][0].digest == made[2][0].digest


def test_a_list_may_hold_images_without_a_label(tmp_path):
    root = write(tmp_path / "in", good())
    rows = [f"{name},{name.split('/')[1] if int(name[8:10]) < 6 else ''}" for name in good()]
    write(root, {"list.csv": ("file,label\n" + "\n".join(rows)).encode("utf-8-sig")})
    images, refused = prepared(tmp_path / "out", root, train="list.csv")
    assert refused == []
    assert len(images.rows("unlabelled")) == 12
    assert (images.withheld == -1).all()


def test_a_list_of_the_pool_needs_no_labels_and_a_name_may_hold_a_backslash(tmp_path):
    root = write(tmp_path / "in", good() | {"back\\slash.png": png(1), "back/slash.png": png(2)})
    write(root, {"pool.csv": b"file\nback\\slash.png\n"})
    images, refused = prepared(tmp_path / "out", root, unlabelled="pool.csv")
    assert refused == []
    assert [images.source(row) for row in images.rows("unlabelled")] == ["back\\slash.png"]


def test_a_list_that_names_a_missing_file(tmp_path):
    root = write(
        tmp_path / "in", good() | {"list.csv": ("file,label\n" + "".join(f"{n},{n[6]}\n" for n in good())).encode()}
    )
    (root / "train/a/00.png").unlink()
    _, refused = prepared(tmp_path / "out", root, train="list.csv")
    assert refused == [("train/a/00.png", "train", "unreadable")]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("trian", "no such folder, archive or list; there are .*train"),
        ("x.rar", "not a folder, an archive"),
        ("x.zip/trian", "no such folder or list in the archive; there are train"),
        ("bad.csv", "its first line must name the columns file and label, not path, class"),
        ("classes.csv", "its first line must name the columns file and label, not file, class"),
        (
            "comma.csv",
            r"row 2 below the heading has 3 fields, not 2; a name that holds a comma stands in quotation marks",
        ),
        ("empty.csv", "its first line must name"),
        ("hole.csv", "row 2 below the heading names no file"),
        ("open.csv", "open.csv: not a list of images: unexpected end of data"),
        ("out.csv", r"\.\./out/x.png lies outside .*in, which is all that DVC watches"),
        ("../in2", r"\.\./in2 leads out of .*in, which is all that DVC watches"),
        ("torchvision:Nonsense", "known are CIFAR10"),
        ("torchvision:CIFAR10", "not in .* or damaged"),
    ],
)
def test_sources_that_are_not_there(tmp_path, train, words):
    root = write(
        tmp_path / "in",
        good()
        | {
            "x.rar": b"Rar!",
            "bad.csv": b"path,class\nx,y\n",
            "classes.csv": b"file,class\ntrain/a/00.png,a\n",
            "comma.csv": b"file,label\ntrain/a/00.png,a,\ntrain/a/01.png,cat, small\n",
            "empty.csv": b"",
            "open.csv": b'file,label\ntrain/a/00.png,a\n"train/a/01.png,a\ntrain/a/02.png,a\n',
            "out.csv": b"file,label\n../out/x.png,a\n",
            "hole.csv": b"file,label\ntrain/a/00.png,a\n,b\n",
        },
    )
    as_zip(root / "x.zip", good())
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "out", root, train=train)


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
    assert len(archives.open_archive(path).entries) == count
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


def test_a_list_in_an_archive_finds_files_however_their_letters_are_spelt(tmp_path):
    """macOS takes accents from their letters, and most editors do not."""
    files = {unicodedata.normalize("NFD", f"é{name}"): content for name, content in good().items()}
    rows = [f"é{name},{name.split('/')[1]}" for name in good()]
    listed = {"list.csv": "\n".join(["file,label", *rows]).encode()}
    images, refused = prepared(tmp_path / "out", as_zip(tmp_path / "in.zip", files | listed), train="list.csv")
    assert (len(images), refused) == (24, [])
    images, refused = prepared(tmp_path / "2", tmp_path / "in.zip", train="étrain")
    assert (len(images), refused) == (24, [])


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    root = write(tmp_path / "in", {name.replace("train", "else"): content for name, content in good().items()})
    (root / "train").mkdir()
    for name in "ab":
        (root / "train" / name).symlink_to(root / "else" / name)
    (root / "else/a/loop").symlink_to(root / "else/a")
    images, refused = prepared(tmp_path / "out", root)
    assert len(images) == 24
    assert refused == []
    assert archives.links_out(root) == []  # they stay below the root, where DVC sees the folders themselves


def test_a_folder_that_dvc_does_not_look_into_is_named(tmp_path, capsys):
    root = write(tmp_path / "in", {name: content for name, content in good().items() if "/a/" in name})
    write(tmp_path / "else", {name: content for name, content in good().items() if "/b/" in name})
    (root / "train/b").symlink_to(tmp_path / "else/train/b")
    whole = tmp_path / "whole"
    whole.symlink_to(root)
    images, _ = prepared(tmp_path / "out", whole)
    assert len(images) == 24
    (root / ".hidden").symlink_to(tmp_path / "else")
    capsys.readouterr()
    stage_prepare.warn_of_links({str(whole)})
    assert f"DVC does not look into linked folders outside of {whole}: 'train/b'; when" in capsys.readouterr().err
