"""Methods that do not suit classes, batches or memory are refused or warned about before training; others pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from suitability_settings import SETTING, chosen, every_method, examine, network, pair, setting
from understudy import losses
from understudy.data.batches import Epochs
from understudy.data.views import ViewPolicy
from understudy.distillation import METHODS, Distiller
from understudy.distillation.memory import NEGATIVES, Contrast
from understudy.distillation.projectors import Shapes
from understudy.evaluate.suitability import examine_methods


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_method
def test_nothing_speaks_against_any_method_with_many_classes_and_images(method: str) -> None:
    found = examine_methods(chosen(method), SETTING)
    assert all(finding.ok for finding in found)
    assert found[0].check == "methods"
    assert found[0].text == f"Nothing speaks against {method} with 10 classes and 64 images at a time."


# --- classes ---------------------------------------------------------------------------------------------------------


@every_method
def test_two_classes(method: str) -> None:
    severities = {"dkd": "refuse", "nkd": "refuse", "lskd": "refuse", "dist": "warn"}
    found = examine(method, classes=2)
    assert {check: one.severity for check, one in found.items()} == (
        {f"{method} classes": severities[method]} if method in severities else {}
    )
    assert all(
        one.text.startswith("With two classes ") and one.text.endswith(": take kd instead.") for one in found.values()
    )
    assert not examine(method, classes=3)


def test_what_is_said_of_two_classes_is_so() -> None:
    student, teacher, labels = random(6, 2).requires_grad_(), random(6, 2, seed=1), torch.arange(6) % 2
    kd = losses.kd(student, teacher, temperature=4.0)
    torch.testing.assert_close(losses.dkd(student, teacher, labels, temperature=4.0, beta=8.0), kd)
    labelled = teacher.softmax(1).gather(1, labels[:, None])[:, 0] * F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(losses.nkd(student, teacher, labels, gamma=9.0), labelled)
    standardized = losses.standardize(student)
    torch.testing.assert_close(standardized.abs(), torch.full((6, 2), 0.5**0.5))
    (between,) = torch.autograd.grad(losses.dist(student, teacher, temperature=1.0, gamma=0.0), student)
    (within,) = torch.autograd.grad(losses.dist(student, teacher, temperature=1.0, beta=0.0), student)
    assert between.abs().max() < 1e-5 < 1e-3 < within.abs().max()


def test_standardised_logits_of_two_classes() -> None:
    (found,) = examine_methods(chosen("kd", standardize=True), setting(classes=2))
    assert (found.check, found.severity, found.ok) == ("kd classes", "refuse", False)
    assert found.text == "With two classes only the sign of an answer survives `standardize`: take kd without."
    assert examine_methods(chosen("kd", standardize=True), setting(classes=3))[0].ok
    assert len(examine_methods(chosen("lskd", standardize=True), setting(classes=2))) == 1


# --- mixed images ----------------------------------------------------------------------------------------------------


@every_method
def test_methods_that_fail_on_mixed_images_are_refused_before(method: str) -> None:
    images, shares_of_labels = torch.rand(4, 3, 16, 16), torch.full((4, 3), 1 / 3)
    objective = Distiller(network(), network(), method=method, example=images, samples=9).train()
    objective.advance(0.1)
    try:
        objective(images, shares_of_labels, positions=torch.arange(4))
        fails = False
    except ValueError as error:
        fails = "class numbers" in str(error)
        assert fails
    found = examine(method, mixed=True)
    remembers = {"crd images"} if method == "crd" else set()  # it runs, and would remember two images as one
    assert set(found) == ({f"{method} labels"} if fails else remembers)
    assert all(one.severity == "refuse" for one in found.values())
    assert fails is (method in ("dkd", "nkd", "wsld", "teacher_free"))


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 7, 63, 64, 65, 95, 96, 97, 127, 128, 200])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_are_those_of_training(images: int, processes: int) -> None:
    epochs = Epochs(range(images), policy=ViewPolicy("none"), view_seed=0, batch_size=64)  # type: ignore[arg-type]
    parts = torch.split(epochs.order(0, 0), epochs.batch_size)[: epochs.steps]
    fewest = [min(len(part[rank::processes]) for rank in range(processes)) for part in parts]
    given = setting(images=images, processes=processes)
    assert given.batch == max(fewest[0], 1)
    assert given.last_batch == max(fewest[-1], 1)


@every_method
def test_small_batches(method: str) -> None:
    needed = METHODS[method].fewest_images
    assert not examine(method, batch_size=needed + needed % 2)
    found = examine(method, batch_size=max(needed - 1, 2))
    assert set(found) == ({f"{method} batch"} if needed > 2 else set())
    assert all(one.severity == "warn" for one in found.values())
    spread = examine(method, batch_size=2 * needed, processes=4)
    assert set(spread) == set(found)
    assert all("each process sees" in one.text for one in spread.values())


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("rkd_distance", losses.rkd_distance),
        ("rkd_angle", losses.rkd_angle),
        ("pkt", losses.pkt),
        ("rkd", lambda one, other: losses.rkd_distance(one, other) + losses.rkd_angle(one, other)),
    ],
)
def test_two_images_have_no_relation(method: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert float(loss(random(2, 5), random(2, 7, seed=1))) == pytest.approx(0.0, abs=1e-12)
    assert float(loss(random(3, 5), random(3, 7, seed=1))) > 1e-6
    assert examine(method, batch_size=2)[f"{method} batch"].severity == "refuse"
    assert examine(method, batch_size=3)[f"{method} batch"].severity == "warn"


def test_the_last_batch_of_a_short_epoch() -> None:
    found = examine("sp", images=4 * 24 + 13, batch_size=24)["sp batch"]
    assert found.text == (
        "sp wants 16 images at a time, and in the last step of every epoch there are 13: take another --batch-size."
    )
    assert not examine("sp", images=4 * 24 + 11, batch_size=24)  # less than half a batch is left out
    assert not examine("sp", images=4 * 24 + 16, batch_size=24)
    assert not examine("sp", images=40 * 24 + 13, batch_size=24)  # one step of many


# --- crd's negatives -------------------------------------------------------------------------------------------------


def test_the_negatives_that_are_drawn_are_named() -> None:
    found = examine("crd", images=1000)["crd negatives"]
    assert found.severity == "warn"
    drawn = Contrast(Shapes(((4,),), ((4,),), samples=1000)).negatives
    assert f"draws {drawn} negatives instead of its usual {NEGATIVES}" in found.text
    assert "crd negatives" in examine("crd", images=NEGATIVES)
    assert not examine("crd", images=NEGATIVES + 1)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak(work: Callable[[], Tensor]) -> int:
    """Return the most bytes that a step holds beyond what was held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work().backward()  # type: ignore[no-untyped-call]
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most


