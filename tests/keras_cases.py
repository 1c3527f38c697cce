"""Cases of `test_keras.py`: Keras' distiller with our losses, our own, and what is refused."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_shared import BACKEND, CLASSES, Array, answers_of, batch, counted, digits, history, network
from understudy import losses
from understudy.errors import ConfigError, ModelError
from understudy.integrations.keras import DKD, KD, AttentionTransfer, Distiller, Hint, LogitMSE

# Keras' variables of the torch backend answer numpy 2 as numpy 1 wished
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


# --- keras.distillation.Distiller ------------------------------------------------------------------------------------


def test_our_losses_in_the_distiller_of_keras() -> None:
    images, labels = batch()
    teacher, student = network(8), network(seed=1)
    distiller = keras.distillation.Distiller(
        teacher,
        student,
        [KD(2.0), LogitMSE(), AttentionTransfer("act", "act")],
        distillation_loss_weights=[1.0, 0.1, 100.0],
        student_loss_weight=0.25,
    )
    distiller.compile(keras.optimizers.Adam(0.03), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = history(distiller, images, labels, epochs=8, batch_size=16)
    assert logs["distillation_loss"][-1] < 0.8 * logs["distillation_loss"][0]
    again = keras.distillation.Distiller.from_config(distiller.get_config())
    assert [loss.get_config() for loss in again.distillation_losses] == [
        {"temperature": 2.0},
        {},
        {"teacher_layer_name": "act", "student_layer_name": "act", "data_format": "channels_last"},
    ]


@pytest.mark.skipif(BACKEND != "torch", reason="the same code of Keras, and eager JAX takes half a minute")
@pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match the expected structure:UserWarning")
def test_the_distiller_of_keras_runs_the_student_twice_where_layers_are_compared() -> None:
    images, labels = batch()
    student = network(seed=1)
    distiller = keras.distillation.Distiller(network(8), student, AttentionTransfer("act", "act"))
    distiller.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    distiller.train_on_batch(images, labels)
    counted(student).clear()
    distiller.train_on_batch(images, labels)
    assert counted(student) == [True, True]


@pytest.mark.parametrize("loss", [Hint("act", "act"), DKD()])
def test_losses_that_only_our_distiller_can_serve(loss: Any) -> None:
    distiller = keras.distillation.Distiller(network(8), network(), loss)
    distiller.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ConfigError, match=r"understudy\.integrations\.keras\.Distiller"):
        distiller.fit(*batch(), verbose=0)


# --- ours ------------------------------------------------------------------------------------------------------------


def arrays(variables: Any) -> list[Array]:
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def test_it_learns_and_leaves_the_teacher_alone() -> None:
    (images, labels), held_out = digits()
    teacher, student = network(16), network(seed=1)
    teacher.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    teacher.fit(images, labels, epochs=6, verbose=0)
    before = arrays(teacher.variables)
    distiller = Distiller(teacher, student, KD(4.0), alpha=0.9)
    distiller.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    logs = history(distiller, images, labels, epochs=4, validation_data=held_out)
    assert set(logs) == {"loss", "student_loss", "distillation_loss", "accuracy", "val_loss", "val_accuracy"}
    assert logs["val_accuracy"][-1] > 0.7
    assert logs["distillation_loss"][-1] < 0.5 * logs["distillation_loss"][0]
    for one, other in zip(before, arrays(teacher.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_validation_is_the_students_alone() -> None:
    images, labels = batch()
    teacher, student = network(8), network(seed=1)
    distiller = Distiller(teacher, student, [KD(), AttentionTransfer("act", "act")], weights=[1.0, 1000.0])
    distiller.compile("sgd", metrics=["accuracy"], run_eagerly=True)
    counted(teacher).clear()
    found = distiller.evaluate(images, labels, verbose=0, return_dict=True)
    assert counted(teacher) == []
    answers = torch.tensor(answers_of(student, images))
    assert found["loss"] == pytest.approx(float(losses.cross_entropy(answers, torch.tensor(labels)).mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((answers.argmax(1).numpy() == labels).mean()))
    assert set(found) == {"loss", "accuracy"}
    assert distiller.evaluate(images, labels, verbose=0) == pytest.approx([found["loss"], found["accuracy"]])


def test_each_network_runs_once_a_step_in_its_mode() -> None:
    images, labels = batch()
    teacher, student = network(8), network(seed=1)
    seen = [KD(), AttentionTransfer("act", "act"), AttentionTransfer("first", "first"), Hint("act", "act")]
    distiller = Distiller(teacher, student, seen)
    distiller.compile("sgd", run_eagerly=True)
    distiller.train_on_batch(images, labels)
    counted(teacher).clear()
    counted(student).clear()
    distiller.train_on_batch(images, labels)
    assert (counted(student), counted(teacher)) == ([True], [False])


def test_what_is_trained() -> None:
    teacher, student = network(8), network(seed=1)
    hint = Hint("act", "act")
    distiller = Distiller(teacher, student, [KD(), hint])
    expected = [*student.trainable_variables, *hint.projector.trainable_variables]
    assert {id(variable) for variable in distiller.trainable_variables} == {id(variable) for variable in expected}
    assert not teacher.trainable_variables
    distiller.compile(keras.optimizers.SGD(0.1))
    before = arrays(expected)
    distiller.fit(*batch(), verbose=0)
    moved = [np.abs(one - other).max() for one, other in zip(before, arrays(expected), strict=True)]
    assert min(moved[:1] + moved[2:]) > 0  # batch norm takes the first convolution's bias away
    assert any(np.abs(array).max() > 0 for array in arrays(student.non_trainable_variables))


def test_the_total_is_the_weighted_sum() -> None:
    images, labels = batch()
    teacher, student = network(8), network(seed=1)
    mse, kd = LogitMSE(), KD(3.0)
    distiller = Distiller(teacher, student, [kd, mse], weights=[1.0, 0.5], ce_weight=0.2, kd_weight=3.0)
    distiller.compile("sgd")
    seen = distiller(images, training=True)
    total = distiller.compute_loss(images, labels, seen)
    answers, goal = seen[0], ops.convert_to_tensor(answers_of(teacher, images))
    ce = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, answers)
    expected = 0.2 * ce + 3.0 * (kd.compute_loss(goal, answers) + 0.5 * mse.compute_loss(goal, answers))
    assert float(ops.stop_gradient(total)) == pytest.approx(float(ops.stop_gradient(expected)), rel=1e-5)


def test_regularisers_count_once_and_whole() -> None:
    images, labels = batch()
    student = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(
                CLASSES, kernel_regularizer=keras.regularizers.L2(0.3), activity_regularizer=keras.regularizers.L2(0.3)
            ),
        ]
    )
    ready = keras.Sequential([keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)])
    distiller = Distiller(ready, student, ce_weight=0.0, kd_weight=1e-9)
    distiller.compile(keras.optimizers.SGD(0.0))
    kernel, answers = arrays(student.weights)[0], answers_of(student, images)
    expected = 0.3 * float((kernel**2).sum()) + 0.3 * float((answers**2).sum()) / len(images)
    assert history(distiller, images, labels, epochs=2)["loss"] == pytest.approx([expected] * 2, rel=1e-4)


def test_sample_weights_count_in_the_loss_with_the_labels() -> None:
    images, labels = batch()
    distiller = Distiller(network(8), network(seed=1))
    distiller.compile(keras.optimizers.SGD(0.0))
    plain = history(distiller, images, labels)
    without = history(distiller, images, labels, sample_weight=np.zeros(16))
    assert without["student_loss"] == [0.0]
    assert without["distillation_loss"] == pytest.approx(plain["distillation_loss"], rel=1e-3)


def test_labels_reach_the_losses_and_may_be_shares_for_others() -> None:
    images, labels = batch()
    distiller = Distiller(network(8), network(seed=1), DKD(2.0))
    distiller.compile("sgd")
    assert math.isfinite(history(distiller, images, labels)["loss"][0])
    shares = keras.utils.to_categorical(labels, CLASSES)
    distiller.compile("sgd", loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    with pytest.raises(ConfigError, match="class numbers"):
        distiller.fit(images, shares, verbose=0)
    plain = Distiller(network(8), network(seed=1), KD())
    plain.compile("sgd", loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    assert math.isfinite(history(plain, images, shares)["loss"][0])


@pytest.mark.skipif(BACKEND != "torch", reason="the hand-written loop is torch's")
def test_a_step_is_the_hand_written_one() -> None:
    images, labels = batch()
    teacher, student = network(8), network(seed=1)
    copy = network(seed=1)
    distiller = Distiller(teacher, student, KD(4.0), alpha=0.7)
    distiller.compile(keras.optimizers.SGD(0.1))
    distiller.fit(images, labels, batch_size=16, verbose=0)

    with torch.no_grad():
        goal = teacher(images, training=False)
    answers = copy(images, training=True)
    kd = losses.kd(answers, goal, temperature=4.0).mean()
    (0.3 * torch.nn.functional.cross_entropy(answers, torch.tensor(labels)) + 0.7 * kd).backward()
    for variable in copy.trainable_variables:
        gradient = variable.value.grad
        variable.assign(variable.value.detach() - 0.1 * gradient)
    for one, other in zip(arrays(student.variables), arrays(copy.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_files_hold_no_teacher(tmp_path: Path) -> None:
    images, labels = batch()
    teacher, student = network(8), network(seed=1)
    distiller = Distiller(teacher, student, [KD(), Hint("act", "act")])
    distiller.compile("sgd")
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", save_weights_only=True)
    distiller.fit(images, labels, callbacks=[checkpoint], verbose=0)
    expected = answers_of(student, images)

    other = Distiller(network(8, seed=5), network(seed=7), [KD(), Hint("act", "act")])
    other.compile("sgd")
    other.load_weights(tmp_path / "best.weights.h5")
    np.testing.assert_allclose(answers_of(other.student, images), expected, rtol=1e-5, atol=1e-6)
    assert not any(np.array_equal(arrays(teacher.weights)[0], one) for one in arrays(other.weights))
    assert len(distiller.weights) == len(student.weights) + 2

    student.save_weights(tmp_path / "student.weights.h5")
    alone = network(seed=9)
    alone.load_weights(tmp_path / "student.weights.h5")
    np.testing.assert_allclose(answers_of(alone, images), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"save `distiller\.student`"):
        distiller.save(tmp_path / "whole.keras")


def test_a_saved_student_answers_as_before(tmp_path: Path) -> None:
    layers = [keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    student = keras.Sequential(layers)
    distiller = Distiller(network(8), student)
    distiller.compile("sgd")
    distiller.fit(*batch(), verbose=0)
    distiller.student.save(tmp_path / "student.keras")
    images, _ = batch(seed=3)
    loaded = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_allclose(answers_of(loaded, images), answers_of(student, images), rtol=1e-6)


def test_answers_are_the_students() -> None:
    images, _ = batch()
    student = network(seed=1)
    distiller = Distiller(network(8), student, AttentionTransfer("act", "act"))
    np.testing.assert_array_equal(answers_of(distiller, images), answers_of(student, images))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_other_classes_are_one_sentence() -> None:
    distiller = Distiller(network(8, classes=7), network())
    distiller.compile("sgd")
    with pytest.raises(ModelError, match=r"student answers \[\w+, 10\] and the teacher \[\w+, 7\].*same classes"):
        distiller.fit(*batch(), verbose=0)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("distiller", [Distiller, keras.distillation.Distiller])
def test_probabilities_are_refused(distiller: Any, role: str) -> None:
    ends = {"teacher": None, "student": None, role: "softmax"}
    with pytest.raises(ModelError, match=f"The {role} ends in probabilities \\('head'\\)"):
        distiller(network(8, end=ends["teacher"]), network(end=ends["student"]), KD())


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "CategoricalCrossentropy",
        keras.losses.SparseCategoricalCrossentropy(),
        keras.losses.categorical_crossentropy,
    ],
)
def test_a_loss_of_probabilities_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match="from_logits=True"):
        Distiller(network(8), network()).compile("sgd", loss=loss)


def test_layers_are_looked_up() -> None:
    with pytest.raises(ConfigError, match=r"Unknown layer of the student 'frist'\. Did you mean 'first'\?"):
        Distiller(network(8), network(), AttentionTransfer("first", "frist"))
    with pytest.raises(ModelError, match="same height and width"):
        Distiller(network(8), network(), AttentionTransfer("head", "act"))

    class Own(keras.Model):
        def call(self, inputs: Any) -> Any:
            return inputs

    with pytest.raises(ModelError, match="student's layers cannot be looked at"):
        Distiller(network(8), Own(), AttentionTransfer("first", "first"))


def test_settings_that_make_no_sense() -> None:
    teacher, student = network(8), network()
    with pytest.raises(ConfigError, match="not both"):
        Distiller(teacher, student, alpha=0.5, kd_weight=1.0)
    with pytest.raises(ConfigError, match="between 0 and 1, not 2"):
        Distiller(teacher, student, alpha=2.0)
    for weights in ({"ce_weight": -1.0}, {"kd_weight": float("nan")}, {"ce_weight": 0.0, "kd_weight": 0.0}):
        with pytest.raises(ConfigError, match="0 or more and not both 0"):
            Distiller(teacher, student, **weights)
    with pytest.raises(ConfigError, match="2 losses and 1 weight"):
        Distiller(teacher, student, [KD(), LogitMSE()], weights=[1.0])
    with pytest.raises(ConfigError, match="temperature must be positive"):
        KD(0.0)
    with pytest.raises(ModelError, match="no weights yet"):
        Distiller(keras.Sequential([keras.layers.Dense(3)]), student)


def test_the_example_shows_it() -> None:
    file = Path(__file__).resolve().parents[1] / "examples" / "keras_distiller.py"
    measured = runpy.run_path(str(file))["main"]()
    assert measured["distilled"] > 0.8
    assert measured["teacher"] > 0.9
    assert measured["loaded"] == measured["distilled"]
