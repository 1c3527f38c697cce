"""The recipes of the repository: each is sound, runs cut down, and their page is made from what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imagefiles import make_folder
from understudy import cli, recipes
from understudy.config.recipe import load_recipe
from understudy.recipes import Order
from understudy.record import load as load_record
from understudy.record.recipe import load_recipe_record
from understudy.report import recipes as report
from understudy.report.notes import notes

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
MEASURED = sorted((ROOT / "recipes" / "results").glob("*.json"))


def test_there_is_one_for_each_reference_system() -> None:
    assert [file.stem for file in FILES] == ["chest_xray", "cifar10", "mnist", "mobile", "pets"]
    assert [load_recipe(file).name for file in FILES] == [file.stem for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_all_parts_are_sound(file: Path, smoke: bool, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    assert {part.role for part in recipe.parts} >= {"published", "ours"}
    recipes.check(Order(recipe, tmp_path, smoke=smoke))


def test_the_page_is_made_from_the_records() -> None:
    records = [load_recipe_record(file) for file in MEASURED]
    assert [record.name for record in records] == [file.stem for file in FILES]
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == report.page(records)


def test_records_are_of_the_recipes_as_they_stand() -> None:
    for file, measured in zip(FILES, MEASURED, strict=True):
        recipe, record = load_recipe(file), load_recipe_record(measured)
        assert (record.title, record.reference, record.smoke) == (recipe.title, recipe.reference, False)
        assert [part.name for part in record.parts] == [part.name for part in recipe.parts]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chest_xray", "cifar10", "mnist", "mobile"])
def test_a_recipe_runs_cut_down(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _run(ROOT / "recipes" / f"{name}.yaml", tmp_path / "out")
    record = load_recipe_record(tmp_path / "out")
    assert [part.status for part in record.parts] == ["done"] * len(record.parts)
    assert all(part.verdict for part in record.parts if part.kind == "distill")
    if name == "cifar10":
        _check_that_devices_are_told_of_batches(tmp_path / "out" / "published")
        assert [file.one_by_one for file in load_record(tmp_path / "out" / "ours").exports] == [None]
    if name == "mobile":
        device = record.parts[-1]
        assert {form.name for form in device.forms} >= {"pruned", "int8-ptq"}
        assert {one.format for one in device.files} == {"ONNX", "TorchScript", "ExecuTorch"}


@pytest.mark.slow
def test_pets_run_on_a_folder_of_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", {"cat": 40, "dog": 40})
    _run(ROOT / "recipes" / "pets.yaml", tmp_path / "out", "--data", str(folder))
    record = load_recipe_record(tmp_path / "out")
    assert [part.status for part in record.parts] == ["done"] * 4
    [published] = [part for part in record.parts if part.role == "published"]
    assert published.images["train"] + published.images["val"] + published.images["test"] == 80


def _check_that_devices_are_told_of_batches(folder: Path) -> None:
    """The published pair normalises by the statistics of a batch; a device asks for one image at a time."""
    _command("export", str(folder), "--to", "onnx", "torchscript")
    record = load_record(folder)
    assert [file.format for file in record.exports] == ["ONNX", "TorchScript"]
    for file in record.exports:
        assert file.on_frames.agreement == 1
        assert file.one_by_one is not None
        assert file.one_by_one.max_difference > 0.01
        assert file.note.startswith("Its answers depend on the other images of a batch")
        assert any(file.note in note.text for note in notes(record))
    script = [sys.executable, str(folder / "export" / "conformance.py"), "--runs", "3"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _run(file: Path, out: Path, *words: str) -> None:
    _command("run", str(file), "--smoke", "--out", str(out), *words)


def _command(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["understudy", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code in (0, None)
