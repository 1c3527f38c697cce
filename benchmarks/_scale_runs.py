"""The model's answer for a run beside the run itself; `scale.py --xray` and `--digits`.

Everything lies in one folder with a fresh cache; as for a user, the run finds there what its forecast measured. Killed,
the same command goes on with the run; a stage that was interrupted is then marked, since its time is of its last part
only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common as common

WORDS = {
    "xray": ["--teacher", "resnet18", "--student", "cnn3", "--image-size", "64"],
    "digits": [
        *("--teacher", "mnist_large", "--student", "mnist_small", "--teacher-epochs", "15", "--epochs", "40"),
        *("--lr", "0.003", "--threads", "1", "--precision", "fp32"),
    ],
}


def compare(name: str, place: Path | None, epochs: int | None) -> None:
    """Forecast, run, and write `results/scale_<name>.json`."""
    place = place or Path(tempfile.gettempdir()) / f"understudy-scale-{name}"
    place.mkdir(parents=True, exist_ok=True)
    shorter = [] if epochs is None else ["--epochs", str(epochs)]
    words = [source(name), *WORDS[name], *shorter, "--out", str(place / "run")]
    forecast = once(place / "forecast.json", lambda: forecast_of(words, place / "cache"))
    seconds = once(place / "wall.json", lambda: run(words, place / "cache"))
    record = json.loads((place / "run" / "record.json").read_text())
    found = real(record, seconds)
    stages = [compared(step, found[step["stage"]]) for step in forecast["stages"]]
    total = compared({**forecast["total"], "stage": "in all"}, sum(found.values()))
    results = {
        "stages": stages,
        "total": total,
        "interrupted": interrupted(place / "run" / "log.txt"),
        "peak_memory_bytes": {
            "predicted": forecast["total"]["memory_bytes"],
            "real": record["environment"]["peak_memory_bytes"],
        },
        "disk_bytes": {
            "predicted": forecast["total"]["disk_bytes"],
            "real": sum(size(place / folder) for folder in ("run", "cache/stores", "cache/outputs")),
        },
    }
    common.write(f"scale_{name}", {"words": words[1:-2], "images": forecast["images"]}, results, table(results))


def source(name: str) -> str:
    if name == "digits":
        return name
    data = Path(os.environ.get("UNDERSTUDY_TEST_DATA") or common.ROOT.parent / "shared" / "data")
    folder = data / "chest_xray"
    if not folder.is_dir():
        raise SystemExit(f"No X-rays: {folder} is absent; UNDERSTUDY_TEST_DATA may name another folder.")
    return str(folder)


def once(path: Path, work: Any) -> Any:
    """Do some work and keep what it returns, unless it is kept already."""
    if not path.exists():
        made = json.dumps(work())
        path.write_text(made)
    return json.loads(path.read_text())


def forecast_of(words: list[str], cache: Path) -> Any:
    done = call([*words, "--dry-run", "--json"], cache, capture_output=True, text=True)
    return json.loads(done.stdout)


def run(words: list[str], cache: Path) -> float:
    """Run to the end and return the seconds; of a run that was killed before, those of the last part."""
    start = time.monotonic()
    call(words, cache)
    return time.monotonic() - start


def call(words: list[str], cache: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "UNDERSTUDY_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "understudy.cli", "distill", *words], env=surroundings, check=True, **how
    )


def real(record: dict[str, Any], wall: float) -> dict[str, float]:
    """Return the seconds of each stage; what no stage counts is imports, images and the report."""
    seconds = {name: stage["seconds"] for name, stage in record["stages"].items()}

    def of(word: str) -> float:
        return sum(value for name, value in seconds.items() if name == word or name.startswith(f"{word}-"))

    outputs = record["outputs"]["seconds"] if record["outputs"] else 0.0
    return {
        "data": max(wall, record["seconds"]) - sum(seconds.values()),
        "teacher": of("teacher") + of("gate"),
        "outputs": outputs,
        "baseline": of("baseline"),
        "student": of("student") - outputs,
        "evaluate": of("evaluate"),
        "export": of("export"),
    }


def compared(step: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Put what was predicted beside what was needed."""
    predicted = step["seconds"]
    ratio = round(predicted / seconds, 3) if seconds > 0 else None
    return {"stage": step["stage"], "predicted": round(predicted, 1), "real": round(seconds, 1), "ratio": ratio}


def interrupted(log: Path) -> list[str]:
    """Return the stages that were begun more than once."""
    begun = [line.split()[1].rstrip(":") for line in log.read_text().splitlines() if line.endswith(": started")]
    return sorted({name for name in begun if begun.count(name) > 1})


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(results: dict[str, Any]) -> str:
    """Return the comparison for readers."""
    body = [
        [row["stage"], f"{row['predicted']:,.0f}", f"{row['real']:,.0f}", f"{row['ratio'] or 0:.2f}"]
        for row in [*results["stages"], results["total"]]
    ]
    text = common.rows(["stage", "predicted s", "real s", "ratio"], body)
    for name, unit, of in (("peak_memory_bytes", "MB of memory at most", 1e6), ("disk_bytes", "MB of disk", 1e6)):
        pair = results[name]
        text += f"\n\n{pair['predicted'] / of:,.0f} {unit} predicted, {pair['real'] / of:,.0f} needed."
    if results["interrupted"]:
        text += f"\n\nInterrupted, so that their time is of their last part: {', '.join(results['interrupted'])}."
    return text
