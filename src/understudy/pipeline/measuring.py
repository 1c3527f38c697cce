"""The constants of the cost model, measured by doing a little of everything a run does with its own images.

The real training loop takes a few steps, so views, optimizer and losses are in the figure. What was measured is kept
per machine, as the choice of numerics is. Imported by the plan and by `forecasting.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from understudy import numerics, storage
from understudy.config import DistillConfig, RunConfig, TrainConfig
from understudy.costs import Constants, Network
from understudy.data import views
from understudy.data.batches import Epochs, Split
from understudy.data.frames import StoredFrames
from understudy.data.mixing import Mix
from understudy.data.outputs import Answers, Table, Viewed, block_rows
from understudy.data.packing import Packing
from understudy.data.rowfile import RowFile
from understudy.data.store import Store
from understudy.data.views import ViewPolicy
from understudy.distillation import Distiller
from understudy.engine import Engine
from understudy.errors import Interrupted, UnderstudyError
from understudy.evaluate import profile
from understudy.models.classifier import Classifier
from understudy.numerics import Choice, Running
from understudy.pipeline import objective
from understudy.record import Role
from understudy.train import Training, answers

_FORMAT = "understudy-costs/1"
_WARMUP, _FEWEST, _SECONDS, _MOST_SECONDS = 2, 4, 0.7, 4.0
_EPOCH = _WARMUP + _FEWEST  # steps
_JUDGED = 256  # images, as many as evaluation takes at once
_DRAWN = 100_000
_DECODED = 64
_ROWS = 1024
_WRITTEN = 8 << 20  # bytes
_RUNS, _PROFILE_BUDGET = 240, 20.0  # passes of one image that `evaluate.profile` times, warm-ups included; seconds
# Not measured anew for each run; see docs/scale.md
_START, _PROFILE, _EXPORT = 5.0, 1.0, 5.0
_LISTED_BYTES, _DRAWN_BYTES = 900, 200


@dataclass(frozen=True, eq=False)
class Bench:
    """What is tried: the networks of a run, on a few of its images."""

    config: RunConfig
    engine: Engine
    store: Store
    """Of all images, or of a few."""
    classes: int
    policy: ViewPolicy
    mix: Mix | None
    choices: dict[Role, Choice]
    networks: Mapping[Role, Callable[[], Classifier]]
    """Makes the teacher and the student; called when nothing is kept."""

    def key(self) -> str:
        """Name all that the constants depend on."""
        store = self.store
        geometry = [
            type(store.frames).__name__,
            store.image_size,
            *store.frames.shape[1:],
            self.classes,
            self.policy.describe(),
        ]
        models = [self.config.teacher.model, self.config.student.model, self.config.distill.method]
        sizes = [self.config.train.batch_size, self.config.teacher_train.batch_size, str(self.mix)]
        chosen = {role: str(choice.numerics) for role, choice in self.choices.items()}
        return storage.fingerprint([_FORMAT, geometry, models, sizes, chosen, _machine(self.engine)])

    def images(self, count: int) -> Split:
        """Return training images, the same ones again where there are fewer than `count`."""
        rows = self.store.splits["train"][:_ROWS]
        frames = torch.from_numpy(self.store.frames[rows])
        repeated = np.resize(np.arange(len(rows)), count)
        return Split(
            frames,
            self.store.labels[rows] % self.classes,
            self.store.ids[rows],
            repeated,
            size=self.store.image_size,
            device=self.engine.device,
            classes=self.classes,
        )


def constants(bench: Bench) -> Constants:
    """Return what was measured, now or before; listing and decoding are not, so they stay 0."""
    threads = torch.get_num_threads()
    if bench.config.threads:
        torch.set_num_threads(bench.config.threads)
    try:
        return _constants(bench)
    finally:
        torch.set_num_threads(threads)


def _constants(bench: Bench) -> Constants:
    place = storage.cache_dir() / "costs" / f"{bench.key()}.json"
    kept = _read(place)
    if kept is not None:
        return kept
    with torch.random.fork_rng(devices=[]):
        measured = _measure(bench)
    with contextlib.suppress(OSError, UnderstudyError):  # no cache only means to measure again next time
        storage.write_json(place, dataclasses.asdict(measured))
    return measured


def _measure(bench: Bench) -> Constants:
    base = profile.peak_rss() or 0
    made = {role: make().to(bench.engine.device) for role, make in bench.networks.items()}
    # the student first: of the larger teacher's peak it would not be told apart
    student = network(bench, made["student"], "student") if "student" in made else None
    teacher = network(bench, made["teacher"], "teacher")
    packing = Packing(bench.classes)
    pack = read = write_byte = 0.0
    with contextlib.suppress(OSError, UnderstudyError):  # a full disk is told of where it matters
        pack, read = rows(packing, block_rows(bench.store.image_size))
        write_byte = _write_byte()
    return Constants(
        teacher=teacher,
        student=student or teacher,
        decode=_decode(bench),
        draw=_draw(bench),
        pack=pack,
        read=read,
        write_byte=write_byte,
        start=_START,
        profile=_PROFILE + _profile(made, bench),
        export=_EXPORT,
        base_bytes=base,
        listed_bytes=_LISTED_BYTES,
        drawn_bytes=_DRAWN_BYTES,
    )


def network(bench: Bench, made: Classifier, role: Role) -> Network:
    """Measure one network in the role of teacher or student."""
    step, epoch = _step(bench, made, role)
    memory = profile.peak_rss() or 0
    return Network(
        step=step / _recipe(bench, role).batch_size,
        epoch=epoch,
        answer=_answer(bench, made, role),
        judge=_judge(bench, made, role),
        weight_bytes=sum(tensor.nbytes for tensor in made.net.state_dict().values()),
        memory_bytes=memory,
    )


class _Random(Table):
    """Answers like those of a teacher, in memory: speed does not depend on what they say."""

    def __init__(self, images: int, classes: int, device: torch.device) -> None:
        self._logits = torch.randn(images, classes, generator=torch.Generator().manual_seed(0)).half().to(device)

    def rows(self, positions: Tensor) -> Answers:
        return Answers(self._logits[positions.to(self._logits.device) % len(self._logits)].float())


class _Alone(Engine):
    """The engine of one process that waits for no other, even where there are others."""

    @property
    def shard(self) -> tuple[int, int]:
        return 0, 1


def _step(bench: Bench, made: Classifier, role: Role) -> tuple[float, float]:
    """Return the seconds of a step, of the student with the teacher's answers at hand, and of an epoch beside steps."""
    config = _recipe(bench, role)
    chosen = bench.choices[role]
    images = bench.images(_EPOCH * config.batch_size)
    table = _Random(_ROWS, bench.classes, bench.engine.device) if role == "student" else None
    moments: list[float] = []
    trained = Training(
        _objective(bench, made, taught=table is not None),
        Epochs(
            images,
            policy=bench.policy,
            view_seed=0,
            batch_size=config.batch_size,
            mix=bench.mix if config.mix != "none" else None,
            outputs=(lambda view: table) if table else None,
        ),
        bench.images(2),
        config.model_copy(update={"epochs": 1000}),
        seed=0,
        engine=_Alone(device=bench.config.device, threads=bench.config.threads),
        numerics=replace(chosen.numerics, compiled=False),
        stop=lambda: _enough(moments, bench.engine),
    )
    with contextlib.suppress(Interrupted):
        trained.run()
    step, epoch = _told_apart(np.diff(moments))
    return step + (_compiling_saves(bench, made, role) if chosen.numerics.compiled else 0.0), epoch


