"""The soft-label cache: exact, keyed by content, refusing what does not belong, finding every damaged byte."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from pipeline.core.softlabels import Description, SoftLabels, describe, make_keys, read_description, records, shards
from pipeline.core.softlabels.records import dense

DESCRIPTION = Description({"digest": "t", "model": "ResNet152_vd"}, {"seed": 1, "flip": 0.5}, num_classes=20, top_k=5)


def some_keys(count, seed=0):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 2**64, count, dtype=np.uint64)
    partners = np.where(generator.random(count) < 0.5, ids, generator.integers(0, 2**64, count, dtype=np.uint64))
    return make_keys(ids, generator.integers(0, 5, count), partners)


def some_logits(count, classes=20, seed=0):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path):
    """Three shards of ten views each, and what they should say."""
    keys, logits = some_keys(30), some_logits(30)
    labels = SoftLabels(tmp_path / "cache", DESCRIPTION)
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        labels.write_shard(keys[part], records.pack(logits[part], DESCRIPTION.top_k))
    describe(tmp_path / "cache", DESCRIPTION, 30)
    return tmp_path / "cache", keys, logits


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 20, 70_000])
def test_all_classes_stored_give_the_teachers_distribution_back(classes, temperature):
    logits = some_logits(4, classes)
    found = dense(records.unpack(records.pack(logits, classes)), classes, temperature)
    expected = torch.softmax(logits / temperature, 1)
    # float16 keeps a log-probability below 16 to 2**-8, half of its last place.
    assert ((found - expected).abs() <= 0.01 * expected + 1e-7).all()


def test_the_top_classes_are_kept_and_the_rest_is_spread_evenly():
    logits = some_logits(50)
    found = dense(records.unpack(records.pack(logits, 5)), 20)
    expected = torch.softmax(logits, 1)
    top = expected.topk(5).indices
    assert torch.allclose(found.gather(1, top), expected.gather(1, top), rtol=0.01)
    assert torch.allclose(found.sum(1), torch.ones(50))
    rest = torch.ones_like(found, dtype=torch.bool).scatter(1, top, False)
    means = expected[rest].view(50, 15).mean(1, keepdim=True)
    assert torch.allclose(found[rest].view(50, 15), means.expand(50, 15), rtol=0.02)


def test_views_are_found_in_any_order_and_in_any_batch(cache):
    folder, keys, logits = cache
    labels = SoftLabels(folder, DESCRIPTION)
    assert len(labels) == 30
    order = np.random.default_rng(1).permutation(30)
    mixed = labels.read(keys[order])
    expected = records.unpack(records.pack(logits[order], 5))
    for column, other in zip(mixed, expected, strict=True):
        assert np.array_equal(column, other)
    one = labels.read(keys[7:8])
    assert np.array_equal(one.classes[0], records.unpack(records.pack(logits[7:8], 5)).classes[0])


@pytest.mark.parametrize("field", ["id", "replica", "partner"])
def test_another_sample_replica_or_partner_is_not_found(cache, field):
    folder, keys, _ = cache
    labels, other = SoftLabels(folder, DESCRIPTION), keys.copy()
    other[field] += 1
    assert (labels.find(other) == -1).all()
    with pytest.raises(ValueError, match="30 of 30 views are missing"):
        labels.read(other)


def test_an_empty_cache_finds_nothing(tmp_path):
    assert (SoftLabels(tmp_path, DESCRIPTION).find(some_keys(3)) == -1).all()


def test_labels_of_another_teacher_or_other_views_are_refused_by_name(cache):
    folder, _, _ = cache
    other = dataclasses.replace(DESCRIPTION, views={"seed": 1, "flip": 0.0})
    with pytest.raises(ValueError, match=r"labels-\w+\.sl: soft labels of another teacher or of other views"):
        SoftLabels(folder, other)
    assert read_description(folder) == DESCRIPTION
    assert read_description(folder).difference(other) == "views.flip"


def test_every_flipped_bit_is_found(cache):
    folder, keys, _ = cache
    file = sorted(folder.glob("*.sl"))[1]
    content = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        at, bit = int(generator.integers(len(content))), 1 << int(generator.integers(8))
        file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        with pytest.raises(ValueError, match=file.name):
            SoftLabels(folder, DESCRIPTION).read(keys)
    file.write_bytes(content)
    SoftLabels(folder, DESCRIPTION).read(keys)


@pytest.mark.parametrize("keep", [0, 5, 40, 200, -1])
def test_a_truncated_shard_is_named(cache, keep):
    folder, keys, _ = cache
    file = sorted(folder.glob("*.sl"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=file.name):
        SoftLabels(folder, DESCRIPTION).read(keys)


def test_a_missing_shard_is_found_by_its_views(cache):
    folder, keys, _ = cache
    sorted(folder.glob("*.sl"))[0].unlink()
    assert (SoftLabels(folder, DESCRIPTION).find(keys) == -1).sum() == 10
    with pytest.raises(ValueError, match=r"10 of 30 views are missing.*dvc repro cache"):
        SoftLabels(folder, DESCRIPTION).read(keys)


def test_a_foreign_shard_is_refused(cache, tmp_path):
    folder, keys, _ = cache
    other = dataclasses.replace(DESCRIPTION, teacher={"digest": "u", "model": "ResNet152_vd"})
    foreign = shards.write(tmp_path, other.fingerprint, keys, records.pack(some_logits(30), 5))
    shutil.copy(foreign, folder)
    with pytest.raises(ValueError, match=foreign.name):
        SoftLabels(folder, DESCRIPTION)


def test_a_cache_without_its_description_is_not_whole(cache):
    folder, _, _ = cache
    (folder / "cache.json").unlink()
    with pytest.raises(ValueError, match="no finished cache"):
        read_description(folder)
