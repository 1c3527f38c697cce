"""Batch normalisation without running statistics: it gets some, trains the same, and answers images one by one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from small_runs import stripes, tiny
from understudy import api
from understudy.models.build import build
from understudy.models.files import load, save
from understudy.models.norms import keep_running_statistics, normalises_by_batch
from understudy.record import InputSpec

COLOUR = InputSpec(channels=3, sizes=(32,), mean=(0.5,) * 3, std=(0.25,) * 3)
NETWORK = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes),
    )
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = (nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm1d(24, affine=False, track_running_stats=False))
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), norms[1], nn.Linear(24, 4)
    )


def train(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in range(0, len(images), 8):
        optimizer.zero_grad()
        F.cross_entropy(net.train()(images[batch : batch + 8]), labels[batch : batch + 8]).backward()
        optimizer.step()
    net.eval()


def one_by_one(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(image[None]) for image in images])


@torch.no_grad()
def test_training_is_the_same_and_an_answer_no_longer_depends_on_the_batch() -> None:
    plain, kept = network(), network()
    keep_running_statistics(kept)
    images, labels = torch.rand(160, 3, 8, 8), torch.arange(160) % 4
    with torch.enable_grad():
        train(plain, images, labels)
        train(kept, images, labels)
    for (name, one), other in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert normalises_by_batch(plain)
    assert not normalises_by_batch(kept)
    torch.testing.assert_close(one_by_one(kept, images[:8]), kept(images[:8]))
    assert (plain[:2](images[:1]) - plain[:2](images[:8])[:1]).abs().max() > 0.01


def test_what_is_kept_is_what_torch_keeps_by_default() -> None:
    kept, own = network(), network()
    keep_running_statistics(kept)
    own[1], own[5] = nn.BatchNorm2d(6), nn.BatchNorm1d(24, affine=False)
    for net in (kept, own):
        train(net, torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4)
    assert kept.state_dict().keys() == own.state_dict().keys()
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], tensor, msg=name)


def test_networks_that_need_nothing_are_left_alone() -> None:
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4))
    with torch.no_grad():
        own(torch.rand(8, 3, 8, 8))
    before = copy.deepcopy(own.state_dict())
    keep_running_statistics(own)
    assert own.state_dict().keys() == before.keys()
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in before.items())


def test_only_those_that_are_named() -> None:
    net = network()
    keep_running_statistics(net, within={"1.running_mean", "1.running_var"})
    assert net[1].running_mean is not None
    assert net[5].running_mean is None
    alone = nn.BatchNorm2d(3, track_running_stats=False)
    keep_running_statistics(alone, within={"running_mean"})
    assert not normalises_by_batch(alone)


@pytest.mark.parametrize("kept", [True, False])
def test_a_file_says_by_what_it_holds_which_of_the_two_it_is(kept: bool, tmp_path: Path) -> None:
    model = build("cifar_small", classes=["a", "b"], spec=COLOUR, seed=0)
    if kept:
        keep_running_statistics(model.net)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 32, 32))
    save(model.eval(), tmp_path / "a.safetensors")
    loaded, _ = load(tmp_path / "a.safetensors")
    assert normalises_by_batch(loaded.net) != kept
    views = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded(views), model(views))


@pytest.mark.parametrize("running", [True, False])
def test_a_run_ends_in_a_file_that_answers_one_image_as_it_answers_many(
    running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"by_batch_{running}".lower()
    (tmp_path / f"{module}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    own = {"model": f"{module}:make"}
    folder = tmp_path / "run"
    result = api.run(
        tiny(
            stripes(tmp_path / "images"),
            teacher=own,
            student=own,
            train={"epochs": 8, "running_statistics": running},
            force=True,
            seeds=[0],
        ),
        folder,
    )
    [file] = result.record.exports
    doubts = [finding.check for finding in result.record.gate if not finding.ok]
    assert (file.one_by_one is None) == running
    assert ("statistics" in doubts) == (not running)
    assert result.record.models["student-0"].epochs[-1].val_accuracy > 0.8
