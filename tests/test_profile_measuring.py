"""How `understudy profile` measures: models in turn, and each with the memory of its own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compressed_record import compressed_record
from profiled_files import Spies, export, files_named, onnx_file, run_folder, spies, weights_file
from understudy.errors import ModelError
from understudy.evaluate import energy
from understudy.models import files
from understudy.profiling import eager, measure, resident, targets
from understudy.profiling.measure import Setting
from understudy.profiling.resident import Request, Resident

__all__ = ["spies"]  # a fixture


# --- how it is measured ---


def test_models_take_turns(tmp_path: Path, spies: Spies) -> None:
    found = targets.find(files_named(tmp_path, "a.onnx", "b.onnx"), None)
    done = measure.measure(found, Setting(runs=10, batch=4, threads=2))
    assert "".join(spies.order) == "aaabbb" + ("a" * 6 + "b" * 6) * 2
    assert spies.shapes == {(4, 5, 5, 3)}
    assert [one.latency.runs for one in done.models] == [10, 10]
    assert {(one.latency.batch, one.latency.threads, one.latency.runtime) for one in done.models} == {
        (4, 2, "Runtime 1")
    }
    assert [(ask.batch, ask.side, ask.channels, ask.threads) for ask in spies.asked] == [(4, 5, 3, 2)] * 2
    assert done.notes == ["Energy was not measured."]
    assert (done.threads, done.batch) == (2, 4)


def test_p99_needs_a_hundred_runs(tmp_path: Path, spies: Spies) -> None:
    found = targets.find(files_named(tmp_path, "a.onnx"), None)
    few, many = (measure.measure(found, Setting(runs=runs)).models[0].latency for runs in (99, 100))
    assert few.p99 is None
    assert many.p99 is not None
    assert many.p50 <= many.p95 <= many.p99


def test_throughput_counts_all_images(tmp_path: Path, spies: Spies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.profile, "times_in_turn", lambda calls, **ways: {"0": [10.0, 30.0]})
    (one,) = measure.measure(targets.find(files_named(tmp_path, "a.onnx"), None), Setting(batch=8)).models
    assert one.images_per_second == pytest.approx(16 / 0.040)
    assert one.latency.p50 == pytest.approx(20.0)


def test_energy_is_shared_by_the_images_of_a_batch(
    tmp_path: Path, spies: Spies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "zones", lambda: [energy.Zone(tmp_path, 1)])
    monkeypatch.setattr(energy, "per_call", lambda counters, call: 0.6)
    done = measure.measure(targets.find(files_named(tmp_path, "a.onnx"), None), Setting(batch=3, runs=5))
    assert done.models[0].joules_per_image == pytest.approx(0.2)
    assert done.notes == []


def test_images_have_the_size_that_the_file_was_made_for(tmp_path: Path, spies: Spies) -> None:
    spies.side = None  # any size
    onnx_file(tmp_path / "a.onnx")
    (script,) = files_named(tmp_path, "b.torchscript")
    card = tmp_path / "b.torchscript.json"
    for text in (None, "{", "{}", '{"input": {"sizes": []}}', "[]"):
        if text is not None:
            card.write_text(text)
        with pytest.raises(ModelError, match=r"b\.torchscript\.json is missing or damaged"):
            measure.measure(targets.find([script], None), Setting(runs=5))
    card.write_text('{"input": {"sizes": [9, 7]}}')
    measure.measure(targets.find([tmp_path / "a.onnx", script], None), Setting(runs=5))
    assert spies.shapes == {(1, 6, 6, 3), (1, 9, 9, 3)}


def test_a_process_that_fails_leaves_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spies(monkeypatch, Resident(problem="its own process failed (Killed)"))
    done = measure.measure(targets.find(files_named(tmp_path, "a.onnx"), None), Setting(runs=5))
    one = done.models[0]
    assert (one.memory_bytes, one.runtime_memory_bytes, one.load_ms) == (None, None, None)
    assert done.notes[0] == "The memory of a.onnx is not known: its own process failed (Killed)."


def test_a_file_of_a_run_whose_runtime_is_missing_is_left_out(tmp_path: Path, spies: Spies) -> None:
    record = compressed_record()
    record.exports.append(export("student", "export/student.pte"))
    found = targets.find([run_folder(tmp_path / "run", record)], None)
    done = measure.measure(found, Setting(runs=5))
    assert [one.name for one in done.models] == [row.name for row in record.compressed]
    assert done.notes[0].startswith("student.pte was left out: ExecuTorch is not installed. Install it with: pip")
    alone = [one for one in found if one.path.suffix == ".pte"]
    with pytest.raises(ModelError, match=r"student\.pte was left out: ExecuTorch is not installed"):
        measure.measure(alone, Setting())
    with pytest.raises(ModelError, match=r"^ExecuTorch is not installed"):  # this very file was named
        measure.measure(targets.find([alone[0].path], None), Setting())


def test_weights_in_pytorch_answer_as_the_model_does(tmp_path: Path) -> None:
    import torch

    from understudy.data import views

    path = weights_file(tmp_path / "model.safetensors")
    session = eager.open_weights(path, threads=1)
    assert (session.runtime, session.channels, session.side, session.batch) == ("PyTorch eager", 1, 12, None)
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 1), dtype=np.uint8)
    network = files.load(path)[0]
    with torch.inference_mode():
        shown = views.whole(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), 8)
        expected = network(shown).softmax(1).numpy()
    assert session(images) == pytest.approx(expected, abs=1e-6)


def test_weights_cost_what_their_network_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spies = Spies(monkeypatch)
    seen = []
    monkeypatch.setattr(measure.profile, "macs", lambda network, example: seen.append(example.shape) or 123)
    path = weights_file(tmp_path / "model.safetensors")
    (one,) = measure.measure(targets.find([path], "torch"), Setting(runtime="torch", runs=5)).models
    network = files.load(path)[0]
    assert one.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert (one.macs, seen) == (123, [(1, 1, 8, 8)])
    assert (one.bytes, one.runtime) == (path.stat().st_size, "PyTorch eager")
    assert spies.asked[0].path == str(path)
    assert spies.order == []  # no other runtime had a part in it


# --- memory ---


def size_of(path: Path) -> Request:
    return Request(str(path), threads=1, batch=2, side=6, channels=3)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_a_large_model_takes_more_memory_than_a_small_one(tmp_path: Path) -> None:
    small, large = onnx_file(tmp_path / "small.onnx"), onnx_file(tmp_path / "large.onnx", width=2_500_000)
    assert large.stat().st_size - small.stat().st_size > 49_000_000
    little, much = (resident.ask(size_of(path)) for path in (small, large))
    assert (little.problem, much.problem) == ("", "")
    assert little.peak is not None
    assert little.before is not None
    assert much.peak is not None
    assert much.before is not None
    assert much.peak - little.peak > 49_000_000
    assert 5_000_000 < little.before <= little.peak
    assert abs(much.before - little.before) < 10_000_000  # before it is opened, a model takes nothing
    assert little.load_ms is not None
    assert little.load_ms > 0


def test_the_small_process_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from understudy.profiling import resident; "
        f"resident.look(resident.Request({str(onnx_file(tmp_path / 'a.onnx'))!r}, 1, 1, 6, 3)); "
        "assert 'onnxruntime' in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_a_file_that_does_not_open_is_told_by_its_process(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    found = resident.ask(size_of(tmp_path / "broken.onnx"))
    assert (found.peak, found.before, found.load_ms) == (None, None, None)
    assert found.problem.startswith("its own process failed (")
    assert "is damaged or not an ONNX file" in found.problem
