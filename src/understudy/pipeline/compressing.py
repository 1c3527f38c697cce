"""The stages of `compress`: prune and distil again, quantize, train on in 8 bits, calibrate; then latency.

Imported by the package's `__init__`. Choices are made on validation images; the test images only measure what came of
them. Every stage is skipped where it was done, so a killed command goes on when it is given again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from understudy.compress import prune, require
from understudy.config import CompressConfig, RunConfig, TrainConfig
from understudy.errors import ConfigError, ModelError, RunError, unknown
from understudy.evaluate import calibration, profile, verdict
from understudy.export import int8, qdq, runtimes
from understudy.export.temperature import fold
from understudy.models import files
from understudy.models.classifier import Classifier
from understudy.numerics import Numerics
from understudy.pipeline import chain, eightbits, forms, recovery, trainings
from understudy.pipeline.chain import Link
from understudy.pipeline.folder import Run
from understudy.pipeline.forms import Made
from understudy.pipeline.materials import Materials, gather
from understudy.profiling import resident
from understudy.profiling.resident import Request
from understudy.record import Compressed, LayerNote, Metrics, Quantized
from understudy.storage import hash_file

PRUNED, PTQ, QAT, CALIBRATED = "pruned", "int8-ptq", "int8-qat", "calibrated"
_FREEZE_AT = 0.8
"""Share of quantization-aware training after which ranges and batch statistics stay as they are."""


def compress(run: Run, asked: CompressConfig) -> None:
    """Compress a student of a finished run, and measure every form beside the others.

    Args:
        run: an opened run.
        asked: what is to be done.

    Raises:
        UnderstudyError: what the user can mend; finished stages are kept.
    """
    chosen = _chosen(run, asked.seed)
    run.record.compress = asked.model_dump(mode="json")
    run.config = _as_chosen(run)
    materials = gather(run)
    work = _Work(run, materials, asked, chain.find(run.config, chosen))
    work.check()
    work.references(chosen)
    if asked.prunes:
        work.prune()
    if asked.int8 != "none":
        work.quantize()
    if asked.calibrate:
        work.calibrate()
    work.close()


def _chosen(run: Run, seed: int | None) -> str:
    if run.record.kind == "train":
        raise RunError(run.no_student)
    if run.record.chosen is None or "evaluate" not in run.record.stages:
        raise RunError(
            f"{run.folder} holds no student that was judged: only a finished `understudy distill` can be compressed. "
            f"Finish it with: understudy resume {run.folder}"
        )
    if seed is None:
        return run.record.chosen
    students = {model.seed: name for name, model in run.record.models.items() if model.role == "student"}
    if seed not in students:
        raise ConfigError(f"{run.folder} has no student of seed {seed}; there are {', '.join(map(str, students))}.")
    return students[seed]


def _as_chosen(run: Run) -> RunConfig:
    """Return the configuration of the chosen student: after a sweep, with the settings of the chosen cell."""
    sweep = run.record.sweep
    cell = next((one for one in sweep.cells if one.key == sweep.chosen), None) if sweep else None
    if cell is None:
        return run.config
    objective = {name: getattr(cell, name) for name in ("method", "temperature", "ce_weight", "kd_weight")}
    return run.config.model_copy(
        update={
            "distill": run.config.distill.model_copy(update={**objective, "terms": ()}),
            "student": run.config.student.model_copy(update={"model": cell.student}),
            "train": run.config.train.model_copy(update={"lr": cell.lr}),
            "sweep": None,
        }
    )


class _Work:
    """What all stages of one command share; `form` is the one that the next stage starts from."""

    def __init__(self, run: Run, materials: Materials, asked: CompressConfig, link: Link) -> None:
        self.run, self.materials, self.asked, self.link = run, materials, asked, link
        self.names: list[str] = []
        self.form = ""

    def check(self) -> None:
        """Refuse what could not be done before anything long.

        Raises:
            ModelError: a library is missing, or `keep_float` names no layer.
        """
        if self.asked.prunes:
            require("torch_pruning")
        if self.asked.int8 == "qat":
            require("torchao")
        known = dict(trainings.load(self.run, self.link.name).net.named_modules())
        for name in self.asked.keep_float:
            if name not in known:
                raise ModelError(unknown("layer", name, filter(None, known)))

    def references(self, chosen: str) -> None:
        """Measure teacher, baseline and student as they are, on the runtime of all other forms."""
        models = self.run.record.models
        for name in (chain.TEACHER, chain.baseline(self.run.config, self.link.seed).name, chosen):
            if name not in models or models[name].shares:  # an ensemble is no file
                continue
            inputs = {"weights": models[name].weights_hash, "data": self.materials.store.fingerprint}
            self._stage(name, "", inputs, partial(self._as_it_is, name))

    def prune(self) -> None:
        """Cut channels out of the student and distil it again."""
        asked = self.asked.model_dump(include={"prune", "prune_macs", "prune_ms"}, exclude_none=True)
        budget = self._budget(self.asked.epochs, self.asked.lr)
        inputs = {**self._origin(), "asked": asked, "budget": budget.model_dump(mode="json")}
        self._stage(PRUNED, self.form, inputs, partial(self._prune, budget, asked, self.run.key(inputs)))

    def quantize(self) -> None:
        """Quantize after training; then, where asked for or needed, train on in 8 bits, and take the better one."""
        before = forms.find(self.run, self.form)
        shared = {"images": self.asked.calibration_images, "keep_float": self.asked.keep_float}
        self._stage(PTQ, before.name, {**self._origin(), **shared}, partial(self._ptq, before))
        best = self._judged(PTQ, before)
        if self.asked.int8 == "qat" or (self.asked.int8 == "auto" and not best.accepted):
            budget = self._budget(
                self.asked.qat_epochs or max(1, self.run.config.train.epochs // 4),
                self.asked.qat_lr or self.run.config.train.lr / 10,
            )
            inputs = {**self._origin(before), **shared, "budget": budget.model_dump(mode="json")}
            self._stage(QAT, before.name, inputs, partial(self._qat, before, budget, self.run.key(inputs)))
            best = max(self._judged(QAT, before), best, key=_fitness)
        self.form = best.name

    def calibrate(self) -> None:
        """Divide the logits of the last form by the temperature that fits the validation images best."""
        before = self.form
        self._stage(CALIBRATED, before, self._origin(), partial(self._calibrate, before))

    def close(self) -> None:
        """Leave only the forms of this command in the record, and time them side by side."""
        record = self.run.record
        record.compressed = [forms.find(self.run, name) for name in self.names]
        for row in record.compressed:
            if row.name == CALIBRATED:
                row.accepted = forms.find(self.run, row.before).accepted
        record.final = self.form
        inputs = {"files": {name: self._hash(name) for name in self.names}}
        self.run.stage("compress-latency", inputs, [], self._time)

    def _stage(self, name: str, before: str, inputs: dict[str, Any], make: Callable[[Path], Made]) -> None:
        forms.stage(self.run, self.materials, name, before, inputs, make)
        self.names.append(name)
        self.form = name

    def _origin(self, form: Compressed | None = None) -> dict[str, Any]:
        """Return what a stage depends on through the form before it."""
        name = form.name if form else self.form
        return {"before": name, "file": self._hash(name), "data": self.materials.store.fingerprint}

    def _hash(self, name: str) -> str:
        return hash_file(self.run.folder / forms.FOLDER / name / forms.FILE)

    def _budget(self, epochs: int | None, lr: float | None) -> TrainConfig:
        given = {"epochs": epochs, "lr": lr}
        return self.run.config.train.model_copy(update={key: value for key, value in given.items() if value})

    def _network(self, name: str) -> Classifier:
        """Load the float network of a form."""
        pruned = self.run.folder / forms.FOLDER / name / forms.WEIGHTS
        return files.load(pruned)[0] if pruned.exists() else trainings.load(self.run, name)

    def _as_it_is(self, name: str, folder: Path) -> Made:
        origin = {"weights": self.run.record.models[name].weights_hash}
        return forms.of_float(self.run, self.materials, trainings.load(self.run, name), folder / forms.FILE, origin)

    def _prune(self, budget: TrainConfig, asked: dict[str, Any], key: str, folder: Path) -> Made:
        network = self._cut(trainings.load(self.run, self.link.name))
        path = folder / f"checkpoint-{key}.safetensors"
        link = replace(self.link, name=PRUNED)
        fit = recovery.distil(self.run, self.materials, network, link, budget, path=path)
        files.save(network, folder / forms.WEIGHTS, role="student", seed=self.link.seed)
        origin = {"pruned from": self.run.record.models[self.link.name].weights_hash}
        made = forms.of_float(self.run, self.materials, network, folder / forms.FILE, origin)
        return replace(made, settings={**asked, "epochs": budget.epochs, "lr": budget.lr, "best_epoch": fit.best_epoch})

    def _cut(self, student: Classifier) -> Classifier:
        """Return the student with fewer channels."""
        view = next(self.materials.splits["val"].whole(1)).cpu()
        example, asked = student.preprocess(view), self.asked
        cut = partial(prune.prune_to, student.net, example, classes=len(student.classes))
        if asked.prune is not None:
            net = prune.prune(student.net, example, classes=len(student.classes), ratio=asked.prune)
        elif asked.prune_macs is not None:
            left = asked.prune_macs * profile.macs(student.net, example)
            net = cut(budget=left, cost=lambda net: float(profile.macs(net, example)), unit="MACs")
        else:
            assert asked.prune_ms is not None
            net = cut(budget=asked.prune_ms, cost=lambda net: _milliseconds(net, example), unit="ms")
        return _like(student, net, pruned=True)

    def _ptq(self, before: Compressed, folder: Path) -> Made:
        file, count = folder / forms.FILE, self.asked.calibration_images
        source = self.run.folder / before.path
        images = partial(self._calibration, count)
        int8.quantize(source, file, images(), keep_float=self.asked.keep_float)
        quantized = Quantized(way="post-training", images=count, layers=int8.examine(source, file, images()))
        made = forms.of_file(self.materials, file, before, quantized)
        return replace(made, settings={"images": count, "keep_float": list(self.asked.keep_float)})

    def _qat(self, before: Compressed, budget: TrainConfig, key: str, folder: Path) -> Made:
        """Train a float form on as if it counted in 8 bits, with the terms of the run, and convert it."""
        student = self._network(before.name)
        epochs = self.materials.epochs(budget, role="student")
        frozen = round(_FREEZE_AT * epochs.steps * budget.epochs)
        fake = eightbits.fake(self.materials, student, self.asked.keep_float, freeze_after=frozen)
        path = folder / f"checkpoint-{key}.safetensors"
        link = replace(self.link, name=QAT)
        fit = recovery.distil(
            self.run, self.materials, _like(student, fake), link, budget, path=path, numerics=Numerics()
        )
        eightbits.keep(fake, folder)
        file, source = folder / forms.FILE, self.run.folder / before.path
        qdq.export_quantized_onnx(
            fake.converted(),
            student.spec,
            network_channels=student.network_channels,
            classes=student.classes,
            path=file,
            provenance={"architecture": student.architecture, "run": self.run.record.name},
        )
        layers = int8.examine(source, file, self._calibration(self.asked.calibration_images))
        quantized = Quantized(way="quantization-aware", images=len(self.materials.taught), layers=layers)
        made = forms.of_file(self.materials, file, before, quantized)
        trained = {"epochs": budget.epochs, "lr": budget.lr, "best_epoch": fit.best_epoch}
        return replace(made, settings={**trained, "keep_float": list(self.asked.keep_float)})

    def _calibrate(self, before: str, folder: Path) -> Made:
        row, seen = forms.find(self.run, before), forms.logits(self.run, before)
        temperature = calibration.temperature(seen["val"], self.materials.splits["val"].labels.numpy())
        fold(self.run.folder / row.path, folder / forms.FILE, temperature)
        logits = {split: values / temperature for split, values in seen.items()}
        return Made(
            logits=logits,
            parameters=row.parameters,
            macs=row.macs,
            quantized=row.quantized,
            temperature=temperature,
        )

    def _calibration(self, count: int) -> Iterator[forms.Bytes]:
        return (batch.transpose(0, 2, 3, 1) for batch in forms.frames(self.materials, "train", count))

    def _judged(self, name: str, before: Compressed) -> Compressed:
        """Say of a quantized form whether it lost no more than was allowed, on validation images."""
        form = forms.find(self.run, name)
        lost = _val(before).accuracy - _val(form).accuracy
        form.accepted, form.note = lost <= self.asked.max_drop + 1e-12, ""
        if not form.accepted:
            # what training in 8 bits changed in a layer is no error of its 8 bits
            worst = _where_it_jumps(form.quantized.layers) if form.quantized and name == PTQ else ""
            hint = f" The error grows most in the layer {worst}: try --keep-float {worst}." if worst else ""
            form.note = (
                f"It loses {verdict.points(lost)} points on the validation images, more than the "
                f"{verdict.points(self.asked.max_drop)} allowed.{hint}"
            )
        return form

    def _time(self) -> None:
        """Time all files in turn, so that noise hits all alike, and ask each for its memory in a process of its own."""
        frame = next(forms.frames(self.materials, "val", 1)).transpose(0, 2, 3, 1)
        rows = [forms.find(self.run, name) for name in self.names]
        sessions = {row.name: runtimes.open_file(self.run.folder / row.path) for row in rows}
        calls = {name: partial(session, frame) for name, session in sessions.items()}
        timed = profile.take_turns(calls, runtime=next(iter(sessions.values())).runtime, threads=1)
        for row in rows:
            row.latency = timed[row.name]
            path = str(self.run.folder / row.path)
            asked = Request(path, threads=1, batch=1, side=frame.shape[1], channels=frame.shape[3])
            row.memory_bytes = resident.ask(asked).peak


def _where_it_jumps(layers: list[LayerNote]) -> str:
    """Return the layer in 8 bits that adds most to the error of those before it; "" where none does."""
    pairs = zip([0.0, *(one.error for one in layers)], layers, strict=False)
    grown = {after.name: after.error - before for before, after in pairs if not after.kept_float}
    worst = max(grown, key=lambda name: grown[name], default="")
    return worst if worst and grown[worst] > 0 else ""


def _val(form: Compressed) -> Metrics:
    assert form.val is not None
    return form.val


def _fitness(form: Compressed) -> tuple[float, float]:
    return _val(form).accuracy, -_val(form).nll


def _like(student: Classifier, net: nn.Module, *, pruned: bool | None = None) -> Classifier:
    """Return a classifier like the student with another network in it."""
    return Classifier(
        net,
        architecture=student.architecture,
        classes=student.classes,
        spec=student.spec,
        network_channels=student.network_channels,
        pruned=student.pruned if pruned is None else pruned,
    )


def _milliseconds(net: nn.Module, example: Tensor) -> float:
    return profile.latencies({"": net}, {"": example}, runs=50, seconds_budget=2.0)[""].p50
