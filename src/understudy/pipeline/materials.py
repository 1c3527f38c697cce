"""What the stages work with: the images, the engine, and how to make each network."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from understudy import cachefolder, numerics
from understudy.config import RunConfig, TrainConfig
from understudy.data import views
from understudy.data.batches import Epochs, Split
from understudy.data.mixing import Mix
from understudy.data.store import Store, open_store
from understudy.data.unlabelled import PART as UNLABELLED
from understudy.data.views import ViewPolicy
from understudy.engine import Engine
from understudy.errors import ConfigError, RunError
from understudy.models import build, files, norms
from understudy.models.classifier import Classifier
from understudy.numerics import Choice
from understudy.pipeline import chain, objective
from understudy.pipeline.folder import Run
from understudy.record import ROLES, DataSummary, Environment, InputSpec, Role

if TYPE_CHECKING:
    from understudy.data.outputs import Table

VIEW_SEED = 0  # the same views for teacher, baseline and student of every seed: what depends on a view can be shared
_LISTED = 100  # files named in a record
_STATISTICS_FROM = 2000  # images


@dataclass(frozen=True, eq=False)
class Materials:
    """Everything that is the same for all trainings of a run."""

    store: Store
    engine: Engine
    splits: dict[str, Split]
    """Of "train", "val" and "test", in which every image has a label."""
    policy: ViewPolicy
    mix: Mix | None
    spec: InputSpec
    """What the student's input is made of."""
    teacher_spec: InputSpec
    """Likewise for a teacher that is trained here."""
    choices: dict[Role, Choice]
    """Numerics of the teacher and of the student (the baseline's are the student's)."""
    others: dict[str, Choice] = field(default_factory=dict)
    """Numerics of further teachers and of assistants, by name."""

    def choice(self, name: str, role: Role) -> Choice:
        """Return the numerics of a model."""
        return self.others.get(name) or self.choices["teacher" if role in ("teacher", "member") else "student"]

    @cached_property
    def taught(self) -> Split:
        """What whoever is taught sees: the training images and those without a label."""
        if not self.store.unlabelled:
            return self.splits["train"]
        rows = np.sort(np.concatenate([self.store.splits["train"], self.store.splits[UNLABELLED]]))
        return _split(self.store, rows, self.engine)

    def epochs(
        self, config: TrainConfig, outputs: Callable[[int], Table] | None = None, *, role: Role | None = None
    ) -> Epochs:
        """Return the training images, shuffled and seen through views, with kept outputs of the teacher.

        Images without a label are seen by those only whom a teacher teaches. So that the budget is the same, an epoch
        of any other training is then as many steps as one of theirs: several passes through the labelled images.

        Args:
            config: the recipe.
            outputs: of the teacher.
            role: who is trained; None where students of several roles are trained together.

        Raises:
            ConfigError: students are trained together, and some images have no label.
        """
        if self.store.unlabelled and role is None:
            raise ConfigError("Students of images without a label are trained one by one: set sweep.stacked to never.")
        whole = self._epochs(self.taught, config, outputs)
        if not self.store.unlabelled or role in ("student", "assistant"):
            return whole
        return self._epochs(self.splits["train"], config, outputs, steps=whole.steps)

    def _epochs(
        self, split: Split, config: TrainConfig, outputs: Callable[[int], Table] | None, *, steps: int | None = None
    ) -> Epochs:
        return Epochs(
            split,
            policy=self.policy,
            view_seed=VIEW_SEED,
            batch_size=config.batch_size,
            views=None if config.views == "online" else config.views,
            mix=self.mix if config.mix != "none" else None,
            outputs=outputs,
            steps=steps,
        )


def gather(run: Run) -> Materials:
    """Open the images, choose device and numerics, and note all of it in the record.

    Raises:
        UnderstudyError: data, models or device that cannot be used.
    """
    config = run.config
    cachefolder.limit()  # nonsense is told before anything long
    chain.check(config, run.record)
    store, size = _open(run)
    _refuse_other_images(run, store)
    engine = Engine(device=config.device, threads=config.threads)
    _refuse_small_batches(config, engine)
    _refuse_without_labels(run, store, engine)
    if not engine.is_alone:
        run.log(f"{engine.shard[1]} processes, the main one on {engine.device}")
    spec, teacher_spec = _specs(store, size)
    splits = {name: _split(store, rows, engine) for name, rows in store.splits.items() if name != UNLABELLED}
    choices = _choices(run, store, engine, splits["train"], _networks(run, spec, teacher_spec))
    policy = views.policy(config.train.augment, config.data.source)
    mix = Mix(config.train.mix, config.train.mix_alpha) if config.train.mix != "none" else None
    run.record.data = _summary(config, store, size)
    if run.record.status == "running":  # of a finished run, what it was made with stays
        before = run.record.environment
        run.record.environment = _environment(run, engine, choices)
        if before is not None:
            run.record.environment.peak_memory_bytes = before.peak_memory_bytes
    run.save()
    of_roles = {role: choices.pop(role) for role in ROLES if role in choices}
    return Materials(store, engine, splits, policy, mix, spec, teacher_spec, of_roles, choices)


