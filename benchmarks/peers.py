"""Distillation beside other libraries: images per second, cost of an epoch and peak memory, on three pairs.

All loops train the same student with the same teacher, batches of 64, float32, KD with T = 4 and alpha = 0.5, AdamW,
images in memory. Each runs in a process of its own, stands still between its turns, and takes as many turns as there
are rounds. Libraries that are not installed are named in the table: the extra `peers` brings them all. The loops are in
`peers/`, one file each.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import _common as common
from peers import VARIANTS, Variant
from peers.pairs import ALPHA, BATCH, PAIRS, TEMPERATURE

FOLDER = Path(__file__).resolve().parent
LIMIT, CACHED = "student alone", "ours, cached"
SET_UP_SECONDS, TURN_SECONDS = 600.0, 120.0  # longer than that, and something hangs

Report = dict[str, Any]
"""What a loop says of a turn; see `peers/turns.py`."""


class Out(Exception):  # noqa: N818
    """A loop has no figures; says why in a line."""


class Loop:
    """A loop in a process of its own.

    Args:
        name: of a row in `VARIANTS`.
        pair: name of the pair.
        threads: of torch.
        images: that the training set holds.
    """

    def __init__(self, name: str, pair: str, threads: int, images: int) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "peers.run_one", name, pair, str(threads), str(images)]
        # not every library asks torch for the number of threads
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command,
            cwd=FOLDER,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def settle(self) -> Report:
        """Wait until it has been set up."""
        return self._report(SET_UP_SECONDS)

    def turn(self, seconds: float, steps: int) -> Report:
        """Let it train for at least so many seconds and steps."""
        self._order({"seconds": seconds, "steps": steps})
        return self._report(seconds + TURN_SECONDS)

    def finish(self) -> Report:
        """End it and return its last words."""
        self._order(None)
        return self._report(TURN_SECONDS)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _order(self, order: dict[str, Any] | None) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n" if order is None else json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Out(self._last_words()) from None

    def _report(self, seconds: float) -> Report:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise Out(f"nothing heard for {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Out(self._last_words())
        report: Report = json.loads(line)
        if "failed" in report:
            raise Out(report["failed"])
        return report

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1][:200] if lines else f"ended with status {self._process.returncode}"


# --- measuring -------------------------------------------------------------------------------------------------------


class Race:
    """All loops on one pair, in turns.

    A loop that fails is out, with its reason; the others go on.
    """

    def __init__(self, names: Sequence[str], pair: str, threads: int, images: int) -> None:
        self.pair, self.threads, self.images = pair, threads, min(images, PAIRS[pair].images)
        self.loops: dict[str, Loop] = {}
        self.turns: dict[str, list[Report]] = {}
        self.ends: dict[str, Report] = {}
        self.reasons = {name: reason for name in names if (reason := missing(VARIANTS[name]))}
        self._start([name for name in names if name not in self.reasons])

    def _start(self, names: Sequence[str]) -> None:
        """Set the loops up, one importing while the one before it settles; the one that runs its teacher comes last."""
        last: list[str] = []
        for name in sorted(names, key=lambda name: name == CACHED):
            if name == CACHED:
                self._settle(last)
            self.loops[name] = Loop(name, self.pair, self.threads, self.images)
            self._settle(last)
            last = [name]
        self._settle(last)

    def _settle(self, names: list[str]) -> None:
        while names:
            self._try(names.pop(), Loop.settle)

    def run(self, rounds: int, seconds: float, steps: int, until: float) -> None:
        """Let all take turns."""
        for _ in range(rounds):
            for name in list(self.loops):
                common.wait_for_quiet(until)
                if turn := self._try(name, lambda loop: loop.turn(seconds, steps)):
                    self.turns.setdefault(name, []).append(turn)

    def close(self) -> None:
        """End all loops; those whose student or teacher is not as it should be lose their figures."""
        for name in list(self.loops):
            if end := self._try(name, Loop.finish):
                self.ends[name] = end
                self.loops.pop(name).kill()

    def kill(self) -> None:
        """End what still runs."""
        for loop in self.loops.values():
            loop.kill()

    def _try(self, name: str, act: Callable[[Loop], Report | None]) -> Report | None:
        try:
            return act(self.loops[name])
        except Out as error:
            self.reasons[name] = str(error)
            self.loops.pop(name).kill()
            return None


def missing(variant: Variant) -> str:
    """Return what is not installed, if anything."""
    absent = [name for name in variant.requires if not _version(name)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def measure(names: Sequence[str], pair: str, words: argparse.Namespace) -> Race:
    race = Race(names, pair, words.threads, words.images)
    try:
        race.run(words.rounds, words.seconds, words.steps, time.monotonic() + words.patience)
        race.close()
    finally:
        race.kill()
    return race


# --- reporting -------------------------------------------------------------------------------------------------------


def report(name: str, race: Race) -> dict[str, Any]:
    """Return one row."""
    row = {"pair": race.pair, "loop": name}
    if name in race.reasons:
        return {**row, "failed": race.reasons[name]}
    turns = race.turns[name]
    step_ms = min(turn["step_ms"] for turn in turns)  # whatever else runs can only slow a turn down
    return {
        **row,
        "step_ms": round(step_ms, 3),
        "images_per_second": round(1e3 * BATCH / step_ms, 1),
        "epoch_seconds": round(PAIRS[race.pair].images * step_ms / (1e3 * BATCH), 2),
        "median_ms": round(median(turn["step_ms"] for turn in turns), 3),
        "turns_ms": [round(turn["step_ms"], 3) for turn in turns],
        "quiet_turns": sum(turn["quiet"] for turn in turns),
        **race.ends[name],
    }


def table(results: list[dict[str, Any]]) -> str:
    by_pair = {pair: [row for row in results if row["pair"] == pair] for pair in PAIRS}
    return "\n\n".join(section(pair, some) for pair, some in by_pair.items() if some)


HEAD = ("loop", "images/s", "s an epoch", "times alone", "times cached", "median images/s", "quiet turns", "peak MiB")


def section(name: str, results: list[dict[str, Any]]) -> str:
    """Return the table of one pair."""
    pair = PAIRS[name]
    measured = {row["loop"]: row for row in results if "failed" not in row}
    limit, cached = measured.get(LIMIT), measured.get(CACHED)
    shape = f"{pair.size} x {pair.size} x {pair.channels}"
    lines = [
        f"## {pair.teacher} to {pair.student}",
        f"{pair.images:,} images of {shape} ({pair.origin}), {pair.classes} classes.",
        common.rows(HEAD, [cells(row, limit, cached) for row in results]),
    ]
    if cached:
        rate = cached["teacher_images_per_second"]
        cost = f"{pair.images / rate:,.1f} s ({rate:,.0f} images/s)"
        lines.append(f"*{CACHED}* pays the teacher once, for all epochs and all students: {cost}.")
    return "\n\n".join(lines)


def cells(row: dict[str, Any], limit: dict[str, Any] | None, cached: dict[str, Any] | None) -> list[str]:
    """Return one line of it; a loop without figures says why."""
    if "failed" in row:
        return [row["loop"], row["failed"].replace("|", "/"), *[""] * (len(HEAD) - 2)]

    def times(other: dict[str, Any] | None) -> str:
        return f"{row['step_ms'] / other['step_ms']:.2f}" if other else ""

    return [
        row["loop"],
        f"{row['images_per_second']:,.0f}",
        f"{row['epoch_seconds']:,.1f}",
        times(limit),
        times(cached),
        f"{1e3 * BATCH / row['median_ms']:,.0f}",
        f"{row['quiet_turns']} of {len(row['turns_ms'])}",
        f"{row['peak_mib']:,.0f}",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="[all]")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="LOOP", help="[all]")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each loop [%(default)s]")
    parser.add_argument("--seconds", type=float, default=2, help="of a turn, at least [%(default)s]")
    parser.add_argument("--steps", type=int, default=8, help="of a turn, at least [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [%(default)s]")
    parser.add_argument(
        "--images", type=int, default=60_000, help="of a training set, at most; fewer for a quick look [%(default)s]"
    )
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for quiet, per pair [%(default)s]")
    return parser.parse_args()


def main() -> None:
    words = arguments()
    common.pin(words.threads)
    libraries = sorted({name for variant in VARIANTS.values() for name in variant.requires})
    settings = {
        "batch": BATCH,
        "precision": "fp32",
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
        "optimizer": "AdamW",
        "images_at_most": words.images,
        "rounds": words.rounds,
        "turn": {"seconds": words.seconds, "steps": words.steps},
        "loops": {name: VARIANTS[name].note for name in words.only},
        "pairs": {name: PAIRS[name]._asdict() for name in words.pairs},
        "libraries": {name: _version(name) or None for name in libraries},
    }
    results: list[dict[str, Any]] = []
    for pair in words.pairs:
        race = measure(words.only, pair, words)
        results += [report(name, race) for name in words.only]
        common.write("peers", settings, results, table(results))  # after each pair: the next may come to grief


if __name__ == "__main__":
    main()
