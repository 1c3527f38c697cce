"""What a run is about to do: stages, sizes and estimated costs, from what was measured a moment ago."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from understudy import costs
from understudy.config import RunConfig, TrainConfig
from understudy.costs import Constants, Job, Network, Prediction
from understudy.data.frames import StoredFrames
from understudy.data.packing import Packing
from understudy.data.unlabelled import PART as UNLABELLED
from understudy.models import build, files
from understudy.models.classifier import Classifier
from understudy.numerics import Choice
from understudy.pipeline import chain, measuring, objective, teaching
from understudy.pipeline.chain import Link
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials, is_trained, new_student
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

    @property
    def width(self) -> int:
        """Letters that the longest name of a stage takes."""
        return max(9, *(len(step.stage) for step in self.steps))

    def text(self) -> str:
        """Return the plan as lines for readers."""
        lines = [
            f"  {step.stage:<{self.width}} {step.what}"
            + (f", about {duration(step.seconds)}" if step.seconds >= 1 else "")
            for step in self.steps
        ]
        return "\n".join(["Plan", *lines, f"  in all about {duration(self.seconds)}"])


class Images(NamedTuple):
    """What is known of the images of a run."""

    counts: dict[str, int]
    """By split; "unlabelled" is one of them where some training images have no label."""
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
    return lay_out(run, images_of(run, materials), constants, numerics_of(materials), materials.others)


def images_of(run: Run, materials: Materials) -> Images:
    """Return what is known of images that are open."""
    store = materials.store
    return Images(
        counts={name: len(rows) for name, rows in store.splits.items()},
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


def lay_out(
    run: Run, images: Images, constants: Constants, numerics: dict[Role, str], others: Mapping[str, Choice]
) -> Plan:
    """Return the plan of a run.

    Args:
        run: what is asked for, and what is done already.
        images: of the run.
        constants: measured for its networks.
        numerics: of teacher and student, in words.
        others: of further teachers and of assistants, by name.
    """
    job = job_of(run, images)
    constants = _of_all_teachers(run.config, constants, others)
    predicted = costs.predict(job, constants)
    words = {"data": _data(images), "teacher": _teacher(run.config, numerics)}
    words["evaluate"] = "metrics, size, latency; the test split is read here, once"
    if run.record.kind == "distill":
        words |= {"outputs": _outputs(job), **_students(run.config, numerics)}
        words["export"] = "ONNX, run again and compared"
    steps = [_step(predicted, stage.name, words[stage.name]) for stage in predicted.stages if stage.name in words]
    added = _added(run.config, job, constants, others) if run.record.kind == "distill" else {}
    first = next(iter(chain.teachers(run.config)))
    named = ((replace(step, stage=first) if step.stage == "teacher" else step, step.stage) for step in steps)
    whole = [one for step, stage in named for one in (step, *added.get(stage, []))]
    return Plan([_unless_done(run, step) for step in whole])


def job_of(run: Run, images: Images) -> Job:
    """Return the sizes of a run."""
    config, counts = run.config, images.counts
    distills = run.record.kind == "distill"
    train = config.train
    return Job(
        train=counts["train"] + counts.get(UNLABELLED, 0),  # as many steps for those that see the former only
        val=counts["val"],
        test=counts["test"],
        frame_bytes=images.frame_bytes,
        row_bytes=Packing(images.classes).row.itemsize,
        epochs=train.epochs,
        views=None if teaching.runs_along(run.config) else teaching.distinct_views(run),
        seeds=len(config.seeds) if distills else 0,
        batch=train.batch_size,
        teacher_epochs=_teacher_epochs(config),
        teacher_batch=config.teacher_train.batch_size,
        to_list=0 if images.known else None,
        to_decode=0 if images.known else None,
        stored=images.stored,
        to_answer=images.missing,
        checkpoint_every=max(config.checkpoint_seconds, 1.0),
    )


def some_teacher(config: RunConfig, classes: Sequence[str], spec: InputSpec) -> Classifier:
    """Return a network of the teacher's kind; its weights change no figure."""
    if is_trained(config):
        return files.load(Path(config.teacher.model), prefer="teacher")[0]
    return build.build(config.teacher.model, classes=classes, spec=spec, seed=0)


