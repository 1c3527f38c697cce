"""What a run is about to do: stages, sizes and estimated time, from what was measured a moment ago."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.config import TrainConfig
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials, teacher_kind
from understudy.record import Role

_FORWARD = 1 / 3  # of a training step: forward, and backward twice as long
_EXPORT_SECONDS = 15.0
_PROFILE_SECONDS = 8.0


@dataclass(frozen=True)
class Step:
    """One line of a plan."""

    stage: str
    what: str
    seconds: float
    """Estimated; 0 where the stage is done already."""


@dataclass(frozen=True)
class Plan:
    """The stages of a run in order."""

    steps: list[Step]

    @property
    def seconds(self) -> float:
        """Estimated time for all stages."""
        return sum(step.seconds for step in self.steps)


def make(run: Run, materials: Materials) -> Plan:
    """Return the plan of a run."""
    steps = [_data(run, materials), _teacher(run, materials)]
    if run.record.kind == "distill":
        seeds = len(run.config.seeds)
        times = "once" if seeds == 1 else f"{seeds} times"
        config = run.config.train
        alone = _training(materials, "student", config)
        model = run.config.student.model
        objective = run.config.distill
        budget = f"{config.epochs} epochs, {materials.choices['student'].numerics}"
        steps += [
            Step("baseline", f"{model} alone, {times}, {budget}", seeds * alone),
            Step(
                "student",
                f"{model} distilled ({objective.method}, T={objective.temperature:g}), {times}",
                seeds * (alone + _answering(materials, config)),
            ),
        ]
    steps.append(Step("evaluate", "metrics, size, latency; the test split is read here, once", _PROFILE_SECONDS))
    if run.record.kind == "distill":
        steps.append(Step("export", "ONNX, run again and compared", _EXPORT_SECONDS))
    return Plan([_unless_done(run, step) for step in steps])


def _unless_done(run: Run, step: Step) -> Step:
    names = [name for name in run.record.stages if name == step.stage or name.startswith(f"{step.stage}-")]
    wanted = len(run.config.seeds) if step.stage in ("baseline", "student") else 1
    left = max(0, wanted - len(names)) / wanted
    return Step(step.stage, step.what + (" (done)" if left == 0 else ""), step.seconds * left)


def _data(run: Run, materials: Materials) -> Step:
    store = materials.store
    counts = ", ".join(f"{len(split)} {name}" for name, split in materials.splits.items())
    kept = "stored before" if store.reused else "decoded"
    grey = "grey" if store.channels == 1 else "colour"
    megabytes = store.frames.nbytes / 1e6
    return Step("data", f"{counts} images, {len(store.classes)} classes, {grey}, {megabytes:.0f} MB {kept}", 0.0)


def _teacher(run: Run, materials: Materials) -> Step:
    config = run.config.teacher
    if config.ready or teacher_kind(run.config) in ("file", "run"):
        return Step("teacher", f"{config.model}, loaded and checked", 1.0)
    budget = run.config.teacher_train
    numerics = materials.choices["teacher"].numerics
    return Step(
        "teacher",
        f"{config.model}, trained {budget.epochs} epochs, {numerics}, then checked",
        _training(materials, "teacher", budget),
    )


def _training(materials: Materials, role: Role, config: TrainConfig) -> float:
    step = materials.choices[role].step_seconds
    steps = materials.epochs(config.batch_size).steps
    judged = len(materials.splits["val"]) / config.batch_size * _FORWARD
    return config.epochs * (steps + judged) * step


def _answering(materials: Materials, config: TrainConfig) -> float:
    return (
        config.epochs * materials.epochs(config.batch_size).steps * materials.choices["teacher"].step_seconds * _FORWARD
    )
