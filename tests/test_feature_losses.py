"""Losses on features, attention and relations: what the suite over all losses does not ask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases_features import CASES as FEATURES
from cases_relations import CASES as RELATIONS
from loss_cases import BATCH, Case
from understudy.losses import features as of_features
from understudy.losses import relations
from understudy.losses.attention import attention, cat_kd, fsp
from understudy.losses.vectors import cosines, distances, unit

CASES = [*FEATURES, *RELATIONS]
PAIRWISE = [relations.rkd_distance, relations.rkd_angle, relations.similarity, relations.pkt]
PAIRWISE.append(relations.correlation_congruence)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_pairwise = pytest.mark.parametrize("loss", PAIRWISE, ids=lambda loss: loss.__name__)


def drawn(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(values.to(dtype) for values in case.inputs(torch.Generator().manual_seed(seed)))


def slope(loss: Callable[..., Tensor], students: tuple[Tensor, ...], rest: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the value and the gradient at each of the student's tensors."""
    leaves = [values.detach().clone().requires_grad_() for values in students]
    value = loss(*leaves, *rest)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


# --- gradients where norms and distances have none -------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_all_zero_features_have_a_finite_gradient(case: Case, dtype: torch.dtype, side: str) -> None:
    inputs = drawn(case, dtype=dtype)
    students, rest = inputs[: case.students], inputs[case.students :]
    if side != "teacher":
        students = tuple(torch.zeros_like(values) for values in students)
    if side != "student":
        rest = tuple(torch.zeros_like(values) for values in rest)
    for values in slope(case.loss, students, rest):
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.zero_at_equality], ids=lambda case: case.name)
def test_the_gradient_is_zero_at_equality(case: Case) -> None:
    students = drawn(case)[: case.students]
    for values in slope(case.loss, students, students):
        torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", RELATIONS, ids=lambda case: case.name)
def test_examples_that_coincide_have_a_small_gradient(case: Case) -> None:
    student, teacher = drawn(case)
    student[1] = student[0]
    _, gradient = slope(case.loss, (student,), (teacher,))
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 10  # an epsilon under a root would give thousands


def test_unit_vectors_keep_their_direction_and_zero_stays_zero() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    directions = unit(vectors, 1)
    torch.testing.assert_close(directions, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    directions.sum().backward()
    assert vectors.grad is not None
    assert torch.equal(vectors.grad[1:], torch.zeros(2, 2))
    torch.testing.assert_close(cosines(vectors), torch.tensor([[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]))


def test_short_distances_are_not_lost_far_from_the_origin() -> None:
    far = torch.tensor([[1000.0, 0.0], [1000.0, 0.01]]).repeat(20, 1)  # the quick formula starts at 26 rows
    assert distances(far)[0, 1].item() == pytest.approx(0.01)


# --- batches too small for a relation --------------------------------------------------------------------------------


@every_pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_example_has_no_relations(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student, teacher = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[3.0, -1.0, 2.0]], dtype=dtype)
    for values in slope(loss, (student,), (teacher,)):
        torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-6, rtol=0)


def test_two_examples_have_one_distance_and_no_angle() -> None:
    student, teacher = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 3.0], [5.0, 1.0]])
    for loss in (relations.rkd_distance, relations.rkd_angle, relations.pkt):
        for values in slope(loss, (student,), (teacher,)):
            assert torch.equal(values, torch.zeros_like(values))
    assert relations.similarity(student, teacher) > 0.1
    assert relations.correlation_congruence(student, teacher) > 0.01


@pytest.mark.parametrize("case", [*FEATURES, *(case for case in RELATIONS if case.per_example)], ids=lambda c: c.name)
def test_an_example_does_not_look_at_the_others(case: Case) -> None:
    inputs = drawn(case)
    alone = case.loss(*(values[2:3] for values in inputs))
    torch.testing.assert_close(alone, case.loss(*inputs)[2:3])


# --- shapes ----------------------------------------------------------------------------------------------------------


