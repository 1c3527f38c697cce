"""The stages that make models: the teachers, checked; then every link of the chain, alone or with a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from understudy.config import RunConfig, TrainConfig
from understudy.distillation import Distiller, ensemble
from understudy.errors import ModelError
from understudy.evaluate import gate, metrics
from understudy.models import files, huggingface
from understudy.models.classifier import Classifier
from understudy.models.norms import keeps_statistics_apart, normalises_by_batch
from understudy.pipeline import chain, objective, seen, suiting, teaching
from understudy.pipeline.chain import Link
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import VIEW_SEED, Materials, is_trained, new_network, new_teacher
from understudy.record import Finding, Role, Trained
from understudy.storage import hash_file, write_json
from understudy.tracking import Journal
from understudy.train import Fit, Training, answers

if TYPE_CHECKING:
    from understudy.data.outputs import Table

WEIGHTS = "model.safetensors"
ENSEMBLE = f"{chain.TEACHER}/ensemble.json"


def teacher(run: Run, materials: Materials) -> None:
    """Load every teacher, or train it, and check it; several of them then make an ensemble."""
    teachers = chain.teachers(run.config)
    for name, config in teachers.items():
        inputs = _teacher_inputs(config, materials, name)
        make = partial(_make_teacher, run, materials, name, config, inputs)
        run.stage(name, inputs, _files(name), make)
        _check(run, materials, name)
    if len(teachers) > 1:
        _assemble(run, teachers)


def baseline(run: Run, materials: Materials, seed: int, *, name: str = "") -> None:
    """Train the student alone, in the folder `name` of the run; `baseline-<seed>` by default."""
    link = chain.baseline(run.config, seed)
    train(run, materials, replace(link, name=name or link.name))


def student(run: Run, materials: Materials, seed: int, *, name: str = "") -> None:
    """Train the student that is judged, from its baseline's initial weights; `name` as for `baseline`."""
    link = chain.student(run.config, seed)
    train(run, materials, replace(link, name=name or link.name))


def train(run: Run, materials: Materials, link: Link) -> None:
    """Train the model of a link: alone, or with the help of its teacher."""
    inputs = _inputs(run, materials, link)
    work = partial(_with_teacher if link.teacher else _alone, run, materials, link, inputs)
    if link.teacher:
        run.record.objective = suiting.noted(run)
    run.stage(link.name, inputs, _files(link.name), work)


def _alone(run: Run, materials: Materials, link: Link, inputs: dict[str, Any]) -> None:
    run.call(link.name)
    network = new_network(run, materials, link.model, link.seed)
    distiller = Distiller(None, network, label_smoothing=run.config.train.label_smoothing)
    _train(run, materials, distiller, network, link, run.config.train, inputs)


def _with_teacher(run: Run, materials: Materials, link: Link, inputs: dict[str, Any]) -> None:
    run.call(link.name)
    network = new_network(run, materials, link.model, link.seed)
    kept = teaching.prepare(run, materials, link.teacher)
    teaching.tell_pseudo_labels(run, materials, kept)
    distiller = taught(run, materials, network, link, kept=kept is not None)
    _train(run, materials, distiller, network, link, run.config.train, inputs, outputs=kept.view if kept else None)


def keep(
    run: Run, materials: Materials, network: Classifier, role: Role, seed: int, fit: Fit, *, name: str, initial: str
) -> None:
    """Save a student that was trained together with others, in the folder `name`, as `student` or `baseline` would.

    `initial` is the fingerprint of its initial weights.
    """
    link = (chain.student if role == "student" else chain.baseline)(run.config, seed)
    inputs = _inputs(run, materials, link)
    _keep(run, materials, network, replace(link, name=name), fit, inputs, initial=initial)
    place = run.folder / name / f"checkpoint-{run.key(inputs)}.safetensors"
    run.journal(name, seed, place).tell_all([epoch.model_dump() for epoch in fit.epochs])


def take_part(run: Run, materials: Materials, name: str) -> None:
    """Do the share of one process in a training to which the main process has called; nothing is written."""
    config = chain.teachers(run.config).get(name)
    if config is None:
        train(run, materials, chain.find(run.config, name))
    else:
        _make_teacher(run, materials, name, config, _teacher_inputs(config, materials, name))


def load(run: Run, name: str) -> Classifier:
    """Load a model of the run by the name of its folder."""
    classifier, _ = files.load(run.folder / name / WEIGHTS)
    return classifier


def _files(name: str) -> list[str]:
    """Return the files of a model: weights and card."""
    return [f"{name}/{WEIGHTS}", f"{name}/{files.card_path(Path(WEIGHTS))}"]


