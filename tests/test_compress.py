"""`understudy compress`: forms of a student, each beside the one before; what is done twice, killed, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from small_runs import stop_in, stripes, tiny
from understudy import api, record
from understudy.errors import ConfigError, Interrupted, ModelError, RunError
from understudy.export import runtimes
from understudy.pipeline import compressing, forms, recovery
from understudy.pipeline.compressing import PTQ

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")
pytestmark = pytest.mark.slow

ASKED = {"prune": 0.5, "int8": "qat", "epochs": 2, "qat_epochs": 1, "calibration_images": 32, "calibrate": True}
FORMS = ["teacher", "baseline-{}", "student-{}", "pruned", "int8-ptq", "int8-qat", "calibrated"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compress")
    api.run(tiny(stripes(place / "data", side=16)), place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def compressed(finished: Path) -> Path:
    folder = finished.with_name("compressed")
    shutil.copytree(finished, folder)
    api.compress(folder, ASKED)
    return folder


def names(folder: Path) -> list[str]:
    return [row.name for row in record.load(folder).compressed]


def test_every_form_is_in_the_record_with_all_figures(compressed: Path) -> None:
    found = record.load(compressed)
    seed = found.models[found.chosen or ""].seed
    assert names(compressed) == [name.format(seed) for name in FORMS]
    assert found.status == "done"
    for row in found.compressed:
        assert row.val is not None
        assert row.test is not None
        assert row.accuracy is not None
        assert row.accuracy.low <= row.test.accuracy <= row.accuracy.high
        assert row.bytes == (compressed / row.path).stat().st_size
        assert row.latency.p50 > 0
        assert (row.drop is None) == (row.before == "")
    assert found.final == "calibrated"


def test_a_form_is_compared_with_the_one_before(compressed: Path) -> None:
    rows = {row.name: row for row in record.load(compressed).compressed}
    for row in rows.values():
        if row.before:
            before = rows[row.before]
            assert row.drop is not None
            assert row.drop.value == pytest.approx(before.test.accuracy - row.test.accuracy)
            one, other = (np.load(compressed / "compressed" / name / "answers.npz") for name in (row.name, row.before))
            assert row.changed == pytest.approx((one["test"].argmax(1) != other["test"].argmax(1)).mean())
    assert rows["pruned"].macs < rows[rows["pruned"].before].macs
    assert rows["pruned"].parameters < rows[rows["pruned"].before].parameters
    assert rows["int8-ptq"].before == rows["int8-qat"].before == "pruned"
    assert rows["int8-ptq"].quantized.way == "post-training"
    assert rows["int8-qat"].quantized.way == "quantization-aware"
    assert {layer.name for layer in rows["int8-ptq"].quantized.layers} >= {"fc"} or rows["int8-ptq"].quantized.layers


def test_files_answer_what_the_record_says(compressed: Path) -> None:
    """The file of each form, opened anew, answers as it did; calibrating changes no answer."""
    found = record.load(compressed)
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, found.data.channels), dtype=np.uint8)
    answers = {row.name: runtimes.open_file(compressed / row.path)(frames) for row in found.compressed}
    for row in found.compressed:
        np.testing.assert_allclose(answers[row.name].sum(1), 1, atol=1e-5)
    last = next(row for row in found.compressed if row.name == "calibrated")
    assert (answers["calibrated"].argmax(1) == answers[last.before].argmax(1)).all()
    assert last.temperature != 1


def test_the_report_shows_the_forms(compressed: Path) -> None:
    page = (compressed / "report.html").read_text()
    assert "int8-ptq" in page or "8 bits" in page


def test_a_second_time_nothing_is_done(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **words: Any) -> None:
        raise AssertionError("done again")

    before = record.load(compressed).compressed
    monkeypatch.setattr(forms, "of_float", fail)
    monkeypatch.setattr(forms, "of_file", fail)
    monkeypatch.setattr(recovery, "distil", fail)
    api.compress(compressed, ASKED)
    assert record.load(compressed).compressed == before
    api.resume(compressed)
    assert record.load(compressed).compressed == before


def test_less_may_be_asked_for_later_and_more_again(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compressed.with_name("again")
    shutil.copytree(compressed, folder)
    monkeypatch.setattr(recovery, "distil", lambda *given, **words: pytest.fail("trained again"))
    api.compress(folder, {**ASKED, "calibrate": False})
    assert record.load(folder).final in ("int8-ptq", "int8-qat")
    assert "calibrated" not in names(folder)
    api.compress(folder, ASKED)
    assert names(folder) == names(compressed)


def test_a_training_that_was_stopped_goes_on_to_the_same_end(
    finished: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.with_name("stopped")
    shutil.copytree(finished, folder)
    progress, stop = stop_in("pruned")
    with pytest.raises(Interrupted):
        api.compress(folder, ASKED, progress=progress, stop=stop)
    assert record.load(folder).status == "failed"
    assert list((folder / "compressed" / "pruned").glob("checkpoint-*"))
    api.resume(folder)
    for name in ("pruned", "int8-ptq"):
        one, other = (np.load(place / "compressed" / name / "answers.npz") for place in (folder, compressed))
        np.testing.assert_allclose(one["test"], other["test"], atol=1e-5)
    assert record.load(folder).status == "done"


def test_what_cannot_be_compressed_is_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with pytest.raises(ModelError, match="no_such"):
        api.compress(folder, {"int8": "ptq", "keep_float": ("no_such",)})
    assert record.load(folder).verdict is not None
    values = json.loads((folder / "record.json").read_text())
    values.update(chosen=None)
    (folder / "record.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match="no student that was judged"):
        api.compress(folder, {})
    with pytest.raises(RunError, match="no record"):
        api.compress(tmp_path, {})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="takes one process"):
        api.compress(folder, {})


def test_any_students_seed_may_be_named(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    chosen = record.load(folder).models[record.load(folder).chosen or ""].seed
    other = 1 - (chosen or 0)
    api.compress(folder, {"seed": other, "int8": "ptq", "calibration_images": 16})
    assert names(folder) == ["teacher", f"baseline-{other}", f"student-{other}", "int8-ptq"]
    with pytest.raises(ConfigError, match="no student of seed 7; there are 0, 1"):
        api.compress(folder, {"seed": 7})


def test_where_quantizing_loses_too_much_it_is_said_and_training_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "run", forms.of_file
    shutil.copytree(finished, folder)

    def spoilt(materials: Any, path: Path, *rest: Any) -> forms.Made:
        made = real(materials, path, *rest)
        return (
            replace(made, logits={split: -values for split, values in made.logits.items()})
            if PTQ in str(path)
            else made
        )

    monkeypatch.setattr(forms, "of_file", spoilt)
    api.compress(folder, {"calibration_images": 32, "max_drop": 0.1, "qat_epochs": 1})
    found = record.load(folder)
    ptq, trained = found.compressed[-2:]
    assert (ptq.name, trained.name, found.final) == ("int8-ptq", "int8-qat", "int8-qat")
    assert not ptq.accepted
    assert "--keep-float" in ptq.note
    assert "10.0 allowed" in ptq.note
    assert trained.accepted


@pytest.mark.parametrize("asked", [{"prune_macs": 0.5}, {"prune_ms": 1.0}])
def test_pruning_meets_a_budget(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, float]
) -> None:
    """Milliseconds are stood in for by the share of the parameters, so that no clock decides."""
    whole = record.load(finished).summary["student"].profile

    def milliseconds(net: nn.Module, example: Tensor) -> float:
        return 2 * sum(one.numel() for one in net.parameters()) / whole.parameters

    monkeypatch.setattr(compressing, "_milliseconds", milliseconds)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    api.compress(folder, {**asked, "int8": "none", "epochs": 1})
    row = record.load(folder).compressed[-1]
    assert row.name == "pruned"
    cost = row.macs / whole.macs if "prune_macs" in asked else row.parameters / whole.parameters
    assert 0.2 < cost <= 0.5


@pytest.mark.parametrize(
    "over",
    [{"sweep": {"temperature": [2.0, 6.0], "alpha": [0.5], "workers": 1}}, {"distill": {"method": "kd+attention"}}],
)
def test_after_a_sweep_and_with_terms_on_features(tmp_path: Path, over: dict[str, Any]) -> None:
    config = tiny(stripes(tmp_path / "data", side=16), train={"epochs": 1}, **over)
    api.run(config, tmp_path / "run")
    api.compress(tmp_path / "run", {"int8": "qat", "qat_epochs": 1, "calibration_images": 16})
    assert names(tmp_path / "run")[-2:] == ["int8-ptq", "int8-qat"]
