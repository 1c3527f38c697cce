"""Projectors that look through the networks' final layers. They use those layers and own none of them.

A head stands in a tuple, so that torch registers neither its parameters nor its moves: it moves and is saved with the
network that it belongs to. Used by the table of methods; the contract of a projector is in `projectors`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from understudy.distillation.projectors import Projector, Shapes, map_channels, meet, normed, widths
from understudy.errors import ModelError


class ClassMaps(Projector):
    """Class activation maps of both networks: how much every place of the last map speaks for every class. For cat_kd.

    M_k = sum_c W_kc F_c, with W the head's weight. The student's head learns from it; the teacher's does not.

    Source:
        Guo et al., "Class Attention Transfer Based Knowledge Distillation", 2023, section 3. The head's bias, a
        constant over places, is left out.

    Raises:
        ModelError: a network has no linear head on these maps, or the heads have different numbers of classes.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        ((student, teacher),) = map_channels(shapes)
        student_head = _head(shapes.student_head, student, "student")
        teacher_head = _head(shapes.teacher_head, teacher, "teacher")
        if student_head.out_features != teacher_head.out_features:
            raise ModelError(
                f"The student's head has {student_head.out_features} classes and the teacher's "
                f"{teacher_head.out_features}; both need the same classes in the same order."
            )
        self._heads = (student_head, teacher_head)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class activation maps of both, [batch, classes, height, width]."""
        student, teacher = meet(student, teacher)
        student_head, teacher_head = self._heads
        return _class_maps(student, student_head.weight), _class_maps(teacher, teacher_head.weight.detach())


class SoftmaxRegression(Projector):
    """The student's embedding in the teacher's place, and what the teacher's head makes of it. For srrl.

    The connector r is a linear layer and a batch norm. The gradient passes through the teacher's head, not into it.

    Source:
        Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", 2021, section 3.
        Deviation: the published connector ends in a ReLU, which suits embeddings of ReLU networks only; here it is
        left out.

    Raises:
        ModelError: the layers do not give two embeddings, or the teacher has no linear head on its own.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        student, teacher, maps = widths(shapes)
        if maps:
            raise ModelError("This method compares embeddings [features]: choose the layers after the pooling.")
        self._head = (_head(shapes.teacher_head, teacher, "teacher"),)
        self.connect = normed(student, teacher, maps=False)

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return r(h_s) and h_t [batch, teacher's features], and head(r(h_s)) and z_t [batch, classes]."""
        connected = self.connect(student)
        (head,) = self._head
        bias = None if head.bias is None else head.bias.detach()
        return connected, teacher, F.linear(connected, head.weight.detach(), bias), teacher_logits


def _class_maps(values: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(values, weight[:, :, None, None])


def _head(head: nn.Linear | None, features: int, whose: str) -> nn.Linear:
    if head is None:
        raise ModelError(f"This method looks through the {whose}'s final linear layer, and it has none.")
    if head.in_features != features:
        raise ModelError(
            f"The {whose}'s final layer takes {head.in_features} features, but the chosen layer gives {features}: "
            "choose the last layer before it."
        )
    return head
