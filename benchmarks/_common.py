"""What the benchmarks share: pinned threads, what they ran on, data, peak memory, and how results are written."""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("understudy", "torch", "numpy", "accelerate", "pillow", "safetensors")


# --- the machine -----------------------------------------------------------------------------------------------------


def pin(threads: int) -> None:
    """Give torch a fixed number of threads: with as many as the machine has, figures vary with its load."""
    torch.set_num_threads(threads)


def surroundings() -> dict[str, Any]:
    """Say what a benchmark ran on, without names of machines or folders."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(_memory_bytes() / 2**30),
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "system": f"{platform.system()} {platform.machine()}",
    }


def _commit() -> str:
    """Name the commit, `+` behind it where files differ from it; "none" where there is none."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return int(np.prod([os.sysconf(name) for name in names])) if hasattr(os, "sysconf") else 0


# --- others at work --------------------------------------------------------------------------------------------------


class Quiet:
    """Tells whether this process had the machine to itself since the watch began; always so where it cannot know.

    A neighbour on another core slows memory down, and one on the same core makes all threads wait for the one that is
    held up: a step then takes up to ten times as long, and says nothing about the code.
    """

    def __init__(self) -> None:
        self._start = time.monotonic(), _busy_seconds(), time.process_time()

    def __call__(self) -> bool:
        elapsed = time.monotonic() - self._start[0]
        others = _busy_seconds() - self._start[1] - (time.process_time() - self._start[2])
        return others <= 0.08 * elapsed + 0.02  # the system counts in hundredths of a second


def wait_for_quiet(until: float) -> None:
    """Return as soon as nothing else runs, or when `time.monotonic()` is `until`."""
    while time.monotonic() < until:
        quiet = Quiet()
        time.sleep(0.3)
        if quiet():
            return


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine started; 0 where that is unknown."""
    try:
        words = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# --- memory ----------------------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """The largest memory of a process so far, in MiB."""

    resident: float
    """All pages in memory, those of mapped files among them, which the system takes back where it needs them."""
    private: float
    """What only the end of the process gives back."""


class Watch:
    """Samples the memory of this process; needs Linux.

    The peak that `resource.getrusage` knows is of no use here: a child begins with its parent's.
    """

    def __init__(self) -> None:
        self._private = 0.0
        threading.Thread(target=self._sample, daemon=True).start()

    def peak(self) -> Peak:
        """Return the peak since the process began (resident) and since the watch began (private)."""
        self._private = max(self._private, _status("RssAnon"))
        return Peak(round(_status("VmHWM"), 1), round(self._private, 1))

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(0.005):
            self._private = max(self._private, _status("RssAnon"))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def in_a_process(script: str, *words: str) -> Any:
    """Run a script of this folder in a process of its own; return the JSON in its last line."""
    command = [sys.executable, str(Path(script).resolve()), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- data ------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Labelled grey images of 28 x 28 pixels."""

    frames: torch.Tensor
    """uint8 [images, 1, 28, 28]."""
    labels: torch.Tensor
    """int64 [images], 0 to 9."""
    origin: str


def mnist() -> Images:
    """Return MNIST's training images from `$UNDERSTUDY_TEST_DATA` or `../shared/data`; noise where they are absent."""
    data = Path(os.environ.get("UNDERSTUDY_TEST_DATA") or ROOT.parent / "shared" / "data")
    raw = data / "mnist" / "MNIST" / "raw"
    if not raw.is_dir():
        generator = torch.Generator().manual_seed(0)
        frames = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8, generator=generator)
        return Images(frames, torch.arange(60_000) % 10, "noise in the shape of MNIST")
    frames = _idx(raw / "train-images-idx3-ubyte.gz", header=16)
    labels = _idx(raw / "train-labels-idx1-ubyte.gz", header=8)
    return Images(frames.view(-1, 1, 28, 28), labels.long(), "MNIST, training images")


def _idx(file: Path, *, header: int) -> torch.Tensor:
    with gzip.open(file) as stream:
        return torch.from_numpy(np.frombuffer(stream.read(), np.uint8, offset=header).copy())


# --- results ---------------------------------------------------------------------------------------------------------


def write(name: str, settings: dict[str, Any], results: Any, table: str) -> None:
    """Write `results/<name>.json` and `.md`, and print the table.

    Args:
        name: of the benchmark.
        settings: what was measured under.
        results: JSON-able.
        table: the same for readers, as Markdown.
    """
    RESULTS.mkdir(exist_ok=True)
    around = surroundings()
    values = {"format": "understudy-benchmark/1", "benchmark": name, **around, "settings": settings, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = f"# {name}\n\n{_header(around)}\n\n{table}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def _header(around: dict[str, Any]) -> str:
    hardware, versions = around["hardware"], around["versions"]
    return (
        f"{around['date']}, commit {around['commit']}; {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads used, {hardware['memory_gib']} GiB; "
        f"Python {versions['python']}, torch {versions['torch']}."
    )


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
