"""Where a process computes, and how it finds the others."""

import platform
from datetime import timedelta

import pytest
import torch
from images import tiny

from pipeline.core import devices

NCCL = pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="no NCCL on this system")


def test_algorithms_are_chosen_for_a_gpu_alone(monkeypatch):
    chosen = []
    monkeypatch.setattr(devices, "choose_algorithms", lambda *choice: chosen.append(choice))
    monkeypatch.delenv("RANK", raising=False)
    devices.join(tiny(**{"machine.device": "cpu", "machine.deterministic": True}).machine)
    assert chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.join(tiny(**{"machine.device": "auto", "machine.deterministic": True}).machine).device.type == "cuda"
    assert chosen == [(False, True)]


@pytest.mark.parametrize(
    ("precision", "device", "rank", "able", "said"),
    [
        ("bfloat16", "cpu", 0, {}, True),
        ("bfloat16", "cpu", 0, {"avx512_bf16": False, "avx512_f": True}, True),
        ("bfloat16", "cpu", 0, {"avx512_bf16": True}, False),
        ("bfloat16", "cpu", 0, {"bf16": True}, False),
        ("bfloat16", "cpu", 1, {}, False),
        ("bfloat16", "cuda", 0, {}, False),
        ("float32", "cpu", 0, {}, False),
    ],
)
def test_bfloat16_on_a_processor_without_it_is_called_slow(monkeypatch, capsys, precision, device, rank, able, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    devices.warn_of_slow("cache", "teacher.precision", precision, devices.Processes(torch.device(device), rank, 2))
    assert capsys.readouterr().out.startswith("cache: warning: teacher.precision is bfloat16") == said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of another processor's instructions")
def test_torch_calls_instructions_for_bfloat16_so():
    assert {*devices.WITH_BFLOAT16} - {"bf16", "sve_bf16"} <= torch.cpu.get_capabilities().keys()


@pytest.mark.parametrize(
    ("device", "backend"), [pytest.param("cuda", "cpu:gloo,cuda:nccl", marks=NCCL), ("cpu", "gloo")]
)
def test_what_lies_in_the_hosts_memory_is_sent_from_there(monkeypatch, device, backend):
    asked, waits = [], []

    def init(backend, timeout, pg_options):
        asked.append((backend, getattr(pg_options, "lazy_init", None)))

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.distributed, "set_timeout", waits.append)
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    joined = devices.join(tiny(**{"machine.device": device}).machine)
    assert (joined.rank, joined.world, joined.device.type) == (1, 2, device)
    assert asked == [(backend, True if device == "cuda" else None)]
    assert waits == [timedelta(days=7)]  # for those that work on; to find each other takes no such time
