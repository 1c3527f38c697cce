"""Losses on where a network looks: maps over positions made of many channels, and how two layers' channels go together.

Each loss returns one value per example.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from understudy.losses import checks
from understudy.losses.vectors import unit


def attention(student_maps: Tensor, teacher_maps: Tensor, *, power: float = 2) -> Tensor:
    """Attention transfer: both networks are active at the same places, per example.

    L_i = mean over positions of (Q_t / |Q_t| - Q_s / |Q_s|)^2, where Q = sum over channels of |F|^power, one number
    for each position.

    Args:
        student_maps: F_s, [batch, channels, height, width], any floating dtype.
        teacher_maps: F_t, same batch, height and width, any number of channels; no gradient flows into it.
        power: at least 1; the larger, the more the strongest channel of a position counts.

    Returns:
        float32 [batch], in [0, 2 / (height * width)]; 0 where the attention is equal or proportional.

    Raises:
        ValueError: batch, height or width differ; or the power is below 1.

    Example:
        >>> import torch
        >>> attention(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]], [[0.0, 1.0]]]]))
        tensor([1.])

    Source:
        Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
        Networks via Attention Transfer", 2017, section 3.1, equation 2. Deviation: the mean of squares, as in the
        authors' code, to which their weight of 1000 belongs, instead of the paper's norm.
    """
    if not power >= 1:
        raise ValueError(f"power must be at least 1, not {power}")
    student, teacher = same_places(student_maps, teacher_maps)
    return (_attention_map(student, power) - _attention_map(teacher, power)).square().mean(1)


def cat_kd(student_maps: Tensor, teacher_maps: Tensor, *, size: int = 2) -> Tensor:
    """Class attention transfer: the class activation maps of both networks agree, per example.

    L_i = mean over classes and cells of (A_t / |A_t| - A_s / |A_s|)^2, A the activation map of one class, pooled to
    size x size cells, its length taken over the cells.

    Args:
        student_maps: class activation maps before pooling, [batch, classes, height, width], any floating dtype.
        teacher_maps: same batch and classes, any height and width; no gradient flows into it.
        size: cells in each direction, at least 1.

    Returns:
        float32 [batch], in [0, 4 / size^2]; 0 where the pooled maps are equal or proportional.

    Raises:
        ValueError: batch or classes differ; or the size is below 1.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).reshape(2, 1, 1, 2, 2)
        >>> cat_kd(student, teacher)
        tensor([0.2000])

    Source:
        Guo et al., "Class Attention Transfer Based Knowledge Distillation", 2023, section 3 (class attention
        transfer). Deviations: the mean over classes and cells, as in the authors' code, where the paper sums over the
        cells; and always normalised: the authors' settings for CIFAR-100 beside cross-entropy switch that off, so
        their weight there (15 from ResNet32x4 to ResNet8x4) does not carry over.
    """
    if not size >= 1:
        raise ValueError(f"size must be at least 1, not {size}")
    if student_maps.ndim != 4 or teacher_maps.ndim != 4 or student_maps.shape[:2] != teacher_maps.shape[:2]:
        raise ValueError(
            "class activation maps must both be [batch, classes, height, width] of one batch and the same classes: "
            f"student {tuple(student_maps.shape)}, teacher {tuple(teacher_maps.shape)}"
        )
    student, teacher = (
        unit(F.adaptive_avg_pool2d(checks.widen(maps), size), (2, 3)) for maps in (student_maps, teacher_maps.detach())
    )
    return (student - teacher).square().flatten(1).mean(1)


def fsp(student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor) -> Tensor:
    """Flow of the solution procedure: how the channels of one layer go with those of a later one, per example.

    L_i = mean over pairs of channels of (G_t - G_s)^2, G = F_1 F_2^T / (height * width), the inner product over
    positions of each channel of the first layer with each of the second.

    Args:
        student_first: F_1 of the student, [batch, channels, height, width], any floating dtype.
        student_second: F_2 of the student, same batch, height and width, its own number of channels.
        teacher_first: F_1 of the teacher, the student's shape; no gradient flows into it.
        teacher_second: F_2 of the teacher, the student's shape; no gradient flows into it.

    Returns:
        float32 [batch], in units of the features to the fourth power; 0 where both pairs are equal.

    Raises:
        ValueError: student and teacher differ in shape; or the two layers in batch, height or width.

    Example:
        >>> import torch
        >>> one, two = torch.ones(1, 1, 2, 2), torch.full((1, 3, 2, 2), 2.0)
        >>> fsp(one, two, one, 2 * two)
        tensor([4.])

    Source:
        Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
        Learning", CVPR 2017, section 3, equations 1 and 2. Deviations: the mean over the pairs of channels instead of
        their sum, so that the weight does not depend on their number. The paper trains with it alone first, and on
        labels afterwards.
    """
    what = "maps of a layer must both be [batch, channels, height, width], equal in all"
    first = checks.same_shape(student_first, teacher_first, dimensions=4, what=what)
    second = checks.same_shape(student_second, teacher_second, dimensions=4, what=what)
    if student_first.shape[0] != student_second.shape[0] or student_first.shape[2:] != student_second.shape[2:]:
        raise ValueError(
            "maps of the two layers must have the same batch, height and width: "
            f"first {tuple(student_first.shape)}, second {tuple(student_second.shape)}"
        )
    student, teacher = (_flow(one, two) for one, two in zip(first, second, strict=True))
    return (student - teacher).square().mean((1, 2))


def same_places(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in full precision, the teacher's without gradient.

    Raises:
        ValueError: they are not maps, or differ in more than their channels.
    """
    first, second = student_maps.shape, teacher_maps.shape
    if len(first) != 4 or len(second) != 4 or first[:1] != second[:1] or first[2:] != second[2:]:
        raise ValueError(
            "maps must both be [batch, channels, height, width], equal in all but channels: "
            f"student {tuple(first)}, teacher {tuple(second)}"
        )
    return checks.widen(student_maps), checks.widen(teacher_maps.detach())


def _attention_map(maps: Tensor, power: float) -> Tensor:
    return unit(maps.abs().pow(power).sum(1).flatten(1), 1)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    positions = first.shape[2] * first.shape[3]
    return first.flatten(2) @ second.flatten(2).mT / positions
