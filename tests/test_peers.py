"""Methods without a teacher: a second student that learns along, and early exits of the student itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.distillation import Distiller, Term, methods
from understudy.distillation.peers import Exits, Peer
from understudy.distillation.projectors import Shapes
from understudy.errors import ConfigError, ModelError

CLASSES = 3


def network(seed: int = 0) -> nn.Sequential:
    """Return a network of two stages."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def batch() -> tuple[Tensor, Tensor]:
    """Return images and labels."""
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(8) % CLASSES


def test_a_peer_starts_elsewhere_and_learns_by_its_own_loss() -> None:
    images, labels = batch()
    student = network()
    objective = Distiller(None, student, terms=terms("dml"), example=images).train()
    (peer,) = objective.projectors["dml"]  # type: ignore[misc]
    assert isinstance(peer, Peer)
    assert not torch.equal(peer.peer[0][0].weight, student[0][0].weight)  # type: ignore[index]
    losses = objective(images, labels)
    z, p = student(images), peer.peer(images)
    of_student = F.kl_div(F.log_softmax(z, 1), F.softmax(p, 1), reduction="batchmean")
    of_peer = F.cross_entropy(p, labels) + F.kl_div(F.log_softmax(p, 1), F.softmax(z, 1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(z, labels) + 0.5 * of_student + of_peer
    torch.testing.assert_close(losses.total, expected)
    (of_peer_alone,) = torch.autograd.grad(of_peer, peer.peer[0][0].weight)  # type: ignore[index]
    losses.total.backward()
    torch.testing.assert_close(peer.peer[0][0].weight.grad, of_peer_alone)  # type: ignore[index]


def test_every_stage_but_the_last_has_an_exit() -> None:
    images, labels = batch()
    student = network()
    objective = Distiller(None, student, terms=terms("byot"), example=images).train()
    (exits,) = objective.projectors["byot"]  # type: ignore[misc]
    assert isinstance(exits, Exits)
    assert len(exits.exits) == 1
    losses = objective(images, labels)
    leave, z = exits.exits[0](student[0](images)), student(images).detach()
    soft = 9 * F.kl_div(F.log_softmax(leave / 3, 1), F.softmax(z / 3, 1), reduction="batchmean")
    expected = 0.7 * F.cross_entropy(leave, labels) + 0.3 * soft
    torch.testing.assert_close(losses.parts["byot"], expected.detach())


def test_neither_needs_a_teacher_but_both_need_a_probe() -> None:
    for method in ("dml", "byot"):
        with pytest.raises(ConfigError, match="give the distiller images as `example`"):
            Distiller(None, network(), terms=terms(method))


def test_an_exit_needs_a_stage_to_leave_from() -> None:
    with pytest.raises(ModelError, match="there is only one"):
        Exits(Shapes(((4, 8, 8),), ((4, 8, 8),), student_head=nn.Linear(4, 2)))
    with pytest.raises(ModelError, match="ends in a linear layer"):
        Exits(Shapes(((4, 8, 8), (6, 4, 4)), ((4, 8, 8), (6, 4, 4))))
    with pytest.raises(ModelError, match="needs to know the first"):
        Peer(Shapes((), ()))


def terms(method: str) -> tuple[Term, ...]:
    """Return the terms of a method beside the labels, half and half."""
    return methods.terms(method, ce_weight=0.5, kd_weight=0.5)
