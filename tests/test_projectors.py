"""Every projector: shapes, who learns and who must not, and runs that go on as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from projector_shapes import BATCH, CLASSES, EMBEDDINGS, MAPS, SAMPLES, STAGES, drawn, small_contrast, two_heads
from understudy import losses
from understudy.distillation.heads import ClassMaps, SoftmaxRegression
from understudy.distillation.paraphrase import Paraphrase
from understudy.distillation.projectors import (
    ABConnector,
    Bottleneck,
    Connector,
    Meet,
    Projector,
    Regressor,
    Shapes,
    Variational,
    meet,
)
from understudy.distillation.stages import Flow, Review
from understudy.errors import ModelError


@dataclass(frozen=True)
class Case:
    """One projector as its term would build and call it."""

    name: str
    build: Callable[[], Projector]
    shapes: Shapes
    outputs: list[tuple[tuple[int, ...], ...]]
    """Shapes of the arguments of every call of the loss."""
    loss: Callable[..., Tensor]
    """A loss that it is for."""
    stages: bool = False
    """Whether it takes lists of maps."""
    extra: tuple[Tensor, ...] = ()
    """What `forward` takes behind the features."""


HEADS = two_heads()
MET = (BATCH, 6, 4, 4)
CASES = [
    Case("Meet", lambda: Meet(MAPS), MAPS, [((BATCH, 3, 4, 4), MET)], losses.attention),
    Case("Regressor maps", lambda: Regressor(MAPS), MAPS, [(MET, MET)], losses.hint),
    Case("Regressor embeddings", lambda: Regressor(EMBEDDINGS), EMBEDDINGS, [((BATCH, 6), (BATCH, 6))], losses.simkd),
    Case("Bottleneck", lambda: Bottleneck(MAPS), MAPS, [(MET, MET)], losses.simkd),
    Case("ABConnector", lambda: ABConnector(MAPS), MAPS, [(MET, MET)], losses.ab),
    Case("Connector", lambda: Connector(MAPS), MAPS, [(MET, MET, (6,))], losses.ofd),
    Case("Variational maps", lambda: Variational(MAPS), MAPS, [(MET, (6,), MET)], losses.vid),
    Case(
        "Variational embeddings",
        lambda: Variational(EMBEDDINGS),
        EMBEDDINGS,
        [((BATCH, 6), (6,), (BATCH, 6))],
        losses.vid,
    ),
    Case("Paraphrase", lambda: Paraphrase(MAPS), MAPS, [((BATCH, 3, 4, 4), (BATCH, 3, 4, 4))], losses.ft),
    Case(
        "Flow",
        lambda: Flow(STAGES),
        STAGES,
        [
            ((BATCH, 6, 4, 4), (BATCH, 4, 4, 4), (BATCH, 6, 4, 4), (BATCH, 4, 4, 4)),
            ((BATCH, 4, 2, 2), (BATCH, 10, 2, 2), (BATCH, 4, 2, 2), (BATCH, 10, 2, 2)),
        ],
        losses.fsp,
        stages=True,
    ),
    Case(
        "Review",
        lambda: Review(STAGES),
        STAGES,
        [((BATCH, 10, 4, 4),) * 2, ((BATCH, 4, 8, 8),) * 2, ((BATCH, 6, 8, 8),) * 2],
        losses.review,
        stages=True,
    ),
    Case(
        "ClassMaps",
        lambda: ClassMaps(MAPS._replace(student_head=HEADS[0], teacher_head=HEADS[1])),
        MAPS,
        [((BATCH, CLASSES, 4, 4),) * 2],
        losses.cat_kd,
    ),
    Case(
        "SoftmaxRegression",
        lambda: SoftmaxRegression(EMBEDDINGS._replace(teacher_head=HEADS[1])),
        EMBEDDINGS,
        [((BATCH, 6), (BATCH, 6), (BATCH, CLASSES), (BATCH, CLASSES))],
        losses.srrl,
        extra=(torch.arange(12.0).view(BATCH, CLASSES),),
    ),
    Case(
        "Contrast",
        small_contrast,
        EMBEDDINGS,
        [((BATCH, SAMPLES), (BATCH, SAMPLES), ())],
        losses.crd,
        extra=(torch.tensor([3, 0, 10, 7]),),
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_parameters = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ("Meet", "ClassMaps")], ids=lambda case: case.name
)


def _build(case: Case, seed: int = 0) -> Projector:
    torch.manual_seed(seed)
    return case.build().train()


def _call(
    case: Case, projector: Callable[..., object], student: list[Tensor], teacher: list[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Return the arguments of every call of the loss, numbers as tensors."""
    calls = projector(student, teacher) if case.stages else [projector(student[0], teacher[0], *case.extra)]
    return [
        tuple(torch.as_tensor(one, dtype=None if isinstance(one, Tensor) else torch.float32) for one in call)
        for call in calls
    ]


def _step(case: Case, projector: Projector, seed: int) -> None:
    """Train the projector for one step on something that moves every output."""
    calls = _call(case, projector, *drawn(case.shapes, seed))
    loss = sum(argument.square().mean() for call in calls for argument in call)
    if projector.own_loss is not None:
        loss = loss + projector.own_loss
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.01)
    loss.backward()
    optimizer.step()


