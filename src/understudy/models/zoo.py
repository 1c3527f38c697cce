"""Networks of torchvision and timm by name, and ours. Used by `build.py`.

Only here are these two libraries imported, and only when a name needs them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn

from understudy.errors import ModelError, unknown
from understudy.models.classifier import head_layer
from understudy.models.foreign import quote
from understudy.models.small import SMALL

Origin = Literal["understudy", "torchvision", "timm"]

_WITH_AUXILIARY_LOGITS = ("googlenet", "inception_v3")


class Pretrained(NamedTuple):
    """A network with a library's weights and a fresh head, and the normalisation that it was trained with."""

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


def names() -> dict[Origin, list[str]]:
    """Return all names of classification networks by origin; a library that is not installed has none."""
    known: dict[Origin, list[str]] = {"understudy": sorted(SMALL), "torchvision": [], "timm": []}
    try:
        known["torchvision"] = _torchvision_names()
        known["timm"] = _timm().list_models()
    except ModelError:
        pass
    return known


def find(name: str) -> tuple[Origin, str]:
    """Return where a name comes from, and the name without a prefix `torchvision:` or `timm:`.

    Our own come first, then torchvision's, then timm's.

    Raises:
        ModelError: no such network (the nearest names are given), or the library is not installed.
    """
    prefix, colon, bare = name.rpartition(":")
    if not colon and name in SMALL:
        return "understudy", name
    if prefix in ("", "torchvision") and bare in _torchvision_names(wanted=name):
        return "torchvision", bare
    if prefix in ("", "timm") and _in_timm(bare):
        return "timm", bare
    known = names()
    choices = known.get(prefix, []) if colon else [one for some in known.values() for one in some]  # type: ignore[call-overload]
    raise ModelError(unknown(f"{prefix} network" if colon else "network", bare, choices))


def fresh(origin: Origin, name: str, *, classes: int, channels: int, size: int) -> nn.Module:
    """Return a network with initial weights; torchvision's have 3 channels, whatever is asked."""
    if origin == "understudy":
        return SMALL[name](classes, channels, size)
    if origin == "timm":
        return _timm_network(name, classes=classes, channels=channels, size=size, pretrained=False)
    options: dict[str, Any] = {"num_classes": classes}
    if name.startswith("vit_"):
        options["image_size"] = size
    elif name.startswith("maxvit_"):
        options["input_size"] = (size, size)
    elif name in _WITH_AUXILIARY_LOGITS:
        options |= {"aux_logits": False, "init_weights": True}
    net: nn.Module = _torchvision().get_model(name, weights=None, **options)
    return net


def pretrained(origin: Origin, name: str, *, classes: int, size: int) -> Pretrained:
    """Fetch a library's best weights over the network (or from its cache); the net has 3 channels.

    Raises:
        ModelError: none exist, or they could not be fetched.
    """
    if origin == "understudy":
        raise ModelError(f"'{name}' is a small network of our own and has no pretrained weights.")
    try:
        if origin == "timm":
            return _pretrained_timm(name, classes=classes, size=size)
        return _pretrained_torchvision(name, classes=classes)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"The pretrained weights of '{name}' could not be had ({quote(error)}). "
            "Without a network, give a local file with --teacher-weights FILE."
        ) from error


def _pretrained_torchvision(name: str, *, classes: int) -> Pretrained:
    auxiliary = name in _WITH_AUXILIARY_LOGITS
    # these two would undo the usual normalisation and apply (x - .5) / .5 inside; so do we, as for a rebuilt network
    options = {"transform_input": False} if auxiliary else {}
    net: Any = _torchvision().get_model(name, weights="DEFAULT", progress=False, **options)
    if auxiliary:
        net.aux_logits = False
        net.AuxLogits = net.aux1 = net.aux2 = None
    _replace_head(net, name, classes)
    usual = _torchvision().get_model_weights(name).DEFAULT.transforms()
    mean, std = ((0.5,) * 3, (0.5,) * 3) if auxiliary else (tuple(usual.mean), tuple(usual.std))
    return Pretrained(net, mean, std)


def _pretrained_timm(name: str, *, classes: int, size: int) -> Pretrained:
    net = _timm_network(name, classes=classes, channels=3, size=size, pretrained=True)
    cfg: Any = net.pretrained_cfg
    return Pretrained(net, tuple(cfg["mean"]), tuple(cfg["std"]))


def _replace_head(net: nn.Module, name: str, classes: int) -> None:
    found = head_layer(net, 1000)
    if found is None:
        raise ModelError(f"'{name}' has no final linear layer to replace for {classes} classes.")
    path, old = found
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias=bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=bias)
    net.set_submodule(path, new)


def _timm_network(name: str, *, classes: int, channels: int, size: int, pretrained: bool) -> nn.Module:
    options = {"pretrained": pretrained, "num_classes": classes, "in_chans": channels}
    try:
        net: nn.Module = _timm().create_model(name, img_size=size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        net = _timm().create_model(name, **options)  # a network for any size
    return net


def _in_timm(name: str) -> bool:
    timm = _timm()
    if not timm.is_model(name):
        return False
    base, dot, _ = name.partition(".")
    tagged = timm.list_pretrained(f"{base}.*") if dot else []
    if dot and name not in tagged:
        raise ModelError(unknown("timm network", name, tagged))
    return True


def _torchvision_names(wanted: str | None = None) -> list[str]:
    models = _torchvision(wanted)
    listed: list[str] = models.list_models(module=models)
    return listed


def _torchvision(wanted: str | None = None) -> Any:
    try:
        from torchvision import models
    except ImportError:
        raise ModelError(_missing(wanted)) from None
    return models


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ModelError(_missing(None)) from None
    return timm


def _missing(wanted: str | None) -> str:
    what = f"'{wanted}' is none of understudy's own networks ({', '.join(sorted(SMALL))}). " if wanted else ""
    return f"{what}For the networks of torchvision and timm, run: pip install 'understudy[zoo]'"
