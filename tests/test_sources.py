"""Sources of images: the same data set from folders, archives and lists; what is not there."""

import random
import unicodedata
from pathlib import Path

import pytest
from made_images import encode, picture, png
from prepare_kit import ODD, SETTINGS, SPLITS, as_tar, as_zip, content_of, good, prepared, with_splits, write

from pipeline.core.intake import archives, sources
from pipeline.core.intake.inputs import Inputs
from pipeline.core.sections import Prepare

# --- the same images, whatever holds them ----------------------------------------------------------------------------


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
        shards = (f"images/{part}/images-00000.tar" for part in ("known", "pool"))
        for name in ("images/manifest.arrow", "images/known/manifest.arrow", *shards, "summary.json"):  # the same bytes
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


def test_hidden_images_are_listed_and_a_list_may_name_them(tmp_path):
    root = write(tmp_path / "in", good() | {f"train/.net/{at:02d}.png": png(at) for at in range(20)})
    write(root, {f"train/a/bad{at}.png": b"" for at in range(2)})
    rows = [f"train/{name}/{at:02d}.png,{label}" for name, label in ((".net", "a"), ("b", "b")) for at in range(8, 12)]
    write(root, {"list.csv": "\n".join(["file,label", *rows]).encode()})
    files = [path for path in root.rglob("*.*") if path.is_file()]
    as_zip(root / "x.zip", {str(path.relative_to(root)): path.read_bytes() for path in files})
    for at, train in enumerate(("train", "x.zip/train")):  # nor are so many a reason to stop
        images, refused = prepared(tmp_path / str(at), root, train=train, max_refused_share=0.2)
        assert images.classes == ("a", "b")
        hidden = [(f"{train}/.net/{at:02d}.png", "train", "hidden") for at in range(20)]
        assert sorted(each for each in refused if each[2] != "zero bytes") == hidden
        with pytest.raises(
            ValueError, match=r"2 of 26 files were refused \(zero bytes 2, such as \S*train/a/bad0\.png\), "
        ):
            prepared(tmp_path / f"{at} less", root, train=train, max_refused_share=0.06)
    for train in ("list.csv", "x.zip/list.csv"):
        images, refused = prepared(tmp_path / train.replace("/", " "), root, train=train, max_refused_share=0.2)
        assert len(images) == 8
        assert not refused


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
        ("x.rar/train", r"x.rar: not a folder, nor an archive \(.zip"),
        ("latin.csv", "can't decode byte 0xe9 .*; save it as UTF-8"),
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
            "latin.csv": "file,label\ntrain/a/00.png,caf\xe9\n".encode("latin-1"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train": ".", "unlabelled": "pool"},
            r"prepare.unlabelled: .*in/pool lies in .*in, whose folders",
        ),
        ({"train": "x.zip", "val": "x.zip/val"}, r"prepare.val: .*x.zip/val lies in .*x.zip, whose folders"),
        ({"train": ".", "unlabelled": ".pool/none"}, r"prepare.unlabelled: .*none: no file there"),
        ({"unlabelled": "none"}, r"prepare.unlabelled: .*in/none: no file there; prepare.unlabelled: null is for none"),
        ({"val": "none"}, r"prepare.val: .*in/none: no file there; prepare.val: null takes a share of train"),
    ],
)
def test_sources_that_hold_nothing_or_lie_among_the_classes(tmp_path, changes, words):
    root = write(tmp_path / "in", with_splits())
    for folder in ("none", ".pool/none"):
        (root / folder).mkdir(parents=True)
    as_zip(root / "x.zip", with_splits())
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "out", root, **changes)


def test_a_list_in_an_archive_finds_files_however_their_letters_are_spelt(tmp_path):
    """macOS takes accents from their letters, and most editors do not."""
    files = {unicodedata.normalize("NFD", f"é{name}"): content for name, content in good().items()}
    rows = [f"é{name},{name.split('/')[1]}" for name in good()]
    listed = {"list.csv": "\n".join(["file,label", *rows]).encode()}
    images, refused = prepared(tmp_path / "out", as_zip(tmp_path / "in.zip", files | listed), train="list.csv")
    assert (len(images), refused) == (24, [])
    images, refused = prepared(tmp_path / "2", tmp_path / "in.zip", train="étrain")
    assert (len(images), refused) == (24, [])


def test_folders_and_listed_files_are_found_however_their_letters_are_spelt(tmp_path):
    files = {f"é{name[:-4]}ö.png": content for name, content in good().items()}
    rows = [f"{name},{name.split('/')[1]}" for name in files]
    listed = {"liste.csv": "\n".join(["file,label", *rows]).encode()}
    on_disk = {unicodedata.normalize("NFD", name): content for name, content in files.items()}
    folder = write(tmp_path / "in", on_disk | listed)
    for number, train in enumerate(("étrain", "liste.csv")):
        images, refused = prepared(tmp_path / f"out{number}", folder, train=train)
        assert (len(images), images.classes, refused) == (24, ("a", "b"), [])
    (folder / unicodedata.normalize("NFD", "étrain") / "val").mkdir()
    with pytest.raises(ValueError, match=r"^prepare\.val: .* lies in .*, whose folders are classes of prepare\.train"):
        prepared(tmp_path / "mixed", folder, train="étrain", val="étrain/val")


def test_files_whose_names_differ_in_spelling_alone_stay_apart(tmp_path):
    names = [unicodedata.normalize(form, "train/a/é.png") for form in ("NFC", "NFD")]
    two = {name: png(5000 + number) for number, name in enumerate(names)}
    listed = {"list.csv": "\n".join(["file,label", *(f"{name},{name[6]}" for name in good() | two)]).encode()}
    for number, train in enumerate(("train", "list.csv")):
        archive = as_zip(tmp_path / f"{number}.zip", good() | two | listed)
        images, refused = prepared(tmp_path / f"out{number}", archive, train=train)
        assert (len(images), refused) == (26, [])


def test_files_of_a_list_in_an_archive_are_read_in_the_archives_order(tmp_path):
    """To go back in a compressed tar archive is to unpack it from its beginning."""
    files = shuffled(good(), 1)
    listed = {"list.csv": "\n".join(["file,label", *(f"{name},{name[6]}" for name in good())]).encode()}
    archive = as_tar(tmp_path / "x.tar.gz", files | listed)
    source = sources.open_source("train", str(archive), "list.csv", {})
    assert [file.name for file in source.files] == [*files]


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
    settings = SETTINGS | {"labelled_root": str(whole), "unlabelled_root": str(whole)}
    Inputs.of(Prepare(**settings)).warn_of_links()
    assert f"DVC does not look into linked folders outside of {whole}: 'train/b'; when" in capsys.readouterr().err
