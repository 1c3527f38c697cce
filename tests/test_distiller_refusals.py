"""What the distiller refuses instead of passing over, and the frozen teacher beside it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy import Distiller, losses
from understudy.distillation import METHODS, methods
from understudy.distillation.ensemble import Ensemble
from understudy.distillation.schedules import Schedule
from understudy.errors import ConfigError

CLASSES = 3


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def _batch() -> tuple[Tensor, Tensor]:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(8) % CLASSES


@pytest.mark.parametrize("method", ["dml", "byot", "teacher_free"])
def test_methods_without_a_teacher_work_without_one(method: str) -> None:
    images, labels = _batch()
    parts = Distiller(None, _net(), method=method, alpha=0.5, example=images)(images, labels).parts
    assert set(parts) == {"ce", method}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "kd"}, "'kd' needs a teacher"),
        ({"method": "dml+srrl"}, "'srrl' needs a teacher"),
        ({"method": "dmll"}, "Unknown method 'dmll'"),
        ({"method": "teacher_free", "alpha": 7.0}, "between 0 and 1, not 7"),
        ({"method": "teacher_free", "temperature": -4.0}, "above 0, not -4"),
        ({"alpha": 7.0}, "between 0 and 1, not 7"),
        ({"temperature": -4.0}, "above 0, not -4"),
    ],
)
def test_settings_are_read_without_a_teacher_too(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distiller(None, _net(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"method": "dkd"}, {"temperature": 4.0}, {"alpha": 0.5}, {"ce_weight": 0.5}, {"kd_weight": 0.5}],
    ids=str,
)
def test_terms_stand_alone(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"`terms` take the place of `{name}`"):
        Distiller(_net(0), _net(1), terms=METHODS["kd"].terms(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), Schedule("linear", start=4.0, end=0.0)], ids=str)
def test_a_temperature_is_above_0(temperature: float) -> None:
    with pytest.raises(ConfigError, match="A temperature is a number above 0"):
        METHODS["kd"].terms(temperature=temperature)
    if not isinstance(temperature, Schedule):
        with pytest.raises(ConfigError, match="A temperature is a number above 0"):
            Distiller(_net(0), _net(1), temperature=temperature)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_is_below_1(smoothing: float) -> None:
    images, labels = _batch()
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        losses.cross_entropy(_net()(images), labels, label_smoothing=smoothing)
    for teacher in (None, _net(1)):
        with pytest.raises(ConfigError, match="from 0 to below 1"):
            Distiller(teacher, _net(), label_smoothing=smoothing)


@pytest.mark.parametrize("weights", [{"kd_weight": float("nan")}, {"ce_weight": float("inf")}], ids=str)
def test_weights_are_finite(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="finite numbers of 0 or more"):
        Distiller(_net(0), _net(1), **weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [losses.dkd, losses.nkd])
def test_losses_with_a_true_class_need_another_one(loss: object) -> None:
    with pytest.raises(ValueError, match="two classes or more"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 0]), temperature=1.0)  # type: ignore[operator]


def test_a_part_of_the_teacher_left_in_training_mode_does_not_learn() -> None:
    teacher = _net(0)
    distiller = Distiller(teacher, _net(1)).train()
    before = copy.deepcopy(teacher.state_dict())
    teacher[0].train()  # the whole one says that it does not train
    expected = teacher.eval()(_batch()[0])
    teacher[0].train()
    assert distiller.teacher is not None
    assert torch.equal(distiller.teacher(_batch()[0]), expected)
    distiller(*_batch())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_teacher_and_student_share_nothing() -> None:
    student = _net(0)
    tied = _net(1)
    tied[0] = student[0]
    by_weight = _net(2)
    by_weight[4].weight = student[4].weight  # type: ignore[assignment]
    for teacher in (student, tied, by_weight, Ensemble([_net(3), student])):
        with pytest.raises(ConfigError, match="share weights or layers"):
            Distiller(teacher, student)
    assert all(one.requires_grad for one in student.parameters())  # nothing was frozen on the way
    Distiller(_net(1), student)


def test_one_activation_in_both_networks_is_no_sharing() -> None:
    teacher, student = _net(0), _net(1)
    teacher[0][2] = student[0][2]  # type: ignore[index, operator]
    Distiller(teacher, student)(*_batch()).total.backward()


def test_who_needs_no_teacher_may_be_given_the_student() -> None:
    student = _net(0)
    distiller = Distiller(student, student, method="teacher_free")
    distiller(*_batch()).total.backward()
    assert all(one.grad is not None for one in student.parameters())


def test_a_frozen_student_is_refused() -> None:
    for teacher in (None, _net(1)):
        with pytest.raises(ConfigError, match="no parameter that is trained"):
            Distiller(teacher, _net(0).requires_grad_(False))


def _looking(method: str = "attention") -> Distiller:
    return Distiller(_net(0), _net(1), method=method, example=_batch()[0]).eval()


def test_hooks_that_were_taken_off_come_back_with_the_next_step() -> None:
    distiller = _looking()
    expected = distiller(*_batch()).total
    distiller.listen(on=False)
    networks = distiller.student, distiller.teacher
    assert not any(module._forward_hooks for net in networks for module in net.modules())  # type: ignore[union-attr]
    assert torch.equal(distiller(*_batch()).total, expected)
    assert torch.equal(distiller(*_batch()).total, expected)


def test_a_released_distiller_says_so() -> None:
    distiller = _looking()
    distiller.release()
    with pytest.raises(ConfigError, match="was released"):
        distiller(*_batch())
    for on in (True, False):
        with pytest.raises(ConfigError, match="was released"):
            distiller.listen(on=on)
    distiller.release()


def test_maps_need_the_teacher_that_was_dismissed() -> None:
    distiller = _looking("kd+attention")
    distiller.listen(on=False)
    distiller.dismiss_teacher()
    distiller.listen()  # as it is
    with pytest.raises(ConfigError, match="'attention' compares feature maps: do not dismiss"):
        distiller(*_batch(), teacher_logits=torch.zeros(8, CLASSES))
    with pytest.raises(ConfigError, match="stay on until `release`"):
        distiller.listen(on=False)
    distiller.release()


class _InATuple(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = _net(seed)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images), images


def test_a_peer_answers_as_the_student_does() -> None:
    images, labels = _batch()
    terms = methods.terms("dml", ce_weight=0.5, kd_weight=0.5)
    found = Distiller(None, _InATuple(0), terms=terms, example=images)(images, labels)
    assert torch.isfinite(found.total)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_without_a_label_do_not_count(smoothing: float) -> None:
    images, labels = _batch()
    student = _net(0).eval()
    without = torch.where(torch.arange(8) < 3, labels, -1)
    for teacher in (None, _net(1)):
        distiller = Distiller(teacher, student, label_smoothing=smoothing).eval()
        expected = F.cross_entropy(student(images)[:3], labels[:3], label_smoothing=smoothing)
        torch.testing.assert_close(distiller(images, without).parts["ce"], expected.detach())
        assert distiller(images, torch.full((8,), -1)).parts["ce"] == 0


def test_where_all_images_have_labels_nothing_changes_by_a_bit() -> None:
    images, labels = _batch()
    student = _net(0).eval()
    plain = losses.cross_entropy(student(images), labels).mean()
    found = Distiller(None, student).eval()(images, labels).total
    assert torch.equal(found, plain)
    for one, other in zip(
        torch.autograd.grad(found, student.parameters()),  # type: ignore[arg-type]
        torch.autograd.grad(plain, student.parameters()),  # type: ignore[arg-type]
        strict=True,
    ):
        assert torch.equal(one, other)
    shares = F.one_hot(labels, CLASSES).float()
    assert torch.equal(
        Distiller(None, student).eval()(images, shares).total, losses.cross_entropy(student(images), shares).mean()
    )


@pytest.mark.slow
def test_plain_training_compiles_with_and_without_labels() -> None:
    images, labels = _batch()
    distiller = Distiller(_net(1), _net(0)).eval()
    compiled = torch.compile(distiller, backend="eager", fullgraph=True, dynamic=False)
    for given in (labels, torch.where(labels == 0, -1, labels)):
        torch.testing.assert_close(compiled(images, given).total, distiller(images, given).total)


@pytest.mark.parametrize("method", ["dkd", "nkd", "dist", "lskd"])
def test_methods_with_little_to_say_of_two_classes_are_doubted_once(method: str) -> None:
    teacher, student = nn.Linear(4, 2), nn.Linear(4, 2)
    distiller = Distiller(teacher, student, method=method)
    images, labels = torch.rand(6, 4), torch.arange(6) % 2
    with pytest.warns(UserWarning, match=f"With 2 classes {method} says little or nothing: take kd"):
        distiller(images, labels)
    distiller(images, labels)
    Distiller(nn.Linear(4, 3), nn.Linear(4, 3), method=method)(images, labels)
    Distiller(teacher, student)(images, labels)
