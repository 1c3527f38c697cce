"""Students trained together are what they are one by one: weights, histories, resumption, failures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stacked_students import CONFIG, STEPS, alone, fitted, net, same, stack, state, students, terms
from understudy import checkpoint
from understudy.errors import Interrupted, TrainingError
from understudy.models.classifier import Classifier
from understudy.numerics import Numerics
from understudy.record import InputSpec
from understudy.stacked import Student
from understudy.stacked.networks import Networks

# --- the same as one by one ---


@pytest.mark.parametrize("kind", ["plain", "batch norm", "batch statistics only", "dropout"])
def test_together_they_become_what_they_become_alone(kind: str) -> None:
    together, apart = students(kind), students(kind)
    found = [fitted(one) for one in stack(together).run()]
    expected = [alone(student) for student in apart]
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(state(together[number]), state(apart[number]), rtol=1e-4, atol=1e-4)
        same(one.epochs, other.epochs)
        assert one.best_epoch == other.best_epoch
        assert list(one.epochs[0].parts) == list(other.epochs[0].parts)
    assert len({one.epochs[-1].train_loss for one in found}) == 3
    assert len({fit.epochs[0].lr for fit in found}) == 3


def test_students_may_start_from_different_weights() -> None:
    together, apart = students(seeds=(1, 2, 3)), students(seeds=(1, 2, 3))
    stack(together).run()
    for one, other in zip(together, apart, strict=True):
        alone(other)
        torch.testing.assert_close(state(one), state(other), rtol=1e-4, atol=1e-4)


def test_gradients_are_clipped_student_by_student() -> None:
    config = CONFIG.model_copy(update={"clip_norm": 0.05})
    together, apart, free = students("plain", config), students("plain", config), students("plain")
    stack(together).run()
    stack(free).run()
    for one, other, unclipped in zip(together, apart, free, strict=True):
        alone(other)
        torch.testing.assert_close(state(one), state(other), rtol=1e-4, atol=1e-4)
        assert (state(one)["0.weight"] - state(unclipped)["0.weight"]).abs().max() > 1e-3


def classifier(seed: int) -> Classifier:
    spec = InputSpec(channels=1, sizes=(8,), fit="crop", mean=(0.4,), std=(0.2,))
    return Classifier(net(seed), architecture="net", classes=("a", "b", "c"), spec=spec, network_channels=1)


def test_preprocessing_is_done_once_for_all() -> None:
    together = [
        Student("one", classifier(1), terms(1, 0, 1), CONFIG),
        Student("two", classifier(2), terms(0, 1, 3), CONFIG),
    ]
    apart = [
        Student("one", classifier(1), terms(1, 0, 1), CONFIG),
        Student("two", classifier(2), terms(0, 1, 3), CONFIG),
    ]
    calls = []
    before = together[0].network.preprocess
    assert isinstance(before, nn.Module)
    before.register_forward_hook(lambda *given: calls.append(1))
    stack(together).run()
    assert len(calls) == STEPS + 3 * 2  # and two batches of validation images an epoch
    for one, other in zip(together, apart, strict=True):
        alone(other)
        torch.testing.assert_close(state(one), state(other), rtol=1e-4, atol=1e-4)


def test_frozen_weights_stay() -> None:
    own = students("plain")
    for student in own:
        student.network[0].weight.requires_grad_(False)  # type: ignore[index]
    before = [state(student) for student in own]
    stack(own).run()
    for student, was in zip(own, before, strict=True):
        assert torch.equal(state(student)["0.weight"], was["0.weight"])
        assert not torch.equal(state(student)["0.bias"], was["0.bias"])


def test_half_precision_trains() -> None:
    own = students("batch norm", CONFIG.model_copy(update={"epochs": 8}))
    fits = [fitted(one) for one in stack(own, numerics=Numerics("bf16")).run()]
    assert all(fit.epochs[-1].val_accuracy > 0.8 for fit in fits)
    assert all(value.dtype == torch.float32 for student in own for value in student.network.parameters())


def test_the_time_of_all_is_shared_out() -> None:
    training = stack(students())
    fits = [fitted(one) for one in training.run()]
    assert sum(fit.seconds for fit in fits) == pytest.approx(training.state.seconds)
    assert fits[0].seconds == pytest.approx(sum(row.seconds for row in fits[0].epochs))


def test_validation_takes_fewer_at_once_where_the_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int | None, int]] = []
    whole = Networks.__call__

    def greedy(networks: Networks, images: torch.Tensor, *, chunk: int | None = None) -> torch.Tensor:
        if chunk is not None:
            tried.append((chunk, len(images)))
            if chunk > 1 or len(images) > 32:
                raise torch.OutOfMemoryError
        return whole(networks, images, chunk=chunk)

    own = students("plain", CONFIG.model_copy(update={"epochs": 1}))
    expected = stack(students("plain", CONFIG.model_copy(update={"epochs": 1}))).run()
    monkeypatch.setattr(Networks, "__call__", greedy)
    found = stack(own).run()
    assert tried == [(3, 64), (2, 64), (1, 64), (1, 32), (1, 32), (1, 32), (1, 4)]
    for one, other in zip(found, expected, strict=True):
        same(fitted(one).epochs, fitted(other).epochs)


# --- resumption ---


@pytest.mark.parametrize("stop_at", [1, 6, 7, STEPS])
def test_a_killed_stack_goes_on_as_if_nothing_had_happened(tmp_path: Path, stop_at: int) -> None:
    whole, resumed = students("dropout"), students("dropout")
    expected = stack(whole).run()
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        stack(students("dropout"), path=path, stop_at=stop_at).run()
    torch.manual_seed(12345)  # whatever the new process did before
    found = stack(resumed, path=path).run()
    for one, other, mine, theirs in zip(found, expected, resumed, whole, strict=True):
        assert all(torch.equal(value, state(theirs)[name]) for name, value in state(mine).items())
        rows = [row.model_dump(exclude={"seconds"}) for row in fitted(one).epochs]
        assert rows == [row.model_dump(exclude={"seconds"}) for row in fitted(other).epochs]
        assert fitted(one).best_epoch == fitted(other).best_epoch


def test_a_stack_that_dies_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole, dying, resumed = students("dropout"), students("dropout"), students("dropout")
    stack(whole).run()
    path = tmp_path / "checkpoint.safetensors"
    training = stack(dying, path=path, every=0.0)
    step, taken = training.stepper.step, iter(range(100))

    def die(*given: Any) -> Any:
        if next(taken) == 9:
            raise MemoryError
        return step(*given)

    training.stepper.step = die  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        training.run()
    going_on = stack(resumed, path=path)
    going_on.run()
    assert going_on.stepper.optimizer.steps == STEPS
    for mine, theirs in zip(resumed, whole, strict=True):
        assert all(torch.equal(value, state(theirs)[name]) for name, value in state(mine).items())


def test_the_checkpoint_of_other_students_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        stack(students(), path=path, stop_at=4).run()
    whole, fewer = students()[1:], students()[1:]
    stack(whole).run()
    stack(fewer, path=path).run()
    for one, other in zip(fewer, whole, strict=True):
        assert all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


def test_checkpoints_are_written_as_time_passes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    stack(students(), path=path, every=0.0).run()
    found = checkpoint.load(path)
    assert found is not None
    assert found[1]["epoch"] == CONFIG.epochs


# --- failures ---


def exploding() -> list[Student]:
    own = students()
    return [own[0], Student("hot", own[1].network, own[1].terms, own[1].config.model_copy(update={"lr": 1e30})), own[2]]


def test_a_student_that_diverges_fails_alone() -> None:
    own, apart = exploding(), exploding()
    results = stack(own).run()
    failure = results[1]
    assert isinstance(failure, TrainingError)
    with pytest.raises(TrainingError) as told:
        alone(apart[1], task="hot")
    assert str(failure) == str(told.value)
    assert "The loss of hot is not a number" in str(failure)
    for number in (0, 2):
        same(fitted(results[number]).epochs, alone(apart[number]).epochs)
        torch.testing.assert_close(state(own[number]), state(apart[number]), rtol=1e-4, atol=1e-4)


def test_a_failure_is_remembered_by_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    expected = stack(exploding()).run()
    with pytest.raises(Interrupted):
        stack(exploding(), path=path, stop_at=8).run()
    found = stack(exploding(), path=path).run()
    assert str(found[1]) == str(expected[1])
    same(fitted(found[2]).epochs, fitted(expected[2]).epochs)


def test_when_all_have_failed_nothing_goes_on() -> None:
    hot = exploding()[1]
    training = stack([hot, Student("hotter", net(1), hot.terms, hot.config)])
    assert all(isinstance(one, TrainingError) for one in training.run())
    assert training.state.epoch == 1


def test_only_answers_that_are_no_numbers_are_a_failure_too() -> None:
    own = students()
    training = stack(own)
    weights = training.stepper.networks.weights
    close = training._close_epoch

    def spoil() -> None:
        with torch.no_grad():
            weights[2] = math.nan  # after the last loss that was looked at
        close()

    training._close_epoch = spoil  # type: ignore[method-assign]
    results = training.run()
    assert "The answers of cell-2 are not numbers after epoch 1" in str(results[2])
    assert len(fitted(results[0]).epochs) == CONFIG.epochs
