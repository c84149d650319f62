"""torchvision's data sets as sources: as its own loaders lay them out, and no pickle that it did not publish."""

import hashlib

import numpy as np
import pytest
from made_images import encode, picture
from prepare_kit import prepared, write


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def test_mnist_as_torchvision_lays_it_out(tmp_path):
    random_numbers = np.random.default_rng(0)
    stored = {}
    for part, count in (("train", 60), ("t10k", 20)):
        pixels = random_numbers.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        stored[part] = (pixels, labels)
        write(
            tmp_path / "MNIST/raw", {f"{part}-images-idx3-ubyte": idx(pixels), f"{part}-labels-idx1-ubyte": idx(labels)}
        )
    images, refused = prepared(tmp_path / "out", tmp_path, train="torchvision:MNIST", test="torchvision:MNIST")
    assert refused == []
    assert images.classes[3] == "3 - three"
    assert len(images.rows("test")) == 20
    for row in range(len(images)):
        part, number = images.source(row).split("/")[-2:]
        pixels, labels = stored[{"train": "train", "test": "t10k"}[part]]
        assert (np.asarray(images.image(row))[..., 0] == pixels[int(number[:6])]).all()
        assert images.labels[row] == labels[int(number[:6])]
    with pytest.raises(ValueError, match=r"no such part; prepare\.val: null"):
        prepared(tmp_path / "out2", tmp_path, train="torchvision:MNIST", val="torchvision:MNIST")


def test_image_files_of_a_torchvision_set_are_kept_as_they_are(tmp_path):
    files = {
        f"dtd/dtd/images/{name}/{name}_{at}.jpg": encode(picture(100 * ord(name) + at), "JPEG")
        for name in "ab"
        for at in range(9)
    }
    for part, numbers in (("train", range(0, 5)), ("val", range(5, 7)), ("test", range(7, 9))):
        lines = "\n".join(f"{name}/{name}_{at}.jpg" for name in "ab" for at in numbers)
        files[f"dtd/dtd/labels/{part}1.txt"] = lines.encode()
    write(tmp_path / "in", files)
    images, _ = prepared(
        tmp_path / "out", tmp_path / "in", **dict.fromkeys(("train", "val", "test"), "torchvision:DTD")
    )
    assert len(images) == 18
    assert len(images.rows("val")) == 4
    for row in range(len(images)):
        assert images.encoded(row) == files[images.source(row)]


def test_a_pickle_that_torchvision_did_not_publish_is_not_read(tmp_path):
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    names = [*(f"data_batch_{at}" for at in range(1, 6)), "test_batch", "batches.meta"]
    write(tmp_path / "cifar-10-batches-py", dict.fromkeys(names, evil))
    with pytest.raises(ValueError, match=r"not in .*corrupted"):
        prepared(tmp_path / "out", tmp_path, train="torchvision:CIFAR10")
    assert not (tmp_path / "ran").exists()


def test_cifar_as_torchvision_lays_it_out(tmp_path, monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    rows = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    batch = {"data": rows, "labels": [at % 10 for at in range(40)]}
    meta = {"label_names": [f"class {at}" for at in range(10)]}
    write(
        folder,
        {"batch": pickle.dumps(batch), "test": pickle.dumps(batch | {"data": 255 - rows}), "meta": pickle.dumps(meta)},
    )
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("batch", "test", "meta")}
    monkeypatch.setattr(CIFAR10, "train_list", [["batch", md5["batch"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": md5["meta"]})
    images, _ = prepared(tmp_path / "out", tmp_path, train="torchvision:CIFAR10", test="torchvision:CIFAR10")
    assert images.classes == tuple(meta["label_names"])
    for row in images.rows("labelled", "val"):
        number = int(images.source(row)[-10:-4])
        assert (np.asarray(images.image(row)).transpose(2, 0, 1).ravel() == rows[number]).all()
        assert images.labels[row] == number % 10
