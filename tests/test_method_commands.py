"""`understudy methods` and `understudy layers`: what they print can be read, parsed, and used as it is."""

from __future__ import annotations

import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from understudy import api, cli, config, losses, methodtexts
from understudy.config import RunConfig
from understudy.distillation import METHODS, Schedule, layers
from understudy.distillation.methods import FAMILIES, Part
from understudy.distillation.terms import in_words
from understudy.errors import UnderstudyError
from understudy.models import build, files
from understudy.pipeline import objective
from understudy.record import InputSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
Say = Callable[..., str]

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line in this process: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def say(end: Callable[..., tuple[int, str, str]]) -> Say:
    """Return a function that runs a command line that has to succeed, and returns what it printed."""

    def run(*arguments: object) -> str:
        code, out, err = end(*arguments)
        assert (code, err) == (0, "")
        return out

    return run


def words(text: str) -> str:
    """Undo the breaking of lines."""
    return " ".join(text.split())


def row(output: str, name: str) -> list[str]:
    """Return the cells of the first line of a table that begins with a name."""
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])


def layer_line(output: str) -> list[list[str]]:
    """Return the pairs of the line that can be copied into a term."""
    line = next(line for line in output.splitlines() if line.startswith("layers: "))
    pairs: list[list[str]] = yaml.safe_load(line)["layers"]
    return pairs


# --- methods ---


@pytest.mark.parametrize("command", ["methods", "layers"])
def test_help(command: str, say: Say) -> None:
    assert f"Usage: understudy {command}" in say(command, "--help")
    assert f"  {command} " in say("--help")


def test_the_list_names_every_method_in_its_family(say: Say) -> None:
    out = say("methods")
    lines = out.splitlines()
    where = [lines.index(next(line for line in lines if line.rstrip() == one.capitalize())) for one in FAMILIES]
    for (_, methods), begin, end in zip(FAMILIES.items(), where, [*where[1:], len(lines)], strict=True):
        listed = [line.split()[0] for line in lines[begin + 1 : end] if line and not line.startswith(" ")]
        assert [one for one in listed if one in METHODS] == [method.name for method in methods]


def test_the_list_says_what_each_row_says(say: Say) -> None:
    out = words(say("methods"))
    for method in METHODS.values():
        assert f"{method.name} {method.summary}" in out
        assert methodtexts.in_short(method) in out


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_screen(columns: int, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in ([], ["dkd"], ["attention"], ["rkd"]):
        lines = say("methods", *arguments).splitlines()
        assert columns - 20 < max(map(len, lines)) <= columns
        assert lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("kd", "logits kept"),
        ("crd", "embeddings kept"),
        ("srrl", "logits and embeddings kept"),
        ("hint", "runs along"),
        ("sp", "runs along"),
        ("teacher_free", "none"),
    ],
)
def test_what_becomes_of_the_teacher(name: str, told: str) -> None:
    assert methodtexts.teacher(METHODS[name]) == told


@every_method
def test_an_explanation_is_whole(name: str, say: Say) -> None:
    method = METHODS[name]
    out = say("methods", name)
    told = words(out)
    for text in (method.summary, method.equation, method.citation, method.helps, *method.needs):
        assert words(text) in told
    assert "It stands beside the cross-entropy with the labels: ce_weight x cross-entropy + kd_weight x" in told
    for part in method.parts:
        assert f"weight {in_words(part.weight)}" in told
    if method.temperature is not None:
        assert f"; temperature {method.temperature:g}" in told
    for option, value in method.options.items():
        assert f"{option} {value:g}" in told


