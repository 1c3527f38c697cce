"""What a run is about to do: stages, sizes and estimated costs, from what was measured a moment ago."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from understudy import costs
from understudy.config import RunConfig, TrainConfig
from understudy.costs import Constants, Job, Prediction
from understudy.data.frames import StoredFrames
from understudy.data.packing import Packing
from understudy.models import build, files
from understudy.models.classifier import Classifier
from understudy.pipeline import measuring, teaching
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials, new_student, teacher_kind
from understudy.pipeline.measuring import Bench
from understudy.record import InputSpec, Role


@dataclass(frozen=True)
class Step:
    """One line of a plan."""

    stage: str
    what: str
    seconds: float
    """Estimated; 0 where the stage is done already."""
    disk_bytes: int = 0
    """Likewise; what is written and kept."""
    memory_bytes: int = 0
    """Likewise; the largest memory of a process."""


@dataclass(frozen=True)
class Plan:
    """The stages of a run in order."""

    steps: list[Step]

    @property
    def seconds(self) -> float:
        """Estimated time for all stages."""
        return sum(step.seconds for step in self.steps)

    def text(self) -> str:
        """Return the plan as lines for readers."""
        lines = [
            f"  {step.stage:<9} {step.what}" + (f", about {duration(step.seconds)}" if step.seconds >= 1 else "")
            for step in self.steps
        ]
        return "\n".join(["Plan", *lines, f"  in all about {duration(self.seconds)}"])


class Images(NamedTuple):
    """What is known of the images of a run."""

    counts: dict[str, int]
    """By split."""
    classes: int
    channels: int
    frame_bytes: int
    missing: int
    """Answers of the teacher that are not kept."""
    known: bool
    """Whether they are listed and decoded already."""
    stored: bool
    """Whether their frames are kept, or decoded in every epoch."""
    kept: str
    """The same in words."""


def make(run: Run, materials: Materials) -> Plan:
    """Return the plan of a run whose images are open."""
    constants = replace(measuring.constants(bench(run, materials)), start=0.0)  # that is over by now
    return lay_out(run, images_of(run, materials), constants, numerics_of(materials))


def images_of(run: Run, materials: Materials) -> Images:
    """Return what is known of images that are open."""
    store = materials.store
    return Images(
        counts={name: len(split) for name, split in materials.splits.items()},
        classes=len(store.classes),
        channels=store.channels,
        frame_bytes=store.frames.nbytes // max(len(store.frames), 1),
        missing=_missing(run, materials),
        known=True,
        stored=isinstance(store.frames, StoredFrames),
        kept="stored before" if store.reused else "decoded",
    )


def numerics_of(materials: Materials) -> dict[Role, str]:
    """Return the numerics of teacher and student in words."""
    return {role: str(choice.numerics) for role, choice in materials.choices.items()}


def bench(run: Run, materials: Materials) -> Bench:
    """Return what the networks of a run are measured on."""
    return Bench(
        config=run.config,
        engine=materials.engine,
        store=materials.store,
        classes=len(materials.store.classes),
        policy=materials.policy,
        mix=materials.mix,
        choices=materials.choices,
        networks=_networks(run, materials),
    )


def lay_out(run: Run, images: Images, constants: Constants, numerics: dict[Role, str]) -> Plan:
    """Return the plan of a run.

    Args:
        run: what is asked for, and what is done already.
        images: of the run.
        constants: measured for its networks.
        numerics: of teacher and student, in words.
    """
    job = job_of(run, images)
    predicted = costs.predict(job, constants)
    words = {"data": _data(images), "teacher": _teacher(run.config, numerics)}
    words["evaluate"] = "metrics, size, latency; the test split is read here, once"
    if run.record.kind == "distill":
        words |= {"outputs": _outputs(job), **_students(run.config, numerics)}
        words["export"] = "ONNX, run again and compared"
    steps = [_step(predicted, stage.name, words[stage.name]) for stage in predicted.stages if stage.name in words]
    return Plan([_unless_done(run, step) for step in steps])


def job_of(run: Run, images: Images) -> Job:
    """Return the sizes of a run."""
    config, counts = run.config, images.counts
    distills = run.record.kind == "distill"
    train = config.train
    return Job(
        train=counts["train"],
        val=counts["val"],
        test=counts["test"],
        frame_bytes=images.frame_bytes,
        row_bytes=Packing(images.classes).row.itemsize,
        epochs=train.epochs,
        views=None if train.views == "online" else teaching.distinct_views(run),
        seeds=len(config.seeds) if distills else 0,
        batch=train.batch_size,
        teacher_epochs=0 if _is_ready(config) else config.teacher_train.epochs,
        teacher_batch=config.teacher_train.batch_size,
        to_list=0 if images.known else None,
        to_decode=0 if images.known else None,
        stored=images.stored,
        to_answer=images.missing,
        checkpoint_every=max(config.checkpoint_seconds, 1.0),
    )


def some_teacher(config: RunConfig, classes: Sequence[str], spec: InputSpec) -> Classifier:
    """Return a network of the teacher's kind; its weights change no figure."""
    if teacher_kind(config) in ("file", "run"):
        return files.load(Path(config.teacher.model), prefer="teacher")[0]
    return build.build(config.teacher.model, classes=classes, spec=spec, seed=0)


