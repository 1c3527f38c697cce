"""Teacher outputs, kept: each answer is computed once, read ever after, and never a stale or a torn one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kept_outputs import (
    ALL,
    BLOCK,
    COUNT,
    LIGHT,
    SIDE,
    Teacher,
    cache,
    close,
    opened,
    reader,
    shuffled,
    small_blocks,
    split,
)
from understudy.data import outputs
from understudy.data.batches import Epochs
from understudy.data.mixing import Mix
from understudy.data.outputs import Answers, Source, Viewed, find_outputs, open_outputs
from understudy.data.views import POLICIES
from understudy.errors import Interrupted, ModelError

__all__ = ["cache", "small_blocks"]  # fixtures

# --- written once, read ever after ---


def test_each_image_of_each_view_is_answered_once(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    before = sum(teacher.asked)  # the first images, by which the form is chosen
    assert before <= BLOCK
    for _ in range(3):
        for view in (0, 1, 4):
            close(kept.view(view).rows(shuffled()).logits, teacher.directly(viewed, view)[shuffled()])
    assert sum(teacher.asked) - before == 3 * COUNT == kept.work.images
    assert teacher.loaded == 1
    assert kept.missing(0) == kept.missing(4) == 0
    assert kept.missing(2) == COUNT


def test_another_process_reads_without_the_teacher(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    opened(teacher, cache, viewed).prepare(range(3))
    again = reader(cache)
    again.prepare(range(3))
    for view in range(3):
        close(again.view(view).rows(ALL).logits, teacher.directly(viewed, view))
    assert again.work.images == 0


def test_the_teacher_is_let_go_when_all_is_prepared(cache: Path) -> None:
    kept = opened(Teacher(), cache)
    kept.prepare(range(2))
    assert kept._answer is None


def test_more_views_later_are_added_to_those_that_are_there(cache: Path) -> None:
    opened(Teacher(), cache).prepare(range(2))
    teacher = Teacher()
    more = opened(teacher, cache)
    assert teacher.loaded == 0
    more.prepare(range(4))
    assert (teacher.loaded, more.work.images) == (1, 2 * COUNT)


def test_the_order_in_which_views_are_filled_changes_nothing(cache: Path, tmp_path: Path) -> None:
    forward, backward = opened(Teacher(), cache), opened(Teacher(), tmp_path / "other")
    forward.prepare([0, 1, 2])
    backward.prepare([2, 0, 1])
    for view in range(3):
        assert forward.kept.view(view).path.read_bytes() == backward.kept.view(view).path.read_bytes()


def test_batches_bring_the_answers_for_their_images(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    epochs = Epochs(viewed.split, policy=LIGHT, view_seed=0, batch_size=7, views=2, outputs=kept.view)
    for epoch in range(4):
        expected = teacher.directly(viewed, epoch % 2)
        for batch in epochs.epoch(3, epoch, shard=(1, 2)):
            assert batch.teacher_logits is not None
            close(batch.teacher_logits, expected[batch.positions])
            close(batch.images.flatten(1) @ teacher.weight, batch.teacher_logits)


def test_the_embedding_is_kept_and_returned(cache: Path) -> None:
    teacher, viewed = Teacher(embedding=True), Viewed(split(), LIGHT, 0)
    drawn, _ = viewed.split.draw(LIGHT, seed=0, view=1)
    expected = viewed.split.batch(ALL, drawn).images.mean((1, 3))
    for kept in (opened(teacher, cache, viewed), reader(cache, embedding=True)):
        found = kept.view(1).rows(shuffled())
        close(found.logits, teacher.directly(viewed, 1)[shuffled()])
        assert found.embedding is not None
        close(found.embedding, expected[shuffled()])
    assert reader(cache, embedding=True).packing.embedding == SIDE


def test_of_many_classes_the_largest_logits_are_kept(cache: Path) -> None:
    teacher, viewed = Teacher(1000, gain=20.0), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed, temperatures=(1.0,))
    assert kept.packing.top is not None
    assert kept.nbytes < COUNT * 1000
    exact = teacher.directly(viewed, 1)
    for table in (kept.view(1), reader(cache, temperatures=(1.0,)).view(1)):
        found = table.rows(shuffled()).logits
        p, q = exact[shuffled()].double().log_softmax(1), found.double().log_softmax(1)
        said = (p.exp() * (p + np.log(1000))).sum(1).mean()
        assert float((p.exp() * (p - q)).sum(1).mean() / said) < 0.02
        assert torch.equal(found.argmax(1), exact[shuffled()].argmax(1))


# --- never stale ---


VIEWED = {
    "policy": lambda: Viewed(split(), POLICIES["standard"], 0),
    "seed": lambda: Viewed(split(), LIGHT, 1),
    "a changed image": lambda: Viewed(split(changed=7), LIGHT, 0),
    "an image more": lambda: Viewed(split(COUNT + 1), LIGHT, 0),
    "an image less": lambda: Viewed(split(COUNT - 1), LIGHT, 0),
    "mixup": lambda: Viewed(split(), LIGHT, 0, Mix("mixup")),
    "cutmix": lambda: Viewed(split(), LIGHT, 0, Mix("cutmix")),
    "another alpha": lambda: Viewed(split(), LIGHT, 0, Mix("mixup", 0.3)),
    "geometry": lambda: Viewed(split(), LIGHT, 0, None, (9, 1, "squash")),
}


@pytest.mark.parametrize("what", VIEWED)
def test_other_views_are_other_outputs(what: str, cache: Path) -> None:
    opened(Teacher(), cache).prepare([0])
    viewed = VIEWED[what]()
    assert find_outputs(viewed, Teacher().source(), cache) is None
    teacher = Teacher()
    kept = opened(teacher, cache, viewed)
    close(kept.view(0).rows(torch.arange(len(viewed.split))).logits, teacher.directly(viewed, 0))
    assert kept.work.images == len(viewed.split)
    assert len(list((cache / "outputs").iterdir())) == 2


def test_another_teacher_is_other_outputs(cache: Path) -> None:
    opened(Teacher(), cache).prepare([0])
    other = Teacher(seed=1)
    kept = opened(other, cache, identity={"weights": "b"})
    close(kept.view(0).rows(ALL).logits, other.directly(kept.viewed, 0))
    close(reader(cache).view(0).rows(ALL).logits, Teacher().directly(kept.viewed, 0))


def test_the_order_of_settings_and_temperatures_changes_nothing(cache: Path) -> None:
    kept = opened(Teacher(), cache, identity={"a": 1, "b": 2}, temperatures=(4.0, 1.0))
    same = reader(cache, identity={"b": 2, "a": 1}, temperatures=(1.0, 4.0))
    assert same.kept == kept.kept


# --- torn, cut off, deleted ---


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(data)


@pytest.mark.parametrize("damage", ["torn block", "last block gone", "zeros", "blocks exchanged"])
def test_what_is_damaged_is_computed_again_and_nothing_else(damage: str, cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    opened(teacher, cache, viewed).prepare(range(2))
    file = reader(cache).kept.view(1)
    whole, stride = file.path.read_bytes(), 4 + BLOCK * 6
    if damage == "torn block":
        overwrite(file.path, stride + 30, b"torn")
    elif damage == "last block gone":
        os.truncate(file.path, 2 * stride + 5)
    elif damage == "zeros":
        overwrite(file.path, 0, bytes(stride))
    else:
        overwrite(file.path, 0, whole[stride : 2 * stride] + whole[:stride])
    again = Teacher()
    kept = opened(again, cache)
    close(kept.view(1).rows(ALL).logits, teacher.directly(viewed, 1))
    lost = {"torn block": 16, "last block gone": 8, "zeros": 16, "blocks exchanged": 32}[damage]
    assert (sum(again.asked), kept.work.images) == (lost, lost)
    assert file.path.read_bytes() == whole


@pytest.mark.parametrize(
    "card", ["", "[]", "nonsense", '{"format": "understudy-outputs/1"}', "classes", "top", "rows", "block", "check"]
)
def test_a_damaged_card_only_costs_another_look_at_the_teacher(card: str, cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    kept.prepare([0])
    path = kept.kept.path / "card.json"
    said = json.loads(path.read_text())
    if card in said:
        said[card] = said[card] + 1 if isinstance(said[card], int) else "0"
    elif card in said["packing"]:
        said["packing"][card] = 2
    path.write_text(json.dumps(said) if card in ("rows", "block", "check", "classes", "top") else card)
    assert find_outputs(viewed, teacher.source(), cache) is None
    again = Teacher()
    mended = opened(again, cache)
    close(mended.view(0).rows(ALL).logits, teacher.directly(viewed, 0))
    assert mended.work.images == 0  # the rows are sound
    assert reader(cache).missing(0) == 0


def test_the_cache_is_deleted_while_it_is_used(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    table = kept.view(0)
    shutil.rmtree(cache)
    for view, found in ((0, table), (0, kept.view(0)), (1, kept.view(1))):
        close(found.rows(ALL).logits, teacher.directly(viewed, view))
    assert kept.missing(0) == kept.missing(1) == 0


def test_an_interrupted_filling_goes_on(cache: Path) -> None:
    teacher, viewed = Teacher(), Viewed(split(), LIGHT, 0)
    kept = opened(teacher, cache, viewed)
    asked = iter([False, False, True])
    kept.stop = lambda: next(asked)
    with pytest.raises(Interrupted):
        kept.prepare(range(2))
    done = kept.work.images
    assert 0 < done < COUNT
    again = opened(Teacher(), cache)
    assert again.missing(0) == COUNT - done
    again.prepare(range(2))
    assert again.work.images == 2 * COUNT - done
    close(again.view(0).rows(ALL).logits, teacher.directly(viewed, 0))


@pytest.mark.parametrize("what", ["logits", "embedding"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_refused_and_not_kept(what: str, value: float, cache: Path) -> None:
    teacher = Teacher(embedding=True)

    def broken() -> Callable[[torch.Tensor], Answers]:
        def answer(images: torch.Tensor) -> Answers:
            answers = teacher.answer(images)
            part = getattr(answers, what)
            part[0, 0] = value
            return answers

        return answer

    source = Source({"weights": "a"}, {}, broken, embedding=True)
    with pytest.raises(ModelError, match="The teacher's answers are not numbers"):
        open_outputs(Viewed(split(), LIGHT, 0), source, cache)
    sound = opened(teacher, cache)
    sound.load = broken
    sound._answer = None
    with pytest.raises(ModelError, match="The teacher's answers are not numbers"):
        sound.view(0)
    assert sound.missing(0) == COUNT


# --- what is told ---


def test_progress_counts_all_blocks_of_all_views(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    kept = opened(Teacher(), cache)
    kept.progress = lambda task, /, *, done, total, note="": seen.append((done, total))
    kept.prepare(range(3))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {9}
    assert seen[-1] == (9, 9)


def test_asked_again_the_teacher_says_the_same(cache: Path) -> None:
    kept = opened(Teacher(), cache)
    assert kept.again(0, 0) is None
    kept.prepare([0])
    assert [kept.again(0, block).tolist() for block in range(3)] == [[0] * 16, [0] * 16, [0] * 8]
    other = opened(Teacher(seed=1), cache)
    assert (other.again(0, 2) > 0.01).any()


def test_blocks_are_as_large_as_a_batch_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [outputs.block_rows(size) for size in (10, 32, 64, 96, 128, 224, 600)] == [64, 64, 64, 64, 64, 16, 16]
