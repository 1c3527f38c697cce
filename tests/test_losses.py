"""Losses against slow loops in float64 written from the papers, and the properties that must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from understudy import losses

BATCH, CLASSES = 7, 5


@dataclass(frozen=True)
class Case:
    """One row of the table that every loss goes through."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    slow: Callable[[list[float], list[float]], float]
    """From the student's and the teacher's logits of one example."""
    zero_at_equality: bool


def _softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def _slow_kd(temperature: float) -> Callable[[list[float], list[float]], float]:
    def slow(student: list[float], teacher: list[float]) -> float:
        p, q = _softmax(teacher, temperature), _softmax(student, temperature)
        return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    return slow


CASES = [
    Case(f"kd T={t:g}", lambda s, t_, t=t: losses.kd(s, t_, temperature=t), _slow_kd(t), zero_at_equality=True)
    for t in (1.0, 4.0, 20.0)
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _logits(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, BATCH, CLASSES, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


@every_case
def test_equals_the_slow_loop(case: Case) -> None:
    student, teacher = _logits(0)
    slow = [case.slow(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    fast = case.loss(student, teacher)
    assert fast.shape == (BATCH,)
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float32), rtol=1e-5, atol=1e-6)


@every_case
def test_is_zero_at_equality(case: Case) -> None:
    student, _ = _logits(1)
    assert case.zero_at_equality
    torch.testing.assert_close(case.loss(student, student.clone()), torch.zeros(BATCH))


@every_case
def test_refuses_other_shapes(case: Case) -> None:
    student, teacher = _logits(0)
    with pytest.raises(ValueError, match="logits must both be"):
        case.loss(student, teacher[:, :-1])
    with pytest.raises(ValueError, match="logits must both be"):
        case.loss(student[0], teacher[0])


@every_case
def test_no_gradient_reaches_the_teacher(case: Case) -> None:
    student, teacher = (logits.requires_grad_() for logits in _logits(2))
    case.loss(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0.01


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_where_softmax_underflows(case: Case, dtype: torch.dtype) -> None:
    student = torch.tensor([[90.0, -90.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-90.0, 90.0, 0.0]], dtype=dtype)
    value = case.loss(student, teacher)
    value.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()
    expected = case.slow([90.0, -90.0, 0.0], [-90.0, 90.0, 0.0])
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)


@every_case
@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50))
def test_a_constant_added_to_logits_changes_nothing(case: Case, seed: int, shift: float) -> None:
    student, teacher = _logits(seed)
    shifted = case.loss(student + shift, teacher - shift)
    torch.testing.assert_close(shifted, case.loss(student, teacher), rtol=1e-3, atol=1e-4)


@every_case
@given(seed=st.integers(0, 10_000))
def test_permuting_the_batch_permutes_the_values(case: Case, seed: int) -> None:
    student, teacher = _logits(seed)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(case.loss(student[order], teacher[order]), case.loss(student, teacher)[order])


def test_kd_gradient_is_that_of_the_formula() -> None:
    temperature = 3.0
    student, teacher = _logits(3)
    student.requires_grad_()
    losses.kd(student, teacher, temperature=temperature).sum().backward()
    q, p = (logits / temperature for logits in (student.detach(), teacher))
    expected = temperature * (q.softmax(1) - p.softmax(1))  # T^2 (q - p) / T
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-6)


def test_kd_becomes_squared_error_as_the_temperature_grows() -> None:
    student, teacher = _logits(4)
    centred = [logits - logits.mean(1, keepdim=True) for logits in (student, teacher)]
    limit = ((centred[0] - centred[1]) ** 2).sum(1) / (2 * CLASSES)
    hot = losses.kd(student, teacher, temperature=300.0)
    torch.testing.assert_close(hot, limit.float(), rtol=2e-2, atol=1e-3)


def test_kd_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.kd(*_logits(0), temperature=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_the_slow_loop(smoothing: float) -> None:
    logits, _ = _logits(5)
    labels = torch.arange(BATCH) % CLASSES
    slow = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_q = [math.log(q) for q in _softmax(row, 1.0)]
        target = [smoothing / CLASSES + (1 - smoothing) * (k == label) for k in range(CLASSES)]
        slow.append(-sum(y * value for y, value in zip(target, log_q, strict=True)))
    fast = losses.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_cross_entropy_refuses_labels_of_another_length() -> None:
    with pytest.raises(ValueError, match="do not fit logits"):
        losses.cross_entropy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_shares_is_the_mean_of_both_labels_by_share(smoothing: float) -> None:
    logits, _ = _logits(6)
    first, second = torch.arange(BATCH) % CLASSES, (torch.arange(BATCH) + 2) % CLASSES
    share = torch.linspace(0, 1, BATCH)
    shares = torch.zeros(BATCH, CLASSES)
    shares[torch.arange(BATCH), first] += share
    shares[torch.arange(BATCH), second] += 1 - share
    one, other = (losses.cross_entropy(logits, labels, label_smoothing=smoothing) for labels in (first, second))
    mixed = losses.cross_entropy(logits, shares, label_smoothing=smoothing)
    torch.testing.assert_close(mixed, share * one + (1 - share) * other)


def test_cross_entropy_refuses_shares_of_another_number_of_classes() -> None:
    logits, _ = _logits(7)
    with pytest.raises(ValueError, match="do not fit logits"):
        losses.cross_entropy(logits, torch.ones(BATCH, CLASSES + 1))
