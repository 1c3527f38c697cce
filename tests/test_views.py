"""Views are functions of (seed, view number, image): of nothing else, and they do to pixels what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from understudy.data import views
from understudy.data.batches import Batch, Epochs, Split, hash_seed
from understudy.data.mixing import Mix
from understudy.data.views import POLICIES, ViewPolicy
from understudy.errors import ConfigError

IDS = np.random.default_rng(0).integers(0, 2**63, 500).astype(np.uint64)


def _frames(count: int, side: int = 12, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def _slow_uniform(identity: int, seed: int, view: int, column: int) -> float:
    """SplitMix64's mixing with Python's whole numbers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix(mix((seed + golden) & mask) ^ ((view * golden) & mask))
    return (mix((mix(identity ^ key) + (column + 1) * golden) & mask) >> 40) / 2**24


@given(seed=st.integers(0, 2**40), view=st.integers(0, 10**6))
def test_uniforms_equal_the_slow_generator(seed: int, view: int) -> None:
    fast = views.uniforms(IDS[:5], seed=seed, view=view, columns=3)
    slow = [[_slow_uniform(int(i), seed, view, column) for column in range(3)] for i in IDS[:5]]
    np.testing.assert_array_equal(fast, np.array(slow, np.float32))


def test_uniforms_are_uniform_and_unrelated() -> None:
    ids = np.arange(50_000, dtype=np.uint64)  # worst case: counters, not hashes
    table = np.concatenate([views.uniforms(ids, seed=3, view=v, columns=4) for v in (0, 1)], axis=1)
    assert (table >= 0).all()
    assert (table < 1).all()
    for column in table.T:
        counts, _ = np.histogram(column, bins=50, range=(0, 1))
        chi_squared = ((counts - 1000) ** 2 / 1000).sum()
        assert chi_squared < 85  # 99.9 % quantile with 49 degrees of freedom is 85.4
    correlation = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.02


@given(order=st.permutations(range(20)), cut=st.integers(1, 20))
def test_a_view_depends_on_the_image_alone(order: list[int], cut: int) -> None:
    rows = np.array(order[:cut])
    frames, policy = _frames(20), POLICIES["standard"]
    together = views.apply(frames, views.draw(IDS[:20], policy, seed=1, view=5), 12)
    some = views.apply(frames[rows], views.draw(IDS[rows], policy, seed=1, view=5), 12)
    torch.testing.assert_close(some, together[rows], rtol=0, atol=1e-6)


def test_views_differ_by_number_and_seed() -> None:
    frames = _frames(4)
    one, other, elsewhere = (
        views.apply(frames, views.draw(IDS[:4], POLICIES["light"], seed=seed, view=view), 12)
        for seed, view in ((0, 0), (0, 1), (1, 0))
    )
    assert (one - other).abs().mean() > 0.01
    assert (one - elsewhere).abs().mean() > 0.01


def test_no_augmentation_is_the_image_itself() -> None:
    frames = _frames(3)
    drawn = views.draw(IDS[:3], POLICIES["none"], seed=0, view=0)
    assert torch.equal(views.apply(frames, drawn, 12), frames.float() / 255)


