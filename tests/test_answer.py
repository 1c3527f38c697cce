"""A finished model asked: the figures are the run's own, and the exported file says the same as the weights."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_runs
from small_runs import stripes, tiny
from understudy import answer, api, cli
from understudy.errors import ConfigError, DataError, ModelError, RunError, UnderstudyError
from understudy.models import files
from understudy.record import Metrics


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 20 px: frames of 18, views of 16."""
    return stripes(tmp_path_factory.mktemp("data") / "photos", side=20)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> api.DistillResult:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return small_runs.distilled(photos, folder, data={"image_size": 16}, seeds=[0])


@pytest.fixture
def onnx(finished: api.DistillResult) -> Path:
    return finished.folder / "export/student.onnx"


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Images of any size and kind."""
    rng = np.random.default_rng(0)
    shapes = [(18, 18), (20, 20), (16, 16), (64, 48), (7, 30), (100, 101, 3), (33, 20, 4)]
    paths = []
    for number, shape in enumerate(shapes):
        paths.append(tmp_path / "mixed" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        coarse.resize((4, 4)).resize(coarse.size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def close(one: Metrics, other: Metrics) -> None:
    """Compare two measurements; what compares with a teacher is left out."""
    left, right = (
        metrics.model_dump(exclude={"agreement", "kl_to_teacher", "reliability"}) for metrics in (one, other)
    )
    assert left.pop("recall") == pytest.approx(right.pop("recall"))
    assert left.pop("confusion") == right.pop("confusion")
    assert left.pop("positive") == right.pop("positive")
    assert left == pytest.approx(right, rel=1e-5)
    assert [bar.count for bar in one.reliability] == [bar.count for bar in other.reliability]


# --- evaluate ---


@pytest.mark.parametrize("name", ["teacher", "baseline-0", "student-0"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_the_figures_are_those_of_the_run(name: str, split: str, finished: api.DistillResult, photos: Path) -> None:
    found = answer.evaluate(finished.folder / name / "model.safetensors", str(photos), split=split)
    expected = getattr(finished.record.models[name], split)
    assert (found.split, found.skipped) == (split, {})
    assert expected.images == {"val": 50, "test": 40}[split]
    close(found.metrics, expected)


def test_a_run_folder_stands_for_its_student_and_the_test_split(finished: api.DistillResult, photos: Path) -> None:
    found = answer.evaluate(finished.folder, str(photos))
    assert found.split == "test"
    test = finished.record.models[finished.record.chosen or ""].test
    assert test is not None
    close(found.metrics, test)


def test_all_images_are_those_of_every_split(finished: api.DistillResult, photos: Path) -> None:
    parts = [answer.evaluate(finished.folder, str(photos), split=split).metrics for split in ("train", "val", "test")]
    whole = answer.evaluate(finished.folder, str(photos), split="all").metrics
    assert whole.images == 170
    assert np.array_equal(whole.confusion, sum(np.array(part.confusion) for part in parts))


def test_data_without_a_test_split_are_measured_whole(tmp_path: Path) -> None:
    over = {"teacher": {"epochs": 1}, "train": {"batch_size": 128}}
    taught = api.run(tiny("digits", **over), tmp_path / "run", kind="train")
    found = answer.evaluate(taught.folder, "digits")
    assert (found.split, found.metrics.images) == ("all", 1797)
    with pytest.raises(DataError, match="no test split of its own; use --split all"):
        answer.evaluate(taught.folder, "digits", split="test")


def test_an_unreadable_image_is_named_and_left_out(finished: api.DistillResult, photos: Path, tmp_path: Path) -> None:
    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "test/dog/007.png").write_bytes(b"no image")
    found = answer.evaluate(finished.folder, str(source))
    assert list(found.skipped) == ["test/dog/007.png"]
    assert found.metrics.images == 39
    assert "skipped test/dog/007.png: " in found.text()


@pytest.mark.parametrize("classes", [("dog", "hen"), ("cat", "dog", "hen")])
def test_other_classes_are_refused(classes: Sequence[str], finished: api.DistillResult, tmp_path: Path) -> None:
    source = stripes(tmp_path / "other", classes=classes)
    told = f"^The model's classes are cat, dog, those of the data {', '.join(classes)}: it can be measured on images of"
    with pytest.raises(ModelError, match=told):
        answer.evaluate(finished.folder, str(source))


def test_evaluate_prints_what_it_measured(
    finished: api.DistillResult, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "evaluate", finished.folder, photos)
    test = finished.record.models["student-0"].test
    assert test is not None
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"40 images (test): accuracy {test.accuracy:.1%}, macro F1 {test.macro_f1:.3f}"
    assert f"dog: sensitivity {test.sensitivity:.1%}, specificity {test.specificity:.1%}" in out
    code, out, err = command(capsys, "evaluate", finished.folder, photos, "--json", "--split", "test")
    assert (code, err) == (0, "")
    close(Metrics.model_validate_json(out), test)


@pytest.mark.parametrize(
    ("model", "data", "split", "error", "words"),
    [
        ("none.safetensors", None, None, ModelError, "no weights file none.safetensors"),
        (".", None, None, RunError, "no record.json"),
        (None, "nowhere/photos", None, DataError, "nowhere/photos"),
        (None, "digts", None, DataError, "Did you mean 'digits'"),
        (None, None, "tests", ConfigError, "train, val, test or all, not 'tests'"),
        ("export/student.onnx", None, None, UnderstudyError, "student.onnx"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    model: str | None,
    data: str | None,
    split: str | None,
    error: type[Exception],
    words: str,
    finished: api.DistillResult,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = finished.folder if model is None else Path(model)
    if model == "export/student.onnx":
        given = finished.folder / model
    with pytest.raises(error, match=words):
        answer.evaluate(given, data or str(photos), split=split)


# --- predict ---


def test_the_answers_are_the_softmax_of_the_logits(finished: api.DistillResult, photos: Path, tmp_path: Path) -> None:
    """Frames of 18 px are needed and images of 18 px are given, so only the last resize and the network remain."""
    pixels = np.asarray(Image.open(photos / "test/cat/000.png").crop((1, 1, 19, 19)))
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (found,) = answer.predict(finished.folder, [tmp_path / "one.png"])
    model, _ = files.load(finished.folder)
    image = torch.from_numpy(pixels.copy())[None, None].float() / 255
    with torch.no_grad():
        expected = model(image)[0].double().softmax(0)
    assert found.probabilities is not None
    assert list(found.probabilities) == ["cat", "dog"]
    assert list(found.probabilities.values()) == pytest.approx(expected.tolist(), abs=2e-6)
    assert found.label == max(found.probabilities, key=lambda name: found.probabilities[name])  # type: ignore[index]
    assert found.image == str(tmp_path / "one.png")


def test_a_folder_stands_for_the_images_below_it(finished: api.DistillResult, photos: Path, mixed: list[Path]) -> None:
    below = photos / "test"
    found = list(answer.predict(finished.folder, [mixed[3], below, mixed[0]]))
    expected = [mixed[3], *sorted(below.rglob("*.png")), mixed[0]]
    assert [one.image for one in found] == [str(path) for path in expected]
    right = [one.label == Path(one.image).parent.name for one in found[1:-1]]
    test = finished.record.models["student-0"].test
    assert test is not None
    assert np.mean(right) == pytest.approx(test.accuracy)


def test_hidden_files_of_a_folder_are_passed_over(
    finished: api.DistillResult, mixed: list[Path], tmp_path: Path
) -> None:
    for name in ("own.png", "._own.png", ".hidden/other.png", "__MACOSX/other.png"):
        path = tmp_path / "copied" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mixed[0], path)
    found = answer.predict(finished.folder, [tmp_path / "copied"])
    assert [one.image for one in found] == [str(tmp_path / "copied" / "own.png")]


def test_the_exported_file_says_what_the_weights_say(
    finished: api.DistillResult, onnx: Path, photos: Path, mixed: list[Path]
) -> None:
    images = [*mixed, photos / "val"]
    one, other = (list(answer.predict(model, images)) for model in (finished.folder, onnx))
    assert len(one) == len(other) == len(mixed) + 50
    for ours, exported in zip(one, other, strict=True):
        assert ours.image == exported.image
        assert ours.problem is None
        assert exported.probabilities == pytest.approx(ours.probabilities, abs=1e-3)


@pytest.mark.parametrize("exported", [False, True])
def test_a_bad_file_is_listed_and_the_others_are_answered(
    exported: bool,
    finished: api.DistillResult,
    onnx: Path,
    mixed: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixed[1].write_bytes(b"no image")
    model = onnx if exported else finished.folder
    code, out, err = command(capsys, "predict", model, *mixed)
    lines = out.splitlines()
    assert code == 1
    assert err.splitlines() == ["Error: 1 of the files could not be read as images; the others are answered above."]
    assert len(lines) == len(mixed)
    assert lines[1].startswith(f"{mixed[1]}: skipped, ")
    assert [line.split(":")[0] for line in lines] == [str(path) for path in mixed]
    code, out, err = command(capsys, "predict", model, *mixed, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert set(rows[1]) == {"image", "problem"}
    for row in (rows[0], *rows[2:]):
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_predict_exits_with_0_where_all_is_well(
    finished: api.DistillResult, mixed: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "predict", finished.folder, *mixed)
    assert (code, err, len(out.splitlines())) == (0, "", len(mixed))


@pytest.mark.parametrize(
    ("model", "image", "error", "words"),
    [
        (None, "none.png", DataError, "no file none.png"),
        (None, "empty", DataError, "empty holds no images"),
        ("none.safetensors", None, ModelError, "no weights file"),
        ("none.onnx", None, ModelError, "none.onnx does not exist"),
        ("text.onnx", None, ModelError, "text.onnx is damaged or not an ONNX file"),
        ("text.safetensors", None, ModelError, "text"),
        ("model.pt", None, ModelError, "pickle"),
        ("empty", None, RunError, "no record.json"),
    ],
)
def test_what_cannot_be_asked_is_said(
    model: str | None,
    image: str | None,
    error: type[Exception],
    words: str,
    finished: api.DistillResult,
    mixed: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("text.onnx", "text.safetensors", "model.pt"):
        (tmp_path / name).write_text("Neither weights nor graph.")
    given = finished.folder if model is None else Path(model)
    with pytest.raises(error, match=words):
        list(answer.predict(given, [Path(image) if image else mixed[0]]))
