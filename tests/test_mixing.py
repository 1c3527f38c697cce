"""MixUp and CutMix: partner and share are functions of (seed, view, image), and labels follow the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from understudy.data import mixing, views
from understudy.data.batches import Epochs, Split
from understudy.data.mixing import Mix, pair
from understudy.data.views import POLICIES

IDS = np.sort(np.random.default_rng(0).integers(0, 2**63, 400).astype(np.uint64))
MIXES = [Mix("mixup"), Mix("mixup", 0.2), Mix("cutmix"), Mix("cutmix", 0.4)]


def split(count: int = 40, side: int = 12, classes: int = 5) -> Split:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator)
    labels = np.arange(count) % classes
    device = torch.device("cpu")
    return Split(frames, labels, IDS[:count], np.arange(count), size=side, device=device, classes=classes)


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_numbers_at_every_call(mix: Mix) -> None:
    one, again = (pair(IDS, mix, seed=3, view=7, size=12) for _ in range(2))
    assert torch.equal(one.partner, again.partner)
    assert torch.equal(one.share, again.share)
    assert one.box is None or torch.equal(one.box, again.box)
    assert (one.box is None) == (mix.kind == "mixup")


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("other", [{"seed": 4}, {"view": 8}])
def test_another_seed_or_view_is_another_draw(mix: Mix, other: dict[str, int]) -> None:
    one = pair(IDS, mix, seed=3, view=7, size=12)
    two = pair(IDS, mix, **{"seed": 3, "view": 7, "size": 12, **other})
    assert (one.partner != two.partner).float().mean() > 0.9
    assert not torch.allclose(one.share, two.share)


def test_the_order_of_the_images_moves_the_draws_along() -> None:
    order = np.random.default_rng(1).permutation(len(IDS))
    straight, moved = (pair(ids, Mix("cutmix"), seed=0, view=0, size=16) for ids in (IDS, IDS[order]))
    for name in ("partner", "share", "box"):
        assert torch.equal(getattr(moved, name), getattr(straight, name)[order])


def test_an_image_more_changes_partners_by_design_but_no_share() -> None:
    """A partner is a place within the split: kept outputs are therefore named by the whole set of images."""
    few, more = (pair(IDS[:count], Mix("mixup"), seed=0, view=0, size=16) for count in (399, 400))
    assert torch.equal(few.share, more.share[:399])
    assert (few.partner - more.partner[:399]).abs().max() <= 1


def test_draws_are_unrelated_to_those_of_the_view() -> None:
    ids = np.arange(20_000, dtype=np.uint64)
    mixed = pair(ids, Mix("mixup"), seed=0, view=0, size=16)
    seen = views.uniforms(ids, seed=0, view=0, columns=4)
    for column in seen.T:
        for drawn in (mixed.partner.numpy(), mixed.share.numpy()):
            assert abs(np.corrcoef(column, drawn)[0, 1]) < 0.03


def test_partners_are_uniform_over_the_split() -> None:
    ids = np.arange(50_000, dtype=np.uint64)
    partner = pair(ids, Mix("mixup"), seed=1, view=2, size=16).partner.numpy()
    assert partner.min() >= 0
    assert partner.max() < 50_000
    counts, _ = np.histogram(partner, bins=50, range=(0, 50_000))
    assert ((counts - 1000) ** 2 / 1000).sum() < 85  # 99.9 % quantile with 49 degrees of freedom is 85.4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    ids = np.arange(5_000, dtype=np.uint64)
    share = pair(ids, Mix("mixup", alpha), seed=5, view=0, size=16).share.numpy().astype(np.float64)
    assert share.min() >= 0
    assert share.max() <= 1
    assert scipy.stats.kstest(share, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01
    elsewhere = scipy.stats.beta(3 * alpha, alpha).cdf
    assert scipy.stats.kstest(share, elsewhere).pvalue < 1e-6  # the test can tell


@pytest.mark.parametrize("size", [7, 12, 33])
def test_the_label_share_of_cutmix_is_the_area_to_the_pixel(size: int) -> None:
    drawn = pair(IDS, Mix("cutmix"), seed=0, view=1, size=size)
    own, other = torch.ones(len(IDS), 1, size, size), torch.zeros(len(IDS), 1, size, size)
    area = drawn.images(own, other).sum((1, 2, 3))
    assert torch.equal((drawn.share * size**2).round(), area)
    torch.testing.assert_close(drawn.share, area / size**2, rtol=0, atol=1e-7)
    assert drawn.box is not None
    assert drawn.box.min() >= 0
    assert drawn.box.max() <= size
    assert len(torch.unique(drawn.share)) > 20


def test_boxes_of_cutmix_have_the_drawn_area_where_no_edge_cuts_them() -> None:
    size = 1000
    centre = torch.full((5, 2), 0.5)
    share = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    box = mixing._boxes(share, centre, size)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / size**2
    torch.testing.assert_close(area, 1 - share, atol=2e-3, rtol=0)


@pytest.mark.parametrize("mix", MIXES)
def test_labels_are_shares_that_sum_to_one(mix: Mix) -> None:
    drawn = pair(IDS, mix, seed=0, view=0, size=12)
    labels = torch.from_numpy((np.arange(len(IDS)) * 7) % 5)
    shares = drawn.labels(labels, labels[drawn.partner], 5)
    assert shares.shape == (len(IDS), 5)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(IDS)))
    for row in range(len(IDS)):
        expected = np.zeros(5)
        expected[labels[row]] += float(drawn.share[row])
        expected[labels[drawn.partner[row]]] += 1 - float(drawn.share[row])
        np.testing.assert_allclose(shares[row].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("policy", ["none", "standard"])
def test_images_are_mixed_as_an_independent_loop_does(mix: Mix, policy: str) -> None:
    data = split()
    drawn, pairs = data.draw(POLICIES[policy], seed=0, view=3, mix=mix)
    assert pairs is not None
    seen = views.apply(data.frames(torch.arange(40)), drawn, 12).double().numpy()
    positions = torch.tensor([5, 0, 39, 17])
    batch = data.batch(positions, drawn, pairs)
    for image, row in zip(batch.images.numpy(), positions.tolist(), strict=True):
        share, partner = float(pairs.share[row]), int(pairs.partner[row])
        expected = share * seen[row] + (1 - share) * seen[partner]
        if pairs.box is not None:
            left, top, right, bottom = pairs.box[row].tolist()
            expected = seen[row].copy()
            for y in range(top, bottom):
                for x in range(left, right):
                    expected[:, y, x] = seen[partner][:, y, x]
        np.testing.assert_allclose(image, expected, atol=2e-6)


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_view_does_not_depend_on_its_batch(mix: Mix) -> None:
    data = split()
    drawn, pairs = data.draw(POLICIES["light"], seed=0, view=0, mix=mix)
    together = data.batch(torch.arange(40), drawn, pairs)
    some = data.batch(torch.tensor([31, 2]), drawn, pairs)
    torch.testing.assert_close(some.images, together.images[[31, 2]], rtol=0, atol=1e-6)
    assert torch.equal(some.labels, together.labels[[31, 2]])


def test_an_image_may_be_its_own_partner() -> None:
    alone = pair(IDS[:1], Mix("mixup"), seed=0, view=0, size=12)
    assert alone.partner.tolist() == [0]
    assert alone.labels(torch.tensor([2]), torch.tensor([2]), 4).tolist() == [[0, 0, 1, 0]]
    image = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(alone.images(image, image), image)


def test_an_epoch_brings_shares_for_labels_and_repeats_its_views() -> None:
    epochs = Epochs(split(), policy=POLICIES["none"], view_seed=0, batch_size=10, views=2, mix=Mix("cutmix"))
    found = {}
    for epoch in range(4):
        for batch in epochs.epoch(0, epoch):
            assert batch.labels.shape == (len(batch.positions), 5)
            for position, image in zip(batch.positions.tolist(), batch.images, strict=True):
                found[epoch, position] = image
    assert all(torch.equal(found[0, position], found[2, position]) for position in range(40))
    assert sum(not torch.equal(found[0, position], found[1, position]) for position in range(40)) > 30
