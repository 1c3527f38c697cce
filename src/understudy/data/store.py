"""Images decoded once and mapped ever after, with their labels, ids and splits.

`open_store` is the way from a configuration to a `Store`; the pipeline calls it. Memory stays flat in the number of
images in a folder: frames are written as they are decoded. Where they would exceed `data.store_budget`, nothing is
written and every read decodes; callers see no difference but time. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from understudy import cachefolder, storage
from understudy.config import DataConfig
from understudy.data import frames, listing, splits, streaming, unlabelled
from understudy.data.builtin import NO_LABEL
from understudy.data.decode import DECODE_VERSION, BadImage, decode_file, make_frame, read
from understudy.data.frames import Decoded, Frames, Geometry, StoredFrames
from understudy.data.listing import Entry
from understudy.data.sources import Source, open_source, printable
from understudy.data.streaming import StreamedFrames
from understudy.errors import DataError, UnderstudyError
from understudy.progress import Progress, silent

_LARGEST_DEFAULT = 224


@dataclass(frozen=True, eq=False)
class Store:
    """N images; every array is in the order of (id, name), whatever the order on the disk."""

    frames: Frames
    """uint8 `[N, channels, frame, frame]`, read by rows: stored, or streamed where they exceed the budget."""
    labels: NDArray[np.int64]
    """`[N]`, indices into `classes`; -1 for an image of no known class, or one that is to be learned from without."""
    ids: NDArray[np.uint64]
    """`[N]`, from the content: equal for identical files, the same wherever they lie."""
    names: list[str]
    """Paths relative to the folder, or such as "train/00012"."""
    classes: tuple[str, ...]
    splits: dict[str, NDArray[np.int64]]
    """Sorted rows of "train", "val" and "test", all with a label; of "unlabelled" where there are training images
    without one."""
    frame: int
    """Side in pixels of the frames."""
    channels: Literal[1, 3]
    image_size: int
    """Side in pixels of the square that the student sees; `frame` is equal, or 9/8 of it."""
    fit: Literal["crop", "squash"]
    notes: list[str]
    """What a reader must know, in sentences."""
    skipped: dict[str, str]
    """Images left out, by name: why."""
    duplicates: list[list[str]]
    """Names of identical images that lie in different splits: what is learned leaks into what is judged."""
    fingerprint: str
    """Names what training depends on: images, labels, splits, geometry."""
    reused: bool
    """Whether nothing had to be decoded before work can begin."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of images by split and class; those without a label are in none."""
        return {name: self._count(rows) for name, rows in self.splits.items() if name != unlabelled.PART}

    @property
    def unlabelled(self) -> int:
        """The number of training images without a label."""
        return len(self.splits.get(unlabelled.PART, ()))

    def _count(self, rows: NDArray[np.int64]) -> dict[str, int]:
        numbers = np.bincount(self.labels[rows], minlength=len(self.classes))
        return dict(zip(self.classes, numbers.tolist(), strict=True))


def open_store(
    config: DataConfig, *, progress: Progress = silent, cache: Path | None = None, workers: int | None = None
) -> Store:
    """Decode the images of a source, or find them decoded; beyond the budget, find out which can be decoded.

    Args:
        config: which images, and how they are kept.
        progress: told of reading and decoding.
        cache: the folder for what is kept; `storage.cache_dir()` by default.
        workers: threads; one for each core by default.

    Raises:
        DataError: the source cannot be used (see `open_source` and `splits.split`), or more than
            `config.max_bad_share` of its images are bad.
        UnderstudyError: the disk is full or cannot be written.
    """
    cache = cache or storage.cache_dir()
    workers = workers or _cores()
    source = open_source(config, progress=progress)
    entries = _entries(source, cache=cache, workers=workers, progress=progress)
    bad = {name: entry.bad for name, entry in entries.items() if entry.bad}
    good = {name: entry for name, entry in entries.items() if not entry.bad}

    def accept(late: Mapping[str, str]) -> None:
        _check_bad({**bad, **late}, len(entries), config.max_bad_share)

    accept({})
    labelled = _labelled(source, good)
    geometry, image_size = _geometry(config, labelled)
    names = sorted(good, key=lambda name: (good[name].hash[:16], name))
    job = _Job(source, good, geometry, names, _key(source, good, geometry), cache, accept, workers, progress)
    opened = _open(job, config.store_budget)
    accept(opened.skipped)  # the limit may be lower than when it was built
    rows = _rows(source, good, [name for name in names if name not in opened.skipped])
    colour = _colour_note(config, labelled)
    return _assemble(
        config, source, opened, rows, geometry, image_size, skipped={**bad, **opened.skipped}, notes=colour
    )


