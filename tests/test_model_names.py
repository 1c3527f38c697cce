"""What the name of a model denotes: a function, a folder, a file, or a network of torchvision or timm."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from model_inputs import TEN, TWO, spec
from understudy.errors import ModelError
from understudy.models.build import build, kind, names
from understudy.models.classifier import Classifier
from understudy.models.files import head, weights_fingerprint

# --- module:function ---


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """Write a module into the current folder; importing it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(code))
        monkeypatch.delitem(sys.modules, name, raising=False)

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if not name.startswith(("torch", "numpy")):
            del sys.modules[name]


def test_a_function_gets_the_arguments_it_names(user_code):
    user_code(
        "mine_a",
        """
        def make(num_classes, classes, *, in_chans, image_size, width=5, **rest):
            assert (classes, width, rest) == (("cat", "dog"), 5, {})
            return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size**2, num_classes))
        """,
    )
    path = list(sys.path)
    model = build("mine_a:make", classes=TWO, spec=spec(6, channels=1), seed=0)
    assert sys.path == path
    assert model.net[1].weight.shape == (2, 36)
    again = build("mine_a:make", classes=TWO, spec=spec(6, channels=1), seed=0)
    assert weights_fingerprint(model.net) == weights_fingerprint(again.net)


def test_a_function_may_make_a_colour_network_for_grey_images(user_code):
    user_code(
        "mine_b",
        """
        def make():
            layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
            net = nn.Sequential(*layers)
            net[1].eval()
            return net.double()
        """,
    )
    model = build("mine_b:make", classes=TWO, spec=spec(8, channels=1), seed=0)
    assert model.network_channels == 3
    assert model(torch.rand(2, 1, 8, 8)).dtype == torch.float32
    assert [part.training for part in model.net] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such_mod:make", "There is no module 'no_such_mod' for 'no_such_mod:make'"),
        ("mine_c:mak", r"Unknown function of 'mine_c' 'mak'. Did you mean 'make'\?"),
        ("mine_c:number", "'mine_c:number' is a int; it must be a function"),
        ("mine_c:number_list", r"returned a list; it must return a torch.nn.Module"),
        ("mine_c:fails", r"'mine_c:fails' failed \(RuntimeError: no weights today\)"),
        ("mine_c:wide", "'mine_c:wide' needs an argument 'width' that is not known here"),
        ("mine_c:thousand", "'mine_c:thousand' returns 1000 outputs, the data have 2 classes"),
        ("mine_c:maps", r"'mine_c:maps' returns \[2, 3, 8, 8\] for 2 images"),
        (
            "mine_c:strict",
            r"'mine_c:strict' cannot take images of 8 x 8 pixels \(RuntimeError: .*Choose another network",
        ),
        ("mine_d:make", r"The module of 'mine_d:make' cannot be imported \(ModuleNotFoundError: .*no_such_mod"),
        ("mine_e:make", r"The module of 'mine_e:make' cannot be imported \(SyntaxError"),
    ],
)
def test_faults_in_a_users_function_are_named(user_code, text, words):
    user_code(
        "mine_c",
        """
        number = 3
        def make(): return nn.Flatten()
        def number_list(): return [3]
        def fails(): raise RuntimeError("no weights today\\nand more")
        def wide(width): return nn.Flatten()
        def thousand(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 1000))
        def maps(): return nn.Identity()
        def strict(): return nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
        """,
    )
    user_code("mine_d", "import no_such_mod")
    user_code("mine_e", "def make(:")
    with pytest.raises(ModelError, match=words):
        build(text, classes=TWO, spec=spec(8), seed=0)


# --- what a word denotes ---


def test_kinds_of_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "record.json").write_text("{}")
    (tmp_path / "resnet18").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    assert kind("runs/one") == kind(str(tmp_path / "runs" / "one")) == "run"
    assert kind("teacher.safetensors") == "file"
    assert kind("my.module:make") == "function"
    assert (
        kind("timm:resnet18") == kind("torchvision:resnet18") == kind("resnet18") == kind("resnet18.a1_in1k") == "name"
    )


def test_paths_that_lead_nowhere_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "teacher.pt")
    for text, words in {
        "runs/two": "runs/two does not exist",
        "gone.safetensors": "gone.safetensors does not exist",
        "./images": "./images is a folder without a record.json",
        "teacher.pt": "is a pickle, not safetensors.* --teacher-weights teacher.pt --unsafe-pickle",
    }.items():
        with pytest.raises(ModelError, match=words):
            kind(text)


# --- torchvision and timm ---


def zoo_model(name: str, size: int, channels: int = 3, classes=TWO) -> Classifier:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    return build(name, classes=classes, spec=spec(size, channels), seed=0)


