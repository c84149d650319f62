"""The studies: their networks, what deleting a part means, and both commands from prepared images to plot and table."""

import csv
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import deletion
import pytest
import torch
import yaml
from commands import listen, wait_until
from images import ROOT, small_settings, write_folder
from timm.models.resnet import BasicBlock
from torch import nn

from models import narrow
from pipeline import prepare
from pipeline.core import params

SMALL = ("--width", "4", "--epochs", "2", "--batch-size", "8", "--measured", "12")


def network(kind, depth=14, width=4, seed=0):
    """Build a network in eval mode whose norms are not trivial, as after training."""
    torch.manual_seed(seed)
    built = narrow.build(kind, depth, num_classes=5, width=width)
    for m in built.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return built.eval()


def parameters_by_hand(blocks, residual, width=16, classes=10):
    """Count the weights of section 4.2 of the paper, with 1x1 projections where a shortcut changes shape."""
    conv = lambda a, b, side: a * b * side**2 + 2 * b  # noqa: E731 - and its norm
    total, before = conv(3, width, 3), width
    for channels in (width, 2 * width, 4 * width):
        total += conv(before, channels, 3) + (2 * blocks - 1) * conv(channels, channels, 3)
        total += conv(before, channels, 1) if residual and before != channels else 0
        before = channels
    return total + before * classes + classes


@pytest.mark.parametrize("depth", [8, 20, 56, 110])
@pytest.mark.parametrize("kind", narrow.KINDS)
def test_narrow_networks_are_the_papers(kind, depth):
    built = narrow.build(kind, depth, num_classes=10)
    assert sum(p.numel() for p in built.parameters()) == parameters_by_hand((depth - 2) // 6, kind != "plain")
    layers = [m for m in built.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[-1] != 1]
    assert len(layers) == depth
    seen = []
    for stage in (built.layer1, built.layer2, built.layer3):
        stage.register_forward_hook(lambda module, given, gives: seen.append(tuple(gives.shape[1:])))
    assert built(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_papers_parameters():
    """Table 6: 0.27 and 1.7 million; without the projections, which the paper did not have on CIFAR."""
    for depth, millions in ((20, 0.27), (110, 1.73)):
        found = sum(p.numel() for p in narrow.build("plain", depth, 10).parameters())
        assert round(found / 1e6, 2) == millions


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_every_weight_of_a_narrow_network_learns(kind):
    built = narrow.build(kind, 14, num_classes=5, width=4)
    built(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.parameters())


def test_blocks_that_start_as_the_identity_do_nothing_at_first():
    x = torch.rand(3, 3, 16, 16)
    for kind, nothing in (("identity", True), ("residual", False)):
        torch.manual_seed(0)
        whole = narrow.build(kind, 14, num_classes=5, width=4).eval()
        assert torch.equal(deletion.without(whole, deletion.parts(whole))(x), whole(x)) == nothing


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("odd", 20), "plain, residual"),
        (("plain", 18), "6n"),
        (("plain", 2), "6n"),
        (("plain", 8, 10, 5), "even"),
        (("plain", 8, 10, 0), "even"),
    ],
)
def test_a_network_that_cannot_be_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        narrow.build(*wrong) if len(wrong) > 2 else narrow.build(*wrong, num_classes=10)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_deleting_nothing_changes_nothing(kind):
    whole, x = network(kind), torch.rand(3, 3, 16, 16)
    assert torch.equal(deletion.without(whole, [])(x), whole(x))


def test_a_deleted_block_is_one_whose_branch_gives_zero():
    x, names = torch.rand(3, 3, 16, 16), deletion.parts(network("residual"))
    assert names == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    for deleted in [*([name] for name in names), names[1:4], names]:
        silent = network("residual")
        for name in deleted:
            last = silent.get_submodule(name).bn2
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        whole = network("residual")
        found = deletion.without(whole, deleted)(x)
        assert torch.equal(found, silent(x))
        assert not torch.equal(found, whole(x))
        assert torch.equal(whole(x), network("residual")(x)), "the network itself must stay as it is"


def test_a_deleted_layer_of_a_plain_network_passes_its_input_on():
    x, names = torch.rand(3, 3, 16, 16), deletion.parts(network("plain"))
    assert len(names) == 6 * 2 - 2  # the two layers that change shape cannot be deleted
    assert not {"layer2.0.conv1", "layer3.0.conv1"} & set(names)
    for deleted in [*([name] for name in names), names]:
        identity = network("plain")
        for name in deleted:
            nn.init.dirac_(identity.get_submodule(name).weight)
            norm = identity.get_submodule(name.replace("conv", "bn"))
            norm.reset_parameters()
            norm.eps = 0.0
        found = deletion.without(network("plain"), deleted)
        assert torch.allclose(found(x), identity(x), atol=1e-6)
        assert not any(isinstance(m, BasicBlock) for m in found.modules()) or not torch.equal(
            found(x), network("plain")(x)
        )


@pytest.mark.parametrize("name", ["layer2.0.conv1", "layer1.0", "fc"])
def test_what_cannot_be_deleted_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name}: no part"):
        deletion.without(network("plain"), [name])


