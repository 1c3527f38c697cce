"""What `benchmarks/scale.py` makes of its measurements: tables, predictions, and the page that quotes them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NETWORK = {"step": 0.01, "answer": 0.003, "judge": 0.002, "weight_bytes": 1000, "memory_bytes": 10**9}
READ = {
    "bytes": 10**6,
    "open_ms": 1.0,
    "verify_seconds": 2.0,
    "verify_mb_per_second": 100,
    "missing_blocks": 0,
    "random_rows_per_second": 5000,
    "with_logits_per_second": 4000,
    "random_frames_per_second": 6000,
    "private_mib_before": 1.0,
    "peak_mib": {"resident": 2.0, "private": 3.0},
}
INDEX = {
    "rows": 10,
    "open_seconds": 0.1,
    "order_seconds": 0.1,
    "draw_seconds": 0.1,
    "take_drawn_us_a_batch": 1.0,
    "draw_by_batch_us_a_batch": 2.0,
    "held_bytes_an_image": 24,
    "peak_bytes_an_image": 200,
    "peak_private_mib": 5.0,
}
FILES = {"list_us": 1.0, "list_again_us": 1.0, "store_us": 1.0, "reopen_us": 1.0}
RESULTS: dict[str, Any] = {
    "rows": 1000,
    "outputs": {"rows_per_second": 7, "writers": [1, 2, 3, 4], "read": READ},
    "outputs_tenth": READ,
    "frames": {"read": READ},
    "index": [INDEX],
    "files": [
        {**FILES, "files": 1000, "private_mib": 10.0},
        {**FILES, "files": 2000, "private_mib": 11.0},
    ],
    "packings": [
        {
            "classes": classes,
            "top": None,
            "row_bytes": 2 * classes,
            "dense_bytes": 2 * classes,
            "lost": {"1.0": 0.0, "4.0": 0.0},
            "pack_us": 1.0,
            "read_us": 1.0,
        }
        for classes in (10, 100, 1000, 21_841)
    ],
    "photographs": {"list": 0.001, "decode": 0.002},
}


@pytest.fixture(scope="module")
def docs() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("_scale_docs")
        for name in ("_scale_docs", "_scale_runs", "_common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def runs(docs: ModuleType) -> ModuleType:
    return importlib.import_module("_scale_runs")


def results(docs: ModuleType) -> dict[str, Any]:
    settings = {f"{side} px, {classes:,} classes" for _, _, side, classes in docs.RUNS}
    return {**RESULTS, "constants": {name: {"teacher": NETWORK, "student": NETWORK} for name in settings}}


def test_predictions_are_of_the_measured_constants(docs: ModuleType) -> None:
    lines = docs.predictions(results(docs)).splitlines()
    assert len(lines) == 2 + len(docs.RUNS)
    cifar = [cell.strip() for cell in lines[2].strip("|").split("|")]
    trained = 20 * (54_000 * 0.01 + 3000 * 0.002) + 3000 * 0.002
    assert cifar[2] == f"{trained / 3600:.2g}"
    assert cifar[-3] == f"{60_000 * 3 * 32 * 32 / 1e9:.1f}"


def test_memory_for_each_file_is_what_more_files_need_more(docs: ModuleType) -> None:
    constants = docs.constants_of(results(docs), "32 px, 10 classes")
    assert constants.listed_bytes == round(2**20 / 1000)
    assert (constants.drawn_bytes, constants.decode) == (200, 0.002)


def test_all_tables_have_even_rows(docs: ModuleType) -> None:
    for table in docs.tables(results(docs)).split("\n\n")[:-1]:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_page_quotes_the_committed_results(docs: ModuleType) -> None:
    text = docs.DOCS.read_text(encoding="utf-8")
    assert (text.count(docs.BEGIN), text.count(docs.END)) == (1, 1)
    quoted = text.split(docs.BEGIN)[1].split(docs.END)[0].strip()
    measured = (BENCHMARKS / "results" / "scale.json").exists()
    assert quoted == docs.block() if measured else quoted.startswith("Not measured yet")


def test_a_run_is_taken_apart_into_the_stages_of_the_model(runs: ModuleType) -> None:
    stages = {"teacher": 5, "gate": 1, "baseline-0": 2, "baseline-1": 3, "student-0": 7, "student-1": 4}
    stages |= {"evaluate": 2, "export": 1}
    record = {
        "seconds": 30.0,
        "outputs": {"seconds": 4.0},
        "stages": {name: {"seconds": seconds} for name, seconds in stages.items()},
    }
    found = runs.real(record, 33.0)
    assert found == {
        "data": 8.0,
        "teacher": 6,
        "outputs": 4.0,
        "baseline": 5,
        "student": 7.0,
        "evaluate": 2,
        "export": 1,
    }
    assert sum(found.values()) == 33.0
    assert runs.compared({"stage": "teacher", "seconds": 7.5}, 6)["ratio"] == 1.25


def test_a_stage_that_was_begun_twice_is_named(runs: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "t teacher: started\nt ended early\nt teacher: started\nt teacher: finished in 3 s\nt gate: started\n"
    )
    assert runs.interrupted(log) == ["teacher"]
