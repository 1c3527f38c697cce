"""Models saved and loaded: bit for bit, and every way that files can be damaged or torn."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from understudy import record, storage
from understudy.errors import ModelError, RunError
from understudy.models.build import build
from understudy.models.classifier import Classifier
from understudy.models.files import card_path, load, read_card, save, weights_fingerprint
from understudy.record import InputSpec, Record, Trained

SPEC = InputSpec(channels=3, sizes=(40, 32), fit="squash", mean=(0.5, 0.4, 0.3), std=(0.25,) * 3)
CLASSES = ["cat", "dog", "é"]


def moved(model: Classifier) -> Classifier:
    """A model whose batch statistics are no longer the initial ones, in evaluation mode."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32))
    return model.eval()


@pytest.fixture
def model() -> Classifier:
    return moved(build("cnn3", classes=CLASSES, spec=SPEC, seed=1))


@pytest.fixture
def file(model, tmp_path):
    save(model, tmp_path / "student.safetensors", role="student", seed=1)
    return tmp_path / "student.safetensors"


def edit_card(file, **changes):
    card = json.loads(card_path(file).read_text())
    card_path(file).write_text(json.dumps(card | changes))


# --- there and back ---


def test_a_saved_model_answers_the_same_bit_for_bit(model, tmp_path):
    path = tmp_path / "new" / "student.safetensors"
    card = save(model, path, role="student", seed=1, metrics={"val_accuracy": 0.9}, provenance={"data": "abc"})
    before = torch.get_rng_state()
    loaded, read = load(path)
    assert torch.equal(torch.get_rng_state(), before)
    views = torch.rand(4, 3, 48, 48)
    assert torch.equal(loaded(views), model(views))
    assert not any(module.training for module in loaded.modules())
    assert read == card
    assert (read.role, read.seed, read.metrics, read.provenance) == (
        "student",
        1,
        {"val_accuracy": 0.9},
        {"data": "abc"},
    )
    assert (loaded.spec, loaded.classes, loaded.architecture) == (SPEC, tuple(CLASSES), "cnn3")
    assert weights_fingerprint(loaded.net) == weights_fingerprint(model.net)
    assert sorted(one.name for one in path.parent.iterdir()) == ["student.json", "student.safetensors"]


def test_the_file_holds_the_network_alone_and_the_card_its_hash(model, file):
    assert load_file(file).keys() == model.net.state_dict().keys()
    assert read_card(file).weights == storage.hash_file(file)


def test_saving_twice_writes_the_same_bytes(model, file):
    first = file.read_bytes()
    save(model, file)
    assert file.read_bytes() == first


def test_channels_last_and_half_precision_survive(tmp_path):
    model = moved(build("cnn3", classes=CLASSES, spec=SPEC, seed=1))
    expected = weights_fingerprint(model.net)
    model.net.to(memory_format=torch.channels_last)
    assert weights_fingerprint(model.net) == expected
    save(model, tmp_path / "a.safetensors")
    assert weights_fingerprint(load(tmp_path / "a.safetensors")[0].net) == expected
    model.net.to(torch.bfloat16)
    save(model, tmp_path / "b.safetensors")
    loaded = load(tmp_path / "b.safetensors")[0].net
    assert torch.equal(loaded.head.weight, model.net.head.weight.float())


def test_numbers_that_are_not_finite_stay_out_of_the_card(model, tmp_path):
    save(model, tmp_path / "a.safetensors", metrics={"val_nll": float("nan"), "val_accuracy": 0.5})
    assert read_card(tmp_path / "a.safetensors").metrics == {"val_accuracy": 0.5}


def test_weights_have_one_ending(model, tmp_path):
    with pytest.raises(ModelError, match=r"saved as \.safetensors"):
        save(model, tmp_path / "a.json")


def test_a_function_with_tied_weights_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_tied.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 3), nn.Linear(3, num_classes))\n"
        "    net[3].weight = net[2].weight\n"
        "    return net\n"
    )
    spec = InputSpec(channels=1, sizes=(8,), mean=(0.5,), std=(0.25,))
    model = build("mine_tied:make", classes=CLASSES, spec=spec, seed=0).eval()
    save(model, tmp_path / "a.safetensors")
    loaded, card = load("a.safetensors")
    del sys.modules["mine_tied"]
    assert (card.architecture, card.network_channels, card.input.channels) == ("mine_tied:make", 3, 1)
    assert loaded.net[3].weight is loaded.net[2].weight
    views = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(views), model(views))


def test_a_network_that_keeps_more_than_tensors_is_refused(model, tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

    model.net.head = Noted(288, 3)
    with pytest.raises(ModelError, match=r"keeps 'head._extra_state', a dict; only tensors"):
        save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_tell_names_types_shapes_and_values_apart():
    def layer(**values):
        module = nn.Module()
        for name, value in values.items():
            module.register_buffer(name, value)
        return weights_fingerprint(module)

    zeros = torch.zeros(2, 3)
    different = [
        layer(a=zeros),
        layer(b=zeros),
        layer(a=zeros.T),
        layer(a=zeros.int()),
        layer(a=-zeros),
        layer(a=zeros, b=torch.tensor(1)),
        layer(a=zeros, b=torch.tensor(2)),
        layer(),
    ]
    assert len(set(different)) == len(different)
    assert layer(a=zeros, b=torch.ones(())) == layer(b=torch.ones(()), a=zeros)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "timm:mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_networks_of_the_libraries_come_back(tmp_path, name):
    pytest.importorskip("timm")
    spec = InputSpec(channels=1, sizes=(64,), mean=(0.5,), std=(0.25,))
    model = build(name, classes=CLASSES, spec=spec, seed=0).eval()
    save(model, tmp_path / "a.safetensors")
    loaded, _ = load(tmp_path / "a.safetensors")
    views = torch.rand(2, 1, 64, 64)
    assert torch.equal(loaded(views), model(views))


# --- damaged files ---


def test_missing_parts_are_named(file, tmp_path):
    with pytest.raises(ModelError, match=r"There is no weights file .*gone\.safetensors"):
        load(tmp_path / "gone.safetensors")
    card_path(file).unlink()
    with pytest.raises(ModelError, match=r"student.safetensors has no card: student.json, .* is missing"):
        load(file)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_damaged(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="is damaged, cut short or not a safetensors file"):
        load(file)


def test_one_changed_bit_is_noticed(file):
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"is not the file that student.json describes"):
        load(file)


