"""Which images there are, their classes and the splits they come in; decodes nothing.

`open_source` reads a folder as users have them, or a data set by name. Imported by `understudy.data.store`, and by
anyone who wants to look before decoding. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from understudy import storage
from understudy.config import DataConfig
from understudy.data import builtin
from understudy.errors import DataError, unknown
from understudy.progress import Progress, silent

HIDDEN = (".", "__MACOSX")
"""Begin the names of files and folders that are passed over: hidden, or left behind by another system."""
IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
_OTHER_ENDINGS = frozenset(
    {
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".rst", ".xml", ".yaml", ".yml", ".toml", ".html", ".htm"),
        *(
            ".pdf",
            ".doc",
            ".docx",
            ".xls",
            ".xlsx",
            ".db",
            ".ini",
            ".log",
            ".py",
            ".ipynb",
            ".sh",
            ".zip",
            ".gz",
            ".tar",
        ),
        *(".npy", ".npz", ".mat", ".h5", ".pkl", ".pt", ".pth", ".safetensors", ".onnx"),
    }
)
_OTHER_NAMES = frozenset({"readme", "license", "licence", "notice", "authors", "changelog", "manifest", "makefile"})
_SPLITS = {
    **dict.fromkeys(("train", "training"), builtin.TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), builtin.VAL),
    **dict.fromkeys(("test", "testing"), builtin.TEST),
}
_UNLABELLED = frozenset({"unlabelled", "unlabeled"})


@dataclass(frozen=True, eq=False)
class Source:
    """N images that are not yet decoded: files below `root`, or `arrays`."""

    name: str
    """What the user called it."""
    classes: tuple[str, ...]
    names: list[str]
    """Of every image: its path relative to `root` with "/", or such as "train/00012"."""
    labels: NDArray[np.int64]
    """`[N]`, indices into `classes`; -1 for an image of no known class."""
    given: NDArray[np.int8]
    """`[N]`, the split that the source puts an image in: 0 train, 1 validation, 2 test, -1 none."""
    arrays: NDArray[np.uint8] | None = None
    """`[N, H, W, 1 or 3]`, or None."""
    root: Path | None = None
    notes: list[str] = field(default_factory=list)
    """What a reader must know, in sentences."""


def open_source(config: DataConfig, *, progress: Progress = silent) -> Source:
    """Find the images that `config.source` means.

    A name of `builtin.BUILTIN` is that data set; a folder of such a name is reached by "./digits". Anything else is a
    folder that holds class folders, or train, val and test folders with class folders in them; beside these, a folder
    `unlabelled` may hold images of no known class.

    Raises:
        DataError: there is no such folder or data set, or it cannot serve to train a classifier.
    """
    name = config.source
    if name in builtin.BUILTIN:
        folder = (config.data_dir or storage.cache_dir() / "datasets").expanduser()
        return Source(name, *builtin.load(name, folder=folder, download=config.download))
    folder = Path(name).expanduser()
    _check_folder(name, folder)
    return read_folder(name, folder, unlabelled=not config.drop_unlabelled, progress=progress)


def read_folder(name: str, folder: Path, *, unlabelled: bool = True, progress: Progress = silent) -> Source:
    """Read a folder of images.

    Hidden files and folders are passed over, links to folders followed. Images at any depth below a class folder
    count for the class, and those below a folder `unlabelled` for none; these are left out unless `unlabelled`.

    Raises:
        DataError: no images, no class folders, one class only, a class that a split lacks, or an unreadable folder.
    """
    found = _find(folder)
    progress("find images", done=len(found.images), total=len(found.images))
    if not found.images:
        raise _no_images(folder, found)
    classed, free = _set_apart(found.images)
    splits = _split_folders(folder, classed)
    depth = 2 if splits else 1
    placed = [path for path in classed if path.count("/") >= depth]
    if not placed:
        raise _no_class_folders(folder)
    parts = [path.split("/", depth) for path in placed]
    class_of = [part[depth - 1] for part in parts]
    given = [splits[part[0]] if splits else builtin.UNASSIGNED for part in parts]
    classes = sorted(set(class_of))
    _check_classes(folder, classes, set(zip(given, class_of, strict=True)), splits)
    index = {name: label for label, name in enumerate(classes)}
    notes = _notes(found, classes, depth, loose=len(classed) - len(placed))
    if free and not unlabelled:
        notes, free = [*notes, f"Images without a label were left out: {len(free)}."], []
    return Source(
        name=name,
        classes=tuple(printable(name) for name in classes),
        names=placed + free,
        labels=np.array([index[name] for name in class_of] + [builtin.NO_LABEL] * len(free), np.int64),
        given=np.array(given + [builtin.UNASSIGNED] * len(free), np.int8),
        root=folder,
        notes=notes,
    )


def printable(name: str) -> str:
    """Return `name` as text that can be written anywhere; bytes of a file name that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class _Found(NamedTuple):
    images: list[str]
    folders: list[str]
    others: Counter[str]
    """Endings of the files that may be images of a kind that is not read."""


