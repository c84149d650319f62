"""Networks as files, their embeddings, and first weights of a student."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from runs import MODEL

import models
from pipeline.core import networks, weights
from pipeline.core.network_checks import check_takes


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
    check_takes(made, "coat_lite_tiny", 224, 4)
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
        check_takes(made, name, 224, 4)


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "network.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{tmp_path}/network.json: damaged; remove it, and run `dvc checkout"):
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
    check_takes(classifier, model, resolution, 3)
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
    check_takes(source, model, 224, 3)
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


def test_weights_fitted_here_are_read_back_as_they_were_fitted(tmp_path):
    """timm's normalisation of vit_tiny_patch16_224 is not ImageNet's."""
    fitted = networks.build("vit_tiny_patch16_224", 4, 0)
    networks.save(tmp_path, fitted, {"model": "vit_tiny_patch16_224", "classes": list("abcd"), "resolution": 224})
    start = networks.build("vit_tiny_patch16_224", 4, 1, init=str(tmp_path / "weights.safetensors"))
    assert torch.equal(start.mean, fitted.mean)
    assert fitted.mean.flatten().tolist() == [127.5] * 3
    assert torch.equal(networks.build("ResNet18_vd", 4, 0).mean.flatten(), torch.tensor([0.485, 0.456, 0.406]) * 255)
