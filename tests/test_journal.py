"""What prepare keeps between runs: a stopped run is gone on from, and what holds no more is not taken up."""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_images import png
from prepare_kit import ODD, SPLITS, files_of, prepared, with_splits, write

from pipeline.core.data import images
from pipeline.core.intake import examined, image_shards, reencoding
from pipeline.core.intake.journal import Journal


@contextlib.contextmanager
def counting(place: str, stop_after: int | None = None) -> Iterator[list[object]]:
    """Count the calls of a function in a list that grows; Ctrl-C comes in place of the one after so many."""
    module, _, name = place.rpartition(".")
    function, calls, lock = getattr(sys.modules[module], name), [], threading.Lock()

    def counted(*arguments):
        with lock:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(arguments)
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, counted)
        yield calls


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("pipeline.core.intake.examined.decode_first", {}),
        ("pipeline.core.intake.reencoding.encode", {"max_side": 16, "jpeg_quality": 90}),
    ],
)
def test_a_stopped_run_is_gone_on_from_and_ends_in_the_same_bytes(tmp_path, monkeypatch, place, changes):
    monkeypatch.setattr("pipeline.core.intake.reading.CHUNK_FILES", 2)  # a thread's work that is cut off is done again
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    root = write(tmp_path / "in", with_splits())
    with counting(place) as in_all:
        prepared(tmp_path / "whole", root, **SPLITS, **changes)
    with counting(place, stop_after=20), pytest.raises(KeyboardInterrupt) as stopped:
        prepared(tmp_path / "out", root, **SPLITS, **changes)
    assert stopped.tb  # it keeps open what prepare left open: a stage that is stopped ends at once, and closes nothing
    shutil.rmtree(tmp_path / "out")
    for journal in (tmp_path / "out scratch").glob("*.jsonl"):  # its last line is cut off, as by a kill
        journal.write_bytes(journal.read_bytes()[:-5])
    with counting(place) as in_the_second:
        prepared(tmp_path / "out", root, **SPLITS, **changes)
    assert len(in_all) == len(with_splits())
    assert len(in_all) - 20 <= len(in_the_second) <= len(in_all) - 10
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "out")


def test_new_images_alone_are_decoded(tmp_path):
    root = write(tmp_path / "in", with_splits())
    prepared(tmp_path / "out", root, **SPLITS)
    write(root, {f"pool/new {at}.png": png(95_000 + at) for at in range(3)} | {"pool/bad.png": b"none"})
    shutil.rmtree(tmp_path / "out")
    with counting("pipeline.core.intake.examined.decode_first") as calls:
        found, refused = prepared(tmp_path / "out", root, **SPLITS)
    assert len(calls) == 4
    assert refused == [("pool/bad.png", "unlabelled", "not an image")]
    assert len(found) == len(with_splits()) + 3


def test_what_is_known_of_images_is_what_decoding_showed(tmp_path):
    root = write(tmp_path / "in", with_splits() | ODD)
    _, refused = prepared(tmp_path / "first", root, **SPLITS)
    assert "further frames" in {reason for _, _, reason in refused}
    (tmp_path / "first scratch").rename(tmp_path / "second scratch")
    with counting("pipeline.core.intake.examined.decode_first") as calls:
        prepared(tmp_path / "second", root, **SPLITS)
    assert calls == []
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.parametrize("changed", ["its own", "decoding"])
@pytest.mark.parametrize(
    ("module", "begin"),
    [
        (examined, lambda scratch: examined.Examined(scratch, 1000)),
        (reencoding, lambda scratch: reencoding.Reencoded(scratch, 16, 90)),
    ],
)
def test_what_other_code_has_found_does_not_hold(tmp_path, monkeypatch, module, begin, changed):
    scratch, copy = tmp_path / "scratch", tmp_path / "code.py"
    scratch.mkdir()

    def names():
        begin(scratch)
        return {path.name for path in scratch.iterdir()}

    before = names()
    assert names() == before
    its = module if changed == "its own" else images
    copy.write_text(f"{Path(its.__file__).read_text()}# changed")
    monkeypatch.setattr(its, "__file__", str(copy))
    assert not names() & before


def test_encoded_images_whose_bytes_were_lost_are_encoded_anew(tmp_path, capsys):
    """The journal names them all, but the file beside it was cut off, as by a machine that stopped."""
    root, changes = write(tmp_path / "in", with_splits()), {"max_side": 16, "jpeg_quality": 90}
    prepared(tmp_path / "whole", root, **SPLITS, **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_shards, "write", stop)
        prepared(tmp_path / "out", root, **SPLITS, **changes)
    shutil.rmtree(tmp_path / "out")
    (file,) = (tmp_path / "out scratch").glob("*.jpegs")
    os.truncate(file, file.stat().st_size // 4)
    capsys.readouterr()
    with counting("pipeline.core.intake.reencoding.encode") as calls:
        prepared(tmp_path / "out", root, **SPLITS, **changes)
    kept = len(with_splits()) - len(calls)
    assert 0 < kept < len(with_splits()) / 2
    assert f"prepare: {kept} images were encoded by an unfinished run\n" in capsys.readouterr().err
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "out")


def test_what_was_found_under_other_settings_does_not_hold(tmp_path):
    root = write(tmp_path / "in", with_splits())
    prepared(tmp_path / "out", root, **SPLITS)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="too many pixels"):
        prepared(tmp_path / "out", root, **SPLITS, max_pixels=100)


@pytest.mark.parametrize("other", [{"jpeg_quality": 50}, {"max_side": 8}])
def test_images_encoded_under_other_settings_are_not_taken(tmp_path, monkeypatch, other):
    root, before = write(tmp_path / "in", with_splits()), {"max_side": 16, "jpeg_quality": 90}
    prepared(tmp_path / "whole", root, **SPLITS, **before | other)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_shards, "write", stop)
        prepared(tmp_path / "out", root, **SPLITS, **before)
    shutil.rmtree(tmp_path / "out")
    left = {path.name for path in (tmp_path / "out scratch").glob("encoded-*")}
    prepared(tmp_path / "out", root, **SPLITS, **before | other)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "out")
    assert len(left) == 2
    assert not left & {path.name for path in (tmp_path / "out scratch").iterdir()}


def stop(*arguments: object) -> None:
    """Be Ctrl-C."""
    raise KeyboardInterrupt


def test_a_journal_of_other_code_is_not_taken_up(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("1")
    first = Journal(tmp_path, "made", [], [str(code)])
    first.add("line")
    first.close()
    assert [*Journal(tmp_path, "made", [], [str(code)]).lines()] == [["line"]]
    code.write_text("2")
    assert [*Journal(tmp_path, "made", [], [str(code)]).lines()] == []
    assert not first.path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-3],
        lambda content: content + b"\n\xff\xfe\0",
        lambda content: content + b'\n["x"]\n5\n[]\n00000000 [1]',
        lambda content: content.replace(b'"line 1"', b'"line 7"'),
    ],
)
def test_damaged_lines_of_a_journal_are_passed_over(tmp_path, damage):
    journal = Journal(tmp_path, "made", [], [])
    for number in range(3):
        journal.add(f"line {number}", number)
    journal.close()
    journal.path.write_bytes(damage(journal.path.read_bytes()))
    again = Journal(tmp_path, "made", [], [])
    sound = [["line 0", 0], ["line 1", 1], ["line 2", 2]]
    found = [*again.lines()]
    assert len(found) >= 2
    assert [line for line in sound if line in found] == found
    again.add("line 3", 3)
    again.close()
    assert [*Journal(tmp_path, "made", [], []).lines()] == [*found, ["line 3", 3]]
