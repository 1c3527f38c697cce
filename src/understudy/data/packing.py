"""How the answers of a teacher are kept: all logits in half precision, or the largest ones with the mass of the rest.

Imported by `outputs.py`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOST_AT_MOST = 0.01
"""Largest share of what a teacher says beyond the uniform distribution that leaving out small logits may cost."""
DENSE_UP_TO = 128
"""Classes; so few logits are small enough as they are."""
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Packing:
    """The form of one row.

    With `top`, the row holds the `top` largest logits, their classes, and the logarithm of the mean of exp over the
    other classes, which all get that same logit again: their mass at temperature 1 is kept, its distribution is not.
    """

    classes: int
    top: int | None = None
    """How many logits are kept; None keeps them all."""
    embedding: int = 0
    """Length of the pooled embedding that is kept as well; 0 keeps none."""

    @property
    def row(self) -> np.dtype[np.void]:
        """Type of a row in a file."""
        fields: list[Any] = [("logits", "<f2", (self.top or self.classes,))]
        if self.top is not None:
            fields += [("places", "<u2" if self.classes <= 1 << 16 else "<u4", (self.top,)), ("rest", "<f2")]
        if self.embedding:
            fields += [("embedding", "<f2", (self.embedding,))]
        return np.dtype(fields)

    def pack(self, logits: NDArray[np.float32], embedding: NDArray[np.float32] | None = None) -> NDArray[np.void]:
        """Return rows [images] from logits [images, classes] and, where it is kept, the embedding [images, length]."""
        rows = np.zeros(len(logits), self.row)
        if self.top is None:
            rows["logits"] = _half(logits)
        else:
            places = np.argpartition(-logits, self.top - 1, axis=1)[:, : self.top]
            rows["places"] = places
            rows["logits"] = _half(np.take_along_axis(logits, places, 1))
            rows["rest"] = _half(_mean_of_the_rest(logits, places))
        if embedding is not None:
            rows["embedding"] = _half(embedding)
        return rows

    def logits(self, rows: NDArray[np.void]) -> NDArray[np.float32]:
        """Return the logits [images, classes] that rows stand for."""
        kept = np.asarray(rows["logits"], np.float32)
        if self.top is None:
            return kept
        logits = np.repeat(np.asarray(rows["rest"], np.float32)[:, None], self.classes, 1)
        np.put_along_axis(logits, rows["places"].astype(np.int64), kept, 1)
        return logits

    def error(self, rows: NDArray[np.void], logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return how far rows are from the logits that they should stand for, [images].

        The largest difference of an image, less what rounding to half precision explains, as a share of the image's
        largest logit. The classes are those that the rows name: where two logits are all but equal, either may be kept.
        """
        kept, meant = np.asarray(rows["logits"], np.float64), logits
        if self.top is not None:
            places = rows["places"].astype(np.intp)
            rest = _mean_of_the_rest(logits, places)[:, None]
            kept = np.concatenate([kept, rows["rest"][:, None]], 1)
            meant = np.concatenate([np.take_along_axis(logits, places, 1), rest], 1)
        meant = meant.clip(-_LARGEST, _LARGEST).astype(np.float64)
        beyond = np.abs(kept - meant) - np.abs(meant) * 2.0**-11 - 2.0**-25
        return np.asarray(beyond.max(1).clip(0) / np.maximum(np.abs(logits).max(1), 1e-6))

    def describe(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {"classes": self.classes, "top": self.top, "embedding": self.embedding}


def choose(sample: NDArray[np.float32], temperatures: Sequence[float], *, embedding: int = 0) -> Packing:
    """Return the smallest packing that loses at most `LOST_AT_MOST` at each temperature, measured on a sample.

    Args:
        sample: the teacher's logits on some images, [images, classes].
        temperatures: that students will be taught with.
        embedding: length of the pooled embedding, 0 for none.
    """
    classes = sample.shape[1]
    whole = Packing(classes, embedding=embedding)
    if classes <= DENSE_UP_TO:
        return whole
    for top in (2**power for power in range(3, 14)):
        packing = Packing(classes, top, embedding)
        if top >= classes or packing.row.itemsize >= whole.row.itemsize:
            break
        if max(lost(sample, packing, temperature) for temperature in temperatures) <= LOST_AT_MOST:
            return packing
    return whole


def lost(logits: NDArray[np.float32], packing: Packing, temperature: float) -> float:
    """Return the share of what a teacher says that a packing loses: mean KL(p || kept p) / mean KL(p || uniform).

    Both divergences fall alike as the temperature rises, so the share can be compared between temperatures.

    Args:
        logits: of the teacher, [images, classes].
        packing: the form in which they are kept.
        temperature: of the softmax.
    """
    log_p = _log_softmax(logits / temperature)
    log_kept = _log_softmax(packing.logits(packing.pack(logits)) / temperature)
    p = np.exp(log_p)
    said = (p * (log_p + np.log(logits.shape[1]))).sum(1).mean()
    missing = (p * (log_p - log_kept)).sum(1).mean()
    return float(missing / said) if said > 0 else 0.0


def _mean_of_the_rest(logits: NDArray[np.float32], places: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return log(mean(exp)) over the classes that are not in `places`, [images]."""
    others = logits.astype(np.float64)
    np.put_along_axis(others, places, -np.inf, 1)
    largest = others.max(1, keepdims=True)
    mass = np.exp(others - largest).sum(1)
    count = logits.shape[1] - places.shape[1]
    return np.asarray(largest[:, 0] + np.log(mass / count), np.float32)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    return np.asarray(values.clip(-_LARGEST, _LARGEST), np.float16)
