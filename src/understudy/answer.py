"""A finished model at work: measured on labelled images, or asked about single ones. Imported by `cli.py`.

Images are decoded as they come, a few at a time; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from understudy.config import DataConfig
from understudy.data import builtin, decode, views
from understudy.data.decode import BadImage
from understudy.data.sources import HIDDEN, IMAGE_ENDINGS, Source, open_source
from understudy.errors import ConfigError, DataError, ModelError
from understudy.evaluate import gate, metrics
from understudy.export.runtimes import ENDINGS, Session, open_file
from understudy.models import files
from understudy.models.classifier import Classifier
from understudy.record import InputSpec, Metrics

_CHUNK = 128
_SPLITS = {"train": builtin.TRAIN, "val": builtin.VAL, "test": builtin.TEST}

Frame = np.ndarray | str
"""A decoded frame uint8 [channels, side, side], or the reason why there is none."""


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a split."""

    split: str
    metrics: Metrics
    skipped: dict[str, str]

    def text(self) -> str:
        """Return a few lines to read."""
        m = self.metrics
        lines = [f"{m.images} images ({self.split}): accuracy {m.accuracy:.1%}, macro F1 {m.macro_f1:.3f}"]
        if m.sensitivity is not None and m.specificity is not None:
            auroc = "" if m.auroc is None else f", AUROC {m.auroc:.3f}"
            lines.append(f"{m.positive}: sensitivity {m.sensitivity:.1%}, specificity {m.specificity:.1%}{auroc}")
        lines.append(f"NLL {m.nll:.3f}, Brier {m.brier:.3f}, ECE {m.ece:.3f}")
        lines += [f"  {name}: recall {recall:.1%}" for name, recall in m.recall.items() if recall is not None]
        lines += [f"skipped {name}: {why}" for name, why in self.skipped.items()]
        if self.split in ("all", "train"):
            lines.append("If the model was trained on some of these images, the figures flatter it.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Answer:
    """What a model says of one image."""

    image: str
    label: str = ""
    probabilities: dict[str, float] | None = None
    problem: str | None = None
    """Why there is no answer."""

    def text(self) -> str:
        """Return one line to read."""
        if self.probabilities is None:
            return f"{self.image}: skipped, {self.problem}"
        return f"{self.image}: {self.label} ({self.probabilities[self.label]:.1%})"

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-able object."""
        if self.probabilities is None:
            return {"image": self.image, "problem": self.problem}
        return {"image": self.image, "label": self.label, "probabilities": self.probabilities}


def evaluate(model: Path, data: str, *, split: str | None = None, data_dir: Path | None = None) -> Evaluation:
    """Measure a model on labelled images.

    Args:
        model: a weights file or a run folder.
        data: as for `DataConfig.source`.
        split: "train", "val", "test" or "all"; by default "test" where the data have one, else "all".
        data_dir: where torchvision's data sets lie.

    Raises:
        UnderstudyError: model or data cannot be used, or their classes differ.
    """
    classifier, _ = files.load(model)
    source = open_source(DataConfig(source=data, data_dir=data_dir, drop_unlabelled=True))
    _check_classes(classifier.classes, source.classes)
    split, rows = _rows(source, split)
    decoded = _decoded(rows, _reader(source, classifier.spec))
    logits: list[np.ndarray] = []
    labels: list[int] = []
    skipped: dict[str, str] = {}
    for chunk in decoded:
        good = [(row, frame) for row, frame in chunk if not isinstance(frame, str)]
        skipped |= {source.names[row]: frame for row, frame in chunk if isinstance(frame, str)}
        if good:
            logits.append(_logits(classifier, np.stack([frame for _, frame in good])))
            labels += [int(source.labels[row]) for row, _ in good]
    if not logits:
        raise DataError(f"None of the {len(rows)} images of {data} can be read.")
    measured = metrics.measure(np.concatenate(logits), np.array(labels), classifier.classes)
    return Evaluation(split, measured, skipped)


def _check_classes(known: Sequence[str], given: Sequence[str]) -> None:
    if gate.refuses(gate.check_classes(known, given)):
        raise ModelError(
            f"The model's classes are {_listed(known)}, those of the data {_listed(given)}: it can be measured on "
            "images of its own classes only, in folders of the same names."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def predict(model: Path, images: Sequence[Path], *, trusted: bool = False) -> Iterator[Answer]:
    """Yield the answer for every image, in order; a folder stands for the images below it.

    Args:
        model: a weights file, a run folder, or an exported file.
        images: files or folders.
        trusted: whether whoever wrote a `.pt2` or `.torchscript` file may run code here.

    Raises:
        UnderstudyError: the model cannot be used, or there is no such file.
    """
    paths = _paths(images)
    if model.suffix in ENDINGS:
        yield from _predict_exported(model, paths, trusted)
        return
    classifier, _ = files.load(model)
    for chunk in _decoded(list(range(len(paths))), lambda row: _frame(paths[row], classifier.spec)):
        for row, frame in chunk:
            if isinstance(frame, str):
                yield Answer(str(paths[row]), problem=frame)
            else:
                logits = _logits(classifier, frame[None])[0]
                yield _answer(paths[row], classifier.classes, np.exp(metrics.log_softmax(logits[None]))[0])


def _predict_exported(model: Path, paths: Sequence[Path], trusted: bool) -> Iterator[Answer]:
    from understudy.export import onnx
    from understudy.export.graph import read_card

    session = open_file(model, trusted=trusted)
    card = {**onnx.describe(model), "labels": onnx.labels(model)} if model.suffix == ".onnx" else read_card(model)
    spec = InputSpec.model_validate(card["input"])
    for path in paths:
        try:
            pixels = _pixels(path, session, spec)
        except BadImage as error:
            yield Answer(str(path), problem=str(error))
            continue
        yield _answer(path, card["labels"], session(pixels[None])[0])


def _pixels(path: Path, session: Session, spec: InputSpec) -> np.ndarray:
    """Return an image as a file takes it, uint8 [height, width, channels]: as it is, or fitted to the file's square."""
    if session.side is None:
        return decode.decode_upright(path, channels=spec.channels)
    frame = decode.decode_file(path, side=session.side, channels=spec.channels, fit=spec.fit)
    return frame.transpose(1, 2, 0)


def _answer(path: Path, classes: Sequence[str], probabilities: np.ndarray) -> Answer:
    named = {name: round(float(p), 6) for name, p in zip(classes, probabilities, strict=True)}
    return Answer(str(path), classes[int(np.argmax(probabilities))], named)


def _logits(classifier: Classifier, frames: np.ndarray) -> np.ndarray:
    sizes = classifier.spec.sizes
    with torch.inference_mode():
        # a copy: Pillow's arrays are read-only, which torch warns of
        images = views.whole(torch.from_numpy(frames.copy()), sizes[min(1, len(sizes) - 1)])
        return np.asarray(classifier(images).float().numpy())


def _rows(source: Source, split: str | None) -> tuple[str, list[int]]:
    if split not in (None, "all", *_SPLITS):
        raise ConfigError(f"--split is train, val, test or all, not '{split}'.")
    split = split or ("test" if (source.given == builtin.TEST).any() else "all")
    rows = np.arange(len(source.names)) if split == "all" else np.flatnonzero(source.given == _SPLITS[split])
    if not len(rows):
        raise DataError(f"{source.name} has no {split} split of its own; use --split all.")
    return split, [int(row) for row in rows]


def _reader(source: Source, spec: InputSpec) -> Callable[[int], Frame]:
    arrays, root = source.arrays, source.root
    if arrays is not None:
        return lambda row: decode.make_frame(
            Image.fromarray(arrays[row, ..., 0] if arrays.shape[-1] == 1 else arrays[row]),
            side=spec.sizes[0],
            channels=spec.channels,
            fit=spec.fit,
        )
    if root is None:
        raise ModelError("a source holds neither files nor arrays")
    return lambda row: _frame(root / source.names[row], spec)


def _frame(path: Path, spec: InputSpec) -> Frame:
    try:
        return decode.decode_file(path, side=spec.sizes[0], channels=spec.channels, fit=spec.fit)
    except BadImage as error:
        return str(error)


def _decoded(rows: Sequence[int], read: Callable[[int], Frame]) -> Iterator[list[tuple[int, Frame]]]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            yield list(zip(chunk, pool.map(read, chunk), strict=True))


def _images_below(folder: Path) -> Iterator[Path]:
    """Yield image files; what is hidden is passed over, as where data are listed."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_ENDINGS and not hidden:
            yield path


def _paths(images: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in images:
        if not path.exists():
            raise DataError(f"There is no file {path}.")
        inside = sorted(_images_below(path)) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"The folder {path} holds no images.")
        found += inside
    return found
