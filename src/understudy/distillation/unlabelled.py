"""Terms for batches in which some images have no label: class number -1.

The teacher's answers teach on all images; the cross-entropy passes over those without a label, or takes the teacher's
answer for one where it is sure. Beside the distiller's own means, so that batches of labelled images cost what they
did. Imported by the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from understudy.distillation.terms import Term
from understudy.errors import ConfigError

LABELS = "ce"
"""Name of the term that is the cross-entropy with the labels."""


def for_unlabelled(terms: Sequence[Term], *, pseudo_labels: float | None = None) -> tuple[Term, ...]:
    """Return terms that bear images without a label.

    The mean of the cross-entropy is then over the images of a batch that have a label, 0 where none has.

    Args:
        terms: of an objective.
        pseudo_labels: where the teacher's largest probability, at T = 1, is at least this, its class is the label of
            an image without one, in the cross-entropy only.

    Raises:
        ConfigError: another term takes the class of each image.
    """
    for term in terms:
        if "labels" in term.takes and term.name != LABELS:
            raise ConfigError(
                f"The term '{term.name}' takes the class of each image, and some training images have no label: "
                "leave these out with --no-unlabelled, or choose another method, such as kd."
            )
    return tuple(_passing_over(term, pseudo_labels) if term.name == LABELS else term for term in terms)


def with_pseudo_labels(teacher_logits: Tensor, labels: Tensor, *, threshold: float) -> Tensor:
    """Return labels, the teacher's class in place of -1 where its probability reaches a threshold.

    Args:
        teacher_logits: [batch, classes].
        labels: int64 [batch]; -1 for none.
        threshold: of the teacher's largest probability, in (0, 1].

    Returns:
        int64 [batch].

    Example:
        >>> import torch
        >>> with_pseudo_labels(torch.tensor([[9.0, 0.0], [1.0, 0.0]]), torch.tensor([-1, -1]), threshold=0.9)
        tensor([ 0, -1])

    Source:
        Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", 2013,
        section 2; the threshold is that of Sohn et al., "FixMatch", 2020, equation 4, and the answers are a teacher's.
    """
    largest, answer = torch.softmax(teacher_logits.float(), 1).max(1)
    return torch.where((labels < 0) & (largest >= threshold), answer, labels)


def _passing_over(term: Term, pseudo_labels: float | None) -> Term:
    if pseudo_labels is None:
        return replace(term, loss=partial(_over_labelled, term.loss))
    loss = partial(_over_sure, term.loss, pseudo_labels)
    return replace(term, loss=loss, takes=("student_logits", "labels", "teacher_logits"))


def _over_labelled(loss: Callable[..., Tensor], student_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of `loss` over the images with a label, a scalar."""
    # no branch on how many they are: that would make a device wait, and not compile
    return loss(student_logits, labels).sum() / (labels >= 0).sum().clamp(min=1)


def _over_sure(
    loss: Callable[..., Tensor], threshold: float, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor
) -> Tensor:
    """Return the same, the teacher's class counting as a label where it is sure."""
    return _over_labelled(loss, student_logits, with_pseudo_labels(teacher_logits, labels, threshold=threshold))
