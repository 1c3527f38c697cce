"""Losses on relations: how the examples of a batch lie to one another, whatever the width of the features.

All but `nst` return a scalar, the mean over the pairs or triplets of a batch, since a relation belongs to no single
example. Where a batch is too small to have any, the value is 0 with a gradient of 0 and no error: the last batch of an
epoch may be of any size. Student and teacher may differ in width; more dimensions than two are flattened.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.losses import checks
from understudy.losses.attention import same_places
from understudy.losses.vectors import cosines, distances, unit

LEAST_KERNEL = 1e-7
"""What the kernel of `pkt` is at least, so that opposite embeddings have a finite logarithm."""


def rkd_distance(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Relational distillation of distances: pairs are relatively as far apart as they are for the teacher; a scalar.

    L = mean over pairs i != j of H(d_t(i, j) - d_s(i, j)), where d(i, j) = |x_i - x_j| / (its mean over all pairs) and
    H is Huber's loss: x^2 / 2 where |x| <= 1, |x| - 1/2 beyond.

    Args:
        student_embeddings: x of the student, [batch, ...], flattened, any floating dtype, any scale.
        teacher_embeddings: x of the teacher, same batch, any width; no gradient flows into it.

    Returns:
        float32 scalar of the batch; 0 where all distances are equal or proportional, and for fewer than 2 examples.
        Where all examples of one network coincide, its relative distances count as 0.

    Raises:
        ValueError: the batches differ, or there is nothing but a batch.

    Example:
        >>> import torch
        >>> rkd_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        tensor(0.5208)

    Source:
        Park et al., "Relational Knowledge Distillation", 2019, section 3.2.1, equations 3 to 6. Deviation: the mean
        over pairs instead of their sum. The authors' code divides by batch^2, the diagonal included, which is
        (batch - 1) / batch of this value, and leaves pairs that coincide out of the mean distance; the paper does not.
    """
    student, teacher = _embeddings(student_embeddings, teacher_embeddings)
    pairs = len(student) * (len(student) - 1)
    total = _huber(_relative_distances(student) - _relative_distances(teacher))
    return total / max(pairs, 1)  # the diagonal adds nothing: it is 0 for both


def rkd_angle(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Relational distillation of angles: triplets of examples form the teacher's angles; a scalar.

    L = mean over triplets of distinct i, j, k of H(c_t(i, j, k) - c_s(i, j, k)), where c = <e_ij, e_kj> is the cosine
    of the angle at j, e_ij = (x_i - x_j) / |x_i - x_j|, and H is Huber's loss as for distances.

    The memory is cubic in the batch: with the gradient at most about 8 batch^3 + 20 batch^2 width bytes in float32, for
    the student's width; 0.66 GB were measured at 256 examples of width 512. Use embeddings after the pooling, not maps.

    Args:
        student_embeddings: x of the student, [batch, ...], flattened, any floating dtype, any scale.
        teacher_embeddings: x of the teacher, same batch, any width; no gradient flows into it.

    Returns:
        float32 scalar of the batch; 0 where all angles are equal, and for fewer than 3 examples. The cosine at two
        examples that coincide counts as 0.

    Raises:
        ValueError: the batches differ, or there is nothing but a batch.

    Example:
        >>> import torch
        >>> line, corner = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])
        >>> rkd_angle(corner, line)
        tensor(0.1953)

    Source:
        Park et al., "Relational Knowledge Distillation", 2019, section 3.2.2, equations 7 and 8. Deviation: the mean
        over triplets instead of their sum. The authors' code divides by batch^3, degenerate triplets included, which
        is (batch - 1) (batch - 2) / batch^2 of this value.
    """
    student, teacher = _embeddings(student_embeddings, teacher_embeddings)
    batch = len(student)
    of_student, of_teacher = _directions(student), _directions(teacher)
    # [j, i, k]; the difference in one step, so that only one such tensor is kept for the gradient
    gaps = torch.baddbmm(of_teacher @ of_teacher.mT, of_student, of_student.mT, beta=-1)
    # i = j and k = j add nothing, a direction of length 0 on both sides; i = k does, where two examples coincide
    same = gaps.detach().diagonal(dim1=1, dim2=2)
    total = _huber(gaps) - _huber(same)
    return total / max(batch * (batch - 1) * (batch - 2), 1)


def similarity(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity-preserving distillation: what is alike for the teacher is alike for the student; a scalar.

    L = |G_t - G_s|_F^2 / batch^2, where G is the matrix of inner products of all examples' features, its rows scaled
    to length 1.

    Args:
        student_features: [batch, ...], flattened, any floating dtype, any scale.
        teacher_features: same batch, any width; no gradient flows into it.

    Returns:
        float32 scalar of the batch, in [0, 4 / batch]; 0 where the features are equal or proportional, and for 1
        example.

    Raises:
        ValueError: the batches differ, or there is nothing but a batch.

    Example:
        >>> import torch
        >>> similarity(torch.eye(2), torch.tensor([[3.0], [3.0]]))
        tensor(0.2929)

    Source:
        Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019, section 3, equations 1 to 3.
    """
    student, teacher = _embeddings(student_features, teacher_features)
    return (_row_similarities(student) - _row_similarities(teacher)).square().mean()


