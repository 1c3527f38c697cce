"""Losses on how predictions vary together, over the classes and over the batch. Torch only; used through `losses`.

Their values are of the batch, not of an example: each returns a scalar. They need batches of some size: in a batch of
one nothing varies together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.losses import checks
from understudy.losses.logits import kd


def dist(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """DIST: correlation of student and teacher over the classes of each example and over the examples of each class.

    L = T^2 [beta (1 - mean_i rho(q_i, p_i)) + gamma (1 - mean_k rho(q_:k, p_:k))], p = softmax(t / T),
    q = softmax(z / T), rho Pearson's correlation: first of each row (inter-class), then of each column (intra-class).
    With two classes the first is always +-1 and gives no gradient: use `kd` there.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperature: T > 0, of both.
        beta: weight of the relation between classes.
        gamma: weight of the relation within a class, over the batch.

    Returns:
        float32 scalar of the batch, between 0 and 2 T^2 (beta + gamma); 0 where all rows and columns correlate fully.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
        >>> dist(student, teacher, temperature=1.0)
        tensor(0.7132)

    Source:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, section 3, equations 6 to 9 (10 adds the
        labels). As in the published code: the factor T^2, and 1e-8 beside the product of the two norms, so that a
        class that hardly varies counts as uncorrelated.
    """
    student, teacher = checks.logits(student_logits, teacher_logits)
    checks.positive_temperature(temperature)
    q, p = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    between_classes = 1 - _pearson(q, p).mean()
    within_classes = 1 - _pearson(q.T, p.T).mean()
    return temperature**2 * (beta * between_classes + gamma * within_classes)


def mlkd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)
) -> Tensor:
    """Multi-level alignment: of each prediction, of examples with one another, and of classes with one another.

    L = sum_T [1/B sum_i T^2 KL(p_i || q_i) + 1/B |p p' - q q'|_F^2 + 1/C |p' p - q' q|_F^2], p = softmax(t / T) and
    q = softmax(z / T), each [B, C], and ' the transpose.

    Args:
        student_logits: z, [batch, classes], any floating dtype.
        teacher_logits: t, same shape; no gradient flows into it.
        temperatures: all T, each > 0; the paper's prediction augmentation.

    Returns:
        float32 scalar of the batch, the first part in nats times T^2; 0 where all distributions are equal.

    Raises:
        ValueError: the shapes differ, or there is no temperature, or one is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> mlkd(student, teacher, temperatures=(2.0, 4.0))
        tensor(0.6137)

    Source:
        Jin, Wang, Lin, "Multi-Level Logit Distillation", 2023, section 3 (instance, batch and class level). One view
        of each image: the paper's pair of a weak and a strong view is left out, and so are the factors by which the
        published code scales the weak view's terms (the share of less confident examples and of rarer classes, about
        one half each). The factor T^2 is the published code's.
    """
    if not temperatures:
        raise ValueError("temperatures must name one temperature or more")
    student, teacher = checks.logits(student_logits, teacher_logits)
    total = torch.zeros((), dtype=student.dtype, device=student.device)
    for temperature in temperatures:
        instance = kd(student, teacher, temperature=temperature).mean()
        q, p = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
        total = total + instance + _gram_difference(q, p) + _gram_difference(q.T, p.T)
    return total


def _pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the correlation of each row of the one with the same row of the other."""
    student, teacher = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    norms = torch.linalg.vector_norm(student, dim=1) * torch.linalg.vector_norm(teacher, dim=1)
    correlation: Tensor = torch.linalg.vecdot(student, teacher) / (norms + 1e-8)
    return correlation


def _gram_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference of the products of all pairs of rows, summed, divided by the number of rows."""
    return (student @ student.T - teacher @ teacher.T).square().sum() / student.shape[0]
