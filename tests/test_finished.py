"""The finished student's record: what a version's tags, its key and its settings' digest are made of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from student_project import NAME, ROOT, write_images

from pipeline.core import digests
from pipeline.core import params as settings
from pipeline.core.results import finished


def test_a_version_of_a_run_without_dvcs_record_has_no_tags_of_it(project):
    record = finished.describe(finished.read(project.data), NAME, 1.0)
    params = settings.load(ROOT / "params.yaml")
    assert finished.lineage(record, params, project.data)["dvc.data/cache"] == "abc.dir"
    Path("dvc.lock").write_text("")  # as while DVC writes it
    assert not any(tag.startswith("dvc.") for tag in finished.lineage(record, params, project.data))
    Path("dvc.lock").write_text("stages:\n<<<<<<< HEAD\n  cache: {}\n")
    with pytest.raises(ValueError, match=r"^dvc.lock: not YAML, as after a merge"):
        finished.lineage(record, params, project.data)


def test_a_damaged_note_of_the_soft_labels_is_not_believed(project):
    student, params = finished.read(project.data), settings.load(ROOT / "params.yaml")
    file = project.data / "cache" / "cache.json"
    file.write_text(file.read_text().replace("ccc", "dcc", 1))  # JSON still
    with pytest.raises(ValueError, match=r"cache\.json: damaged"):
        finished.lineage(finished.describe(student, NAME, 1.0), params, project.data)
    with pytest.raises(ValueError, match=r"cache\.json: damaged"):
        finished.count_mined(student, params, project.data)


def test_a_version_s_tags_name_the_data_the_teacher_and_the_soft_labels_that_dvc_keeps(project):
    stages = ("digits", "prepare", "teacher", "cache", "distill")
    outs = {name: {"outs": [{"path": f"data/{name}", "md5": f"{name}.dir"}, {"path": name}]} for name in stages}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": outs}))
    record = finished.describe(finished.read(project.data), NAME, 1.0)
    tags = finished.lineage(record, settings.load(ROOT / "params.yaml"), project.data)
    assert {tag: value for tag, value in tags.items() if tag.startswith("dvc.")} == {
        f"dvc.data/{name}": f"{name}.dir" for name in ("prepare", "teacher", "cache")
    }


def test_the_settings_digest_is_the_same_on_another_machine_and_in_another_order(project):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    record = finished.describe(finished.read(project.data), NAME, 1.0)

    def digest(changes=None, order=lambda keys: keys):
        params = settings.check(settings.with_changes(content, changes or {}))
        params = type(params).model_validate(dict(order([*params.model_dump(by_alias=True).items()])))
        return finished.lineage(record, params, project.data)["digest.params"]

    assert digest() == digest({"machine.workers": 7}) == digest(order=lambda keys: keys[::-1])
    assert len({digest(), digest({"seed": 5}), digest({"distill.epochs": 77})}) == 3
    assert digests.of_json({"a": 1, "b": 2}) == digests.of_json({"b": 2, "a": 1})


def test_a_version_belongs_to_how_it_was_shown_which_images(project):
    def key(crop=1.0, **changes):
        student = finished.read(project.data)
        return finished.describe(replace(student, card=student.card | changes), NAME, crop)["key"]

    other = {"model": "m", "classes": [], "resolution": 24, "mean": [0.5], "std": [0.5], "digest": "d"}
    keys = {key(), key(crop=0.9), *(key(**{name: value}) for name, value in other.items())}
    assert key(parameters=1) == key()
    write_images(project.data / "prepare", lambda at: 0)  # the same images under other labels
    assert len({*keys, key()}) == 9


def test_the_same_images_and_class_names_are_the_same_test(project, made_project):
    """Whatever the order of the classes, and however many more of them there are."""
    before, order, classes = finished.read(project.data), (3, 0, 2), ["dog", "ant", "owl", "cat"]
    images = write_images(project.data / "prepare", lambda at: order[made_project.labels[at]], classes=classes)
    after = replace(before, images=images, rows=images.rows("test"))
    assert after.test_digest == before.test_digest
    images = write_images(project.data / "prepare", made_project.labels.__getitem__, classes=["dog", "ant", "owl"])
    assert replace(before, images=images, rows=images.rows("test")).test_digest != before.test_digest


def test_a_summary_of_other_images_is_refused(project):
    write_images(project.data / "other", lambda at: 0)
    shutil.copy(project.data / "other/summary.json", project.data / "prepare")
    with pytest.raises(
        ValueError, match=r"summary.json: tells of other images than .*known holds; .*dvc repro prepare"
    ):
        finished.read(project.data)


def test_the_record_has_the_students_own_top1(project):
    figures = {"teacher": {"top1": 0.9}, "baseline": {"top1": 0.5}, "student": {"top1": 0.8}}
    (project.data / "evaluate/metrics.json").write_text(json.dumps(figures))
    assert finished.describe(finished.read(project.data), NAME, 1.0)["top1"] == 0.8
