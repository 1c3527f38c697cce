"""Losses on logits that treat the true class apart: they need class numbers, so mixed images are refused.

Torch only; used through `losses`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.losses import checks
from understudy.losses.logits import cross_entropy, kd


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: `kd` split into the target class and the others, each with its own weight, per example.

    L_i = T^2 [alpha TCKD + beta NCKD], TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y)), NCKD = KL(p~ || q~), where
    p = softmax(t_i / T), q = softmax(z_i / T), y the true class, and p~ and q~ are softmax over the C - 1 others.
    With alpha = 1 and beta = 1 - p_y it is `kd`. With two classes NCKD is always 0.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        labels: y, int64 [batch], each in [0, classes).
        temperature: T > 0, of both.
        alpha: weight of the target class (TCKD).
        beta: weight of the others among themselves (NCKD); the paper takes 8 mostly, 2 or 6 for some pairs.

    Returns:
        float32 [batch], in nats times T^2; 0 where the two distributions are equal.

    Raises:
        ValueError: the shapes differ, the labels are shares, there is one class, or the temperature is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> dkd(student, teacher, torch.tensor([0]), temperature=1.0)
        tensor([1.1166])

    Source:
        Zhao et al., "Decoupled Knowledge Distillation", 2022, section 3, equations 6 and 7. The factor T^2 and the
        warm-up of the weight over 20 epochs are the published code's; the warm-up is the caller's.
    """
    student, teacher = checks.logits(student_logits, teacher_logits)
    _several_classes(student)
    target = _target(labels, student)
    checks.positive_temperature(temperature)
    tckd = _binary_divergence(student / temperature, teacher / temperature, target)
    log_p, log_q = _log_others(teacher / temperature, target), _log_others(student / temperature, target)
    nckd = (log_p.exp() * (log_p - log_q)).sum(1)
    return temperature**2 * (alpha * tckd + beta * nckd)


def nkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0, gamma: float = 1.5
) -> Tensor:
    """Normalised distillation: soft cross-entropy of the target class, and of the others normalised, per example.

    L_i = -p_y log q_y - gamma T^2 sum_{k != y} p~_k log q~_k, where p = softmax(t_i), q = softmax(z_i), y the true
    class, and p~ and q~ are softmax(./T) over the C - 1 others. A cross-entropy: not 0 where student and teacher agree.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        labels: y, int64 [batch], each in [0, classes).
        temperature: T > 0, of the others only.
        gamma: weight of the others.

    Returns:
        float32 [batch], in nats (the second term times T^2).

    Raises:
        ValueError: the shapes differ, the labels are shares, there is one class, or the temperature is not positive.

    Example:
        >>> import torch
        >>> nkd(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor([1.7706])

    Source:
        Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
        Loss and Customized Soft Labels", 2023 (NKD). As in the published code, T leaves the target class alone.
    """
    student, teacher = checks.logits(student_logits, teacher_logits)
    _several_classes(student)
    target = _target(labels, student)
    checks.positive_temperature(temperature)
    p_y = _of_target(F.softmax(teacher, dim=1), target)
    log_q_y = _of_target(F.log_softmax(student, dim=1), target)
    log_p, log_q = _log_others(teacher / temperature, target), _log_others(student / temperature, target)
    return -p_y * log_q_y - gamma * temperature**2 * (log_p.exp() * log_q).sum(1)


