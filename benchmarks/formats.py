"""Soft labels on disk as this project and its peers store them: what `benchmarks/cache.py peers` compares.

Each format is two functions: store(folder, description, keys, logits) writes the answers (N, C) of all views, and
fetch(folder, description, keys, order) reads them in an order, in batches of 256.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.core.softlabels import Description, SoftLabels, shards, writing


def store_ours(folder: Path, description: Description, keys: np.ndarray, logits: torch.Tensor) -> None:
    shards.write(folder, description.fingerprint, keys, description.coding.encode(logits))
    writing.finish(folder, description, keys)


def fetch_ours(folder: Path, description: Description, keys: np.ndarray, order: np.ndarray) -> None:
    labels = SoftLabels(folder, description)
    for start in range(0, len(order), 256):
        labels.read(keys[order[start : start + 256]])


def store_tinyvit(folder: Path, description: Description, keys: np.ndarray, logits: torch.Tensor) -> None:
    values, classes = torch.softmax(logits, 1).topk(min(100, logits.shape[1]))
    records = [np.zeros((len(keys), 4), np.uint8), classes.numpy().astype("<i2"), values.numpy().astype("<f2")]
    flat = np.concatenate([part.reshape(len(keys), -1).view(np.uint8) for part in records], axis=1)
    (folder / "logits").write_bytes(flat.tobytes())


def fetch_tinyvit(folder: Path, description: Description, keys: np.ndarray, order: np.ndarray) -> None:
    size = (folder / "logits").stat().st_size // len(keys)
    k = (size - 4) // 4
    with (folder / "logits").open("rb") as file:  # as its reader does: one seek and one read a record
        for start in range(0, len(order), 256):
            for at in order[start : start + 256].tolist():
                file.seek(at * size)
                record = file.read(size)
                np.frombuffer(record, "<i2", k, 4), np.frombuffer(record, "<f2", k, 4 + 2 * k).astype(np.float32)


def store_files(folder: Path, description: Description, keys: np.ndarray, logits: torch.Tensor) -> None:
    for key, answer in zip(keys, logits, strict=True):
        torch.save(answer.clone(), folder / f"{key}.pt")


def fetch_files(folder: Path, description: Description, keys: np.ndarray, order: np.ndarray) -> None:
    for start in range(0, len(order), 256):
        torch.stack([torch.load(folder / f"{keys[at]}.pt") for at in order[start : start + 256].tolist()])


FORMATS = {
    "this project's": (store_ours, fetch_ours),
    "TinyViT's, k = 100 at most": (store_tinyvit, fetch_tinyvit),
    "a dense file a view, as torchdistill's": (store_files, fetch_files),
}
