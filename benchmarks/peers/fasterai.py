"""fasterai's `KnowledgeDistillationCallback` on a fastai `Learner`, without progress bar, log and metrics.

fastai's guide for those who come from plain PyTorch gives a `Learner` PyTorch's own DataLoader and optimizer; that is
the fastest way here. The callback runs the teacher with gradients on unless the teacher is frozen, which its
documentation does not ask for: both are measured.
"""

from __future__ import annotations

from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peers.pairs import ALPHA, BATCH, RATE, TEMPERATURE, Data, Nets, Tick

EPOCHS = 1_000_000  # the orders end long before


class Ticking(Callback):
    """Calls `tick` behind every other callback."""

    order = 1000

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def after_batch(self) -> None:
        """Note a step of training."""
        if self.training:
            self.tick()


def train(nets: Nets, data: Data, tick: Tick) -> None:
    loader = data.loader()
    # a Learner validates after each epoch: one batch, as in our loop
    val = DataLoader(TensorDataset(*loader.dataset[:BATCH]), batch_size=BATCH)
    distillation = KnowledgeDistillationCallback(nets.teacher, partial(SoftTarget, T=TEMPERATURE), weight=ALPHA)
    learner = Learner(
        DataLoaders(loader, val, device=torch.device("cpu")),
        nets.student,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        cbs=[distillation, Ticking(tick)],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(EPOCHS, RATE)


def train_frozen(nets: Nets, data: Data, tick: Tick) -> None:
    nets.teacher.requires_grad_(False)
    train(nets, data, tick)
