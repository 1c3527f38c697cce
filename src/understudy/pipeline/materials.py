"""What the stages work with: the images, the engine, and how to make each network."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from understudy import cachefolder, numerics
from understudy.config import RunConfig, TrainConfig
from understudy.data import views
from understudy.data.batches import Epochs, Split
from understudy.data.mixing import Mix
from understudy.data.store import Store, open_store
from understudy.data.views import ViewPolicy
from understudy.engine import Engine
from understudy.errors import ConfigError, RunError
from understudy.models import build, files
from understudy.models.classifier import Classifier
from understudy.numerics import Choice
from understudy.pipeline.folder import Run
from understudy.record import DataSummary, Environment, InputSpec, Role

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
    policy: ViewPolicy
    mix: Mix | None
    spec: InputSpec
    """What the student's input is made of."""
    teacher_spec: InputSpec
    """Likewise for a teacher that is trained here."""
    choices: dict[Role, Choice]
    """Numerics of the teacher and of the student (the baseline's are the student's)."""

    def epochs(self, config: TrainConfig, outputs: Callable[[int], Table] | None = None) -> Epochs:
        """Return the training split, shuffled and seen through views, with kept outputs of the teacher."""
        return Epochs(
            self.splits["train"],
            policy=self.policy,
            view_seed=VIEW_SEED,
            batch_size=config.batch_size,
            views=None if config.views == "online" else config.views,
            mix=self.mix if config.mix != "none" else None,
            outputs=outputs,
        )


def gather(run: Run) -> Materials:
    """Open the images, choose device and numerics, and note all of it in the record.

    Raises:
        UnderstudyError: data, models or device that cannot be used.
    """
    config = run.config
    cachefolder.limit()  # nonsense is told before anything long
    kind = teacher_kind(config)
    store, size = _open(run, kind)
    _refuse_other_images(run, store)
    engine = Engine(device=config.device, threads=config.threads)
    _refuse_small_batches(config, engine)
    if not engine.is_alone:
        run.log(f"{engine.shard[1]} processes, the main one on {engine.device}")
    spec, teacher_spec = _specs(store, size)
    splits = {
        name: Split(
            store.frames,
            store.labels,
            store.ids,
            rows,
            size=store.image_size,
            device=engine.device,
            classes=len(store.classes),
        )
        for name, rows in store.splits.items()
    }
    choices = _choices(run, store, engine, splits["train"], spec, teacher_spec, kind)
    policy = views.policy(config.train.augment, config.data.source)
    mix = Mix(config.train.mix, config.train.mix_alpha) if config.train.mix != "none" else None
    run.record.data = _summary(config, store, size)
    if run.record.status == "running":  # of a finished run, what it was made with stays
        before = run.record.environment
        run.record.environment = _environment(run, engine, choices)
        if before is not None:
            run.record.environment.peak_memory_bytes = before.peak_memory_bytes
    run.save()
    return Materials(store, engine, splits, policy, mix, spec, teacher_spec, choices)


def teacher_kind(config: RunConfig) -> str:
    """Return what the user's word for the teacher denotes: "name", "function", "file" or "run"."""
    return build.kind(config.teacher.model)


def new_student(run: Run, materials: Materials, seed: int) -> Classifier:
    """Return the student with the initial weights of a seed."""
    return build.build(run.config.student.model, classes=materials.store.classes, spec=materials.spec, seed=seed)


def new_teacher(run: Run, materials: Materials) -> Classifier:
    """Return a teacher that is not trained on these data yet."""
    config = run.config
    return build.build(
        config.teacher.model,
        classes=materials.store.classes,
        spec=materials.teacher_spec,
        seed=config.teacher.seed,
        pretrained=config.teacher.pretrained,
        weights=config.teacher.weights,
        unsafe_pickle=config.unsafe_pickle,
    )


def _open(run: Run, kind: str) -> tuple[Store, int]:
    """Open the store at the larger of the two networks' sizes; return it with the student's."""
    data = run.config.data
    wanted = data.image_size
    if kind in ("file", "run") and wanted is not None:
        _, card = files.load(Path(run.config.teacher.model), prefer="teacher")
        data = data.model_copy(update={"image_size": max(wanted, card.input.size)})
    store = open_store(data, progress=run.progress)
    run.log(f"{len(store.names)} images, {'reused' if store.reused else 'decoded'}")
    return store, wanted or store.image_size


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


