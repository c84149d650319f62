"""Recipes: applied and taken back, every one run shrunken through all that trains, and what they would cost."""

import itertools
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from images import CLASSES, ROOT, small_settings, write_folder

import models
from pipeline import baseline, cache, distill, finetune, fixres, mine, plan, prepare, recipes, score, teacher
from pipeline.core import networks, params
from pipeline.core.data.dataset import ImageSet
from pipeline.core.running import params_file

NAMES = recipes.names(ROOT)
STAGES = (prepare, teacher, score, mine, cache, baseline, distill, finetune, fixres)
# What a few shapes on a CPU cannot do as a recipe says: its images, networks, weights, sizes and epochs.
SHRUNKEN = {
    **small_settings(),
    "prepare.train": "train",
    "prepare.val": "val",
    "prepare.test": "test",
    "prepare.unlabelled": "unlabelled",
    "teacher.model": "test_resnet",
    "teacher.source": "fit",
    "teacher.checkpoint": None,
    "teacher.init": None,
    "student.model": "test_resnet",
    "student.init": None,
    **{f"{stage}.epochs": 1 for stage in ("teacher", "baseline", "distill")},
    **{f"{stage}.warmup_epochs": 0 for stage in ("teacher", "baseline", "distill", "finetune", "fixres")},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the default's params.yaml and the recipes."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(project):
    return yaml.safe_load((project / "params.yaml").read_text())


def flat(name):
    """The keys that a recipe's own file sets."""
    content = recipes.read(name, ROOT).settings
    return {f"{section}.{key}": value for section, keys in content.items() for key, value in keys.items()}


PUBLISHED = {  # as the recipes' headers say where
    "imagenet_v2": {
        "distill.lr": 0.4,
        "distill.batch_size": 1024,
        "distill.epochs": 120,
        "distill.weight_decay": 7e-5,
    },
    "imagenet_ssld": {
        "mine.per_class": 4000,
        "mine.rank_by": "probability",
        "baseline.weight_decay": 7e-5,
        "distill.loss": "ssld",
        "distill.epochs": 360,
        "distill.batch_size": 1024,
        "distill.lr": 0.4,
        "distill.weight_decay": 7e-5,
        "finetune.epochs": 60,
        "finetune.lr": 0.004,
        "fixres.resolution": 320,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_were_published_stay(name):
    assert {key: flat(name)[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_recipes_are_these():
    assert sorted(NAMES) == ["cifar10", "cifar10_small", "digits", "imagenet_ssld", "imagenet_v2", "photos"]
    assert NAMES[0] == "digits"


def test_digits_is_the_default_and_holds_every_key_that_a_recipe_sets(project):
    default = flat("digits")
    assert set(default) == set().union(*map(flat, NAMES))
    own = settings(project)
    found = {key: own[key.split(".")[0]][key.split(".")[1]] for key in default}
    assert found == default, "params.yaml's defaults have changed: write them into recipes/digits.yaml, too"


@pytest.mark.parametrize("name", NAMES)
def test_the_first_lines_say_what_it_gives_and_costs(name):
    head = (ROOT / f"recipes/{name}.yaml").read_text().split("\nplan:")[0].splitlines()
    assert all(line.startswith("#") and len(line) <= 120 for line in head)
    assert head[0].startswith(f"# {name}: ")
    for word in ("Gives:", "Costs, ", "Needs:", "Published"):
        assert any(line.startswith(f"# {word}") for line in head), word
    assert "measured" in "".join(head)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_applied_and_taken_back_to_the_byte(project, name):
    before = (project / "params.yaml").read_text()
    params_file.check(project, recipes.changes(name))  # a flow run takes it so
    changed = recipes.apply(name)
    after = settings(project)
    for key, value in flat(name).items():
        section, _, inner = key.partition(".")
        assert after[section][inner] == value, key
    params.load(project / "params.yaml")
    assert (changed == {}) == (name == "digits")
    text = (project / "params.yaml").read_text()
    assert [line.partition("#")[2] for line in text.splitlines()] == [
        line.partition("#")[2] for line in before.splitlines()
    ]
    recipes.apply("digits")
    assert (project / "params.yaml").read_text() == before


@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(NAMES[1:], 2)))
def test_which_recipe_was_there_before_does_not_matter(project, first, then):
    recipes.apply(then)
    alone = settings(project)
    recipes.apply(first)
    recipes.apply(then)
    assert settings(project) == alone


def test_what_no_recipe_sets_stays(project):
    file = project / "params.yaml"
    file.write_text(file.read_text().replace("workers: auto ", "workers: 7 ").replace("seed: 0 ", "seed: 5 "))
    recipes.apply("imagenet_ssld")
    assert settings(project)["machine"]["workers"] == 7
    assert settings(project)["seed"] == 5


def test_an_applied_weight_decay_is_a_number_to_any_reader(project):
    recipes.apply("imagenet_ssld")
    text = (project / "params.yaml").read_text()
    assert "weight_decay: 0.00007 " in text
    assert "crop_scale: [0.08, 1.0] " in text


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("imgnet_v2", "", "", "no recipe is called 'imgnet_v2'; did you mean imagenet_v2?"),
        ("cifar10", "  replicas:", "  replica:", "cache.replica: unknown key; did you mean cache.replicas?"),
        ("cifar10", "\nmine:", "\nmien:", "mien: unknown key; did you mean mine?"),
        ("cifar10", "flip: 0.5", "flip: 5", "views.flip: should be less than or equal to 1, not 5"),
        ("cifar10", "\nmine:", "\nmine: [", "not YAML: "),
        ("cifar10", "\nplan:", "\nplans:", "expected sections with keys, 'plan' among them"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_params_as_they_are(project, name, old, new, message):
    before = (project / "params.yaml").read_text()
    if old:
        file = project / f"recipes/{name}.yaml"
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError) as error:
        recipes.apply(name)
    assert str(error.value).removeprefix(f"recipes/{name}.yaml: ").startswith(message)
    assert ("recipes/" in str(error.value)) == bool(old)
    assert "\n" not in str(error.value)
    assert (project / "params.yaml").read_text() == before


def test_the_command_lists_applies_and_refuses(project):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "pipeline.recipes", *words],
            capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    assert [line.split(":")[0] for line in run().stdout.splitlines()] == NAMES
    assert run("apply", "cifar10").stdout.splitlines()[-1].startswith("params.yaml is set to cifar10: ")
    assert settings(project)["prepare"]["train"] == "torchvision:CIFAR10"
    wrong = run("apply", "cifar100")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "recipes: error: no recipe is called 'cifar100'; did you mean cifar10?\n",
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_shrunken_through_all_stages_that_train(project, monkeypatch, name):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    write_folder(project / "photos", train=10, val=4, test=5, unlabelled=3)
    recipes.apply(name)
    shrunken = params.check(params.with_changes(settings(project), SHRUNKEN))
    for stage in STAGES:
        stage.run(shrunken)
    assert len(ImageSet(project / "data/prepare/images").rows("labelled")) == 16
    network, card = networks.load(project / "data/fixres")
    assert card["classes"] == list(CLASSES)
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def costs(name, **rates):
    """A recipe's settings and counts, and the rates given, as `python -m pipeline.plan` has them."""
    return *plan.read(name, ROOT), plan.Rates(**rates)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_networks_are_known_and_its_plan_is_said(name):
    said = plan.report(*costs(name))
    own, counts, _ = costs(name)
    for model in (own.teacher.model, own.student.model):
        assert models.canonical(model)
        assert f"  {model} " in said
    assert ("an assumption" in said) == (counts.student_rate is None)
    assert "Nothing was run." in said


ESTIMATES = [name for name in NAMES if "# Costs, an estimate: teacher" in (ROOT / f"recipes/{name}.yaml").read_text()]


def test_recipes_that_were_not_run_give_estimates():
    assert ESTIMATES == ["imagenet_ssld", "imagenet_v2", "photos"]


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_first_lines_have_the_hours_and_the_disk_of_the_plan(name):
    own, counts, given = costs(name)
    assert counts.measured_on
    head = " ".join((ROOT / f"recipes/{name}.yaml").read_text().replace("\n#  ", "").split())
    told = re.search(r"teacher ([\d.]+) GPU-hours.*?, student ([\d.]+) .*?, ([\d.]+) (GB|TB) of disk", head)
    speed, hours = plan.speeds(own, counts, given), {"teacher": 0.0, "student": 0.0}
    for task in plan.work(own, counts):
        hours["student" if task.by == "student" else "teacher"] += task.operations / speed[task.by].operations / 3600
    assert float(told[1]) == pytest.approx(hours["teacher"], rel=0.03)
    assert float(told[2]) == pytest.approx(hours["student"], rel=0.03)
    disk = sum(plan.sizes(own, counts).values()) / {"GB": 1e9, "TB": 1e12}[told[4]]
    assert float(told[3]) == pytest.approx(disk, rel=0.05)


def test_the_published_run_in_numbers():
    own, counts, given = costs("imagenet_ssld")
    tasks = {task.stage: task for task in plan.work(own, counts)}
    used = 1_268_355 + 4_000_000
    assert tasks["cache"].passes == tasks["distill"].passes == 360 * used
    assert tasks["distill"].steps == 360 * (used // 1024)
    assert tasks["finetune"].passes == 60 * 1_268_355
    # Multiply-adds as models/networks.py has them
    assert tasks["cache"].operations == 360 * used * 2 * 36_163_289_088
    assert tasks["distill"].operations == 360 * used * 6 * 4_328_824_832
    assert tasks["fixres"].operations == 10 * 1_268_355 * 2 * 8_832_204_800
    speed = plan.speeds(own, counts, given)
    assert tasks["cache"].operations / speed["teacher"].operations == pytest.approx(360 * used / 642)
    assert tasks["distill"].operations / speed["student"].operations == pytest.approx(360 * used / 1078)
    assert plan.sizes(own, counts)["data/cache, soft labels with keys and index"] == 360 * used * (99 + 12)
    assert plan.records(own, counts)["TinyViT's, k = 100"] == 360 * used * 404


def test_a_given_rate_goes_before_teraflops_and_those_before_the_recipes():
    own, counts, given = costs("imagenet_v2", tflops=100.0, student=500.0)
    speed = plan.speeds(own, counts, given)
    assert speed["teacher"].operations == 100e12
    assert speed["student"].operations == 500 * 6 * 4_328_824_832
    assert "--tflops" in speed["teacher"].where_from
    assert "--student-rate" in speed["student"].where_from
    assert "one H100" in plan.speeds(*costs("imagenet_v2"))["student"].where_from


def test_a_teacher_is_fitted_at_its_own_rate_where_one_was_measured():
    own, counts, given = costs("digits")
    (fitted,) = (task for task in plan.work(own, counts) if task.stage == "teacher")
    seconds = fitted.operations / plan.speeds(own, counts, given)[fitted.by].operations
    assert seconds == pytest.approx(fitted.passes / counts.fit_rate)
    for other in (costs("digits", tflops=1.0), costs("digits", teacher=1.0), costs("imagenet_v2")):
        speed = plan.speeds(*other)
        assert speed["fit"] == speed["teacher"]


def test_a_plan_of_a_network_that_does_not_take_the_images_says_so(project, monkeypatch, capsys):
    file = project / "recipes/digits.yaml"
    file.write_text(file.read_text().replace("model: ResNet50_vd", "model: levit_128s"))
    monkeypatch.setattr(sys, "argv", ["plan", "digits"])
    with pytest.raises(
        SystemExit, match=r"^plan: error: levit_128s does not take images of 32 pixels: .* made for 224$"
    ):
        plan.main()
    monkeypatch.setattr(sys, "argv", ["plan", "digits", "--tflops", "inf"])
    with pytest.raises(SystemExit):
        plan.main()
    assert "--tflops is a number above 0" in capsys.readouterr().err


def test_a_misspelt_key_of_the_plan_names_the_nearest(project):
    file = project / "recipes/digits.yaml"
    file.write_text(file.read_text().replace("  teacher_rate:", "  teacher_rat:"))
    with pytest.raises(ValueError, match=r"^recipes/digits.yaml: plan.teacher_rat; did you mean teacher_rate\?$"):
        plan.read("digits")


@pytest.mark.parametrize(
    ("value", "text"),
    [(827.3, "827"), (1788.2, "1,790"), (0.00167, "0.00167"), (27.44, "27.4"), (9.996, "10.0"), (0, "0")],
)
def test_figures_have_three_digits_that_count(value, text):
    assert plan.figure(value) == text
