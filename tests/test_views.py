"""Views are pure functions of (seed, sample id, replica), and look as the specification says."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from made_images import encode
from PIL import Image
from torchvision.transforms import v2

from pipeline.core.data import augment, images, views
from pipeline.core.data.images import Encoded
from pipeline.core.data.views import ViewSpec

SPEC = ViewSpec(
    seed=7,
    resolution=24,
    crop_scale=(0.3, 1.0),
    crop_ratio=(0.75, 1.3333),
    flip=0.5,
    randaugment_ops=2,
    randaugment_magnitude=9,
    mix_probability=0.5,
    mixup_alpha=0.4,
    cutmix_alpha=1.0,
)
PARTNERS = np.sort(np.random.default_rng(0).integers(0, 2**63, 40).astype(np.uint64))


def photo(seed=0, size=(60, 44)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def file(image, kind="PNG", **options):
    return Encoded(encode(image, kind, **options), *image.size)


def pixels(spec, sample, replica):
    view = views.draw(spec, sample, replica, PARTNERS)
    partner = None
    if view.partner is not None:
        partner = views.draw(spec, view.partner, replica, PARTNERS), file(photo(view.partner % 1000))
    return views.render(spec, view, file(photo(sample)), partner)


def test_the_same_arguments_give_the_same_pixels_whatever_happened_before():
    first = [pixels(SPEC, sample, replica) for sample in range(30) for replica in range(2)]
    np.random.seed(1)
    torch.manual_seed(1)
    again = [pixels(SPEC, sample, replica) for sample in reversed(range(30)) for replica in (1, 0)][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.shape == (3, 24, 24)
        assert a.dtype == np.uint8
        assert np.array_equal(a, b)


def drawn(spec, sample, replica):
    """A view, its crops as numbers."""
    view = views.draw(spec, sample, replica, PARTNERS)
    return view._replace(crops=tuple(view.crops))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SPEC)])
def test_every_field_is_in_the_digest(field):
    value = getattr(SPEC, field)
    other = dataclasses.replace(SPEC, **{field: (0.1, 0.2) if isinstance(value, tuple) else value + 1})
    assert other.digest != SPEC.digest
    assert dataclasses.replace(SPEC).digest == SPEC.digest


def test_views_that_are_drawn_otherwise_have_another_digest(monkeypatch):
    before = SPEC.digest
    monkeypatch.setattr(views, "VERSION", views.VERSION + 1)
    assert SPEC.digest != before


def test_seed_sample_and_replica_each_matter():
    base = drawn(SPEC, 5, 0)
    for other in (drawn(SPEC, 6, 0), drawn(SPEC, 5, 1), drawn(dataclasses.replace(SPEC, seed=8), 5, 0)):
        assert other.crops != base.crops
        assert other[1:] != base[1:]


def test_draws_have_the_specified_frequencies():
    drawn = [views.draw(SPEC, sample, 0, PARTNERS) for sample in range(4000)]
    assert np.mean([v.flip for v in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([v.mixing != "" for v in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([v.mixing == "cutmix" for v in drawn]) == pytest.approx(0.25, abs=0.03)
    areas = [next(iter(v.crops))[0] for v in drawn]
    assert min(areas) >= 0.3
    assert max(areas) <= 1.0
    assert np.mean(areas) == pytest.approx(0.65, abs=0.02)
    counts = np.unique([name for v in drawn for name, _ in v.operations], return_counts=True)[1]
    assert len(counts) == len(augment.OPERATIONS)
    assert counts.min() > 0.8 * 8000 / len(augment.OPERATIONS)
    mixup = [v.share for v in drawn if v.mixing == "mixup"]
    assert np.var(mixup) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)  # of Beta(0.4, 0.4)


def test_partners_come_from_the_list_and_are_never_the_sample_itself():
    seen = {views.draw(SPEC, int(sample), replica, PARTNERS).partner for sample in PARTNERS for replica in range(50)}
    assert seen - {None} <= set(PARTNERS.tolist())
    assert len(seen) > 0.8 * len(PARTNERS)
    for sample in PARTNERS.tolist():
        assert all(views.draw(SPEC, sample, replica, PARTNERS).partner != sample for replica in range(50))
    assert all(views.draw(SPEC, s, 0, np.zeros(0, np.uint64)).partner is None for s in range(50))
    mixed = dataclasses.replace(SPEC, mix_probability=1.0)  # and the ring of ids is closed
    assert {views.draw(mixed, int(PARTNERS[1]), r, PARTNERS[:2]).partner for r in range(50)} == {int(PARTNERS[0])}
    alone = PARTNERS[:1]
    assert all(views.draw(SPEC, int(alone[0]), r, alone).partner is None for r in range(50))


@pytest.mark.parametrize("count", [3, 10, 300])
def test_partners_are_drawn_nearly_evenly_however_their_ids_lie(count):
    ids = np.sort(np.random.default_rng(count).integers(0, 2**64, count, dtype=np.uint64))
    mixed = dataclasses.replace(SPEC, mix_probability=1.0)
    drawn = [views.draw_partner(mixed, sample, 0, ids) for sample in range(100 * count)]
    times = np.unique(drawn, return_counts=True)[1]
    even = times.sum() ** 2 / (times**2).sum()  # so many, drawn evenly, would meet as often
    assert even > 0.8 * count  # with one place for each, half of that
    assert times.max() < 1.5 * 100


def test_a_partner_drawn_alone_is_the_views_own():
    for spec in (SPEC, dataclasses.replace(SPEC, mixup_alpha=0.0, cutmix_alpha=0.0)):
        for sample in (*range(100), *PARTNERS.tolist()):
            alone = views.draw_partner(spec, sample, 3, PARTNERS)
            assert alone == views.draw(spec, sample, 3, PARTNERS).partner


def test_one_partner_more_changes_few_views():
    fewer = np.delete(PARTNERS, 17)
    changed = [views.draw(SPEC, s, 0, PARTNERS) != views.draw(SPEC, s, 0, fewer) for s in range(2000)]
    assert 0 < np.mean(changed) < 0.1


def test_a_mixed_view_is_made_of_the_two_views_alone():
    unmixed = dataclasses.replace(SPEC, mix_probability=0.0)
    kinds = set()
    for sample in range(60):
        view = views.draw(SPEC, sample, 3, PARTNERS)
        if view.partner is None:
            continue
        own = views.render(unmixed, view._replace(mixing=""), file(photo(sample)), None).astype(float)
        other_view = views.draw(SPEC, view.partner, 3, PARTNERS)._replace(mixing="")
        other = views.render(unmixed, other_view, file(photo(view.partner % 1000)), None).astype(float)
        mixed = pixels(SPEC, sample, 3)
        kinds.add(view.mixing)
        if view.mixing == "mixup":
            assert np.abs(mixed - (view.share * own + (1 - view.share) * other)).max() <= 0.5 + 1e-3
        else:
            left, top, right, bottom = view.box
            inside = np.zeros((24, 24), bool)
            inside[top:bottom, left:right] = True
            assert np.array_equal(mixed, np.where(inside, other, own))
            assert view.share == pytest.approx(1 - inside.mean())
    assert kinds == {"mixup", "cutmix"}


def test_crops_lie_in_the_image_whatever_its_shape():
    for size in [(10, 500), (500, 10), (1, 1), (33, 32)]:
        for sample in range(50):
            view = views.draw(SPEC, sample, 0, PARTNERS)
            left, top, right, bottom = view.crops.box(*size)
            assert -1e-6 <= left < right <= size[0] + 1e-6
            assert -1e-6 <= top < bottom <= size[1] + 1e-6
            if max(size) == 500:  # no try fits: torchvision's fallback
                short = {(10, 500): "width", (500, 10): "height"}[size]
                assert (right - left, bottom - top) == pytest.approx(
                    (10, 10 / 0.75) if short == "width" else (13.333, 10)
                )
                assert (left + right, top + bottom) == pytest.approx(size)


def test_crops_lean_to_no_side():
    columns = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None], (32, 32, 3)).swapaxes(0, 1)
    ramp = file(Image.fromarray(np.ascontiguousarray(columns)))  # each pixel's value is its column
    spec = dataclasses.replace(PLAIN, flip=0.0, crop_scale=(0.5, 1.0))
    means = [views.render(spec, views.draw(spec, s, 0, PARTNERS), ramp, None).mean() for s in range(3000)]
    assert np.mean(means) == pytest.approx(15.5, abs=0.1)


def test_the_test_view_is_torchvisions_centre_crop():
    image = photo(4, (80, 64))
    crop = v2.functional.center_crop(image, [56, 56])  # 0.875 of the shorter side
    expected = np.asarray(crop.resize((28, 28), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    found = views.render_test(image, 28, 0.875).astype(int)
    # Only at the border can the two differ: there the resampling sees beyond the crop.
    assert np.abs(found - expected)[:, 2:-2, 2:-2].max() <= 1


PLAIN = dataclasses.replace(SPEC, randaugment_ops=0, mix_probability=0.0, flip=1.0)


def test_a_view_is_the_crop_resized_as_pil_does_it():
    for sample in range(20):
        view, image = views.draw(PLAIN, sample, 0, PARTNERS), photo(sample, (90, 70))
        left, top, right, bottom = view.crops.box(90, 70)
        crop = image.crop((round(left), round(top), round(right), round(bottom)))
        expected = crop.resize((24, 24), Image.Resampling.BICUBIC).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found = views.render(PLAIN, view, file(image), None)
        assert np.abs(found - np.asarray(expected).transpose(2, 0, 1).astype(int)).max() <= 1


def test_a_large_jpeg_is_decoded_no_larger_than_its_crop_needs(monkeypatch):
    decoded, pixels = [], images.pixels
    monkeypatch.setattr(images, "pixels", lambda *asked: decoded.append(pixels(*asked)) or decoded[-1])
    whole = dataclasses.replace(PLAIN, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    for side, expected in ((20, 20), (47, 47), (48, 24), (56, 28), (192, 24), (200, 25), (2000, 250)):
        image = file(photo(3, (side, side)), "JPEG", quality=95)
        found = views.render(whole, views.draw(whole, 3, 0, PARTNERS), image, None)
        assert decoded[-1].shape == (expected, expected, 3)
        smooth = images.decode(image.content).resize((24, 24), Image.Resampling.BICUBIC)
        smooth = np.asarray(smooth).transpose(2, 0, 1).astype(int)
        assert np.abs(found - smooth).mean() < 4


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_scaled_jpeg_is_what_pil_decodes_it_to(scale, mode):
    image = file(photo(1, (81, 64)).convert(mode), "JPEG", quality=95)
    reference = Image.open(io.BytesIO(image.content))
    reference.draft(None, (81 // scale, 64 // scale))
    assert reference.size == (-(-81 // scale), -(-64 // scale))
    assert np.array_equal(images.pixels(image, 1 / scale), np.asarray(reference.convert("RGB")))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_are_those_of_decode(orientation, mode):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    content = encode(photo(1, (81, 64)).convert(mode), "JPEG", quality=95, exif=exif)
    whole = images.decode(content)
    assert np.array_equal(images.pixels(Encoded(content, *whole.size)), np.asarray(whole))


def test_pixels_of_other_files_come_in_full():
    image = file(photo(1))
    assert np.array_equal(images.pixels(image, 0.2), np.asarray(images.decode(image.content)))


def test_views_lie_in_memory_as_batches_do():
    rendered = [
        views.render(SPEC, views.draw(SPEC, sample, 0, PARTNERS[:0]), file(photo()), None) for sample in range(40)
    ]
    assert all(pixels.flags.c_contiguous for pixels in rendered)
