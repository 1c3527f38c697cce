"""Losses on logits alone, and the standardisation that may come before them. Torch only; used through `losses`.

Softmax is always taken in float32 at least, and as a logarithm, so that half precision neither underflows nor
overflows; what comes in float64 stays so.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.losses import checks


def cross_entropy(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy between the labels and the student, per example.

    L_i = -sum_k y_ik log softmax(z_i)_k, where y_i is one-hot, or the shares of a mixed image, and is mixed with the
    uniform distribution by `label_smoothing`.

    Args:
        student_logits: [batch, classes], any floating dtype.
        labels: class numbers, int64 [batch], each in [0, classes), or -1 for none; or shares, float [batch, classes].
        label_smoothing: share of the uniform distribution in the target, in [0, 1).

    Returns:
        float32 [batch], in nats; 0 where there is no label.

    Raises:
        ValueError: the shapes do not fit, or the smoothing is not within [0, 1).

    Example:
        >>> import torch
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])

    Source:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7 (smoothing).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, not {label_smoothing}")
    if labels.shape != student_logits.shape[: labels.ndim]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}")
    logits = checks.widen(student_logits)
    target = labels.to(logits.dtype) if labels.is_floating_point() else labels
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="none", label_smoothing=label_smoothing)


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
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2, equation 1. The paper
        minimises the cross-entropy of soft targets; KL differs from it by the teacher's entropy and has the same
        gradient (equation 2).
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(log_p, log_q)


def ttm(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Transformed teacher matching, per example: `kd` with a temperature on the teacher's side alone.

    L_i = KL(softmax(t_i / T) || softmax(z_i)), z the student's logits and t the teacher's. No factor T^2: the student's
    probabilities, and so the gradient q - p, are those at T = 1.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperature: T > 0, of the teacher; with 1 it is `kd`.

    Returns:
        float32 [batch], in nats; 0 where softmax(z_i) is the softened teacher's.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> ttm(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.])

    Source:
        Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024, equation 2 without the
        labels' term and the weight. That a power of the teacher's probabilities is a temperature: equations 7 and 9.
    """
    student, teacher = checks.logits(student_logits, teacher_logits)
    checks.positive_temperature(temperature)
    return kd(student, teacher / temperature, temperature=1.0)


def kldiv(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """`kd` as `torch.nn.KLDivLoss()` has it by default, per example: with the mean over classes, and without T^2.

    L_i = 1/C KL(softmax(t_i / T) || softmax(z_i / T)), z the student's logits, t the teacher's and C the number of
    classes: `kd` divided by C T^2. Published code often has it so; it is here to repeat such results.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperature: T > 0; the larger, the weaker the gradient.

    Returns:
        float32 [batch], in nats per class; 0 where the two distributions are equal.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> kldiv(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.0555])

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2, equation 1, less the
        factor T^2 that the paper asks for, with the mean that PyTorch takes where no `reduction` is named.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _divergence(log_p, log_q) / student_logits.shape[1]


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Divergence of the student from the teacher, the other way round than in `kd`, per example.

    L_i = T^2 KL(softmax(z_i / T) || softmax(t_i / T)): the student pays for probability where the teacher has none,
    and may ignore classes that it cannot hold (mode seeking).

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperature: T > 0, of both.

    Returns:
        float32 [batch], in nats times T^2; 0 where the two distributions are equal.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.4805])

    Source:
        Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2024, section 2.1, equation 1. There
        it is taken over sampled sentences; here over the classes of one image, in closed form, with Hinton's T^2.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(log_q, log_p)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, per example: bounded, and between `kd` and `reverse_kl`.

    L_i = T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q, p = softmax(t_i / T),
    q = softmax(z_i / T). L / beta tends to `kd` as beta goes to 0, L / (1 - beta) to `reverse_kl` as it goes to 1.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperature: T > 0, of both.
        beta: the teacher's share of m, in (0, 1); 0.5 is the symmetric Jensen-Shannon divergence.

    Returns:
        float32 [batch], in nats times T^2, at most T^2 log 2; 0 where the two distributions are equal.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or beta is not within (0, 1).

    Example:
        >>> import torch
        >>> jsd(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.1141])

    Source:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024,
        equation 1. The factor T^2 is Hinton's and not in the paper.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, both left out, not {beta}: at the ends use kd or reverse_kl")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return temperature**2 * (beta * _divergence(log_p, log_m) + (1 - beta) * _divergence(log_q, log_m))


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits, per example.

    L_i = 1/C sum_k (z_ik - t_ik)^2. Unlike softmax it sees a constant that is added to all logits of an example.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.

    Returns:
        float32 [batch], in squared logits; 0 where the logits are equal.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> logit_mse(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([2.5000])

    Source:
        Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014, section 2.2, equation 1. The paper halves the sum
        over classes; here it is the mean over them, 2/C times as much, as in most code.
    """
    student, teacher = checks.logits(student_logits, teacher_logits)
    return (student - teacher).square().mean(1)


def standardize(logits: Tensor) -> Tensor:
    """Standardise the logits of each example over the classes: a transform of both nets' logits before `kd`.

    Z(z_i) = (z_i - mean(z_i)) / (std(z_i) + 1e-7). Only the relations between the classes are left, so the student
    need not match the range of the teacher's logits. With two classes only the sign is left, +-0.7071: use plain
    `kd` there. The gradient grows as 1 / std, so a final layer that starts at zero must not be trained by it alone.

    Args:
        logits: [batch, classes], any floating dtype; gradients flow through.

    Returns:
        float32 [batch, classes], mean 0 and standard deviation 1 in each row; 0 where all logits of a row are equal.

    Raises:
        ValueError: not [batch, classes] with at least two classes.

    Example:
        >>> import torch
        >>> standardize(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
        tensor([[-1.0000,  0.0000,  1.0000],
                [-1.0000,  0.0000,  1.0000]])

    Source:
        Sun et al., "Logit Standardization in Knowledge Distillation", 2024, algorithm 1. The standard deviation is that
        of the published code, to which the paper's weights belong: the sum divided by C - 1, and 1e-7 added.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [batch, classes] with two classes or more, not {tuple(logits.shape)}")
    wide = checks.widen(logits)
    return (wide - wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + 1e-7)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log q of the student and log p of the teacher."""
    student, teacher = checks.logits(student_logits, teacher_logits)
    checks.positive_temperature(temperature)
    return F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row."""
    # one product instead of F.kl_div's five operations: beside a tiny student each of them counts
    divergence: Tensor = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return divergence