@pytest.mark.parametrize(
    ("name", "heading", "told"),
    [
        ("kd", "Layers", "the logits"),
        ("crd", "Layers", "the embedding: what the final layer is given"),
        ("hint", "Layers", "the middle pair of stages; or those that you name"),
        ("sp", "Layers", "the last pair of stages; or those that you name"),
        ("ofd", "Layers", "all pairs of stages, before the activation; or those that you name"),
        ("logit_mse", "Needs", "nothing in particular"),
    ],
)
def test_facts(name: str, heading: str, told: str, say: Say) -> None:
    assert methodtexts.facts(METHODS[name])[heading] == told
    assert f"{heading} {told}" in words(say("methods", name))


def test_defaults() -> None:
    warm = Part(losses.dkd, weight=Schedule("warmup", 0.0, 3.0, until=1 / 12))
    one = replace(METHODS["dkd"], parts=(warm,), temperature=2.0, options={"alpha": 1.0, "beta": 0.25})
    told = "weight rising from 0 to 3 over the first 8.3 % of training; temperature 2; alpha 1; beta 0.25"
    assert methodtexts.facts(one)["Defaults"] == told
    parts = (Part(losses.kd, weight=25.0, suffix="-far"), Part(losses.kd, suffix="-near"))
    two = replace(METHODS["rkd"], parts=parts, temperature=None, options={})
    assert methodtexts.facts(two)["Defaults"] == "rkd-far weight 25; rkd-near weight 1"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0.5, "0.5"),
        (Schedule("constant", 2, 2), "2"),
        (Schedule("linear", 1000, 0, until=0.5), "falling from 1000 to 0 over the first 50 % of training"),
        (Schedule("cosine", 1, 8), "rising from 1 to 8 along a cosine over training"),
        (Schedule("step", 1, 0, until=0.25), "1 for the first 25 % of training, then 0"),
    ],
)
def test_numbers_that_change_are_told_in_words(number: float | Schedule, told: str) -> None:
    assert in_words(number) == told


