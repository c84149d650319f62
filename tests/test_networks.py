"""Networks as files: weights that fit and those that do not, teachers made elsewhere, first weights of a student."""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from images import tiny
from PIL import Image
from runs import MODEL

import models
from pipeline import teacher
from pipeline.core import networks, teaching, weights


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    first = networks.build("ResNet18_vd", 4, seed=3)
    torch.manual_seed(2)
    assert networks.digest(first) == networks.digest(networks.build("ResNet18_vd", 4, seed=3))
    assert networks.digest(first) != networks.digest(networks.build("ResNet18_vd", 4, seed=4))


def test_a_network_is_what_was_saved(tmp_path):
    classifier = networks.build("ResNet18_vd", 4, seed=3)
    networks.save(tmp_path / "n", classifier, {"model": "ResNet18_vd", "classes": list("abcd"), "resolution": 16})
    loaded, card = networks.load(tmp_path / "n")
    assert networks.digest(loaded) == networks.digest(classifier)
    assert card["num_classes"] == 4
    file = tmp_path / "n" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="not the weights that"):
        networks.load(tmp_path / "n")


def test_a_students_first_weights_may_be_of_other_classes(tmp_path, capsys):
    source = networks.build("ResNet18_vd", 4, seed=3)
    networks.save(tmp_path, source, {"model": "ResNet18_vd", "classes": list("abcd"), "resolution": 16})
    file = str(tmp_path / "weights.safetensors")
    same, other = (networks.build("ResNet18_vd", classes, seed=7, init=file) for classes in (4, 6))
    assert networks.digest(same) == networks.digest(source)
    fresh, given, now = (it.network.state_dict() for it in (networks.build("ResNet18_vd", 6, 7), source, other))
    for key, value in now.items():
        assert torch.equal(value, (fresh if key.startswith("fc.") else given)[key]), key
    assert capsys.readouterr().out.count("made for 4 classes, not 6: fc.") == 2
    with pytest.raises(ValueError, match="of another network"):
        networks.build("ResNet34_vd", 6, seed=7, init=file)


@pytest.mark.parametrize(
    ("model", "anew"),
    [
        ("resnetv2_50", ["head.fc.weight", "head.fc.bias"]),  # a convolution
        ("shvit_s1", ["head.l.weight", "head.l.bias"]),  # behind a norm
        ("volo_d1_224", ["aux_head.weight", "aux_head.bias", "head.weight", "head.bias"]),
    ],
)
def test_whatever_depends_on_the_number_of_classes_starts_anew(tmp_path, capsys, model, anew):
    source = networks.build(model, 7, seed=3).network.state_dict()
    torch.save(source, tmp_path / "weights.pth")
    state = networks.build(model, 5, seed=7, init=str(tmp_path / "weights.pth")).network.state_dict()
    said = [line.split("made for 7 classes, not 5: ")[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(said) == sorted(f"{key} starts anew" for key in anew)
    assert all(torch.equal(value, source[key]) for key, value in state.items() if key not in anew)


def test_first_weights_see_what_they_were_trained_on(tmp_path):
    source = networks.build("test_resnet", 4, seed=3)
    networks.save(tmp_path, source, {"model": "test_resnet", "classes": list("abcd"), "resolution": 16})
    student = networks.build("test_resnet", 4, seed=0, init=str(tmp_path / "weights.safetensors"))
    assert (student.mean / 255).flatten().tolist() == pytest.approx(models.build("test_resnet").pretrained_cfg["mean"])


def test_first_weights_may_be_timms(tmp_path, monkeypatch):
    source = networks.build("test_resnet", 7, seed=3).network
    torch.save(source.state_dict(), tmp_path / "timms.pth")
    create = timm.create_model
    here = {"file": str(tmp_path / "timms.pth"), "num_classes": 7, "hf_hub_id": None, "url": ""}  # not the net's
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: create(*args, **more, pretrained_cfg_overlay=here))
    begun, again, other = (networks.build("test_resnet", 4, seed, "timm").network.state_dict() for seed in (7, 7, 8))
    for key, value in source.state_dict().items():
        if key.startswith("fc."):  # for 4 classes, not 7: it starts anew
            assert len(begun[key]) == 4
            assert torch.equal(begun[key], again[key])
            assert key == "fc.bias" or not torch.equal(begun[key], other[key])
        else:
            assert torch.equal(begun[key], value), key


def test_a_network_with_a_module_in_two_places_is_looked_at_saved_and_read(tmp_path):
    made = networks.build("coat_lite_tiny", 4, seed=0).eval()
    networks.check_takes(made, "coat_lite_tiny", 224, 4)
    assert not any(value.is_meta for value in made.network.state_dict().values())
    networks.save(tmp_path, made, {"model": "coat_lite_tiny", "classes": list("abcd"), "resolution": 64})
    assert networks.digest(networks.load(tmp_path)[0]) == networks.digest(made)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lambda_resnet26t", "has weights of five dimensions"),
        ("qwen3_vit_88m_enc", "does not take images of 224 pixels: Qwen3VitEncoder does not support"),
    ],
)
def test_a_network_that_the_stages_cannot_use_is_refused(name, words):
    with torch.device("meta"):
        made = networks.build(name, 4, seed=0)
    with pytest.raises(ValueError, match=f"^{name} {words}"):
        networks.check_takes(made, name, 224, 4)


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "network.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{tmp_path}/network.json: damaged; run `dvc checkout"):
        networks.read_card(tmp_path)