def _same(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> bool:
    pairs = [pair for calls in zip(one, other, strict=True) for pair in zip(*calls, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@every_case
def test_returns_what_the_loss_takes(case: Case) -> None:
    calls = _call(case, _build(case), *drawn(case.shapes))
    assert [tuple(tuple(argument.shape) for argument in call) for call in calls] == case.outputs


@every_case
def test_the_loss_takes_it_and_moves_the_student(case: Case) -> None:
    student, teacher = drawn(case.shapes, gradient=True)
    projector = _build(case)
    calls = projector(student, teacher) if case.stages else [projector(student[0], teacher[0], *case.extra)]
    torch.stack([case.loss(*call).mean() for call in calls]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in student)


@every_case
def test_a_seed_makes_the_projector(case: Case) -> None:
    inputs = drawn(case.shapes)
    one = _call(case, _build(case), *inputs)
    assert _same(_call(case, _build(case), *inputs), one)
    learns = bool(list(_build(case).parameters()))
    assert _same(_call(case, _build(case, seed=1), *inputs), one) is not learns


@with_parameters
def test_the_gradient_reaches_every_parameter(case: Case) -> None:
    projector = _build(case)
    calls = _call(case, projector, *drawn(case.shapes))
    loss = sum(argument.float().pow(3).sum() for call in calls for argument in call)
    if projector.own_loss is not None:
        loss = loss + projector.own_loss
    loss.backward()  # type: ignore[union-attr]
    without = [name for name, values in projector.named_parameters() if values.grad is None]
    assert not without
    assert all(values.grad.isfinite().all() for values in projector.parameters())  # type: ignore[union-attr]


@with_parameters
def test_a_saved_projector_goes_on_as_if_nothing_had_happened(case: Case) -> None:
    projector = _build(case)
    for seed in range(3):
        _step(case, projector, seed)
    fresh = _build(case, seed=1)
    missing = fresh.load_state_dict(projector.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    for seed in range(3, 5):
        one = _call(case, projector, *drawn(case.shapes, seed))
        other = _call(case, fresh, *drawn(case.shapes, seed))
        assert _same(one, other)


@every_case
def test_evaluation_changes_nothing(case: Case) -> None:
    projector = _build(case)
    _call(case, projector, *drawn(case.shapes, seed=1))
    before = copy.deepcopy(projector.eval().state_dict())
    one = _call(case, projector, *drawn(case.shapes))
    assert _same(one, _call(case, projector, *drawn(case.shapes)))
    assert all(torch.equal(values, before[name]) for name, values in projector.state_dict().items())
    assert projector.own_loss is None


@every_case
def test_bfloat16_autocast_is_close_to_float32(case: Case) -> None:
    inputs = drawn(case.shapes)
    exact = _call(case, _build(case), *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = _call(case, _build(case), *inputs)
    for a, b in zip(exact, rough, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(other.float(), one.float(), atol=0.1, rtol=0.1)


@every_case
def test_traces(case: Case) -> None:
    eager, traced = _build(case), _build(case)
    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    for seed in range(2):
        one = _call(case, eager, *drawn(case.shapes, seed))
        other = _call(case, compiled, *drawn(case.shapes, seed))
        assert _same(one, other)
    if eager.own_loss is not None:
        assert traced.own_loss is not None
        assert torch.equal(eager.own_loss, traced.own_loss)


@pytest.mark.parametrize("build", [Regressor, Bottleneck, ABConnector, Connector, Variational, Review, Flow])
def test_the_teacher_arrives_unchanged_where_it_is_the_smaller(build: Callable[[Shapes], Projector]) -> None:
    pair = Shapes(student=((3, 8, 8),), teacher=((6, 4, 4),))
    shapes = Shapes(student=pair.student * 2, teacher=pair.teacher * 2)
    student, teacher = [torch.randn(BATCH, 3, 8, 8)] * 2, [torch.randn(BATCH, 6, 4, 4), torch.randn(BATCH, 6, 4, 4)]
    if build in (Review, Flow):
        out = [argument for call in build(shapes)(student, teacher) for argument in call]
        assert all(any(argument is values for argument in out) for values in teacher)
    else:
        assert any(argument is teacher[0] for argument in build(pair)(student[0], teacher[0]))


def test_maps_meet_at_the_smaller_height_and_width() -> None:
    student, teacher = torch.randn(2, 1, 4, 6), torch.randn(2, 3, 2, 12)
    met_student, met_teacher = meet(student, teacher)
    assert met_student.shape == (2, 1, 2, 6)
    assert met_teacher.shape == (2, 3, 2, 6)
    torch.testing.assert_close(met_student[0, 0, 1, 2], student[0, 0, 2:, 2].mean())
    torch.testing.assert_close(met_teacher[1, 2, 0, 5], teacher[1, 2, 0, 10:].mean())
    assert meet(student, student) == (student, student)


@pytest.mark.parametrize("build", [Bottleneck, ABConnector, Connector, Paraphrase, Flow, Review, ClassMaps])
def test_maps_only(build: Callable[[Shapes], Projector]) -> None:
    with pytest.raises(ModelError, match=r"the layers give \[5\] \(student\) and \[6\] \(teacher\)"):
        build(EMBEDDINGS)


@pytest.mark.parametrize("build", [Meet, Regressor, Variational])
def test_two_of_a_kind_only(build: Callable[[Shapes], Projector]) -> None:
    with pytest.raises(ModelError, match=r"two maps .* or two embeddings"):
        build(Shapes(student=((5,),), teacher=((6, 4, 4),)))