def _missing(run: Run, materials: Materials) -> int:
    """Return how many answers of the teacher the run's students still need."""
    if run.record.kind != "distill" or all(name in run.record.stages for name in chain.taught_by_teacher(run.config)):
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
    several = step.stage.startswith(("baseline", "generation", "student"))
    wanted = len(run.config.seeds) if several else 1
    left = max(0, wanted - len(names)) / wanted
    what = step.what + (" (done)" if left == 0 else "")
    return Step(step.stage, what, step.seconds * left, round(step.disk_bytes * left), step.memory_bytes if left else 0)


def _of_all_teachers(config: RunConfig, constants: Constants, others: Mapping[str, Choice]) -> Constants:
    """Return constants by which the teacher answers as all of an ensemble do, one after the other."""
    more = list(chain.teachers(config).items())[1:]
    each = [constants.teacher, *(_like(constants.teacher, others[name], one.teacher_train) for name, one in more)]
    answer, judge = sum(one.answer for one in each), sum(one.judge for one in each)
    return replace(constants, teacher=replace(constants.teacher, answer=answer, judge=judge))


def _like(network: Network, choice: Choice, budget: TrainConfig) -> Network:
    """Return the constants of another network, of which only a training step was measured."""
    step = choice.step_seconds / budget.batch_size
    times = step / network.step if network.step else 1.0
    return replace(network, step=step, answer=times * network.answer, judge=times * network.judge)


def _added(config: RunConfig, job: Job, constants: Constants, others: Mapping[str, Choice]) -> dict[str, list[Step]]:
    """Return the steps of further teachers, assistants and generations, by the step that they follow."""
    more = list(chain.teachers(config))[1:]
    numbers = range(1, config.distill.generations)
    return {
        "teacher": [_further_teacher(config, name, job, constants, others[name]) for name in more],
        "outputs": [_assistant(config, link, job, constants, others[link.name]) for link in chain.assistants(config)],
        "baseline": [_generation(config, number, job, constants) for number in numbers],
    }


def _further_teacher(config: RunConfig, name: str, job: Job, constants: Constants, choice: Choice) -> Step:
    own = chain.teachers(config)[name]
    network = _like(constants.teacher, choice, own.teacher_train)
    predicted = costs.predict(replace(job, teacher_epochs=_teacher_epochs(own)), replace(constants, teacher=network))
    return replace(_step(predicted, "teacher", _teacher(own, {"teacher": str(choice.numerics)})), stage=name)


def _assistant(config: RunConfig, link: Link, job: Job, constants: Constants, choice: Choice) -> Step:
    """Plan an assistant, and its answers; for memory and disk it is taken to be as large as the teacher."""
    heavy, network = constants.teacher, _like(constants.student, choice, config.train)
    network = replace(network, weight_bytes=heavy.weight_bytes, memory_bytes=heavy.memory_bytes)
    what = f"{link.model} distilled by the {link.teacher}, once, {_epochs(config.train)}, {choice.numerics}"
    return _link(link.name, what, replace(job, seeds=1), replace(constants, student=network))


def _generation(config: RunConfig, number: int, job: Job, constants: Constants) -> Step:
    times = "once" if job.seeds == 1 else f"{job.seeds} times"
    what = f"{config.student.model} distilled, {times}, to teach the next generation"
    return _link(f"generation-{number}", what, job, constants)


def _link(name: str, what: str, job: Job, constants: Constants) -> Step:
    """Plan models that learn as students do and are asked as teachers are, one for each seed of the job."""
    predicted = costs.predict(job, constants)
    trained = predicted["student"]
    answers = job.seeds * job.train * (job.epochs if job.views is None else job.views)
    seconds = trained.seconds + answers * (constants.student.answer + constants.pack)
    disk = 0 if job.views is None else answers * job.row_bytes
    return Step(name, what, seconds, trained.disk_bytes + disk, trained.memory_bytes)


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
    model, distill = config.student.model, config.distill
    return {
        "baseline": f"{model} alone, {times}, {_epochs(config.train)}, {numerics['student']}",
        "student": f"{model} distilled ({distill.method}, T={objective.temperature(distill):g}), {times}",
    }


def _epochs(config: TrainConfig) -> str:
    return f"{config.epochs} epochs"


def _teacher_epochs(config: RunConfig) -> int:
    return 0 if _is_ready(config) else config.teacher_train.epochs


def _is_ready(config: RunConfig) -> bool:
    """Tell whether the teacher needs no training."""
    return config.teacher.ready or is_trained(config)


def duration(seconds: float) -> str:
    """Return a time in words, as exact as an estimate can be."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