def correlation_congruence(
    student_embeddings: Tensor, teacher_embeddings: Tensor, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    """Correlation congruence: the kernel between all pairs of examples is the teacher's; a scalar.

    L = |K_t - K_s|_F^2 / batch^2, K(i, j) = exp(-2 gamma) sum_{p=0..order} (2 gamma)^p / p! <x_i, x_j>^p, x scaled to
    length 1: the Taylor series of the Gaussian kernel exp(-gamma |x_i - x_j|^2).

    Args:
        student_embeddings: x of the student before scaling, [batch, ...], flattened, any floating dtype.
        teacher_embeddings: x of the teacher, same batch, any width; no gradient flows into it.
        gamma: > 0, the sharper the larger.
        order: of the series, at least 1.

    Returns:
        float32 scalar of the batch; 0 where the embeddings are equal or proportional, and for 1 example that is not
        zero in one network alone.

    Raises:
        ValueError: the batches differ, or there is nothing but a batch; gamma is not positive, or order is below 1.

    Example:
        >>> import torch
        >>> correlation_congruence(torch.eye(2), torch.tensor([[3.0], [3.0]]))
        tensor(0.1266)

    Source:
        Peng et al., "Correlation Congruence for Knowledge Distillation", 2019, section 3 (correlation congruence, and
        the Gaussian kernel by its Taylor series). Published codes differ: one multiplies neighbours' differences
        in the batch, to which the often seen weight of 0.02 belongs; this is the paper's matrix.
    """
    if not gamma > 0 or order < 1:
        raise ValueError(f"gamma must be positive and order at least 1, not {gamma} and {order}")
    student, teacher = _embeddings(student_embeddings, teacher_embeddings)
    return (_kernel(student, gamma, order) - _kernel(teacher, gamma, order)).square().mean()


def pkt(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Probabilistic knowledge transfer: each example has the teacher's neighbours with its probabilities; a scalar.

    L = sum over pairs i != j of p(j|i) log(p(j|i) / q(j|i)) / batch^2, where p(j|i) = K(i, j) / sum_{k != i} K(i, k),
    K = (cosine + 1) / 2, of the teacher; q is that of the student.

    Args:
        student_embeddings: [batch, ...], flattened, any floating dtype, any scale.
        teacher_embeddings: same batch, any width; no gradient flows into it.

    Returns:
        float32 scalar of the batch, in nats / batch; 0 where all cosines are equal, and for fewer than 3 examples,
        each of which has one neighbour at most.

    Raises:
        ValueError: the batches differ, or there is nothing but a batch.

    Example:
        >>> import torch
        >>> pkt(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0], [2.0], [2.0]]))
        tensor(0.0131)

    Source:
        Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018, section 3 (cosine
        kernel, Kullback-Leibler divergence). The mean over batch^2, as in the authors' code, to which the usual weight
        of 30000 belongs; the paper sums. Deviations of their code: it counts an example as its own neighbour, and adds
        1e-7 to norms and probabilities; here the kernel is at least 1e-7 instead.
    """
    student, teacher = _embeddings(student_embeddings, teacher_embeddings)
    log_p, log_q = _log_neighbours(teacher), _log_neighbours(student)
    terms = log_p.exp() * (log_p - log_q)
    return (terms - terms.diagonal().diag()).sum() / len(student) ** 2


def nst(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Neuron selectivity transfer: channels respond to places as the teacher's do, as a distribution; per example.

    L_i = mean of k(t, t') + mean of k(s, s') - 2 mean of k(t, s) over all pairs of channels, s and t one channel's map
    scaled to length 1, k(x, y) = <x, y>^2: the squared maximum mean discrepancy with a polynomial kernel.

    Memory: 4 (C_s^2 + C_s C_t + C_t^2) bytes for each example in float32, for C_s and C_t channels.

    Args:
        student_maps: [batch, channels, height, width], any floating dtype, any scale.
        teacher_maps: same batch, height and width, any number of channels; no gradient flows into it.

    Returns:
        float32 [batch], in [0, 2], up to rounding below 0; 0 where the channels are equal in any order or scale.

    Raises:
        ValueError: batch, height or width differ.

    Example:
        >>> import torch
        >>> nst(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]], [[3.0, 0.0]]]]))
        tensor([0.5000])

    Source:
        Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, section 4 (squared
        maximum mean discrepancy; polynomial kernel with d = 2, c = 0). The paper halves the weight of this term.
    """
    student, teacher = same_places(student_maps, teacher_maps)
    s, t = (unit(maps.flatten(2), 2) for maps in (student, teacher))
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(t, s)


def _embeddings(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as [batch, features] in full precision, the teacher's without gradient."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            "embeddings must both be [batch, features] of one batch: "
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    return checks.widen(student).flatten(1), checks.widen(teacher.detach()).flatten(1)


def _relative_distances(embeddings: Tensor) -> Tensor:
    values = distances(embeddings)
    mean = values.sum() / max(len(values) * (len(values) - 1), 1)
    return values / torch.where(mean > 0, mean, torch.inf)


def _directions(embeddings: Tensor) -> Tensor:
    """Return the direction from j to i, [j, i, features]; 0 where they coincide."""
    return unit(embeddings[None, :] - embeddings[:, None], 2)


def _huber(differences: Tensor) -> Tensor:
    """Return the sum of Huber's loss with delta 1."""
    return F.huber_loss(differences, torch.zeros_like(differences[:1]).expand_as(differences), reduction="sum")


def _row_similarities(features: Tensor) -> Tensor:
    return unit(features @ features.T, 1)


def _kernel(embeddings: Tensor, gamma: float, order: int) -> Tensor:
    angles = cosines(embeddings)
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    return sum((factor * angles**p for p, factor in enumerate(factors)), start=torch.zeros_like(angles))


def _log_neighbours(embeddings: Tensor) -> Tensor:
    """Return the logarithm of p(j|i), [i, j]; the diagonal, where no example is, is finite and means nothing."""
    kernel = ((cosines(embeddings) + 1) / 2).clamp(min=LEAST_KERNEL)
    others = (kernel - kernel.diagonal().diag()).sum(1, keepdim=True).clamp(min=LEAST_KERNEL)
    return kernel.log() - others.log()


def _mean_kernel(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.mT).square().mean((1, 2))
