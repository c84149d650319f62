"""dvc.yaml against the code: every stage depends on the source files that it imports, and on nothing else of it.

Run: python tests/test_graph.py (writes these lists into dvc.yaml)
"""

import ast
import importlib
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from images import tiny, write_folder

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@cache
def imports_of(file: Path) -> frozenset[Path]:
    """The project's files that a file imports itself, the packages on the way and its templates included."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                path = ROOT.joinpath(*parts[:length])
                found |= {f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()}
    return frozenset(found) | {template for template in file.parent.glob("*.j2") if template.name in file.read_text()}


def sources_of(stage: str) -> list[str]:
    """All files of the project that a stage's process loads, as paths in the project."""
    waiting, seen = [ROOT / f"pipeline/{stage}.py"], {ROOT / "pipeline/__init__.py"}
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting.extend(imports_of(file) if file.suffix == ".py" else ())
    return sorted(str(file.relative_to(ROOT)) for file in seen)


def write_deps() -> None:
    """Put each stage's source files into dvc.yaml, in place of those that it lists."""
    lines, stage, written = [], "", set()
    for line in (ROOT / "dvc.yaml").read_text().splitlines(keepends=True):
        if (name := re.match(r"  (\w+):", line)) and name[1] in STAGES:
            stage = name[1]
        if not re.match(r"      - (pipeline|models)/", line):
            lines.append(line)
        elif stage not in written:
            written.add(stage)
            lines += [f"      - {file}\n" for file in sources_of(stage)]
    (ROOT / "dvc.yaml").write_text("".join(lines))


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_what_the_stage_imports(stage):
    named = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("pipeline/", "models/"))]
    assert named == sources_of(stage), "dvc.yaml's deps of this stage should list exactly these files, in this order"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage):
    others = {f"pipeline/{other}.py" for other in STAGES if other != stage} | {"pipeline/flow.py"}
    assert not others & set(sources_of(stage))


def test_core_imports_no_stage():
    stages = {ROOT / f"pipeline/{stage}.py" for stage in STAGES}
    for file in (ROOT / "pipeline/core").rglob("*.py"):
        assert not stages & imports_of(file), file


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_its_own_section(stage):
    assert STAGES[stage]["cmd"] == f"python -m pipeline.{stage}"
    assert stage in STAGES[stage]["params"]


def test_the_flow_has_dvcs_edges():
    """The flow's graph, as DVC gives it, against the folders that dvc.yaml names."""
    from pipeline.core.running import dvc

    makes = {
        out if isinstance(out, str) else next(iter(out)): name
        for name, stage in STAGES.items()
        for out in stage["outs"]
    }
    reads = {}
    for name, stage in STAGES.items():
        deps = [dep.replace("${prepare.labelled_root}", "data/digits") for dep in stage["deps"]]
        reads[name] = sorted({makes[out] for dep in deps for out in makes if dep == out or dep.startswith(f"{out}/")})
    assert dvc.graph(ROOT) == reads


def test_each_stage_needs_no_other_data_than_dvc_yaml_names(tmp_path, monkeypatch):
    """Each runs in a folder that holds nothing else; what it writes goes back to where all of it is."""
    everything = tmp_path / "everything"
    write_folder(everything / "photos", train=10, val=4, test=5, unlabelled=3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    settings = tiny()
    for stage in [*STAGES][1:]:
        here = tmp_path / stage
        here.mkdir()
        for dep in STAGES[stage]["deps"]:
            source = everything / ("photos" if dep.startswith("${prepare.") else dep)
            if source.is_dir():
                shutil.copytree(source, here / source.relative_to(everything), dirs_exist_ok=True)
            elif source.is_file():
                (here / dep).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, here / dep)
        monkeypatch.chdir(here)
        importlib.import_module(f"pipeline.{stage}").run(settings)
        shutil.move(here / "data" / stage, everything / "data" / stage)
    assert (everything / "data/register/version.json").exists()


if __name__ == "__main__":
    write_deps()
