"""`understudy methods`: what it prints can be read, parsed, and used as it is."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli_calls import Say, asked, end, say, words
from understudy import config, losses, methodtexts
from understudy.config import RunConfig
from understudy.distillation import METHODS, Schedule
from understudy.distillation.methods import FAMILIES, Part
from understudy.distillation.terms import in_words
from understudy.pipeline import objective

__all__ = ["asked", "end", "say"]  # fixtures

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"

every_method = pytest.mark.parametrize("name", METHODS)


# --- methods ---


@pytest.mark.parametrize("command", ["methods", "layers"])
def test_help(command: str, say: Say) -> None:
    assert f"Usage: understudy {command}" in say(command, "--help")
    assert f"  {command} " in say("--help")


def test_the_list_names_every_method_in_its_family(say: Say) -> None:
    out = say("methods")
    lines = out.splitlines()
    where = [lines.index(next(line for line in lines if line.rstrip() == one.capitalize())) for one in FAMILIES]
    for (_, methods), begin, end in zip(FAMILIES.items(), where, [*where[1:], len(lines)], strict=True):  # noqa: F402
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
