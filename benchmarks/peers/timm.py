"""timm's `LogitDistillationTask` in a loop like that of its training script, with its own AdamW."""

from __future__ import annotations

from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

from peers.pairs import ALPHA, RATE, TEMPERATURE, Data, Nets, Tick


def train(nets: Nets, data: Data, tick: Tick) -> None:
    # the task reads from its networks how images are normalised: alike, so the teacher's need no second pass
    channels = data.frames.shape[1]
    for network in nets:
        network.pretrained_cfg = {"mean": (data.mean,) * channels, "std": (data.std,) * channels}
    task = LogitDistillationTask(
        nets.student,
        DistillationTeacher(nets.teacher.requires_grad_(False)),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1 - ALPHA,
        distill_loss_weight=ALPHA,
        temperature=TEMPERATURE,
        verbose=False,
    )
    optimizer = create_optimizer_v2(nets.student, opt="adamw", lr=RATE, weight_decay=1e-2)
    loader = data.loader()
    task.train()
    while True:
        for inputs, labels in loader:
            result = task(inputs, labels)
            result["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            tick()
