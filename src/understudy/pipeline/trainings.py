"""The stages that make models: the teacher, checked; the student alone; the student distilled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.config import TrainConfig
from understudy.distillation import Distiller, Term, methods
from understudy.errors import ModelError
from understudy.evaluate import gate, metrics
from understudy.models import files
from understudy.models.classifier import Classifier
from understudy.models.norms import keeps_statistics_apart
from understudy.pipeline import teaching
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import VIEW_SEED, Materials, new_student, new_teacher, teacher_kind
from understudy.record import Objective, Role, Trained
from understudy.storage import hash_file
from understudy.train import Fit, Training, answers

if TYPE_CHECKING:
    from understudy.data.outputs import Table

WEIGHTS = "model.safetensors"


def teacher(run: Run, materials: Materials) -> None:
    """Load the teacher, or train it; then check it."""
    inputs = _teacher_inputs(run, materials)
    run.stage("teacher", inputs, _files("teacher"), lambda: _make_teacher(run, materials, inputs))
    gated = {"weights": run.record.models["teacher"].weights_hash, "data": materials.store.fingerprint}
    if "gate" not in run.record.stages:
        run.stage("gate", gated, [], lambda: _gate(run, materials))
    gate.refuse(run.record.gate, force=run.config.force)


def baseline(run: Run, materials: Materials, seed: int, *, name: str = "") -> None:
    """Train the student alone, in the folder `name` of the run; `baseline-<seed>` by default."""
    name = name or f"baseline-{seed}"
    inputs = _student_inputs(run, materials, seed)

    def work() -> None:
        run.call("baseline", seed)
        student = new_student(run, materials, seed)
        objective = Distiller(None, student, label_smoothing=run.config.train.label_smoothing)
        _train(run, materials, objective, student, name, "baseline", seed, run.config.train, inputs)

    run.stage(name, inputs, _files(name), work)


def student(run: Run, materials: Materials, seed: int, *, name: str = "") -> None:
    """Train the student with the teacher's help, from its baseline's initial weights; `name` as for `baseline`."""
    name = name or f"student-{seed}"
    config = run.config.distill
    inputs = {
        **_student_inputs(run, materials, seed),
        "distill": config.model_dump(mode="json"),
        "teacher": run.record.models["teacher"].weights_hash,
    }

    def work() -> None:
        run.call("student", seed)
        network = new_student(run, materials, seed)
        kept = teaching.prepare(run, materials)
        objective = Distiller(None if kept else teaching.running(run, materials), network, terms=_terms(run))
        outputs = kept.view if kept else None
        _train(run, materials, objective, network, name, "student", seed, run.config.train, inputs, outputs=outputs)

    run.record.objective = _objective(run)
    run.stage(name, inputs, _files(name), work)


def take_part(run: Run, materials: Materials, role: Role, seed: int) -> None:
    """Do the share of one process in a training to which the main process has called; nothing is written."""
    if role == "teacher":
        _make_teacher(run, materials, _teacher_inputs(run, materials))
    else:
        (student if role == "student" else baseline)(run, materials, seed)


def load(run: Run, name: str) -> Classifier:
    """Load a model of the run by the name of its folder."""
    classifier, _ = files.load(run.folder / name / WEIGHTS)
    return classifier


def _files(name: str) -> list[str]:
    """Return the files of a model: weights and card."""
    return [f"{name}/{WEIGHTS}", f"{name}/{files.card_path(Path(WEIGHTS))}"]


def _terms(run: Run) -> tuple[Term, ...]:
    config = run.config.distill
    return methods.terms(
        config.method,
        temperature=config.temperature,
        ce_weight=config.ce_weight,
        kd_weight=config.kd_weight,
        label_smoothing=run.config.train.label_smoothing,
    )


def _objective(run: Run) -> Objective:
    config = run.config.distill
    method = methods.find(config.method)
    return Objective(
        method=method.name,
        temperature=config.temperature,
        ce_weight=config.ce_weight,
        kd_weight=config.kd_weight,
        effective_kd_weight=method.effective_weight(config.kd_weight, config.temperature),
    )


def _student_inputs(run: Run, materials: Materials, seed: int) -> dict[str, Any]:
    return {
        "data": materials.store.fingerprint,
        "views": {**materials.policy.describe(), "seed": VIEW_SEED},
        "model": run.config.student.model,
        "input": materials.spec.model_dump(mode="json"),
        "train": run.config.train.model_dump(mode="json"),
        "numerics": str(materials.choices["student"].numerics),
        "seed": seed,
    }


def _teacher_inputs(run: Run, materials: Materials) -> dict[str, Any]:
    config = run.config.teacher
    given = [hash_file(config.weights)] if config.weights else []
    if teacher_kind(run.config) in ("file", "run"):
        given.append(files.load(Path(config.model), prefer="teacher")[1].weights)
    return {
        "data": materials.store.fingerprint,
        "views": {**materials.policy.describe(), "seed": VIEW_SEED},
        "teacher": config.model_dump(mode="json"),
        "files": given,
        "input": materials.teacher_spec.model_dump(mode="json"),
        "train": run.config.teacher_train.model_dump(mode="json"),
        "numerics": str(materials.choices["teacher"].numerics),
    }


def _make_teacher(run: Run, materials: Materials, inputs: dict[str, Any]) -> None:
    config = run.config
    run.record.stages.pop("gate", None)
    if teacher_kind(config) in ("file", "run"):
        loaded, _ = files.load(Path(config.teacher.model), prefer="teacher")
        _check_classes(run, loaded.classes, materials)
        _keep(run, materials, loaded, "teacher", "teacher", None, None, inputs)
        return
    fresh = new_teacher(run, materials)
    if config.teacher.ready:
        _keep(run, materials, fresh, "teacher", "teacher", None, None, inputs)
        return
    run.call("teacher", config.teacher.seed)
    objective = Distiller(None, fresh, label_smoothing=config.teacher_train.label_smoothing)
    budget = config.teacher_train
    _train(run, materials, objective, fresh, "teacher", "teacher", config.teacher.seed, budget, inputs)


def _check_classes(run: Run, classes: tuple[str, ...], materials: Materials) -> None:
    """Look at the classes before anything else: answers in another order would only look like a bad teacher."""
    finding = gate.check_classes(classes, materials.store.classes)
    if not finding.ok and len(classes) != len(materials.store.classes):
        raise ModelError(finding.text)  # nothing that follows could work, with or without --force
    gate.refuse([finding], force=run.config.force)


def _gate(run: Run, materials: Materials) -> None:
    classifier = load(run, "teacher").to(materials.engine.device)
    val = materials.splits["val"]
    measured = metrics.measure(answers(classifier, val), val.labels.numpy(), materials.store.classes)
    counts = materials.store.counts()["val"]
    run.record.gate = gate.examine(
        val=measured,
        val_counts=list(counts.values()),
        teacher_classes=classifier.classes,
        data_classes=materials.store.classes,
        head=files.head(classifier),
    )


def _train(
    run: Run,
    materials: Materials,
    objective: Distiller,
    network: Classifier,
    name: str,
    role: Role,
    seed: int,
    config: TrainConfig,
    inputs: dict[str, Any],
    *,
    outputs: Callable[[int], Table] | None = None,
) -> None:
    initial = files.weights_fingerprint(network.net)
    numerics = materials.choices["teacher" if role == "teacher" else "student"].numerics
    place = run.folder / name / f"checkpoint-{run.key(inputs)}.safetensors"
    training = Training(
        objective,
        materials.epochs(config, outputs),
        materials.splits["val"],
        config,
        seed=seed,
        engine=materials.engine,
        numerics=numerics,
        path=place,
        every=run.config.checkpoint_seconds,
        stop=run.stop,
        progress=run.progress,
        task=name,
    )
    if not materials.engine.is_alone and keeps_statistics_apart(network):
        run.warn(
            f"{network.architecture} normalises in a way of its own by the images of a batch: each process by its own "
            "images, so the weights differ from those of one process."
        )
    fit = training.run()
    if not materials.engine.is_main:
        return
    _keep(run, materials, network, name, role, seed, fit, inputs, initial=initial)
    for checkpoint in place.parent.glob("checkpoint-*.safetensors"):  # others are of images that have changed since
        checkpoint.unlink(missing_ok=True)


def _keep(
    run: Run,
    materials: Materials,
    network: Classifier,
    name: str,
    role: Role,
    seed: int | None,
    fit: Fit | None,
    inputs: dict[str, Any],
    *,
    initial: str = "",
) -> None:
    """Save a model and note it in the record."""
    best = fit.epochs[fit.best_epoch - 1] if fit else None
    card = files.save(
        network.to("cpu"),
        run.folder / name / WEIGHTS,
        role=role,
        seed=seed,
        metrics={"val_accuracy": best.val_accuracy, "val_nll": best.val_nll} if best else {},
        provenance={"inputs": run.key(inputs), "data": materials.store.fingerprint, "run": run.record.name},
    )
    choice = materials.choices["teacher" if role == "teacher" else "student"]
    run.record.models[name] = Trained(
        role=role,
        seed=seed,
        architecture=network.architecture,
        weights=f"{name}/{WEIGHTS}",
        weights_hash=card.weights,
        initial=initial,
        best_epoch=fit.best_epoch if fit else None,
        epochs=fit.epochs if fit else [],
        seconds=fit.seconds if fit else 0.0,
        precision=str(choice.numerics),
    )
