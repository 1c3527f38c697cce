"""Losses on features of one layer: the student's, as its projector has made them, against the teacher's.

The projector has given both tensors one shape. Each loss returns one value per example; most are means of squares over
the features, so that a weight holds for maps of any size, and two (`ab`, `ofd`) are sums, as their authors weigh them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.losses import checks
from understudy.losses.vectors import unit

MAPS = "maps must both be [batch, channels, height, width], equal in all"
EMBEDDINGS = "embeddings must both be [batch, features], equal in both"


def hint(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """FitNets' hint loss, per example.

    L_i = 1/2 mean over channels and positions of (t - s)^2, s the student's map after its regressor, t the teacher's.

    Args:
        student_maps: s, [batch, channels, height, width], any floating dtype, any scale.
        teacher_maps: t, same shape; no gradient flows into it.

    Returns:
        float32 [batch], in squared units of the teacher's features; 0 where the maps are equal.

    Raises:
        ValueError: the shapes differ, or are not those of maps.

    Example:
        >>> import torch
        >>> hint(torch.zeros(1, 2, 1, 1), torch.tensor([[[[3.0]], [[1.0]]]]))
        tensor([2.5000])

    Source:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.2, equation 3. Deviations: the mean over
        the features instead of their sum, so that the weight does not depend on the size of the map. The paper trains
        up to the hinted layer first and distils afterwards; here both are one stage unless the plan says otherwise.
        Published benchmarks leave out the factor 1/2 and weigh by 100, which is 200 here.
    """
    student, teacher = checks.same_shape(student_maps, teacher_maps, dimensions=4, what=MAPS)
    return 0.5 * _mean_square(student - teacher)


def simkd(projected: Tensor, teacher_features: Tensor) -> Tensor:
    """SimKD's loss of feature alignment, per example.

    L_i = mean over the features of (t - P(s))^2, P(s) the student's last features after their projector and t the
    teacher's. The student is used with the projector and the teacher's own classifier, so nothing else is trained.

    Args:
        projected: P(s), embeddings [batch, features] or maps [batch, channels, height, width], any floating dtype.
        teacher_features: t, same shape; no gradient flows into it.

    Returns:
        float32 [batch], in squared units of the teacher's features; 0 where both are equal.

    Raises:
        ValueError: the shapes differ, or are neither those of embeddings nor those of maps.

    Example:
        >>> import torch
        >>> simkd(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.])

    Source:
        Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", 2022, section 3 (feature alignment).
        Deviation: the mean over the features, as in the authors' code, instead of the sum of the paper's norm.
    """
    if projected.ndim == 4:
        student, teacher = checks.same_shape(projected, teacher_features, dimensions=4, what=MAPS)
    else:
        student, teacher = checks.same_shape(projected, teacher_features, dimensions=2, what=EMBEDDINGS)
    return _mean_square(student - teacher)


def srrl(
    student_embeddings: Tensor, teacher_embeddings: Tensor, student_logits: Tensor, teacher_logits: Tensor
) -> Tensor:
    """Feature matching and softmax regression: equal embeddings, and equal answers of the teacher's head, per example.

    L_i = mean over the features of (h - r)^2 + mean over the classes of (z - W r)^2, r the student's embedding after
    its connector, W r the answer of the *teacher's* head to it, h and z the teacher's embedding and logits.

    Args:
        student_embeddings: r, [batch, features], any floating dtype, any scale.
        teacher_embeddings: h, same shape; no gradient flows into it.
        student_logits: W r, [batch, classes]; the head is frozen, the gradient passes through it to r.
        teacher_logits: z, same shape; no gradient flows into it.

    Returns:
        float32 [batch]; 0 where the embeddings and the logits are equal.

    Raises:
        ValueError: the shapes of a pair differ, or the batches do.

    Example:
        >>> import torch
        >>> srrl(*(torch.tensor([[x, 0.0]]) for x in (1.0, 3.0, 4.0, 8.0)))
        tensor([10.])

    Source:
        Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021, section 3.
        Deviation: means over features and classes, as in the authors' code, instead of sums; both weigh 1 there.
    """
    student, teacher = checks.same_shape(student_embeddings, teacher_embeddings, dimensions=2, what=EMBEDDINGS)
    student_answer, teacher_answer = checks.logits(student_logits, teacher_logits)
    if len(student) != len(student_answer):
        raise ValueError(
            f"embeddings and logits must be of one batch: {tuple(student.shape)}, {tuple(student_answer.shape)}"
        )
    return _mean_square(student - teacher) + _mean_square(student_answer - teacher_answer)


def ofd(student_maps: Tensor, teacher_maps: Tensor, margin: Tensor) -> Tensor:
    """Partial squared distance to the teacher's features before their ReLU, of the overhaul of feature distillation.

    L_i = sum over channels and positions of (s - t')^2, t' = max(t, m), where s > t' or t' > 0; nothing elsewhere:
    where the teacher's ReLU gives 0, a student that is below t' gives 0, too. Per example.

    Args:
        student_maps: s, before the ReLU and after the connector, [batch, channels, height, width], any floating dtype.
        teacher_maps: t, before the ReLU, same shape; no gradient flows into it.
        margin: m, [channels], negative: the mean of the teacher's negative values in each channel.

    Returns:
        float32 [batch], a sum that grows with the size of the map; 0 where the maps are equal.

    Raises:
        ValueError: the shapes of the maps differ, or the margin's is not [channels].

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, -3.0, 0.0, 2.0], [2.0, -1.0, -4.0, -0.5]]).reshape(2, 1, 4, 1, 1)
        >>> ofd(student, teacher, torch.full((4,), -1.0))
        tensor([8.2500])

    Source:
        Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3: the margin ReLU and the partial
        L2 distance, equation 4. As in the authors' code the value is a sum; they weigh it by 0.001 beside
        cross-entropy, and each layer by half of what the next deeper one has.
    """
    student, teacher = checks.same_shape(student_maps, teacher_maps, dimensions=4, what=MAPS)
    if margin.shape != student.shape[1:2]:
        raise ValueError(f"margin must be [channels] of the maps {tuple(student.shape)}, not {tuple(margin.shape)}")
    target = torch.maximum(teacher, margin.detach().to(teacher)[:, None, None])
    counts = (student > target) | (target > 0)
    return torch.where(counts, (student - target).square(), 0.0).flatten(1).sum(1)


def ab(student_maps: Tensor, teacher_maps: Tensor, *, margin: float = 1.0) -> Tensor:
    """Activation boundaries: each of the student's neurons is on or off where the teacher's is, per example.

    L_i = sum over channels and positions of max(0, m - s)^2 where t > 0, and of max(0, m + s)^2 elsewhere: a squared
    hinge on the side of the boundary, not on the size of the activation.

    Args:
        student_maps: s, before the ReLU and after the connector, [batch, channels, height, width], any floating dtype.
        teacher_maps: t, before the ReLU, same shape; no gradient flows into it.
        margin: m >= 0, how far beyond the boundary the student must be, in units of its features.

    Returns:
        float32 [batch], a sum that grows with the size of the map; 0 where every neuron is beyond the margin on its
        teacher's side, so not always where the maps are equal.

    Raises:
        ValueError: the shapes differ, or are not those of maps; or the margin is negative.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -0.5, 0.5], [1.0, 1.0, -1.0]]).reshape(2, 1, 3, 1, 1)
        >>> ab(student, teacher)
        tensor([4.5000])

    Source:
        Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", 2019,
        equation 7 (the alternative loss with a margin and a connector). The paper initialises the student with it
        alone, and trains on labels afterwards. The authors' code divides by 1000 and halves the weight with each
        shallower layer.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be 0 or more, not {margin}")
    student, teacher = checks.same_shape(student_maps, teacher_maps, dimensions=4, what=MAPS)
    short = torch.where(teacher > 0, margin - student, margin + student)
    return F.relu(short).square().flatten(1).sum(1)


