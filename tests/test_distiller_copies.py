"""Copies of a distiller work by themselves; copies of its networks alone are free of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from understudy import Distiller
from understudy.distillation import METHODS
from understudy.distillation.hooks import Listener, Place
from understudy.errors import ConfigError

CLASSES, SAMPLES = 5, 16
LOOKING = ["attention", "hint", "srrl", "simkd", "ft", "cat_kd", "review", "crd"]
every_copy = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))], ids=["deepcopy", "pickle"]
)


class Net(nn.Module):
    """Three stages and a final layer."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = _stage(1, width), _stage(width, 2 * width), _stage(2 * width, 2 * width)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.c(self.b(self.a(images)))))
        return logits


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def _batch() -> dict[str, Tensor]:
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"images": images, "labels": torch.arange(8) % CLASSES, "positions": torch.arange(8)}


def _distiller(method: str) -> Distiller:
    made = Distiller(Net(6), Net(3, 1), method=method, example=_batch()["images"], samples=SAMPLES)
    made.advance(0.5)
    return made


def _hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def _steps(distiller: Distiller, count: int = 2) -> list[Tensor]:
    """Train, and return the totals."""
    torch.manual_seed(3)  # what some methods draw
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    totals = []
    for _ in range(count):
        optimizer.zero_grad()
        total = distiller(**_batch()).total
        total.backward()
        optimizer.step()
        totals.append(total.detach())
    return totals


@every_copy
@pytest.mark.parametrize("method", LOOKING)
def test_a_copy_trains_as_the_original_does_and_apart_from_it(
    method: str, copied: Callable[[Distiller], Distiller]
) -> None:
    distiller = _distiller(method)
    distiller(**_batch())  # it has run before
    twin = copied(distiller)
    before = copy.deepcopy(distiller.state_dict())
    found = _steps(twin)
    assert all(torch.equal(before[name], value) for name, value in distiller.state_dict().items())
    distiller.release()  # the twin needs nothing of it
    assert all(
        torch.equal(one, other) for one, other in zip(found, _steps(_copy_by_state(method, before)), strict=True)
    )
    assert twin.teacher is not None
    twin.release()
    assert _hooks(twin.student) == _hooks(twin.teacher) == 0


def _copy_by_state(method: str, state: dict[str, Tensor]) -> Distiller:
    fresh = _distiller(method)
    fresh.load_state_dict(state)
    return fresh


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_pickled(method: str) -> None:
    distiller = _distiller(method).eval()
    twin = pickle.loads(pickle.dumps(distiller))
    assert torch.equal(twin(**_batch()).total, distiller(**_batch()).total)


def test_standardised_losses_can_be_pickled() -> None:
    terms = METHODS["kd"].terms(standardize=True)
    twin = pickle.loads(pickle.dumps(Distiller(Net(6), Net(3, 1), terms=terms).eval()))
    assert torch.equal(twin(**_batch()).total, Distiller(Net(6), Net(3, 1), terms=terms).eval()(**_batch()).total)


def test_a_copy_of_the_student_alone_is_free_of_the_distiller() -> None:
    distiller = _distiller("attention")
    distiller(**_batch())
    best = copy.deepcopy(distiller.student).eval()
    best(_batch()["images"])
    assert distiller._watch is not None
    with pytest.raises(ConfigError, match="returned no tensor"):
        distiller._watch.student.take()  # the distiller has heard nothing of what the copy did
    file = io.BytesIO()
    torch.save(best, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    distiller.release()
    images = _batch()["images"]
    assert torch.equal(loaded.eval()(images), distiller.student.eval()(images))
    again = Distiller(Net(6), best, method="attention", example=images)
    again(**_batch())


def test_a_copy_taken_between_two_networks_runs_is_possible() -> None:
    distiller = _distiller("attention")
    distiller.student(_batch()["images"])  # heard, and on a graph, which cannot be copied
    copy.deepcopy(distiller)(**_batch())


def test_a_copy_of_a_released_distiller_has_no_hooks() -> None:
    distiller = _distiller("attention")
    distiller.release()
    assert _hooks(copy.deepcopy(distiller).student) == 0


def test_a_copied_listener_hears_the_copied_network() -> None:
    net = Net(3)
    listener = Listener(net, [Place("a"), Place("fc", before=True)])
    twin, heard = copy.deepcopy((net, listener))
    twin.eval()(_batch()["images"])
    assert heard.take()[Place("a")].shape == (8, 3, 8, 8)
    with pytest.raises(ConfigError, match="returned no tensor"):
        listener.take()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "attention", "kd+srrl"])
def test_a_step_still_compiles_in_one_piece(method: str) -> None:
    plain, distiller = _distiller(method).eval(), _distiller(method).eval()
    compiled = torch.compile(distiller, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**_batch()).total, plain(**_batch()).total)
    twin = torch.compile(copy.deepcopy(plain), backend="eager", fullgraph=True)
    torch.testing.assert_close(twin(**_batch()).total, plain(**_batch()).total)


def test_a_copy_with_a_dismissed_teacher_goes_on() -> None:
    distiller = _distiller("kd+rkd_distance").eval()
    assert distiller.teacher is not None
    given = _batch()
    teacher = distiller.teacher.model
    assert isinstance(teacher, Net)
    answers = {
        "teacher_logits": teacher(given["images"]).detach(),
        "teacher_embedding": teacher.pool(teacher.c(teacher.b(teacher.a(given["images"])))).detach(),
    }
    distiller.dismiss_teacher()
    twin = copy.deepcopy(distiller)
    assert torch.equal(twin(**given, **answers).total, distiller(**given, **answers).total)
