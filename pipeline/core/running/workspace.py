"""A folder for a run with changed parameters: the user's tree as it is now, with a params.yaml of its own.

    .scratch/workspaces/NAME/        NAME is a hash of the changes: the same changes again go on in the same workspace
        WHERE/THE/PROJECT/IS/        the project's own path again, so that ../photos in params.yaml still leads there
        dvc/                         DVC's notes about this workspace
        complete                     there once the workspace has been set up
    .scratch/runs/RUN/               what stays of a run that ended well: params.yaml, dvc.lock, metrics, report

It is a git clone, brought up to the user's uncommitted changes, and shares DVC's cache: what the change does not touch
is checked out of it, and what the run makes is there for the user's tree. Where a run that ended well had more of these
settings than the tree has, its results are where the new one begins, so that its soft labels are not asked for again. A
workspace stays when its run fails or is cancelled, and goes when a run has ended well.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import atomic, params, recorded
from pipeline.core.intake import archives
from pipeline.core.resume import SCORED, SCRATCH
from pipeline.core.running import dvc, params_file

MAKE_LABELS = ("prepare", "teacher", "mine", "cache")  # stages; what cache says counts most
LABELS_DEPEND_ON = ("seed", "views", "teacher", "cache", "mine", "prepare")  # sections, what matters most first
# By these git tells its hooks which repository they are of (the more common of `git rev-parse --local-env-vars`).
GITS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
SETTINGS, SCORES = ("params.yaml", "dvc.lock"), ("data/evaluate/metrics.json", "data/evaluate/report.html")


@contextlib.contextmanager
def opened(root: Path, changes: dict[str, Any], say: Callable[[str], None]) -> Iterator[Path]:
    """Give the folder in which a run with these changes works; without changes, the user's tree itself.

    Args:
        root: the project's root.
        changes: keys of params.yaml, dotted or nested, and their values.
        say: called with a line about what goes on.

    Raises:
        ValueError: the project is not under git, or in a subfolder of a repository; files have changed since their
            `dvc add`; or DVC or git refused.
    """
    home = (root / SCRATCH / "workspaces" / (name(changes) if changes else "tree")).absolute()
    home.parent.mkdir(parents=True, exist_ok=True)
    with _only_user(home.with_suffix(".lock"), say):
        if not changes:
            yield root
            return
        _check_tree(root)
        folder = home.joinpath(*root.absolute().parts[1:])
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            say(f"setting up the workspace {folder}; it goes when a run has ended well, or with `make clean`")
            if others := [other for other in home.parent.iterdir() if other.is_dir() and other != home]:
                gigabytes = sum(map(_bytes, others)) / 1e9
                say(f"other workspaces, of runs that are stopped or at work: {len(others)}, {gigabytes:.1f} GB")
            set_up(root, folder, changes, home / "dvc")
            (home / "complete").touch()
        else:
            say(f"going on in the workspace {folder}")
            # A DVC killed as it wrote this leaves it empty, and every other then refuses; none is at work here.
            (folder / ".dvc/tmp/rwlock").unlink(missing_ok=True)
            unlink_inputs(folder)  # else what follows would write through the links, into the user's own folders
            copy_tree(root, folder, keep=("dvc.lock",))  # it says which stages this workspace has done
            if added := sorted(str(file) for file in _files(folder) if str(file).endswith(".dvc")):
                _check_out(folder, added)
            params_file.write(root, folder, changes)
        link_inputs(root, folder)
        yield folder
        shutil.rmtree(home)


def name(changes: dict[str, Any]) -> str:
    """Name the workspace of some changes; how they are written (dotted, nested, in which order) does not matter."""
    return hashlib.sha256(json.dumps(params.flat(changes), sort_keys=True, default=str).encode()).hexdigest()[:12]


def keep_results(folder: Path, root: Path, run: str, scored: bool) -> Path:
    """Copy what a run is remembered by from its workspace to the user's tree, in place of a former run's of that name.

    Returns:
        the folder.

    Args:
        scored: the run brought the scores up to date; else those in its workspace are of another one.
    """
    kept = root / SCRATCH / "runs" / _file_name(run)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing_folder(kept) as beside:
        for result in (*SETTINGS, *(SCORES if scored else ())):
            if (folder / result).exists():
                shutil.copy2(folder / result, beside)
    return kept


def _file_name(run: str) -> str:
    """Give a run's name as one of a folder: of at most 200 bytes, not hidden, and not empty."""
    name = re.sub(r"^\.|^$|/", "_", run)
    if len(name.encode()) <= 200:
        return name
    return f"{name.encode()[:180].decode(errors='ignore')}-{hashlib.sha256(run.encode()).hexdigest()[:12]}"


def set_up(root: Path, folder: Path, changes: dict[str, Any], notes: Path) -> None:
    """Make a workspace: clone, uncommitted changes, DVC's settings, changed parameters, data."""
    _command(["git", "clone", "--quiet", "--no-checkout", str(root), str(folder)], root)
    copy_tree(root, folder)
    if lock := recorded.read_lock(nearest_lock(root, changes)):
        (folder / "dvc.lock").write_text(lock, encoding="utf-8")
    if (root / ".dvc/config.local").exists():
        shutil.copy2(root / ".dvc/config.local", folder / ".dvc/config.local")
    dvc.share_cache(root, folder, notes)
    if (root / SCORED).exists():  # what `score` has asked the teacher already
        with contextlib.suppress(shutil.Error):  # another run replaces it: `score` sees that it is not whole
            shutil.copytree(root / SCORED, folder / SCORED, copy_function=_link_or_copy)
    _check_out(folder)
    params_file.write(root, folder, changes)


