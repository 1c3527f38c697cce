"""Lightning's checkpoints of our tasks: without the teacher, loaded, resumed, averaged; and one fit after another."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_fits import SGD, WARNINGS, data, net, same, shuffled, state, trainer, val

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402

from understudy.integrations.lightning import ClassificationTask, DistillationTask, adamw  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # the import alone takes seconds
    *WARNINGS,
]


def hooks(module: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())


def saved(task: Any, folder: Path, *, max_epochs: int = 2) -> Path:
    """Train, save, and return the path of the checkpoint."""
    fitting = trainer(folder, max_epochs=max_epochs)
    fitting.fit(task, shuffled())
    fitting.save_checkpoint(folder / "task.ckpt")
    return folder / "task.ckpt"


@pytest.mark.parametrize("method", ["kd", "kd+hint"])
def test_a_checkpoint_has_no_teacher_and_is_loaded_again(method: str, tmp_path: Path) -> None:
    task = DistillationTask(net(64, 0), net(4, 1), method=method, temperature=4, optimizer=SGD)
    path = saved(task, tmp_path)
    kept = torch.load(path, weights_only=True)
    assert {name.split(".")[0] for name in kept["state_dict"]} <= {"model", "projectors"}
    teacher_bytes = sum(one.numel() * 4 for one in net(64, 0).parameters())
    assert path.stat().st_size < teacher_bytes
    again = DistillationTask.load_from_checkpoint(path, teacher=net(64, 0), student=net(4, 2), strict=True)
    assert same(state(again), state(task))
    assert again.hparams["temperature"] == 4
    trainer(tmp_path, max_epochs=1).fit(again, shuffled())  # goes on with the projectors that were loaded
    assert not same(state(again), state(task))


def test_a_distilled_checkpoint_is_a_classifier_without_its_teacher(tmp_path: Path) -> None:
    task = DistillationTask(net(8, 0), net(4, 1))
    alone = ClassificationTask.load_from_checkpoint(saved(task, tmp_path), model=net(4, 2))
    assert same(state(alone.model), state(task.student))


class Own(DistillationTask):
    """A user's own task, with an argument of its own."""

    def __init__(self, teacher: nn.Module, student: nn.Module, note: str = "", **more: Any) -> None:
        super().__init__(teacher, student, **more)
        self.note = note


def test_a_user_may_derive_a_task(tmp_path: Path) -> None:
    path = saved(Own(net(8, 0), net(4, 1), alpha=0.3), tmp_path)
    again = Own.load_from_checkpoint(path, teacher=net(8, 0), student=net(4, 2))
    assert again.hparams["alpha"] == 0.3


@pytest.mark.parametrize("method", ["kd", "kd+hint"])
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(method: str, tmp_path: Path) -> None:
    def task() -> DistillationTask:
        student = nn.Sequential(*(one for one in net(4, 1) if not isinstance(one, nn.Dropout)))
        torch.manual_seed(5)
        return DistillationTask(net(8, 0), student, method=method, optimizer=partial(adamw, lr=1e-2))

    ordered = DataLoader(data(), batch_size=8)
    whole = task()
    trainer(tmp_path, max_epochs=4).fit(whole, ordered)
    first = trainer(tmp_path, max_epochs=2)
    half = task()
    first.fit(half, ordered)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = task()
    trainer(tmp_path, max_epochs=4).fit(resumed, ordered, ckpt_path=tmp_path / "half.ckpt")
    assert not same(state(half), state(whole))
    assert same(state(resumed), state(whole))


def test_no_hook_is_left_and_a_second_fit_goes_on(tmp_path: Path) -> None:
    teacher, student = net(8, 0), net(4, 1)
    task = DistillationTask(teacher, student, method="kd+hint")
    assert hooks(teacher) == hooks(student) == 0
    trainer(tmp_path).fit(task, shuffled())
    assert hooks(teacher) == hooks(student) == 0
    first = state(task.projectors)
    trainer(tmp_path, max_epochs=0).fit(task, shuffled())
    assert same(state(task.projectors), first)
    trainer(tmp_path).fit(task, shuffled())
    assert not same(state(task.projectors), first)
    copy.deepcopy(task)


class Failing(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("a user's fault")


def test_a_fit_after_an_error_starts_clean(tmp_path: Path) -> None:
    student = net(4, 1)
    task = DistillationTask(net(8, 0), student, method="kd+hint")
    with pytest.raises(RuntimeError, match="a user's fault"):
        trainer(tmp_path, callbacks=[Failing()]).fit(task, shuffled())
    trainer(tmp_path).fit(task, shuffled())
    assert hooks(student) == 0


def test_weights_may_be_averaged_and_the_best_kept(tmp_path: Path) -> None:
    example = data().tensors[0][:2]
    task = DistillationTask(net(8, 0), net(4, 1), method="kd+hint", example=example)
    best = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    callbacks = [EMAWeightAveraging(decay=0.5), best]
    trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(task, shuffled(), val())
    kept = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert kept.keys() == task.state_dict().keys()
