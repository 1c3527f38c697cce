"""A made-up record of a run, for tests: three roles, several seeds, plausible numbers. Nothing here was measured."""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from understudy import record
from understudy.record import Role

TWO = ["normal", "pneumonia"]
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SKILL: dict[Role, float] = {"teacher": 3.4, "baseline": 2.1, "student": 2.45}
NETWORKS: dict[Role, str] = {"teacher": "resnet18", "baseline": "cnn3", "student": "cnn3"}
HASHES = "0123456789abcdef"


def sample_record(
    *, classes: Sequence[str] = TEN, seeds: Sequence[int] = (0, 1, 2), images: int = 600, epochs: int = 20
) -> record.Record:
    """Make the record of a finished run; the same arguments give the same record."""
    chance = random.Random(7)
    names = list(classes)
    models = {"teacher": _trained(chance, "teacher", 0, names, images, epochs)}
    for role in ("baseline", "student"):
        for seed in seeds:
            models[f"{role}-{seed}"] = _trained(chance, role, seed, names, images, epochs)
    summary = {role: _summary(role, models) for role in record.ROLES}
    return record.Record(
        name="sample",
        status="done",
        created="2026-03-01T10:20:30+00:00",
        seconds=754.2,
        config={
            "name": "sample",
            "data": {"source": "photos"},
            "teacher": {"model": "resnet18"},
            "student": {"model": "cnn3"},
        },
        environment=_environment(),
        data=_data(names, images),
        gate=_gate(),
        objective=record.Objective(method="kd", temperature=4, ce_weight=0.5, kd_weight=0.5, effective_kd_weight=8),
        models=models,
        summary=summary,
        verdict=_verdict(models, seeds, images),
        chosen=f"student-{seeds[-1]}",
        exports=[_export(seeds[-1])],
        examples=[_example(chance, number, names) for number in range(6)],
        stages={
            name: record.Stage(inputs="a1b2", seconds=seconds, finished="2026-03-01T10:30:00+00:00")
            for name, seconds in {
                "data": 4.1,
                "teacher": 400.0,
                "baseline": 90.2,
                "student": 95.5,
                "export": 12.0,
            }.items()
        },
    )


def train_record() -> record.Record:
    """Make the record of a run that trained one model."""
    whole = sample_record()
    kept = {"objective": None, "verdict": None, "chosen": "teacher", "examples": [], "exports": [], "kind": "train"}
    models = {"teacher": whole.models["teacher"]}
    return whole.model_copy(update={**kept, "models": models, "summary": {"teacher": whole.summary["teacher"]}})


def interrupted_record() -> record.Record:
    """Make the record of a run that stopped while its baselines were training."""
    whole = sample_record()
    models = {
        name: model.model_copy(update={"test": None}) for name, model in whole.models.items() if model.role != "student"
    }
    models["baseline-2"] = models["baseline-2"].model_copy(update={"val": None, "epochs": [], "best_epoch": None})
    kept = {"status": "failed", "failure": "The disk is full.", "summary": {}, "verdict": None, "chosen": None}
    return whole.model_copy(update={**kept, "models": models, "exports": [], "examples": [], "objective": None})


