"""What errors of the system, of torch and of worker processes mean, and how they are told in a line."""

import pytest
from images import tiny
from torch._utils import ExceptionWrapper

from pipeline.core import errors, stage


def test_what_worker_processes_say_is_one_line():
    try:
        raise ValueError("images-00000.tar: the image\nat byte 512: is damaged")
    except ValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError) as error:
        wrapped.reraise()
    assert errors.in_a_line(error.value) == "images-00000.tar: the image at byte 512: is damaged"
    assert errors.in_a_line(ValueError("two\nlines")) == "two lines"
    assert errors.in_a_line(MemoryError()) == "MemoryError"


def test_an_error_of_the_system_names_its_file_first(tmp_path):
    with pytest.raises(OSError) as error:
        (tmp_path / "photos").read_bytes()
    assert errors.in_a_line(error.value) == f"{tmp_path}/photos: No such file or directory"
    with pytest.raises(OSError) as error:
        (tmp_path / "photos").rename(tmp_path / "images")
    assert str(tmp_path / "photos") in errors.in_a_line(error.value)
    assert str(tmp_path / "images") in errors.in_a_line(error.value)
    assert errors.in_a_line(OSError("image file is truncated")) == "image file is truncated"


@pytest.mark.parametrize(
    ("words", "for_good"),
    [
        ("Failed to initialize NCCL communicator: invalid usage. Failed to initialize any NET plugin", True),
        ("Failed to initialize NCCL communicator: remote process exited or there was a network error", False),
        ("NCCL AllReduce failed: remote process exited or there was a network error", False),
    ],
)
def test_an_nccl_that_cannot_connect_is_told_from_a_process_that_has_ended(monkeypatch, words, for_good):
    monkeypatch.setenv("RANK", "0")
    assert errors.no_nccl(RuntimeError(words)) == for_good
    assert stage._explained(RuntimeError(words), tiny(), "distill")[0] == (
        errors.REFUSED if for_good else errors.LEFT_ALONE
    )


@pytest.mark.parametrize(
    "words",
    [
        "Caught _ArrayMemoryError in DataLoader worker process 0.\nUnable to allocate 9 TiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_libraries_are_out_of_memory_in_their_own_words(words):
    assert errors.out_of_memory(RuntimeError(words))


def test_another_error_is_not_called_out_of_memory():
    assert not errors.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not errors.out_of_memory(ValueError("out of memory"))
