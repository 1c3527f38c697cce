"""Shares of the gradient: the same as by separate backward passes, and nothing is different afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from understudy.distillation import METHODS, Distiller, Schedule, Term, methods
from understudy.distillation.balance import Share, Step, shares
from understudy.distillation.projectors import Projector
from understudy.distillation.terms import at
from understudy.errors import ConfigError

CLASSES, SAMPLES, SIZE = 4, 40, 16


def network(seed: int, width: int) -> nn.Sequential:
    """Return a network of two stages with batch norm, and dropout before its head."""
    torch.manual_seed(seed)
    blocks = [
        nn.Sequential(nn.Conv2d(one, other, 3, stride=stride, padding=1), nn.BatchNorm2d(other), nn.ReLU())
        for one, other, stride in ((3, width, 1), (width, 2 * width, 2))
    ]
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(2 * width, CLASSES)
    return nn.Sequential(*blocks, *end)


def step(seed: int = 0) -> Step:
    """Return what one step brings along."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(16, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(CLASSES, (16,), generator=generator)
    return images, {"labels": labels, "positions": torch.randperm(SAMPLES, generator=generator)[:16]}


def distiller(method: str = "kd", **options: object) -> Distiller:
    example, _ = step(9)
    built = Distiller(network(0, 6), network(1, 3), method=method, example=example, samples=SAMPLES, **options)  # type: ignore[arg-type]
    return built.train()


def slow_norms(objective: Distiller, given: Step) -> dict[str, float]:
    """Return the gradient norm of every term, each by a copy of the objective's state and a backward of its own."""
    images, ready = given
    state = copy.deepcopy(objective.state_dict())
    norms = {}
    for term in objective.terms:
        objective.load_state_dict(state)
        objective.zero_grad()
        torch.manual_seed(5)
        objective.weighted(images, dict(ready))[term.name].backward()
        squares = [p.grad.double().square().sum() for p in objective.student.parameters() if p.grad is not None]
        norms[term.name] = float(sum(squares)) ** 0.5
    objective.load_state_dict(state)
    objective.zero_grad()
    return norms


def by_name(found: list[Share]) -> dict[str, Share]:
    return {one.name: one for one in found}


@pytest.mark.parametrize("method", ["kd", "kd+rkd", "kd+hint+attention", "logit_mse+sp+crd"])
def test_norms_are_those_of_separate_passes(method: str) -> None:
    objective = distiller(method)
    expected = slow_norms(objective, step())
    torch.manual_seed(5)
    found = shares(objective, [step()])
    assert {one.name: one.gradient_norm for one in found} == pytest.approx(expected, rel=1e-4)
    total = sum(expected.values())
    assert {one.name: one.share for one in found} == pytest.approx(
        {name: norm / total for name, norm in expected.items()}, rel=1e-4
    )
    assert sum(one.share for one in found) == pytest.approx(1.0)


def test_value_and_weight_are_told_apart() -> None:
    objective = distiller("kd+attention", ce_weight=0.3, kd_weight=0.7)
    torch.manual_seed(5)
    found = by_name(shares(objective, [step()]))
    torch.manual_seed(5)
    images, ready = step()
    parts = objective(images, ready["labels"]).parts
    assert {name: one.weight for name, one in found.items()} == {"ce": 0.3, "kd": 0.7, "attention": 700.0}
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {name: float(part) for name, part in parts.items()}, rel=1e-5
    )


def test_the_norm_grows_with_the_weight() -> None:
    quiet = []
    for weight in (0.5, 1.5):
        objective = distiller(kd_weight=weight)
        objective.student[4].p = 0.0  # type: ignore[index,union-attr]
        quiet.append(by_name(shares(objective, [step()])))
    assert quiet[1]["kd"].gradient_norm == pytest.approx(3 * quiet[0]["kd"].gradient_norm, rel=1e-5)
    assert quiet[1]["ce"].gradient_norm == pytest.approx(quiet[0]["ce"].gradient_norm, rel=1e-6)
    assert quiet[1]["kd"].share > quiet[0]["kd"].share