@every_case
def test_batches_that_differ_are_refused(case: Case) -> None:
    inputs = drawn(case)
    students, teachers = inputs[: case.students], inputs[case.students :]
    with pytest.raises(ValueError, match=rf"\({BATCH}, .*\({BATCH - 1}, "):
        case.loss(*students, *(values[1:] for values in teachers))


@every_case
def test_a_tensor_without_features_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="must "):
        case.loss(*(values.flatten() for values in drawn(case)))


@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        *((loss, (2, 3, 4, 4), (2, 5, 4, 4)) for loss in (of_features.hint, of_features.simkd, of_features.ab)),
        *((loss, (2, 3, 4, 4), (2, 3, 4, 2)) for loss in (of_features.ft, of_features.review, of_features.hint)),
        *((loss, (2, 3, 4, 4), (2, 3, 4, 2)) for loss in (attention, relations.nst)),
        *((loss, (2, 3, 4, 4), (2, 3, 2, 4)) for loss in (attention, relations.nst)),
        *((loss, (2, 3, 4, 4), (2, 3, 16)) for loss in (attention, relations.nst, cat_kd)),
        (of_features.simkd, (2, 6), (2, 5)),
        (cat_kd, (2, 3, 4, 4), (2, 5, 4, 4)),
    ],
)
def test_other_shapes_are_refused_by_name(
    loss: Callable[..., Tensor], student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"student .* teacher") as error:
        loss(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(error.value)
    assert str(teacher) in str(error.value)


def test_srrl_wants_embeddings_and_logits_of_one_batch() -> None:
    embeddings, answers = torch.zeros(3, 4), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"one batch: \(3, 4\), \(2, 5\)"):
        of_features.srrl(embeddings, embeddings, answers, answers)


def test_fsp_wants_two_layers_of_one_size() -> None:
    first, second = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)
    with pytest.raises(ValueError, match=r"first \(2, 3, 4, 4\), second \(2, 5, 2, 2\)"):
        fsp(first, second, first, second)


@pytest.mark.parametrize("margin", [torch.zeros(1), torch.zeros(3, 1), torch.tensor(-1.0)])
def test_ofd_wants_a_margin_for_each_channel(margin: Tensor) -> None:
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"margin must be \[channels\] of the maps \(2, 3, 4, 4\)"):
        of_features.ofd(maps, maps, margin)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: of_features.ab(x, x, margin=-0.1), "margin must be 0 or more"),
        (lambda x: attention(x, x, power=0.5), "power must be at least 1"),
        (lambda x: cat_kd(x, x, size=0), "size must be at least 1"),
        (lambda x: relations.correlation_congruence(x, x, gamma=0.0), "gamma must be positive"),
        (lambda x: relations.correlation_congruence(x, x, order=0), "order at least 1"),
    ],
)
def test_options_out_of_range_are_refused(call: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.ones(2, 3, 4, 4))


# --- single properties -----------------------------------------------------------------------------------------------


def maps_of(*values: float) -> Tensor:
    """Return one example of one channel and one row."""
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_the_size_of_a_map_does_not_change_a_mean() -> None:
    student, teacher = maps_of(1.0, -2.0), maps_of(0.5, 1.0)
    for loss in (of_features.hint, of_features.simkd):
        large = loss(student.repeat(1, 3, 4, 5), teacher.repeat(1, 3, 4, 5))
        torch.testing.assert_close(large, loss(student, teacher))


def test_ofd_asks_nothing_of_a_student_below_a_teacher_that_is_off() -> None:
    margin = torch.tensor([-1.0])
    student = maps_of(-5.0, -0.75, -0.25, 0.5, -0.5)
    teacher = maps_of(-3.0, -0.50, -0.50, -2.0, 0.0)
    value, gradient = slope(lambda s: of_features.ofd(s, teacher, margin), (student,), ())
    torch.testing.assert_close(value, torch.tensor([0.25**2 + 1.5**2]))
    torch.testing.assert_close(gradient, maps_of(0.0, 0.0, 0.5, 3.0, 0.0))


