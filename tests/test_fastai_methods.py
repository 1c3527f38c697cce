"""Every method in fastai's Learner: what is refused, what it knows of images, and beside fastai's own callbacks."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastai_learners import (
    BATCH,
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
from understudy.distillation import METHODS, Schedule, Term
from understudy.errors import ConfigError, ModelError
from understudy.losses import kd

pytest.importorskip("fastai", reason="fastai is not installed: pip install 'understudy[fastai]'")
# fastai itself is imported by what runs, for it takes seconds
pytestmark = [pytest.mark.slow, *WARNINGS]


def test_what_cannot_be_is_said_in_one_sentence() -> None:
    learn = new_learner(Net(1))
    with pytest.raises(ModelError, match=r"^The student answers \[8, 3\] and the teacher \[8, 5\].*same classes"):
        learn.fit(1, cbs=new_callback(TeacherNet(0, classes=5)))
    with pytest.raises(ConfigError, match=r"^The teacher is a fastai Learner or a torch module, not a str\.$"):
        new_callback("resnet18")
    with pytest.raises(ConfigError, match="Did you mean 'attention'"):
        new_callback(TeacherNet(0), method="atention")
    with pytest.raises(ConfigError, match="either alpha or"):
        learn.fit(1, cbs=new_callback(TeacherNet(0), alpha=0.5, ce_weight=1.0))


def test_classes_in_another_order_are_refused() -> None:
    teacher, learn = new_learner(TeacherNet(0)), new_learner(Net(1))
    teacher.dls.vocab, learn.dls.vocab = ["cat", "dog", "fox"], ["cat", "fox", "dog"]
    with pytest.raises(ConfigError, match="The teacher's class 1 is 'dog' and the student's 'fox'"):
        learn.fit(1, cbs=new_callback(teacher))


def test_methods_that_say_nothing_of_two_classes_warn() -> None:
    learn = new_learner(Net(1))
    taught = new_callback(TeacherNet(0), method="dkd")
    images, labels = torch.stack([image for image, _ in new_data(0)[:BATCH]]), torch.arange(BATCH) % 2
    with pytest.warns(UserWarning, match="With 2 classes dkd says little or nothing"):
        taught._distiller(TeacherNet(0, classes=2), Net(1, classes=2))(images, labels)
    learn.fit(1, cbs=taught)  # three classes: no warning, which would be an error here


def test_positions_tell_which_image_it_is() -> None:
    seen: list[bool] = []

    def compare(learn: Any) -> None:
        if learn.training:
            images = learn.xb[0]
            numbers = (images[:, 0, 0, 0] * IMAGES).round().long()
            seen.append(torch.equal(learn.distillation._positions_of(images), numbers))

    learn = new_learner(
        Net(1), shuffle=True, cbs=[new_callback(TeacherNet(0, 8), method="crd"), at(after_batch=compare)]
    )
    learn.fit(2)
    assert seen == [True] * 6


def test_a_loader_that_does_not_tell_is_refused_where_it_has_to() -> None:
    from fastai.data.core import DataLoaders

    learn = new_learner(Net(1))
    plain = torch.utils.data.DataLoader(new_data(0), batch_size=BATCH)
    learn.dls = DataLoaders(plain, plain, device=torch.device("cpu"))
    learn.fit(1, cbs=new_callback(TeacherNet(0)))
    with pytest.raises(ConfigError, match="remembers each image, so it needs fastai's DataLoader"):
        learn.fit(1, cbs=new_callback(TeacherNet(0), method="crd"))


def test_mixup_reaches_the_teacher_and_is_refused_where_one_label_is_needed() -> None:
    from fastai.callback.mixup import MixUp

    student = Net(1)
    learn = new_learner(student, cbs=MixUp())
    learn.fit(1, cbs=new_callback(TeacherNet(0)))
    assert not same_weights(state_of(Net(1)), student.state_dict())
    with pytest.raises(ConfigError, match="'dkd' needs to know which one image and class it sees, and mix_up mixes"):
        learn.fit(1, cbs=new_callback(TeacherNet(0), method="dkd"))


def test_accumulated_steps_move_projectors_as_seldom_as_the_student() -> None:
    from fastai.callback.training import GradientAccumulation

    seen: list[tuple[Tensor, Tensor]] = []

    def note(learn: Any) -> None:
        if learn.training:
            projector = next(projectors_of(learn).parameters())
            seen.append((projector.detach().clone(), learn.model.head.weight.detach().clone()))

    taught = new_callback(TeacherNet(0, 8), method="kd+hint")
    new_learner(Net(1)).fit(1, cbs=[taught, GradientAccumulation(2 * BATCH), at(after_batch=note)])
    moved = [[not torch.equal(a, b) for a, b in zip(one, other, strict=True)] for one, other in pairwise(seen)]
    assert moved == [[True, True], [False, False]]


def _mixed_precision(*, half: bool) -> Any:
    """Return fastai's own callback on this processor; it is made for CUDA."""
    from fastai.callback.fp16 import MixedPrecision

    class OnProcessor(MixedPrecision):
        def before_fit(self) -> None:
            self.autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
            self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", init_scale=1024.0), []

    return OnProcessor()