def test_what_is_deleted_follows_from_the_seed():
    names = [f"part{at}" for at in range(27)]
    counts = deletion.counts_up_to(27)
    assert counts[0] == 1
    assert counts[-1] == 27
    assert counts == sorted(set(counts))
    assert deletion.counts_up_to(1) == [1]
    drawn = deletion.deletions(names, counts, draws=4, seed=1)
    assert drawn == deletion.deletions(names, counts, draws=4, seed=1)
    assert drawn != deletion.deletions(names, counts, draws=4, seed=2)
    assert drawn[0] == ("none", 0, [])
    assert [deleted for how, _, deleted in drawn if how == "one"] == [[name] for name in names]
    random = [deleted for how, _, deleted in drawn if how == "random"]
    assert [len(set(deleted)) for deleted in random] == [count for count in counts[:-1] for _ in range(4)] + [27]
    assert len({tuple(deleted) for deleted in random if len(deleted) == 3}) == 4
    assert random[-1] == names  # once, as there is no other set of all


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A prepared project of a few dozen shapes, whose trainings write a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("shapes")
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    data = params.with_changes(data, {**small_settings(), "machine.checkpoint_seconds": 0})
    (folder / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_folder(Path("photos"), train=10, val=4, test=5, unlabelled=3)
        prepare.run(params.check(data))
    return folder


def command(study, project, out, *arguments):
    out.mkdir(exist_ok=True)
    return [str(ROOT / f"studies/{study}.py"), "--project", str(project), "--out", str(out), *SMALL, *arguments]


def start(study, project, out, *arguments):
    return subprocess.Popen(
        [sys.executable, *command(study, project, out, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=listen,
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a study in this process, whose folder and signals are as before then; give what it said."""
    stop = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command(*arguments))
        runpy.run_path(sys.argv[0], run_name="__main__")
        return "".join(capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, stop)


def rows_of(file):
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


@pytest.mark.slow
def test_both_studies_run_from_prepared_images_to_plot_and_table(project, tmp_path, run):
    """Once from one end to the other; a study that was stopped ends in the same table; deletion takes depth's."""
    said = run("depth", project, tmp_path / "out", "--depths", "8", "14", "--kinds", "plain", "residual")
    assert "plain-14: 80/80 images (100 %)" in said
    table = rows_of(tmp_path / "out/depth.csv")
    expected = [(depth, kind, epoch) for depth in ("8", "14") for kind in ("plain", "residual") for epoch in "12"]
    assert [(row["depth"], row["kind"], row["epoch"]) for row in table] == expected
    assert all(float(row["test_error"]) * 12 == pytest.approx(round(float(row["test_error"]) * 12)) for row in table)
    kept = sorted(path.name.rpartition("-")[0] for path in (project / ".scratch/studies").glob("*-*"))
    assert kept == ["plain-14", "plain-8", "residual-14", "residual-8"], "a finished network's checkpoints are left"

    said = run("deletion", project, tmp_path / "out", "--networks", "residual-8", "plain-14", "--draws", "2")
    assert "images" not in said, "networks that depth.py has trained are trained again"
    table = rows_of(tmp_path / "out/deletion.csv")
    assert sum(row["how"] == "one" for row in table) == 3 + 10
    trained = {f"{row['kind']}-{row['depth']}": row["test_error"] for row in rows_of(tmp_path / "out/depth.csv")}
    whole = {row["network"]: row["test_error"] for row in table if row["how"] == "none"}
    assert whole == {name: trained[name] for name in ("residual-8", "plain-14")}  # of the last epoch
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "deletion.csv",
        "deletion.png",
        "depth.csv",
        "depth.png",
    ]


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_ends_in_the_same_table(project, tmp_path, run):
    longer = ("--depths", "14", "--epochs", "5", "--kinds", "plain")
    stopped = start("depth", project, tmp_path / "stopped", *longer)
    wait_until(lambda: any((project / ".scratch/studies").glob("plain-14-*-run/*.pt")), seconds=120, every=0.01)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate()[0]
    assert stopped.returncode == 130
    assert said.endswith("depth: stopped; the same command goes on from the last checkpoint\n")
    assert "Traceback" not in said
    assert list((tmp_path / "stopped").iterdir()) == []
    assert "plain-14: going on from step" in run("depth", project, tmp_path / "stopped", *longer)
    elsewhere = tmp_path / "project"
    elsewhere.mkdir()
    (elsewhere / "params.yaml").symlink_to(project / "params.yaml")
    (elsewhere / "data").symlink_to(project / "data")
    assert "going on" not in run("depth", elsewhere, tmp_path / "whole", *longer)
    assert (tmp_path / "stopped/depth.csv").read_bytes() == (tmp_path / "whole/depth.csv").read_bytes()


def test_a_mistake_is_one_line_before_anything_is_trained(project, tmp_path, run, capsys):
    with pytest.raises(SystemExit, match=r"^depth: error: depth 21: not 6n \+ 2.*$"):
        run("depth", project, tmp_path, "--depths", "8", "21")
    assert "".join(capsys.readouterr()) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["resnet-56", "plain", "plain-", "residual56"])
def test_a_name_that_is_no_networks_is_an_error(wrong):
    with pytest.raises(ValueError, match="KIND-DEPTH"):
        deletion.which(wrong)
    assert deletion.which("residual-56") == ("residual", 56)


def test_a_folder_without_prepared_images_is_said_to_be_one(tmp_path, run):
    with pytest.raises(SystemExit, match=r"params.yaml: no such file"):
        run("depth", tmp_path, tmp_path)
