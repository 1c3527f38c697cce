"""The choice of precision and layout: measured once, kept per machine, and without a trace in what is trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from understudy import numerics
from understudy.numerics import CANDIDATES, FIXED, Choice, Numerics, Running, choose, parse

PLAIN, LAST, HALF = CANDIDATES


class _Net(nn.Sequential):
    """With batch statistics and dropout, so that a training step leaves traces wherever it can."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
        )


IMAGES = torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "numerics"


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Numerics]]:
    """Let each candidate take a given time; return the list of those that were measured."""

    def fake(plain: float, last: float = 9.0, half: float = 9.0) -> list[Numerics]:
        asked: list[Numerics] = []

        def step_seconds(network: nn.Module, images: Tensor, classes: int, candidate: Numerics) -> float:
            asked.append(candidate)
            return {PLAIN: plain, LAST: last, HALF: half}[candidate]

        monkeypatch.setattr(numerics, "_step_seconds", step_seconds)
        return asked

    return fake


def _choose(requested: str = "auto", *, images: Tensor = IMAGES, model: str = "net") -> Choice:
    return choose(_Net(), images, classes=5, requested=requested, key={"model": model})


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "best", "seconds"),
    [
        ((1.0, 2.0, 3.0), PLAIN, 1.0),
        ((1.0, 0.5, 0.6), LAST, 0.5),
        ((1.0, 0.6, 0.5), HALF, 0.5),
        # a gain that is within the noise of the machine does not count
        ((1.0, 0.9, 2.0), PLAIN, 1.0),
        ((1.0, 0.88, 0.87), PLAIN, 1.0),
        ((1.0, 0.88, 0.86), HALF, 0.86),
        ((1.0, 1.0, 1.0), PLAIN, 1.0),
    ],
)
def test_a_switch_must_be_worth_it(
    times: tuple[float, float, float], best: Numerics, seconds: float, fake_times: Callable[..., list[Numerics]]
) -> None:
    asked = fake_times(*times)
    assert _choose() == Choice(best, seconds)
    assert asked == list(CANDIDATES)


@pytest.mark.parametrize("requested", ["fp32", "bf16"])
def test_what_is_requested_is_obeyed_and_only_timed(requested: str, fake_times: Callable[..., list[Numerics]]) -> None:
    asked = fake_times(1.0, 0.1, 5.0)
    choice = _choose(requested)
    assert choice == Choice(FIXED[requested], {"fp32": 1.0, "bf16": 5.0}[requested])
    assert asked == [FIXED[requested]]
    assert choice.numerics.precision == requested


def test_the_measured_time_is_that_of_the_least_disturbed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [0.01, 0.02, 5.0, 3.0, 4.0, 6.0]  # the first two steps only warm up
    moments = iter([moment for begin, length in enumerate(durations) for moment in (10.0 * begin, 10 * begin + length)])
    monkeypatch.setattr(numerics, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    assert _choose("fp32").step_seconds == 3.0
    assert next(moments, None) is None


@pytest.mark.parametrize("requested", ["auto", "fp32", "bf16"])
def test_measuring_leaves_no_trace(requested: str) -> None:
    torch.manual_seed(3)
    network = _Net().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, state = IMAGES.clone(), torch.get_rng_state()
    choice = choose(network, images, classes=5, requested=requested, key={})
    assert 0 < choice.step_seconds < 60
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, IMAGES)
    assert network.state_dict().keys() == before.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


# --- the kept choice -------------------------------------------------------------------------------------------------


def test_a_choice_is_kept_and_used_again(fake_times: Callable[..., list[Numerics]]) -> None:
    fake_times(1.0, 0.5)
    first = _choose()
    asked = fake_times(0.1, 0.5)
    assert _choose() == first == Choice(LAST, 0.5)
    assert asked == []


@pytest.mark.parametrize(
    "other",
    [
        lambda: _choose("fp32"),
        lambda: _choose(images=IMAGES[:2]),
        lambda: _choose(model="other"),
        lambda: torch.set_num_threads(2) or _choose(),  # type: ignore[func-returns-value]
    ],
)
def test_another_question_is_measured_anew(
    other: Callable[[], Choice], fake_times: Callable[..., list[Numerics]]
) -> None:
    fake_times(1.0, 0.5)
    _choose()
    asked = fake_times(0.25)
    assert other() == Choice(PLAIN, 0.25)
    assert asked[0] == PLAIN


