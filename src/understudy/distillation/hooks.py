"""Tensors taken from named layers of a network while it runs. Used by the distiller and by whoever looks at layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from understudy.errors import ConfigError, unknown


class Place(NamedTuple):
    """Where a tensor is taken."""

    layer: str
    """Name of a module, as `named_modules` gives it."""
    before: bool = False
    """Take what the layer is given instead of what it returns."""


class Listener:
    """Keeps what the layers of a network give while it runs, until `take` or `remove`.

    A layer that runs several times leaves what it gave last. The network is not wrapped: its names, its weights and
    its file stay what they are. A copy of the network alone has no working hooks; a copy of network and listener
    together, as of a whole distiller, listens for itself.

    Args:
        network: hooks are added to its layers.
        places: where to listen.

    Raises:
        ConfigError: no such layer; the nearest names are given.
    """

    def __init__(self, network: nn.Module, places: Sequence[Place]) -> None:
        modules = {name: module for name, module in network.named_modules() if name}
        self.places = tuple(dict.fromkeys(places))
        for place in self.places:
            if place.layer not in modules:
                raise ConfigError(unknown("layer", place.layer, modules) + " `understudy layers` lists them.")
        self._modules = tuple(modules[place.layer] for place in self.places)
        self._hook()

    def _hook(self) -> None:
        self._heard: dict[Place, Tensor] = {}
        pairs = zip(self._modules, self.places, strict=True)
        self._handles = [_listen(module, _Keep(place, self._heard)) for module, place in pairs]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was heard: it may hang on a graph, which cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_heard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Listen to the copies of the layers, which came along without working hooks."""
        self.__dict__.update(state)
        for handle in self._handles:
            handle.remove()
        self._hook()

    def take(self) -> dict[Place, Tensor]:
        """Return what was heard since the last call, and let go of it.

        Raises:
            ConfigError: a layer did not run.
        """
        heard = dict(self._heard)
        self._heard.clear()
        if len(heard) < len(self.places):
            silent = next(place.layer for place in self.places if place not in heard)
            raise ConfigError(f"The layer '{silent}' returned no tensor while the network ran; choose another one.")
        return heard

    def remove(self) -> None:
        """Take the hooks away; nothing is heard any more, in copies neither."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._heard.clear()
        self.places, self._modules = (), ()


class _Keep:
    """A hook that keeps what a layer gives. A copy of it, as of a network with its hooks, does nothing.

    Args:
        place: of the layer.
        heard: where the tensor is kept; None for a hook that does nothing.
    """

    def __init__(self, place: Place, heard: dict[Place, Tensor] | None) -> None:
        self.place = place
        self.heard = heard

    def __call__(self, module: nn.Module, given: tuple[object, ...], returned: object = None) -> None:
        if self.heard is None:
            return
        value = given if self.place.before else returned
        if isinstance(value, tuple) and value:
            value = value[0]
        if isinstance(value, Tensor):
            self.heard[self.place] = value.clone()  # since the layer that comes next may work in place

    def __reduce__(self) -> tuple[type[_Keep], tuple[Place, None]]:
        return _Keep, (self.place, None)


def _listen(module: nn.Module, hook: _Keep) -> RemovableHandle:
    return module.register_forward_pre_hook(hook) if hook.place.before else module.register_forward_hook(hook)
