"""Tensors taken from named layers of a network while it runs. Used by the distiller and by whoever looks at layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    its file stay what they are.

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
        self._heard: dict[Place, Tensor] = {}
        self._handles = [_listen(modules[place.layer], place, self._heard) for place in self.places]

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
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._heard.clear()


def _listen(module: nn.Module, place: Place, heard: dict[Place, Tensor]) -> RemovableHandle:
    # copies, since the layer that comes next may work in place
    def keep_given(module: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            heard[place] = given[0].clone()

    def keep_returned(module: nn.Module, given: tuple[object, ...], returned: object) -> None:
        if isinstance(returned, tuple) and returned:
            returned = returned[0]
        if isinstance(returned, Tensor):
            heard[place] = returned.clone()

    if place.before:
        return module.register_forward_pre_hook(keep_given)
    return module.register_forward_hook(keep_returned)