def wsld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Weighted soft labels: less of the teacher where the student already knows the class better, per example.

    L_i = w_i T^2 H(softmax(t_i / T), softmax(z_i / T)), w_i = 1 - exp(-CE(z_i, y_i) / CE(t_i, y_i)), H the
    cross-entropy. w is a constant for the gradient, which is therefore w times that of `kd`. A cross-entropy: not 0
    where student and teacher agree.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        labels: y, int64 [batch], each in [0, classes).
        temperature: T > 0, of H; the weight is taken at 1.

    Returns:
        float32 [batch], in nats times T^2.

    Raises:
        ValueError: the shapes differ, the labels are shares, or the temperature is not positive.

    Example:
        >>> import torch
        >>> wsld(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([1.7526])

    Source:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", 2021.
        As in the published code the weight has no gradient, and 1e-7 is added to CE(t, y).
    """
    student, teacher = checks.logits(student_logits, teacher_logits)
    known = checks.hard_labels(labels, student)
    checks.positive_temperature(temperature)
    ratio = cross_entropy(student.detach(), known) / (cross_entropy(teacher, known) + 1e-7)
    soft = cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1))
    return -torch.expm1(-ratio) * temperature**2 * soft


def byot(
    exit_logits: Tensor, final_logits: Tensor, labels: Tensor, *, temperature: float, alpha: float = 0.3
) -> Tensor:
    """Self-distillation: an early exit of a network learns from the labels and from the network's own answer.

    L_i = (1 - alpha) CE(y_i, e_i) + alpha T^2 KL(softmax(z_i / T) || softmax(e_i / T)), e the exit's logits and z the
    network's.

    Args:
        exit_logits: e, [batch, classes], any floating dtype.
        final_logits: z, same shape; no gradient flows into it.
        labels: y, int64 [batch], or shares, float [batch, classes].
        temperature: T > 0, of both; the authors take 3.
        alpha: share of the network's answer, in [0, 1].

    Returns:
        float32 [batch], in nats.

    Raises:
        ValueError: the shapes differ, or an option is out of range.

    Example:
        >>> import torch
        >>> byot(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]), temperature=3.0)
        tensor([0.4852])

    Source:
        Zhang et al., "Be Your Own Teacher", 2019, equations 2 and 3 (losses of one exit; their sum is the caller's).
        The factor T^2 is Hinton's. The paper's third part, the distance of feature maps, has a weight of 0.03 and less
        and is left out.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    by_labels = cross_entropy(exit_logits, labels)
    return (1 - alpha) * by_labels + alpha * kd(exit_logits, final_logits, temperature=temperature)


def teacher_free(
    student_logits: Tensor, labels: Tensor, *, confidence: float = 0.9, temperature: float = 20.0
) -> Tensor:
    """`kd` from a virtual teacher that is right with a set confidence and knows nothing else, per example.

    L_i = T^2 KL(softmax(log u_i / T) || softmax(z_i / T)), u_ik = a where k is the true class, (1 - a) / (C - 1)
    elsewhere.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        labels: int64 [batch], each in [0, classes).
        confidence: a, in (0, 1); the paper takes 0.9 to 0.99.
        temperature: T > 0; the paper takes 20 to 40.

    Returns:
        float32 [batch], in nats times T^2; 0 where softmax(z_i) is u_i.

    Raises:
        ValueError: the shapes do not fit, the labels are shares, or an option is out of range.

    Example:
        >>> import torch
        >>> teacher_free(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6026])

    Source:
        Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020,
        equations 8 (the virtual teacher) and 9 (Tf-KD_reg). The factor T^2 is Hinton's and not in the paper. The
        published code differs from the paper: it softens u by softmax(u / T), leaves the student at T = 1, divides by
        batch x C and multiplies by a constant.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, both left out, not {confidence}")
    _several_classes(student_logits)
    student = checks.widen(student_logits)
    elsewhere = torch.full_like(student, math.log((1 - confidence) / (student.shape[1] - 1)))
    virtual_teacher = elsewhere.masked_fill(_target(labels, student), math.log(confidence))
    return kd(student, virtual_teacher, temperature=temperature)


def _several_classes(logits: Tensor) -> None:
    """Refuse logits that leave no class beside the true one.

    Raises:
        ValueError: they are not [batch, classes] with two classes or more.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [batch, classes] with two classes or more, not {tuple(logits.shape)}")


def _target(labels: Tensor, student_logits: Tensor) -> Tensor:
    """Return which logit of each row is the true class's, bool [batch, classes]."""
    return F.one_hot(checks.hard_labels(labels, student_logits), student_logits.shape[1]).bool()


def _of_target(values: Tensor, target: Tensor) -> Tensor:
    """Return the value of the true class, [batch]."""
    return values.masked_fill(~target, 0.0).sum(1)


def _log_others(logits: Tensor, target: Tensor) -> Tensor:
    """Return log softmax over the other classes; 0 in the true class's place, where -inf would make gradients nan."""
    return F.log_softmax(logits.masked_fill(target, -math.inf), dim=1).masked_fill(target, 0.0)


def _binary_divergence(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return KL of (true class, any other) between the teacher and the student, [batch]."""
    log_p, log_q = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    log_p_y, log_q_y = _of_target(log_p, target), _of_target(log_q, target)
    log_p_other, log_q_other = (log.masked_fill(target, -math.inf).logsumexp(1) for log in (log_p, log_q))
    return log_p_y.exp() * (log_p_y - log_q_y) + log_p_other.exp() * (log_p_other - log_q_other)
