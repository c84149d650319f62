"""The score stage: only what is new, or was damaged, is asked for."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_project import go
from images import write_folder

from pipeline import prepare, score
from pipeline.core import networks
from pipeline.core.data.dataset import ImageSet
from pipeline.core.networks import Classifier


def scores():
    return {file.name: file.read_bytes() for file in sorted(Path("data/score").iterdir())}


def test_a_grown_pool_is_scored_where_it_has_grown(cached_project, capsys):
    shutil.rmtree(".scratch/scored", ignore_errors=True)
    go(score)
    before, columns = scores(), {column: np.load(f"data/score/{column}.npy") for column in score.COLUMNS}
    write_folder(Path("more"), train=0, val=0, test=0, unlabelled=40)
    for file in Path("more/unlabelled").glob("*003?.png"):
        shutil.copy(file, "photos/unlabelled")
    Path(sorted(Path("photos/unlabelled").glob("*.png"))[0]).unlink()
    go(prepare)
    capsys.readouterr()
    go(score)
    assert f"score: {len(columns['ids']) - 1} images are scored already, 40 images to ask" in capsys.readouterr().out
    images, ids = ImageSet(Path("data/prepare/images")), np.load("data/score/ids.npy")
    assert (ids == images.ids[np.concatenate([images.rows("unlabelled"), images.rows("val", "test")])]).all()
    both, now, then = np.intersect1d(ids, columns["ids"], return_indices=True)
    assert len(columns["ids"]) > len(both) > 0.9 * len(columns["ids"])
    for column in score.COLUMNS:
        assert (np.load(f"data/score/{column}.npy")[now] == columns[column][then]).all()
    grown = scores()
    shutil.rmtree(".scratch/scored")
    go(score)
    for column in ("ids", "thumbnails"):
        assert scores()[f"{column}.npy"] == grown[f"{column}.npy"]
    assert np.allclose(np.load("data/score/logits.npy"), np.load(io.BytesIO(grown["logits.npy"])), atol=1e-4)
    assert before != grown


def test_another_network_with_the_same_weights_is_asked_anew(cached_project, monkeypatch, capsys):
    """Some of timm's networks have the same keys and shapes: mobilenetv3_small_100 and tf_mobilenetv3_small_100."""
    go(score)
    load = networks.load

    def of_another_name(*arguments):
        classifier, card = load(*arguments)
        return classifier, {**card, "model": f"tf_{card['model']}"}

    monkeypatch.setattr(networks, "load", of_another_name)
    capsys.readouterr()
    go(score)
    assert "scored already" not in capsys.readouterr().out


def test_answers_that_are_not_finite_are_refused_and_large_features_kept_in_range(cached_project, monkeypatch):
    embed = Classifier.embed
    monkeypatch.setattr(
        Classifier, "embed", lambda self, pixels: (embed(self, pixels)[0], torch.full((len(pixels), 3), 1e6))
    )
    shutil.rmtree(".scratch/scored", ignore_errors=True)
    go(score)
    assert (np.load("data/score/embeddings.npy") == 65504).all()
    shutil.rmtree(".scratch/scored")
    monkeypatch.setattr(
        Classifier, "embed", lambda self, pixels: (embed(self, pixels)[0] * torch.nan, pixels.flatten(1))
    )
    with pytest.raises(ValueError, match=r"^the teacher's logits of .*\.png are not finite"):
        go(score)
    shutil.rmtree(".scratch/score")


def test_what_a_run_was_about_to_replace_when_it_was_killed_is_used(cached_project, capsys):
    go(score)
    Path(".scratch/scored").rename(".scratch/.scored.old")  # between the two renames
    go(score)
    assert capsys.readouterr().out.endswith(" images are scored already, 0 images to ask the teacher about\n")


@pytest.mark.parametrize("damaged", ["logits.npy", "answers.json", "ids.npy"])
def test_damaged_scores_are_asked_for_again(cached_project, capsys, damaged):
    go(score)
    before = scores()
    capsys.readouterr()
    go(score)
    said = capsys.readouterr()
    assert "0 images to ask" in said.out
    assert "0/0" not in said.err
    assert scores() == before
    file = Path(".scratch/scored", damaged)
    content = bytearray(file.read_bytes())
    for wrong in (content[:50] + bytes([content[50] ^ 1]) + content[51:], content[:-3], b"", b"PK\3\4"):
        file.unlink()  # it may be a link to data/score's
        file.write_bytes(wrong)
        go(score)
        assert "scored already" not in capsys.readouterr().out
        assert scores() == before


@pytest.mark.parametrize("damaged", [None, "cut", "a bit", "a column"])
def test_a_killed_scoring_goes_on_from_its_last_whole_part(cached_project, monkeypatch, damaged):
    monkeypatch.setattr(score, "PART_IMAGES", 16)
    shutil.rmtree(".scratch/scored", ignore_errors=True)
    go(score)
    whole = scores()
    shutil.rmtree("data/score")
    shutil.rmtree(".scratch/scored")
    save, written = np.savez, []

    def count(file, **arrays):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(arrays["ids"]))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", count)
    with pytest.raises(KeyboardInterrupt):
        go(score)
    assert not Path("data/score").exists()
    monkeypatch.setattr(np, "savez", save)
    there = {file.name: file for file in Path(".scratch/score").rglob("part-*.npz")}
    assert len(there) == 2
    file = there["part-000001.npz"]
    content = file.read_bytes()
    if damaged == "cut":
        file.write_bytes(content[:-1000])
    elif damaged == "a bit":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damaged == "a column":
        with np.load(file) as part:
            columns = {name: part[name] for name in part.files[:-1]}
        with file.open("wb") as handle:
            save(handle, **columns)
    kept, asked = set(there) - ({file.name} if damaged else set()), []

    def note(file, **arrays):
        asked.append(Path(file.name).name)
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", note)
    go(score)
    assert asked
    assert not any(name in file for file in asked for name in kept)
    assert scores() == whole
