"""Methods in which no teacher teaches: it only judges, and neither runs along nor is kept."""

from __future__ import annotations

from understudy import losses
from understudy.distillation.methods.method import Method, Part
from understudy.distillation.peers import Exits, Peer

ROWS: tuple[Method, ...] = (
    Method(
        name="dml",
        summary="Deep mutual learning: two students of one kind learn from the labels and from one another.",
        equation="L = T^2 KL(softmax(p/T) || softmax(z/T)), p the peer's logits, and likewise for the peer at T = 1",
        citation="Zhang et al., 2018, arXiv:1706.00384, equations 7 and 8",
        helps="Where there is no good teacher. A step costs two students; with a good teacher take kd.",
        parts=(Part(losses.kd, ("images", "student_logits", "labels"), projector=Peer),),
        temperature=1.0,
    ),
    Method(
        name="byot",
        summary="Self-distillation: early exits of the student learn from its own final answers.",
        equation="L = sum over exits e of (1 - a) CE(y, e) + a T^2 KL(softmax(z/T) || softmax(e/T))",
        citation="Zhang et al., 2019, arXiv:1905.08094, equations 2 and 3",
        helps="Deep students of several stages. The exits are thrown away afterwards.",
        parts=(Part(losses.byot, ("student_maps", "student_logits", "labels"), projector=Exits),),
        temperature=3.0,
        options={"alpha": 0.3},
    ),
)
