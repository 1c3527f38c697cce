"""Methods that compare feature maps or embeddings. Where maps are compared, the teacher runs along in every step."""

from __future__ import annotations

from understudy import losses
from understudy.distillation.heads import ClassMaps, SoftmaxRegression
from understudy.distillation.methods.method import Method, Part
from understudy.distillation.paraphrase import Paraphrase
from understudy.distillation.projectors import ABConnector, Connector, Meet, Regressor
from understudy.distillation.schedules import Schedule
from understudy.distillation.stages import Flow, Review
from understudy.distillation.terms import EMBEDDING, MAP, MAPS

ROWS: tuple[Method, ...] = (
    Method(
        name="hint",
        summary="Predict the teacher's middle feature map from the student's.",
        equation="L = 1/2 mean (F_t - r(F_s))^2, r a learned 1x1 convolution",
        citation="Romero et al., 2015, arXiv:1412.6550",
        helps="Deep and thin students. Beside kd it seldom adds much; where networks differ in kind it may harm.",
        parts=(Part(losses.hint, MAP, weight=200.0, projector=Regressor, depth="middle"),),
    ),
    Method(
        name="attention",
        summary="Look where the teacher looks: match the maps of activity of every stage.",
        equation="L = sum over stages of mean (A_s - A_t)^2, A = sum over channels of F^2, of unit length",
        citation="Zagoruyko, Komodakis, 2017, arXiv:1612.03928",
        helps="Networks of one kind, such as a ResNet for a ResNet. MobileNets have been seen to lose by it.",
        parts=(Part(losses.attention, MAP, weight=1000.0, projector=Meet),),
    ),
    Method(
        name="ab",
        summary="First learn which of the teacher's neurons are active, by a margin; then train with the labels alone.",
        equation="L = sum over places of max(0, m -+ r(F_s))^2 by the sign of F_t, before the activation",
        citation="Heo et al., 2019, arXiv:1811.03233",
        helps="As a start for a student with ReLUs. It stops after 15 % of training.",
        parts=(
            Part(
                losses.ab,
                MAP,
                weight=Schedule("step", 1e-3, 0.0, until=0.15),
                projector=ABConnector,
                fade=0.5,
                before_activation=True,
            ),
        ),
        options={"margin": 1.0},
    ),
    Method(
        name="ft",
        summary="Match factors of the last maps, which an autoencoder takes out of the teacher's.",
        equation="L = mean |f_t / |f_t| - f_s / |f_s||, f the factors",
        citation="Kim, Park, Kwak, 2018, arXiv:1802.04977",
        helps="Where teacher and student are wide in different ways.",
        parts=(Part(losses.ft, MAP, weight=500.0, projector=Paraphrase, depth="last"),),
    ),
    Method(
        name="fsp",
        summary="Match how one stage became the next.",
        equation="L = mean (G_s - G_t)^2, G = F1 F2' / (h w) for consecutive stages",
        citation="Yim et al., CVPR 2017",
        helps="Networks of one kind with several stages; as a start rather than to the end.",
        parts=(Part(losses.fsp, MAPS, weight=50.0, projector=Flow),),
    ),
    Method(
        name="ofd",
        summary="Match pre-activations where they matter: what is positive, and no more negative than a margin.",
        equation="L = sum over places of (max(F_t, m) - r(F_s))^2, 0 where r(F_s) <= F_t <= 0",
        citation="Heo et al., 2019, arXiv:1904.01866",
        helps="Networks with ReLUs and enough images for its connectors.",
        parts=(Part(losses.ofd, MAP, weight=1e-3, projector=Connector, fade=0.5, before_activation=True),),
    ),
    Method(
        name="review",
        summary="Let deep stages of the student review shallow ones of the teacher, fused by attention.",
        equation="L = sum over stages and pooled sizes of mean (F_t - fused F_s)^2",
        citation="Chen et al., 2021, arXiv:2104.09044",
        helps="One of the stronger feature methods; its fusing modules cost time and memory.",
        parts=(Part(losses.review, MAPS, weight=Schedule("warmup", 0.0, 1.0, until=1 / 12), projector=Review),),
    ),
    Method(
        name="srrl",
        summary="Match the teacher's embedding, and what the teacher's own head says of the student's.",
        equation="L = mean (h_t - r(h_s))^2 + mean (W_t r(h_s) - z_t)^2",
        citation="Yang et al., ICLR 2021",
        helps="With many classes and a wide teacher. Its embeddings are kept, so that it costs no teacher.",
        parts=(Part(losses.srrl, (*EMBEDDING, "teacher_logits"), projector=SoftmaxRegression),),
    ),
    Method(
        name="simkd",
        summary="Match the teacher's embedding, so that the teacher's head could answer for the student.",
        equation="L = mean (h_t - r(h_s))^2",
        citation="Chen et al., 2022, arXiv:2203.14001",
        helps="With a wide teacher. The student keeps its own head here, so that it stays as small as it is.",
        parts=(Part(losses.simkd, EMBEDDING, projector=Regressor),),
    ),
    Method(
        name="cat_kd",
        summary="Match where in the image each class is seen.",
        equation="L = mean (M_t - M_s)^2, M the class activation maps, pooled to 2 x 2, of unit length",
        citation="Guo et al., 2023, arXiv:2304.12777",
        helps="Where objects are small in the image and both networks end in a pooling and one linear layer.",
        parts=(Part(losses.cat_kd, MAP, weight=100.0, projector=ClassMaps, depth="last"),),
    ),
)