def _find(folder: Path) -> _Found:
    found = _Found([], [], Counter())
    for path, is_folder in _walk(folder, "", ()):
        ending = PurePosixPath(path).suffix.lower()
        if is_folder:
            found.folders.append(path)
        elif ending in IMAGE_ENDINGS:
            found.images.append(path)
        elif ending not in _OTHER_ENDINGS and PurePosixPath(path).stem.lower() not in _OTHER_NAMES:
            found.others[ending or "none"] += 1
    found.images.sort()
    return found


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, bool]]:
    """Yield (path relative to the first folder, is it a folder); a link back to a folder above is not followed."""
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be read ({error.strerror}).") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith(HIDDEN):
            continue
        is_folder = _is_folder(entry)
        yield prefix + entry.name, is_folder
        if is_folder:
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _set_apart(images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return images of some class, and those below a top folder for images of no known class."""
    free = [path for path in images if _is_unlabelled(path)]
    return [path for path in images if not _is_unlabelled(path)], free


def _is_unlabelled(path: str) -> bool:
    """Tell whether something, a folder itself left out, lies below a top folder for images of no known class."""
    top, below, _ = path.partition("/")
    return bool(below) and top.lower() in _UNLABELLED


def _split_folders(folder: Path, images: Sequence[str]) -> dict[str, int]:
    """Return the split of each top folder, or nothing where the top folders are classes."""
    tops = sorted({path.split("/")[0] for path in images if "/" in path})
    splits = {top: _SPLITS[top.lower()] for top in tops if top.lower() in _SPLITS}
    nested = {path.split("/")[0] for path in images if path.count("/") >= 2}
    strangers = [top for top in tops if top not in splits]
    if not splits or (strangers and nested.isdisjoint(splits)):
        return {}
    if strangers:
        raise DataError(
            f"{folder} holds {_join(splits)} beside {_join(strangers)}, so it is not clear which folders are splits "
            "and which are classes. Keep only split folders, or only class folders, at the top."
        )
    _check_splits(folder, splits)
    for top in splits:
        if top not in nested:
            raise _no_class_folders(folder / top)
    return splits


def _check_splits(folder: Path, splits: Mapping[str, int]) -> None:
    if builtin.TRAIN not in splits.values():
        raise DataError(f"{folder} holds {_join(splits)} but no folder 'train' to learn from.")
    for split in set(splits.values()):
        same = [top for top in splits if splits[top] == split]
        if len(same) > 1:
            raise DataError(f"{folder} holds {_join(same)}, which mean the same split. Merge them.")


def _check_folder(name: str, folder: Path) -> None:
    if os.path.isdir(folder):
        return
    if os.path.exists(folder):
        raise DataError(f"{folder} is a file, not a folder of images.")
    if folder.name == name:
        raise DataError(f"{unknown('data set', name, builtin.BUILTIN)} There is no folder '{name}' either.")
    raise DataError(f"There is no folder {folder}.")


def _check_classes(folder: Path, classes: Sequence[str], seen: set[tuple[int, str]], splits: Mapping[str, int]) -> None:
    for top, split in splits.items():
        for name in classes:
            if (split, name) not in seen:
                alike = [other for other in classes if other.lower() == name.lower() and (split, other) in seen]
                hint = f" (it has {_join(alike)}; spell class folders alike)" if alike else ""
                raise DataError(
                    f"The class '{printable(name)}' has no image in '{top}' of {folder}{hint}. "
                    "Every split needs images of every class."
                )
    if len(classes) == 1:
        only = printable(classes[0])
        raise DataError(
            f"{folder} holds one class only ('{only}'); a classifier needs at least two class folders. "
            f"If they lie one level down, name {folder / only} instead."
        )


def _no_images(folder: Path, found: _Found) -> DataError:
    others = f" (but files ending in {_endings(found)})" if found.others else ""
    return DataError(
        f"{folder} holds no images{others}. It should hold one folder of images for each class; known endings "
        f"are {' '.join(sorted(IMAGE_ENDINGS))}."
    )


def _no_class_folders(folder: Path) -> DataError:
    return DataError(
        f"{folder} holds images, but no class folders. "
        "Put the images of each class into a folder named after the class."
    )


def _notes(found: _Found, classes: Sequence[str], depth: int, *, loose: int) -> list[str]:
    notes = []
    if loose:
        notes.append(f"Images outside the class folders were left out: {loose}.")
    if found.others:
        notes.append(f"Files of other kinds were left out: {found.others.total()} (endings: {_endings(found)}).")
    known = set(classes) | {path.split("/")[0] for path in found.images if _is_unlabelled(path)}
    folders = [path for path in found.folders if path.count("/") == depth - 1 and not _is_unlabelled(path)]
    empty = [path for path in folders if path.split("/")[-1] not in known]
    if empty:
        notes.append(f"Folders without images were left out: {_join(printable(path) for path in empty)}.")
    return notes


def _endings(found: _Found) -> str:
    return ", ".join(ending for ending, _ in found.others.most_common(5))


def _join(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
