"""Damaged copies of the prepared images: what is found when, and what the message says to do."""

import shutil

import pyarrow as pa
import pytest
from prepare_kit import in_several_shards, read_manifest
from pyarrow import feather

from pipeline.core.atomic import write_json
from pipeline.core.data import dataset
from pipeline.core.data.dataset import ImageSet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set in several small shards."""
    return in_several_shards(tmp_path_factory.mktemp("set"))


@pytest.fixture
def copy(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "images")


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
