"""What can be trained together and what is refused, the parts of it against PyTorch's, and the measured choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stacked_students import CONFIG, epochs, net, stack, state, students, terms
from understudy import losses, stacked
from understudy.data.batches import Batch
from understudy.distillation import Distiller, Term, methods
from understudy.distillation.schedules import Schedule
from understudy.errors import ConfigError, ModelError
from understudy.numerics import Numerics
from understudy.stacked import Choice, Student, choice, stackable
from understudy.stacked.objectives import Objectives
from understudy.stacked.optimizer import RowAdamW

# --- what is refused ---


def own_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).pow(2).mean(1)


FEATURES = Term("features", own_loss, takes=("student_embedding", "teacher_embedding"))
RISING = Term("mse", own_loss, weight=Schedule("warmup", start=0.0, end=1.0))
COOLING = Term("kd", losses.kd, temperature=Schedule("linear", start=8.0, end=1.0))


def test_only_steady_losses_on_logits_are_stacked() -> None:
    assert stackable(terms(0.5, 0.5, 4.0))
    assert stackable([methods.label_term(label_smoothing=0.1)])
    assert stackable([Term("mine", own_loss)])
    for other in (FEATURES, RISING, COOLING):
        assert not stackable([methods.label_term(), other])
        with pytest.raises(ConfigError, match=r"learn from labels and logits only.*stay the same"):
            stack([Student("one", net(1), (other,), CONFIG)])


def test_other_budgets_and_other_networks_are_refused() -> None:
    one = students()[0]
    with pytest.raises(ConfigError, match="may differ in learning rate and weight decay only"):
        stack([one, Student("two", net(1), one.terms, CONFIG.model_copy(update={"epochs": 4}))])
    with pytest.raises(ModelError, match="of one architecture"):
        stack([one, Student("two", net(1, "plain"), one.terms, CONFIG)])
    with pytest.raises(ModelError, match="float32"):
        stack([Student("two", net(1).double(), one.terms, CONFIG)])


# --- the parts ---


ON_LOGITS = [name for name, row in methods.METHODS.items() if stackable(row.terms())]


@pytest.mark.parametrize("name", ON_LOGITS)
def test_every_loss_on_logits_is_the_same_in_a_stack(name: str) -> None:
    torch.manual_seed(0)
    given = {"ce_weight": 0.5, "kd_weight": 0.25}
    own = [methods.terms(name, temperature=heat, **given) for heat in (2.0, 2.0, 5.0)]
    logits, teacher, labels = torch.randn(3, 8, 4), torch.randn(8, 4), torch.arange(8) % 4
    together, apart = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = Objectives(own, torch.device("cpu"))(together, labels, teacher)
    found.total.sum().backward()
    for number, mine in enumerate(own):
        alone = Distiller(None, nn.Identity(), terms=mine)(apart[number], labels, teacher_logits=teacher)
        alone.total.backward()
        torch.testing.assert_close(found.total[number], alone.total)
    torch.testing.assert_close(together.grad, apart.grad)


def test_equal_losses_are_one_call() -> None:
    own = [terms(1, 0, 1), terms(0.5, 0.5, 4), terms(0.2, 0.8, 4), terms(0, 1, 2)]
    objectives = Objectives(own, torch.device("cpu"))
    assert len(objectives) == 3  # cross-entropy, and distillation at two temperatures
    assert objectives.names == ["ce", "kd"]
    logits, teacher, labels = torch.randn(4, 8, 3), torch.randn(8, 3), torch.arange(8) % 3
    found = objectives(logits, labels, teacher)
    for number, mine in enumerate(own):
        expected = Distiller(None, nn.Identity(), terms=mine)(logits[number], labels, teacher_logits=teacher)
        torch.testing.assert_close(found.total[number], expected.total)
        for column, name in enumerate(objectives.names):
            torch.testing.assert_close(found.parts[number, column], expected.parts.get(name, torch.tensor(0.0)))


def test_rows_are_optimized_as_torch_would() -> None:
    torch.manual_seed(0)
    rates, decays = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([0.0, 0.5, 0.1])
    start, gradients = torch.randn(3, 5), torch.randn(20, 3, 5)
    weights = start.clone().requires_grad_()
    decayed = torch.tensor([True, True, False, True, False])
    ours = RowAdamW(weights, rates=rates, decays=decays, decayed=decayed)
    for number, gradient in enumerate(gradients):
        weights.grad = gradient.clone()
        ours.step(1 / (1 + number))
    for row in range(3):
        parts = [start[row, decayed].clone().requires_grad_(), start[row, ~decayed].clone().requires_grad_()]
        groups = [
            {"params": [parts[0]], "weight_decay": float(decays[row])},
            {"params": [parts[1]], "weight_decay": 0.0},
        ]
        theirs = torch.optim.AdamW(groups)
        for number, gradient in enumerate(gradients):
            for group in theirs.param_groups:
                group["lr"] = float(rates[row]) / (1 + number)
            parts[0].grad, parts[1].grad = gradient[row, decayed], gradient[row, ~decayed]
            theirs.step()
        torch.testing.assert_close(weights[row, decayed], parts[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[row, ~decayed], parts[1], rtol=1e-5, atol=1e-6)


# --- the choice ---


def batch() -> Batch:
    return next(iter(epochs().epoch(0, 0)))


def test_it_is_measured_and_changes_no_student() -> None:
    own = students()
    before = [state(student) for student in own]
    random = torch.get_rng_state()
    found = choice.measure(own, batch(), numerics=Numerics(), warmup=1, steps=2)
    assert found.students == 3
    assert 0 < found.stacked_seconds < 60
    assert 0 < found.single_seconds < 60
    assert torch.equal(random, torch.get_rng_state())
    for student, was in zip(own, before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in state(student).items())


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    measured: list[int] = []

    def measure(own: Sequence[Student], *rest: Any, **named: Any) -> Choice:
        measured.append(len(own))
        return Choice(len(own), 0.5, 1.0)

    monkeypatch.setattr(choice, "measure", measure)
    named: dict[str, Any] = {"numerics": Numerics(), "key": {"model": "net"}}
    first = stacked.choose(students(), batch(), **named)
    assert stacked.choose(students(), batch(), **named) == first
    assert measured == [3]
    stacked.choose(students()[:2], batch(), **named)
    stacked.choose(students(), batch(), **{**named, "key": {"model": "other"}})
    assert measured == [3, 2, 3]


def test_that_nothing_fitted_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    found = [Choice(1, 1e9, 1e9), Choice(3, 0.5, 1.0)]
    monkeypatch.setattr(choice, "measure", lambda *rest, **named: found.pop(0))
    named: dict[str, Any] = {"numerics": Numerics(), "key": {"model": "net"}}
    assert [stacked.choose(students(), batch(), **named).pays for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize(
    ("found", "ratio", "pays"),
    [(Choice(4, 1.0, 1.0), 4.0, True), (Choice(4, 4.0, 1.0), 1.0, False), (Choice(1, 1.0, 5.0), 5.0, False)],
)
def test_it_pays_where_it_is_clearly_faster(found: Choice, ratio: float, pays: bool) -> None:
    assert (found.ratio, found.pays) == (ratio, pays)


class Branching(nn.Module):
    """What `vmap` cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(images)
        return logits * 2 if float(logits.detach().sum()) > 0 else logits