def teacher_kind(config: RunConfig) -> str:
    """Return what the user's word for the teacher denotes: "name", "function", "file", "run" or "folder"."""
    return build.kind(config.teacher.model)


def is_trained(config: RunConfig) -> bool:
    """Tell whether the teacher is a file or a run of ours."""
    return teacher_kind(config) in ("file", "run")


def new_student(run: Run, materials: Materials, seed: int) -> Classifier:
    """Return the student with the initial weights of a seed."""
    return new_network(run, materials, run.config.student.model, seed)


def new_network(run: Run, materials: Materials, model: str, seed: int) -> Classifier:
    """Return a student or an assistant with the initial weights of a seed."""
    fresh = build.build(model, classes=materials.store.classes, spec=materials.spec, seed=seed)
    return _to_train(fresh, run.config.train)


def new_teacher(config: RunConfig, materials: Materials) -> Classifier:
    """Return the teacher of a configuration, not trained on these data yet."""
    fresh = build.build(
        config.teacher.model,
        classes=materials.store.classes,
        spec=materials.teacher_spec,
        seed=config.teacher.seed,
        pretrained=config.teacher.pretrained,
        weights=config.teacher.weights,
        unsafe_pickle=config.unsafe_pickle,
        ready=config.teacher.ready,
    )
    return fresh if config.teacher.ready else _to_train(fresh, config.teacher_train)


def _to_train(fresh: Classifier, budget: TrainConfig) -> Classifier:
    if budget.running_statistics:
        norms.keep_running_statistics(fresh.net)
    return fresh


def _open(run: Run) -> tuple[Store, int]:
    """Open the store at the largest of the networks' sizes; return it with the student's."""
    data = run.config.data
    wanted = data.image_size
    sizes = [size for one in chain.teachers(run.config).values() if (size := _own_size(one)) is not None]
    if sizes and wanted is not None:
        data = data.model_copy(update={"image_size": max(wanted, *sizes)})
    if run.record.kind == "train":  # nobody is taught
        data = data.model_copy(update={"drop_unlabelled": True})
    store = open_store(data, progress=run.progress)
    run.log(f"{len(store.names)} images, {'reused' if store.reused else 'decoded'}")
    return store, wanted or store.image_size


def _own_size(config: RunConfig) -> int | None:
    """Return the size of the images that a teacher was saved with; None where it takes those of the run."""
    if is_trained(config):
        return files.load(Path(config.teacher.model), prefer="teacher")[1].input.size
    if teacher_kind(config) == "folder":
        return build.own_size(config.teacher.model, fetch=config.teacher.pretrained)
    return None


def _refuse_other_images(run: Run, store: Store) -> None:
    """Keep the results of a finished run; one that is not finished starts again with the images as they are."""
    before = run.record.data
    if run.record.status == "done" and before is not None and before.fingerprint != store.fingerprint:
        raise RunError(
            f"The images of {run.config.data.source} have changed since {run.folder} was finished. "
            "Choose another folder with --out for a new run."
        )


def _refuse_small_batches(config: RunConfig, engine: Engine) -> None:
    least, batch = 2 * engine.shard[1], min(config.train.batch_size, config.teacher_train.batch_size)
    if batch < least:
        raise ConfigError(f"--batch-size {batch} is too small: every process needs 2 images a step, so take {least}.")


def _refuse_without_labels(run: Run, store: Store, engine: Engine) -> None:
    """Refuse what images without a label do not go with."""
    config = run.config
    if not store.unlabelled or run.record.kind != "distill":
        return
    if config.train.mix != "none":
        raise ConfigError(
            f"--mix {config.train.mix} mixes labels, and some training images have none: leave it out, or these images "
            "with --no-unlabelled."
        )
    if not engine.is_alone:
        raise ConfigError("Several processes cannot train on images without a label yet: add --no-unlabelled.")
    objective.terms(config.distill, unlabelled=True)
    for name in config.sweep.method if config.sweep else ():
        objective.terms(config.distill.model_copy(update={"method": name, "terms": ()}), unlabelled=True)


def _split(store: Store, rows: NDArray[np.int64], engine: Engine) -> Split:
    return Split(
        store.frames,
        store.labels,
        store.ids,
        rows,
        size=store.image_size,
        device=engine.device,
        classes=len(store.classes),
    )


def _specs(store: Store, size: int) -> tuple[InputSpec, InputSpec]:
    mean, std = _statistics(store)
    sizes = tuple(dict.fromkeys((store.frame, store.image_size)))
    teacher = InputSpec(channels=store.channels, sizes=sizes, fit=store.fit, mean=mean, std=std)
    return teacher.model_copy(update={"sizes": tuple(dict.fromkeys((*sizes, size)))}), teacher