def angles(batch: int, width: int) -> Tensor:
    return losses.rkd_angle(random(batch, width).requires_grad_(), random(batch, width, seed=1))


def kernels(batch: int, channels: int, of_teacher: int) -> Tensor:
    return losses.nst(random(batch, channels, 4, 4).requires_grad_(), random(batch, of_teacher, 4, 4, seed=1)).mean()


def contrast(batch: int, samples: int) -> Tensor:
    projector = Contrast(Shapes(((8,),), ((8,),), samples)).train()
    return losses.crd(*projector(random(batch, 8).requires_grad_(), random(batch, 8), torch.arange(batch))).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "batch", "work", "changes"),
    [
        ("rkd_angle", 128, lambda: angles(128, 12), {"networks": pair(network(6), network(4))}),
        ("rkd_angle", 48, lambda: angles(48, 512), {}),
        ("rkd", 96, lambda: angles(96, 24), {"networks": pair(network(12), network(4))}),
        ("nst", 32, lambda: kernels(32, 96, 64), {"networks": pair(network(48), network(32))}),
        ("nst", 32, lambda: kernels(32, 16, 96), {"networks": pair(network(8), network(48))}),
        ("crd", 32, lambda: contrast(32, 3000), {"images": 3000}),
        ("crd", 16, lambda: contrast(16, 40_000), {"images": 40_000}),
    ],
)
def test_memory_is_estimated_as_it_is_measured(
    method: str, batch: int, work: Callable[[], Tensor], changes: dict[str, object]
) -> None:
    used, check = peak(work), f"{method} memory"

    def severity(free: float) -> str | None:
        found = examine(method, batch_size=batch, free_memory=free, **changes)
        return found[check].severity if check in found else None

    assert severity(4 * used * 1.25) is None
    assert severity(4 * used / 1.25) == "warn"
    assert severity(1.25 * used) == "warn"
    assert severity(used / 1.25) == "refuse"
    assert not examine(method, batch_size=batch, free_memory=None, **changes).keys() & {check}


def test_a_batch_is_named_that_fits() -> None:
    found = examine("rkd", batch_size=1024, free_memory=8e9)["rkd memory"]
    assert found.text == (
        "rkd takes about 15.0 GB for 1024 images, and 8.0 GB are free: take at most 441 at a time, or rkd_distance."
    )
    assert found.severity == "refuse"
    assert not examine("rkd", batch_size=441, free_memory=8e9)
    assert "rkd memory" in examine("rkd", batch_size=442, free_memory=8e9)
    assert not examine("rkd", batch_size=1024, processes=4, free_memory=8e9)
    assert examine("crd", images=10_000_000, free_memory=9e9)["crd memory"].text.endswith("are free: take kd instead.")
