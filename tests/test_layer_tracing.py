"""Layers of networks that are no simple chains: reused modules, sums behind activations, windows, stages in a list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from understudy import Distiller, losses
from understudy.distillation import Term, layers
from understudy.errors import ConfigError

IMAGES, LABELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)


class Reused(nn.Module):
    """One ReLU for all convolutions, as networks are written by hand; remembers its maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.c3 = nn.Conv2d(2 * width, 2 * width, 3, 2, padding=1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(2 * width, 4)
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.maps = []
        for conv in (self.c1, self.c2, self.c3):
            x = conv(x)
            self.maps.append(x)
            x = self.relu(x)
        return self.fc(x.mean((2, 3)))


class PreActivated(nn.Module):
    """A block of a wide ResNet: its output is a sum, behind which nothing is activated."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x)))))) + self.shortcut(x)


def wide_resnet(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.Sequential(PreActivated(width, width), PreActivated(width, width)),
        nn.Sequential(PreActivated(width, 2 * width, 2), PreActivated(2 * width, 2 * width)),
        nn.Sequential(nn.BatchNorm2d(2 * width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )


def heard(distiller: Distiller, method: str) -> list[tuple[str, bool]]:
    assert distiller._watch is not None
    [watched] = [one for name, one in distiller._watch.watched.items() if name == method]
    return [(student.place.layer, student.place.before) for student, _ in watched.pairs]


def test_a_module_that_is_used_in_several_places_is_no_stage() -> None:
    teacher, student = Reused(12), Reused(6)
    distiller = Distiller(teacher, student, method="attention", example=IMAGES)
    got = distiller(IMAGES, LABELS).parts["attention"]
    assert heard(distiller, "attention") == [("c1", False), ("c2", False), ("c3", False)]
    pairs = zip(student.maps, teacher.maps, strict=True)
    expected = sum(float(losses.attention(one, other).mean().detach()) for one, other in pairs)
    assert got == pytest.approx(expected, rel=1e-5)


def test_such_a_module_is_refused_by_name() -> None:
    term = Term("hint", losses.hint, layers=(("relu", "c3"),), takes=("student_map", "teacher_map"), weight=1.0)
    with pytest.raises(ConfigError, match=r"'relu' runs 3 times, on maps of several shapes\. Name one that runs once"):
        Distiller(Reused(6), Reused(6), terms=[term], example=IMAGES)


def test_a_reused_activation_is_the_end_of_its_last_place_only() -> None:
    models = pytest.importorskip("torchvision.models")
    network = models.resnet18(num_classes=4)
    ends = {layer.name: layer.activation for layer in layers.trace(network, IMAGES)}
    assert ends["layer1"] == "layer1.1.relu"  # which runs twice in its block, at last at its end
    assert ends["layer1.0.bn1"] is None
    assert ends["conv1"] is None
    found = {layer.name: layer.activation for layer in layers.trace(Reused(6), IMAGES)}
    assert set(found.values()) == {None, "relu"}
    assert [name for name, activation in found.items() if activation] == ["relu"]


def test_what_ends_in_a_sum_has_no_activation() -> None:
    distiller = Distiller(wide_resnet(8), wide_resnet(6), method="ofd", example=IMAGES)
    assert heard(distiller, "ofd") == [("1", False), ("3.1", True)]


def test_an_activation_that_something_is_added_to_ends_nothing() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.conv(x))
            out += x
            return out

    network = nn.Sequential(Added(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    ends = {layer.name: layer.activation for layer in layers.trace(network, IMAGES)}
    assert ends["0.relu"] == "0.relu"
    assert ends["0"] is None


def test_windows_of_attention_are_no_maps() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, depths=(1, 1, 1, 1), embed_dim=12)
    stages = layers.stages(layers.trace(network, torch.zeros(2, 3, 224, 224)))
    assert [(layer.name, layer.side) for layer in stages] == [
        ("layers.0", 56),
        ("layers.1", 28),
        ("layers.2", 14),
        ("norm", 7),
    ]


def test_stages_in_a_list_follow_a_stem_outside() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1), dims=(4, 8, 12, 16))
    stages = layers.stages(layers.trace(network, torch.zeros(2, 3, 64, 64)))
    assert [layer.name for layer in stages][:3] == ["stages.0", "stages.1", "stages.2"]


def test_blocks_of_torchvisions_transformer_are_whole_blocks() -> None:
    models = pytest.importorskip("torchvision.models")
    network = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=8, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )
    stages = layers.stages(layers.trace(network, IMAGES))
    assert [layer.name for layer in stages] == [f"encoder.layers.encoder_layer_{number}" for number in (1, 3, 5, 7)]


@pytest.mark.parametrize("size", [(16, 32), (20, 36)])
def test_images_that_are_not_square_are_refused_where_maps_are_compared(size: tuple[int, int]) -> None:
    example = torch.rand(2, 3, *size)
    with pytest.raises(ConfigError, match=rf"example is of {size[0]} x {size[1]} pixels\. Give square images"):
        Distiller(Reused(6), Reused(6), method="hint", example=example)
    Distiller(Reused(6), Reused(6), method="rkd", example=example)
