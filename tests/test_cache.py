"""The cache stage: only what is missing is asked; what does not belong is set aside; cached equals online."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_project import go, settings
from images import write_folder

from pipeline import audit, cache, distill, mine, prepare, score, teacher
from pipeline.core import labelling, networks, recheck, softlabels, teaching
from pipeline.core.data.batches import Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.softlabels import SoftLabels, sealed, writing
from pipeline.core.softlabels import __main__ as softlabels_command
from pipeline.core.train import distillation


def shards():
    return {file.name: file.read_bytes() for file in sorted(Path("data/cache").glob("labels-*.sl"))}


def stored_views():
    return json.loads(Path("data/cache/cache.json").read_text())["stored_views"]


def test_every_view_is_there_once(cached_project):
    images = ImageSet(Path("data/prepare/images"))
    assert stored_views() == 2 * (len(images.rows("labelled")) + len(images.rows("unlabelled")))
    labels = SoftLabels(Path("data/cache"), teaching.description(settings(), networks.read_card(Path("data/teacher"))))
    assert len(labels) == stored_views()


def test_again_nothing_is_asked(cached_project, capsys):
    before = shards()
    go(cache)
    assert "0 views to ask" in capsys.readouterr().out
    assert shards() == before


@pytest.mark.parametrize("most", [1, 3, 64, 1000])
def test_stored_views_are_found_among_many_missing_ones(most):
    random = np.random.default_rng(0)
    for count in (0, 1, 7, 500):
        for share in (0.0, 0.5, 0.99, 1.0):
            missing = np.flatnonzero(random.random(count) < share)
            stored = np.setdiff1d(np.arange(count), missing)
            chosen = cache.stored_among(count, missing, most)
            assert len(chosen) == min(most, len(stored))
            assert (chosen == stored[np.linspace(0, len(stored) - 1, len(chosen)).astype(int)]).all()


def test_a_stopped_run_keeps_its_keys_and_one_with_other_settings_does_not_take_them(cached_project, monkeypatch):
    kept, write = Path(".scratch/cache"), cache.write_missing
    shutil.rmtree("data/cache")

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_missing", stopped)
    with pytest.raises(KeyboardInterrupt):
        go(cache)
    (first,) = kept.glob("wanted-*.npy")
    (kept / f".{first.name}.part").touch()  # as kill -9 leaves it
    monkeypatch.setattr(labelling.Labelling, "keys", None)
    with pytest.raises(KeyboardInterrupt):
        go(cache)  # no key is made
    monkeypatch.undo()
    monkeypatch.chdir(cached_project)
    monkeypatch.setattr(cache, "write_missing", stopped)
    with pytest.raises(KeyboardInterrupt):
        go(cache, **{"cache.replicas": 3})
    (other,) = kept.glob("*wanted*")
    assert other.name != first.name
    monkeypatch.setattr(cache, "write_missing", write)
    go(cache)
    assert not list(kept.glob("wanted-*"))


def test_a_grown_pool_costs_its_own_views(cached_project, capsys):
    before, weights, views = shards(), networks.read_card(Path("data/teacher"))["digest"], stored_views()
    write_folder(Path("more"), train=0, val=0, test=0, unlabelled=40)
    for file in Path("more/unlabelled").glob("*003?.png"):
        shutil.copy(file, "photos/unlabelled")
    go(prepare, teacher, score, mine)
    assert networks.read_card(Path("data/teacher"))["digest"] == weights
    capsys.readouterr()
    go(cache)
    assert stored_views() > views + 40
    assert f"{stored_views() - views} views to ask" in capsys.readouterr().out
    assert before.items() < shards().items()


def test_a_shrunken_pool_costs_nothing(cached_project, capsys):
    before = shards()
    for file in list(Path("photos/unlabelled").glob("*.png"))[:5]:
        file.unlink()
    go(prepare, teacher, score, mine)
    capsys.readouterr()
    go(cache)
    assert "0 views to ask" in capsys.readouterr().out
    assert shards() == before


def test_more_replicas_cost_only_the_new_ones(cached_project, capsys):
    before, views = shards(), stored_views()
    go(cache, **{"cache.replicas": 3})
    assert f"{views // 2} views to ask" in capsys.readouterr().out
    assert before.items() < shards().items()


def test_a_lost_shard_alone_is_computed_again(cached_project, capsys):
    before = shards()
    Path("data/cache", sorted(before)[1]).unlink()
    go(cache)
    assert "16 views to ask" in capsys.readouterr().out
    assert shards() == before


def test_other_views_set_the_labels_aside_and_find_them_again(cached_project, capsys):
    before = shards()
    go(cache, **{"views.flip": 0.5})
    assert shards() != before
    go(cache)
    assert "0 views to ask" in capsys.readouterr().out.splitlines()[-1]
    assert shards() == before


def test_a_teacher_that_answers_otherwise_stops_the_stage(cached_project, monkeypatch):
    before, answer = shards(), teaching.answer
    monkeypatch.setattr(teaching, "answer", lambda *asked: answer(*asked) + torch.arange(4))  # as other code might
    with pytest.raises(ValueError, match=r"answers otherwise about \d+ of 64 stored views.*remove data/cache"):
        go(cache, **{"cache.replicas": 6})
    assert shards() == before
    monkeypatch.undo()
    monkeypatch.chdir(cached_project)
    go(cache)
    assert shards() == before


def test_labels_of_other_views_are_refused_by_name(cached_project):
    params = settings(**{"views.flip": 0.5})
    with pytest.raises(ValueError, match=r"views\.flip differ.*dvc repro cache"):
        teaching.open_labels(teaching.description(params, networks.read_card(Path("data/teacher"))))


def test_cached_and_online_differ_by_rounding_alone(cached_project):
    params = settings()
    images = ImageSet(Path("data/prepare/images"))
    views = Views(images, ViewSpec.of(params.seed, params.views))
    rows = images.rows("labelled", "unlabelled")
    batch = views[rows, np.ones(len(rows), np.int64)]
    cpu = torch.device("cpu")
    stored, name = distillation.open_teacher(params, images, asked_online=False, device=cpu)
    asked, same_name = distillation.open_teacher(params, images, asked_online=True, device=cpu)
    assert name == same_name
    for temperature in (1.0, 3.0):
        a, b = stored(batch, temperature), asked(batch, temperature)
        assert torch.allclose(a, b, rtol=0.01, atol=1e-5)


def test_a_damaged_shard_alone_is_computed_again(cached_project, capsys):
    before = shards()
    name = sorted(before)[1]
    Path("data/cache", name).write_bytes(before[name][:-40] + bytes(40))
    go(cache)
    said = capsys.readouterr().out
    assert f"{name}: its checksum does not hold: set aside" in said
    assert "16 views to ask" in said
    assert shards() == before


def test_a_foreign_shard_is_set_aside(cached_project):
    before = shards()
    go(cache, **{"views.flip": 0.5})
    foreign = next(content for name, content in shards().items() if name not in before or content != before[name])
    go(cache)
    Path("data/cache", "labels-0000000000000000.sl").write_bytes(foreign)
    go(cache)
    assert shards() == before


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_disk_that_takes_no_more_is_one_line_and_what_is_written_stays(cached_project, monkeypatch, what):
    before = shards()
    shutil.rmtree("data/cache")
    write, written = sealed.atomic.replacing, []

    def fail(path):
        if len(written) == 5:  # the keys, an index of no shard, what is missing, and two shards
            error = errno.ENOSPC if what == "full" else errno.EROFS
            raise OSError(error, os.strerror(error), str(path))
        written.append(path)
        return write(path)

    monkeypatch.setattr(sealed.atomic, "replacing", fail)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC if what == "full" else errno.EROFS)):
        go(cache)
    assert len(shards()) == 2
    assert shards().items() < before.items()
    monkeypatch.undo()
    monkeypatch.chdir(cached_project)
    go(cache)
    assert shards() == before


def test_the_command_says_what_a_cache_holds(cached_project, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["softlabels"])
    softlabels_command.main()
    said = capsys.readouterr().out
    assert f"{stored_views():,} views in" in said
    assert "ResNet18_vd, 4 classes" in said
    assert "all hold" in said
    name = sorted(shards())[0]
    Path("data/cache", name).write_bytes(shards()[name][:-1] + b"?")
    with pytest.raises(SystemExit, match=rf"{name}: damaged, or another shard in its place.*dvc repro --force"):
        softlabels_command.main()


@pytest.mark.parametrize(("total", "count"), [(1, 1), (10, 10), (10, 7), (1000, 3), (4_000_000_000, 256)])
def test_an_audit_spreads_its_views(total, count):
    chosen = audit.spread(total, count, seed=0)
    assert len(chosen) == count
    assert np.array_equal(chosen * count // total, np.arange(count)) or count * 2 > total  # one of each part
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert max(audit.spread(total, count, seed)[-1] for seed in range(200)) >= min(total - 1, total * (1 - 0.1 / count))
    assert total == count or not np.array_equal(chosen, audit.spread(total, count, seed=1))


def test_what_is_lost_is_the_stored_answers_divergence_from_the_teachers():
    teacher, stored = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    wanted = [0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), np.log(1 / 0.8)]
    assert recheck._divergence(teacher, stored) == pytest.approx(wanted)


def test_an_audit_finds_the_teachers_answers_and_notices_others(cached_project, monkeypatch, capsys):
    params = settings()
    monkeypatch.setattr(sys, "argv", ["audit", "--share", "1"])
    monkeypatch.setattr(audit, "load", lambda file: params)
    findings = audit.audit(params, share=1.0, seed=0)
    assert len(set(zip(findings.samples.tolist(), findings.replicas.tolist(), strict=True))) == stored_views()
    assert set(findings.replicas) == set(range(params.cache.replicas))
    assert findings.same.mean() > 0.99
    assert not findings.wrong.any()
    with pytest.raises(SystemExit) as ended:
        audit.main()
    assert ended.value.code == 0
    assert f"audit: {stored_views()} views asked again" in capsys.readouterr().out
    # Labels that hold together, but are not this teacher's answers to these views: another's are written.
    description = teaching.description(params, networks.read_card(Path("data/teacher")))
    labels = SoftLabels(Path("data/cache"), description)
    keys = [shard.keys() for shard in labels.shards]
    logits = torch.randn(len(keys[0]), 4, generator=torch.Generator().manual_seed(0)) * 5
    softlabels.shards.write(labels.folder, description.fingerprint, keys[0], description.coding.encode(logits))
    writing.write_index(labels.folder, description)
    findings = audit.audit(params, share=1.0, seed=0)
    assert findings.wrong.sum() >= len(keys[0]) // 2
    with pytest.raises(SystemExit) as ended:
        audit.main()
    assert ended.value.code == 1
    assert "wrong: sample " in capsys.readouterr().out
    assert len(audit.audit(params, share=0.01, seed=0).same) == min(audit.LEAST_VIEWS, stored_views())


def test_a_high_temperature_over_classes_that_are_not_stored_is_warned_of(cached_project, capsys):
    for temperature in (4.0, 1.0):
        for stage in (cache, distill):
            go(stage, **{"cache.top_k": 2, "distill.temperature": temperature, "distill.epochs": 1})
            warned = "temperature 4 weighs all 4 classes, of which the cache stores the 2" in capsys.readouterr().out
            assert warned == (temperature == 4.0)


def test_what_the_coding_loses_is_not_wrong_and_what_is_no_number_is():
    views = np.arange(3)
    findings = recheck.Findings(views, views, views > 3, np.array([0.5, 0.5, np.nan]), np.array([0.4999, 0.4, 0.4]))
    assert findings.wrong.tolist() == [False, True, True]
