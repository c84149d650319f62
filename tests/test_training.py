"""The training loop: schedule, resuming to the same bytes, stopping where the loss is not finite."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from images import tiny
from runs import MODEL, run
from torch import nn

import models
from pipeline.core import digests, networks, resume, stage
from pipeline.core.devices import Processes
from pipeline.core.train import checkpoints, engine, training
from pipeline.core.train.finite import LOOK_EVERY, Losses
from pipeline.core.train.optimizers import Average, learning_rate, optimizer_of
from pipeline.core.train.training import _content, batches_a_pass, labelled_loss, validator


def test_the_schedule_warms_up_and_ends_near_zero():
    rates = [learning_rate(step, 100, 10, 0.5) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert max(rates) == pytest.approx(0.5, rel=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_ends_in_the_same_bytes(images, tmp_path, ema, optimizer):
    settings = {"ema_decay": ema, "optimizer": optimizer, "epochs": 3}
    (tmp_path / "whole").mkdir()
    whole = run(images, tmp_path / "whole", **settings)
    whole.train()
    (tmp_path / "killed").mkdir()
    for steps in (1, 3):  # of 6 in all: in the middle of an epoch, twice
        killed = run(images, tmp_path / "killed", **settings)
        counted = killed.loss

        def dying(network, batch, counted=counted, killed=killed, steps=steps):
            if killed.step >= steps:
                raise Killed
            return counted(network, batch)

        killed.loss = dying
        with pytest.raises(Killed):
            killed.train()
    resumed = run(images, tmp_path / "killed", **settings)
    resumed.train()
    assert resumed.history == whole.history
    for (name, a), b in zip(
        whole.classifier.state_dict().items(), resumed.classifier.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_an_epochs_figures_are_of_its_own_steps_and_of_the_network_that_is_kept(images, tmp_path):
    real, found, validated = labelled_loss(images, images.labels, 0.1), [], []

    def loss(network, batch):
        found.append(real(network, batch))
        assert network.training  # though a validation sets it to eval mode
        return found[-1]

    def validate(classifier):
        validated.append({name: value.clone() for name, value in classifier.eval().state_dict().items()})
        return {"val_top1": 0.0}

    training = run(images, tmp_path, loss, part=lambda classifier: classifier, epochs=3, ema_decay=0.7, lr=0.01)
    training.validate = validate
    training.train()
    means = torch.stack(found).detach().reshape(3, 2).mean(1)
    assert [epoch["train_loss"] for epoch in training.history] == pytest.approx(means.tolist())
    for name, value in training.classifier.state_dict().items():
        assert torch.equal(value, validated[-1][name]), name


def test_the_network_that_is_kept_is_the_average_of_the_steps(images, tmp_path):
    training = run(images, tmp_path, epochs=3, ema_decay=0.7, lr=0.01)
    weight, average = training.classifier.network.fc.weight, None
    for step in training.step_by_step():
        decay = min(1 - step ** (-2 / 3), 0.7)  # timm's ModelEmaV3 warms it up so
        average = decay * (weight if average is None else average) + (1 - decay) * weight.detach().clone()
    torch.testing.assert_close(training.classifier.network.fc.weight, average)


def test_a_module_that_stands_in_two_places_is_averaged_once_a_step():
    layer = nn.BatchNorm1d(3)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    network.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)  # an average of these is NaN
    average = Average(network, decay=0.75)
    with torch.no_grad():
        layer.weight.fill_(5.0)
        layer.num_batches_tracked.fill_(8)
    average.update(network)
    assert average.module[0] is average.module[2]
    assert average.module[0].weight.tolist() == [2.0, 2.0, 2.0]
    assert average.module[0].num_batches_tracked == 8
    assert torch.equal(average.module.mask, network.mask)


def test_each_step_has_random_numbers_of_its_own(images, tmp_path):
    """Of which dropout is made; and they are the same ones after a kill."""
    real, drawn = labelled_loss(images, images.labels, 0.1), []
    training = run(images, tmp_path, lambda *it: (drawn.append(torch.rand(()).item()), real(*it))[1], epochs=3)
    training.train()
    assert len(set(drawn)) == len(drawn) == 6


def test_a_checkpoint_is_written_when_the_time_has_passed_and_not_before(images, tmp_path, monkeypatch):
    training = run(images, tmp_path, epochs=4, machine={"checkpoint_seconds": 3, "keep_checkpoints": 9})
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: training.step))
    training.train()
    assert sorted(int(file.name[:9]) for file in checkpoints.files(tmp_path)) == [3, 6]


STAGES = ("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",)  # and the classifier, fc
MULTIPLIERS = (0.0, 0.1, 0.2, 0.5, 2.0)


def multiplier_of(name):
    """What the multiplier of a ResNet's weight should be."""
    found = [value for value, starts in zip(MULTIPLIERS, STAGES, strict=True) if name.startswith(starts)]
    assert found or name.startswith("fc.")
    return found[0] if found else 1.0


