"""Cases of `test_keras.py`: every loss equals that of `understudy.losses`, and what Keras' own default does."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_shared import BACKEND, Array, agree, channels_first, logits, maps, network, ours, value_and_gradient
from understudy import losses
from understudy.integrations.keras import DKD, KD, AttentionTransfer, Distiller, Hint, LogitMSE

# Keras' variables of the torch backend answer numpy 2 as numpy 1 wished
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def test_the_backend_is_the_one_asked_for() -> None:
    assert os.environ["KERAS_BACKEND"] == BACKEND


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_kd_is_ours(temperature: float, scale: float) -> None:
    student, teacher, _ = logits(scale=scale)
    found = value_and_gradient(lambda z: KD(temperature).compute_loss(ops.array(teacher), z), student)
    agree(found, ours(lambda z: losses.kd(z, torch.tensor(teacher), temperature=temperature), student))


def test_logit_mse_is_ours() -> None:
    student, teacher, _ = logits()
    found = value_and_gradient(lambda z: LogitMSE().compute_loss(ops.array(teacher), z), student)
    agree(found, ours(lambda z: losses.logit_mse(z, torch.tensor(teacher)), student))


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_dkd_is_ours(scale: float, shape: tuple[int, ...]) -> None:
    student, teacher, labels = logits(scale=scale)
    loss, known = DKD(2.0, alpha=1.5, beta=6.0), ops.array(labels.reshape(shape))
    found = value_and_gradient(lambda z: loss.compute_loss(ops.array(teacher), z, labels=known), student)
    given = torch.tensor(teacher), torch.tensor(labels)
    agree(found, ours(lambda z: losses.dkd(z, *given, temperature=2.0, alpha=1.5, beta=6.0), student))


def test_attention_is_ours_and_bears_dead_maps() -> None:
    student, teacher = maps()
    student[0] = 0.0
    found = value_and_gradient(lambda f: AttentionTransfer("t", "s").compute_loss(ops.array(teacher), f), student)
    value, gradient = ours(lambda f: losses.attention(f.permute(0, 3, 1, 2), channels_first(teacher)), student)
    agree(found, (value, gradient))
    first = AttentionTransfer("t", "s", data_format="channels_first")
    moved = [ops.array(np.moveaxis(array, 3, 1)) for array in (teacher, student)]
    assert float(first.compute_loss(*moved)) == pytest.approx(value, rel=1e-5)


def test_a_hint_is_ours_after_its_projector() -> None:
    student, teacher = network(6), network(9, seed=1)
    hint = Hint("act", "first")
    Distiller(teacher, student, hint)
    kernel, bias = (torch.tensor(ops.convert_to_numpy(variable)) for variable in hint.projector.trainable_variables)
    features = np.random.default_rng(0).normal(size=(3, 4, 4, 6)).astype("float32")
    goal = np.random.default_rng(1).normal(size=(3, 4, 4, 9)).astype("float32")
    projected = torch.nn.functional.conv2d(channels_first(features), kernel.permute(3, 2, 0, 1), bias)
    found = ops.convert_to_numpy(hint.compute_loss(ops.array(goal), ops.array(features)))
    assert float(found) == pytest.approx(float(losses.hint(projected, channels_first(goal)).mean()), rel=1e-5)


def test_half_precision_does_not_underflow() -> None:
    student, teacher = (array.astype("float16") for array in logits(scale=30.0)[:2])
    found = float(KD(1.0).compute_loss(ops.array(teacher), ops.array(student)))
    expected = losses.kd(torch.tensor(student), torch.tensor(teacher), temperature=1.0).mean()
    assert found == pytest.approx(float(expected), rel=1e-5)


# --- the fault of Keras' default -------------------------------------------------------------------------------------

TEACHER = np.array([[2.0, 1.0, -1.0], [0.5, -2.0, 3.0]], "float32")
STUDENT = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 2.0]], "float32")


def by_keras(student: Array, loss: Any = "kl_divergence") -> float:
    distillation = keras.distillation.LogitsDistillation(temperature=3.0, loss=loss)
    return float(distillation.compute_loss(ops.array(TEACHER), ops.array(student)))


def without_softmax(student: Array) -> float:
    """Return the divergence of logits / 3 taken for probabilities: clipped, no softmax, no T^2."""
    p, q = (np.clip(array.astype("float64") / 3, 1e-7, 1) for array in (TEACHER, student))
    return float((p * np.log(p / q)).sum(1).mean())


def softened_divergence(student: Array) -> float:
    """Return 9 KL(softmax(t / 3) || softmax(z / 3)), the mean over the batch, by hand."""
    p, q = (np.exp(array.astype("float64") / 3) for array in (TEACHER, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float(9 * (p * np.log(p / q)).sum(1).mean())


def test_the_default_of_keras_takes_logits_for_probabilities() -> None:
    assert by_keras(STUDENT) == pytest.approx(4.13089, rel=1e-4)
    assert by_keras(STUDENT) == pytest.approx(without_softmax(STUDENT), rel=1e-4)
    assert float(KD(3.0).compute_loss(ops.array(TEACHER), ops.array(STUDENT))) == pytest.approx(0.793880, rel=1e-4)
    assert softened_divergence(STUDENT) == pytest.approx(0.793880, rel=1e-4)


def test_the_default_of_keras_prefers_a_student_that_knows_nothing() -> None:
    nothing = np.full((2, 3), 3.0, "float32")  # all classes alike
    assert by_keras(nothing) < by_keras(TEACHER) == 0.0
    assert float(KD(3.0).compute_loss(ops.array(TEACHER), ops.array(nothing))) > 0.5


def test_the_default_of_keras_changes_with_a_constant_and_ignores_negative_logits() -> None:
    assert abs(by_keras(STUDENT + 5.0) - by_keras(STUDENT)) > 1.0
    function = keras.distillation.LogitsDistillation().compute_loss
    _, gradient = value_and_gradient(lambda z: function(ops.array(TEACHER), z), STUDENT)
    assert gradient[1, 0] == 0.0  # the student's -1, where the teacher says 0.5
    _, gradient = value_and_gradient(lambda z: KD(3.0).compute_loss(ops.array(TEACHER), z), STUDENT)
    assert abs(gradient[1, 0]) > 0.05


def test_an_instance_mends_the_default_of_keras() -> None:
    assert by_keras(STUDENT, keras.losses.KLDivergence()) == pytest.approx(softened_divergence(STUDENT), rel=1e-4)
