"""The small networks, building, initial weights from a file, what a network may return, and its head."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model_inputs import TEN, TWO, spec
from understudy.distillation.inputs import logits_of
from understudy.errors import ModelError
from understudy.models import small
from understudy.models.build import build, names
from understudy.models.classifier import head_layer
from understudy.models.files import head, weights_fingerprint
from understudy.record import InputSpec


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# --- the small networks ---


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size", "parameters"),
    [
        ("cnn3", 2, 3, 64, 278_754),
        ("cnn3", 2, 1, 64, 278_178),
        ("cifar_large", 10, 3, 32, 14_728_266),
        ("cifar_small", 10, 3, 32, 437_034),
        ("mnist_large", 10, 1, 28, 1_433_610),
        ("mnist_small", 10, 1, 28, 20_490),
        ("mnist_small", 10, 1, 8, 6_090),
    ],
)
def test_small_networks_have_the_parameters_they_claim(name, classes, channels, size, parameters):
    assert count(small.SMALL[name](classes, channels, size)) == parameters


@pytest.mark.parametrize(("channels", "macs"), [(3, 23_888_448), (1, 23_298_624)])
def test_cnn3_costs_what_it_claims(channels, macs):
    net = small.cnn3(2, channels, 64).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, channels, 64, 64))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("cnn3", 16), ("cifar_large", 32), ("cifar_small", 32), ("mnist_large", 4), ("mnist_small", 4)],
)
def test_small_networks_work_from_their_smallest_size_up(name, smallest):
    for size in (smallest, smallest + 1, smallest + 3, 2 * smallest):
        assert small.SMALL[name](5, 1, size)(torch.rand(2, 1, size, size)).shape == (2, 5)
    with pytest.raises(ModelError, match=f"at least {smallest} x {smallest} pixels, not"):
        build(name, classes=TWO, spec=spec(smallest - 1), seed=0)


def test_dropout_stands_before_each_convolution_of_the_large_cifar_net():
    layers = [layer for layer in small.cifar_large(10).modules() if not list(layer.children())]
    convolutions = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 13
    assert all(isinstance(layers[index - 1], nn.Dropout) and layers[index - 1].p == 0.1 for index in convolutions)
    assert not any(isinstance(layer, nn.Dropout) for layer in small.cifar_small(10).modules())


def test_cifar_batch_norm_answers_for_a_whole_batch_even_in_evaluation():
    net = small.cifar_small(10).eval()
    images = torch.rand(4, 3, 32, 32)
    alone, together = net(images[:1]), net(images)[:1]
    assert not torch.allclose(alone, together, atol=1e-3)
    assert not any("running" in name for name in net.state_dict())


def same_convolution(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """TensorFlow's definition of a 3x3 convolution, stride 2, padding "same", written out."""
    batch, channels, size, _ = images.shape
    out = math.ceil(size / 2)
    total = max((out - 1) * 2 + 3 - size, 0)
    padded = np.zeros((batch, channels, size + total, size + total))
    first = total // 2
    padded[:, :, first : first + size, first : first + size] = images
    answer = np.zeros((batch, len(weight), out, out))
    for y in range(out):
        for x in range(out):
            window = padded[:, :, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            answer[:, :, y, x] = np.einsum("bchw,fchw->bf", window, weight) + bias
    return answer


def same_max_pool(images: np.ndarray) -> np.ndarray:
    """The maximum over the pixel and those to its right and below, where there are any."""
    size = images.shape[-1]
    answer = np.empty_like(images)
    for y in range(size):
        for x in range(size):
            answer[:, :, y, x] = images[:, :, y : y + 2, x : x + 2].max(axis=(2, 3))
    return answer


@pytest.mark.parametrize("size", [4, 5, 6, 7, 8, 13])
def test_keras_networks_pad_as_tensorflow_does(size):
    net = small.mnist_small(3, 2, size).double()
    for layer in (net.conv1, net.conv2, net.head):
        nn.init.normal_(layer.bias)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    images = np.random.default_rng(size).normal(size=(2, 2, size, size))
    hidden = same_convolution(images, state["conv1.weight"], state["conv1.bias"])
    hidden = same_max_pool(np.where(hidden > 0, hidden, 0.2 * hidden))
    hidden = same_convolution(hidden, state["conv2.weight"], state["conv2.bias"]).reshape(2, -1)
    expected = hidden @ state["head.weight"].T + state["head.bias"]
    np.testing.assert_allclose(net(torch.from_numpy(images)).detach().numpy(), expected, atol=1e-12)


def test_keras_networks_start_as_keras_starts_them():
    net = small.mnist_large(10)
    for layer, fans in ((net.conv1, 9 * 1 + 9 * 256), (net.conv2, 9 * 256 + 9 * 512), (net.head, 512 * 49 + 10)):
        limit = math.sqrt(6 / fans)
        largest = layer.weight.abs().max().item()
        assert 0.99 * limit < largest <= limit * (1 + 1e-6)  # float32
        assert torch.count_nonzero(layer.bias) == 0


# --- building ---


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, again, other = (build("cnn3", classes=TWO, spec=spec(), seed=seed).net for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_fingerprint(one) == weights_fingerprint(again)
    assert weights_fingerprint(one) != weights_fingerprint(other)
    torch.rand(7)
    assert weights_fingerprint(build("cnn3", classes=TWO, spec=spec(), seed=3).net) == weights_fingerprint(one)


def test_a_classifier_preprocesses_and_keeps_its_network_apart():
    model = build("cnn3", classes=TWO, spec=spec(32, channels=1), seed=0).eval()
    views = torch.rand(2, 1, 48, 48)
    small_views = nn.functional.interpolate(views, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(model(views), model.net((small_views - 0.5) / 0.25))
    assert (model.architecture, model.classes, model.network_channels) == ("cnn3", ("cat", "dog"), 1)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"net"}


@pytest.mark.slow
def test_building_a_small_network_imports_neither_torchvision_nor_timm():
    code = """
        import sys
        from understudy.models.build import build, kind
        from understudy.record import InputSpec
        kind("cnn3")
        spec = InputSpec(channels=1, sizes=(16,), mean=(0.5,), std=(0.5,))
        assert build("cnn3", classes=["a", "b"], spec=spec, seed=0).network_channels == 1
        print(sorted({"torchvision", "timm", "onnx", "sklearn"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModelError, match=r"^'resnet18' is none of .*pip install 'understudy\[zoo\]'$"):
        build("resnet18", classes=TWO, spec=spec(), seed=0)
    assert names() == {"understudy": sorted(small.SMALL), "torchvision": [], "timm": []}


def test_a_small_network_has_no_pretrained_weights():
    with pytest.raises(ModelError, match="'cnn3' is a small network of our own and has no pretrained weights"):
        build("cnn3", classes=TWO, spec=spec(), seed=0, pretrained=True)


def test_a_normalisation_of_another_width_is_refused():
    odd = InputSpec(channels=1, sizes=(16,), mean=(0.5, 0.5, 0.5), std=(0.5,))
    with pytest.raises(ModelError, match="'cnn3' is not described well: mean and std have 1 or 1 values, not 3 and 1"):
        build("cnn3", classes=TWO, spec=odd, seed=0)


# --- what a network may return ---

Inception = namedtuple("Inception", ["logits", "aux_logits"])


@dataclass
class Output:
    logits: torch.Tensor


def test_logits_are_found_in_whatever_a_network_returns():
    wanted, aux = torch.rand(2, 3), torch.rand(2, 3)
    for answer in (
        wanted,
        Inception(wanted, aux),
        (wanted, aux),
        [wanted],
        Output(wanted),
        {"loss": aux, "logits": wanted},
    ):
        assert logits_of(answer) is wanted


@pytest.mark.parametrize("answer", [None, (), {"scores": torch.zeros(1)}, "text"])
def test_an_answer_without_logits_is_refused(answer):
    with pytest.raises(ModelError, match=f"returns a {type(answer).__name__}; logits"):
        logits_of(answer)


# --- initial weights from a file ---


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A whole cnn3 for 10 classes and 3 channels."""
    torch.manual_seed(5)
    return small.cnn3(10).state_dict()


def test_a_file_gives_all_but_the_head_of_another_width(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    ten = build("cnn3", classes=TEN, spec=spec(), seed=0, weights=tmp_path / "w.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in ten.net.state_dict().items())
    two = build("cnn3", classes=TWO, spec=spec(), seed=0, weights=tmp_path / "w.safetensors")
    fresh = build("cnn3", classes=TWO, spec=spec(), seed=0)
    for name, value in two.net.state_dict().items():
        assert torch.equal(value, fresh.net.state_dict()[name] if name.startswith("head.") else state[name])


def test_a_file_may_lack_the_head_and_counters_and_carry_a_prefix(tmp_path, state):
    kept = {
        f"model.{name}": value for name, value in state.items() if not name.startswith("head") and "tracked" not in name
    }
    save_file(kept, tmp_path / "w.safetensors")
    model = build("cnn3", classes=TEN, spec=spec(), seed=0, weights=tmp_path / "w.safetensors")
    own = model.net.state_dict()
    assert all(torch.equal(value, own[name.removeprefix("model.")]) for name, value in kept.items())


def test_a_file_that_does_not_fit_is_refused_with_the_differences(tmp_path, state):
    file = tmp_path / "w.safetensors"
    del state["block1.0.weight"]
    state["block9.weight"] = torch.zeros(1)
    state["block2.0.weight"] = torch.zeros(96, 31, 3, 3)
    save_file(state, file)
    with pytest.raises(ModelError) as caught:
        build("cnn3", classes=TWO, spec=spec(), seed=0, weights=file)
    text = str(caught.value)
    assert text.startswith(f"{file} does not fit the network: ")
    assert "'block1.0.weight' is missing in the file" in text
    assert "'block9.weight' is in the file only" in text
    assert "'block2.0.weight' is [96, 31, 3, 3] in the file and [96, 32, 3, 3] in the network" in text
    assert "head" not in text


@pytest.mark.parametrize("ending", ["pt", "ckpt", "weights"])
def test_a_pickle_needs_the_flag(tmp_path, state, ending):
    file = tmp_path / f"w.{ending}"
    torch.save({"state_dict": state, "epoch": 3}, file)
    with pytest.raises(ModelError, match=r"is a pickle, which can run any code.*--unsafe-pickle"):
        build("cnn3", classes=TEN, spec=spec(), seed=0, weights=file)
    model = build("cnn3", classes=TEN, spec=spec(), seed=0, weights=file, unsafe_pickle=True)
    assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items())


def test_a_pickle_of_a_whole_network_needs_the_flag_too(tmp_path, state):
    net = small.cnn3(10)
    net.load_state_dict(state)
    torch.save(net, tmp_path / "w.pth")
    model = build("cnn3", classes=TEN, spec=spec(), seed=0, weights=tmp_path / "w.pth", unsafe_pickle=True)
    assert weights_fingerprint(model.net) == weights_fingerprint(net)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.safetensors", None, "There is no weights file"),
        ("junk.safetensors", b"not tensors at all", "is damaged, cut short or not a safetensors file"),
        ("empty.safetensors", b"", "is damaged, cut short or not a safetensors file"),
        ("junk.pt", b"not tensors at all", "is damaged or not a file of torch.save"),
    ],
)
def test_useless_weights_files_are_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=words):
        build("cnn3", classes=TWO, spec=spec(), seed=0, weights=tmp_path / name, unsafe_pickle=True)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds a list; named tensors"):
        build("cnn3", classes=TWO, spec=spec(), seed=0, weights=tmp_path / "w.pt", unsafe_pickle=True)


# --- the head ---


def test_the_head_of_a_classifier_is_found():
    model = build("cnn3", classes=TWO, spec=spec(), seed=0)
    weight, bias = head(model)
    assert np.array_equal(weight, model.net.head.weight.detach().numpy())
    assert np.array_equal(bias, model.net.head.bias.detach().numpy())
    weight[:] = 0
    assert model.net.head.weight.abs().max() > 0


def test_a_convolution_may_be_the_head():
    net = nn.Sequential(nn.Linear(9, 9), nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(4, 2, 3))
    weight, bias = head(net)
    assert weight.shape == (2, 4)
    assert bias is None
    assert head_layer(net, 9)[0] == "0"
    assert head(nn.Flatten()) is None