def taught(run: Run, materials: Materials, network: nn.Module, link: Link, *, kept: bool) -> Distiller:
    """Return the objective of a student that the teacher of a link teaches.

    The teacher is in it only as long as it is needed: where its outputs are `kept`, no longer than a probe takes.
    """
    smoothing, unlabelled = run.config.train.label_smoothing, bool(materials.store.unlabelled)
    terms = objective.terms(run.config.distill, label_smoothing=smoothing, unlabelled=unlabelled)
    if kept and not any(term.takes_features for term in terms):
        return Distiller(None, network, terms=terms)
    with torch.random.fork_rng():
        torch.manual_seed(link.seed)  # of the projectors' first weights
        distiller = Distiller(
            teaching.running(run, materials, link.teacher),
            network,
            terms=terms,
            example=next(materials.splits["val"].whole(teaching.EXAMPLE)),
            samples=len(materials.taught),
        )
    if kept:
        distiller.dismiss_teacher()
    return distiller


def _inputs(run: Run, materials: Materials, link: Link) -> dict[str, Any]:
    """Return all that the model of a link depends on; of the chain, that is its teacher alone."""
    taught: dict[str, Any] = {}
    if link.teacher:
        idle = {"assistants", "generations", *(() if materials.store.unlabelled else ("pseudo_labels",))}
        taught["distill"] = run.config.distill.model_dump(mode="json", exclude=idle)
        taught["teacher"] = run.record.models[link.teacher].weights_hash
    return {
        **taught,
        "data": materials.store.fingerprint,
        "views": {**materials.policy.describe(), "seed": VIEW_SEED},
        "model": link.model,
        **_given_by(link.model),
        "input": materials.spec.model_dump(mode="json"),
        "train": run.config.train.model_dump(mode="json"),
        "numerics": str(materials.choice(link.name, link.role).numerics),
        "seed": link.seed,
    }


def _teacher_inputs(config: RunConfig, materials: Materials, name: str) -> dict[str, Any]:
    teacher = config.teacher
    given = [hash_file(path) for path in [*filter(None, [teacher.weights]), *huggingface.files_of(teacher.model)]]
    if is_trained(config):
        given.append(files.load(Path(teacher.model), prefer="teacher")[1].weights)
    return {
        "data": materials.store.fingerprint,
        "views": {**materials.policy.describe(), "seed": VIEW_SEED},
        "teacher": teacher.model_dump(mode="json", exclude={"also", "share"}),
        "files": given,
        "input": materials.teacher_spec.model_dump(mode="json"),
        "train": config.teacher_train.model_dump(mode="json"),
        "numerics": str(materials.choice(name, _role(name)).numerics),
    }


def _given_by(model: str) -> dict[str, Any]:
    """Return what the folder of a model holds, where it is one: others are what their name says."""
    given = [hash_file(path) for path in huggingface.files_of(model)]
    return {"given": given} if given else {}


def _role(name: str) -> Role:
    """Return the role of a teacher: its own, or that of one in an ensemble."""
    return "teacher" if name == chain.TEACHER else "member"


def _make_teacher(run: Run, materials: Materials, name: str, config: RunConfig, inputs: dict[str, Any]) -> None:
    """Load or train a teacher; of the configuration, only its own settings and its budget matter."""
    link = Link(name, _role(name), config.teacher.model, config.teacher.seed, "")
    run.record.stages.pop(_gate_of(name), None)
    if is_trained(config):
        loaded, _ = files.load(Path(config.teacher.model), prefer="teacher")
        _check_classes(run, loaded.classes, materials)
        _keep(run, materials, loaded, link, None, inputs)
        seen.take_over(files.weights_file(config.teacher.model, "teacher"), run.folder / name)
        return
    fresh = new_teacher(config, materials)
    if config.teacher.ready:
        _keep(run, materials, fresh, link, None, inputs)
        return
    run.call(name)
    budget = config.teacher_train
    alone = Distiller(None, fresh, label_smoothing=budget.label_smoothing)
    _train(run, materials, alone, fresh, link, budget, inputs)


def _assemble(run: Run, teachers: dict[str, RunConfig]) -> None:
    """Note the ensemble of all teachers as the one that teaches."""
    models, weights = run.record.models, ensemble.shares([config.teacher.share for config in teachers.values()])
    shares = dict(zip(teachers, weights, strict=True))
    inputs = {"weights": {name: models[name].weights_hash for name in shares}, "shares": shares}

    def work() -> None:
        write_json(run.folder / ENSEMBLE, inputs)
        models[chain.TEACHER] = Trained(
            role="teacher",
            seed=None,
            architecture=f"ensemble of {len(shares)}",
            weights=ENSEMBLE,
            weights_hash=run.key(inputs),
            precision=", ".join(dict.fromkeys(models[name].precision for name in shares)),
            shares=shares,
        )

    run.stage(chain.TEACHER, inputs, [ENSEMBLE], work)


def _check(run: Run, materials: Materials, name: str) -> None:
    """Check a teacher, once, and go on only if nothing refuses it."""
    stage = _gate_of(name)
    gated = {"weights": run.record.models[name].weights_hash, "data": materials.store.fingerprint}
    if stage not in run.record.stages:
        run.stage(stage, gated, [], lambda: _gate(run, materials, name))
    gate.refuse(run.record.gate, force=run.config.force)