def test_a_network_may_see_images_larger_than_it_is_given(tmp_path):
    made = networks.build(MODEL, 4, seed=0, init=None, resized_to=48).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    larger = F.interpolate(pixels.float(), (48, 48), mode="bicubic", antialias=True).clamp(0, 255)
    assert torch.equal(made(pixels), networks.build(MODEL, 4, seed=0).eval()(larger))
    assert torch.equal(made(pixels), made.embed(pixels)[0])
    networks.save(tmp_path, made, {"model": MODEL, "classes": list("abcd"), "resolution": 16})
    read, card = networks.load(tmp_path)
    assert (card["resized_to"], read.resized_to) == (48, 48)
    assert torch.allclose(read(pixels), made(pixels), atol=1e-6)  # its weights are channels-last


@pytest.mark.parametrize("size", [48, 96])
def test_a_teachers_view_is_resized_as_an_image_is(size):
    wave = np.sin(np.arange(64)[:, None] / 9 + np.arange(64) / 7)  # smooth: Pillow rounds in between
    image = np.stack([127 + 100 * wave, 127 - 100 * wave, np.full((64, 64), 255.0)], axis=2).astype(np.uint8)
    made = networks.build(MODEL, 4, seed=0, init=None, resized_to=size)
    resized = made.resize(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    pillows = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(resized.numpy() - pillows).max() < 1.2


def test_weights_that_do_not_fit_say_what_to_do(tmp_path):
    classifier = networks.build("ResNet18_vd", 4, seed=3)
    networks.save(tmp_path, classifier, {"model": "ResNet18_vd", "classes": list("abcd"), "resolution": 16})
    file = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"made for 4 classes, but the data has 6.*teacher.source: fit"):
        weights.load(networks.build("ResNet18_vd", 6, 0).network, file, ("ResNet18_vd", 6))
    with pytest.raises(ValueError, match="of another network"):
        weights.load(networks.build("ResNet34_vd", 4, 0).network, file, ("ResNet34_vd", 4))
    wider = {**classifier.network.state_dict(), "fc.weight": torch.zeros(6, 500), "fc.bias": torch.zeros(6)}
    torch.save(wider, tmp_path / "wider.pth")
    with pytest.raises(ValueError, match=r"of another network: fc.weight is \(6, 500\), not \(4, 512\)"):
        networks.build("ResNet18_vd", 4, seed=0, init=str(tmp_path / "wider.pth"))
    with pytest.raises(ValueError, match="no such file"):
        weights.load(classifier.network, Path("nowhere.pth"))
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.load(classifier.network, file)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        weights.load(classifier.network, tmp_path)
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match=r"not a state dict of tensors; it holds .*: save the network's state_dict"):
        weights.load(classifier.network, tmp_path / "numbers.pth")
    torch.save({**classifier.network.state_dict(), "fc.weight": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    with pytest.raises(ValueError, match=r"of another network: fc.weight is \(\), not \(4, 512\)"):
        weights.load(classifier.network, tmp_path / "scalar.pth", ("ResNet18_vd", 4))
    torch.save({**classifier.network.state_dict(), "fc.bias": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    with pytest.raises(ValueError, match=r"of another network: fc.bias is \(\), not \(4,\)"):
        weights.load(classifier.network, tmp_path / "scalar.pth", ("ResNet18_vd", 4))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("length", "words"),
    [
        (None, "it is a TorchScript program; save the network's state_dict() alone"),
        (0, "it is empty or cut short"),
        (100, "PytorchStreamReader failed reading zip archive: failed finding central directory"),
    ],
)
def test_a_program_and_what_was_left_of_a_file_are_no_weights(tmp_path, recwarn, length, words):
    file = tmp_path / "weights.pt"
    network = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.script(network), file)
    file.write_bytes(file.read_bytes()[:length])
    recwarn.clear()
    with pytest.raises(ValueError) as refused:
        weights.load(network, file)
    assert str(refused.value) == f"{file}: cannot be read as weights: {words}"
    assert not recwarn


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "student.model."])
def test_weights_of_a_wrapped_network_are_its_own(tmp_path, prefix):
    state = networks.build("test_resnet", 4, seed=3).network.state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pth")
    network = networks.build("test_resnet", 4, seed=0).network
    weights.load(network, tmp_path / "weights.pth")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_averaged_weights_may_stand_alone(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(networks.build("test_resnet", 4, seed=3).network)
    torch.save(average.state_dict(), tmp_path / "weights.pth")
    network = networks.build("test_resnet", 4, seed=0).network
    weights.load(network, tmp_path / "weights.pth")
    assert torch.equal(network.fc.weight, average.module.fc.weight)


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema")])  # timm's, torchvision's
def test_of_two_sets_of_weights_the_average_is_taken_and_named(tmp_path, capsys, names):
    plain, average = (networks.build("test_resnet", 4, seed).network.state_dict() for seed in (3, 4))
    wrapped = {"n_averaged": torch.tensor(9)} | {f"module.{key}": value for key, value in average.items()}
    others = {"epoch": 7, "args": argparse.Namespace(lr=0.1), "lr_scheduler": {"milestones": Counter([30])}}
    numpys = {"metric": np.float64(93.2), "best": np.float32(1), "random": np.random.get_state()}
    torch.save({names[0]: plain, names[1]: wrapped, **others, **numpys}, tmp_path / "weights.pth")
    network = networks.build("test_resnet", 4, seed=0).network
    weights.load(network, tmp_path / "weights.pth")
    assert all(torch.equal(value, average[key]) for key, value in network.state_dict().items())
    said = f"holds {names[1]}, {names[0]}; the weights are those of {names[1]}"
    assert said in capsys.readouterr().out


# In some a convolution is the classifier, in some the features are no vector before it, some have parts of two sizes.
@pytest.mark.parametrize(
    ("model", "resolution"),
    [
        ("resnetv2_50", 64),
        ("dla34", 64),
        ("dpn48b", 64),
        ("cait_xxs24_224", 224),
        ("pit_ti_224", 224),
        ("crossvit_9_240", 240),
        (MODEL, 32),
    ],
)
def test_an_embedding_is_a_vector_beside_the_networks_own_logits(model, resolution):
    classifier = networks.build(model, 3, 0).eval()
    networks.check_takes(classifier, model, resolution, 3)
    assert not classifier.training
    assert models.macs(classifier.network, resolution) > 0
    pixels = torch.randint(0, 256, (2, 3, resolution, resolution), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, features = classifier.embed(pixels)
        assert torch.equal(logits, classifier(pixels))
        maps = classifier.network.forward_features(classifier.normalise(pixels))
        assert torch.equal(features, classifier.network.forward_head(maps, pre_logits=True).flatten(1))


@pytest.mark.parametrize(
    ("model", "columns"), [("levit_128s", 384), ("efficientformer_l1", 448), ("deit_tiny_distilled_patch16_224", 192)]
)
def test_networks_with_a_second_classifier_for_distillation_are_taken(tmp_path, capsys, model, columns):
    source = networks.build(model, 3, 0).eval()
    networks.check_takes(source, model, 224, 3)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, features = source.embed(pixels)
        assert torch.equal(logits, source(pixels))
    assert features.shape == (2, columns)
    assert len(models.last_layers(source.network)) == 2
    if model.startswith("deit"):
        weights.save(tmp_path / "w.safetensors", source.network.state_dict())
        other = networks.build(model, 5, seed=1, init=str(tmp_path / "w.safetensors"))
        assert [layer.out_features for layer in models.last_layers(other.network)] == [5, 5]
        assert "head_dist.weight starts anew" in capsys.readouterr().out


def taken(tmp_path, monkeypatch, bias, **changes):
    """Make a checkpoint of a teacher that says the same of every image; give what `teacher.take` needs to take it."""
    classifier = networks.build(MODEL, 4, 0)
    head = classifier.network.get_classifier()
    torch.nn.init.zeros_(head.weight)
    head.bias.data.copy_(torch.tensor(bias))
    networks.save(tmp_path / "made", classifier, {"model": MODEL, "classes": list("abcd"), "resolution": 16})
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 10)
    wanted = {"source": "checkpoint", "model": MODEL, "checkpoint": str(tmp_path / "made/weights.safetensors")}
    params = tiny(**{f"teacher.{key}": value for key, value in {**wanted, **changes}.items()})
    return params, torch.device("cpu")


def test_a_teacher_that_guesses_is_refused(images, tmp_path, monkeypatch, capsys):
    params, device = taken(tmp_path, monkeypatch, [2.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"guesses: validation top-1 0.2500 of 16 images of 4 classes.*in this order"):
        teacher.take(params, images, device)
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)  # of so few, nobody can tell
    monkeypatch.chdir(tmp_path)
    teacher.take(params, images, device)
    said = capsys.readouterr().out
    assert ": validation top-1 0.2500; 16 images are too few" in said
    assert "in order: " + ", ".join(f"'{name}'" for name in images.classes) + "\n" in said


def test_a_teacher_that_answers_with_probabilities_is_refused(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [0.5, 0.2, 0.2, 0.1])
    with pytest.raises(ValueError, match=f"^{MODEL} answers with probabilities, not with logits: leave out the"):
        teacher.take(params, images, device)


def answered(places, correct, each, seed):
    """Labels, and answers of a teacher whose classes stand in other places, with so many right; the rest guessed."""
    chance, count = np.random.default_rng(seed), len(places) * each
    labels = np.repeat(np.arange(len(places)), each)
    right = chance.random(count) < correct
    return labels, np.where(right, np.array(places)[labels], chance.integers(0, len(places), count))


@pytest.mark.parametrize(
    ("places", "named"),
    [([0, 2, 1, 3, 4], "bc"), ([0, 2, 3, 1, 4], "bcd"), ([1, 0, 2, 4, 3], "abde")],
)
def test_classes_in_each_others_place_are_seen(places, named):
    said = teacher.swapped(*answered(places, 0.9, 20, seed=0), "abcde")
    assert "".join(sorted(re.findall("images of '(.)'", said))) == named
    said = teacher.swapped(np.repeat([0, 1], 20), np.array([1] * 18 + [0] * 22), "ab")
    assert said == "18 of 20 images of 'a' are to it 'b'; 20 of 20 images of 'b' are to it 'a'"


@pytest.mark.parametrize(
    ("places", "correct", "each"),
    [
        ([0, 1, 2, 3, 4], 0.6, 20),
        ([0, 1, 1, 3, 4], 0.9, 20),  # it takes one class for another, but not that one for it
        (range(100), 0.2, 5),
        (range(100), 0.7, 1),
        ([0] * 100, 0.0, 5),  # it guesses
    ],
)
def test_a_sound_teacher_is_never_taken_for_one_with_classes_in_other_places(places, correct, each):
    names = [str(at) for at in range(len(places))]
    assert {teacher.swapped(*answered(places, correct, each, seed), names) for seed in range(50)} == {""}


def test_a_teacher_whose_answers_are_not_finite_is_refused(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [float("nan"), 0.0, 0.0, 0.0])
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)
    with pytest.raises(ValueError, match=f"^{MODEL}: its answers to validation images are not finite$"):
        teacher.take(params, images, device)