def test_a_network_that_cannot_be_stacked_is_trained_alone() -> None:
    own = [Student(str(number), Branching(), terms(1, 0, 1), CONFIG) for number in range(2)]
    found = choice.measure(own, batch(), numerics=Numerics())
    assert not found.pays
    assert "cannot be trained together" in str(found)


def test_half_as_many_are_tried_where_the_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, step = [], choice.stacked_step

    def greedy(own: Sequence[Student], *rest: Any) -> Any:
        tried.append(len(own))
        if len(own) > 2:
            raise torch.OutOfMemoryError
        return step(own, *rest)

    monkeypatch.setattr(choice, "stacked_step", greedy)
    own = [Student(str(number), net(1), terms(1, 0, 1), CONFIG) for number in range(5)]
    found = choice.measure(own, batch(), numerics=Numerics(), warmup=0, steps=1)
    assert tried == [5, 2]
    assert found.students == 2


def test_the_first_guess_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(free: float) -> int:
        monkeypatch.setattr("understudy.evaluate.profile.free_memory", lambda device: free)
        return choice.affordable(students("plain")[0], batch())

    assert fit(0) == 1
    assert fit(2e9) > 1.9 * fit(1e9) > 100
    kept = 16 * 4 * (64 + 4 * 36)  # at least the images and what the ReLU returns, four bytes a value
    assert fit(1e9) < 1e9 / kept
