"""Images without a label: where they are found, who sees them, and what they teach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch.nn import functional

from imagefiles import make_folder, png, put
from small_runs import tiny
from understudy import cli
from understudy.config import DataConfig
from understudy.data import unlabelled
from understudy.data.batches import Epochs, Split
from understudy.data.sources import open_source
from understudy.data.store import Store, open_store
from understudy.data.views import POLICIES
from understudy.distillation import Distiller, methods
from understudy.distillation.terms import Term
from understudy.distillation.unlabelled import for_unlabelled, with_pseudo_labels
from understudy.errors import ConfigError, DataError
from understudy.losses import cross_entropy

PETS = {"cat": 30, "dog": 40}


def opened(folder: Path, cache: Path, **options: object) -> Store:
    return open_store(DataConfig(source=str(folder), **options), cache=cache)


def names(store: Store, split: str) -> set[str]:
    return {store.names[row] for row in store.splits[split]}


# ------------------------------------------------------------------------------------------------ found in a folder


@pytest.mark.parametrize("word", ["unlabelled", "unlabeled", "Unlabelled"])
def test_folder_beside_class_folders_at_any_depth(tmp_path, word):
    source = open_source(DataConfig(source=str(make_folder(tmp_path, {**PETS, word: 2, f"{word}/2019/may": 3}))))
    assert source.classes == ("cat", "dog")
    free = [name for name, label in zip(source.names, source.labels, strict=True) if label == -1]
    assert len(free) == 5
    assert all(name.startswith(f"{word}/") for name in free)
    assert source.notes == []


def test_folder_beside_split_folders(tmp_path):
    counts = {"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2, "unlabelled/a": 4, "unlabeled": 1}
    source = open_source(DataConfig(source=str(make_folder(tmp_path, counts))))
    assert source.classes == ("cat", "dog")
    assert (int((source.given == 0).sum()), int((source.given == 2).sum())) == (6, 4)
    assert int((source.labels == -1).sum()) == 5
    assert source.notes == []


def test_empty_folder_is_told_of_and_one_alone_is_refused(tmp_path):
    make_folder(tmp_path / "empty", {"cat": 2, "dog": 2})
    (tmp_path / "empty" / "unlabelled").mkdir()
    assert open_source(DataConfig(source=str(tmp_path / "empty"))).notes == [
        "Folders without images were left out: 'unlabelled'."
    ]
    with pytest.raises(DataError, match="no class folders"):
        open_source(DataConfig(source=str(make_folder(tmp_path / "alone", {"unlabelled": 3}))))


def test_dropped_ones_are_as_if_they_were_not_there(tmp_path):
    plain = opened(make_folder(tmp_path / "data", PETS), tmp_path / "cache")
    make_folder(tmp_path / "data", {"unlabelled": 5}, side=40, channels=3, seed=500)
    dropped = opened(tmp_path / "data", tmp_path / "cache", drop_unlabelled=True)
    assert dropped.fingerprint == plain.fingerprint
    assert (dropped.names, dropped.reused, dropped.unlabelled) == (plain.names, True, 0)
    assert dropped.notes == ["Images without a label were left out: 5.", *plain.notes]


# ------------------------------------------------------------------------------------------------ in the store


def test_they_stand_apart_and_change_nothing_for_the_others(tmp_path):
    plain = opened(make_folder(tmp_path / "data", PETS), tmp_path / "cache")
    make_folder(tmp_path / "data", {"unlabelled": 5}, side=40, channels=3, seed=500)  # larger, and in colour
    found = opened(tmp_path / "data", tmp_path / "cache")
    assert found.unlabelled == 5
    assert (found.labels[found.splits["unlabelled"]] == -1).all()
    assert all(name.startswith("unlabelled/") for name in names(found, "unlabelled"))
    for split in ("train", "val", "test"):
        assert names(found, split) == names(plain, split)
        assert (found.labels[found.splits[split]] >= 0).all()
    assert found.counts() == plain.counts()
    assert (found.frame, found.channels, found.image_size) == (plain.frame, plain.channels, plain.image_size)
    assert found.fingerprint != plain.fingerprint
    assert found.notes[-1] == "Training images without a label, seen by models only that are taught: 5."


def test_copies_of_labelled_images_are_left_out(tmp_path):
    make_folder(tmp_path / "data", PETS)
    plain = opened(tmp_path / "data", tmp_path / "cache")
    for number, split in enumerate(("train", "val", "test")):
        copied = min(names(plain, split))
        put(tmp_path / "data" / "unlabelled" / f"copy{number}.png", (tmp_path / "data" / copied).read_bytes())
    put(tmp_path / "data" / "unlabelled" / "new.png", png(999))
    found = opened(tmp_path / "data", tmp_path / "cache")
    assert names(found, "unlabelled") == {"unlabelled/new.png"}
    assert found.duplicates == []
    assert "Images without a label that are identical to labelled ones were left out: 3." in found.notes
    assert not any("copies" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------ share of labels


def test_share_of_labels_is_drawn_by_class_and_nested(tmp_path):
    folder = make_folder(tmp_path / "data", PETS)
    whole = opened(folder, tmp_path / "cache")
    kept = {}
    for share in (0.01, 0.1, 0.5):
        found = opened(folder, tmp_path / "cache", label_share=share)
        kept[share] = names(found, "train")
        assert kept[share] | names(found, "unlabelled") == names(whole, "train")
        assert not kept[share] & names(found, "unlabelled")
        assert (names(found, "val"), names(found, "test")) == (names(whole, "val"), names(whole, "test"))
        for name, count in whole.counts()["train"].items():
            assert found.counts()["train"][name] == max(1, round(share * count))
        assert (found.labels[found.splits["unlabelled"]] == -1).all()
        assert found.reused  # the same frames
    assert kept[0.01] < kept[0.1] < kept[0.5]
    again, other = (opened(folder, tmp_path / "cache", label_share=0.5, **how) for how in ({}, {"split_seed": 1}))
    assert names(again, "train") == kept[0.5] != names(other, "train") & kept[0.5]


def test_images_beyond_a_share_are_left_out_and_those_with_a_label_are_nested(tmp_path):
    folder = make_folder(tmp_path / "data", PETS)
    whole, fewer = opened(folder, tmp_path / "cache"), opened(folder, tmp_path / "cache", train_share=0.25)
    assert names(fewer, "train") < names(whole, "train")
    for name, count in whole.counts()["train"].items():
        assert fewer.counts()["train"][name] == round(0.25 * count)
    assert (names(fewer, "val"), names(fewer, "test")) == (names(whole, "val"), names(whole, "test"))
    left = len(whole.splits["train"]) - len(fewer.splits["train"])
    assert f"Left out of the training images: {left} (data.train_share is 0.25)." in fewer.notes
    half = opened(folder, tmp_path / "cache", train_share=0.5, label_share=0.5)
    assert names(half, "train") == names(fewer, "train")
    kept = names(opened(folder, tmp_path / "cache", train_share=0.5), "train")
    assert names(half, "train") | names(half, "unlabelled") == kept < names(whole, "train")


def test_withheld_images_can_be_left_out(tmp_path):
    folder = make_folder(tmp_path / "data", PETS)
    part = opened(folder, tmp_path / "cache", label_share=0.1)
    dropped = opened(folder, tmp_path / "cache", label_share=0.1, drop_unlabelled=True)
    assert dropped.unlabelled == 0
    assert "unlabelled" not in dropped.splits
    assert names(dropped, "train") == names(part, "train")
    assert part.notes[-2] == (
        f"Of {len(part.splits['train']) + part.unlabelled} training images {len(part.splits['train'])} keep their "
        "label, the others' are withheld: data.label_share is 0.1, drawn by class with split seed 0."
    )


def test_withheld_copy_of_a_test_image_is_left_out():
    labels = np.array([0] * 5 + [1] * 5 + [0, 1], np.int64)
    given = np.array([0] * 10 + [2, 2], np.int8)
    ids = np.array([*range(10), 1, 20], np.uint64)  # row 1 is row 10, a test image
    how = DataConfig(source="x", label_share=0.01, val_fraction=0.2)
    for seed in range(20):
        config = how.model_copy(update={"split_seed": seed})
        parts, seen, _ = unlabelled.divide(labels, given, ids, classes=("a", "b"), config=config)
        assert 1 not in parts["unlabelled"]
        assert not set(ids[parts["unlabelled"]]) & set(ids[np.concatenate([parts["val"], parts["test"]])])
        assert (seen[parts["train"]] == labels[parts["train"]]).all()
        assert (seen[parts["unlabelled"]] == -1).all()


def test_options_of_the_command_line(monkeypatch):
    told = []
    monkeypatch.setattr(cli, "_run", lambda config, *rest: told.append(config.data))
    for words in (["--label-share", "0.1"], ["--no-unlabelled"]):
        typer.main.get_command(cli.app).main(["distill", "digits", *words], standalone_mode=False)
    assert [(data.label_share, data.drop_unlabelled) for data in told] == [(0.1, False), (1, True)]


def test_label_share_is_checked():
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match="label_share"):
            tiny("digits", data={"label_share": share})


# ------------------------------------------------------------------------------------------------ losses and terms


def test_cross_entropy_passes_over_them():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, -1, 3, -1, 2, 1])
    for smoothing in (0.0, 0.1):
        found = cross_entropy(logits, labels, label_smoothing=smoothing)
        known = labels >= 0
        assert (found[~known] == 0).all()
        alone = functional.cross_entropy(logits[known], labels[known], reduction="none", label_smoothing=smoothing)
        assert torch.equal(found[known], alone)


def _terms(**settings: float) -> tuple[Term, ...]:
    return for_unlabelled(methods.terms("kd", ce_weight=0.5, kd_weight=0.5), **settings)


def _losses(terms: tuple[Term, ...], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    torch.manual_seed(0)
    student = torch.nn.Linear(3, 4)
    images, answers = torch.randn(len(labels), 3), 4 * torch.randn(len(labels), 4)
    found = Distiller(None, student, terms=terms)(images, labels, teacher_logits=answers)
    found.total.backward()
    return student(images).detach(), answers, {name: float(part) for name, part in found.parts.items()}


def test_mean_of_the_label_term_is_over_labelled_images():
    labels = torch.tensor([0, -1, 3, -1, -1, 1])
    logits, answers, parts = _losses(_terms(), labels)
    known = labels >= 0
    assert parts["ce"] == pytest.approx(float(functional.cross_entropy(logits[known], labels[known])), rel=1e-6)
    softened = [functional.log_softmax(one / 4, 1) for one in (logits, answers)]
    kl = functional.kl_div(*softened, reduction="batchmean", log_target=True)
    assert parts["kd"] == pytest.approx(16 * float(kl), rel=1e-5)  # over all of them


def test_batch_without_any_label_is_learned_from():
    _, _, parts = _losses(_terms(), torch.full((5,), -1))
    assert parts["ce"] == 0
    assert parts["kd"] > 0


def test_sure_answers_of_the_teacher_become_labels():
    labels = torch.tensor([0, -1, 3, -1, -1, 1, -1, -1])
    logits, answers, parts = _losses(_terms(pseudo_labels=0.9), labels)
    sure = torch.softmax(answers, 1).amax(1) >= 0.9
    took = sure & (labels < 0)
    assert 0 < int(took.sum()) < int((labels < 0).sum())  # or this test could not fail
    given = torch.where(took, answers.argmax(1), labels)
    known = given >= 0
    assert parts["ce"] == pytest.approx(float(functional.cross_entropy(logits[known], given[known])), rel=1e-6)
    assert torch.equal(with_pseudo_labels(answers, labels, threshold=0.9), given)


@pytest.mark.slow
def test_terms_compile():
    labels = torch.tensor([0, -1, 3, -1, -1, 1, -1, -1])
    torch.manual_seed(0)
    images, answers, student = torch.randn(8, 3), 4 * torch.randn(8, 4), torch.nn.Linear(3, 4)
    distiller = Distiller(None, student, terms=_terms(pseudo_labels=0.9))
    plain = distiller(images, labels, teacher_logits=answers)
    compiled = torch.compile(distiller, dynamic=False, fullgraph=True)(images, labels, teacher_logits=answers)
    torch.testing.assert_close(compiled.total, plain.total)
    torch.testing.assert_close(compiled.parts, plain.parts)


@pytest.mark.parametrize("method", ["dkd", "nkd", "wsld", "kd+dkd"])
def test_methods_that_take_the_class_of_each_image_are_refused(method):
    with pytest.raises(ConfigError, match=r"takes the class of each image.*--no-unlabelled"):
        for_unlabelled(methods.terms(method, ce_weight=0.5, kd_weight=0.5))


# ------------------------------------------------------------------------------------------------ several passes


def _split(images: int = 10) -> Split:
    frames = torch.zeros(images, 1, 4, 4, dtype=torch.uint8)
    labels, ids = np.arange(images) % 2, np.arange(images, dtype=np.uint64)
    return Split(frames, labels, ids, np.arange(images), size=4, device=torch.device("cpu"))


def _epochs(**settings: int) -> Epochs:
    return Epochs(_split(), policy=POLICIES["none"], view_seed=0, batch_size=4, **settings)


def _positions(epochs: Epochs, epoch: int, **settings: int) -> list[list[int]]:
    return [batch.positions.tolist() for batch in epochs.epoch(3, epoch, **settings)]


def test_longer_epochs_are_passes_one_after_the_other():
    plain, longer = _epochs(), _epochs(steps=7)
    assert (plain.steps, longer.steps) == (3, 7)
    passes = [batch for epoch in range(5) for batch in _positions(plain, epoch)]
    assert [batch for epoch in range(2) for batch in _positions(longer, epoch)] == passes[:14]
    assert _positions(longer, 1, start=4) == passes[11:14]
    assert [_positions(_epochs(steps=3), epoch) for epoch in range(3)] == [_positions(plain, one) for one in range(3)]


def test_every_pass_has_its_view(monkeypatch):
    seen: list[int] = []
    epochs = _epochs(steps=7, views=4)
    drawn = epochs.split.draw

    def draw(*given: object, view: int, **settings: object) -> object:
        seen.append(view)
        return drawn(*given, view=view, **settings)

    monkeypatch.setattr(epochs.split, "draw", draw)
    for epoch in range(2):
        list(epochs.epoch(0, epoch))
    assert seen == [0, 1, 2, 2, 3, 0]
