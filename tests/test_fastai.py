"""fastai's Learner with a teacher: what is minimised, what is left alone, and what is left behind."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastai_learners import (
    BATCH,
    FORWARDS,
    IMAGES,
    WARNINGS,
    Net,
    TeacherNet,
    at,
    hooks_of,
    new_callback,
    new_data,
    new_learner,
    projectors_of,
    same_weights,
    state_of,
)
from understudy import Distiller
from understudy.errors import ConfigError
from understudy.losses import kd

pytest.importorskip("fastai", reason="fastai is not installed: pip install 'understudy[fastai]'")
# fastai itself is imported by what runs, for it takes seconds
pytestmark = [pytest.mark.slow, *WARNINGS]


def _by_hand(student: nn.Module, teacher: nn.Module, **options: Any) -> None:
    """One epoch of plain SGD, as anyone would write it."""
    distiller = Distiller(copy.deepcopy(teacher), student, **options)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    data = new_data(0)
    student.train()
    for first in range(0, IMAGES, BATCH):
        images = torch.stack([image for image, _ in data[first : first + BATCH]])
        distiller.advance(first / IMAGES)
        losses = distiller(images, torch.tensor([label for _, label in data[first : first + BATCH]]))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    distiller.release()


@pytest.mark.parametrize("method", ["kd", "attention", "rkd", "kd+sp", "dkd"])
def test_a_fit_is_the_distiller_s_own_loop(method: str) -> None:
    teacher, student = TeacherNet(0, 8), Net(1)
    expected = copy.deepcopy(student)
    example = torch.stack([image for image, _ in new_data(0)[:8]])
    _by_hand(expected, teacher, method=method, temperature=3, alpha=0.3, example=example)
    new_learner(student, cbs=new_callback(teacher, method=method, temperature=3, alpha=0.3)).fit(1)
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


def test_a_learner_teaches_as_its_model_does() -> None:
    teacher, students = TeacherNet(0, 8), [Net(1), Net(1)]
    for student, given in zip(students, (teacher, new_learner(teacher)), strict=True):
        new_learner(student).fit(1, cbs=new_callback(given))
    assert same_weights(students[0].state_dict(), students[1].state_dict())
    assert not same_weights(students[0].state_dict(), Net(1).state_dict())


def test_the_learner_s_own_loss_is_the_cross_entropy() -> None:
    from fastai.losses import LabelSmoothingCrossEntropyFlat

    smooth = LabelSmoothingCrossEntropyFlat(eps=0.3)
    teacher, student = TeacherNet(0), Net(1)
    images, labels = (
        torch.stack([one for one, _ in new_data(0)[:BATCH]]),
        torch.tensor([y for _, y in new_data(0)[:BATCH]]),
    )
    logits = copy.deepcopy(student).train()(images)
    expected = 0.8 * smooth(logits, labels) + 0.2 * kd(logits, teacher.eval()(images), temperature=2.0).mean()
    learn = new_learner(student, loss_func=smooth)
    learn.fit(1, cbs=new_callback(teacher, temperature=2.0, alpha=0.2))
    assert float(learn.recorder.losses[0]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_validation_loss_is_the_plain_loss() -> None:
    student = Net(1)
    learn = new_learner(student, cbs=new_callback(TeacherNet(0), temperature=8.0, alpha=0.9))
    learn.fit(2)
    images, labels = torch.stack([one for one, _ in new_data(1, 10)]), torch.tensor([y for _, y in new_data(1, 10)])
    plain = float(nn.functional.cross_entropy(student.eval()(images), labels).detach())
    assert learn.recorder.values[-1][1] == pytest.approx(plain, rel=1e-5)
    assert learn.validate()[0] == pytest.approx(plain, rel=1e-5)


def test_each_network_runs_once_a_step_and_the_teacher_never_in_validation() -> None:
    learn = new_learner(Net(1), cbs=new_callback(TeacherNet(0)))
    FORWARDS.clear()
    learn.fit(2)
    steps, checks = 2 * 3, 2 * 2
    assert dict(FORWARDS) == {("Net", True): steps, ("Net", False): checks, ("TeacherNet", False): steps}


def test_the_teacher_is_left_as_it_is() -> None:
    teacher = TeacherNet(0, 8).train()
    before = state_of(teacher)
    new_learner(Net(1)).fit(1, cbs=new_callback(teacher, method="hint"))
    assert same_weights(before, teacher.state_dict())
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert hooks_of(teacher) == 0


@pytest.mark.parametrize("optimizer", ["fastai", "torch", "ready"])
@pytest.mark.parametrize("method", ["hint", "vid", "srrl", "crd"])
def test_projectors_learn_by_the_schedule_of_the_last_group(method: str, optimizer: str) -> None:
    from fastai.optimizer import Adam, OptimWrapper

    student = Net(1)
    kinds = {
        "fastai": lambda: Adam,
        "torch": lambda: partial(OptimWrapper, opt=torch.optim.AdamW),
        "ready": lambda: OptimWrapper(opt=torch.optim.Adam(student.parameters())),
    }
    rates, weights = [], []

    def note(learn: Any) -> None:
        if not learn.training:
            return
        rates.append((learn.distillation._lesson.optimizer.hypers[0]["lr"], learn.opt.hypers[-1]["lr"]))
        weights.append(torch.cat([one.detach().flatten().clone() for one in projectors_of(learn).parameters()]))

    learn = new_learner(student, opt_func=kinds[optimizer](), splitter=lambda net: [_parameters(net)], shuffle=True)
    learn.fit_one_cycle(2, 1e-2, cbs=[new_callback(TeacherNet(0, 8), method=method), at(after_batch=note)][::-1])
    own, learners = zip(*rates, strict=True)
    assert own == learners
    assert len(set(own)) == 6
    assert all(not torch.equal(one, other) for one, other in pairwise(weights))


def _parameters(net: nn.Module) -> list[nn.Parameter]:
    return [one for one in net.parameters() if one.requires_grad]


def test_frozen_groups_stay_frozen_and_the_optimizer_is_the_learner_s() -> None:
    student = Net(1)
    groups = lambda net: [_parameters(net.body[:2]), _parameters(net.body[2:]) + _parameters(net.head)]  # noqa: E731
    learn = new_learner(student, splitter=groups, train_bn=False)
    learn.freeze()
    frozen, seen = state_of(student.body[0]), []
    taught = new_callback(TeacherNet(0, 8), method="hint")
    learn.fit_one_cycle(
        1, slice(1e-3, 1e-2), cbs=[taught, at(after_batch=lambda one: seen.append(len(one.opt.param_lists)))]
    )
    assert same_weights(frozen, student.body[0].state_dict())
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3, 1e-2), cbs=taught)
    assert not same_weights(frozen, student.body[0].state_dict())
    assert set(seen) == {2}
    assert sum(len(group) for group in learn.opt.param_lists) == len(list(student.parameters()))


def test_projectors_go_on_learning_in_the_next_fit_but_forget_the_search_for_a_rate(tmp_path: Path) -> None:
    taught, first, last = new_callback(TeacherNet(0, 8), method="hint"), [], []

    def begin(learn: Any) -> None:
        if learn.train_iter == 0:
            first.append(state_of(projectors_of(learn)))

    student = Net(1)
    before = state_of(student)
    learn = new_learner(
        student,
        tmp_path,
        cbs=[taught, at(after_pred=begin, after_batch=lambda one: last.append(state_of(projectors_of(one))))],
    )
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert same_weights(before, student.state_dict())
    assert taught._kept is None
    learn.fit(1)
    end = last[-1]
    learn.fit(1)
    assert same_weights(end, first[-1])
    assert not same_weights(first[1], first[-1])


class BrokenError(Exception):
    pass


def _raise(error: Exception) -> Any:
    def fail(learn: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "event", ["before_batch", "after_pred", "after_loss", "after_backward", "after_batch", "before_validate"]
)
@pytest.mark.parametrize("method", ["kd", "attention"])
def test_nothing_is_left_on_the_learner_after_an_error(method: str, event: str) -> None:
    teacher, student = TeacherNet(0, 8), Net(1)
    learn = new_learner(student, cbs=new_callback(teacher, method=method))
    loss = learn.loss_func
    with pytest.raises(BrokenError), learn.added_cbs(at(**{event: _raise(BrokenError("stopped"))})):
        learn.fit(1)
    assert hooks_of(teacher, student) == 0
    learn.validate()
    assert learn.model is student
    assert learn.loss_func is loss
    learn.fit(1)


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_backward", "before_step"])
def test_nothing_is_left_on_the_learner_after_a_cancelled_batch_or_fit(event: str) -> None:
    from fastai.callback.core import CancelBatchException, CancelFitException

    for reason in (CancelBatchException, CancelFitException):
        student = Net(1)
        learn = new_learner(student, cbs=new_callback(TeacherNet(0, 8), method="attention"))
        loss = learn.loss_func
        with learn.added_cbs(at(**{event: _raise(reason())})):
            learn.fit(1)
        assert hooks_of(student) == 0
        assert learn.model is student
        assert learn.loss_func is loss


def test_hooks_are_there_in_steps_only() -> None:
    student, seen = Net(1), []
    note = lambda learn: seen.append(hooks_of(student))  # noqa: E731
    learn = new_learner(
        student, cbs=[new_callback(TeacherNet(0, 8), method="attention"), at(after_pred=note, after_epoch=note)]
    )
    learn.fit(1)
    assert seen == [0] * (3 + 2 + 1)


def test_an_exported_learner_holds_no_teacher(tmp_path: Path) -> None:
    from fastai.learner import load_learner

    learn = new_learner(Net(1), tmp_path, cbs=new_callback(new_learner(TeacherNet(0, 8)), method="hint"))
    learn.fit(1)
    learn.export("whole.pkl")
    saved = learn.save("weights")
    assert b"TeacherNet" not in (tmp_path / "whole.pkl").read_bytes()
    assert b"TeacherNet" not in saved.read_bytes()
    learn.load("weights")
    with pytest.warns(UserWarning, match="insecure pickle"):
        loaded = load_learner(tmp_path / "whole.pkl")
    images = torch.stack([image for image, _ in new_data(1, 10)])
    assert torch.equal(loaded.model.eval()(images), learn.model.eval()(images))
    loaded.dls = learn.dls
    loaded.validate()
    with pytest.raises(ConfigError, match=r"^A learner is exported without its teacher: give it a new Dist"):
        loaded.fit(1)


def test_it_can_be_exported_after_an_interruption(tmp_path: Path) -> None:
    learn = new_learner(Net(1), tmp_path, cbs=new_callback(TeacherNet(0, 8), method="hint"))
    with pytest.raises(KeyboardInterrupt), learn.added_cbs(at(after_backward=_raise(KeyboardInterrupt()))):
        learn.fit(1)
    learn.export("whole.pkl")
    assert b"TeacherNet" not in (tmp_path / "whole.pkl").read_bytes()
