"""CRD's projector: two embeddings, a bank that remembers them for every training image, and the drawing of negatives.

Used by the table of methods; the contract of a projector is in `projectors`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.distillation.projectors import Projector, Shapes
from understudy.errors import ConfigError

NEGATIVES = 16384
"""The paper's K, where there are as many other images."""
_LOW = 0xFFFFFFFF


class Contrast(Projector):
    """Scores of pairs of student and teacher, one of the same image and K of two images. For crd.

    Both embeddings are linear, of `width` features and unit length. A student's embedding is compared with the
    teacher's bank and the other way round: score = exp(<embedding, remembered> / temperature) / Z, in column 0 for the
    image itself and in the others for K images drawn with replacement from all others. Z, one for each direction, is
    samples x the mean of exp over the first batch in training mode, and stays. In training mode, after the scores
    are taken, bank rows of the batch become normalise(momentum x row + (1 - momentum) x embedding).

    The banks take 2 x samples x width x 4 bytes, on the device and in every checkpoint; a step reads copies of them, so
    the device holds them twice, and two tables [batch, samples] of similarities. Negatives are a hash of (seed, step,
    position, column), the same on every device: all state is in buffers, so that a resumed run draws what the
    uninterrupted one would have. Where several processes train, torch hands the first one's buffers to the others at
    every step: a row moves when its image falls to the first process.

    Source:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020, section 3 and the authors' published
        code, which has what the paper leaves out: banks for both, Z from the first batch, momentum. Deviations from
        the code: negatives are never the image itself, there are at most samples - 1 of them, and the banks start as
        random unit vectors instead of uniform ones of about that length.

    Args:
        shapes: of one pair of layers (of any shape, flattened), and the number of training images.
        width: features of the embeddings.
        negatives: K; min(16384, samples - 1) by default.
        temperature: above 0.
        momentum: share of the old row that stays, in [0, 1).

    Raises:
        ConfigError: fewer than 2 training images, or more negatives than other images.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    constants: Tensor
    seed: Tensor
    step: Tensor

    def __init__(
        self,
        shapes: Shapes,
        *,
        width: int = 128,
        negatives: int | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        ((student, teacher),) = zip(shapes.student, shapes.teacher, strict=True)
        self.samples = shapes.samples
        self.negatives = _negatives(negatives, shapes.samples)
        self.temperature = temperature
        self.momentum = momentum
        self.embed_student = nn.Linear(math.prod(student), width)
        self.embed_teacher = nn.Linear(math.prod(teacher), width)
        self.register_buffer("student_bank", F.normalize(torch.randn(self.samples, width), dim=1))
        self.register_buffer("teacher_bank", F.normalize(torch.randn(self.samples, width), dim=1))
        self.register_buffer("constants", torch.zeros(2))
        self.register_buffer("seed", torch.randint(_LOW, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the scores of both directions, float32 [batch, 1 + K], and the number of training images.

        The image's own pair is in column 0.

        Args:
            student: features [batch, ...].
            teacher: likewise; the gradient goes into its embedding, not further.
            positions: of the images within the training split, int64 [batch], each in [0, samples), none twice.
        """
        # similarities over a temperature of 0.07 want more digits than half precision has
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = _embed(self.embed_student, student), _embed(self.embed_teacher, teacher)
            columns = torch.cat([positions[:, None], self.draw(positions)], dim=1)
            scores = (
                self._scores(student, self.teacher_bank, columns),
                self._scores(teacher, self.student_bank, columns),
            )
        constants = self._constants(*scores)
        if self.training:
            self._remember(student, teacher, positions)
        return scores[0] / constants[0], scores[1] / constants[1], self.samples

    def draw(self, positions: Tensor) -> Tensor:
        """Return K positions [batch, K] of other images for each of `positions`, as drawn at the present step."""
        keys = _hash(_hash(_hash(self.step + self.seed) ^ self.seed) ^ positions)
        columns = torch.arange(self.negatives, device=positions.device)
        # from 32 random bits to [0, samples - 1), the image itself skipped
        others = (_hash(keys[:, None] ^ _hash(columns)) * (self.samples - 1)) >> 32
        return others + (others >= positions[:, None])

    def _scores(self, embedding: Tensor, bank: Tensor, columns: Tensor) -> Tensor:
        # of a copy, because the gradient still needs what `_remember` writes over. All similarities and then a choice
        # of them: for K of the order of the samples that is far less than a copy of K rows for each image
        similarities = embedding @ bank.clone().T
        return (similarities.gather(1, columns) / self.temperature).exp()

    @torch.no_grad()
    def _constants(self, student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
        estimates = self.samples * torch.stack([student_scores.mean(), teacher_scores.mean()])
        constants = torch.where(self.constants > 0, self.constants, estimates)
        if self.training:
            self.constants.copy_(constants)
        return constants

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, positions: Tensor) -> None:
        for bank, embedding in ((self.student_bank, student), (self.teacher_bank, teacher)):
            rows = torch.lerp(embedding, bank[positions], self.momentum)
            bank.index_copy_(0, positions, F.normalize(rows, dim=1))
        self.step += 1


def _negatives(negatives: int | None, samples: int) -> int:
    if samples < 2:
        raise ConfigError(f"This method compares every image with others: it needs 2 training images, not {samples}.")
    if negatives is None:
        return min(NEGATIVES, samples - 1)
    if not 1 <= negatives < samples:
        raise ConfigError(f"With {samples} training images there can be 1 to {samples - 1} negatives, not {negatives}.")
    return negatives


def _embed(layer: nn.Linear, features: Tensor) -> Tensor:
    return F.normalize(layer(features.flatten(1).to(layer.weight.dtype)), dim=1)


def _hash(values: Tensor) -> Tensor:
    """Mix the 32 low bits of int64 numbers: multiply and shift, with factors below 2^31 so that nothing overflows."""
    values = values & _LOW
    values = ((values ^ (values >> 16)) * 0x21F0AAAD) & _LOW
    values = ((values ^ (values >> 15)) * 0x735A2D97) & _LOW
    return values ^ (values >> 15)
