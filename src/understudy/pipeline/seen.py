"""Which images a teacher learned from, kept beside its weights, so that a later run can tell those that are to judge.

Imported by `trainings`.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np

from understudy import storage
from understudy.data.store import Store

FILE = "images.npy"
"""Ids of files' contents, ascending: the same image is found again at any size and under any name."""
_JUDGING = {"val": "validation", "test": "test"}


def note(folder: Path, store: Store) -> None:
    """Write down, in the folder of a model that was trained here, what it learned from."""
    file = io.BytesIO()
    np.save(file, np.unique(store.ids[store.splits["train"]]))
    storage.write_bytes(folder / FILE, file.getvalue())


def take_over(weights: Path, folder: Path) -> None:
    """Copy what is known of the model in a weights file; nothing is, of one that was trained elsewhere."""
    (folder / FILE).unlink(missing_ok=True)  # of another model that was here before
    known = weights.with_name(FILE)
    if known.is_file():
        shutil.copyfile(known, folder / FILE)


def again(folder: Path, store: Store) -> dict[str, tuple[int, int]]:
    """Return for validation and test images how many the model in a folder learned from, and how many there are."""
    try:
        learned = np.load(folder / FILE, allow_pickle=False)
    except (OSError, ValueError):
        return {}
    judging = {title: store.ids[store.splits[name]] for name, title in _JUDGING.items()}
    return {title: (int(np.isin(ids, learned).sum()), len(ids)) for title, ids in judging.items()}
