"""What a run would cost, against sums done by hand; how many weights and multiply-adds a network has is looked up."""

import sys

import pytest
from images import ROOT, tiny

import models
from pipeline import plan

COUNTS = {"labelled": 100, "unlabelled": 300, "withheld": 200, "val": 30, "test": 50, "classes": 10}
COUNTS |= {"image_kb": 2.5, "view_bytes": 25}
TEACHER, STUDENT = "ResNet18_vd", "test_resnet"
# Of 16 pixels, the teacher's 32, fixres's 20; 2 replicas, 2 epochs but 1 of finetune and fixres, batches of 16 and 8
SETTINGS = {"teacher.model": TEACHER, "teacher.resolution": 32, "student.model": STUDENT}
SETTINGS |= {"teacher.source": "fit", "teacher.fit_on": "withheld"}
TEACHERS, STUDENTS = ("teacher", "score", "cache"), ("baseline", "distill", "finetune", "fixres")


def settings(**changes):
    return tiny(**SETTINGS | {name.replace("__", "."): value for name, value in changes.items()})


def counts(**changes):
    return plan.Counts(**COUNTS | changes)


def macs(name, resolution, classes=10):
    return models.macs(models.build(name, classes), resolution)


@pytest.mark.parametrize(("pool", "mined"), [(300, 80), (60, 60)])
def test_each_stage_sees_so_many_images_in_so_many_steps(pool, mined):
    asks, answers, larger = macs(TEACHER, 32), macs(STUDENT, 16), macs(STUDENT, 20)
    used, scored = 100 + mined, pool + 30 + 50
    found = plan.work(settings(), counts(unlabelled=pool))
    assert {task.stage: (task.passes, task.steps, task.operations, task.by) for task in found} == {
        "teacher": (2 * 300, 2 * (300 // 16), 2 * 300 * 6 * asks, "fit"),
        "score": (scored, 0, scored * 2 * asks, "teacher"),
        "cache": (2 * used, 0, 2 * used * 2 * asks, "teacher"),
        "baseline": (2 * 100, 2 * (100 // 8), 2 * 100 * 6 * answers, "student"),
        "distill": (2 * used, 2 * (used // 8), 2 * used * 6 * answers, "student"),
        "finetune": (100, 100 // 8, 100 * 6 * answers, "student"),
        "fixres": (100, 100 // 8, 100 * 2 * larger, "student"),
    }


def test_a_teacher_is_fitted_to_what_it_may_see_or_not_at_all():
    def fitted(**changes):
        return [task.passes for task in plan.work(settings(**changes), counts()) if task.stage == "teacher"]

    assert fitted() == [2 * 300]
    assert fitted(teacher__fit_on="labelled") == [2 * 100]
    assert fitted(teacher__source="timm") == []


def test_a_batch_larger_than_the_data_set_is_a_step():
    (task,) = (task for task in plan.work(settings(baseline__batch_size=101), counts()) if task.stage == "baseline")
    assert task.steps == 2


def test_a_teacher_in_the_loop_is_not_planned_for():
    with pytest.raises(ValueError, match=r"^distill.online is true: the teacher in the loop is not planned for$"):
        plan.work(settings(distill__online=True), counts())


def test_the_disk_is_what_stages_write():
    teacher, student = (sum(p.numel() for p in models.build(name, 10).parameters()) for name in (TEACHER, STUDENT))
    assert [*plan.sizes(settings(), counts()).values()] == [
        2500 * (100 + 300 + 30 + 50),
        380 * (10 * 4 + 512 * 2 + 32 * 32),  # logits, embeddings, a thumbnail
        360 * (25 + 8 + 4),
        4 * (teacher + 4 * student),
    ]
    many = plan.sizes(settings(mine__per_class=2**31), counts(unlabelled=2**31))  # positions beyond 32 bits
    assert many["data/cache, soft labels with keys and index"] == 2 * (100 + 2**31) * (25 + 8 + 8)


@pytest.mark.parametrize(("classes", "kept", "few"), [(10, 10, 10), (1000, 100, 10), (5, 5, 5)])
def test_records_of_several_formats(classes, kept, few):
    found = plan.records(settings(), counts(classes=classes))
    views = 2 * (100 + min(300, 8 * classes))
    assert [*found.values()] == [views * (25 - 9), views * (4 * kept + 4), views * 4 * few, views * 2 * classes]
    assert f"TinyViT's, k = {kept}" in found


def test_the_report_has_hours_by_stage_and_network_and_gigabytes():
    """A teacher that answers 2 images/s, and is fitted to a third of that; a student that trains on 3."""
    own, many = settings(), counts(labelled=100_000, unlabelled=3000, image_kb=10_000)
    lines = plan.report(own, many, plan.Rates(teacher=2.0, student=3.0)).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split() and line.split()[0] in TEACHERS + STUDENTS}
    images = {task.stage: task.passes for task in plan.work(own, many)}
    hours = {stage: images[stage] / {"teacher": 2 / 3, "score": 2, "cache": 2}.get(stage, 3) / 3600 for stage in images}
    hours["fixres"] *= 2 * macs(STUDENT, 20) / (6 * macs(STUDENT, 16))
    assert {stage: row[-1] for stage, row in rows.items()} == {key: plan.figure(value) for key, value in hours.items()}
    assert {stage: row[1] for stage, row in rows.items()} == {
        **dict.fromkeys(("teacher", "score", "cache"), TEACHER),
        **dict.fromkeys(STUDENTS, STUDENT),
    }
    sums = {who: line.split()[-1] for line in lines for who in ("teacher", "student") if line.startswith(f"{who}, in")}
    assert sums == {
        "teacher": plan.figure(sum(hours[stage] for stage in TEACHERS)),
        "student": plan.figure(sum(hours[stage] for stage in STUDENTS)),
    }
    sizes = plan.sizes(own, many)
    told = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in lines if line}
    assert told["in all, checkpoints not counted"] == plan.figure(sum(sizes.values()) / 1e9)
    assert told["data/prepare, the images once more"] == "1,030"
    assert f"  {TEACHER} answers 2 images/s of 32 pixels, " in "\n".join(lines)
    assert f"  {STUDENT} trains on 3 images/s of 16 pixels, " in "\n".join(lines)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.0099, "< 0.01"), (0.01, "0.0100"), (1234.5, "1,230")])
def test_less_than_a_minute_is_said_to_be_so_little(value, text):
    assert plan.in_hours(value) == text


def test_networks_are_shown_what_they_take():
    """levit_128s takes images of 224 pixels only."""
    teacher = {"teacher__model": "levit_128s"}
    plan.check_resolutions(settings(**teacher, teacher__resolution=224), counts())
    with pytest.raises(ValueError, match=r"^levit_128s does not take images of 16 pixels"):
        plan.check_resolutions(settings(**teacher, teacher__resolution=None), counts())
    student = {"student__model": "levit_128s", "views__resolution": 224}
    plan.check_resolutions(settings(**student, fixres__resolution=224), counts())
    with pytest.raises(ValueError, match=r"^levit_128s does not take images of 256 pixels"):
        plan.check_resolutions(settings(**student, fixres__resolution=256), counts())


@pytest.mark.parametrize("option", ["--tflops", "--teacher-rate", "--student-rate"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_speed_is_a_number_above_0(monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["plan", "digits", f"{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        plan.main()
    assert ended.value.code == 2
    assert f"{option} is a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  val: 140\n", "  val: -1\n", "plan.val: Input should be greater than or equal to 0"),
        ("  classes: 10\n", "", "plan.classes: Field required"),
    ],
)
def test_a_wrong_count_is_named(tmp_path, old, new, words):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    text = (ROOT / "recipes/digits.yaml").read_text()
    assert old in text
    (tmp_path / "recipes/digits.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError) as error:
        plan.read("digits", tmp_path)
    assert str(error.value) == f"recipes/digits.yaml: {words}"
