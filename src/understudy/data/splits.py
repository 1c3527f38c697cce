"""Which images are learned from, chosen by, and judged by: pure numpy. Imported by `understudy.data.store`.

Whether an image is held out is a function of (seed, its id), so the choice survives renaming, reordering and adding
images, and identical images (one id) never lie on both sides of a line drawn here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from understudy.data.builtin import TEST, TRAIN, UNASSIGNED, VAL
from understudy.errors import DataError

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
_NAMES = {"train": TRAIN, "val": VAL, "test": TEST}


def split(
    labels: NDArray[np.int64],
    given: NDArray[np.int8],
    ids: NDArray[np.uint64],
    *,
    classes: Sequence[str],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    min_val: int = 50,
    min_val_per_class: int = 10,
) -> tuple[dict[str, Rows], list[str]]:
    """Divide images into train, val and test; what is given is kept, what is missing is held out of train.

    A given validation split of fewer than `min_val` images, or of fewer than `min_val_per_class` for each class on
    average, is too small to choose by: where train is larger, its images go to train and a new one is held out.

    Args:
        labels: `[N]`, indices into `classes`.
        given: `[N]`, 0 train, 1 validation, 2 test, -1 none.
        ids: `[N]`, equal for identical images.
        classes: names, for messages.
        val_fraction: expected share of the training images to hold out for validation.
        test_fraction: expected share of the images to hold out for the test, before validation.
        seed: another seed, another choice.
        min_val: see above.
        min_val_per_class: see above.

    Returns:
        Rows of "train", "val" and "test", sorted, and notes on what was held out.

    Raises:
        DataError: a class has fewer than two images, or none that is left to train on.
    """
    _check_counts(labels, classes)
    role = np.where(given == UNASSIGNED, TRAIN, given)
    notes = _dissolve_tiny_val(role, max(min_val, min_val_per_class * len(classes)))
    wanted = {"test": test_fraction, "val": val_fraction}
    missing = [name for name in wanted if not (role == _NAMES[name]).any()]
    for name in missing:
        pool = role == TRAIN
        later = 1 if name == "test" and "val" in missing else 0
        chosen = _hold_out(labels, ids, pool, wanted[name], key=f"{seed}:{name}", spare=1 + later)
        role[chosen] = _NAMES[name]
        notes.append(_note(name, int(chosen.sum()), int(pool.sum()), seed))
    parts = {name: np.flatnonzero(role == split) for name, split in _NAMES.items()}
    for name, rows in parts.items():
        notes += _check_part(name, np.bincount(labels[rows], minlength=len(classes)), classes)
    return parts, notes


def identical(
    names: Sequence[str],
    labels: NDArray[np.int64],
    ids: NDArray[np.uint64],
    parts: Mapping[str, Rows],
    *,
    classes: Sequence[str],
) -> tuple[list[list[str]], list[str]]:
    """Find identical images.

    Args:
        names: `[N]`.
        labels: `[N]`, indices into `classes`.
        ids: `[N]`, sorted.
        parts: the rows of each split; rows in none of them are passed over.
        classes: names, for the notes.

    Returns:
        Groups of names of identical images that lie in different splits, and notes on copies within a split and on
        images that stand in more than one class.
    """
    role = np.empty(len(ids), np.int8)
    for number, rows in enumerate(parts.values()):
        role[rows] = number
    used = np.sort(np.concatenate(list(parts.values())))
    groups = [rows for rows in np.split(used, np.flatnonzero(np.diff(ids[used])) + 1) if len(rows) > 1]
    leaks = [[names[row] for row in rows] for rows in groups if np.ptp(role[rows])]
    copies = sum(len(rows) - 1 for rows in groups if not np.ptp(role[rows]))
    notes = [f"Images that are identical copies of others in the same split: {copies}."] if copies else []
    torn = [rows for rows in groups if np.ptp(labels[rows])]
    if torn:
        few = ["; ".join(f"{names[row]} ({classes[labels[row]]})" for row in rows) for rows in torn[:3]]
        more = f", and {len(torn) - 3} more" if len(torn) > 3 else ""
        notes.append(f"Identical images stand in different classes: {', '.join(few)}{more}.")
    return leaks, notes


def _hold_out(
    labels: NDArray[np.int64], ids: NDArray[np.uint64], pool: Bools, fraction: float, *, key: str, spare: int
) -> Bools:
    """Choose the images of `pool` whose number lies below `fraction`.

    Of every class at least one image is chosen and `spare` different ones are left, where it has as many; only there
    does the choice depend on anything but the image itself.
    """
    numbers = uniform(ids, key)
    chosen: set[int] = set()
    for label in np.unique(labels[pool]):
        mine = pool & (labels == label)
        different, first = np.unique(ids[mine], return_index=True)
        own = numbers[mine][first]
        wanted = max(1, int((own < fraction).sum()))
        count = max(0, min(wanted, len(different) - spare))
        chosen.update(different[np.argsort(own)[:count]].tolist())
    return pool & np.isin(ids, np.fromiter(chosen, np.uint64, len(chosen)))


def uniform(ids: NDArray[np.uint64], key: str) -> NDArray[np.float64]:
    """Return one number in [0, 1) for each id: SplitMix64's output function (Steele, Lea, Flood 2014) of id and key."""
    salt = hashlib.blake2b(key.encode(), digest_size=8).digest()
    mixed = ids ^ np.frombuffer(salt, "<u8")[0]
    # two rounds, since ids that differ in few bits should not share their leading digits
    for _ in range(2):
        mixed = mixed + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, np.float64)


def _dissolve_tiny_val(role: NDArray[np.int8], enough: int) -> list[str]:
    count, train = int((role == VAL).sum()), int((role == TRAIN).sum())
    if not 0 < count < min(enough, train):
        return []
    role[role == VAL] = TRAIN
    return [
        f"The given validation split has {count} images only, too few to choose by (fewer than {enough}), so they were "
        f"added to the {train} training images and a new one was held out."
    ]


def _note(name: str, count: int, pool: int, seed: int) -> str:
    what = {"val": "validation", "test": "test"}[name]
    return (
        f"The {what} split was held out of the training images: {count} of {pool} "
        f"({100 * count / pool:.0f} %), drawn by class with split seed {seed}."
    )


def _check_counts(labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    for name, count in zip(classes, np.bincount(labels, minlength=len(classes)), strict=True):
        if count < 2:
            raise DataError(
                f"The class '{name}' has too few usable images ({count}); "
                "it needs at least two, to learn from and to judge by."
            )


def _check_part(name: str, counts: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    absent = [f"'{known}'" for known, count in zip(classes, counts, strict=True) if not count]
    if name == "train" and absent:
        raise DataError(f"The class {absent[0]} has no image left to train on. Add images of it.")
    if len(absent) == len(classes):
        raise DataError(
            f"There are too few different images to hold any out for '{name}'. "
            "A class needs at least three that differ."
        )
    return [f"Classes of too few images to have any in '{name}': {', '.join(absent)}."] if absent else []