def ft(student_factors: Tensor, teacher_factors: Tensor) -> Tensor:
    """Factor transfer: the distance of the translator's factors from the paraphraser's, per example.

    L_i = mean over the elements of |t / |t| - s / |s||, the length of an example's whole factor made 1.

    Args:
        student_factors: s, of the translator, [batch, factors, height, width], any floating dtype.
        teacher_factors: t, of the paraphraser, same shape; no gradient flows into it.

    Returns:
        float32 [batch], in [0, 2 / sqrt(elements)]; 0 where the factors are equal or proportional.

    Raises:
        ValueError: the shapes differ, or are not those of maps.

    Example:
        >>> import torch
        >>> ft(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))
        tensor([0.4000])

    Source:
        Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018, section 3
        (factor transfer, p = 1). Deviation: the mean over the elements, as in the authors' code, which weighs it by
        500, instead of the sum of the paper's norm.
    """
    student, teacher = checks.same_shape(student_factors, teacher_factors, dimensions=4, what=MAPS)
    return (unit(student.flatten(1), 1) - unit(teacher.flatten(1), 1)).abs().mean(1)


def review(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """ReviewKD's hierarchical context loss of one level, per example.

    L_i = sum_l w_l mean (pool_l(s) - pool_l(t))^2 / sum_l w_l, pooled to the map's own size, to 4 x 4, 2 x 2 and 1 x 1,
    w = 1, 1/2, 1/4, 1/8; sizes that are not smaller than the map are left out.

    Args:
        student_maps: s, after the fusion with deeper levels, [batch, channels, height, width], any floating dtype.
        teacher_maps: t, same shape; no gradient flows into it.

    Returns:
        float32 [batch], in squared units of the teacher's features; 0 where the maps are equal.

    Raises:
        ValueError: the shapes differ, or are not those of maps.

    Example:
        >>> import torch
        >>> review(torch.zeros(1, 1, 2, 2), torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]]))
        tensor([3.])

    Source:
        Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3.3 (hierarchical context loss),
        which is the distance D of equation 11. The weights are those of the authors' code, which adds up the levels
        of a network. Deviation: the shorter side of a map that is not square decides which sizes are left out.
    """
    student, teacher = checks.same_shape(student_maps, teacher_maps, dimensions=4, what=MAPS)
    difference = student - teacher  # pooling is linear: one difference serves all sizes
    value, weight, total = _mean_square(difference), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(difference.shape[2:]):
            weight /= 2
            total += weight
            value = value + weight * _mean_square(F.adaptive_avg_pool2d(difference, size))
    return value / total


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)
