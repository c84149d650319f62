"""Workspaces: the user's tree as it is now, with other parameters, and no trace in it."""

import os
import re
import shutil
import threading

import pytest
import toy_project
import yaml
from workspaces import CHANGES, failing, opened

from pipeline import score
from pipeline.core.running import dvc, workspace


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A toy project whose stages have run; dvc.lock is not committed."""
    toy = toy_project.make(tmp_path_factory.mktemp("jörg"))
    toy_project.execute(toy, "dvc", "repro", "--quiet")
    return toy


@pytest.fixture(autouse=True)
def _no_trace(request):
    """Whatever a test does with a workspace, the user's tree is afterwards what it was before."""
    if "reproduced" not in request.fixturenames:
        yield
        return
    toy = request.getfixturevalue("reproduced")

    def seen():
        asked = (["status", "--short"], ["branch", "--all"], ["worktree", "list"], ["stash", "list"])
        return [toy_project.execute(toy, "git", *what) for what in asked]

    before = seen()
    yield
    assert seen() == before


def test_without_changes_it_is_the_tree_itself(reproduced):
    with opened(reproduced, {}) as folder:
        assert folder == reproduced


def test_only_what_the_change_touches_runs_and_only_results_stay(reproduced):
    with opened(reproduced) as folder:
        assert dvc.outdated(folder) == {"distill", "evaluate"}
        toy_project.execute(folder, "dvc", "repro", "--quiet")
        kept = workspace.keep_results(folder, reproduced, "brave-otter", scored=True)
    assert not folder.exists()
    assert {file.name for file in kept.iterdir()} == {"params.yaml", "dvc.lock", "metrics.json", "report.html"}
    assert yaml.safe_load((kept / "params.yaml").read_text())["distill"]["epochs"] == 3
    own = yaml.safe_load((reproduced / "params.yaml").read_text())["distill"]["epochs"]
    assert f"distill {own};" in (reproduced / "data/evaluate/said.txt").read_text()
    assert dvc.outdated(reproduced) == set()
    with opened(reproduced) as folder:  # a new workspace, but what the last one made is in the user's cache
        assert "is cached - skipping run" in toy_project.execute(folder, "dvc", "repro")
        assert "distill 3;" in (folder / "data/evaluate/said.txt").read_text()


def test_it_begins_where_the_run_with_most_of_its_settings_ended(reproduced):
    with opened(reproduced, {"teacher.epochs": 5}) as folder:
        toy_project.execute(folder, "dvc", "repro", "--quiet")
        kept = workspace.keep_results(folder, reproduced, "calm-heron", scored=True)
    try:
        with opened(reproduced, {"teacher.epochs": 5, "distill.epochs": 4}) as folder:
            assert dvc.outdated(folder) == {"distill", "evaluate"}
        with opened(reproduced, {"distill.epochs": 4}) as folder:
            assert dvc.outdated(folder) == {"distill", "evaluate"}
    finally:
        shutil.rmtree(kept)


def test_the_trees_own_labels_are_of_its_last_run_whatever_its_settings_say_now(tmp_path):
    toy = toy_project.make(tmp_path)
    toy_project.execute(toy, "dvc", "repro", "--quiet")
    with opened(toy, {"views.flip": 0.25, "cache.min_probability": 0.00003}) as folder:
        toy_project.execute(folder, "dvc", "repro", "--quiet")
        kept = workspace.keep_results(folder, toy, "calm-heron", scored=True)
    settings = toy / "params.yaml"
    assert workspace.nearest_lock(toy, {"distill.epochs": 4}) == toy / "dvc.lock"
    settings.write_text(re.sub(r"flip: \S+", "flip: 0.25", settings.read_text()))
    assert workspace.nearest_lock(toy, {"distill.epochs": 4}) == kept / "dvc.lock"
    (toy / "dvc.lock").write_text("")  # as while it is written
    assert workspace.nearest_lock(toy, {"distill.epochs": 4}) == kept / "dvc.lock"
    kept.rename(kept.with_name(".calm-heron.part"))  # as while it is copied
    assert workspace.nearest_lock(toy, {"distill.epochs": 4}) == toy / "dvc.lock"


