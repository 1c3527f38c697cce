"""A frozen teacher: evaluation mode, no gradients, whatever happens around it. Used by the distiller only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from understudy.distillation.inputs import Inputs, answer
from understudy.errors import ConfigError


class Teacher(nn.Module):
    """A trained network that only answers.

    Its parameters are frozen in place. It stays in evaluation mode when a module that holds it is set to training, so
    its batch statistics never move. Where it wants another size or normalisation than the views have, give it as a
    module that starts with `Preprocess`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: `mode` is ignored."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Inputs) -> Tensor:
        """Return the teacher's logits [batch, classes] for images [batch, channels, height, width] or named tensors."""
        if any(module.training for module in self.model.modules()):  # somebody reached past this wrapper
            self.model.eval()
        return answer(self.model, images)


def share(teacher: nn.Module, student: nn.Module) -> bool:
    """Tell whether two networks have a weight, a buffer or a layer in common, activations left out."""
    known = {id(held) for held in _held(teacher)}
    return any(id(held) in known for held in _held(student))


def check_student(student: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse a student that cannot learn, or that the teacher would freeze with itself.

    Args:
        student: any module; one without any parameter is left to its user.
        teacher: None where nobody asks one.

    Raises:
        ConfigError: the student is frozen, or the two share weights or layers.
    """
    if teacher is not None and share(teacher, student):
        raise ConfigError(
            "Teacher and student share weights or layers, so one cannot stay frozen while the other learns: "
            "give copy.deepcopy of one of them."
        )
    parameters = list(student.parameters())
    if parameters and not any(one.requires_grad for one in parameters):
        raise ConfigError("The student has no parameter that is trained: call `student.requires_grad_(True)` first.")


def _held(network: nn.Module) -> Iterator[object]:
    # some libraries give one activation, which has no state, to all their networks
    layers = (one for one in network.modules() if type(one).__module__ != nn.modules.activation.__name__)
    return chain(network.parameters(), network.buffers(), layers)
