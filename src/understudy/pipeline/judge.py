"""The stage that judges: every model on validation and, once and last, on the test split; cost; the verdict."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from understudy.distillation.ensemble import Ensemble, mean_probabilities
from understudy.errors import ModelError
from understudy.evaluate import gate, metrics, profile, verdict
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials
from understudy.pipeline.trainings import load
from understudy.record import ROLES, Example, Finding, Role, RoleSummary
from understudy.storage import atomic_path
from understudy.train import answers

PREDICTIONS = "predictions.npz"
_EXAMPLES = 12


def evaluate(run: Run, materials: Materials) -> None:
    """Measure all models, choose a student on validation, read the test split, and reach the verdict."""
    inputs = {
        "data": materials.store.fingerprint,
        "weights": {name: model.weights_hash for name, model in run.record.models.items()},
        "min_gain": run.config.min_gain,
    }
    run.stage("evaluate", inputs, [PREDICTIONS], lambda: _evaluate(run, materials))


def predictions(run: Run) -> dict[str, np.ndarray]:
    """Return the logits that were judged, by `split/model`: float32 [images, classes]."""
    with np.load(run.folder / PREDICTIONS, allow_pickle=False) as file:
        return dict(file)


def _evaluate(run: Run, materials: Materials) -> None:
    logits = _answers(run, materials, "val")
    _measure(run, materials, logits, "val")
    if run.record.kind == "distill":
        run.record.chosen = _choose(run)
    # every choice is made: only now are the test images looked at
    logits |= _answers(run, materials, "test")
    _measure(run, materials, logits, "test")
    with atomic_path(run.folder / PREDICTIONS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **logits)
    _summarise(run, materials, logits)
    teacher = run.record.models["teacher"]
    if teacher.val is not None and teacher.test is not None:
        _note(run, gate.examine_shift(teacher.val, teacher.test))
    if run.record.kind == "distill":
        _judge(run, materials, logits)
        run.record.examples = _examples(run, materials, logits)


def _answers(run: Run, materials: Materials, split: str) -> dict[str, np.ndarray]:
    """Return the logits of all models for a split, by `split/model`; an ensemble's are those of its members, joined."""
    models = run.record.models
    alone = [name for name, model in models.items() if not model.shares]
    logits = {}
    for number, name in enumerate(alone):
        run.progress(f"evaluate {split}", done=number, total=len(alone), note=name)
        logits[f"{split}/{name}"] = answers(load(run, name).to(materials.engine.device), materials.splits[split])
    run.progress(f"evaluate {split}", done=len(alone), total=len(alone))
    for name, model in models.items():
        if model.shares:
            members = [torch.from_numpy(logits[f"{split}/{member}"]) for member in model.shares]
            logits[f"{split}/{name}"] = mean_probabilities(members, list(model.shares.values())).numpy()
    return logits


def _network(run: Run, name: str) -> nn.Module:
    """Load a model, or an ensemble with all its members."""
    shares = run.record.models[name].shares
    return Ensemble([load(run, member) for member in shares], list(shares.values())) if shares else load(run, name)


def _bytes(run: Run, name: str) -> int:
    """Return the size of a model's weights file, or of all those of an ensemble."""
    names = list(run.record.models[name].shares) or [name]
    return sum((run.folder / run.record.models[one].weights).stat().st_size for one in names)


def _measure(run: Run, materials: Materials, logits: dict[str, np.ndarray], split: str) -> None:
    labels = materials.splits[split].labels.numpy()
    for name, model in run.record.models.items():
        of_teacher = None if name == "teacher" else logits[f"{split}/teacher"]
        measured = metrics.measure(logits[f"{split}/{name}"], labels, materials.store.classes, of_teacher)
        setattr(model, split, measured)


def _of_role(run: Run, role: Role) -> list[str]:
    return [name for name, model in run.record.models.items() if model.role == role]


def _choose(run: Run) -> str:
    """Return the student with the best validation accuracy; then the lowest NLL."""

    def score(name: str) -> tuple[float, float]:
        val = run.record.models[name].val
        if val is None:
            raise ModelError(f"{name} was never measured on the validation split.")
        return val.accuracy, -val.nll

    return max(_of_role(run, "student"), key=score)


