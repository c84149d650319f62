"""PaddleClas' files for tests: weights by the reference's rule as `.pdparams`, and the command that reads them."""

import json
import math
import os
import pickle
import re
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from models import import_paddle

DATA = Path(os.environ.get("SSLD_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
REFERENCE = DATA.parent / "paddleclas_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=f"{REFERENCE} is not there")
NAMES = json.loads((REFERENCE / "state_dicts.json").read_text()) if REFERENCE.exists() else {}
WITH_LOGITS = sorted(np.load(REFERENCE / "logits.npz").files) if REFERENCE.exists() else []
LARGE = ("ResNet152_vd", "ResNet200_vd", "ResNeXt101_32x16d_wsl")


def paddle_weight(key, shape):
    """One tensor of the rule by which the reference's weights are made."""
    g = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if key.endswith("_variance"):
        value = g.uniform(0.5, 1.5, shape)
    elif key.endswith("_mean"):
        value = 0.1 * g.standard_normal(shape)
    elif len(shape) == 1 and key.endswith("weight"):
        value = 0.5 * g.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        value = 0.1 * g.standard_normal(shape)
    elif len(shape) == 4:
        value = g.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    else:
        value = g.standard_normal(shape) * math.sqrt(1 / shape[0])
    return value.astype(np.float32)


def paddle_weights(name):
    return {key: paddle_weight(key, shape) for key, shape in NAMES[name]["state"].items()}


@cache
def small_weights():
    """ResNet18's, for whatever needs a whole network and no figures."""
    return paddle_weights("ResNet18")


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def run(file, model, output):
    """Run the command; give its exit code, having written to stderr what Python does."""
    try:
        import_paddle.main([str(file), "--model", model, "-o", str(output)])
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
        return 1
    return 0


def in_the_older_style(weights, depths):
    """Rename `stem.0.conv.weight` to `conv1_1._conv.weight`, and so on."""

    def block(found):
        index = int(found[1])
        for stage, depth in enumerate(depths):
            if index < depth:
                return f"bb_{stage}_{index}."
            index -= depth
        raise AssertionError(found)

    renamed = {}
    for key, value in weights.items():
        new = re.sub(r"^stem\.(\d)", lambda found: f"conv1_{int(found[1]) + 1}", key)
        new = re.sub(r"^blocks\.(\d+)\.", block, new)
        new = re.sub(r"^fc\.", "out.", new)
        renamed[new.replace(".conv.", "._conv.").replace(".bn.", "._batch_norm.")] = value
    return renamed