def test_the_mean_over_the_first_batches() -> None:
    def one_by_one(seed: int) -> Share:
        objective = distiller()
        objective.student[4].p = 0.0  # type: ignore[index,union-attr]
        return by_name(shares(objective, [step(seed)]))["kd"]

    objective = distiller()
    objective.student[4].p = 0.0  # type: ignore[index,union-attr]
    taken: list[int] = []

    def batches():  # type: ignore[no-untyped-def]
        for seed in range(9):
            taken.append(seed)
            yield step(seed)

    found = by_name(shares(objective, batches(), steps=3))["kd"]
    assert found.gradient_norm == pytest.approx(sum(one_by_one(seed).gradient_norm for seed in range(3)) / 3, rel=1e-5)
    assert found.value == pytest.approx(sum(one_by_one(seed).value for seed in range(3)) / 3, rel=1e-5)
    assert taken == [0, 1, 2]


def picture(objective: Distiller) -> dict[str, Tensor]:
    """Return copies of all tensors that an objective holds, gradients included."""
    held = dict(objective.state_dict()) | dict(objective.named_buffers())
    held |= {f"grad of {name}": p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert objective.teacher is not None
    held |= {f"teacher's {name}": value for name, value in objective.teacher.model.state_dict().items()}
    return {name: value.detach().clone() for name, value in held.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_different_afterwards(method: str, training: bool) -> None:
    objective = distiller(f"kd+{method}" if method != "kd" else "kd")
    images, ready = step()
    objective(images, **ready).total.backward()  # so that there are gradients, and buffers that have moved
    objective.train(training)
    objective.student[0].eval()  # type: ignore[index]
    objective.advance(0.3)
    modes = [module.training for module in objective.modules()]
    terms, tensors = objective.terms, [id(one) for one in (*objective.parameters(), *objective.buffers())]
    own = [module.own_loss for module in objective.modules() if isinstance(module, Projector)]
    before, random = picture(objective), torch.get_rng_state()
    shares(objective, [step(1), step(2)])
    after = picture(objective)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in objective.modules()] == modes
    assert objective.terms is terms
    assert [id(one) for one in (*objective.parameters(), *objective.buffers())] == tensors
    assert all(
        one is other
        for one, other in zip(
            own, [module.own_loss for module in objective.modules() if isinstance(module, Projector)], strict=True
        )
    )


def test_training_goes_on_as_if_nothing_had_been_measured() -> None:
    def train(measure: bool) -> list[Tensor]:
        objective = distiller("kd+crd+ofd+ft")
        torch.manual_seed(8)
        if measure:
            shares(objective, [step(5), step(6)])
        for seed in range(3):
            images, ready = step(seed)
            objective.zero_grad()
            objective(images, **ready).total.backward()
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter -= 1e-2 * parameter.grad
        return [value.detach().clone() for value in objective.state_dict().values()]

    assert all(torch.equal(one, other) for one, other in zip(train(True), train(False), strict=True))


class Renewing(nn.Module):
    """A layer that puts another tensor in its buffer's place instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return images


def test_buffers_that_are_replaced_are_put_back() -> None:
    student = nn.Sequential(Renewing(), network(1, 3))
    seen = student[0].seen
    objective = Distiller(network(0, 6), student, method="kd")
    shares(objective, [step(), step(1)])
    assert student[0].seen is seen
    assert float(seen) == 0.0


def test_what_fails_leaves_no_trace_either() -> None:
    objective = distiller("kd+crd").eval()
    before = picture(objective)
    images, ready = step()
    with pytest.raises(ConfigError, match="takes positions; none given"):
        shares(objective, [(images, {"labels": ready["labels"]})])
    assert all(torch.equal(value, before[name]) for name, value in picture(objective).items())
    assert not objective.training


@pytest.mark.parametrize(
    ("weight", "looked_at", "from_zero"),
    [
        (Schedule("warmup", 0.0, 3.0, until=0.1), 3.0, True),
        (Schedule("cosine", 0.0, 3.0), 3.0, True),
        (Schedule("step", 0.0, 3.0, until=0.5), 3.0, True),
        (Schedule("linear", 2.0, 9.0), 2.0, False),
        (Schedule("step", 2.0, 0.0, until=0.1), 2.0, False),
    ],
)
def test_a_weight_that_is_zero_at_first_is_looked_at_when_largest(
    weight: Schedule, looked_at: float, from_zero: bool
) -> None:
    def objective(weight: float | Schedule) -> Distiller:
        terms = methods.label_term(), *METHODS["kd"].terms(weight=weight)
        return Distiller(network(0, 6), network(1, 3), terms=terms)

    torch.manual_seed(0)
    found = by_name(shares(objective(weight), [step()]))["kd"]
    torch.manual_seed(0)
    constant = by_name(shares(objective(looked_at), [step()]))["kd"]
    assert found == Share("kd", constant.value, looked_at, constant.gradient_norm, constant.share, from_zero)
    assert found.gradient_norm > 0


def test_a_constant_that_no_parameter_moves_has_a_norm_of_zero() -> None:
    def nothing(student: Tensor, teacher: Tensor) -> Tensor:
        return teacher.sum(1)

    terms = methods.label_term(), Term("nothing", nothing)
    found = by_name(shares(Distiller(network(0, 6), network(1, 3), terms=terms), [step()]))
    assert found["nothing"].gradient_norm == 0.0
    assert found["ce"].share == 1.0


def test_frozen_parameters_do_not_count() -> None:
    objective = distiller()
    for name, parameter in objective.student.named_parameters():
        parameter.requires_grad = name.startswith("5.")
    torch.manual_seed(5)
    images, ready = step()
    objective.weighted(images, dict(ready))["kd"].backward()
    head = objective.student[5]  # type: ignore[index]
    expected = torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm()
    objective.zero_grad()
    objective.load_state_dict(distiller().state_dict())
    torch.manual_seed(5)
    assert by_name(shares(objective, [step()]))["kd"].gradient_norm == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("guard", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_within_the_callers_contexts(guard: Callable[[], object]) -> None:
    objective = distiller("kd+hint")
    torch.manual_seed(5)
    plain = by_name(shares(objective, [step(), step(1)]))
    torch.manual_seed(5)
    with guard():  # type: ignore[attr-defined]
        found = by_name(shares(objective, [step(), step(1)]))
    for name, one in plain.items():
        assert found[name].gradient_norm == pytest.approx(one.gradient_norm, rel=0.1)
    images, ready = step()
    objective(images, **ready).total.backward()


def test_it_is_measured_as_training_will_be() -> None:
    torch.manual_seed(5)
    expected = shares(distiller(), [step()])
    torch.manual_seed(5)
    assert shares(distiller().eval(), [step()]) == expected


def test_ready_answers_of_the_teacher_do() -> None:
    running, ready = distiller(), distiller()
    images, given = step()
    assert ready.teacher is not None
    answers = ready.teacher(images)
    ready.dismiss_teacher()
    torch.manual_seed(5)
    expected = shares(running, [(images, given)])
    torch.manual_seed(5)
    assert shares(ready, [(images, {**given, "teacher_logits": answers})]) == expected


def test_without_a_batch() -> None:
    with pytest.raises(ConfigError, match="one batch at least"):
        shares(distiller(), [])


def test_one_term_has_it_all() -> None:
    (only,) = shares(Distiller(None, network(1, 3)), [step()])
    assert (only.name, only.share, only.from_zero) == ("ce", 1.0, False)
    assert at(only.weight, 0.0) == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    objective = distiller("kd+crd+hint").cuda()
    given = [(images.cuda(), {name: value.cuda() for name, value in ready.items()}) for images, ready in (step(),)]  # type: ignore[union-attr]
    before, random = picture(objective), torch.cuda.get_rng_state()
    found = shares(objective, given)
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert all(torch.equal(value, before[name]) for name, value in picture(objective).items())
    assert torch.equal(torch.cuda.get_rng_state(), random)