def _correct(run: Run, materials: Materials, logits: dict[str, np.ndarray], role: Role) -> np.ndarray:
    """Return bool [seeds, test images]."""
    labels = materials.splits["test"].labels.numpy()
    return np.stack([logits[f"test/{name}"].argmax(1) == labels for name in _of_role(run, role)])


def _summarise(run: Run, materials: Materials, logits: dict[str, np.ndarray]) -> None:
    roles = [role for role in ROLES if _of_role(run, role)]
    first = {role: _of_role(run, role)[0] for role in roles}
    example = next(materials.splits["val"].whole(1)).cpu()
    costs = profile.profile(
        {role: _network(run, name) for role, name in first.items()},
        dict.fromkeys(first, example),
        {role: _bytes(run, name) for role, name in first.items()},
    )
    for role in roles:
        tests = [test for name in _of_role(run, role) if (test := run.record.models[name].test)]

        def mean(values: Sequence[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return float(np.mean(known)) if known else None

        run.record.summary[role] = RoleSummary(
            accuracy=verdict.accuracy_interval(_correct(run, materials, logits, role)),
            macro_f1=float(np.mean([test.macro_f1 for test in tests])),
            nll=float(np.mean([test.nll for test in tests])),
            ece=float(np.mean([test.ece for test in tests])),
            sensitivity=mean([test.sensitivity for test in tests]),
            specificity=mean([test.specificity for test in tests]),
            auroc=mean([test.auroc for test in tests]),
            agreement=mean([test.agreement for test in tests]),
            profile=costs[role],
        )


def _note(run: Run, finding: Finding) -> None:
    """Put a finding in the place of an earlier one of the same check."""
    run.record.gate = [*(other for other in run.record.gate if other.check != finding.check), finding]


def _judge(run: Run, materials: Materials, logits: dict[str, np.ndarray]) -> None:
    models = run.record.models
    taught = models["teacher"].val
    alone = [val.accuracy for name in _of_role(run, "baseline") if (val := models[name].val)]
    if taught is not None:
        _note(run, gate.examine_against_baseline(taught.accuracy, alone))
    run.record.verdict = verdict.judge(
        _correct(run, materials, logits, "student"),
        _correct(run, materials, logits, "baseline"),
        seeds=list(run.config.seeds),
        teacher_accuracy=float(_correct(run, materials, logits, "teacher").mean()),
        min_gain=run.config.min_gain,
    )


def _examples(run: Run, materials: Materials, logits: dict[str, np.ndarray]) -> list[Example]:
    """Return test images worth a look: the teacher in doubt or wrong, the student right where alone it erred."""
    chosen = run.record.chosen or _of_role(run, "student")[0]
    alone = chosen.replace("student", "baseline")
    of = {"teacher": logits["test/teacher"], "student": logits[f"test/{chosen}"], "baseline": logits[f"test/{alone}"]}
    labels = materials.splits["test"].labels.numpy()
    right = {role: values.argmax(1) == labels for role, values in of.items()}
    doubt = _entropy(of["teacher"])
    order = np.argsort(-doubt, kind="stable")
    groups = [
        right["student"] & ~right["baseline"],
        ~right["teacher"],
        right["teacher"],
        ~right["student"] & right["teacher"],
    ]
    picked: list[int] = []
    for group in groups:
        picked += [int(i) for i in order if group[i] and i not in picked][: _EXAMPLES // len(groups)]
    picked += [int(i) for i in order if i not in picked][: _EXAMPLES - len(picked)]
    rows = materials.store.splits["test"]
    return [
        Example(
            name=materials.store.names[rows[i]],
            label=int(labels[i]),
            png=_png(np.asarray(materials.store.frames[rows[i]])),
            teacher_logits=_plain(of["teacher"][i]),
            student_logits=_plain(of["student"][i]),
            baseline_logits=_plain(of["baseline"][i]),
        )
        for i in picked
    ]


def _entropy(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    return np.asarray(-(p * np.log(np.maximum(p, 1e-300))).sum(1))


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _png(frame: np.ndarray) -> str:
    """Return a frame [channels, side, side] as PNG, base64."""
    pixels = frame[0] if len(frame) == 1 else frame.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