def test_a_flip_mirrors_half_of_the_images_exactly() -> None:
    frames = _frames(500)
    flipped = views.apply(frames, views.draw(IDS, ViewPolicy(flip=0.5), seed=0, view=0), 12)
    plain = frames.float() / 255
    same = (flipped - plain).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (flipped - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (same | mirrored).all()
    assert 200 < int(mirrored.sum()) < 300


def test_a_shift_moves_pixels_and_mirrors_the_border_in() -> None:
    frames = _frames(1, side=8)
    theta = torch.tensor([[[1.0, 0.0, 2 * 2 / 8], [0.0, 1.0, 0.0]]])  # look two of eight pixels further right
    moved = views.apply(frames, views.Draw(theta, None, None), 8)
    plain = frames.float() / 255
    torch.testing.assert_close(moved[..., :6], plain[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., 6:], plain[..., [7, 6]], rtol=0, atol=1e-5)


def test_a_zoom_above_one_shows_less_of_the_frame() -> None:
    frame = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    frame[..., 4, 4] = 255
    policy = ViewPolicy(scale=0.3)
    areas = []
    for view in range(40):
        drawn = views.draw(IDS[:1], policy, seed=0, view=view)
        assert drawn.theta is not None
        areas.append((float(drawn.theta[0, 0, 0]), float(views.apply(frame, drawn, 9).sum())))
    zoomed_in = [area for width, area in areas if width < 0.9]
    zoomed_out = [area for width, area in areas if width > 1.1]
    assert zoomed_in
    assert zoomed_out
    assert min(zoomed_in) > max(zoomed_out)


def test_brightness_and_contrast_do_what_they_say() -> None:
    drawn = views.Draw(None, torch.full((1, 1, 1, 1), 1.2), torch.full((1, 1, 1, 1), 0.5))
    plain = torch.tensor([50.0, 150.0]) / 255
    expected = ((plain - plain.mean()) * 0.5 + plain.mean()) * 1.2
    square = torch.tensor([[[[50, 150], [50, 150]]]], dtype=torch.uint8)
    torch.testing.assert_close(views.apply(square, drawn, 2)[0, 0, 0], expected)


def test_saturation_leaves_each_pixel_its_grey() -> None:
    frames = _frames(4, channels=3)
    made = views.apply(frames, views.Draw(None, None, None, torch.full((4, 1, 1, 1), 0.25)), 12)
    plain = frames.float() / 255
    grey = plain.mean(1, keepdim=True)
    torch.testing.assert_close(made, (plain - grey) * 0.25 + grey)
    alone = frames[:, :1]
    assert torch.equal(
        views.apply(alone, views.Draw(None, None, None, torch.full((4, 1, 1, 1), 0.25)), 12), plain[:, :1]
    )


def test_an_erased_square_holds_the_mean() -> None:
    frame = _frames(1, side=10)
    square = torch.tensor([[0.4, 0.7, 0.15]])  # columns 3 and 4 of 10 and a half more on either side, rows 6 and 7
    made, plain = views.apply(frame, views.Draw(None, None, None, None, square), 10)[0, 0], frame[0, 0].float() / 255
    expected = plain.clone()
    for row in range(10):
        for column in range(10):
            if abs((column + 0.5) / 10 - 0.4) < 0.15 and abs((row + 0.5) / 10 - 0.7) < 0.15:
                expected[row, column] = plain.mean()
    assert 4 <= int((expected != plain).sum()) <= 9
    torch.testing.assert_close(made, expected)


def test_half_of_the_views_lose_a_square() -> None:
    drawn = views.draw(IDS, ViewPolicy(erase=0.4), seed=0, view=0)
    assert drawn.erase is not None
    sides = 2 * drawn.erase[:, 2]
    assert 200 < int((sides > 0).sum()) < 300
    assert 0.35 < float(sides.max()) <= 0.4


def test_shear_leans_by_its_tangent() -> None:
    drawn = views.draw(IDS, ViewPolicy(shear=0.3), seed=0, view=0)
    assert drawn.theta is not None
    assert torch.equal(drawn.theta[:, [0, 1], [0, 1]], torch.ones(500, 2))
    leans = drawn.theta[:, [0, 1], [1, 0]]
    assert 0.28 < float(leans.abs().max()) <= 0.3
    assert torch.equal(drawn.theta[:, :, 2], torch.zeros(500, 2))


def test_what_strong_views_draw_changes_no_other_view() -> None:
    weak, strong = (views.draw(IDS, ViewPolicy(rotate=8.0, contrast=0.2, erase=e), seed=3, view=2) for e in (0.0, 0.4))
    assert weak.theta is not None
    assert strong.theta is not None
    assert torch.equal(weak.theta, strong.theta)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_views_stay_in_range_and_near_their_image(policy: str) -> None:
    frames = _frames(200, side=18, channels=3)
    drawn = views.draw(IDS[:200], POLICIES[policy], seed=0, view=1)
    made = views.apply(frames, drawn, 16)
    assert made.shape == (200, 3, 16, 16)
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.mean() == pytest.approx(float(views.whole(frames, 16).mean()), abs=0.03)


def test_a_frame_much_larger_than_the_view_is_antialiased() -> None:
    stripes = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    drawn = views.draw(IDS[:1], ViewPolicy(rotate=5.0), seed=0, view=0)
    assert float(views.apply(stripes, drawn, 16).std()) < 0.05
    assert float(views.whole(stripes, 16).std()) < 0.05


def test_mirror_images_only_where_they_are_known_to_be_right() -> None:
    assert views.policy("auto", "cifar10").flip == 0.5
    assert views.policy("auto", "some/folder").flip == 0
    assert views.policy("auto", "digits").flip == 0
    assert views.policy("strong", "digits").flip == 0
    assert views.policy("strong", "cifar10").flip == 0.5
    with pytest.raises(ConfigError, match="Unknown augmentation 'ligth'"):
        views.policy("ligth", "x")


def _split(count: int = 50) -> Split:
    labels = np.arange(count, dtype=np.int64)
    rows = np.arange(count)[::-1].copy()
    return Split(_frames(count), labels, IDS[:count], rows, size=12, device=torch.device("cpu"))


def test_an_epoch_meets_every_image_once_with_its_own_label() -> None:
    split = _split()
    epochs = Epochs(split, policy=POLICIES["none"], view_seed=0, batch_size=10)
    batches = list(epochs.epoch(0, 0))
    assert len(batches) == epochs.steps == 5
    seen = torch.cat([batch.labels for batch in batches])
    assert sorted(seen.tolist()) == list(range(50))
    frames = _frames(50).float() / 255
    for batch in batches:
        torch.testing.assert_close(batch.images, frames[batch.labels])


def test_order_and_views_follow_from_seed_and_epoch() -> None:
    epochs = Epochs(_split(), policy=POLICIES["light"], view_seed=0, batch_size=10)
    one, again, next_epoch, other_seed = (
        [batch.positions.tolist() for batch in epochs.epoch(seed, epoch)]
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert one == again
    assert one != next_epoch
    assert one != other_seed


def test_an_epoch_can_go_on_in_its_middle() -> None:
    epochs = Epochs(_split(), policy=POLICIES["light"], view_seed=0, batch_size=10)
    whole = list(epochs.epoch(2, 3))
    rest = list(epochs.epoch(2, 3, start=3))
    assert len(rest) == 2
    for late, early in zip(rest, whole[3:], strict=True):
        assert torch.equal(late.images, early.images)
        assert torch.equal(late.labels, early.labels)


def test_shards_make_up_the_batch() -> None:
    epochs = Epochs(_split(), policy=POLICIES["light"], view_seed=0, batch_size=10)
    whole = next(epochs.epoch(0, 0))
    first, second = (next(epochs.epoch(0, 0, shard=(rank, 2))) for rank in (0, 1))
    assert torch.equal(first.images, whole.images[0::2])
    assert torch.equal(second.images, whole.images[1::2])


@pytest.mark.parametrize(("images", "batch", "steps"), [(50, 20, 3), (50, 24, 2), (50, 64, 1), (65, 64, 1), (10, 3, 3)])
def test_a_small_rest_is_left_out(images: int, batch: int, steps: int) -> None:
    epochs = Epochs(_split(images), policy=POLICIES["none"], view_seed=0, batch_size=batch)
    sizes = [len(part.labels) for part in epochs.epoch(0, 0)]
    assert len(sizes) == epochs.steps == steps
    assert min(sizes) * 2 >= min(batch, images)


def test_seeds_of_orders_do_not_collide() -> None:
    seeds = {hash_seed(seed, epoch) for seed in range(60) for epoch in range(60)}
    assert len(seeds) == 3600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("mix", [None, Mix("mixup"), Mix("cutmix")])
def test_views_drawn_batch_by_batch_are_the_same(mix: Mix | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches() -> list[Batch]:
        epochs = Epochs(_split(), policy=POLICIES["standard"], view_seed=0, batch_size=10, mix=mix)
        return list(epochs.epoch(3, 1))

    at_once = batches()
    monkeypatch.setattr("understudy.data.batches._DRAWN_AT_ONCE", 0)
    for one, other in zip(batches(), at_once, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