def _trained(
    chance: random.Random, role: Role, seed: int, names: list[str], images: int, epochs: int
) -> record.Trained:
    test = _metrics(chance, role, names, images)
    rows = [_epoch(chance, role, number, epochs, test.accuracy) for number in range(1, epochs + 1)]
    hashed = random.Random(f"{role}{seed}")
    return record.Trained(
        role=role,
        seed=seed,
        architecture=NETWORKS[role],
        weights=f"{role}-{seed}/model.safetensors",
        weights_hash="".join(hashed.choices(HASHES, k=32)),
        initial="".join(random.Random(seed).choices(HASHES, k=16)),
        best_epoch=max(rows, key=lambda row: row.val_accuracy).epoch,
        epochs=rows,
        seconds=400.0 if role == "teacher" else 31.4,
        precision="bf16" if role == "teacher" else "fp32",
        val=_metrics(chance, role, names, images // 2),
        test=test,
    )


def _epoch(chance: random.Random, role: Role, number: int, epochs: int, final: float) -> record.Epoch:
    done = 1 - math.exp(-5 * number / epochs)
    accuracy = min(1.0, 0.25 + (final - 0.25) * done + chance.gauss(0, 0.008))
    loss = 2.3 - 1.7 * done + (0.6 if role == "student" else 0) + chance.gauss(0, 0.02)
    return record.Epoch(
        epoch=number,
        lr=1e-3 * (1 - number / epochs),
        train_loss=loss,
        parts={"ce": loss / 2, "kd": loss / 8},
        val_accuracy=accuracy,
        val_nll=1.2 - done,
        seconds=1.5,
    )


def _metrics(chance: random.Random, role: Role, names: list[str], images: int) -> record.Metrics:
    """Draw logits image by image and measure them slowly, so that all parts agree with one another."""
    skill = SKILL[role] + chance.gauss(0, 0.02)
    confusion = [[0] * len(names) for _ in names]
    sure: list[tuple[float, bool]] = []
    nll = brier = 0.0
    for number in range(images):
        truth = number % len(names)
        shares = softmax([chance.gauss(1.4 * skill if one == truth else 0, 1.3) for one in range(len(names))])
        answer = shares.index(max(shares))
        confusion[truth][answer] += 1
        sure.append((max(shares), answer == truth))
        nll -= math.log(max(shares[truth], 1e-12)) / images
        brier += sum((share - (one == truth)) ** 2 for one, share in enumerate(shares)) / images
    bins = [_bin(index, sure) for index in range(15)]
    recall = [row[truth] / sum(row) if sum(row) else None for truth, row in enumerate(confusion)]
    two = len(names) == 2
    return record.Metrics(
        images=images,
        accuracy=sum(right for _, right in sure) / images,
        recall=dict(zip(names, recall, strict=True)),
        macro_f1=_macro_f1(confusion),
        nll=nll,
        brier=brier,
        ece=sum(one.count / images * abs((one.accuracy or 0) - (one.confidence or 0)) for one in bins),
        confusion=confusion,
        reliability=bins,
        positive=names[1] if two else None,
        sensitivity=recall[1] if two else None,
        specificity=recall[0] if two else None,
        auroc=0.97 if two else None,
        agreement={"teacher": None, "baseline": 0.871, "student": 0.914}[role],
        kl_to_teacher=None if role == "teacher" else 0.21,
    )


def softmax(logits: Sequence[float]) -> list[float]:
    """Return softmax(logits)."""
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def _bin(index: int, sure: list[tuple[float, bool]]) -> record.Bin:
    inside = [(share, right) for share, right in sure if min(int(share * 15), 14) == index]
    if not inside:
        return record.Bin(low=index / 15, high=(index + 1) / 15, count=0, confidence=None, accuracy=None)
    confidence = sum(share for share, _ in inside) / len(inside)
    accuracy = sum(right for _, right in inside) / len(inside)
    return record.Bin(
        low=index / 15, high=(index + 1) / 15, count=len(inside), confidence=confidence, accuracy=accuracy
    )


def _macro_f1(confusion: list[list[int]]) -> float:
    total = 0.0
    for one, row in enumerate(confusion):
        total += 2 * row[one] / max(sum(row) + sum(other[one] for other in confusion), 1)
    return total / len(confusion)


def _summary(role: Role, models: dict[str, record.Trained]) -> record.RoleSummary:
    tests = [model.test for model in models.values() if model.role == role and model.test]
    accuracy = sum(test.accuracy for test in tests) / len(tests)

    def mean(name: str) -> float | None:
        values = [getattr(test, name) for test in tests]
        return None if None in values else sum(values) / len(values)

    return record.RoleSummary(
        accuracy=record.Interval(
            value=accuracy, low=accuracy - 0.6 * (1 - accuracy), high=accuracy + 0.4 * (1 - accuracy)
        ),
        macro_f1=mean("macro_f1") or 0,
        nll=mean("nll") or 0,
        ece=mean("ece") or 0,
        sensitivity=mean("sensitivity"),
        specificity=mean("specificity"),
        auroc=mean("auroc"),
        agreement=mean("agreement"),
        profile=_profile(role),
    )


def _profile(role: Role) -> record.Profile:
    large = role == "teacher"
    latency = {"teacher": (5.91, 6.48), "baseline": (0.292, 0.331), "student": (0.288, 0.326)}[role]
    return record.Profile(
        parameters=11_181_642 if large else 277_034,
        macs=148_940_000 if large else 22_100_000,
        bytes=44_780_112 if large else 1_112_904,
        peak_bytes=52_100_000 if large else 3_420_000,
        latency=record.Latency(runtime="PyTorch eager", threads=1, runs=200, p50=latency[0], p95=latency[1]),
    )


def _verdict(models: dict[str, record.Trained], seeds: Sequence[int], images: int) -> record.Verdict:
    def accuracy(name: str) -> float:
        test = models[name].test
        assert test is not None
        return test.accuracy

    gains = {str(seed): accuracy(f"student-{seed}") - accuracy(f"baseline-{seed}") for seed in seeds}
    gain = sum(gains.values()) / len(gains)
    low, high = 0.6 * gain, 1.4 * gain
    text = (
        f"The distilled student beats the same student trained alone by {100 * gain:.1f} points "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}; {len(gains)} seeds, {images} test images)."
    )
    return record.Verdict(
        outcome="BEATS",
        gain=record.Interval(value=gain, low=low, high=high),
        min_gain=0.005,
        seeds=len(gains),
        images=images,
        per_seed=gains,
        gap_closed=gain / (accuracy("teacher") - accuracy(f"baseline-{seeds[0]}")),
        text=text,
        method="Paired differences; seeds and images as crossed random factors; t interval (Hillis 2007).",
    )


