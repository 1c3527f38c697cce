"""Losses on logits. Softmax is always taken in float32, so that half precision neither underflows nor overflows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy between the labels and the student, per example.

    L_i = -sum_k y_ik log softmax(z_i)_k, where y_i is one-hot, or the shares of a mixed image, and is mixed with the
    uniform distribution by `label_smoothing`.

    Args:
        student_logits: [batch, classes], any floating dtype.
        labels: class numbers, int64 [batch], each in [0, classes); or shares, float [batch, classes].
        label_smoothing: share of the uniform distribution in the target, in [0, 1).

    Returns:
        float32 [batch], in nats.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> import torch
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])

    Source:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7 (smoothing).
    """
    if labels.shape != student_logits.shape[: labels.ndim]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}")
    return F.cross_entropy(student_logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Hinton's distillation loss, per example.

    L_i = T^2 KL(softmax(t_i / T) || softmax(z_i / T)), z the student's logits and t the teacher's. The factor T^2
    keeps the scale of the gradient as T changes.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperature: T > 0; 1 leaves the probabilities as they are, more softens them.

    Returns:
        float32 [batch], in nats times T^2; 0 where the two distributions are equal.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.4438])

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2. The paper minimises the
        cross-entropy of soft targets; KL differs from it by the teacher's entropy and has the same gradient.
    """
    _same_shape(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=1)
    # one product instead of F.kl_div's five operations: beside a tiny student each of them counts
    divergence: Tensor = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return temperature**2 * divergence


def _same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            f"logits must both be [batch, classes]: student {tuple(student_logits.shape)}, "
            f"teacher {tuple(teacher_logits.shape)}"
        )