def _specs(store: Store, size: int) -> tuple[InputSpec, InputSpec]:
    mean, std = _statistics(store)
    chain = tuple(dict.fromkeys((store.frame, store.image_size)))
    teacher = InputSpec(channels=store.channels, sizes=chain, fit=store.fit, mean=mean, std=std)
    return teacher.model_copy(update={"sizes": tuple(dict.fromkeys((*chain, size)))}), teacher


def _statistics(store: Store) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of training pixels per channel, from evenly spread images."""
    rows = store.splits["train"]
    sample = store.frames[rows[:: max(1, len(rows) // _STATISTICS_FROM)]].astype(np.float32) / 255
    mean, std = sample.mean(axis=(0, 2, 3)), sample.std(axis=(0, 2, 3))
    return tuple(round(float(m), 4) for m in mean), tuple(max(round(float(s), 4), 1e-3) for s in std)


def _choices(
    run: Run, store: Store, engine: Engine, train: Split, spec: InputSpec, teacher_spec: InputSpec, kind: str
) -> dict[Role, Choice]:
    config = run.config
    roles: dict[Role, tuple[str, InputSpec, int]] = {
        "teacher": (config.teacher.model, teacher_spec, config.teacher_train.batch_size)
    }
    if run.record.kind == "distill":
        roles["student"] = (config.student.model, spec, config.train.batch_size)
    known = run.record.environment.precision if run.record.environment else {}
    choices: dict[Role, Choice] = {}
    for number, (role, (model, role_spec, batch)) in enumerate(roles.items()):
        if not engine.is_main:  # what the main process has chosen
            choices[role] = Choice(numerics.parse(known[role]), 0.0)
            continue
        run.progress("measuring", done=number, total=len(roles), note=f"{role} {model}")
        ready = role == "teacher" and kind in ("file", "run")
        network = (
            files.load(Path(model), prefer="teacher")[0]
            if ready
            else build.build(model, classes=store.classes, spec=role_spec, seed=0)
        )
        images = next(train.whole(min(batch // engine.shard[1], len(train))))
        choice = numerics.choose(
            network.to(engine.device),
            images,
            classes=len(network.classes),
            requested=config.precision,
            key={"model": model, "classes": len(store.classes), "size": role_spec.size, "version": _version()},
            steps=_steps(config, role, len(train)) if engine.shard[1] == 1 else 0,
        )
        if role in known:  # what a run began with it ends with, or a resumed run would have other weights
            choice = Choice(numerics.parse(known[role]), choice.step_seconds)
        choices[role] = choice
    run.progress("measuring", done=len(roles), total=len(roles), note="; ".join(_told(choices)))
    return choices


def _steps(config: RunConfig, role: Role, images: int) -> int:
    """Return how many steps all trainings of a role will take, the baselines counted among the students."""
    budget = config.teacher_train if role == "teacher" else config.train
    trainings = 1 if role == "teacher" else 2 * len(config.seeds)
    return trainings * budget.epochs * images // budget.batch_size


def _told(choices: dict[Role, Choice]) -> list[str]:
    return [f"{role} {choice.numerics}" for role, choice in choices.items()]


def _summary(config: RunConfig, store: Store, size: int) -> DataSummary:
    return DataSummary(
        source=Path(config.data.source).name,
        fingerprint=store.fingerprint,
        classes=list(store.classes),
        counts=store.counts(),
        channels=store.channels,
        frame=store.frame,
        image_size=size,
        notes=store.notes,
        skipped=dict(list(store.skipped.items())[:_LISTED]),
        skipped_total=len(store.skipped),
        duplicates=store.duplicates[:_LISTED],
        duplicates_total=len(store.duplicates),
    )


def _environment(run: Run, engine: Engine, choices: dict[Role, Choice]) -> Environment:
    packages = ("torch", "accelerate", "numpy", "pillow", "scikit-learn", "onnx", "onnxruntime", "safetensors")
    return Environment(
        understudy=_version(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=str(engine.device),
        precision={role: str(choice.numerics) for role, choice in choices.items()},
        versions={package: metadata.version(package) for package in packages},
    )


def _version() -> str:
    return metadata.version("understudy")
