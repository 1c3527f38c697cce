"""Projectors without a teacher: a peer that learns beside the student, and exits of the student's own earlier stages.

Used by the table of methods; the contract of a projector is in `projectors`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from understudy import losses
from understudy.distillation.inputs import answer
from understudy.distillation.projectors import Projector, Shapes, map_channels, normed
from understudy.errors import ModelError


class Peer(Projector):
    """Another network of the student's kind, with weights of its own, that learns from the student as that from it.

    `own_loss`, set by `forward` in training mode, is the peer's: its cross-entropy with the labels and the divergence
    from the student's answers, which carry no gradient there.

    Source:
        Zhang et al., "Deep Mutual Learning", 2018, equations 7 and 8, with two networks. Deviation: both are updated in
        the same step, from the answers that they gave in it; the paper updates one after the other.

    Raises:
        ModelError: the student is not known.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        if shapes.student_network is None:
            raise ModelError("This method trains a second student, so it needs to know the first.")
        self.peer = copy.deepcopy(shapes.student_network).requires_grad_(True)
        for module in self.peer.modules():
            # torch's layers have it by convention; what has not starts with the student's weights
            getattr(module, "reset_parameters", lambda: None)()

    def forward(self, images: Tensor, student_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's logits and the peer's, both [batch, classes]; the latter without gradient."""
        peer_logits = answer(self.peer, images)
        self.own_loss = None
        if self.training:
            taught = losses.kd(peer_logits, student_logits, temperature=1.0)
            self.own_loss = (losses.cross_entropy(peer_logits, labels) + taught).mean()
        return student_logits, peer_logits.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loss of the last step out of copies: it hangs on a graph, which cannot be copied."""
        return self.__dict__ | {"own_loss": None}


class Exits(Projector):
    """A small classifier behind every stage of the student but the deepest, taught by the student's own answers.

    Source:
        Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
        Distillation", 2019, section 3: a bottleneck and a linear layer behind each stage. Deviation: the bottleneck is
        one 1x1 and one 3x3 convolution of the deepest stage's channels.

    Raises:
        ModelError: fewer than two stages, or no final linear layer.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        channels = [student for student, _ in map_channels(shapes)]
        if len(channels) < 2:
            raise ModelError("This method compares stages of the student, and there is only one.")
        if shapes.student_head is None:
            raise ModelError("This method needs a student that ends in a linear layer.")
        width, classes = channels[-1], shapes.student_head.out_features
        self.exits = nn.ModuleList(_exit(one, width, classes) for one in channels[:-1])

    def forward(
        self, student_maps: list[Tensor], student_logits: Tensor, labels: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (an exit's logits, the student's logits, the labels) for every exit, from shallow to deep."""
        return [(leave(one), student_logits, labels) for leave, one in zip(self.exits, student_maps[:-1], strict=True)]


def _exit(channels: int, width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        *normed(channels, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )
