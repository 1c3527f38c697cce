"""Small networks, pictures, and fastai's Learner of them; fastai itself is imported by what runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

IMAGES, CLASSES, BATCH = 24, 3, 8
FORWARDS: Counter[str] = Counter()
WARNINGS = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning:torch.jit"),
    pytest.mark.filterwarnings("ignore:The .mode.chained_assignment. option is deprecated:DeprecationWarning:fastai"),
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),
]


class Net(nn.Module):
    def __init__(self, seed: int, width: int = 4, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        FORWARDS[type(self).__name__, self.training] += 1
        return self.head(self.body(images).mean((2, 3)))


class TeacherNet(Net):
    pass


class Pictures(list[tuple[Tensor, int]]):
    def new_empty(self) -> Pictures:
        return Pictures()


def new_data(seed: int, images: int = IMAGES) -> Pictures:
    """Images whose first pixel holds their number."""
    generator = torch.Generator().manual_seed(seed)
    data = [torch.rand(1, 8, 8, generator=generator) for _ in range(images)]
    for number, image in enumerate(data):
        image[0, 0, 0] = number / images
    return Pictures((image, number % CLASSES) for number, image in enumerate(data))


def new_learner(model: nn.Module, folder: Path | None = None, **options: Any) -> Any:
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.optimizer import SGD

    shuffle = options.pop("shuffle", False)
    loaders = DataLoaders(
        DataLoader(new_data(0), bs=BATCH, shuffle=shuffle, num_workers=0),
        DataLoader(new_data(1, 10), bs=BATCH, num_workers=0),
        device=torch.device("cpu"),
    )
    options = {"loss_func": CrossEntropyLossFlat(), "opt_func": SGD, "lr": 0.1, "path": folder} | options
    learn = Learner(loaders, model, **options)
    learn.logger = lambda *told: None
    return learn


def new_callback(teacher: Any, **options: Any) -> Any:
    from understudy.integrations.fastai import DistillationCallback

    return DistillationCallback(teacher, **options)


def at(**events: Any) -> Any:
    """Return a callback that runs last; each event is given the learner."""
    from fastai.callback.core import Callback

    seen = Callback(**{event: (lambda self, do=do: do(self.learn)) for event, do in events.items()})
    seen.order = 1000
    return seen


def hooks_of(*networks: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for net in networks for module in net.modules()
    )


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def projectors_of(learn: Any) -> nn.Module:
    return learn.distillation._lesson.distiller.projectors
