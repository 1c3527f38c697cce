"""What both files of cases on Keras share: a small network, data, and gradients on either backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops
from sklearn.datasets import load_digits

BACKEND = keras.backend.backend()
CLASSES = 10
Array = np.ndarray


@keras.saving.register_keras_serializable()
class Counted(keras.layers.Layer):
    """Passes on what it is given, and notes in which mode."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[bool] = []

    def call(self, inputs: Any, training: bool = False) -> Any:
        self.calls.append(bool(training))
        return inputs


def network(width: int = 4, *, classes: int = CLASSES, end: str | None = None, seed: int = 0) -> Any:
    """Return a small CNN for images [8, 8, 1], with batch norm and a layer that counts."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            Counted(),
            keras.layers.Conv2D(width, 3, strides=2, padding="same", name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.LeakyReLU(negative_slope=0.2, name="act"),
            keras.layers.Flatten(),
            keras.layers.Dense(classes, activation=end, name="head"),
        ]
    )


def counted(model: Any) -> list[bool]:
    calls: list[bool] = next(layer for layer in model.layers if isinstance(layer, Counted)).calls
    return calls


def history(model: Any, *args: Any, **options: Any) -> dict[str, list[float]]:
    """Fit, silently, and return the metrics of every epoch."""
    logs = model.fit(*args, **options, verbose=0).history
    return {name: [float(value) for value in values] for name, values in logs.items()}


def answers_of(model: Any, images: Array) -> Array:
    """Return what a model answers; quicker than `predict`, which compiles."""
    return np.asarray(ops.convert_to_numpy(model(images, training=False)))


def batch(size: int = 16, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 8, 8, 1)).astype("float32"), rng.integers(CLASSES, size=size)


def digits() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
    return (images[:640], labels[:640]), (images[640:960], labels[640:960])


def logits(seed: int = 0, scale: float = 3.0) -> tuple[Array, Array, Array]:
    """Return the student's and the teacher's logits [7, 5], and labels [7]."""
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.normal(size=(2, 7, 5)).astype("float32")
    return student, teacher, rng.integers(5, size=7)


def maps() -> tuple[Array, Array]:
    """Return the student's and the teacher's maps [7, 4, 3, channels], as Keras has them."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 4, 3, 6)).astype("float32"), rng.normal(size=(7, 4, 3, 5)).astype("float32")


def channels_first(array: Array) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2)


def value_and_gradient(function: Callable[[Any], Any], at: Array) -> tuple[float, Array]:
    """Return a scalar function of the backend's tensors and its gradient."""
    if BACKEND == "jax":
        import jax

        value, gradient = jax.value_and_grad(function)(ops.convert_to_tensor(at))
        return float(value), np.asarray(gradient)
    leaf = torch.tensor(at, requires_grad=True)
    value = function(leaf)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad.numpy()


def ours(function: Callable[[torch.Tensor], torch.Tensor], at: Array) -> tuple[float, Array]:
    """Return the mean of a loss of `understudy.losses` and its gradient."""
    leaf = torch.tensor(at, requires_grad=True)
    value = function(leaf).mean()
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad.numpy()


def agree(found: tuple[float, Array], expected: tuple[float, Array]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)