class _Job(NamedTuple):
    """What is to be decoded, and how."""

    source: Source
    entries: dict[str, Entry]
    geometry: Geometry
    names: list[str]
    """In the order of the rows."""
    key: str
    cache: Path
    accept: Callable[[Mapping[str, str]], None]
    workers: int
    progress: Progress

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return len(self.names) * self.geometry.frame_bytes


class _Opened(NamedTuple):
    """Frames that are ready to be read."""

    frames: Frames
    skipped: dict[str, str]
    reused: bool
    notes: Sequence[str] = ()


def _open(job: _Job, budget: float | None) -> _Opened:
    """Store the frames or find them stored; stream them where they are more than they may be, or than fits."""
    stores = job.cache / "stores"
    allowed = frames.room(stores) if budget is None else budget * 1e9
    if job.nbytes > allowed and not frames.find(stores, job.key, job.geometry):
        limit = "leaves the disk its reserve" if budget is None else "data.store_budget allows"
        return _streamed(job, f"{limit} ({_gigabytes(allowed)})")
    try:
        return _stored(job, stores)
    except UnderstudyError as error:
        if budget is not None or not listing.disk_is_full(error):
            raise
    return _streamed(job, "there is room for on the disk")


def _stored(job: _Job, stores: Path) -> _Opened:
    kept = frames.obtain(
        stores,
        job.key,
        job.geometry,
        job.names,
        _decoder(job, _same_bytes),
        accept=job.accept,
        workers=job.workers,
        progress=job.progress,
    )
    cachefolder.touch(kept.path.parent)
    return _Opened(StoredFrames(kept.path, kept.rows, job.geometry), kept.skipped, kept.reused)


def _streamed(job: _Job, limit: str) -> _Opened:
    skipped, reused = streaming.examine(
        job.cache / "examined",
        job.key,
        job.names,
        _decoder(job, _same_bytes),
        workers=job.workers,
        progress=job.progress,
    )
    good = [name for name in job.names if name not in skipped]
    streamed = StreamedFrames(good, _decoder(job, streaming.read_unchanged), job.geometry, workers=job.workers)
    note = (
        f"Decoded, the images would take {_gigabytes(job.nbytes)}, more than {limit}, so they are not stored but "
        "decoded again in every epoch: the results are the same, and it takes longer."
    )
    return _Opened(streamed, skipped, reused, [note])


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class _Rows(NamedTuple):
    """What is known of each frame, in the order of the frames."""

    names: list[str]
    labels: NDArray[np.int64]
    given: NDArray[np.int8]
    ids: NDArray[np.uint64]


def _assemble(
    config: DataConfig,
    source: Source,
    opened: _Opened,
    rows: _Rows,
    geometry: Geometry,
    image_size: int,
    *,
    skipped: Mapping[str, str],
    notes: Sequence[str],
) -> Store:
    parts, labels, held_out = unlabelled.divide(
        rows.labels, rows.given, rows.ids, classes=source.classes, config=config
    )
    rows = rows._replace(labels=labels)
    leaks, copies = splits.identical(rows.names, rows.labels, rows.ids, parts, classes=source.classes)
    return Store(
        frames=opened.frames,
        labels=rows.labels,
        ids=rows.ids,
        names=rows.names,
        classes=source.classes,
        splits=parts,
        frame=geometry.side,
        channels=geometry.channels,
        image_size=image_size,
        fit=geometry.fit,
        notes=[*source.notes, *notes, *opened.notes, *held_out, *copies],
        skipped={printable(name): why for name, why in skipped.items()},
        duplicates=leaks,
        fingerprint=_fingerprint(rows, parts, geometry),
        reused=opened.reused,
    )


def _rows(source: Source, entries: Mapping[str, Entry], names: Sequence[str]) -> _Rows:
    place = {name: row for row, name in enumerate(source.names)}
    order = np.array([place[name] for name in names])
    ids = np.array([int(entries[name].hash[:16], 16) for name in names], np.uint64)
    return _Rows([printable(name) for name in names], source.labels[order], source.given[order], ids)


