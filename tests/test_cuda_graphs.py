"""CUDA graphs: when a step is captured, and what is left of a capture; the bytes themselves where there is a GPU."""

import pytest
import torch
from runs import run
from torch import nn

from pipeline.core import devices
from pipeline.core.devices import Processes
from pipeline.core.train import cuda_graphs

PIXELS = torch.zeros(4, 3, 8, 8)


@pytest.fixture
def network():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))


@pytest.fixture
def no_gpu(monkeypatch):
    """Let `capture` find what it asks of CUDA besides the recording."""
    for name in ("current_stream", "set_stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)


def test_a_capture_leaves_the_network_as_it_was(network, no_gpu, monkeypatch):
    def record(callable_, arguments, capture_error_mode):
        callable_(*arguments)  # warms up, which moves the statistics
        return callable_

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    captured = cuda_graphs.capture(network, PIXELS)
    assert captured is not network
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(captured.eval()(PIXELS), network(PIXELS))


def test_ctrl_c_in_a_capture_leaves_the_network_as_it_was(network, no_gpu, monkeypatch):
    def record(callable_, arguments, capture_error_mode):
        callable_(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        cuda_graphs.capture(network, PIXELS)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_that_cannot_be_captured_goes_on_without(network, no_gpu, monkeypatch, capsys):
    def record(callable_, arguments, capture_error_mode):
        callable_(*arguments)
        raise RuntimeError("operation not permitted when stream is capturing\nC++ CapturedTraceback")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert cuda_graphs.capture(network, PIXELS) is network
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert capsys.readouterr().err == (
        "warning: goes on without CUDA graphs, which could not be recorded: operation not permitted when stream is "
        "capturing\n"
    )


@pytest.mark.parametrize(
    ("machine", "accumulate", "captured"),
    [
        ({}, 1, True),
        ({"cuda_graphs": False}, 1, False),
        ({"checkpoint_activations": True}, 1, False),
        ({"profile_steps": 3}, 1, False),
        ({}, 2, False),
    ],
)
def test_what_is_captured_is_one_pass_that_nobody_looks_into(images, tmp_path, machine, accumulate, captured):
    training = run(images, tmp_path, machine=machine, accumulate=accumulate)
    assert not training._captures()  # there is no GPU in it
    training.device = torch.device("cuda")
    assert training._captures() == captured
    training.processes, training.order.parts = Processes(training.device, rank=0, world=2), 1
    assert not training._captures()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize("head_alone", [False, True])
def test_captured_steps_end_in_the_same_bytes(images, tmp_path, head_alone, monkeypatch):
    capture, captured, ended = cuda_graphs.capture, [], []
    monkeypatch.setattr(cuda_graphs, "capture", lambda *given: captured.append(capture(*given)) or captured[-1])
    part = (lambda classifier: classifier.network.get_classifier()) if head_alone else None
    devices.choose_algorithms(cudnn_benchmark=False, deterministic=True)
    try:
        for graphs in (False, True):
            machine, one_gpu = {"cuda_graphs": graphs, "workers": 0}, Processes(torch.device("cuda"))
            ended.append(run(images, tmp_path / str(graphs), part=part, processes=one_gpu, machine=machine, epochs=3))
            ended[-1].train()
    finally:
        devices.choose_algorithms(cudnn_benchmark=False, deterministic=False)
    assert len(captured) == 1
    assert captured[0] is not ended[1].classifier
    a, b = (training.classifier.state_dict() for training in ended)
    assert all(torch.equal(value, b[name]) for name, value in a.items())