def _told_apart(gaps: NDArray[np.float64]) -> tuple[float, float]:
    """Return the seconds of a step and, where an epoch came to its end, what that took more, from all gaps in turn."""
    last = np.arange(1, len(gaps) + 1) % _EPOCH == 0
    step = float(np.median(gaps[_WARMUP - 1 :][~last[_WARMUP - 1 :]]))
    return step, max(float(np.median(gaps[last])) - step, 0.0) if last.any() else 0.0


def _objective(bench: Bench, made: Classifier, *, taught: bool) -> Distiller:
    if not taught:
        return Distiller(None, made)
    # what compares features needs the teacher, whose time is counted apart
    terms = [term for term in objective.terms(bench.config.distill) if not term.takes_features]
    return Distiller(None, made, terms=terms or objective.terms(DistillConfig()))


def _enough(moments: list[float], engine: Engine) -> bool:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    moments.append(time.perf_counter())
    steps, spent = len(moments) - _WARMUP, moments[-1] - moments[0]
    return (steps >= _FEWEST and spent > _SECONDS) or (steps > 1 and spent > _MOST_SECONDS)


def _compiling_saves(bench: Bench, made: Classifier, role: Role) -> float:
    """Return how much longer, or rather shorter, a compiled step takes; compiling again would take too long."""
    batch = next(bench.images(_recipe(bench, role).batch_size).whole(_recipe(bench, role).batch_size))
    eager = numerics.choose(
        made, batch, classes=bench.classes, requested=bench.config.precision, key={"eager": bench.key(), "role": role}
    )
    return bench.choices[role].step_seconds - eager.step_seconds