@pytest.mark.parametrize("model", ["ResNet50_vd", "ResNet18", "PlainNet18", "Res2Net50_vd_26w_4s", MODEL])
def test_every_weight_has_its_stages_multiplier_once(model):
    network, recipe = models.build(model, num_classes=4), tiny(**{"baseline.lr_multipliers": MULTIPLIERS}).baseline
    groups = optimizer_of(network, recipe).param_groups
    found = [(id(p), group["lr_multiplier"], group["weight_decay"]) for group in groups for p in group["params"]]
    decay = recipe.weight_decay
    wanted = [(id(p), multiplier_of(name), decay if p.ndim >= 2 else 0.0) for name, p in network.named_parameters()]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(("model", "after"), [("densenet121", "features.norm5."), ("resnetv2_18", "norm.")])
def test_what_follows_the_last_stage_has_its_multiplier(model, after):
    with torch.device("meta"):
        network = models.build(model, num_classes=4)
    groups = optimizer_of(network, tiny(**{"baseline.lr_multipliers": MULTIPLIERS}).baseline).param_groups
    found = {id(p): group["lr_multiplier"] for group in groups for p in group["params"]}
    names = {found[id(p)]: name for name, p in network.named_parameters() if name.startswith(after)}
    assert set(names) == {2.0}
    assert all(found[id(p)] == 1.0 for p in models.last_layers(network)[0].parameters())


def test_a_stages_first_step_is_as_large_as_its_multiplier(images, tmp_path):
    settings = {"epochs": 1, "optimizer": "sgd", "lr": 0.001, "weight_decay": 0.0, "warmup_epochs": 0}
    start = networks.build(MODEL, len(images.classes), seed=0).network.state_dict()
    steps = []
    for multipliers in (None, MULTIPLIERS):
        training = run(images, tmp_path / str(len(steps)), lr_multipliers=multipliers, **settings)
        training.steps = 1
        training.train()
        steps.append({name: p.detach() - start[name] for name, p in training.classifier.network.named_parameters()})
    for name, step in steps[0].items():
        assert torch.allclose(steps[1][name], step * multiplier_of(name), atol=1e-6), name
    moved = {multiplier_of(name) for name, step in steps[0].items() if step.abs().max() > 1e-5}
    assert moved == {*MULTIPLIERS, 1.0}


def test_the_history_has_the_rate_of_multiplier_1(images, tmp_path):
    whole, cut = (run(images, tmp_path / str(it), epochs=2, lr_multipliers=it) for it in (None, MULTIPLIERS))
    assert [epoch["lr"] for epoch in whole.train()] == [epoch["lr"] for epoch in cut.train()]


def test_multipliers_for_another_number_of_stages_are_refused():
    recipe = tiny(**{"distill.lr_multipliers": MULTIPLIERS}).distill
    with pytest.raises(ValueError, match=r"^lr_multipliers has 5 numbers.* EfficientNet has 6 groups of layers"):
        optimizer_of(models.build("test_efficientnet", num_classes=4), recipe)
    with pytest.raises(ValueError, match=r"^lr_multipliers has 5 numbers.* Linear has no known groups of layers"):
        optimizer_of(torch.nn.Linear(2, 2), recipe)  # as some networks of timm's, which do not say


def test_only_the_part_is_trained(images, tmp_path):
    before = networks.build(MODEL, len(images.classes), seed=0).state_dict()
    trained = run(images, tmp_path, part=lambda classifier: classifier.network.get_classifier(), epochs=1)
    trained.train()
    changed = {name for name, value in trained.classifier.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"network.fc.weight", "network.fc.bias"}
    assert {name for name, value in trained.classifier.named_parameters() if value.grad is not None} == changed


@pytest.mark.parametrize("spoilt", ["fc.bias", "bn1.running_var"])
def test_weights_that_the_last_step_spoilt_are_not_kept(images, tmp_path, spoilt):
    """The loss of a step is that of the weights before it: only a look at the weights finds what the last one did."""
    training = run(images, tmp_path, epochs=2)
    network, step = training.classifier.network, training.optimizer.step
    network.register_buffer("mask", torch.full((2,), -torch.inf))  # what is not trained may be what it will

    def spoil():
        step()
        if training.step == 3:
            network.state_dict()[spoilt][0] = torch.nan

    training.optimizer.step = spoil
    with pytest.raises(ValueError, match=r"^weights are not finite after step 4 of 4, though its loss was; a smaller"):
        training.train()
    assert checkpoints.load(tmp_path)["step"] == 3


