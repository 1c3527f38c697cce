"""The distiller in a hand-written loop, and the faults that it must be free of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from understudy import Distiller
from understudy.distillation import METHODS, Teacher, Term
from understudy.errors import ConfigError, ModelError


def _net(seed: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, classes)
    )


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(16, 1, 8, 8, generator=generator), torch.arange(16) % 3


def _state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_three_lines_train_the_student_and_leave_the_teacher_alone(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = batch
    teacher, student = _net(0), _net(1)
    before_teacher, before_student = _state(teacher), _state(student)
    distiller = Distiller(teacher, student, method="kd", temperature=4, alpha=0.5)
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    for _ in range(3):
        losses = distiller(images, labels)
        losses.total.backward()
        optimizer.step()
    assert _same(before_teacher, teacher.state_dict())
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.training
    assert not _same(before_student, student.state_dict())


def test_total_is_the_weighted_sum_of_the_parts(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    losses = Distiller(_net(0), _net(1), temperature=2, ce_weight=0.3, kd_weight=2.0)(*batch)
    assert set(losses.parts) == {"ce", "kd"}
    assert float(losses.total.detach()) == pytest.approx(
        0.3 * float(losses.parts["ce"]) + 2 * float(losses.parts["kd"])
    )
    assert losses.logits.shape == (16, 3)
    assert not losses.logits.requires_grad


def test_the_student_runs_once_a_step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    student = _net(1)
    distiller = Distiller(_net(0), student).train()
    distiller(*batch)
    assert int(student[1].num_batches_tracked) == 1


def test_ready_answers_replace_the_teacher(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = batch
    teacher, student = _net(0), _net(1)
    distiller = Distiller(teacher, student).eval()
    online = distiller(images, labels)
    ready = distiller(images, labels, teacher_logits=Teacher(teacher)(images))
    assert torch.equal(ready.total, online.total)
    alone = Distiller(None, student, terms=distiller.terms).eval()
    assert torch.equal(alone(images, labels, teacher_logits=Teacher(teacher)(images)).total, online.total)


def test_without_a_teacher_it_is_plain_training(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = batch
    student = _net(1).eval()
    losses = Distiller(None, student)(images, labels)
    assert float(losses.total.detach()) == pytest.approx(
        float(nn.functional.cross_entropy(student(images), labels).detach())
    )


def test_weight_zero_equals_plain_training_and_never_runs_the_teacher(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    class Unused(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the teacher ran")

    student = _net(1).eval()
    zero = Distiller(Unused(), student, ce_weight=1, kd_weight=0)(*batch)
    assert torch.equal(zero.total, Distiller(None, student)(*batch).total)
    tiny = Distiller(_net(0), student, ce_weight=1, kd_weight=1e-9)(*batch)
    torch.testing.assert_close(tiny.total, zero.total)


def test_the_teacher_is_neither_saved_nor_trained() -> None:
    distiller = Distiller(_net(0), _net(1))
    assert all(name.startswith("student.") for name in distiller.state_dict())
    assert sum(p.numel() for p in distiller.parameters()) == sum(p.numel() for p in _net(1).parameters())


def test_the_teacher_moves_along() -> None:
    distiller = Distiller(_net(0), _net(1)).to(torch.float64)
    assert distiller.teacher is not None
    assert next(distiller.teacher.parameters()).dtype == torch.float64


def test_the_teacher_stays_in_evaluation_mode_whoever_calls_train(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher = _net(0)
    distiller = Distiller(teacher, _net(1)).train()
    before = _state(teacher)
    teacher.train()
    distiller(*batch)
    assert _same(before, teacher.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_row_that_says_where_it_comes_from(method: str) -> None:
    row = METHODS[method]
    assert row.name == method
    assert row.summary
    assert row.equation
    assert any(character.isdigit() for character in row.citation)


def test_effective_weight_counts_the_square_of_the_temperature() -> None:
    (term,) = METHODS["kd"].terms(weight=0.5, temperature=4.0)
    assert term.effective_weight() == 8.0


def test_alpha_is_sugar() -> None:
    terms = {term.name: term.weight for term in Distiller(_net(0), _net(1), alpha=0.25).terms}
    assert terms == {"ce": 0.75, "kd": 0.25}


def test_own_terms() -> None:
    images, student = torch.rand(4, 1, 8, 8), _net(1).eval()
    term = Term("mse", lambda s, t: ((s - t) ** 2).mean(1), weight=3.0)
    losses = Distiller(copy.deepcopy(student), student, terms=[term])(images)
    assert torch.equal(losses.total, torch.zeros(()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kdd"}, "Unknown method 'kdd'. Did you mean"),
        ({"method": "kd+attention"}, "give the distiller images as `example`"),
        ({"alpha": 2.0}, "between 0 and 1"),
        ({"alpha": 0.5, "kd_weight": 1.0}, "not both"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, "nothing to learn from"),
        ({"ce_weight": -1.0}, "0 or more"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Distiller(_net(0), _net(1), **options)  # type: ignore[arg-type]


def test_says_when_classes_differ_or_labels_are_missing(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="same classes in the same order"):
        Distiller(_net(0, classes=4), _net(1))(*batch)
    with pytest.raises(ConfigError, match="'ce' takes labels; none given"):
        Distiller(_net(0), _net(1))(batch[0])
