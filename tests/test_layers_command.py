"""`understudy layers`: what it prints can be read, parsed, and used as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cli_calls import Say, end, say, words
from understudy import methodtexts
from understudy.distillation import METHODS, layers
from understudy.models import build, files
from understudy.record import InputSpec

__all__ = ["end", "say"]  # fixtures


def row(output: str, name: str) -> list[str]:
    """Return the cells of the first line of a table that begins with a name."""
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])


def layer_line(output: str) -> list[list[str]]:
    """Return the pairs of the line that can be copied into a term."""
    line = next(line for line in output.splitlines() if line.startswith("layers: "))
    pairs: list[list[str]] = yaml.safe_load(line)["layers"]
    return pairs


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
