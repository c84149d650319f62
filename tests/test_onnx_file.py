"""A network's ONNX file: it answers as the network does, for any number of images, and says nothing of this machine."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.core import networks
from pipeline.core.results import exporting, onnx_file

CLASSES = ["cat", "dög", "a,b"]


class Spectral(nn.Module):
    """Has an operator that ONNX lacks."""

    def forward(self, pixels):
        return torch.linalg.svdvals(pixels.mean(1))[:, :3]


@pytest.mark.parametrize(
    ("model", "resolution"),
    [("test_vit", 160), ("mobilenetv3_small_050", 32), ("ResNet18_vd", 33)],
)
def test_it_answers_as_the_network_does(model, resolution, tmp_path):
    classifier = networks.build(model, len(CLASSES), seed=0).eval().to(memory_format=torch.channels_last)
    file = tmp_path / "student.onnx"
    onnx_file.write(file, classifier, exporting.example(resolution), CLASSES)
    ask = onnx_file.load(file)
    for count in (1, 2, 5):
        pixels = torch.rand(count, 3, resolution, resolution, generator=torch.manual_seed(count)) * 255
        with torch.inference_mode():
            wanted = classifier(pixels)
        np.testing.assert_allclose(ask(pixels), wanted, atol=1e-4 * max(1, float(wanted.abs().max())))
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    for value, shape in ((model.graph.input[0], (3, resolution, resolution)), (model.graph.output[0], (len(CLASSES),))):
        dims = value.type.tensor_type.shape.dim
        assert [dims[0].dim_param, *(dim.dim_value for dim in dims[1:])] == ["batch", *shape]
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["classes"]) == CLASSES
    assert b".py" not in file.read_bytes()  # of the code that it comes from, and where that lies
    assert file.stat().st_size < 1.1 * sum(4 * p.numel() for p in classifier.parameters()) + 200_000


def test_what_onnx_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written as ONNX: .*svd"):
        onnx_file.write(tmp_path / "student.onnx", Spectral().eval(), exporting.example(8), CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "student.onnx").write_bytes(b"no ONNX")
    with pytest.raises(ValueError, match="ONNX Runtime does not take it") as refusal:
        onnx_file.load(tmp_path / "student.onnx")
    assert "\n" not in str(refusal.value)
