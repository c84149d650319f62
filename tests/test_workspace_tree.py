"""What of the user's tree is in a workspace: files that git knows, and those that it does not."""

import os
import re
import shutil

import pytest
import toy_project
import yaml
from workspaces import CHANGES, failing, opened

from pipeline.core.running import dvc


def test_uncommitted_changes_new_files_and_deletions_are_in(tmp_path):
    toy, changes = toy_project.make(tmp_path), {"prepare.train": "."}
    (toy / "gone.txt").write_text("committed")
    toy_project.execute(toy, "git", "add", "gone.txt")
    toy_project.execute(toy, "git", "commit", "--quiet", "--message", "more")
    (toy / "gone.txt").unlink()
    (toy / "toy.py").write_text((toy / "toy.py").read_text() + "# changed\n")
    (toy / "new file.txt").write_text("new")
    (toy / os.fsdecode(b"caf\xe9.txt")).write_text("no UTF-8")
    for link, target in (("to nothing", "nowhere"), ("to a file", "toy.py")):
        (toy / link).symlink_to(target)
    (toy / ".scratch").mkdir()
    (toy / ".scratch/note").write_text("ignored")
    with failing(opened(toy, changes)) as folder:
        assert (folder / "toy.py").read_text().endswith("# changed\n")
        assert (folder / "new file.txt").read_text() == "new"
        assert (folder / os.fsdecode(b"caf\xe9.txt")).read_text() == "no UTF-8"
        assert [os.readlink(folder / link) for link in ("to nothing", "to a file")] == ["nowhere", "toy.py"]
        assert not (folder / "gone.txt").exists()
        assert not (folder / ".scratch").exists()
        states = [toy_project.execute(where, "git", "status", "--short") for where in (toy, folder)]
        assert states[1].splitlines() == [*states[0].splitlines()[:1], " M params.yaml", *states[0].splitlines()[1:]]
    (toy / "toy.py").write_text("# changed once more\n")
    toy_project.execute(toy, "git", "commit", "--quiet", "--all", "--message", "later")
    (toy / "new file.txt").unlink()
    with opened(toy, changes) as folder:
        assert (folder / "toy.py").read_text() == "# changed once more\n"
        assert not (folder / "new file.txt").exists()
        heads = [toy_project.execute(where, "git", "rev-parse", "HEAD") for where in (toy, folder)]
        assert heads[0] == heads[1]


def test_ignored_and_dvc_added_inputs_are_there(tmp_path):
    toy = toy_project.make(tmp_path)
    for name in ("added", "ignored"):
        (toy / "data" / name).mkdir(parents=True)
        (toy / "data" / name / "one.txt").write_text(name)
    (toy / "data/kept").mkdir()
    (toy / "data/kept/README").write_text("in git")
    (toy / "data/kept/weights").write_text("not in git")
    toy_project.execute(toy, "git", "add", "--force", "data/kept/README")
    toy_project.execute(toy, "dvc", "add", "--quiet", "data/added")
    toy_project.execute(toy, "dvc", "config", "--local", "cache.type", "symlink")
    stages = yaml.safe_load((toy / "dvc.yaml").read_text())
    stages["stages"]["prepare"]["deps"] += ["data/added", "data/ignored", "data/kept"]
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages))
    toy_project.execute(toy, "dvc", "repro", "--quiet")
    with opened(toy) as folder:
        assert dvc.outdated(folder) == {"distill", "evaluate"}
        assert "data/added.dvc" in dvc.graph(folder)["prepare"]
        assert not (folder / "data/added").is_symlink()
        assert (folder / "data/added/one.txt").is_symlink()  # as this machine's own settings ask
        assert (folder / "data/ignored").is_symlink()
        assert (folder / "data/kept/weights").read_text() == "not in git"


def test_files_that_have_changed_since_dvc_add_are_refused(tmp_path):
    """DVC's cache, from which a workspace gets them, has the old ones."""
    toy = toy_project.make(tmp_path)
    added = toy / "data/my photos"
    added.mkdir(parents=True)
    (added / "one.txt").write_text("old")
    toy_project.execute(toy, "dvc", "add", "--quiet", "data/my photos")
    with failing(opened(toy)) as folder:
        assert (folder / "data/my photos/one.txt").read_text() == "old"
    (added / "one.txt").write_text("new")
    (added / "two.txt").write_text("more")
    words = "data/my photos.dvc: its files have changed since `dvc add`; run `dvc add 'data/my photos'` first"
    for changes in (CHANGES, {"distill.epochs": 4}):  # a workspace that is there, and a new one
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"), opened(toy, changes):
            pass
    with opened(toy, {}) as folder:
        assert folder == toy
    toy_project.execute(toy, "dvc", "add", "--quiet", "data/my photos")
    with failing(opened(toy)) as folder:
        assert {one.name: one.read_text() for one in (folder / "data/my photos").iterdir()} == {
            "one.txt": "new",
            "two.txt": "more",
        }
    shutil.rmtree(added)  # as in a clone, before `dvc pull`
    with opened(toy, {"distill.epochs": 4}) as folder:
        assert (folder / "data/my photos/one.txt").read_text() == "new"


