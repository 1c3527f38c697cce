"""`keras.distillation.Distiller` on the torch backend, `fit` on arrays, the same architectures written in Keras."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from keras import layers

from peers.pairs import ALPHA, BATCH, RATE, TEMPERATURE, Data, Nets, Pair, Tick

# the layout of torch's own convolutions: up to 16 % less processor time a step than Keras' default, never more than 1 %
# above it (measured on the three pairs)
keras.config.set_image_data_format("channels_first")

CHANNELS = 1
EPOCHS = 1_000_000  # the orders end long before


class Ticking(keras.callbacks.Callback):
    """Calls `tick` after each batch."""

    def __init__(self, tick: Tick) -> None:
        super().__init__()
        self.tick = tick

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        """Note a step of training."""
        self.tick()


def networks(pair: Pair, data: Data) -> Nets:
    shape = (pair.channels, pair.size, pair.size)
    return Nets(BUILDERS[pair.teacher](shape, pair.classes), BUILDERS[pair.student](shape, pair.classes))


def train(nets: Nets, data: Data, tick: Tick) -> None:
    distiller = keras.distillation.Distiller(
        teacher=nets.teacher,
        student=nets.student,
        distillation_losses=keras.distillation.LogitsDistillation(temperature=TEMPERATURE),
        student_loss_weight=1 - ALPHA,
    )
    distiller.compile(
        optimizer=keras.optimizers.AdamW(RATE), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    images, labels = data.floats().numpy(), data.labels.numpy().astype(np.int32)
    distiller.fit(images, labels, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[Ticking(tick)])


# --- the networks ----------------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]


def digits(shape: Shape, classes: int, widths: tuple[int, int]) -> keras.Model:
    """Return a network of the MNIST pair."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(widths[0], 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.MaxPooling2D(2, strides=1, padding="same"),
            layers.Conv2D(widths[1], 3, strides=2, padding="same"),
            layers.Flatten(),
            layers.Dense(classes),
        ]
    )


def cnn3(shape: Shape, classes: int) -> keras.Model:
    """Return the student of the X-ray pair."""
    parts: list[keras.Layer] = [keras.Input(shape)]
    for width, stride, pool in ((32, 2, True), (96, 1, True), (288, 1, False)):
        parts += [layers.ZeroPadding2D(1), layers.Conv2D(width, 3, strides=stride, use_bias=False)]
        parts += [layers.BatchNormalization(axis=CHANNELS), layers.ReLU()]
        parts += [layers.MaxPooling2D(2)] if pool else []
    return keras.Sequential([*parts, layers.GlobalAveragePooling2D(), layers.Dense(classes)])


def resnet18(shape: Shape, classes: int) -> keras.Model:
    """Return ResNet-18, which keras.applications does not have."""
    inputs = keras.Input(shape)
    x = layers.ZeroPadding2D(3)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(axis=CHANNELS)(layers.Conv2D(64, 7, strides=2, use_bias=False)(x)))
    x = layers.MaxPooling2D(3, strides=2)(layers.ZeroPadding2D(1)(x))
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        x = _basic_block(x, width, stride)
    return keras.Model(inputs, layers.Dense(classes)(layers.GlobalAveragePooling2D()(x)))


def _basic_block(x: keras.KerasTensor, width: int, stride: int) -> keras.KerasTensor:
    shortcut = x
    if stride > 1:
        shortcut = layers.BatchNormalization(axis=CHANNELS)(layers.Conv2D(width, 1, strides=stride, use_bias=False)(x))
    x = layers.Conv2D(width, 3, strides=stride, use_bias=False)(layers.ZeroPadding2D(1)(x))
    x = layers.ReLU()(layers.BatchNormalization(axis=CHANNELS)(x))
    x = layers.Conv2D(width, 3, use_bias=False)(layers.ZeroPadding2D(1)(x))
    return layers.ReLU()(layers.Add()([layers.BatchNormalization(axis=CHANNELS)(x), shortcut]))


def resnet50(shape: Shape, classes: int) -> keras.Model:
    """Return ResNet-50 with its stride in the first 1x1 convolution of a block: fewer operations than torchvision's."""
    return keras.applications.ResNet50(weights=None, input_shape=shape, classes=classes, classifier_activation=None)


def mobilenet_v2(shape: Shape, classes: int) -> keras.Model:
    return keras.applications.MobileNetV2(weights=None, input_shape=shape, classes=classes, classifier_activation=None)


BUILDERS = {
    "mnist_large": lambda shape, classes: digits(shape, classes, (256, 512)),
    "mnist_small": lambda shape, classes: digits(shape, classes, (16, 32)),
    "resnet18": resnet18,
    "cnn3": cnn3,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
}
