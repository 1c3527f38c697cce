"""Methods that bound the information that teacher and student share."""

from __future__ import annotations

from understudy import losses
from understudy.distillation.memory import Contrast
from understudy.distillation.methods.method import Method, Part
from understudy.distillation.projectors import Variational
from understudy.distillation.terms import EMBEDDING, MAP

ROWS: tuple[Method, ...] = (
    Method(
        name="crd",
        summary="Tell the teacher's view of the same image from its views of thousands of others.",
        equation="L = -log h(own pair) - sum over K others of log(1 - h(pair)), in both directions",
        citation="Tian, Krishnan, Isola, 2020, arXiv:1910.10699",
        helps="Large training sets and long training; the strongest of the methods before 2021 in its own tests.",
        parts=(Part(losses.crd, (*EMBEDDING, "positions"), weight=0.8, projector=Contrast),),
    ),
    Method(
        name="vid",
        summary="Predict the teacher's maps with a variance that is learned for each channel.",
        equation="L = mean over channels and places of log s + (F_t - m(F_s))^2 / (2 s^2)",
        citation="Ahn et al., 2019, arXiv:1904.05835",
        helps="Networks of different kinds: channels that cannot be predicted lose their weight by themselves.",
        parts=(Part(losses.vid, MAP, projector=Variational),),
    ),
)