def _gate_of(name: str) -> str:
    """Return the name of the stage that checks a teacher."""
    return name.replace(chain.TEACHER, "gate")


def _check_classes(run: Run, classes: tuple[str, ...], materials: Materials) -> None:
    """Look at the classes before anything else: answers in another order would only look like a bad teacher."""
    finding = gate.check_classes(classes, materials.store.classes)
    if not finding.ok and len(classes) != len(materials.store.classes):
        raise ModelError(finding.text)  # nothing that follows could work, with or without --force
    gate.refuse([finding], force=run.config.force)


def _gate(run: Run, materials: Materials, name: str) -> None:
    classifier = load(run, name).to(materials.engine.device)
    val = materials.splits["val"]
    measured = metrics.measure(answers(classifier, val), val.labels.numpy(), materials.store.classes)
    counts = materials.store.counts()["val"]
    found = gate.examine(
        val=measured,
        val_counts=list(counts.values()),
        teacher_classes=classifier.classes,
        data_classes=materials.store.classes,
        head=files.head(classifier),
    )
    found += gate.check_statistics(normalises_by_batch(classifier.net))
    if run.record.models[name].best_epoch is None:  # of one trained here, the notes on the images tell of copies
        found += gate.check_seen(seen.again(run.folder / name, materials.store))
    run.record.gate = found if name == chain.TEACHER else _among_others(run.record.gate, found, name)


def _among_others(known: list[Finding], found: list[Finding], name: str) -> list[Finding]:
    """Return what is known of all teachers of an ensemble, this one's part renewed."""
    mark = f" of {name}"
    own = [one.model_copy(update={"check": one.check + mark, "text": f"{name}: {one.text}"}) for one in found]
    return [*(one for one in known if not one.check.endswith(mark)), *own]


def _train(
    run: Run,
    materials: Materials,
    distiller: Distiller,
    network: Classifier,
    link: Link,
    config: TrainConfig,
    inputs: dict[str, Any],
    *,
    outputs: Callable[[int], Table] | None = None,
) -> None:
    initial = files.weights_fingerprint(network.net)
    numerics = materials.choice(link.name, link.role).numerics
    place = run.folder / link.name / f"checkpoint-{run.key(inputs)}.safetensors"
    training = Training(
        distiller,
        materials.epochs(config, outputs, role=link.role),
        materials.splits["val"],
        config,
        seed=link.seed,
        engine=materials.engine,
        numerics=numerics,
        path=place,
        every=run.config.checkpoint_seconds,
        stop=run.stop,
        progress=run.progress,
        task=link.name,
        journal=_journal(run, materials, link, place),
    )
    if not materials.engine.is_alone and keeps_statistics_apart(network):
        run.warn(
            f"{network.architecture} normalises in a way of its own by the images of a batch: each process by its own "
            "images, so the weights differ from those of one process."
        )
    if link.role == "student" and link.seed == run.config.seeds[0]:
        suiting.measure(run, materials, distiller, network, training.data, numerics)
    fit = training.run()
    distiller.release()
    if not materials.engine.is_main:
        return
    trained = cast(Classifier, training.student)  # another one, where weights were spread over processes
    _keep(run, materials, trained, link, fit, inputs, initial=initial)
    if link.role in ("teacher", "member"):
        seen.note(place.parent, materials.store)
    for checkpoint in place.parent.glob("checkpoint-*.safetensors"):  # others are of images that have changed since
        checkpoint.unlink(missing_ok=True)


def _journal(run: Run, materials: Materials, link: Link, place: Path) -> Journal | None:
    """Return what the main process tells how a training goes."""
    if not materials.engine.is_main:
        return None
    spread = materials.engine.spreads
    if spread and run.config.log_weights:
        run.warn("Parameters and gradients are not logged where weights are spread over processes: none holds all.")
    return run.journal(link.name, link.seed, place, looks=not spread)


def _keep(
    run: Run,
    materials: Materials,
    network: Classifier,
    link: Link,
    fit: Fit | None,
    inputs: dict[str, Any],
    *,
    initial: str = "",
) -> None:
    """Save a model and note it in the record; without a `fit`, it was trained elsewhere."""
    seed = link.seed if fit else None
    best = fit.epochs[fit.best_epoch - 1] if fit else None
    card = files.save(
        network.to("cpu"),
        run.folder / link.name / WEIGHTS,
        role=link.role,
        seed=seed,
        metrics={"val_accuracy": best.val_accuracy, "val_nll": best.val_nll} if best else {},
        provenance={"inputs": run.key(inputs), "data": materials.store.fingerprint, "run": run.record.name},
    )
    run.record.models[link.name] = Trained(
        role=link.role,
        seed=seed,
        architecture=network.architecture,
        weights=f"{link.name}/{WEIGHTS}",
        weights_hash=card.weights,
        initial=initial,
        best_epoch=fit.best_epoch if fit else None,
        epochs=fit.epochs if fit else [],
        seconds=fit.seconds if fit else 0.0,
        precision=str(materials.choice(link.name, link.role).numerics),
        taught_by=link.teacher,
    )
