"""What each projector does: margins, the paraphraser, flow, review, class maps, and contrast by a slow loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projector_shapes import BATCH, CLASSES, EMBEDDINGS, MAPS, SAMPLES, STAGES, drawn, small_contrast, two_heads
from understudy import losses
from understudy.distillation.heads import ClassMaps, SoftmaxRegression
from understudy.distillation.memory import Contrast
from understudy.distillation.paraphrase import Paraphrase
from understudy.distillation.projectors import Connector, Shapes, Variational
from understudy.distillation.stages import Flow, Review
from understudy.errors import ConfigError, ModelError


def test_the_variance_starts_at_five() -> None:
    variance = F.softplus(Variational(MAPS).scale) + 1e-5
    torch.testing.assert_close(variance, torch.full((6,), 5.0))


def test_the_margin_is_the_mean_of_all_negative_responses_so_far() -> None:
    connector = Connector(Shapes(student=((2, 3, 3),), teacher=((4, 3, 3),)))
    seen: list[list[float]] = [[], [], [], []]
    for _ in range(3):
        teacher = torch.randn(BATCH, 4, 3, 3)
        teacher[:, 3] = teacher[:, 3].abs()
        _, arrived, margin = connector(torch.randn(BATCH, 2, 3, 3), teacher)
        assert torch.equal(arrived, teacher)
        for channel in range(4):
            seen[channel] += [value for value in teacher[:, channel].flatten().tolist() if value < 0]
        slow = [sum(values) / len(values) if values else 0.0 for values in seen]
        torch.testing.assert_close(margin, torch.tensor(slow))
    assert seen[0]
    assert slow[3] == 0


def test_a_margin_in_use_does_not_move() -> None:
    connector = Connector(MAPS)
    first = connector(torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4))[2]
    kept = first.clone()
    assert not torch.equal(connector(torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4) - 1)[2], first)
    assert torch.equal(first, kept)


def test_the_paraphraser_learns_to_reconstruct_and_only_by_its_own_loss() -> None:
    torch.manual_seed(0)
    paraphrase = Paraphrase(MAPS)
    student, teacher = torch.randn(BATCH, 3, 8, 8), torch.randn(BATCH, 6, 4, 4)
    student_factors, teacher_factors = paraphrase(student, teacher)
    assert not teacher_factors.requires_grad
    slow = paraphrase.decoder(paraphrase.encoder(teacher)) - teacher
    assert paraphrase.own_loss is not None
    torch.testing.assert_close(paraphrase.own_loss, (slow**2).sum() / teacher.numel())
    (student_factors - teacher_factors).square().sum().backward()
    assert all(values.grad is None for values in (*paraphrase.encoder.parameters(), *paraphrase.decoder.parameters()))
    optimizer = torch.optim.Adam(paraphrase.parameters(), lr=0.01)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        paraphrase(student, teacher)
        paraphrase.own_loss.backward()
        optimizer.step()
        values.append(float(paraphrase.own_loss.detach()))
    assert values[-1] < 0.8 * values[0]


def test_a_paraphraser_can_be_copied_in_the_midst_of_training() -> None:
    paraphrase = Paraphrase(MAPS)
    paraphrase(torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4))
    twin = copy.deepcopy(paraphrase)
    assert twin.own_loss is None
    assert paraphrase.own_loss is not None
    assert torch.equal(twin.encoder[0].weight, paraphrase.encoder[0].weight)


def test_flow_pools_by_the_maximum_and_shares_the_projection_of_a_stage() -> None:
    flow = Flow(STAGES)
    student, teacher = drawn(STAGES)
    (first, second) = flow(student, teacher)
    torch.testing.assert_close(first[2], F.max_pool2d(teacher[0], 2))
    torch.testing.assert_close(second[2], F.max_pool2d(teacher[1], 4))
    torch.testing.assert_close(first[1], student[1])  # equal channels: nothing to project
    torch.testing.assert_close(first[0], F.max_pool2d(flow.fit[0](student[0]), 2))
    with pytest.raises(ModelError, match="two layers or more"):
        Flow(MAPS)


def test_review_carries_the_deepest_stage_up_to_the_shallowest() -> None:
    review = Review(STAGES)
    student, teacher = drawn(STAGES, gradient=True)
    deepest, _, shallowest = (call[0].pow(3).sum() for call in review(student, teacher))
    seen = torch.autograd.grad(deepest, student, allow_unused=True, retain_graph=True)
    assert [gradient is not None for gradient in seen] == [False, False, True]
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(shallowest, student))


def test_review_mixes_each_place_by_two_learned_shares() -> None:
    review = Review(Shapes(student=((3, 4, 4), (5, 2, 2)), teacher=((6, 4, 4), (7, 2, 2)))).eval()
    student, teacher = drawn(Shapes(student=((3, 4, 4), (5, 2, 2)), teacher=((6, 4, 4), (7, 2, 2))))
    below, here = review.reduce[1](student[1]), review.reduce[0](student[0])
    attend = review.attend[0]
    mixed = torch.zeros(BATCH, 7, 4, 4)
    for example in range(BATCH):
        for row in range(4):
            for column in range(4):
                upper, lower = here[example, :, row, column], below[example, :, row // 2, column // 2]
                votes = attend.weight[:, :, 0, 0] @ torch.cat([upper, lower]) + attend.bias
                mixed[example, :, row, column] = upper * votes[0].sigmoid() + lower * votes[1].sigmoid()
    deepest, shallowest = review(student, teacher)
    torch.testing.assert_close(deepest[0], review.expand[1](below))
    torch.testing.assert_close(shallowest[0], review.expand[0](mixed))


@pytest.mark.parametrize(("widest", "width"), [(10, 10), (700, 512)])
def test_the_middle_of_a_review_is_as_wide_as_the_teacher_up_to_a_limit(widest: int, width: int) -> None:
    review = Review(Shapes(student=((2, 2, 2),), teacher=((widest, 2, 2),)))
    assert review.reduce[0][0].out_channels == width  # type: ignore[index]


def test_class_maps_average_to_the_logits_and_teach_the_students_head_alone() -> None:
    student_head, teacher_head = two_heads()
    teacher_head.requires_grad_(True)  # even where somebody forgot to freeze it
    projector = ClassMaps(MAPS._replace(student_head=student_head, teacher_head=teacher_head))
    assert not projector.state_dict()
    student, teacher = torch.randn(BATCH, 3, 4, 4), torch.randn(BATCH, 6, 4, 4)
    maps = projector(student, teacher)
    torch.testing.assert_close(maps[0].mean((2, 3)) + student_head.bias, student_head(student.mean((2, 3))))
    torch.testing.assert_close(maps[1].mean((2, 3)) + teacher_head.bias, teacher_head(teacher.mean((2, 3))))
    (maps[0] - maps[1]).square().sum().backward()
    assert student_head.weight.grad is not None
    assert teacher_head.weight.grad is None


def test_class_maps_need_two_heads_of_the_same_classes() -> None:
    student, teacher = two_heads()
    with pytest.raises(ModelError, match="student's final linear layer, and it has none"):
        ClassMaps(MAPS._replace(teacher_head=teacher))
    with pytest.raises(ModelError, match="teacher's final layer takes 3 features, but the chosen layer gives 6"):
        ClassMaps(MAPS._replace(student_head=student, teacher_head=student))
    with pytest.raises(ModelError, match="has 3 classes and the teacher's 4"):
        ClassMaps(MAPS._replace(student_head=student, teacher_head=nn.Linear(6, 4)))


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_regression_goes_through_the_teachers_head_and_leaves_it_alone(bias: bool) -> None:
    head = nn.Linear(6, CLASSES, bias=bias)
    projector = SoftmaxRegression(EMBEDDINGS._replace(teacher_head=head))
    teacher, logits = torch.randn(BATCH, 6), torch.randn(BATCH, CLASSES)
    connected, teacher_out, through, logits_out = projector(torch.randn(BATCH, 5), teacher, logits)
    assert teacher_out is teacher
    assert logits_out is logits
    torch.testing.assert_close(through, head(connected))
    through.pow(3).sum().backward()
    assert all(values.grad is None for values in head.parameters())
    assert all(values.grad is not None for values in projector.parameters())
    assert not any(values is parameter for values in projector.parameters() for parameter in head.parameters())
    with pytest.raises(ModelError, match="choose the layers after the pooling"):
        SoftmaxRegression(MAPS)


def _slow_contrast(
    contrast: Contrast, student: Tensor, teacher: Tensor, positions: Tensor
) -> tuple[list[list[float]], list[list[float]]]:
    """Return the scores before division by Z, pair by pair."""
    negatives = contrast.draw(positions)
    directions = (
        (contrast.embed_student, student, contrast.teacher_bank),
        (contrast.embed_teacher, teacher, contrast.student_bank),
    )
    results = []
    for embed, features, bank in directions:
        rows = []
        for example, position in enumerate(positions.tolist()):
            embedding = embed(features[example]).detach()
            embedding = embedding / embedding.norm()
            others = [position, *negatives[example].tolist()]
            rows.append([math.exp(float(embedding @ bank[other]) / 0.07) for other in others])
        results.append(rows)
    return results[0], results[1]


def test_contrast_scores_and_banks_equal_a_slow_loop() -> None:
    torch.manual_seed(0)
    contrast = small_contrast(negatives=5)
    constants: list[float] = []
    for batch in range(3):
        positions = torch.randperm(SAMPLES)[:BATCH]
        student, teacher = torch.randn(BATCH, 5), torch.randn(BATCH, 6)
        slow = _slow_contrast(contrast, student, teacher, positions)
        banks = contrast.student_bank.clone(), contrast.teacher_bank.clone()
        if batch == 0:
            constants = [SAMPLES * sum(map(sum, rows)) / (BATCH * 6) for rows in slow]
        *scores, samples = contrast(student, teacher, positions)
        assert samples == SAMPLES
        for direction in range(2):
            expected = torch.tensor(slow[direction]) / constants[direction]
            torch.testing.assert_close(scores[direction], expected, rtol=1e-4, atol=1e-6)
        for embed, features, bank in (
            (contrast.embed_student, student, banks[0]),
            (contrast.embed_teacher, teacher, banks[1]),
        ):
            for example, position in enumerate(positions.tolist()):
                embedding = embed(features[example]).detach()
                row = 0.5 * bank[position] + 0.5 * embedding / embedding.norm()
                bank[position] = row / row.norm()
        torch.testing.assert_close(contrast.student_bank, banks[0])
        torch.testing.assert_close(contrast.teacher_bank, banks[1])
    assert int(contrast.step) == 3


def test_negatives_are_other_images_and_all_of_them_in_time() -> None:
    torch.manual_seed(0)
    contrast = Contrast(EMBEDDINGS._replace(samples=SAMPLES), negatives=10)
    positions = torch.arange(SAMPLES)
    counts = torch.zeros(SAMPLES, SAMPLES)
    steps = 400
    for _ in range(steps):
        drawn = contrast.draw(positions)
        assert drawn.min() >= 0
        assert drawn.max() < SAMPLES
        counts += F.one_hot(drawn, SAMPLES).sum(1)
        contrast.step += 1
    assert counts.diagonal().sum() == 0
    others = counts[~torch.eye(SAMPLES, dtype=torch.bool)]
    # binomial with 4000 draws at 1/10: the deviation is 19, and 5 of them are never met among 110
    assert others.min() > 400 - 5 * 19
    assert others.max() < 400 + 5 * 19


def test_negatives_depend_on_seed_step_and_image_alone() -> None:
    contrast = Contrast(EMBEDDINGS._replace(samples=1000))
    positions = torch.tensor([5, 800, 30])
    drawn = contrast.draw(positions)
    assert torch.equal(contrast.draw(positions.flip(0)), drawn.flip(0))
    assert drawn.shape == (3, 999)
    rows = [drawn[0], drawn[1]]
    contrast.step += 1
    rows.append(contrast.draw(positions)[0])
    contrast.step -= 1
    contrast.seed += 1
    rows.append(contrast.draw(positions)[0])
    # two independent rows agree in 1 of 999 columns
    assert all((one == other).sum() < 12 for index, one in enumerate(rows) for other in rows[:index])


def test_another_run_draws_other_negatives() -> None:
    positions = torch.arange(SAMPLES)
    torch.manual_seed(0)
    one = small_contrast().draw(positions)
    assert not torch.equal(small_contrast().draw(positions), one)


def test_contrast_draws_the_papers_number_where_there_are_as_many() -> None:
    assert Contrast(Shapes(((1,),), ((1,),), samples=20000), width=1).negatives == 16384
    assert Contrast(Shapes(((1,),), ((1,),), samples=2), width=1).draw(torch.tensor([0, 1])).tolist() == [[1], [0]]


def test_contrast_learns_both_embeddings_and_its_bank_is_of_unit_length() -> None:
    torch.manual_seed(0)
    contrast = small_contrast()
    optimizer = torch.optim.SGD(contrast.parameters(), lr=0.05)
    student, teacher, positions = torch.randn(SAMPLES, 5), torch.randn(SAMPLES, 6), torch.arange(SAMPLES)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = losses.crd(*contrast(student, teacher, positions)).mean()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.7 * values[0]
    for bank in (contrast.student_bank, contrast.teacher_bank):
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(SAMPLES))


@pytest.mark.parametrize(
    ("samples", "negatives", "message"),
    [
        (1, None, "needs 2 training images, not 1"),
        (0, None, "needs 2 training images, not 0"),
        (11, 11, "1 to 10 negatives, not 11"),
        (11, 0, "1 to 10 negatives, not 0"),
    ],
)
def test_contrast_needs_other_images(samples: int, negatives: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Contrast(EMBEDDINGS._replace(samples=samples), negatives=negatives)
