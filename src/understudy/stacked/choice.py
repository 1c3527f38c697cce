"""Whether students are faster together than one by one: measured where they are to be trained, and kept.

How many fit is estimated from what one step keeps, then tried; where the memory is full, half as many are tried.
"""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from understudy import storage
from understudy.data.batches import Batch
from understudy.distillation import Distiller
from understudy.errors import UnderstudyError
from understudy.evaluate import profile
from understudy.numerics import Numerics
from understudy.stacked.objectives import Objectives
from understudy.stacked.stepper import Stepper, Student

_WORTH = 1.15  # as much faster the stack must be, or the noise of the machine would decide
_WARMUP, _STEPS = 3, 8
_SHARE = 0.5  # of the free memory
_COPIES = 5  # of the weights: themselves, gradient, two moments, the best epoch's
_NEVER = 1e9  # seconds a step


@dataclass(frozen=True)
class Choice:
    """How many students are trained together, and what was measured."""

    students: int
    """At most so many together; 1 where two do not fit, or the network cannot be stacked."""
    stacked_seconds: float
    """A step of all of them."""
    single_seconds: float
    """A step of one."""

    @property
    def ratio(self) -> float:
        """How many times as fast as one by one they are together."""
        return self.students * self.single_seconds / self.stacked_seconds

    @property
    def pays(self) -> bool:
        """Whether they should be trained together."""
        return self.students > 1 and self.ratio >= _WORTH

    def __str__(self) -> str:
        if self.students == 1:
            return "students cannot be trained together here"
        return (
            f"a step of {self.students} students takes {1e3 * self.stacked_seconds:.2f} ms together, "
            f"{1e3 * self.students * self.single_seconds:.2f} ms one by one ({self.ratio:.2f} times as fast)"
        )


def choose(students: Sequence[Student], batch: Batch, *, numerics: Numerics, key: dict[str, object]) -> Choice:
    """Measure a few steps of students together and one by one, in turns, unless that was done before.

    Args:
        students: those that are to be trained; they are not changed.
        batch: as they will meet them, with the teacher's logits where a term needs these.
        numerics: of the single training; together, only its precision counts.
        key: what names the network; with machine, batch and objectives, it names the kept choice.
    """
    losses = len(Objectives([student.terms for student in students], torch.device("cpu")))
    own = {"stacked": len(students), "numerics": str(numerics), "losses": losses}
    place = storage.cache_dir() / "numerics" / f"{storage.fingerprint(key | own | _machine(batch.images))}.json"
    kept = _read(place)
    if kept is not None:
        return kept
    found = measure(students, batch, numerics=numerics)
    if found.students > 1:  # else the memory may have been full for once
        with contextlib.suppress(OSError, UnderstudyError):  # no cache only means to measure again next time
            storage.write_json(place, asdict(found))
    return found


def measure(
    students: Sequence[Student], batch: Batch, *, numerics: Numerics, warmup: int = _WARMUP, steps: int = _STEPS
) -> Choice:
    """Measure as `choose`, always; the shortest of some steps each, taken in turns."""
    together = min(len(students), affordable(students[0], batch))
    stacked: Callable[[], object] | None = None
    with torch.random.fork_rng(devices=[]):
        single = single_step(students[0], batch, numerics)
        while together > 1:
            try:
                stacked = stacked_step(students[:together], batch, numerics)
                return Choice(together, *_in_turns(stacked, single, batch, warmup, steps))
            except torch.OutOfMemoryError:
                stacked = None
                together //= 2
            except RuntimeError:  # what vmap cannot take, such as control flow that depends on values
                break
    return Choice(1, _NEVER, _NEVER)


def stacked_step(students: Sequence[Student], batch: Batch, numerics: Numerics) -> Callable[[], object]:
    """Return a function that trains copies of students together on a batch."""
    stepper = Stepper([_copied(student) for student in students], batch.images.device, numerics)
    stepper.networks.train(True)
    return lambda: stepper.step(batch, 1.0)


def single_step(student: Student, batch: Batch, numerics: Numerics) -> Callable[[], object]:
    """Return a function that trains a copy of one student on a batch, as `Training` would."""
    network = numerics.prepare(_copied(student).network.to(batch.images.device)).train()
    objective = Distiller(None, network, terms=student.terms)
    forward = torch.compile(objective, dynamic=False) if numerics.compiled else objective
    optimizer = torch.optim.AdamW(network.parameters(), lr=student.config.lr, fused=batch.images.device.type != "mps")

    def step() -> None:
        with numerics.autocast(batch.images.device):
            losses = forward(numerics.layout(batch.images), batch.labels, teacher_logits=batch.teacher_logits)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def affordable(student: Student, batch: Batch) -> int:
    """Return for how many students the memory of the device should suffice, at least 1; a first guess."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network = _copied(student).network.to(batch.images.device).train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(batch.images)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    each = _COPIES * weights + 2 * sum(kept.values())  # the gradients of what is kept take as much again
    return max(1, int(_SHARE * profile.free_memory(batch.images.device) / max(each, 1)))


def _copied(student: Student) -> Student:
    return replace(student, network=copy.deepcopy(student.network))


def _in_turns(
    stacked: Callable[[], object], single: Callable[[], object], batch: Batch, warmup: int, steps: int
) -> tuple[float, float]:
    """Return the shortest of some steps of each, in seconds."""
    turns = [(_seconds(stacked, batch), _seconds(single, batch)) for _ in range(warmup + steps)][warmup:]
    return min(one for one, _ in turns), min(other for _, other in turns)


def _seconds(step: Callable[[], object], batch: Batch) -> float:
    start = time.perf_counter()
    step()
    if batch.images.device.type == "cuda":
        torch.cuda.synchronize(batch.images.device)
    return time.perf_counter() - start


def _machine(images: Tensor) -> dict[str, object]:
    cuda = images.device.type == "cuda"
    return {
        "shape": list(images.shape),
        "device": torch.cuda.get_device_name(images.device) if cuda else str(images.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine() + platform.processor(),
    }


def _read(place: Path) -> Choice | None:
    try:
        values = storage.read_json(place)
        choice = Choice(int(values["students"]), float(values["stacked_seconds"]), float(values["single_seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = choice.students > 0 and min(choice.stacked_seconds, choice.single_seconds) > 0
    return choice if sound else None
