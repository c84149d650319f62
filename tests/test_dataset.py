"""The prepared images as other stages read them, and what a damaged copy says."""

import hashlib
import pickle
import shutil
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from made_images import pixels, png
from prepare_kit import SPLITS, prepared, read_manifest, with_splits, write
from pyarrow import feather

from pipeline.core.atomic import write_json
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
    place = tmp_path_factory.mktemp("set")
    root = write(place / "in", with_splits())
    prepared(place / "out", root, **SPLITS, labels_per_class=5, shard_mb=0.02)
    return place / "out/images"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "images")


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


# --- damaged copies --------------------------------------------------------------------------------------------------


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder; .*dvc repro prepare.*dvc pull"):
        ImageSet(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["manifest.arrow", "classes.json", "known/images-00001.tar"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: missing; .*dvc pull"):
        ImageSet(copy)


@pytest.mark.parametrize("name", ["manifest.arrow", "classes.json"])
def test_a_cut_off_file_is_found_on_opening(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged .*dvc pull"):
        ImageSet(copy)


@pytest.mark.parametrize("change", [-1, 1, -5000])
def test_a_shard_of_another_size_is_found_on_opening(copy, change):
    path = copy / "pool/images-00001.tar"
    content = path.read_bytes() + b"x"
    path.write_bytes(content[: len(content) - 1 + change])
    with pytest.raises(ValueError, match=r"images-00001.tar: \d+ bytes instead of \d+; .*dvc pull"):
        ImageSet(copy)


def test_a_wrong_byte_is_found_on_reading(copy):
    images = ImageSet(copy)
    shard, offset, length = (int(column[0]) for column in images._place)
    path = copy / images._shards[shard]
    content = bytearray(path.read_bytes())
    content[offset + length // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images-00000.tar: the image at byte 512 .* is damaged; .*dvc checkout"):
        images.encoded(0)
    images.encoded(1)


@pytest.mark.parametrize(
    ("column", "value", "words"), [("label", 1, "is damaged"), ("withheld", 2, "of none of its 2")]
)
def test_a_changed_label_is_found_where_the_set_is_named_and_an_impossible_one_at_once(copy, column, value, words):
    rewrite(copy, column, with_first(copy, column, value))
    with pytest.raises(ValueError, match=f"{words}.*dvc pull"):
        ImageSet(copy).digest  # noqa: B018


@pytest.mark.parametrize("number", [-1, 99])
def test_an_image_in_a_shard_that_is_not_named_is_found_on_opening(copy, number):
    column = read_manifest(copy)["shard"].chunk(0)
    numbers = column.indices.to_numpy().copy()
    numbers[5] = number
    rewrite(copy, "shard", pa.DictionaryArray.from_arrays(numbers, column.dictionary, safe=False))
    with pytest.raises(ValueError, match=r"manifest.arrow: an image is in none of its .*dvc pull"):
        ImageSet(copy)


def test_a_digest_that_is_no_text_is_another_digest(copy):
    rewrite(copy, "label", with_first(copy, "label", 0), digest=b"\xff")
    with pytest.raises(ValueError, match=r"is damaged.*dvc pull"):
        ImageSet(copy).digest  # noqa: B018


@pytest.mark.parametrize("where", ["manifest.arrow", "summary.json"])
def test_images_and_a_summary_that_do_not_belong_together_are_refused(folder, tmp_path, where):
    shutil.copytree(folder.parent, tmp_path / "prepare")
    assert dataset.open_known(tmp_path)[1]["known_digest"] == ImageSet(folder / "known").digest
    if where == "manifest.arrow":
        known = tmp_path / "prepare/images/known"
        rewrite(known, "label", with_first(known, "label", 1))
        words = "manifest.arrow or classes.json is damaged"
    else:
        write_json(tmp_path / "prepare/summary.json", {"digest": ImageSet(folder / "known").digest})
        words = "summary.json: tells of other images than"
    with pytest.raises(ValueError, match=f"{words}.*dvc repro prepare"):
        dataset.open_known(tmp_path)


def rewrite(folder, column, values, digest=None):
    """Put other values into a column of a manifest, and leave its digest, or set another."""
    table = read_manifest(folder)
    at, noted = table.schema.get_field_index(column), {"digest": digest} if digest else table.schema.metadata
    table = table.set_column(at, table.field(column), [values]).replace_schema_metadata(noted)
    with pa.OSFile(str(folder / "manifest.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def with_first(folder, column, value):
    """A column of numbers of a manifest, in which `value` stands in place of the first 0."""
    values = read_manifest(folder)[column].to_pylist()
    values[values.index(0)] = value
    return pa.array(values, dataset.SCHEMA.field(column).type)


def test_a_set_without_a_label_is_a_set(tmp_path):
    content = png(1)
    sample = image_shards.Sample(
        hashlib.sha256(content).hexdigest(), len(content), 30, 20, "unlabelled", -1, -1, "1.png"
    )
    image_shards.write(tmp_path, [sample], ["none"], 10**6, lambda given: [(given[0], content)])
    assert ImageSet(tmp_path).encoded(0) == content


def test_other_class_names_are_found_where_the_set_is_named(copy):
    (copy / "classes.json").write_text('["a", "c"]')
    with pytest.raises(ValueError, match=r"classes.json is damaged.*dvc pull"):
        ImageSet(copy).digest  # noqa: B018


def test_a_manifest_in_several_batches_is_refused(copy):
    table = read_manifest(copy)
    for rows, batches in ((len(table), 2), (0, 0)):
        with pa.OSFile(str(copy / "manifest.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table[:rows], max_chunksize=30)
        with pytest.raises(ValueError, match=rf"manifest.arrow: {batches} record batches instead of one; .*dvc pull"):
            ImageSet(copy)


def test_more_than_a_manifest_holds_is_refused(copy, tmp_path):
    """As arrow parts a column of more than 2 GiB of text."""
    columns = read_manifest(copy).to_pydict()
    columns["sha256"] = pa.chunked_array([columns["sha256"][:5], columns["sha256"][5:]])
    before = (copy / "manifest.arrow").read_bytes()
    with pytest.raises(ValueError, match=r"more than 2 GiB of names or hashes \(sha256\); .*33 million images"):
        dataset.write_manifest(copy, columns, ["a", "b"])
    assert (copy / "manifest.arrow").read_bytes() == before


def test_a_manifest_of_another_version_is_refused(copy):
    feather.write_feather(read_manifest(copy).drop_columns(["withheld"]), copy / "manifest.arrow")
    with pytest.raises(ValueError, match=r"columns are not this version's .*withheld"):
        ImageSet(copy)