def _statistics(store: Store) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of training pixels per channel, from evenly spread images."""
    rows = store.splits["train"]
    sample = store.frames[rows[:: max(1, len(rows) // _STATISTICS_FROM)]].astype(np.float32) / 255
    mean, std = sample.mean(axis=(0, 2, 3)), sample.std(axis=(0, 2, 3))
    return tuple(round(float(m), 4) for m in mean), tuple(max(round(float(s), 4), 1e-3) for s in std)


class _Network(NamedTuple):
    """A network whose numerics are to be chosen."""

    model: str
    spec: InputSpec
    budget: TrainConfig
    trainings: int
    """How many there will be."""
    is_trained: bool = False
    """Whether `model` is a file or a run of ours."""


def _networks(run: Run, spec: InputSpec, teacher_spec: InputSpec) -> dict[str, _Network]:
    """Return the networks of a run by role, further teachers and assistants by name."""
    config = run.config
    names = ["teacher", *list(chain.teachers(config))[1:]]
    found = {
        name: _Network(one.teacher.model, teacher_spec, one.teacher_train, 1, is_trained(one))
        for name, one in zip(names, chain.teachers(config).values(), strict=True)
    }
    if run.record.kind == "distill":
        students = (1 + config.distill.generations) * len(config.seeds)  # the baselines are among them
        found["student"] = _Network(config.student.model, spec, config.train, students)
        found |= {link.name: _Network(link.model, spec, config.train, 1) for link in chain.assistants(config)}
    return found


def _choices(run: Run, store: Store, engine: Engine, train: Split, networks: dict[str, _Network]) -> dict[str, Choice]:
    known = run.record.environment.precision if run.record.environment else {}
    choices: dict[str, Choice] = {}
    for number, (name, one) in enumerate(networks.items()):
        if not engine.is_main:  # what the main process has chosen
            choices[name] = Choice(numerics.parse(known[name]), 0.0)
            continue
        run.progress("measuring", done=number, total=len(networks), note=f"{name} {one.model}")
        choice = _choice(run, store, engine, train, one)
        if name in known:  # what a run began with it ends with, or a resumed run would have other weights
            choice = Choice(numerics.parse(known[name]), choice.step_seconds)
        choices[name] = choice
    run.progress("measuring", done=len(networks), total=len(networks), note="; ".join(_told(choices)))
    return choices


def _choice(run: Run, store: Store, engine: Engine, train: Split, one: _Network) -> Choice:
    classes, batch = store.classes, one.budget.batch_size
    network = (
        files.load(Path(one.model), prefer="teacher")[0]
        if one.is_trained
        else build.build(one.model, classes=classes, spec=one.spec, seed=0)
    )
    images = next(train.whole(min(batch // engine.shard[1], len(train))))
    return numerics.choose(
        network.to(engine.device),
        images,
        classes=len(network.classes),
        requested=run.config.precision,
        key={"model": one.model, "classes": len(classes), "size": one.spec.size, "version": _version()},
        steps=one.trainings * one.budget.epochs * (len(train) + store.unlabelled) // batch
        if engine.shard[1] == 1
        else 0,
    )


def _told(choices: dict[str, Choice]) -> list[str]:
    return [f"{name} {choice.numerics}" for name, choice in choices.items()]


def _summary(config: RunConfig, store: Store, size: int) -> DataSummary:
    return DataSummary(
        source=Path(config.data.source).name,
        fingerprint=store.fingerprint,
        classes=list(store.classes),
        counts=store.counts(),
        unlabelled=store.unlabelled,
        channels=store.channels,
        frame=store.frame,
        image_size=size,
        notes=[*store.notes, *_budget_note(store)],
        skipped=dict(list(store.skipped.items())[:_LISTED]),
        skipped_total=len(store.skipped),
        duplicates=store.duplicates[:_LISTED],
        duplicates_total=len(store.duplicates),
    )


def _budget_note(store: Store) -> list[str]:
    if not store.unlabelled:
        return []
    train = len(store.splits["train"])
    return [
        f"The student alone, and a teacher trained here, learn from the {train} labelled training images only, in as "
        f"many optimiser steps as the distilled student takes through all {train + store.unlabelled}."
    ]


def _environment(run: Run, engine: Engine, choices: dict[str, Choice]) -> Environment:
    packages = ("torch", "accelerate", "numpy", "pillow", "scikit-learn", "onnx", "onnxruntime", "safetensors")
    return Environment(
        understudy=_version(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=str(engine.device),
        precision={name: str(choice.numerics) for name, choice in choices.items()},
        versions={package: metadata.version(package) for package in packages},
    )


def _version() -> str:
    return metadata.version("understudy")