@pytest.mark.parametrize(("look_every", "bad"), [(1, 3), (50, 2)])  # the second time found at the epoch's end
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(
    images, tmp_path, monkeypatch, look_every, bad
):
    monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
    real = labelled_loss(images, images.labels, 0.1)
    steps = iter(range(100))

    def loss(network: nn.Module, batch):
        return real(network, batch) * (float("nan") if next(steps) == bad else 1.0)

    training = run(images, tmp_path, loss)
    with pytest.raises(ValueError, match=f"not finite at step {bad} of 4") as error:
        training.train()
    assert training.step == 4
    assert checkpoints.load(tmp_path)["step"] == bad
    rows, replicas = training.order.whole_batch(bad)
    listed = (tmp_path / f"not-finite-{bad}.csv").read_text().splitlines()[1:]
    wanted = zip(images.ids[rows], replicas, map(images.source, rows), strict=True)
    assert listed == [f"{sample:016x},{replica},{source}" for sample, replica, source in wanted]
    assert listed[0][:16] in str(error.value)
    assert "test.lr" in str(error.value)


def test_a_look_at_the_losses_goes_on_from_the_last_one():
    losses = Losses(torch.ones(3))
    assert losses.not_finite() is None
    losses.each[0] = torch.tensor(float("nan"))  # which nobody looks at again
    for value in (1.0, float("inf"), float("nan")):
        losses.add(torch.tensor(value))
    assert [losses.not_finite(), losses.not_finite()] == [4, 4]


def test_no_checkpoint_holds_a_loss_that_is_not_finite(images, tmp_path):
    training = run(images, tmp_path)
    training.losses = Losses([torch.tensor(1.0), torch.tensor(float("nan"))])
    training._save()
    assert checkpoints.files(tmp_path) == []
    training.losses = Losses(training.losses.each[:1])
    training._save()
    assert len(checkpoints.files(tmp_path)) == 1


def test_a_run_is_named_after_all_that_it_depends_on(monkeypatch):
    """So that it goes on from no other's checkpoint: ResNet50's and ResNet50_va's weights have the same names."""

    def name(seed=0, crop=0.9, lr=0.1, data="a", model="ResNet50", replicas=0, resolution=16):
        task = SimpleNamespace(model=model, replicas=replicas, views=SimpleNamespace(resolution=resolution))
        recipe = tiny(**{"baseline.lr": lr}).baseline
        return digests.of_json(_content(task, recipe, {"data": data}, tiny(**{"seed": seed, "views.test_crop": crop})))

    names = [name(), name(seed=1), name(crop=0.8), name(model="ResNet50_va"), name(data="b")]
    names += [name(replicas=1), name(resolution=17), name(lr=0.5)]
    for changed in ("code_digest", "package_versions"):
        monkeypatch.setattr(resume, changed, lambda: "others")
        names.append(name())
    assert len(set(names)) == len(names)


def test_validation_counts_every_image_once_whatever_a_pass_takes(images, monkeypatch):
    monkeypatch.setattr(training, "CLEAN_BATCH", 3)
    params, cpu, asked, found = tiny(), Processes(torch.device("cpu")), [], []
    classifier = networks.build(MODEL, 4, 0)
    classifier.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    for batches in (1, 2, 1000):
        monkeypatch.setattr(training, "batches_a_pass", lambda device, resolution, batches=batches: batches)
        found.append(validator(params, images, 16, cpu)(classifier))
    count = len(images.rows("val"))
    assert asked[-1] == count > 6
    assert sum(asked) == 3 * count
    assert max(asked[:-1]) == 6
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])


@pytest.mark.parametrize(
    ("device", "resolution", "batches"),
    [("cpu", 32, 1), ("cuda", 32, 49), ("cuda", 112, 4), ("cuda", 224, 1), ("cuda", 320, 1)],
)
def test_a_gpu_is_asked_about_as_many_images_as_have_so_many_pixels(device, resolution, batches):
    assert batches_a_pass(torch.device(device), resolution) == batches


def test_the_code_of_the_stage_that_runs_as_a_program_counts(monkeypatch):
    monkeypatch.delitem(sys.modules, "pipeline.register", raising=False)
    before = resume.code_digest()
    program = SimpleNamespace(__file__=str(Path(stage.__file__).parents[1] / "register.py"))
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert resume.code_digest() != before


def test_weights_that_a_network_has_frozen_stay_as_they_are(images, tmp_path):
    def part(classifier):
        classifier.network.conv1.requires_grad_(False)
        return classifier.network

    before = networks.build(MODEL, len(images.classes), seed=0).network
    training = run(images, tmp_path, part=part, epochs=1, lr=0.1)
    training.train()
    now = training.classifier.network
    pairs = zip(before.conv1.parameters(), now.conv1.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(before.get_classifier().weight, now.get_classifier().weight)