def _missing(run: Run, materials: Materials) -> int:
    """Return how many answers of the teacher the run's students still need."""
    if run.record.kind != "distill" or all(f"student-{seed}" in run.record.stages for seed in run.config.seeds):
        return 0
    return teaching.missing(run, materials)


def _networks(run: Run, materials: Materials) -> dict[Role, partial[Classifier]]:
    classes = materials.store.classes
    made: dict[Role, partial[Classifier]] = {
        "teacher": partial(some_teacher, run.config, classes, materials.teacher_spec)
    }
    if run.record.kind == "distill":
        made["student"] = partial(new_student, run, materials, 0)
    return made


def _step(predicted: Prediction, name: str, what: str) -> Step:
    stage = predicted[name]
    return Step(name, what, stage.seconds, stage.disk_bytes, stage.memory_bytes)


def _unless_done(run: Run, step: Step) -> Step:
    names = [name for name in run.record.stages if name == step.stage or name.startswith(f"{step.stage}-")]
    wanted = len(run.config.seeds) if step.stage in ("baseline", "student") else 1
    left = max(0, wanted - len(names)) / wanted
    what = step.what + (" (done)" if left == 0 else "")
    return Step(step.stage, what, step.seconds * left, round(step.disk_bytes * left), step.memory_bytes if left else 0)


def _data(images: Images) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in images.counts.items())
    grey = "grey" if images.channels == 1 else "colour"
    megabytes = sum(images.counts.values()) * images.frame_bytes / 1e6
    return f"{counts} images, {images.classes} classes, {grey}, {megabytes:.0f} MB {images.kept}"


def _teacher(config: RunConfig, numerics: dict[Role, str]) -> str:
    if _is_ready(config):
        return f"{config.teacher.model}, loaded and checked"
    return f"{config.teacher.model}, trained {_epochs(config.teacher_train)}, {numerics['teacher']}, then checked"


def _outputs(job: Job) -> str:
    """Say what the teacher still has to tell the students."""
    if job.views is None:
        return f"the teacher runs along, {job.unanswered:,} answers"
    megabytes = job.answers * job.row_bytes / 1e6
    kept = f"{job.views} views x {job.train:,} images, at most {megabytes:,.1f} MB"
    return f"of the teacher, {kept}" + ("" if job.unanswered else " (kept before)")


def _students(config: RunConfig, numerics: dict[Role, str]) -> dict[str, str]:
    times = "once" if len(config.seeds) == 1 else f"{len(config.seeds)} times"
    model, objective = config.student.model, config.distill
    return {
        "baseline": f"{model} alone, {times}, {_epochs(config.train)}, {numerics['student']}",
        "student": f"{model} distilled ({objective.method}, T={objective.temperature:g}), {times}",
    }


def _epochs(config: TrainConfig) -> str:
    return f"{config.epochs} epochs"


def _is_ready(config: RunConfig) -> bool:
    """Tell whether the teacher needs no training."""
    return config.teacher.ready or teacher_kind(config) in ("file", "run")


def duration(seconds: float) -> str:
    """Return a time in words, as exact as an estimate can be."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
