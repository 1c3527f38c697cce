"""Several teachers with one voice: the mean of probabilities against a slow oracle, and as the distiller's teacher."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from understudy.distillation import Distiller
from understudy.distillation.ensemble import Ensemble, mean_probabilities, shares
from understudy.errors import ConfigError


class Says(nn.Module):
    """A network that gives the same logits whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def oracle(logits: list[list[list[float]]], weights: list[float]) -> list[list[float]]:
    """The mean of probabilities, class by class, in Python's own numbers; as logarithms."""
    found = []
    for row in range(len(logits[0])):
        means = [0.0] * len(logits[0][0])
        for network, weight in zip(logits, weights, strict=True):
            total = sum(math.exp(value) for value in network[row])
            for label, value in enumerate(network[row]):
                means[label] += weight / sum(weights) * math.exp(value) / total
        found.append([math.log(mean) for mean in means])
    return found


def drawn(networks: int, *, batch: int = 6, classes: int = 5, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [scale * torch.randn(batch, classes, generator=generator) for _ in range(networks)]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.2, 0.5]])
def test_an_ensemble_of_two_is_the_slow_mean(weights: list[float]) -> None:
    logits = drawn(2)
    found = Ensemble([Says(one) for one in logits], weights)(torch.zeros(6, 1, 2, 2))
    expected = torch.tensor(oracle([one.tolist() for one in logits], weights))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32


def test_equal_weights_are_the_default() -> None:
    logits = drawn(3)
    found = Ensemble([Says(one) for one in logits])(torch.zeros(6, 1, 2, 2))
    expected = torch.tensor(oracle([one.tolist() for one in logits], [1.0, 1.0, 1.0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(scale=st.floats(0.1, 200.0), weight=st.floats(0.01, 100.0))
def test_probabilities_add_up_and_nothing_is_infinite(scale: float, weight: float) -> None:
    """Also where a teacher is so sure that its other probabilities are too small for a float32."""
    found = mean_probabilities(drawn(2, scale=scale), shares([weight, 1.0]))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6), rtol=1e-5, atol=1e-5)


def test_what_both_hold_almost_impossible_keeps_its_order() -> None:
    logits = [torch.tensor([[0.0, -150.0, -160.0]]), torch.tensor([[0.0, -151.0, -165.0]])]
    found = mean_probabilities(logits, (0.5, 0.5))
    expected = [math.log(0.5) + a + math.log1p(math.exp(b - a)) for a, b in ((-150.0, -151.0), (-160.0, -165.0))]
    torch.testing.assert_close(found[0, 1:], torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_a_constant_added_to_one_teachers_logits_changes_nothing() -> None:
    one, other = drawn(2)
    weights = shares([2.0, 1.0])
    torch.testing.assert_close(mean_probabilities([one + 5, other], weights), mean_probabilities([one, other], weights))


def test_one_teacher_says_what_it_says_alone() -> None:
    (logits,) = drawn(1)
    found = mean_probabilities([logits], (1.0,))
    torch.testing.assert_close(found.softmax(1), logits.softmax(1))


def test_half_precision_answers_are_averaged_in_full_precision() -> None:
    logits = [one.half() for one in drawn(2)]
    found = mean_probabilities(logits, (0.5, 0.5))
    expected = mean_probabilities([one.float() for one in logits], (0.5, 0.5))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_teaches_as_any_teacher_does() -> None:
    """The loss is that of ready answers; no gradient reaches the teachers, and none of them is in the parameters."""
    logits = drawn(2, classes=4)
    teacher = Ensemble([Says(one) for one in logits], [2, 1])
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    images, labels = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    distiller = Distiller(teacher, student, temperature=2, alpha=0.5)
    along = distiller(images, labels)
    ready = Distiller(None, student, terms=distiller.terms)(images, labels, teacher_logits=teacher(images).detach())
    torch.testing.assert_close(along.total, ready.total)
    along.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert len(list(distiller.parameters())) == len(list(student.parameters()))


@pytest.mark.parametrize(
    ("networks", "weights", "words"),
    [(0, None, "at least one"), (2, [1.0], "2 teachers have 1"), (2, [1.0, 0.0], "above 0"), (1, [math.nan], "nan")],
)
def test_what_is_no_ensemble_is_refused(networks: int, weights: list[float] | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Ensemble([Says(one) for one in drawn(networks)], weights)