_SOUND = {"precision": "bf16", "channels_last": True, "step_seconds": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\0",
        json.dumps({**_SOUND, "precision": "fp8"}),
        json.dumps({**_SOUND, "channels_last": False}),
        json.dumps({**_SOUND, "step_seconds": 0}),
        json.dumps({**_SOUND, "step_seconds": "fast"}),
        json.dumps({**_SOUND, "step_seconds": None}),
        json.dumps({**_SOUND, "step_seconds": float("inf")}),
        json.dumps({**_SOUND, "step_seconds": float("nan")}),
        json.dumps({"precision": "fp32", "channels_last": False}),
    ],
)
def test_a_damaged_kept_file_is_measured_again(
    content: str, cache: Path, fake_times: Callable[..., list[Numerics]]
) -> None:
    fake_times(1.0)
    _choose()
    (file,) = cache.iterdir()
    file.write_text(json.dumps(_SOUND))
    assert _choose() == Choice(HALF, 0.5)
    file.write_text(content)
    assert _choose() == Choice(PLAIN, 1.0)
    assert json.loads(file.read_text()) == {
        "precision": "fp32",
        "channels_last": False,
        "compiled": False,
        "step_seconds": 1.0,
    }


@pytest.mark.parametrize("number", [13, 28, 30])
def test_a_cache_that_cannot_be_written_is_no_error(
    number: int, monkeypatch: pytest.MonkeyPatch, fake_times: Callable[..., list[Numerics]]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "disk")

    fake_times(1.0)
    monkeypatch.setattr(tempfile, "mkstemp", fail)
    assert _choose() == Choice(PLAIN, 1.0)


def test_a_cache_below_a_file_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_times: Callable[..., list[Numerics]]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "file"))
    fake_times(1.0)
    assert _choose() == Choice(PLAIN, 1.0)


# --- numerics at work ------------------------------------------------------------------------------------------------


def test_a_record_s_word_gives_the_numerics_back() -> None:
    every = {*CANDIDATES, *FIXED.values()}
    assert {str(one) for one in every} == {"fp32", "fp32 channels-last", "bf16 channels-last"}
    for one in every:
        assert parse(str(one)) == one


@pytest.mark.parametrize("one", CANDIDATES)
def test_layout_and_precision_reach_the_convolution(one: Numerics) -> None:
    seen: list[Tensor] = []
    network = one.prepare(_Net())
    network[0].register_forward_hook(lambda _, __, output: seen.append(output))  # type: ignore[index]
    with one.autocast(torch.device("cpu")):
        network(one.layout(IMAGES))
    assert seen[0].dtype == (torch.bfloat16 if one.precision == "bf16" else torch.float32)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) is one.channels_last


@pytest.mark.parametrize("one", CANDIDATES)
def test_a_running_network_answers_the_same_in_any_surroundings(one: Numerics) -> None:
    network = Running(_Net().eval(), one)
    answers = network(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(IMAGES), answers)
    assert answers.dtype == torch.float32
    expected = _Net().eval()
    expected.load_state_dict(network.network.state_dict())
    exact = expected.double()(IMAGES.double()).float()
    error = (answers - exact).abs().max()
    assert error < 1e-5 if one.precision == "fp32" else 1e-5 < error < 0.1


# --- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Numerics]]:
    """Let an eager step take 1 s and a compiled one a given time, or fail; compiling takes 20 s."""

    def fake(compiled: float | None) -> list[Numerics]:
        asked: list[Numerics] = []
        clock = iter(range(0, 1000, 20))

        def step_seconds(network: nn.Module, images: Tensor, classes: int, candidate: Numerics) -> float:
            asked.append(candidate)
            if candidate.compiled and compiled is None:
                raise RuntimeError("no compiler")
            return compiled if candidate.compiled and compiled else 1.0

        monkeypatch.setattr(numerics, "_step_seconds", step_seconds)
        monkeypatch.setattr(numerics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        return asked

    return fake


COMPILED = Numerics(compiled=True)


@pytest.mark.parametrize(
    ("seconds", "steps", "best"),
    [
        (0.5, 0, PLAIN),  # nobody knows how long
        (0.5, 299, PLAIN),  # too short to try
        (0.5, 1000, COMPILED),  # saves 500 s for 20
        (0.95, 500, PLAIN),  # saves 25 s for 20: the noise of the machine would decide
        (1.5, 10_000, PLAIN),
        (None, 10_000, PLAIN),  # compiling fails
    ],
)
def test_compiling_must_pay_for_itself(
    seconds: float | None, steps: int, best: Numerics, compiles: Callable[..., list[Numerics]]
) -> None:
    asked = compiles(seconds)
    first = choose(_Net(), IMAGES, classes=5, requested="fp32", key={}, steps=steps)
    assert first.numerics == best
    measured = [PLAIN] if steps < 300 else [PLAIN, COMPILED]
    assert asked == measured
    assert choose(_Net(), IMAGES, classes=5, requested="fp32", key={}, steps=steps) == first
    assert asked == measured, "what was measured is kept, a failure too"