def _data(names: list[str], images: int) -> record.DataSummary:
    each = images // len(names)
    return record.DataSummary(
        source="photos",
        fingerprint="9f2c",
        classes=names,
        counts={
            split: dict.fromkeys(names, count)
            for split, count in (("train", 7 * each), ("val", each // 2), ("test", each))
        },
        channels=3,
        frame=72,
        image_size=64,
        notes=[f"No validation split was found: {images // 2} training images were held out for it."],
        skipped={"cat/broken_017.jpg": "truncated", "dog/notes.png": "not an image"},
        skipped_total=2,
        duplicates=[["train/cat/a.png", "test/cat/b.png"], ["train/dog/1.png", "test/dog/7.png"]],
        duplicates_total=2,
    )


def _gate() -> list[record.Finding]:
    text = "The teacher's classes are those of the data, in the same order."
    doubt = "The teacher is right on 93.1 % of the validation images, the student alone on 92.8 %: little to teach."
    return [
        record.Finding(check="classes", ok=True, severity="refuse", text=text),
        record.Finding(
            check="chance", ok=True, severity="refuse", text="93.1 % of 300 images, where chance is 10.0 %."
        ),
        record.Finding(check="baseline", ok=False, severity="warn", text=doubt),
    ]


def _export(seed: int) -> record.Export:
    return record.Export(
        format="onnx",
        path="export/student.onnx",
        bytes=1_131_020,
        runtime="ONNX Runtime 1.31.1",
        seed=seed,
        on_frames=record.Agreement(images=300, max_difference=4.8e-7, agreement=1.0, accuracy=0.871, tolerance=1e-4),
        latency=record.Latency(runtime="ONNX Runtime 1.31.1", threads=1, runs=200, p50=0.114, p95=0.131),
    )


def _environment() -> record.Environment:
    return record.Environment(
        understudy="0.1.0",
        python="3.11.2",
        platform="Linux",
        processor="a processor",
        cores=2,
        threads=2,
        device="cpu",
        precision={"resnet18": "bf16, measured x1.4 faster", "cnn3": "fp32"},
        versions={"torch": "2.14.1", "onnxruntime": "1.31.1"},
        peak_memory_bytes=1_450_000_000,
    )


def _example(chance: random.Random, number: int, names: list[str]) -> record.Example:
    label = (3 * number + 1) % len(names)

    def logits(skill: float) -> list[float]:
        return [
            chance.gauss(0, 1.5) + (skill if one == label else 0) + (2.5 if one == (label + 2) % len(names) else 0)
            for one in range(len(names))
        ]

    return record.Example(
        name=f"test/{names[label]}/{number:05d}.png",
        label=label,
        png=_png(label),
        teacher_logits=logits(8),
        student_logits=logits(6),
        baseline_logits=logits(5),
    )


def _png(label: int) -> str:
    image = Image.new("L", (16, 16), 20)
    ImageDraw.Draw(image).text((5, 2), str(label % 10), fill=235)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
