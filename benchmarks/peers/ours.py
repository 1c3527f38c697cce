"""Our own loop: the student alone, with its teacher running along, and with the teacher's answers read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peers import pairs
from peers.pairs import ALPHA, BATCH, RATE, TEMPERATURE, Data, Nets, Pair, Tick
from peers.turns import Turns
from understudy.config import TrainConfig
from understudy.data.batches import Epochs, Split
from understudy.data.outputs import Answers, Outputs, Source, Viewed, open_outputs
from understudy.data.views import POLICIES
from understudy.distillation import Distiller, methods
from understudy.engine import Engine
from understudy.numerics import Numerics, Running, for_answers
from understudy.train import Training

EPOCHS = 1_000_000  # the orders end long before
CPU = torch.device("cpu")


def networks(pair: Pair, data: Data) -> Nets:
    """Return classifiers, which take images in [0, 1] and normalise them."""
    teacher, student = pairs.classifiers(pair, data)
    return Nets(teacher.eval(), student)


def alone(nets: Nets, data: Data, tick: Turns) -> None:
    train(Distiller(None, nets.student), epochs(split(data)), data, tick)


def online(nets: Nets, data: Data, tick: Turns) -> None:
    teacher = Running(nets.teacher, for_answers(Numerics()))
    distiller = Distiller(teacher, nets.student, temperature=TEMPERATURE, alpha=ALPHA)
    train(distiller, epochs(split(data)), data, tick)


def cached(nets: Nets, data: Data, tick: Turns) -> None:
    terms = methods.terms("kd", temperature=TEMPERATURE, ce_weight=1 - ALPHA, kd_weight=ALPHA)
    images = split(data)
    with tempfile.TemporaryDirectory() as cache:
        outputs = teach(nets, images, Path(cache))
        # what the teacher costs, once for all epochs and all students
        tick.note("teacher_images_per_second", round(outputs.work.images / outputs.work.seconds, 1))
        train(Distiller(None, nets.student, terms=terms), epochs(images, outputs), data, tick)


def teach(nets: Nets, images: Split, cache: Path) -> Outputs:
    """Return the teacher's answers for all images, computed and written."""

    teacher = Running(nets.teacher, for_answers(Numerics()))

    def answer(batch: Tensor) -> Answers:
        return Answers(teacher(batch))

    viewed = Viewed(images, POLICIES["none"], seed=0)
    source = Source(identity={"benchmark": "peers"}, card={}, load=lambda: answer, temperatures=(TEMPERATURE,))
    outputs = open_outputs(viewed, source, cache)
    outputs.prepare([0])
    return outputs


def split(data: Data, images: int | None = None) -> Split:
    """Return the first images of a training set, or all."""
    labels, ids = data.labels.numpy(), np.arange(len(data.labels), dtype=np.uint64)
    rows = np.arange(len(labels) if images is None else images)
    return Split(data.frames, labels, ids, rows, size=data.frames.shape[-1], device=CPU)


def epochs(images: Split, outputs: Outputs | None = None) -> Epochs:
    """Return shuffled epochs of the images as they are, with the teacher's answers if there are any."""
    answers = outputs.view if outputs else None
    return Epochs(images, policy=POLICIES["none"], view_seed=0, batch_size=BATCH, views=1, outputs=answers)


def train(objective: Distiller, images: Epochs, data: Data, tick: Tick) -> None:
    """Train for as long as `tick` lets it; an epoch is judged on one batch, which takes no time to speak of."""
    Training(
        objective,
        images,
        split(data, BATCH),
        # no warm-up: its length would be a share of all these epochs
        TrainConfig(epochs=EPOCHS, batch_size=BATCH, lr=RATE, warmup=0),
        seed=0,
        engine=Engine(device="cpu", threads=torch.get_num_threads()),
        stop=tick,
    ).run()