def test_photographs_are_linked_and_no_matter_of_git(tmp_path):
    """README.md tells people to put them into data/photos, and that `dvc add` is up to them."""
    toy = toy_project.make(tmp_path)
    photo, ignored = toy / "data/photos/train/one.jpg", toy / "data/.gitignore"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"photo")
    shutil.copy(toy_project.ROOT / "data/.gitignore", ignored)
    changes = {"prepare.labelled_root": "data/photos"}
    with opened(toy, changes) as folder:
        assert (folder / "data/photos").is_symlink()
        assert (folder / "data/photos/train/one.jpg").samefile(photo)
    toy_project.execute(toy, "git", "add", ".")
    assert "data/photos" not in toy_project.execute(toy, "git", "ls-files")
    toy_project.execute(toy, "dvc", "add", "--quiet", "data/photos")
    assert ignored.read_text() == (toy_project.ROOT / "data/.gitignore").read_text()
    toy_project.execute(toy, "git", "add", ".")
    assert "data/photos.dvc" in toy_project.execute(toy, "git", "ls-files").splitlines()
    with opened(toy, changes) as folder:
        assert not (folder / "data/photos").is_symlink()
        assert (folder / "data/photos/train/one.jpg").read_bytes() == b"photo"


def test_going_on_leaves_the_folders_alone_that_were_linked(tmp_path):
    """What was ignored, and so linked into the workspace, may be tracked when the run goes on."""
    toy = toy_project.make(tmp_path)
    ignored, file = toy / "data/ignored", toy / ".gitignore"
    file.write_text(file.read_text().replace("/data/ignored/", "/data/ignored"))
    (ignored / "train").mkdir(parents=True)
    (ignored / "train/a.txt").write_text("a")
    (toy / "becomes").mkdir()
    (toy / "becomes/folder").write_text("")
    changes = {"prepare.labelled_root": "data/ignored"}
    with failing(opened(toy, changes)) as folder:
        assert (folder / "data/ignored").is_symlink()
    toy_project.execute(toy, "git", "add", "--force", "data/ignored")
    (ignored / "train/b.txt").write_text("not tracked")
    (ignored / "train/a.txt").write_text("edited")
    shutil.rmtree(toy / "becomes")
    (toy / "becomes").write_text("a file")
    with failing(opened(toy, changes)) as folder:
        assert (folder / "data/ignored/train/a.txt").read_text() == "edited"
        assert (folder / "becomes").read_text() == "a file"
    assert {one.name: one.read_text() for one in (ignored / "train").iterdir()} == {
        "a.txt": "edited",
        "b.txt": "not tracked",
    }


def test_without_a_commit_it_is_the_tree_as_well(tmp_path):
    toy = toy_project.make(tmp_path)
    shutil.rmtree(toy / ".git")
    toy_project.execute(toy, "git", "init", "--quiet")
    with opened(toy) as folder:
        assert (folder / "toy.py").read_text() == (toy / "toy.py").read_text()
        assert dvc.outdated(folder) == set(toy_project.EDGES)


def test_what_stages_made_is_not_linked(tmp_path):
    """A stage would write through the link, into the user's own folder."""
    toy = toy_project.make(tmp_path)
    (toy / "data/teacher").mkdir(parents=True)
    (toy / "data/.gitignore").write_text("/teacher\n")  # as DVC does; its dvc.lock is gone
    with opened(toy) as folder:
        assert not os.path.lexists(folder / "data/teacher")


def test_without_git_it_says_so(tmp_path):
    (tmp_path / "params.yaml").write_text((toy_project.ROOT / "params.yaml").read_text())
    with pytest.raises(ValueError, match="git"), opened(tmp_path):
        pass


def test_in_a_folder_of_another_repository_it_says_so(tmp_path):
    toy = toy_project.make(tmp_path)
    shutil.rmtree(toy / ".git")
    shutil.rmtree(toy / ".dvc")
    toy_project.execute(tmp_path, "git", "init", "--quiet")
    toy_project.execute(toy, "dvc", "init", "--quiet", "--subdir")
    words = f"{toy}: a folder of the git repository {tmp_path}, but a run with changes needs "
    with pytest.raises(ValueError, match=f"^{re.escape(words)}.*; a run without changes, and dvc, "), opened(toy):
        pass
    with opened(toy, {}) as folder:
        assert dvc.outdated(folder) == set(toy_project.EDGES)
