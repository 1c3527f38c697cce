"""One loop on one pair, in a process of its own: `python -m peers.run_one NAME PAIR THREADS IMAGES` in `benchmarks/`.

Takes orders and reports as `turns.py` says. The last report holds the peak memory, or why the loop cannot be trusted:
the student must have learned and the teacher must be as it was.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import _common as common
from peers import VARIANTS, pairs
from peers.turns import Finished, Turns


def main(name: str, pair_name: str, threads: int, images: int) -> None:
    """Train until the orders end."""
    # frameworks print; the reports keep the standard output for themselves
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    variant, pair = VARIANTS[name], pairs.PAIRS[pair_name]
    turns = Turns(sys.stdin, reports)
    data = pairs.data(pair, images)
    module = import_module(f"peers.{variant.module}")
    common.pin(threads)  # some frameworks set the number themselves when they are imported
    nets = getattr(module, "networks", pairs.networks)(pair, data)
    student, teacher = fingerprint(nets.student), fingerprint(nets.teacher)
    forget_peak()
    with contextlib.suppress(Finished):
        getattr(module, variant.loop)(nets, data, turns)
    turns.say({"peak_mib": peak_mib(), **turns.notes, **trust(nets, student, teacher, threads)})


def fingerprint(network: nn.Module) -> dict[str, tuple[float, float]]:
    """Return two sums per tensor: buffers included, since a teacher in training mode moves those first."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        # in one order, whatever the layout in memory: a sum depends on it
        flat = {key: one.double().contiguous().flatten() for key, one in tensors.items()}
        return {key: (float(one.sum()), float(one.square().sum())) for key, one in flat.items()}


def trust(nets: pairs.Nets, student: Any, teacher: Any, threads: int) -> dict[str, str]:
    """Return why the figures are worth nothing, if so."""
    trained = [key for key, one in nets.student.named_parameters() if one.requires_grad]
    after = fingerprint(nets.student)
    still = [key for key in trained if after[key] == student[key]]
    if still or not trained:
        return {"failed": f"{len(still)} of {len(trained)} tensors of the student were not trained"}
    if fingerprint(nets.teacher) != teacher:
        return {"failed": "the teacher changed"}
    if torch.get_num_threads() != threads:
        return {"failed": f"it used {torch.get_num_threads()} threads, not {threads}"}
    return {}


def forget_peak() -> None:
    """Let the largest memory so far count no more: the images were made by us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the largest memory since, in MiB, all that the process needs: libraries, images and training."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024, 1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