def test_labels_of_the_same_teacher_are_nearer_than_those_of_the_same_mining(tmp_path):
    toy = toy_project.make(tmp_path)
    settings = yaml.safe_load((toy / "params.yaml").read_text())
    for run, other in (("a", "mine"), ("b", "teacher")):
        shared = {section: settings[section] for section in workspace.LABELS_DEPEND_ON if section != other}
        stages = {"teacher": {"teacher": "trained anew since"}, "cache": shared}
        lock = {stage: {"params": {"params.yaml": made}} for stage, made in stages.items()}
        (toy / ".scratch/runs" / run).mkdir(parents=True)
        (toy / ".scratch/runs" / run / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
    assert workspace.nearest_lock(toy, {}) == toy / ".scratch/runs/a/dvc.lock"


def test_it_begins_with_the_trees_scores(tmp_path):
    toy = toy_project.make(tmp_path)
    (toy / score.SCORED).mkdir(parents=True)
    (toy / score.SCORED / "answers.json").write_text("{}")
    with opened(toy) as folder:
        assert (folder / score.SCORED / "answers.json").read_text() == "{}"


def test_a_git_that_runs_a_hook_keeps_its_index(tmp_path, monkeypatch):
    toy = toy_project.make(tmp_path / "toy")
    tree = tmp_path / "tree"
    toy_project.execute(toy, "git", "worktree", "add", "--quiet", str(tree))
    for name in "ab":
        (tree / f"{name}.txt").write_text(name)
    toy_project.execute(tree, "git", "add", "a.txt", "b.txt")
    before = toy_project.execute(tree, "git", "status", "--porcelain")
    where = toy_project.execute(tree, "git", "rev-parse", "--absolute-git-dir").strip()
    monkeypatch.setenv("GIT_DIR", where)
    monkeypatch.setenv("GIT_INDEX_FILE", f"{where}/index")
    with opened(tree) as folder:
        assert (folder / "b.txt").exists()
    monkeypatch.undo()
    assert toy_project.execute(tree, "git", "status", "--porcelain") == before


def test_a_lock_file_that_another_dvc_is_writing_is_waited_for(tmp_path):
    toy = toy_project.make(tmp_path)
    toy_project.execute(toy, "dvc", "repro", "--quiet")
    lock, whole = toy / "dvc.lock", (toy / "dvc.lock").read_text()
    for part in (whole[:100], ""):
        lock.write_text(part)
        writer = threading.Timer(1, lock.write_text, [whole])
        writer.start()
        assert dvc.graph(toy).keys() == toy_project.EDGES.keys()
        writer.join()
    lock.write_text(whole[:100])
    writer = threading.Timer(2, lock.write_text, [whole])
    writer.start()
    with opened(toy) as folder:
        assert (folder / "dvc.lock").read_text() == whole
    writer.join()


def test_a_runs_results_take_the_place_of_those_of_that_name(tmp_path):
    toy = toy_project.make(tmp_path / "toy")
    for result in workspace.SCORES:
        (toy / result).parent.mkdir(parents=True, exist_ok=True)
        (toy / result).write_text("{}")
    first = workspace.keep_results(toy, toy, "../a/b", scored=True)
    assert {file.name for file in first.iterdir()} >= {"params.yaml", "metrics.json"}
    again = workspace.keep_results(toy, toy, "../a/b", scored=False)
    assert again == first
    assert first.parent == toy / ".scratch/runs"
    for odd in ("..", "", "ü" * 150):
        assert workspace.keep_results(toy, toy, odd, scored=False).parent == first.parent
    assert (first / "params.yaml").exists()
    assert not (again / "metrics.json").exists()


def test_params_keep_their_comments(reproduced):
    with opened(reproduced) as folder:
        before = (reproduced / "params.yaml").read_text().splitlines()
        after = (folder / "params.yaml").read_text().splitlines()
    ((old, new),) = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    setting, comment = old.split("#")
    assert setting.split()[0] == "epochs:"
    assert new.split("#") == [setting.replace(setting.split()[1], "3").ljust(new.index("#")), comment]


def test_paths_out_of_the_project_lead_where_they_led(reproduced):
    with opened(reproduced) as folder:
        assert (folder / "../photos/one.txt").samefile(reproduced / "../photos/one.txt")
        relative = toy_project.execute(folder, "python", "-c", "print(open('../photos/one.txt').read())")
        assert relative.strip() == "one"


def test_a_failed_run_goes_on_without_what_the_cache_lacks(tmp_path):
    toy = toy_project.make(tmp_path)
    for name in ("lost", "other"):
        (toy / "data" / name).mkdir(parents=True)
        (toy / "data" / name / "one.txt").write_text(name)
        toy_project.execute(toy, "dvc", "add", "--quiet", f"data/{name}")
    with failing(opened(toy)) as folder:
        shutil.rmtree(folder / "data/other")
    shutil.rmtree(toy / "data/lost")
    digest = yaml.safe_load((toy / "data/lost.dvc").read_text())["outs"][0]["md5"]
    (toy / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    with opened(toy) as folder:
        assert (folder / "data/other/one.txt").read_text() == "other"


def test_a_failed_run_goes_on_in_the_same_workspace_and_a_good_one_leaves_none(reproduced):
    said = []
    with failing(opened(reproduced, said=said)) as folder:
        toy_project.execute(folder, "dvc", "repro", "--quiet", "distill")
        (folder / ".dvc/tmp/rwlock").write_text("")  # as a DVC leaves it that is killed as it writes it
    with opened(reproduced, {"distill": {"epochs": 3}}, said) as again:
        assert again == folder
        assert dvc.outdated(again) == {"evaluate"}
    assert not folder.exists()
    assert [line.split(" the ")[0] for line in said] == ["setting up", "going on in"]


def test_what_stopped_runs_keep_is_told(tmp_path):
    toy, said = toy_project.make(tmp_path), []
    with failing(opened(toy)) as folder, (folder / "large").open("wb") as file:
        file.write(os.urandom(60_000_000))
        for link in ("one", "two"):  # which take nothing
            (folder / link).symlink_to("large")
    with failing(opened(toy, {"distill.epochs": 4}, said)):
        pass
    assert [line for line in said if "other" in line] == [
        "other workspaces, of runs that are stopped or at work: 1, 0.1 GB"
    ]


def test_a_half_made_workspace_is_made_anew(reproduced):
    home = reproduced / ".scratch/workspaces" / workspace.name(CHANGES)
    half = home.joinpath(*reproduced.parts[1:])
    half.mkdir(parents=True)
    (half / "half").touch()
    with opened(reproduced) as folder:
        assert folder == half
        assert not (folder / "half").exists()


@pytest.mark.parametrize("changes", [{}, CHANGES])
def test_equal_runs_wait_for_each_other(reproduced, changes):
    said, order = [], []

    def second():
        with opened(reproduced, changes, said):
            order.append("second")

    with opened(reproduced, changes):
        waiter = threading.Thread(target=second)
        waiter.start()
        while not said:
            pass
        order.append("first")
    waiter.join()
    assert order == ["first", "second"]
    assert "waiting" in said[0]


def test_other_changes_do_not_wait(reproduced):
    with opened(reproduced) as one, opened(reproduced, {"distill.epochs": 4}) as other:
        assert one != other


def test_a_name_does_not_depend_on_how_changes_are_written():
    one = workspace.name({"distill.epochs": 3, "seed": 1, "distill.lr": 0.1})
    assert one == workspace.name({"seed": 1, "distill": {"lr": 0.1, "epochs": 3}})
    assert one != workspace.name({"seed": 1, "distill": {"lr": 0.1, "epochs": 4}})
    mixed = {"ssld": 1.0, "hard": 0.5}
    assert workspace.name({"distill.loss": mixed}) == workspace.name({"distill": {"loss": mixed}})


def test_graph_of_stages(reproduced):
    graph = dvc.graph(reproduced)
    assert {stage: set(reads) for stage, reads in graph.items()} == toy_project.EDGES
    assert all(list(graph).index(other) < list(graph).index(stage) for stage in graph for other in graph[stage])
    assert set(dvc.upstream(graph, ["distill"])) == {"prepare", "teacher", "distill"}
    with pytest.raises(ValueError, match="teachr: no such stage"):
        dvc.upstream(graph, ["teachr"])


def test_a_lock_file_that_a_killed_dvc_left_damaged_is_named(tmp_path):
    toy = toy_project.make(tmp_path)
    (toy / ".dvc/tmp").mkdir(exist_ok=True)
    (toy / ".dvc/tmp/rwlock").write_text("")
    with pytest.raises(ValueError, match=r"toy/\.dvc/tmp/rwlock is damaged: delete it, when no other DVC is at "):
        dvc.outdated(toy)


def test_a_damaged_site_cache_of_dvcs_is_one_line(tmp_path):
    toy = toy_project.make(tmp_path)
    dvc.share_cache(toy, toy, tmp_path / "notes")
    dvc.outdated(toy)
    for database in (tmp_path / "notes").rglob("cache.db"):
        database.write_bytes(b"damaged" * 1000)
    with pytest.raises(ValueError, match=r"^DVC in .*toy: file is not a database: its site cache .* may be deleted$"):
        dvc.outdated(toy)


def test_graph_of_a_broken_project_is_one_line(tmp_path):
    toy = toy_project.make(tmp_path)
    (toy / "dvc.yaml").write_text("stages: {prepare: {comand: x}}")
    with pytest.raises(ValueError, match=r"DVC in .*dvc\.yaml"):
        dvc.graph(toy)
