"""The prepared images as other stages read them, and what a damaged copy says."""

import hashlib
import pickle
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from made_images import pixels, png
from prepare_kit import in_several_shards, read_manifest

from pipeline.core.data import dataset
from pipeline.core.data.batches import Views
from pipeline.core.data.dataset import ImageSet, rank, sample_id
from pipeline.core.data.views import ViewSpec
from pipeline.core.intake import image_shards
from pipeline.core.intake.image_shards import layout
from pipeline.core.train.order import TrainingOrder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set in several small shards."""
    return in_several_shards(tmp_path_factory.mktemp("set"))


def test_ids_are_the_hash_of_the_bytes(folder):
    content = png(1)
    assert format(sample_id(content), "016x") == hashlib.sha256(content).hexdigest()[:16]
    images = ImageSet(folder)
    assert [sample_id(images.encoded(row)) for row in range(len(images))] == images.ids.tolist()
    assert images.ids.tolist() == sorted(images.ids.tolist())


def test_types_and_shapes(folder):
    images = ImageSet(folder)
    assert len(images) == 24 + 6 + 6 + 8
    for column, kind in ((images.ids, np.uint64), (images.labels, np.int32), (images.withheld, np.int32)):
        assert column.dtype == kind
        assert column.shape == (len(images),)
    assert images.splits.dtype.kind == "U"
    assert images.classes == ("a", "b")


def test_rows_of_splits_are_ascending_and_share_out_all_images(folder):
    images = ImageSet(folder)
    rows = [images.rows(split) for split in dataset.SPLITS]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(images)))
    both = images.rows("test", "val")
    assert both.dtype == np.int64
    assert both.tolist() == sorted(both.tolist())
    assert set(images.splits[both]) == {"test", "val"}
    with pytest.raises(ValueError, match="tset: unknown split; there are labelled"):
        images.rows("tset")


def test_rows_of_ids(folder):
    images = ImageSet(folder)
    rows = np.array([5, 0, 5, len(images) - 1])
    assert images.row_of(images.ids[rows]).tolist() == rows.tolist()
    assert images.row_of([]).tolist() == []
    for unknown in (0, int(images.ids[3]) + 1, 2**64 - 1):
        with pytest.raises(ValueError, match=f"{unknown:016x} .1 of 2"):
            images.row_of(np.array([images.ids[0], unknown], np.uint64))


def test_images_have_the_pixels_that_their_files_had(folder):
    images = ImageSet(folder)
    row = [images.source(row) for row in range(len(images))].index("pool/deep/er/3.png")
    assert (np.asarray(images.image(row)) == pixels(90_003)).all()


def test_shards_are_plain_tar_archives_in_the_manifest_s_order(folder):
    images = ImageSet(folder)
    found = []
    for part in ("known", "pool"):
        shards = sorted((folder / part).glob("images-*.tar"))
        assert len(shards) > 1
        for path in shards:
            with tarfile.open(path) as archive:
                for member in archive:
                    row = int(images.row_of([int(member.name[:16], 16)])[0])
                    assert member.name == f"{images.ids[row]:016x}.png"
                    assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                    assert archive.extractfile(member).read() == images.encoded(row)
                    assert (images.known_labels[row] >= 0) == (part == "known")
                    found.append((part, row))
    assert found == sorted(found)
    assert sorted(row for _, row in found) == list(range(len(images)))


def test_the_images_with_a_label_are_a_set_of_their_own(folder):
    images, known = ImageSet(folder), ImageSet(folder / "known")
    assert known.classes == images.classes
    rows = images.row_of(known.ids)
    assert rows.tolist() == np.flatnonzero(images.known_labels >= 0).tolist()
    assert 0 < len(rows) < len(images)
    for row, of_all in enumerate(rows.tolist()):
        assert known.encoded_image(row) == images.encoded_image(of_all)
        assert known.source(row) == images.source(of_all)
    for of_known, of_all in ((known.labels, images.labels), (known.withheld, images.withheld)):
        assert of_known.tolist() == of_all[rows].tolist()
    assert known.splits.tolist() == images.splits[rows].tolist()
    assert known.digest != images.digest


def test_layout_fills_shards_to_the_limit():
    lengths = np.random.default_rng(0).integers(1, 5000, 300).tolist()
    places = layout(lengths, 20_000)
    shards = [shard for shard, _ in places]
    assert shards == sorted(shards)
    assert set(shards) == set(range(shards[-1] + 1))
    for at, (length, (shard, offset)) in enumerate(zip(lengths, places, strict=True)):
        assert offset % 512 == 0
        assert offset + length <= 20_000
        if at and places[at - 1][0] == shard:
            assert offset - 512 >= places[at - 1][1] + lengths[at - 1]
    assert layout([100, 10**6, 100], 1000) == [(0, 512), (1, 512), (2, 512)]  # an image larger than a shard


def test_a_pickled_set_reads_the_same(folder):
    images = ImageSet(folder)
    images.encoded(0)
    again = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 1000  # the files are mapped again, not copied
    assert all(again.encoded(row) == images.encoded(row) for row in range(len(images)))
    assert again.digest == images.digest


def test_labels_that_are_withheld_from_the_student_are_known(folder):
    images = ImageSet(folder)
    folders = [images.source(row).split("/")[-2] for row in range(len(images))]
    assert images.known_labels.tolist() == ["ab".find(name) for name in folders]
    withheld = images.withheld >= 0
    assert 0 < withheld.sum() < len(images)
    assert (images.labels[withheld] == -1).all()


def test_more_shards_than_may_be_open_at_once(folder, monkeypatch):
    monkeypatch.setattr(dataset, "OPEN_SHARDS", 2)
    images = ImageSet(folder)
    for row in (*range(len(images)), *reversed(range(len(images)))):
        assert sample_id(images.encoded(row)) == images.ids[row]
    assert len(images._maps) <= 2


def test_the_digest_says_what_is_in_the_set_and_not_where_it_lies(folder):
    manifest = read_manifest(folder)
    classes = ("a", "b")
    first = ImageSet(folder).digest
    assert dataset.digest(manifest, classes) == first
    assert dataset.digest(manifest, ("a", "c")) != first
    moved = pa.Table.from_pylist([row | {"offset": 0, "source": "x"} for row in manifest.to_pylist()], manifest.schema)
    assert dataset.digest(moved, classes) == first
    for name in ("label", "withheld", "width"):
        rows = manifest.to_pylist()
        rows[7][name] += 1
        assert dataset.digest(pa.Table.from_pylist(rows, manifest.schema), classes) != first


def test_the_digest_is_that_of_the_columns_one_after_another(folder, monkeypatch):
    rows = read_manifest(folder).to_pylist()
    kinds = {"id": "<u8", "label": "<i4", "withheld": "<i4", "width": "<i4", "height": "<i4"}
    whole = hashlib.sha256(b'["ssld images 1", "a", "b"]')
    for name in dataset.IDENTITY:
        values = [row[name] for row in rows]
        text = name in ("sha256", "split")
        whole.update("\n".join(values).encode() if text else np.array(values, kinds[name]).tobytes())
    assert ImageSet(folder).digest == whole.hexdigest()
    monkeypatch.setattr(dataset, "DIGEST_ROWS", 7)
    assert ImageSet(folder).digest == whole.hexdigest()


def test_a_training_run_holds_few_bytes_an_image(tmp_path):
    count = 100_000
    one = [1] * count
    columns = dict.fromkeys(dataset.SCHEMA.names, one)
    columns |= {"id": range(count), "sha256": ["0" * 64] * count, "source": ["somewhere/an image.jpg"] * count}
    columns |= {"split": ["labelled"] * count, "shard": ["only.tar"] * count, "offset": [512] * count}
    dataset.write_manifest(tmp_path, columns, ["one", "two"])
    (tmp_path / "only.tar").write_bytes(bytes(dataset.shard_size(513)))
    ImageSet(tmp_path).rows("labelled")  # what libraries keep from their first use on
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    images = ImageSet(tmp_path)
    assert images.digest
    views = Views(images, ViewSpec(0, 8, (1, 1), (1, 1), 0, 0, 0, 0, 0, 0))
    order = TrainingOrder(images.rows("labelled", "unlabelled"), 10, 0, 1)
    assert len(next(order.batches(5, 9))[0]) == 10
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert len(views.partners) * 8 < held < 20 * count


def test_ranks_depend_on_seed_purpose_and_sample_alone():
    assert rank(0, "a", 1) == rank(0, "a", 1)
    assert len({rank(seed, purpose, sample) for seed in (0, 1) for purpose in "ab" for sample in range(100)}) == 400
    ranks = np.array([rank(3, "even", sample) for sample in range(4000)], dtype=float) / 2**64
    assert abs(ranks.mean() - 0.5) < 0.02


def test_a_set_without_a_label_is_a_set(tmp_path):
    content = png(1)
    sample = image_shards.Sample(
        hashlib.sha256(content).hexdigest(), len(content), 30, 20, "unlabelled", -1, -1, "1.png"
    )
    image_shards.write(tmp_path, [sample], ["none"], 10**6, lambda given: [(given[0], content)])
    assert ImageSet(tmp_path).encoded(0) == content