def test_ofd_pulls_towards_a_teacher_that_is_on_from_both_sides() -> None:
    value, gradient = slope(
        lambda s: of_features.ofd(s, maps_of(1.0, 1.0), torch.tensor([-1.0])), (maps_of(-2.0, 3.0),), ()
    )
    torch.testing.assert_close(value, torch.tensor([13.0]))
    torch.testing.assert_close(gradient, maps_of(-6.0, 4.0))


def test_ab_is_zero_beyond_the_margin_whatever_the_size() -> None:
    student, teacher = maps_of(1.0, 7.0, -1.5), maps_of(0.1, 300.0, -0.1)
    assert of_features.ab(student, teacher).item() == 0
    assert of_features.ab(student, -teacher).item() == (1 + 1) ** 2 + (7 + 1) ** 2 + (1.5 + 1) ** 2


def test_factors_are_scaled_over_the_whole_example() -> None:
    teacher = torch.tensor([[[[1.0]], [[2.0]]]])
    assert of_features.ft(5 * teacher, teacher).item() == pytest.approx(0, abs=1e-7)
    assert of_features.ft(teacher * torch.tensor([2.0, 1.0])[:, None, None], teacher).item() > 0.1


def test_review_of_a_constant_offset_is_its_square_at_all_sizes() -> None:
    maps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(of_features.review(maps + 3, maps), torch.full((2,), 9.0))


def test_review_weighs_what_pooling_keeps() -> None:
    chequered = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))  # every pooling averages it away
    value = of_features.review(chequered.expand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(value, torch.tensor([1 / (1 + 1 / 2 + 1 / 4 + 1 / 8)]))


def test_attention_does_not_see_signs_or_the_order_of_channels() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 2, 4, 3, 3, generator=generator)
    expected = attention(student, teacher)
    torch.testing.assert_close(attention(-student[:, [2, 0, 3, 1]], teacher), expected)


def test_cat_kd_scales_each_class_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=generator)
    factors = torch.tensor([0.5, 2.0, 30.0])[:, None, None]
    torch.testing.assert_close(cat_kd(factors * student, teacher), cat_kd(student, teacher))


def test_nst_does_not_see_the_order_or_the_scale_of_channels() -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(2, 4, 3, 3, generator=generator)
    changed = maps[:, [3, 1, 0, 2]] * torch.tensor([0.5, 2.0, 30.0, 1.0])[:, None, None]
    torch.testing.assert_close(relations.nst(changed, maps), torch.zeros(2), atol=1e-6, rtol=0)
    assert (relations.nst(maps.flip(3), maps) > 1e-4).all()


@every_pairwise
def test_relations_do_not_change_under_rotation(loss: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(loss(student @ rotation, teacher), loss(student, teacher))
    wider = torch.nn.functional.pad(student, (0, 4))
    assert loss(wider, student).item() == pytest.approx(0, abs=1e-12)


def test_angles_of_examples_that_coincide_are_no_triplets() -> None:
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    # cosines at j of the triplets of distinct examples, each counted twice: the teacher's 45, 90 and 45 degrees; the
    # student's are 0 at both of the two that coincide, and 1 at the third
    half = math.sqrt(0.5)
    expected = (half**2 / 2 + 0 + (1 - half) ** 2 / 2) / 3
    assert relations.rkd_angle(student, teacher).item() == pytest.approx(expected)


def test_pkt_has_a_bound_where_embeddings_are_opposite() -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    teacher = torch.tensor([[1.0], [1.0], [1.0]])
    for values in slope(relations.pkt, (student,), (teacher,)):
        assert torch.isfinite(values).all()
    assert 0.5 < relations.pkt(student, teacher).item() < 3


def test_the_series_of_the_kernel_goes_to_the_gaussian() -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    kernels = [torch.exp(-0.7 * distances(unit(x, 1)) ** 2) for x in (student, teacher)]
    long = relations.correlation_congruence(student, teacher, gamma=0.7, order=20)
    torch.testing.assert_close(long, (kernels[0] - kernels[1]).square().mean())
    short = relations.correlation_congruence(student, teacher, gamma=0.7, order=2)
    assert abs(short - long) > 1e-4
