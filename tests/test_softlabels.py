"""The soft-label cache: keyed by content, refusing what does not belong, finding every damaged byte."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from pipeline.core.softlabels import (
    Description,
    SoftLabels,
    index,
    make_keys,
    read_description,
    sealed,
    shards,
    store,
    writing,
)
from pipeline.core.softlabels import keys as keys_of
from pipeline.core.softlabels.keys import find_double
from pipeline.core.softlabels.records import Records

DESCRIPTION = Description(
    {"digest": "t", "model": "ResNet152_vd"},
    {"seed": 1, "flip": 0.5},
    num_classes=20,
    top_k=5,
    min_probability=1e-3,
    bits=8,
)
CODING = DESCRIPTION.coding


def some_numbers(count, seed=0):
    """Ids, replicas and partners of views."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 2**64, count, dtype=np.uint64)
    partners = np.where(generator.random(count) < 0.5, ids, generator.integers(0, 2**64, count, dtype=np.uint64))
    return {"ids": ids, "replicas": generator.integers(0, 5, count), "partners": partners}


def some_keys(count, seed=0):
    return make_keys(**some_numbers(count, seed))


def some_records(count, seed=0):
    return CODING.encode(3 * torch.randn(count, 20, generator=torch.Generator().manual_seed(seed)))


def record(records, number):
    sizes = CODING.sizes[records.counts]
    start = int(sizes[:number].sum())
    return Records(records.counts[number : number + 1], records.content[start : start + sizes[number]])