def test_scaled_gradients_move_projectors_as_others_do() -> None:
    ends: list[dict[str, Tensor]] = []
    for precision in ([], [_mixed_precision(half=False)]):
        torch.manual_seed(0)
        student, taught = Net(1), new_callback(TeacherNet(0, 8), method="hint")
        torch.manual_seed(0)
        new_learner(student).fit(1, cbs=[taught, *precision])
        ends.append({**student.state_dict(), **taught._kept[1]})
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("method", ["kd", "hint", "rkd"])
def test_half_precision_trains(method: str) -> None:
    student = Net(1)
    learn = new_learner(student)
    learn.fit(1, lr=1e-3, cbs=[new_callback(TeacherNet(0, 8), method=method), _mixed_precision(half=True)])
    assert all(torch.isfinite(loss) for loss in learn.recorder.losses)
    assert not torch.equal(student.head.weight, Net(1).head.weight)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_teaches(method: str) -> None:
    student = Net(1)
    learn = new_learner(student)
    learn.fit(1, lr=1e-4, cbs=new_callback(TeacherNet(0, 8), method=method))
    assert all(torch.isfinite(loss) for loss in learn.recorder.losses)
    assert not torch.equal(student.head.weight, Net(1).head.weight)
    assert hooks_of(student) == 0


def test_schedules_follow_the_fit() -> None:
    weights: list[float] = []
    schedule = Schedule("linear", 1.0, 0.0)

    def note(learn: Any) -> None:
        if learn.training:
            weights.append(schedule.value(learn.distillation._lesson.distiller._progress))

    term = Term("kd", partial(kd, temperature=2.0), weight=schedule)
    new_learner(Net(1)).fit(2, cbs=[new_callback(TeacherNet(0), terms=[term]), at(after_batch=note)])
    assert weights == pytest.approx([1 - step / 6 for step in range(6)])


def test_parts_can_be_columns() -> None:
    taught = new_callback(TeacherNet(0), method="kd", temperature=2.0, alpha=0.25)
    learn = new_learner(Net(1), metrics=taught.part_metrics, lr=0.0)
    learn.fit(1, cbs=taught)
    assert list(learn.recorder.metric_names[3:5]) == ["train_ce", "train_kd"]
    ce, soft = learn.recorder.values[-1][2:]
    losses = torch.stack([torch.as_tensor(float(one)) for one in learn.recorder.losses])
    assert soft > 0
    assert 0.75 * ce + 0.25 * soft == pytest.approx(float(losses[-1]), rel=0.02)


def test_a_missing_fastai_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastai.callback.core", None)
    monkeypatch.delitem(sys.modules, "understudy.integrations.fastai", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'understudy\[fastai\]'"):
        importlib.import_module("understudy.integrations.fastai")


def test_the_example_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    reached = importlib.import_module("fastai_callback").main()
    assert reached["teacher"] > 0.9
    assert reached["distilled"] > 0.6