def _labelled(source: Source, entries: Mapping[str, Entry]) -> list[Entry]:
    """Return what is known of the images with a label: those without change nothing but what is learned from them."""
    if (source.labels != NO_LABEL).all():
        return list(entries.values())
    known = (name for name, label in zip(source.names, source.labels, strict=True) if label != NO_LABEL)
    return [entries[name] for name in known if name in entries]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _entries(source: Source, *, cache: Path, workers: int, progress: Progress) -> dict[str, Entry]:
    if source.arrays is not None:
        return listing.list_arrays(source.names, source.arrays)
    assert source.root is not None
    return listing.list_files(source.root, source.names, cache=cache, workers=workers, progress=progress)


def _check_bad(bad: Mapping[str, str], total: int, allowed: float) -> None:
    if len(bad) <= allowed * total and len(bad) < total:
        return
    first = "; ".join(f"{printable(name)} ({why})" for name, why in list(bad.items())[:3])
    hint = " or allow more with --max-bad-share" if len(bad) < total else ""
    raise DataError(
        f"{len(bad)} of {total} images cannot be used ({100 * len(bad) / total:.1f} %): {first}"
        f"{', ...' if len(bad) > 3 else ''}. Mend or remove them{hint}."
    )


def _geometry(config: DataConfig, entries: Sequence[Entry]) -> tuple[Geometry, int]:
    """Return the geometry of the frames and the side of what the student sees.

    Where the images are larger than 9/8 of `image_size` by their median shorter side, frames keep that margin, so
    that a zoomed view is made of real pixels.
    """
    median = int(np.median([min(entry.width, entry.height) for entry in entries]))
    size = config.image_size or min(median, _LARGEST_DEFAULT)
    grey = config.channels == "grey" or (config.channels == "auto" and all(entry.is_grey for entry in entries))
    side = size if 8 * median <= 9 * size else round(size * 9 / 8)
    return Geometry(side, 1 if grey else 3, config.fit), size


def _key(source: Source, entries: Mapping[str, Entry], geometry: Geometry) -> str:
    """Name the frames by what is in them; where the folder lies is no part of it."""
    labels = dict(zip(source.names, source.labels.tolist(), strict=True))
    images = sorted((name, entry.hash, labels[name]) for name, entry in entries.items())
    return storage.fingerprint([DECODE_VERSION, *geometry, images])


def _decoder(job: _Job, read_again: Callable[[Path, Entry], bytes]) -> Callable[[str], Decoded]:
    """Return what turns a name into its frame, or into why there is none."""
    source, entries = job.source, job.entries
    side, channels, fit = job.geometry
    place = {name: row for row, name in enumerate(source.names)}

    def from_array(name: str) -> Decoded:
        assert source.arrays is not None
        pixels = source.arrays[place[name]]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return make_frame(image, side=side, channels=channels, fit=fit)

    def from_file(name: str) -> Decoded:
        assert source.root is not None
        data = read_again(source.root / name, entries[name])
        try:
            return decode_file(data, side=side, channels=channels, fit=fit)
        except BadImage as error:
            return str(error)

    return from_file if source.arrays is None else from_array


def _same_bytes(path: Path, entry: Entry) -> bytes:
    """Read a file again; frames are kept under the hash of what was listed, so it must not have changed since."""
    try:
        data = read(path)
    except BadImage as error:
        raise DataError(f"{path} could be read a moment ago and now is {error}. Run again.") from None
    if listing.hash_bytes(data) != entry.hash:
        raise DataError(f"{path} changed while it was being read. Run again when nothing writes to the folder.")
    return data


def _colour_note(config: DataConfig, entries: Sequence[Entry]) -> list[str]:
    grey = sum(entry.is_grey for entry in entries)
    if config.channels != "auto" or not len(entries) / 2 < grey < len(entries):
        return []
    return [
        f"{len(entries) - grey} of {len(entries)} images are stored in colour, so all are kept in colour; "
        "--set data.channels=grey makes them all grey."
    ]


def _fingerprint(rows: _Rows, parts: Mapping[str, NDArray[np.int64]], geometry: Geometry) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in parts.items():
        # rows are in the order of (id, name): images that share an id are told apart by their label alone
        order = np.lexsort((rows.labels[part], rows.ids[part]))
        digest.update(f"{name}:{len(part)};".encode())
        digest.update(rows.ids[part][order].astype("<u8").tobytes())
        digest.update(rows.labels[part][order].astype("<i8").tobytes())
    return storage.fingerprint([digest.hexdigest(), *geometry])