def nearest_lock(root: Path, changes: dict[str, Any]) -> Path:
    """Name the dvc.lock, the tree's own or a finished run's, whose soft labels were made with settings most like these.

    Of two locks the one that shares the first section of LABELS_DEPEND_ON that they do not both share is the nearer.
    DVC restores every other stage from its cache whatever the lock says, but not `cache`, which goes on from what it
    finds.
    """
    wanted = params_file.changed(root, changes)

    def in_common(lock: Path) -> list[bool]:
        settings = _settings_of(lock)
        return [section in settings and settings[section] == wanted.get(section) for section in LABELS_DEPEND_ON]

    return max([root / "dvc.lock", *sorted((root / SCRATCH / "runs").glob("[!.]*/dvc.lock"))], key=in_common)


def _settings_of(lock: Path) -> dict[str, Any]:
    """Give the sections, or keys, of params.yaml with which a dvc.lock's soft labels were made."""
    try:
        stages = (params.parse(recorded.read_lock(lock)) or {}).get("stages") or {}
    except ValueError:  # it is not whole, and stays so
        return {}
    made: dict[str, Any] = {}
    for stage in MAKE_LABELS:
        made |= stages.get(stage, {}).get("params", {}).get("params.yaml", {})
    return made


def copy_tree(root: Path, folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Bring a clone up to the tree as it is now: its commit, and its tracked and new files; ignored ones stay out.

    Args:
        root: the user's tree.
        folder: the clone.
        keep: files of the clone to leave alone.
    """
    if _command(["git", "rev-parse", "--quiet", "--verify", "HEAD"], root, may_fail=True):  # there is a commit
        _command(["git", "fetch", "--quiet", str(root), "HEAD"], folder)
        _command(["git", "reset", "--quiet", "FETCH_HEAD"], folder)
    wanted = {file for file in _files(root) if (root / file).is_symlink() or (root / file).is_file()}
    for file in _files(folder) - wanted - set(keep):
        (folder / file).unlink(missing_ok=True)
    for file in wanted - {file for file in keep if (folder / file).exists()}:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if (folder / file).is_dir() and not (folder / file).is_symlink():
            shutil.rmtree(folder / file)  # it has become a file
        (folder / file).unlink(missing_ok=True)
        shutil.copy2(root / file, folder / file, follow_symlinks=False)


def link_inputs(root: Path, folder: Path) -> None:
    """Link what stages read and neither git nor DVC brought: files beside the project, and ignored ones within it."""
    read, made = dvc.inputs_and_outputs(folder)
    read |= {folder / text for text in _texts(params_file.read(folder))}

    def link(path: Path, source: Path) -> None:
        if path in (folder, source) or any(path.is_relative_to(out) for out in made) or not source.exists():
            return
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(source)
        elif path.is_dir() and not path.is_symlink():  # some of it came with git
            for inner in source.iterdir():
                link(path / inner.name, inner)

    for path in sorted(Path(os.path.normpath(path)) for path in read):  # a folder before what is in it
        link(path, Path(os.path.normpath(root / os.path.relpath(path, folder))))


def unlink_inputs(folder: Path) -> None:
    """Remove the links to folders outside of a workspace; those that are tracked come back with the tree."""
    for link in archives.links_out(folder):
        link.unlink()


def without_git(variables: Mapping[str, str]) -> dict[str, str]:
    """Give environment variables without those that name a git repository: a workspace has its own."""
    return {name: value for name, value in variables.items() if name not in GITS}


def _check_tree(root: Path) -> None:
    """Make sure that a workspace can be as the tree is: it is cloned, and gets what .dvc files name from the cache."""
    top = _command(["git", "rev-parse", "--show-toplevel"], root).removesuffix("\n")
    if not root.samefile(top):
        raise ValueError(
            f"{root}: a folder of the git repository {top}, but a run with changes needs a project that is a "
            "repository of its own; a run without changes, and dvc, work here"
        )
    for file, path in dvc.edited(root):
        raise ValueError(f"{file}: its files have changed since `dvc add`; run `dvc add {shlex.quote(path)}` first")


@contextlib.contextmanager
def _only_user(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    with file.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another such run is at work: waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_out(folder: Path, files: Iterable[str] = ()) -> None:
    """Bring what .dvc files name, or all that DVC knows of, from its cache; what that lacks stays away."""
    _command([sys.executable, "-m", "dvc", "checkout", "--quiet", "--force", "--allow-missing", *files], folder)


def _bytes(folder: Path) -> int:
    """What a folder takes on the disk; what is linked to does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a run is at work there
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def _link_or_copy(file: str, to: str) -> None:
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    return [value] if isinstance(value, str) and value else []


def _files(folder: Path) -> set[str]:
    """A git tree's files, tracked ones and new ones that are not ignored."""
    listed = _command(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], folder)
    return set(listed.split("\0")) - {""}


def _command(command: list[str], folder: Path, may_fail: bool = False) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=without_git(os.environ),
        capture_output=True,
        text=True,
        errors="surrogateescape",  # names of files may be no UTF-8
        check=False,
    )
    if done.returncode and not may_fail:
        raise ValueError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
