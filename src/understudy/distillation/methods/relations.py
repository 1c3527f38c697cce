"""Methods that compare how the images of a batch relate to one another. Most look at embeddings, which are kept."""

from __future__ import annotations

from understudy import losses
from understudy.distillation.methods.method import Method, Part
from understudy.distillation.projectors import Meet
from understudy.distillation.terms import EMBEDDING, MAP

ROWS: tuple[Method, ...] = (
    Method(
        name="rkd",
        summary="Keep the teacher's distances and angles between images.",
        equation="L = 25 Huber(distances) + 50 Huber(cosines of triplets)",
        citation="Park et al., 2019, arXiv:1904.05068",
        helps="For retrieval and few images; as a companion of kd for classes.",
        parts=(
            Part(losses.rkd_distance, EMBEDDING, weight=25.0, suffix="-distance"),
            Part(losses.rkd_angle, EMBEDDING, weight=50.0, suffix="-angle"),
        ),
        fewest_images=16,
    ),
    Method(
        name="rkd_distance",
        summary="Keep the teacher's distances between images.",
        equation="L = Huber(|e_i - e_j| / their mean)",
        citation="Park et al., 2019, arXiv:1904.05068, equation 5",
        helps="As rkd, without the memory that angles take.",
        parts=(Part(losses.rkd_distance, EMBEDDING, weight=25.0),),
        fewest_images=8,
    ),
    Method(
        name="rkd_angle",
        summary="Keep the teacher's angles between triplets of images.",
        equation="L = Huber(cos of the angle at e_j between e_i and e_k)",
        citation="Park et al., 2019, arXiv:1904.05068, equation 8",
        helps="As rkd. Its memory grows with the third power of the batch.",
        parts=(Part(losses.rkd_angle, EMBEDDING, weight=50.0),),
        fewest_images=8,
    ),
    Method(
        name="sp",
        summary="Images that look alike to the teacher look alike to the student.",
        equation="L = |G_s - G_t|^2 / B^2, G the products of all pairs of last maps, rows of unit length",
        citation="Tung, Mori, 2019, arXiv:1907.09682",
        helps="Where networks differ in width and kind: nothing has to fit.",
        parts=(Part(losses.similarity, MAP, weight=3000.0, depth="last"),),
        fewest_images=16,
    ),
    Method(
        name="cc",
        summary="Match a matrix of similarities of all pairs under a Gaussian kernel.",
        equation="L = |K_s - K_t|^2 / B^2",
        citation="Peng et al., 2019, arXiv:1904.01802",
        helps="A weak companion of kd; as others have found, it seldom decides anything.",
        parts=(Part(losses.correlation_congruence, EMBEDDING, weight=100.0),),
        options={"gamma": 0.4},
        fewest_images=16,
    ),
    Method(
        name="pkt",
        summary="Match the probability that one image is another's neighbour.",
        equation="L = KL of the conditional probabilities from (cosine + 1) / 2, mean over B^2",
        citation="Passalis, Tefas, 2018, arXiv:1803.10837",
        helps="Networks of any width; among the steadier of the relational methods.",
        parts=(Part(losses.pkt, EMBEDDING, weight=30000.0),),
        fewest_images=16,
    ),
    Method(
        name="nst",
        summary="Match the distribution of where neurons respond.",
        equation="L = MMD^2 of the channels of the last maps, of unit length, under the kernel (a'b)^2",
        citation="Huang, Wang, 2017, arXiv:1707.01219",
        helps="Networks of one kind with maps larger than 4 x 4.",
        parts=(Part(losses.nst, MAP, weight=50.0, projector=Meet, depth="last"),),
    ),
)