def test_where_a_method_has_several_terms_its_equation_holds_their_weights() -> None:
    for method in METHODS.values():
        if len(method.parts) > 1:
            assert methodtexts.objective(method).endswith("kd_weight x L")
            assert all(f"{part.weight:g} " in method.equation for part in method.parts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs are not carried out; what was asked for comes here."""
    found: list[RunConfig] = []

    def run(given: RunConfig, *rest: object, **options: object) -> None:
        found.append(given)
        raise UnderstudyError("Enough.")

    monkeypatch.setattr(api, "run", run)
    return found


@pytest.mark.parametrize("name", ["kd", "dkd", "rkd", "attention"])
def test_the_command_lines_can_be_given(
    name: str, end: Callable[..., tuple[int, str, str]], asked: list[RunConfig], say: Say
) -> None:
    lines = [line.strip() for line in say("methods", name).splitlines() if "understudy distill" in line]
    assert len(lines) == 2
    for line in lines:
        assert end(*shlex.split(line)[1:]) == (1, "", "Error: Enough.\n")
    alone, joined = (objective.terms(one.distill) for one in asked)
    assert [term.weight for term in alone[1:]] == [part.weight for part in METHODS[name].parts]
    assert alone[0].weight == 1
    assert len(joined) > len(METHODS[name].parts) + (name == "kd")


@every_method
def test_the_settings_are_those_of_the_row(name: str, say: Say) -> None:
    out = say("methods", name)
    block = re.search(r"^    distill:\n(?:     .*\n)*", out, re.MULTILINE)
    assert block
    given = yaml.safe_load(textwrap.dedent(block[0]))
    asked = config.validate({"data": {"source": "photos"}, "distill": given["distill"] | {"kd_weight": 1.0}})
    own, taught = METHODS[name].terms(), objective.terms(asked.distill)[1:]
    for one, other in zip(own, taught, strict=True):
        assert (one.name, one.weight, one.temperature) == (other.name, other.weight, other.temperature)
        assert bool(other.layers) is one.takes_maps
    (term,) = given["distill"]["terms"]
    assert term.get("options", {}) == METHODS[name].options
    assert set(methodtexts.hints(METHODS[name])) <= set(term)


def test_several_are_explained_in_turn(say: Say) -> None:
    out = words(say("methods", "kd+attention"))
    assert METHODS["kd"].citation in out
    assert METHODS["attention"].citation in out
    assert METHODS["dkd"].citation not in out


def test_an_unknown_method_is_one_sentence(end: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = end("methods", "atention")
    assert (code, out) == (1, "")
    assert err == "Error: Unknown method 'atention'. Did you mean 'attention'?\n"


def test_json(say: Say) -> None:
    rows: list[dict[str, Any]] = json.loads(say("methods", "--json"))
    assert [one["name"] for one in rows] == list(METHODS)
    for one in rows:
        method = METHODS[one["name"]]
        assert method in FAMILIES[one["family"]]
        for key in ("summary", "equation", "citation", "helps", "needs", "temperature", "options"):
            assert one[key] == getattr(method, key)
        weights = [asdict(part.weight) if isinstance(part.weight, Schedule) else part.weight for part in method.parts]
        assert [term["weight"] for term in one["terms"]] == weights
    assert [one["name"] for one in json.loads(say("methods", "dkd", "--json"))] == ["dkd"]


def test_the_page_is_what_the_table_says(say: Say) -> None:
    made = say("methods", "--markdown")
    assert PAGE.read_text() == made, "run: understudy methods --markdown > docs/methods.md"
    for method in METHODS.values():
        section = made.split(f"\n### {method.name}\n")[1].split("\n#")[0]
        for text in (method.summary, f"\n    {method.equation}\n", method.helps, method.citation, *method.needs):
            assert text in section


def test_the_page_takes_no_name(end: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = end("methods", "kd", "--markdown")
    assert (code, out) == (1, "")
    assert "--markdown prints the page of all methods" in err


def test_the_settings_on_the_page_are_valid() -> None:
    block = PAGE.read_text().split("\n    distill:\n")[1].split("\n\n")[0]
    given = yaml.safe_load("    distill:\n" + block)
    asked = config.validate({"data": {"source": "photos"}, **given})
    assert [term.name for term in objective.terms(asked.distill)] == ["ce", "dkd", "attention"]


# --- layers ---


@pytest.mark.parametrize(
    ("arguments", "stages", "embedding"),
    [
        (
            ["cnn3", "--size", 32, "--channels", 1, "--classes", 2],
            ["block1.2 map 32 16", "block2.2 map 96 8", "block3 map 288 4"],
            "'head' is given, 288",
        ),
        (
            ["resnet18"],
            ["relu map 64 32", "layer1 map 64 16", "layer2 map 128 8", "layer3 map 256 4", "layer4 map 512 2"],
            "'fc' is given, 512",
        ),
        (
            ["mobilenet_v2"],
            ["features.1 map 16 32", "features.3 map 24 16", "features.6 map 32 8", "features.13 map 96 4"],
            "'classifier.1' is given, 1280",
        ),
        pytest.param(
            ["vit_tiny_patch16_224"],
            ["blocks.2 tokens 192 4", "blocks.5 tokens 192 4", "blocks.8 tokens 192 4", "blocks.11 tokens 192 4"],
            "'head' is given, 192",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stages_and_embedding(arguments: list[object], stages: list[str], embedding: str, say: Say) -> None:
    out = say("layers", *arguments)
    for stage in stages:
        name, *cells = stage.split()
        assert row(out, name) == [name, *cells]
    assert embedding in out
    assert "net." not in out


def test_a_size_that_does_not_fit(end: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = end("layers", "cnn3", "--size", 8)
    assert code == 1
    assert "'cnn3' needs images of at least 16 x 16 pixels" in err
    assert end("layers", "cnn3", "--channels", 2)[0] == 1


def test_an_unknown_model(end: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = end("layers", "./none.safetensors")
    assert (code, err.count("\n")) == (1, 1)
    assert "./none.safetensors does not exist" in err


def saved(path: Path) -> Path:
    spec = InputSpec(channels=1, sizes=(24,), mean=(0.5,), std=(0.5,))
    files.save(build.build("cnn3", classes=["cat", "dog", "owl"], spec=spec, seed=0), path)
    return path


def test_a_file_says_its_own_size(say: Say, tmp_path: Path) -> None:
    out = say("layers", saved(tmp_path / "student.safetensors"))
    assert "images of 1 x 24 x 24, 3 classes" in words(out)
    assert row(out, "block1.2") == ["block1.2", "map", "32", "12"]


def test_pairs_of_two_networks(say: Say, tmp_path: Path) -> None:
    out = say("layers", "cnn3", "--with", "resnet18")
    assert "block2.2 96 x 16 x 16 layer3 256 x 4 x 4" in words(out)
    pairs = layer_line(out)
    assert pairs == [["block1.2", "layer2"], ["block2.2", "layer3"], ["block3", "layer4"]]
    settings = yaml.safe_load(methodtexts.settings(METHODS["attention"]))
    assert all(pair in pairs for pair in settings["distill"]["terms"][0]["layers"])
    small = layer_line(say("layers", "mnist_small", "--size", 28, "--with", saved(tmp_path / "teacher.safetensors")))
    assert small
    assert {other for _, other in small} <= {"block1.2", "block2.2", "block3"}


def test_names_that_are_numbers_stay_text_and_every_name_is_found(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numbered.py").write_text(
        "from torch import nn\n\n\n"
        "def net(num_classes, channels):\n"
        "    conv = lambda one, other: nn.Conv2d(one, other, 3, 2, 1)\n"
        "    inner = nn.Sequential(conv(channels, 4), conv(4, 8))\n"
        "    whole = nn.Sequential(inner, conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))\n"
        "    return whole\n"
    )
    monkeypatch.chdir(tmp_path)
    out = say("layers", "numbered:net", "--classes", 5, "--with", "numbered:net")
    pairs = layer_line(out)
    assert pairs == [["0.0", "0.0"], ["0", "0"], ["1", "1"]]
    spec = InputSpec(channels=3, sizes=(64,), mean=(0.5,) * 3, std=(0.5,) * 3)
    model = build.build("numbered:net", classes=list("abcde"), spec=spec, seed=0)
    ran = layers.trace(model, torch.zeros(2, 3, 64, 64))
    stages = [layer.name for layer in layers.stages(ran)]
    assert [layers.find(ran, one).name for one, _ in pairs] == stages == ["net.0.0", "net.0", "net.1"]


def test_every_layer_with_a_map(say: Say) -> None:
    listed = [line.split() for line in say("layers", "cnn3", "--all").splitlines() if line.startswith("block")]
    names = [f"block{block}.{layer}" for block in (1, 2) for layer in range(4)] + [
        f"block3.{layer}" for layer in range(3)
    ]
    assert sorted(cells[0] for cells in listed) == sorted([*names, "block1", "block2", "block3"])
    assert [cells[0] for cells in listed if cells[-1] == "yes"] == ["block1.2", "block2.2", "block3"]


def test_a_model_without_maps(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat.py").write_text(
        "from torch import nn\n\n\n"
        "def net(num_classes, channels, image_size):\n"
        "    first = nn.Linear(channels * image_size**2, 7)\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(7, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    out = words(say("layers", "flat:net", "--size", 8))
    assert "No layer gives a feature map" in out
    assert "Embedding: what '3' is given, 7 values." in out
    out = words(say("layers", "cnn3", "--with", "flat:net"))
    assert "No pairs: one of the networks has no feature maps." in out


def test_a_model_without_a_final_linear_layer(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "headless.py").write_text(
        "from torch import nn\n\n\n"
        "def net(num_classes):\n"
        "    conv = nn.Conv2d(3, num_classes, 3)\n"
        "    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "Embedding: none, since no final linear layer yields the logits." in words(say("layers", "headless:net"))
