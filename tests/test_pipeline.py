"""Whole runs through the API: what is in the folder, what makes the comparison fair, the numbers, and the choice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import small_runs
import understudy
from finished_run import MODELS, copied, finished, photos
from small_runs import SEEDS, STAGES, tiny, weights
from understudy import api, config
from understudy import record as records
from understudy.data.store import Store, open_store
from understudy.models import build, files
from understudy.models.classifier import Classifier
from understudy.pipeline import judge
from understudy.record import InputSpec, Metrics

__all__ = ["copied", "finished", "photos"]  # fixtures


@pytest.fixture(scope="module")
def store(photos: Path) -> Store:
    return open_store(tiny(photos).data)


@pytest.fixture(scope="module")
def logits(finished: api.DistillResult) -> dict[str, np.ndarray]:
    with np.load(finished.folder / "predictions.npz", allow_pickle=False) as file:
        return dict(file)


def truth(store: Store, split: str) -> np.ndarray:
    """The right answers, from the names of the files: train/cat/000.png."""
    return np.array([store.classes.index(store.names[row].split("/")[1]) for row in store.splits[split]])


# --- the record and the folder ---


def test_every_stage_is_in_the_record_in_order(finished: api.DistillResult) -> None:
    record = finished.record
    assert (record.status, record.failure, record.kind) == ("done", None, "distill")
    assert list(record.stages) == STAGES
    assert len({stage.inputs for stage in record.stages.values()}) == len(STAGES)
    assert list(record.models) == MODELS
    spent = sum(stage.seconds for stage in record.stages.values())
    assert 0 < spent <= record.seconds


def test_the_record_on_the_disk_is_the_record(finished: api.DistillResult) -> None:
    assert records.load(finished.folder) == finished.record
    again = json.loads((finished.folder / "record.json").read_text())
    assert again["format"] == "understudy-record/1"
    assert (finished.folder / "record.json").read_text() == finished.record.model_dump_json(indent=1) + "\n"


def test_the_configuration_on_the_disk_starts_the_same_run(finished: api.DistillResult, photos: Path) -> None:
    kept = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert kept == finished.record.config
    assert config.load(finished.folder / "config.yaml") == api.absolute(tiny(photos))


def test_every_file_that_the_record_names_is_there(finished: api.DistillResult) -> None:
    named = [model.weights for model in finished.record.models.values()]
    named += [export.path for export in finished.record.exports]
    assert len(named) == len(MODELS) + 1
    for name in named:
        assert not Path(name).is_absolute()
        assert (finished.folder / name).is_file()
    assert finished.report.is_file()
    assert finished.record.exports[0].bytes == (finished.folder / "export/student.onnx").stat().st_size


def test_nothing_else_is_left_in_the_folder(finished: api.DistillResult) -> None:
    known = {".lock", "config.yaml", "export/student.onnx", "log.txt", "predictions.npz", "record.json", "report.html"}
    known |= {f"{name}/model.{ending}" for name in MODELS for ending in ("json", "safetensors")}
    known |= {"teacher/images.npy", *(f"{name}/metrics.jsonl" for name in MODELS)}
    assert set(small_runs.snapshot(finished.folder)) == known


def test_the_hashes_are_those_of_the_files(finished: api.DistillResult) -> None:
    noted = {name: model.weights_hash for name, model in finished.record.models.items()}
    assert noted == weights(finished.folder)
    assert len(set(noted.values())) == len(MODELS)


def test_the_log_tells_of_every_stage(finished: api.DistillResult) -> None:
    lines = [line.split(" ", 1)[1] for line in (finished.folder / "log.txt").read_text().splitlines()]
    assert [line.split(":")[0] for line in lines if line.endswith("started")] == STAGES
    assert lines[-1] == "done"


def test_the_log_and_the_record_hold_no_image_of_the_training_set(finished: api.DistillResult) -> None:
    assert {example.name.split("/")[0] for example in finished.record.examples} == {"test"}


# --- what makes the comparison fair ---


def test_a_student_starts_from_the_weights_of_its_baseline(finished: api.DistillResult, store: Store) -> None:
    initial = {name: model.initial for name, model in finished.record.models.items()}
    assert len(set(initial.values())) == 3  # the teacher's, and one for each seed
    for seed in SEEDS:
        card = files.read_card(finished.folder / f"student-{seed}/model.safetensors")
        fresh = build.build("mnist_small", classes=store.classes, spec=card.input, seed=seed)
        expected = files.weights_fingerprint(fresh.net)
        assert initial[f"student-{seed}"] == initial[f"baseline-{seed}"] == expected


def test_student_and_baseline_have_the_same_budget(finished: api.DistillResult) -> None:
    for seed in SEEDS:
        pair = [finished.record.models[f"{role}-{seed}"] for role in ("baseline", "student")]
        rates = [[(epoch.epoch, epoch.lr) for epoch in model.epochs] for model in pair]
        assert rates[0] == rates[1]
        assert [epoch for epoch, _ in rates[0]] == [1, 2]
        assert [list(model.epochs[0].parts) for model in pair] == [["ce"], ["ce", "kd"]]


def test_the_effective_weight_is_on_the_bare_divergence(finished: api.DistillResult) -> None:
    objective = finished.record.objective
    assert objective is not None
    assert (objective.method, objective.temperature) == ("kd", 3.0)
    assert (objective.ce_weight, objective.kd_weight) == (0.75, 0.25)
    assert objective.effective_kd_weight == pytest.approx(0.25 * 3.0**2)


def test_the_loss_is_the_weighted_sum_of_its_parts(finished: api.DistillResult) -> None:
    for seed in SEEDS:
        for epoch in finished.record.models[f"student-{seed}"].epochs:
            # the part is T^2 KL, so the weight on it is the plain one
            assert epoch.train_loss == pytest.approx(0.75 * epoch.parts["ce"] + 0.25 * epoch.parts["kd"], rel=1e-5)


def test_the_splits_share_no_image(finished: api.DistillResult, store: Store) -> None:
    names = {split: {store.names[row] for row in rows} for split, rows in store.splits.items()}
    assert {split: len(found) for split, found in names.items()} == {"train": 80, "val": 50, "test": 40}
    for split, found in names.items():
        assert {name.split("/")[0] for name in found} == {split}
    ids = [set(store.ids[rows].tolist()) for rows in store.splits.values()]
    assert not ids[0] & ids[1]
    assert not (ids[0] | ids[1]) & ids[2]
    data = finished.record.data
    assert data is not None
    assert data.counts == {
        "train": {"cat": 40, "dog": 40},
        "val": {"cat": 25, "dog": 25},
        "test": {"cat": 20, "dog": 20},
    }
    assert data.fingerprint == store.fingerprint


def test_the_best_epoch_is_kept(finished: api.DistillResult, logits: dict[str, np.ndarray], store: Store) -> None:
    labels = truth(store, "val")
    for name, model in finished.record.models.items():
        best = max(model.epochs, key=lambda epoch: (epoch.val_accuracy, -epoch.val_nll))
        assert model.best_epoch == best.epoch
        assert (logits[f"val/{name}"].argmax(1) == labels).mean() == pytest.approx(best.val_accuracy)


def test_spec_of_the_student_is_measured_on_training_images_only(
    finished: api.DistillResult, store: Store, photos: Path
) -> None:
    card = files.read_card(finished.folder / "student-0/model.safetensors")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.glob("train/*/*.png"))]) / 255
    expected = InputSpec(
        channels=1, sizes=(10,), mean=(round(float(pixels.mean()), 4),), std=(round(float(pixels.std()), 4),)
    )
    assert card.input == expected
    assert card.classes == ["cat", "dog"]


# --- the numbers ---


def test_the_predictions_are_those_of_the_saved_weights(
    finished: api.DistillResult, logits: dict[str, np.ndarray], store: Store, photos: Path
) -> None:
    """The images are read here by Pillow alone."""
    for split in ("val", "test"):
        pixels = [np.asarray(Image.open(photos / store.names[row])) for row in store.splits[split]]
        images = torch.from_numpy(np.stack(pixels))[:, None].float() / 255
        for name in MODELS:
            model, _ = understudy.load_model(finished.folder / name / "model.safetensors")
            with torch.no_grad():
                expected = model(images).numpy()
            np.testing.assert_allclose(logits[f"{split}/{name}"], expected, atol=1e-5)
    assert set(logits) == {f"{split}/{name}" for split in ("val", "test") for name in MODELS}


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_metrics_follow_from_the_predictions(
    split: str, finished: api.DistillResult, logits: dict[str, np.ndarray], store: Store
) -> None:
    labels = truth(store, split)
    for name, model in finished.record.models.items():
        measured: Metrics | None = getattr(model, split)
        assert measured is not None
        given = logits[f"{split}/{name}"].astype(np.float64)
        counts = [[0, 0], [0, 0]]
        nll = 0.0
        for row, label in zip(given, labels, strict=True):
            counts[label][int(row.argmax())] += 1
            nll -= row[label] - math.log(sum(math.exp(value) for value in row))
        assert measured.images == len(labels)
        assert measured.confusion == counts
        assert measured.accuracy == pytest.approx((counts[0][0] + counts[1][1]) / len(labels))
        assert measured.specificity == pytest.approx(counts[0][0] / sum(counts[0]))
        assert measured.sensitivity == pytest.approx(counts[1][1] / sum(counts[1]))
        assert measured.nll == pytest.approx(nll / len(labels))
        if name == "teacher":
            assert measured.agreement is None
        else:
            same = given.argmax(1) == logits[f"{split}/teacher"].argmax(1)
            assert measured.agreement == pytest.approx(same.mean())


def test_the_verdict_follows_from_the_predictions(
    finished: api.DistillResult, logits: dict[str, np.ndarray], store: Store
) -> None:
    labels = truth(store, "test")

    def accuracy(name: str) -> float:
        return float((logits[f"test/{name}"].argmax(1) == labels).mean())

    gains = {str(seed): accuracy(f"student-{seed}") - accuracy(f"baseline-{seed}") for seed in SEEDS}
    verdict = finished.verdict
    assert verdict.per_seed == pytest.approx(gains)
    assert verdict.gain.value == pytest.approx(sum(gains.values()) / len(gains))
    assert verdict.gain.low <= verdict.gain.value <= verdict.gain.high
    assert (verdict.seeds, verdict.images, verdict.min_gain) == (2, 40, 0.005)
    for role in ("baseline", "student"):
        mean = sum(accuracy(f"{role}-{seed}") for seed in SEEDS) / len(SEEDS)
        assert finished.record.summary[role].accuracy.value == pytest.approx(mean)
    assert finished.record.summary["teacher"].accuracy.value == pytest.approx(accuracy("teacher"))


def test_the_summary_counts_what_a_model_costs(finished: api.DistillResult) -> None:
    summary = finished.record.summary
    assert set(summary) == {"teacher", "baseline", "student"}
    # mnist_small on 10 px: two convolutions, then 32 maps of 3 x 3 to 2 classes
    parameters = (9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 9 * 2 + 2)
    for role, name in (("teacher", "teacher"), ("baseline", "baseline-0"), ("student", "student-0")):
        assert summary[role].profile.parameters == parameters
        assert summary[role].profile.bytes == (finished.folder / name / "model.safetensors").stat().st_size


def test_the_exported_file_is_the_chosen_student(finished: api.DistillResult) -> None:
    record = finished.record
    assert record.chosen is not None
    (export,) = record.exports
    assert f"student-{export.seed}" == record.chosen
    assert export.on_frames.images == 50
    assert export.on_frames.agreement == 1
    assert export.on_frames.max_difference < 1e-4
    val = record.models[record.chosen].val
    assert val is not None
    assert export.on_frames.accuracy == pytest.approx(val.accuracy)


# --- the choice ---


def test_the_chosen_student_is_the_best_on_validation(finished: api.DistillResult) -> None:
    scores = {}
    for name, model in finished.record.models.items():
        if model.role == "student":
            assert model.val is not None
            scores[name] = (model.val.accuracy, -model.val.nll)
    assert scores[finished.record.chosen or ""] == max(scores.values())


def test_a_student_that_is_better_on_the_test_images_is_not_chosen(
    copied: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """student-0 is made perfect on the test images and bad on validation, student-1 the other way round."""
    names = {}
    for name in MODELS:
        model, _ = files.load(copied / name / "model.safetensors")
        names[files.weights_fingerprint(model.net)] = name
    asked = []

    def answers(network: Classifier, split: object) -> np.ndarray:
        name = names[files.weights_fingerprint(network.net)]
        part = "val" if len(split) == 50 else "test"  # type: ignore[arg-type]
        asked.append(part)
        good = {("student-0", "test"), ("student-1", "val"), ("teacher", "val"), ("teacher", "test")}
        labels = truth(store, part)
        right = np.arange(len(labels)) % 10 < (9 if (name, part) in good else 6)
        return np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)]

    monkeypatch.setattr(judge, "answers", answers)
    (copied / "predictions.npz").unlink()
    record = api.resume(copied).record
    tests = [record.models[f"student-{seed}"].test for seed in SEEDS]
    assert [test.accuracy for test in tests if test] == pytest.approx([0.9, 0.6])
    assert record.chosen == "student-1"
    assert asked == ["val"] * 5 + ["test"] * 5  # and the test images are looked at last