def test_weights_of_a_later_save_do_not_pass_for_those_of_the_card(file, tmp_path):
    other = build("cnn3", classes=CLASSES, spec=SPEC, seed=2)
    save(other, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(file)
    with pytest.raises(ModelError, match=r"is not the file that student.json describes"):
        load(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "student.json is damaged or of another version"),
        ("{}", r"student.json is damaged or of another version \(at 'architecture'"),
        ("\xff", "student.json is damaged"),
    ],
)
def test_a_damaged_card_is_named(file, content, words):
    card_path(file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=words):
        load(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"classes": ["cat", "dog"]},
            r"'head.weight' is \[3, 288\] in the file and \[2, 288\] in the network",
        ),
        ({"architecture": "mnist_small"}, "does not fit its network 'mnist_small': .* and 20 more"),
        ({"architecture": "no_such:thing"}, "There is no module 'no_such'"),
        ({"network_channels": 1}, r"'block1.0.weight' is \[32, 3, 3, 3\] in the file and \[32, 1"),
        ({"input": {**SPEC.model_dump(), "std": [0.25, 0.25]}}, "'cnn3' is not described well: mean and std"),
        ({"format": "understudy-model/9"}, "damaged or of another version .at 'format'"),
        ({"surprise": 1}, "damaged or of another version .at 'surprise'"),
    ],
)
def test_a_card_that_was_changed_is_refused(file, changes, words):
    edit_card(file, **changes)
    with pytest.raises(ModelError, match=words):
        load(file)


def test_other_tensors_under_the_same_hash_are_refused(file):
    tensors = load_file(file)
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, file)
    edit_card(file, weights="")
    with pytest.raises(ModelError, match="does not fit its network 'cnn3': 'extra' is in the file only"):
        load(file)


def test_a_card_without_a_hash_is_enough(file, model):
    edit_card(file, weights="")
    assert weights_fingerprint(load(file)[0].net) == weights_fingerprint(model.net)


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.pth", "teacher.safetensors"])
def test_a_pickle_is_refused_unread(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    torch.save({"a": Bomb()}, tmp_path / name)
    with pytest.raises(ModelError, match=r"is a pickle, not safetensors.*--teacher-weights .* --unsafe-pickle"):
        load(tmp_path / name)


def test_an_exported_file_is_no_weights_file(tmp_path):
    (tmp_path / "student.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(ModelError, match=r"student\.onnx is no weights file .* name its folder"):
        load(tmp_path / "student.onnx")


def test_a_header_that_looks_like_a_pickle_is_none(tmp_path):
    # a safetensors file starts with the length of its header; 640 is 80 02, as pickles of protocol 2 start
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(640)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    with pytest.raises(ModelError, match="has no card"):
        load(path)


# --- run folders ---


@pytest.fixture
def run(tmp_path):
    """A run with a teacher, and a baseline and a student for seeds 0 and 1; the student of seed 1 is chosen."""
    models = {}
    for name in ("teacher", "baseline-0", "baseline-1", "student-0", "student-1"):
        role, _, seed = name.partition("-")
        model = build("cnn3", classes=CLASSES, spec=SPEC, seed=len(models))
        path = tmp_path / name / "weights.safetensors"
        card = save(model, path, role=role, seed=int(seed) if seed else None)
        models[name] = Trained(
            role=role,
            seed=card.seed,
            architecture="cnn3",
            weights=f"{name}/weights.safetensors",
            weights_hash=card.weights,
        )
    models["teacher"].weights = str(tmp_path / "teacher" / "weights.safetensors")
    one = Record(name="one", created=record.now(), config={}, models=models, chosen="student-1")
    record.save(one, tmp_path)
    return one


def test_a_run_gives_its_student_or_whom_one_prefers(run, tmp_path):
    found = {prefer: load(tmp_path, prefer=prefer)[1] for prefer in (None, "student", "baseline", "teacher")}
    assert {prefer: (card.role, card.seed) for prefer, card in found.items()} == {
        None: ("student", 1),
        "student": ("student", 1),
        "baseline": ("baseline", 1),
        "teacher": ("teacher", None),
    }


def test_a_run_that_only_trained_gives_its_teacher(run, tmp_path):
    record.save(run.model_copy(update={"kind": "train", "chosen": None}), tmp_path)
    assert load(str(tmp_path))[1].role == "teacher"


def test_a_run_without_a_student_yet_says_how_to_go_on(run, tmp_path):
    record.save(run.model_copy(update={"chosen": None}), tmp_path)
    for prefer in (None, "baseline"):
        with pytest.raises(ModelError, match=f"has no {prefer or 'student'} yet.*understudy resume"):
            load(tmp_path, prefer=prefer)
    assert load(tmp_path, prefer="teacher")[1].role == "teacher"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        load(tmp_path)