@pytest.fixture
def cache(tmp_path):
    """Three shards of ten views each, their keys, and the records that they should hold."""
    keys, answers = some_keys(30), [some_records(10, seed) for seed in range(3)]
    for part, records in enumerate(answers):
        shards.write(tmp_path / "cache", DESCRIPTION.fingerprint, keys[part * 10 : part * 10 + 10], records)
    writing.finish(tmp_path / "cache", DESCRIPTION, keys)
    return tmp_path / "cache", keys, [record(answers[number // 10], number % 10) for number in range(30)]


def same(labels, records):
    """Whether a batch's labels are these records."""
    whole = Records(*(np.concatenate(column) for column in zip(*records, strict=True)))
    return all(np.array_equal(a, b) for a, b in zip(labels, CODING.decode(whole), strict=True))


@pytest.mark.parametrize("finished", [True, False])
def test_views_are_found_in_any_order_and_in_any_batch(cache, finished):
    folder, keys, records = cache
    if not finished:
        writing.unfinish(folder)
        writing.write_index(folder, DESCRIPTION)
    labels = SoftLabels(folder, DESCRIPTION)
    assert len(labels) == 30
    order = np.random.default_rng(1).permutation(30)
    assert same(labels.read(keys[order]), [records[number] for number in order])
    assert same(labels.read(keys[7:8]), records[7:8])
    assert same(labels.read(keys[[4, 4, 25]]), [records[4], records[4], records[25]])


@pytest.mark.parametrize("sizes", [(31, 32, 33), (64, 1, 96)])
def test_records_are_found_within_their_blocks(tmp_path, sizes):
    keys = some_keys(sum(sizes))
    answers = [some_records(size, seed) for seed, size in enumerate(sizes)]
    for part, records in zip(np.split(keys, np.cumsum(sizes)[:-1]), answers, strict=True):
        shards.write(tmp_path, DESCRIPTION.fingerprint, part, records)
    writing.finish(tmp_path, DESCRIPTION, keys)
    whole = [record(records, number) for records, size in zip(answers, sizes, strict=True) for number in range(size)]
    labels, few = SoftLabels(tmp_path, DESCRIPTION), SoftLabels(tmp_path, DESCRIPTION)
    few._most_open = 1
    for order in (range(len(keys)), np.random.default_rng(0).permutation(len(keys)), [70, 70, 3]):
        for reader in (labels, few):
            assert same(reader.read(keys[order]), [whole[number] for number in order])
    assert labels._places.nbytes <= sum(4 * (1 + size // shards.BLOCK) for size in sizes)


def test_a_large_cache_asks_for_file_handles_and_some_to_spare(monkeypatch):
    limits = {}
    monkeypatch.setattr(store.resource, "setrlimit", lambda kind, wanted: limits.update({kind: wanted}))
    monkeypatch.setattr(store.resource, "getrlimit", lambda kind: (1024, 524_288))
    assert store._allow_open_files(2_322) == 2_322
    assert limits == {store.resource.RLIMIT_NOFILE: (3_322, 524_288)}


def test_where_no_more_file_handles_are_given_half_are_left_to_others(monkeypatch):
    def refuse(kind, wanted):
        raise ValueError("current limit exceeds maximum limit")  # macOS, below an infinite one

    monkeypatch.setattr(store.resource, "setrlimit", refuse)
    for hard in (256, store.resource.RLIM_INFINITY):
        monkeypatch.setattr(store.resource, "getrlimit", lambda kind, hard=hard: (256, hard))
        assert store._allow_open_files(2_322) == 128


@pytest.mark.parametrize("most_open", [1, 2, 3])
def test_with_few_open_files_the_answers_are_the_same(cache, most_open):
    folder, keys, records = cache
    labels = SoftLabels(folder, DESCRIPTION)
    labels._most_open = most_open
    generator = np.random.default_rng(0)
    for size in (30, 1, 2, 2, 5, 30, 0):
        chosen = generator.integers(0, 30, size)
        assert len(labels.read(keys[chosen]).counts) == size
        assert not size or same(labels.read(keys[chosen]), [records[number] for number in chosen])
        assert labels._open.sum() <= most_open
        assert [content is not None for content in labels._contents] == labels._open.tolist()


def test_a_shard_without_views_is_no_trouble(cache):
    folder, keys, records = cache
    shards.write(folder, DESCRIPTION.fingerprint, keys[:0], Records(np.zeros(0, np.uint8), np.zeros(0, np.uint8)))
    writing.finish(folder, DESCRIPTION, keys)
    labels = SoftLabels(folder, DESCRIPTION)
    labels.verify()
    assert same(labels.read(keys), records)


@pytest.mark.parametrize("number", ["ids", "replicas", "partners"])
def test_another_sample_replica_or_partner_is_not_found(cache, number):
    labels, numbers = SoftLabels(cache[0], DESCRIPTION), some_numbers(30)
    assert (labels.find(make_keys(**numbers)) >= 0).all()
    other = make_keys(**{**numbers, number: numbers[number] + 1})
    assert (labels.find(other) == -1).all()
    with pytest.raises(ValueError, match=r"30 of 30 views are missing.*dvc repro cache"):
        labels.read(other)


def test_keys_of_like_numbers_differ():
    ids, replicas, partners = (part.ravel() for part in np.meshgrid(*[np.arange(40)] * 3))
    assert len(np.unique(make_keys(ids, replicas, partners))) == 40**3


def test_an_empty_cache_finds_nothing(tmp_path):
    writing.write_index(tmp_path, DESCRIPTION)
    assert (SoftLabels(tmp_path, DESCRIPTION).find(some_keys(3)) == -1).all()


@pytest.mark.parametrize("sorted_at_once", [1, 7, 29])
def test_the_index_is_the_same_however_much_is_sorted_at_once(cache, monkeypatch, sorted_at_once):
    folder, keys, _ = cache
    whole = (folder / "index.sl").read_bytes()
    monkeypatch.setattr(keys_of, "SORTED", sorted_at_once)
    writing.finish(folder, DESCRIPTION, keys)
    assert (folder / "index.sl").read_bytes() == whole


def test_positions_of_eight_bytes_are_read(cache):
    folder, keys, records = cache
    shards_of_it = SoftLabels(folder, DESCRIPTION).shards
    positions = SoftLabels(folder, DESCRIPTION).find(np.sort(keys))
    header = {"fingerprint": DESCRIPTION.fingerprint, "views": 30, "positions": "<u8"}
    header["shards"] = {shard.path.name: shard.checksum for shard in shards_of_it}
    sealed.write(folder / index.NAME, index.MAGIC, header, [np.sort(keys), positions.astype("<u8")])
    assert same(SoftLabels(folder, DESCRIPTION).read(keys), records)


@pytest.mark.parametrize("text", [b'{"views": Infinity, "record_bytes": 1, "fingerprint": ""}', b"[" * 200_000, b"[]"])
def test_a_header_that_makes_no_sense_is_damage(tmp_path, text):
    path = tmp_path / "labels-0.sl"
    path.write_bytes(shards.MAGIC + len(text).to_bytes(4, "little") + text)
    with pytest.raises(ValueError, match=r"labels-0.sl: its header is damaged"):
        shards.Shard(path, DESCRIPTION.fingerprint, DESCRIPTION.coding)


def test_a_whole_shard_in_anothers_place_is_found(cache):
    folder, keys, _ = cache
    files = [shard.path for shard in SoftLabels(folder, DESCRIPTION).shards]
    contents = [file.read_bytes() for file in files]
    for places in ([1, 0, *range(2, len(files))], [0, 0, *range(2, len(files))]):  # swapped; a copy
        for file, place in zip(files, places, strict=True):
            file.write_bytes(contents[place])
        with pytest.raises(ValueError, match=r"labels-\w+.sl: damaged, or another shard in its place; `dvc repro"):
            SoftLabels(folder, DESCRIPTION)
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    assert len(SoftLabels(folder, DESCRIPTION).read(keys).counts) == len(keys)


@pytest.mark.parametrize("looked_up", [1, 4, 100])
def test_missing_views_are_given_by_their_places(cache, monkeypatch, looked_up):
    folder, keys, _ = cache
    monkeypatch.setattr(keys_of, "LOOKED_UP", looked_up)
    wanted = np.insert(keys, [0, 3, 30], np.arange(3, dtype=np.uint64))
    assert np.concatenate([*SoftLabels(folder, DESCRIPTION).missing(wanted)]).tolist() == [0, 4, 32]


def test_a_cache_that_lacks_a_view_is_not_finished(cache):
    folder, keys, _ = cache
    writing.unfinish(folder)
    with pytest.raises(ValueError, match="a view is missing"):
        writing.finish(folder, DESCRIPTION, np.append(keys, np.uint64(5)))
    with pytest.raises(ValueError, match="no finished cache"):
        read_description(folder)


def test_labels_of_another_description_are_refused_by_name(cache):
    folder, _, _ = cache
    others = {
        "views.flip": dataclasses.replace(DESCRIPTION, views={"seed": 1, "flip": 0.0}),
        "teacher.digest": dataclasses.replace(DESCRIPTION, teacher={**DESCRIPTION.teacher, "digest": "u"}),
        "bits": dataclasses.replace(DESCRIPTION, bits=5),
    }
    assert read_description(folder) == DESCRIPTION
    for name, other in others.items():
        with pytest.raises(ValueError, match="of another teacher, of other views or of another coding"):
            SoftLabels(folder, other)
        assert read_description(folder).difference(other) == name


@pytest.mark.parametrize("name", ["shard", "index.sl", "cache.json"])
def test_every_flipped_bit_is_found(cache, name):
    folder, keys, _ = cache
    file = sorted(folder.glob("labels-*.sl"))[1] if name == "shard" else folder / name
    content = file.read_bytes()

    def use():
        SoftLabels(folder, read_description(folder)).read(keys)

    generator = np.random.default_rng(0)
    for _ in range(200):
        at, bit = int(generator.integers(len(content))), 1 << int(generator.integers(8))
        file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        with pytest.raises(ValueError, match=rf"{file.name}.*dvc repro --force --single-item cache"):
            use()
    file.write_bytes(content)
    use()


@pytest.mark.parametrize("keep", [0, 5, 40, 200, -1])
@pytest.mark.parametrize("name", ["shard", "index.sl"])
def test_a_truncated_file_is_named(cache, name, keep):
    folder, keys, _ = cache
    file = sorted(folder.glob("labels-*.sl"))[0] if name == "shard" else folder / name
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=file.name):
        SoftLabels(folder, DESCRIPTION).read(keys)


def test_a_missing_shard_is_named(cache):
    folder, _, _ = cache
    file = sorted(folder.glob("labels-*.sl"))[0]
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name}: missing; .*dvc repro --force --single-item cache"):
        SoftLabels(folder, DESCRIPTION)


def test_a_foreign_shard_is_refused(cache, tmp_path):
    folder, keys, _ = cache
    other = dataclasses.replace(DESCRIPTION, teacher={"digest": "u", "model": "ResNet152_vd"})
    foreign = shards.write(tmp_path, other.fingerprint, keys, some_records(30))
    shutil.copy(foreign, folder)
    with pytest.raises(ValueError, match=rf"{foreign.name}: not a shard of this cache"):
        SoftLabels(folder, DESCRIPTION)
    writing.unfinish(folder)
    with pytest.raises(ValueError, match=rf"{foreign.name}: soft labels of another teacher"):
        writing.write_index(folder, DESCRIPTION)


def test_damaged_shards_alone_are_set_aside(cache, tmp_path):
    folder, keys, _ = cache
    writing.unfinish(folder)
    cut, flipped, sound = sorted(folder.glob("labels-*.sl"))
    cut.write_bytes(cut.read_bytes()[:100])
    flipped.write_bytes(flipped.read_bytes()[:-30] + b"?" + flipped.read_bytes()[-29:])
    wrong = writing.set_damaged_aside(folder, DESCRIPTION, tmp_path / "aside")
    assert [file.name in message for file, message in zip([cut, flipped], wrong, strict=True)] == [True, True]
    assert list(folder.glob("*.sl")) == [sound]
    assert {file.name for file in (tmp_path / "aside").iterdir()} == {cut.name, flipped.name}
    writing.write_index(folder, DESCRIPTION)
    assert (SoftLabels(folder, DESCRIPTION).find(keys) >= 0).sum() == 10


@pytest.mark.parametrize("sorted_at_once", [1 << 26, 10])
def test_two_views_of_one_key_are_found(monkeypatch, sorted_at_once):
    monkeypatch.setattr(keys_of, "SORTED", sorted_at_once)
    keys = some_keys(1000)
    assert find_double(keys) is None
    keys[700] = keys[20]
    assert find_double(keys) == (20, 700)