def _answer(bench: Bench, made: Classifier, role: Role) -> float:
    """Return the seconds in which a network sees a view and answers, for one image."""
    block = block_rows(bench.store.image_size)
    images = Viewed(bench.images(2 * block), bench.policy, 0).through(0)
    running = Running(made, numerics.for_answers(bench.choices[role].numerics)).eval()

    def ask() -> None:
        with torch.inference_mode():
            running(images(slice(0, block))).cpu()

    return _shortest(ask) / block


def _judge(bench: Bench, made: Classifier, role: Role) -> float:
    split = bench.images(_JUDGED)
    return _shortest(lambda: answers(made, split, numerics=bench.choices[role].numerics)) / _JUDGED


def rows(packing: Packing, block: int) -> tuple[float, float]:
    """Return the seconds in which a row of answers is packed and written, and in which one is read at random."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (block, packing.classes)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = RowFile(Path(folder) / "rows", packing.row, block, block=block, salt="")
        write = _shortest(lambda: file.write(0, packing.pack(logits)))
        wanted = generator.integers(0, block, 64)

        def read() -> None:
            taken = file.take(wanted)
            assert taken is not None
            packing.logits(taken)

        seconds = _shortest(read)
        file.close()
    return write / block, seconds / len(wanted)


def _decode(bench: Bench) -> float:
    """Return what a frame that is not stored takes; of a stored one, a training step knows already."""
    frames = bench.store.frames
    if isinstance(frames, StoredFrames):
        return 0.0
    wanted = bench.store.splits["train"][:_DECODED]
    return _shortest(lambda: frames.read(wanted), times=1) / len(wanted)


def _draw(bench: Bench) -> float:
    ids = np.arange(_DRAWN, dtype=np.uint64)

    def draw() -> None:
        torch.randperm(_DRAWN)
        views.draw(ids, bench.policy, seed=0, view=0)

    return _shortest(draw) / _DRAWN


def _write_byte() -> float:
    data = os.urandom(_WRITTEN)
    with tempfile.TemporaryDirectory() as folder:
        return _shortest(lambda: storage.write_bytes(Path(folder) / "file", data)) / _WRITTEN


def _profile(made: dict[Role, Classifier], bench: Bench) -> float:
    """Return the seconds in which the latencies of teacher, baseline and student are measured."""
    example = next(bench.images(1).whole(1)).cpu()
    found = profile.latencies({role: one.to("cpu") for role, one in made.items()}, dict.fromkeys(made, example), runs=5)
    times = {"teacher": 1, "student": 2}
    return min(_PROFILE_BUDGET, _RUNS * sum(times[role] * one.p50 / 1e3 for role, one in found.items()))


def _shortest(work: Callable[[], object], times: int = 3) -> float:
    """Return the seconds of the shortest of some: other work only slows one down, and the first one warms up."""
    spent: list[float] = []
    while len(spent) < times and (len(spent) < 2 or sum(spent) < _SECONDS):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def _recipe(bench: Bench, role: Role) -> TrainConfig:
    return bench.config.teacher_train if role == "teacher" else bench.config.train


def _machine(engine: Engine) -> dict[str, Any]:
    return {
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine() + platform.processor(),
        "versions": {name: metadata.version(name) for name in ("torch", "understudy")},
    }


def _read(place: Path) -> Constants | None:
    try:
        values: dict[str, Any] = storage.read_json(place)
        teacher, student = Network(**values.pop("teacher")), Network(**values.pop("student"))
        return Constants(teacher=teacher, student=student, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
