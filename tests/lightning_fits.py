"""Tiny networks, data and a quiet Trainer, for the tests of tasks for Lightning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SGD = partial(torch.optim.SGD, lr=0.1)
WARNINGS = [
    # Lightning's advice on speed, which tests do not need
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # a test that is not about validation has none
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def net(channels: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1)),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * channels, 3),
    )


def data(images: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(images, 1, 8, 8, generator=generator), torch.arange(images) % 3)


def shuffled(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size, shuffle=True)


def val() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=24)


def trainer(folder: Path, *, max_epochs: int = 2, **more: Any) -> Any:
    """Return a quiet Trainer on the CPU."""
    from lightning.pytorch import Trainer  # not above: tests skip where lightning is missing

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    usual = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "log_every_n_steps": 1}
    return Trainer(max_epochs=max_epochs, **{**usual, **quiet, "enable_checkpointing": False, **more})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
