"""Records of soft labels: what they keep of a distribution, bit by bit."""

import numpy as np
import pytest
import torch

from pipeline.core.softlabels.records import Coding, Records, dense


def some_logits(count, classes, seed=0, spread=3.0):
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def divergence(expected, found):
    """KL(expected || found) in nats, mean over rows; float64."""
    expected, found = expected.double(), found.double()
    return (torch.special.xlogy(expected, expected) - torch.special.xlogy(expected, found)).sum(1).mean().item()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [1, 2, 20, 255])
def test_all_classes_stored_give_the_teachers_distribution_back(classes, temperature):
    logits = some_logits(8, classes)
    coding = Coding(classes, classes, min_probability=0, bits=16)
    found = dense(coding.decode(coding.encode(logits)), classes, temperature)
    assert torch.allclose(found, torch.softmax(logits / temperature, 1), rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 5, 8, 9, 16])
@pytest.mark.parametrize(("classes", "top_k"), [(3, 3), (20, 5), (1000, 255), (3000, 30), (65_536, 40), (70_000, 100)])
def test_a_record_keeps_the_right_classes_and_their_probabilities(classes, top_k, bits):
    logits = some_logits(6 if classes < 5000 else 2, classes)
    coding = Coding(classes, top_k, min_probability=1e-4, bits=bits)
    records = coding.encode(logits)
    labels = coding.decode(records)
    assert records.content.size == coding.sizes[records.counts].sum()
    row = 0
    for view, count in enumerate(labels.counts):
        expected = torch.log_softmax(logits[view].double(), 0)
        stored = [
            c for c in expected.argsort(descending=True, stable=True).tolist()[:top_k] if expected[c] >= np.log(1e-4)
        ]
        part = slice(row, row + count)
        assert labels.classes[part].tolist() == sorted(stored)
        spread = float(expected[stored].max() - expected[stored].min())
        half_a_step = 0.5 * (spread + 1 / 8) / (2**bits - 1)
        wrong = np.abs(labels.log_probabilities[part] - expected[sorted(stored)].numpy())
        assert wrong.max() <= 2 * half_a_step + 2e-3  # its own rounding, and the others', through their common scale
        others = torch.ones(classes, dtype=torch.bool).index_fill(0, torch.tensor(stored), False)
        rest = torch.logsumexp(expected[others], 0)
        assert labels.log_rest[view] == pytest.approx(rest.item(), rel=1e-3, abs=1e-3)
        row += count


def test_records_of_all_widths_are_read_from_one_batch():
    coding = Coding(70_000, 255, 1e-9, 5)
    logits = torch.cat([some_logits(1, 70_000, spread=spread) for spread in (40.0, 3.0, 12.0, 100.0)])
    logits[0, :3], logits[0, 3:] = 0, -50  # three classes
    one_by_one = [coding.decode(coding.encode(row[None])) for row in logits]
    whole = coding.decode(coding.encode(logits))
    assert len({int(coding._layout["width"][count]) for count in whole.counts}) > 1
    for field, parts in zip(whole, zip(*one_by_one, strict=True), strict=True):
        assert np.array_equal(field, np.concatenate(parts))


def test_batches_of_any_size_give_the_same_bytes():
    logits = some_logits(50, 1000)
    coding = Coding(1000, 255, 1e-4, 5)
    whole = coding.encode(logits)
    parts = [coding.encode(part) for part in logits.split(7)]
    assert np.array_equal(whole.content, np.concatenate([part.content for part in parts]))
    assert np.array_equal(whole.counts, np.concatenate([part.counts for part in parts]))


def test_the_rest_is_spread_evenly():
    logits = some_logits(50, 20)
    coding = Coding(20, 5, 0, 16)
    found = dense(coding.decode(coding.encode(logits)), 20)
    expected = torch.softmax(logits, 1)
    top = torch.zeros_like(found, dtype=torch.bool).scatter(1, expected.topk(5).indices, True)
    assert torch.allclose(found.sum(1), torch.ones(50))
    assert torch.allclose(found[top], expected[top], rtol=2e-3)
    means = expected[~top].view(50, 15).mean(1, keepdim=True)
    assert torch.allclose(found[~top].view(50, 15), means.expand(50, 15), rtol=5e-3)


def test_a_temperature_is_applied_when_reading():
    logits = some_logits(50, 100)
    coding = Coding(100, 100, 0, 16)
    labels = coding.decode(coding.encode(logits))
    for temperature in (0.5, 1.0, 4.0, 20.0):
        assert divergence(torch.softmax(logits / temperature, 1), dense(labels, 100, temperature)) < 1e-6


def test_certain_and_undecided_teachers():
    certain = torch.full((1, 10), -200.0)
    certain[0, 3] = 200.0
    undecided = torch.zeros(1, 10)
    coding = Coding(10, 10, 0, 8)
    found = dense(coding.decode(coding.encode(torch.cat([certain, undecided]))), 10)
    assert found[0, 3] > 1 - 1e-6
    assert torch.allclose(found[1], torch.full((10,), 0.1))
    few = Coding(10, 3, 0, 8)  # of equal probabilities the lower class numbers are kept
    assert few.decode(few.encode(undecided)).classes.tolist() == [0, 1, 2]
    above = Coding(10, 10, 0.5, 8)  # the most probable class is always there
    assert above.decode(above.encode(undecided)).counts.tolist() == [1]


def test_more_bytes_keep_more():
    logits = some_logits(500, 1000)
    expected = torch.softmax(logits, 1)

    def cost(coding):
        records = coding.encode(logits)
        return len(records.content), divergence(expected, dense(coding.decode(records), 1000))

    for coarse, fine in [
        (Coding(1000, 255, 1e-3, 5), Coding(1000, 255, 1e-4, 5)),
        (Coding(1000, 20, 0, 5), Coding(1000, 60, 0, 5)),
        (Coding(1000, 255, 1e-3, 3), Coding(1000, 255, 1e-3, 6)),
    ]:
        (few, much), (more, little) = cost(coarse), cost(fine)
        assert few < more
        assert little < much


def test_a_record_that_cannot_be_is_refused():
    for wrong in [(10, 0, 0, 8), (1000, 256, 0, 8), (10, 5, 0, 1), (10, 5, 0, 17), (10, 5, -0.1, 8), (10, 5, 1.5, 8)]:
        with pytest.raises(ValueError, match=r"no record|from 0 to 1"):
            Coding(*wrong)
    coding = Coding(1000, 255, 1e-4, 5)
    records = coding.encode(some_logits(3, 1000))
    with pytest.raises(ValueError, match="another number of classes"):
        coding.decode(Records(records.counts, np.zeros_like(records.content)))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            coding.encode(torch.full((1, 1000), wrong))
    assert len(coding.decode(Records(np.zeros(0, np.uint8), np.zeros(0, np.uint8))).counts) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_temperature_divides_the_logarithms_of_the_rest_too(temperature):
    coding = Coding(1000, 255, 1e-2, 5)
    labels = coding.decode(coding.encode(some_logits(20, 1000)))
    assert np.exp(labels.log_rest).max() > 0.1
    wanted = torch.softmax(dense(labels, 1000).double().log() / temperature, 1)
    assert torch.allclose(dense(labels, 1000, temperature).double(), wanted, rtol=1e-4, atol=1e-9)