def test_few_images_show_a_teacher_that_is_worse_than_guessing(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [2.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)
    monkeypatch.setattr(teacher.training, "validator", lambda *asked: lambda classifier: {"val_top1": 1 / 16})
    with pytest.raises(ValueError, match=r"guesses: validation top-1 0.0625 of 16 images of 4 classes"):
        teacher.take(params, images, device)


def test_a_taken_teacher_sees_pixels_as_it_was_trained_with(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [0.0] * 4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)
    monkeypatch.chdir(tmp_path)
    teacher.take(params, images, device)
    card = networks.read_card(tmp_path / "data/teacher")
    assert (card["mean"], card["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])


def test_weights_fitted_here_are_read_back_as_they_were_fitted(tmp_path):
    """timm's normalisation of vit_tiny_patch16_224 is not ImageNet's."""
    fitted = networks.build("vit_tiny_patch16_224", 4, 0)
    networks.save(tmp_path, fitted, {"model": "vit_tiny_patch16_224", "classes": list("abcd"), "resolution": 224})
    start = networks.build("vit_tiny_patch16_224", 4, 1, init=str(tmp_path / "weights.safetensors"))
    assert torch.equal(start.mean, fitted.mean)
    assert fitted.mean.flatten().tolist() == [127.5] * 3
    assert torch.equal(networks.build("ResNet18_vd", 4, 0).mean.flatten(), torch.tensor([0.485, 0.456, 0.406]) * 255)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_of_a_transformer_for_another_image_size_say_what_to_do(tmp_path, model):
    size = 96 if model.startswith("vit") else 128
    weights.save(tmp_path / "w.safetensors", timm.create_model(model, img_size=size, num_classes=4).state_dict())
    with pytest.raises(ValueError, match=r"of another network: .* is .*, not .*; if it is this network for another im"):
        networks.build(model, 4, 0, init=str(tmp_path / "w.safetensors"))
    built = networks.Classifier(timm.create_model(model, img_size=size, num_classes=4))
    with pytest.raises(ValueError, match=rf"does not take images of 32 pixels: .*; it was made for {size}$"):
        networks.check_takes(built, model, 32, 4)


def test_a_teacher_that_does_not_take_the_resolution_is_refused(images, tmp_path, monkeypatch):
    network = networks.build("vit_tiny_patch16_224", 4, 0)
    networks.save(tmp_path, network, {"model": "vit", "classes": list("abcd"), "resolution": 224})
    monkeypatch.chdir(tmp_path)
    wanted = {
        "source": "checkpoint",
        "model": "vit_tiny_patch16_224",
        "checkpoint": str(tmp_path / "weights.safetensors"),
    }
    with pytest.raises(ValueError, match=r"does not take images of 16 pixels.*for 224: set teacher.resolution"):
        teacher.take(tiny(**{f"teacher.{key}": value for key, value in wanted.items()}), images, torch.device("cpu"))
    assert not (tmp_path / "data/teacher").exists()
    settings = tiny(**{f"teacher.{key}": value for key, value in {**wanted, "resolution": 224}.items()})
    teacher.take(settings, images, torch.device("cpu"))
    card = networks.read_card(tmp_path / "data/teacher")
    plain = {key: value for key, value in card.items() if key != "resized_to"}
    asked, without = (teaching.description(settings, it) for it in (card, plain))
    assert asked.difference(without) == "teacher.resized_to"  # so that answers to other pixels are refused


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path, capsys):
    classifier = networks.build("ResNet18_vd", 4, seed=3)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": classifier.network.state_dict(), "evil": Evil()}, file)
    with pytest.raises(ValueError, match="holds more than data"):
        weights.load(classifier.network, file)
    assert "this ran" not in capsys.readouterr().out
    torch.save({"state_dict": classifier.network.state_dict()}, file)
    weights.load(networks.build("ResNet18_vd", 4, seed=5).network, file)