@pytest.mark.parametrize(
    ("name", "size", "channels", "network_channels"),
    [
        ("resnet18", 64, 1, 3),
        ("mobilenet_v2", 64, 3, 3),
        ("mobilenet_v3_small", 32, 3, 3),
        ("squeezenet1_1", 64, 3, 3),
        ("timm:resnet18", 64, 1, 1),
        ("vit_tiny_patch16_224", 64, 1, 1),
        pytest.param("vit_b_16", 64, 3, 3, marks=pytest.mark.slow),
        pytest.param("maxvit_t", 224, 3, 3, marks=pytest.mark.slow),
        pytest.param("inception_v3", 96, 3, 3, marks=pytest.mark.slow),
        pytest.param("googlenet", 64, 3, 3, marks=pytest.mark.slow),
        pytest.param("deit_tiny_distilled_patch16_224", 64, 3, 3, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0.ra_in1k", 64, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_networks_of_the_libraries_take_our_images(name, size, channels, network_channels):
    model = zoo_model(name, size, channels).eval()
    assert model.network_channels == network_channels
    assert model(torch.rand(2, channels, size, size)).shape == (2, 2)
    assert head(model)[0].shape[0] == 2
    again = zoo_model(name, size, channels)
    assert weights_fingerprint(model.net) == weights_fingerprint(again.net)


def test_torchvision_is_preferred_and_a_prefix_forces():
    kinds = {
        name: type(zoo_model(name, 32).net).__module__ for name in ("resnet18", "torchvision:resnet18", "timm:resnet18")
    }
    assert kinds == {
        "resnet18": "torchvision.models.resnet",
        "torchvision:resnet18": "torchvision.models.resnet",
        "timm:resnet18": "timm.models.resnet",
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", "Unknown network 'resnet19'. Did you mean 'resnet1"),
        ("cnn33", "Unknown network 'cnn33'. Did you mean 'cnn3'"),
        ("timm:resnet19", "Unknown timm network 'resnet19'. Did you mean"),
        ("torchvision:resnet19", "Unknown torchvision network 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:cnn3", "Unknown torchvision network 'cnn3'."),
        ("resnet18.no_such_tag", "Unknown timm network 'resnet18.no_such_tag'. Known: resnet18.a1_in1k, "),
        ("fcn_resnet50", "Unknown network 'fcn_resnet50'"),
    ],
)
def test_unknown_names_bring_the_nearest(name, words):
    with pytest.raises(ModelError) as caught:
        zoo_model(name, 64)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 64), ("vit_b_32", 70), ("maxvit_t", 64), ("alexnet", 16)])
def test_a_size_that_a_network_cannot_take_is_named(name, size):
    with pytest.raises(ModelError, match=f"^'{name}' cannot take images of {size} x {size} pixels .*--image-size"):
        zoo_model(name, size)


def test_names_hold_classifiers_only():
    pytest.importorskip("timm")
    known = names()
    assert "resnet18" in known["torchvision"]
    assert "vit_tiny_patch16_224" in known["timm"]
    assert not [name for name in known["torchvision"] if name.startswith(("fcn", "quantized", "raft", "fasterrcnn"))]


def test_pretrained_weights_of_torchvision_keep_all_but_the_head(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    published = models.squeezenet1_1().state_dict()
    monkeypatch.setattr(models._api, "load_state_dict_from_url", lambda *_, **__: dict(published))
    before = torch.get_rng_state()
    model = build("squeezenet1_1", classes=TWO, spec=spec(64, channels=1), seed=0, pretrained=True)
    assert torch.equal(torch.get_rng_state(), before)
    own = model.net.state_dict()
    same = {
        name
        for name in published
        if own[name].shape == published[name].shape and torch.equal(own[name], published[name])
    }
    assert set(published) - same == {"classifier.1.weight", "classifier.1.bias"}
    assert model.spec.mean == (0.485, 0.456, 0.406)
    assert model.spec.std == (0.229, 0.224, 0.225)
    assert model.network_channels == 3
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_a_pretrained_inception_answers_as_published_and_can_be_rebuilt_from_its_name(monkeypatch, name, size):
    models = pytest.importorskip("torchvision.models")
    published = models.get_model(name, init_weights=False).state_dict()
    monkeypatch.setattr(models._api, "load_state_dict_from_url", lambda *_, **__: dict(published))
    model = build(name, classes=TEN, spec=spec(size), seed=0, pretrained=True).eval()
    views = torch.rand(2, 3, size, size)
    rebuilt = build(name, classes=TEN, spec=model.spec, seed=1).eval()
    rebuilt.net.load_state_dict(model.net.state_dict())
    assert torch.equal(model(views), rebuilt(views))
    usual = models.get_model_weights(name).DEFAULT.transforms()
    normalised = (views - torch.tensor(usual.mean).view(3, 1, 1)) / torch.tensor(usual.std).view(3, 1, 1)
    reference = models.get_model(name, weights="DEFAULT", progress=False).eval()
    reference.fc = model.net.fc
    torch.testing.assert_close(model(views), reference(normalised))


def test_pretrained_weights_without_a_network_are_one_sentence(monkeypatch):
    models = pytest.importorskip("torchvision.models")

    def offline(*_, **__):
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(models._api, "load_state_dict_from_url", offline)
    with pytest.raises(
        ModelError, match=r"of 'resnet18' could not be had \(OSError: Name or service not known\).*FILE"
    ):
        build("resnet18", classes=TWO, spec=spec(), seed=0, pretrained=True)


def test_pretrained_weights_of_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    published = timm.create_model("vit_tiny_patch16_224", num_classes=1000, img_size=64).state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(published))
    model = build("vit_tiny_patch16_224", classes=TWO, spec=spec(64, channels=1), seed=0, pretrained=True)
    own = model.net.state_dict()
    assert all(torch.equal(own[name], value) for name, value in published.items() if not name.startswith("head."))
    assert own["head.weight"].shape == (2, 192)
    assert (model.network_channels, model.spec.mean) == (3, (0.5, 0.5, 0.5))


def test_colour_weights_of_timm_serve_grey_images(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    published = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(published, tmp_path / "w.safetensors")
    model = build(
        "mobilenetv3_small_050", classes=TWO, spec=spec(32, channels=1), seed=0, weights=tmp_path / "w.safetensors"
    )
    assert model.network_channels == 3
    assert torch.equal(model.net.state_dict()["conv_stem.weight"], published["conv_stem.weight"])
