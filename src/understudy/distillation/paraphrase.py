"""Factor transfer's projector: a paraphraser that learns the teacher's factors, and a translator of the student.

Used by the table of methods; the contract of a projector is in `projectors`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from understudy.distillation.projectors import Projector, Shapes, map_channels, meet

SLOPE = 0.1
"""Of the leaky ReLUs."""


class Paraphrase(Projector):
    """Factors of both maps: the teacher's by the encoder of a convolutional autoencoder, the student's by a twin of it.

    The autoencoder is trained on the same steps by `own_loss`, the mean squared error of its reconstruction of the
    teacher's map: set by `forward` in training mode, None otherwise. The factors that the student is compared with
    carry no gradient. The loss normalises them.

    Source:
        Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018, section 3:
        three convolutions 3x3 and three transposed ones with leaky ReLUs of slope 0.1, k times the teacher's channels
        from the second on; no batch norm, as in the authors' code. Deviation: the paper trains the paraphraser
        beforehand and freezes it; here it learns while the student does, so early factors are of little use.

    Args:
        shapes: of one pair of maps.
        share: k, the factor's channels as a share of the teacher's, above 0.

    Raises:
        ModelError: the layers do not give two maps.
    """

    def __init__(self, shapes: Shapes, *, share: float = 0.5) -> None:
        super().__init__()
        ((student, teacher),) = map_channels(shapes)
        factors = max(1, int(teacher * share))
        self.encoder = _encoder(teacher, factors)
        self.decoder = nn.Sequential(
            *_deconvolution(factors, factors), *_deconvolution(factors, teacher), *_deconvolution(teacher, teacher)
        )
        self.translator = _encoder(student, factors)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of both, [batch, k x teacher's channels, height, width]."""
        student, teacher = meet(student, teacher)
        if self.training:
            factors = self.encoder(teacher)
            self.own_loss = (self.decoder(factors).float() - teacher.float()).square().mean()
        else:
            with torch.no_grad():
                factors = self.encoder(teacher)
            self.own_loss = None
        return self.translator(student), factors.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loss of the last step out of copies: it hangs on a graph, which cannot be copied."""
        return self.__dict__ | {"own_loss": None}


def _encoder(inputs: int, factors: int) -> nn.Sequential:
    widths = ((inputs, inputs), (inputs, factors), (factors, factors))
    return nn.Sequential(*(layer for width in widths for layer in (nn.Conv2d(*width, 3, padding=1), _leaky())))


def _deconvolution(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.ConvTranspose2d(inputs, outputs, 3, padding=1), _leaky()


def _leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE)
