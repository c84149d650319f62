"""Golden losses: the same 20 steps as when tests/golden.json was made, so that no change of the loop goes unseen."""

import json

import numpy as np
import pytest
import torch
from golden import FILE, RECIPES, steps


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_the_golden_ones(images, one_thread, tmp_path, name):
    golden = json.loads(FILE.read_text())[name]
    assert len(golden) == 20
    assert np.abs(np.array(steps(images, name, tmp_path)) - golden).max() <= 1e-9, (
        "training computes something else than it did; if that is meant, say why and make them anew (tests/golden.py)"
    )
