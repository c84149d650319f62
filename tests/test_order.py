"""The order of training: which views make up each batch, for any start, number of processes and parts."""

import itertools
import re

import numpy as np
import pytest

from pipeline.core.sharing import images_at_once
from pipeline.core.train.order import TrainingOrder


def rows_of(order, first, last):
    return [rows.tolist() for rows, _ in order.batches(first, last)]


def test_an_epoch_shows_no_image_twice_and_each_epoch_is_another_order():
    order = TrainingOrder(np.arange(14), batch_size=4, seed=0, replicas=0)
    assert order.steps_per_epoch == 3
    first, second = rows_of(order, 0, 3), rows_of(order, 3, 6)
    assert len({row for batch in first for row in batch}) == 12
    assert first != second


def test_the_order_does_not_depend_on_where_it_starts_nor_on_the_rows_order():
    order = TrainingOrder(np.arange(14), batch_size=4, seed=0, replicas=0)
    assert rows_of(order, 0, 9)[4:] == rows_of(order, 4, 9)
    backwards = TrainingOrder(np.arange(14)[::-1].copy(), batch_size=4, seed=0, replicas=0)
    assert rows_of(order, 0, 9) == rows_of(backwards, 0, 9)
    assert rows_of(order, 0, 9) != rows_of(TrainingOrder(np.arange(14), 4, seed=1, replicas=0), 0, 9)


def test_processes_share_out_each_batch():
    whole = rows_of(TrainingOrder(np.arange(14), 4, 0, 0), 0, 6)
    shares = [rows_of(TrainingOrder(np.arange(14), 4, 0, 0, rank, 2), 0, 6) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]
    of_order = TrainingOrder(np.arange(14), 4, 0, 0, 1, 2)
    assert [of_order.whole_batch(step)[0].tolist() for step in (5, 0)] == [whole[5], whole[0]]
    with pytest.raises(ValueError, match=r"evenly to 5 processes: set machine.processes to a smaller number$"):
        TrainingOrder(np.arange(4), 8, 0, 0, 0, 5)
    with pytest.raises(ValueError, match=r"evenly to 3 processes: set the stage's batch_size to 6, or machine.pro"):
        TrainingOrder(np.arange(14), 4, 0, 0, 0, 3)
    with pytest.raises(
        ValueError, match=r"in 3 parts each: set the stage's batch_size to 12, or accumulate or machine.processes to"
    ):
        TrainingOrder(np.arange(14), 8, 0, 0, 0, 2, parts=3)


def test_too_few_images_for_the_parts_of_a_step_are_an_error_that_says_how_many_fit():
    with pytest.raises(ValueError, match=r"a batch of all 5 images in 4 parts.*set the stage's accumulate to 2"):
        TrainingOrder(np.arange(5), 16, 0, 0, parts=4)
    TrainingOrder(np.arange(5), 16, 0, 0, parts=2)


@pytest.mark.parametrize("images", [None, 2, 5, 7, 20, 40])
def test_a_number_that_is_advised_will_do(images):
    for batch_size, accumulate, processes in itertools.product((2, 4, 8, 24), (1, 2, 3, 4), (1, 2, 3, 5, 16)):
        given = {"batch_size": batch_size, "accumulate": accumulate, "processes": processes, "images": images}
        try:
            images_at_once(**given)
        except ValueError as error:
            if advised := re.search(r"the stage's (\w+) to (\d+)", str(error)):
                images_at_once(**given | {advised[1]: int(advised[2])})
            else:
                assert images < processes * accumulate


def test_replicas_go_round():
    order = TrainingOrder(np.arange(14), 14, 0, replicas=3)
    assert [int(replicas[0]) for _, replicas in order.batches(0, 7)] == [0, 1, 2, 0, 1, 2, 0]
    fresh = TrainingOrder(np.arange(14), 14, 0, replicas=0)
    assert [int(replicas[0]) for _, replicas in fresh.batches(0, 4)] == [0, 1, 2, 3]


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image to train on"):
        TrainingOrder(np.arange(0), 4, 0, 0)
    for processes in (1, 2):
        with pytest.raises(ValueError, match="one image to train on, and it takes two"):
            TrainingOrder(np.arange(1), 4, 0, 0, world=processes)
