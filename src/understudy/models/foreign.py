"""Code that is not ours: a user's `module:function` that returns a network. `build.py` calls it.

The function may name any of these arguments; those without a default must be among them.

    num_classes    the number of classes
    classes        their names, in the order that the logits must have
    channels       of the images, 1 or 3 (also as `in_chans`)
    image_size     side in pixels of the square images
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from understudy import storage
from understudy.errors import ModelError, unknown


def quote(error: BaseException) -> str:
    """Return an exception of other people's code in few words: its kind and the first line of its text."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text[:200].rstrip(". ")


def call(text: str, *, classes: Sequence[str], channels: int, size: int) -> nn.Module:
    """Import `module:function`, with the current folder in the search path, and return the network it makes.

    The network is moved to the CPU, in float32.

    Raises:
        ModelError: no such module or function, an argument that is not known here, an exception inside, or something
            returned that is no `nn.Module`.
    """
    module_name, _, name = text.partition(":")
    given = {
        "num_classes": len(classes),
        "classes": tuple(classes),
        "channels": channels,
        "in_chans": channels,
        "image_size": size,
    }
    with _current_folder():
        function = _function(_module(module_name, text), name, text)
        arguments = _arguments(function, given, text)
        try:
            net = function(**arguments)
        except Exception as error:
            raise ModelError(f"'{text}' failed ({quote(error)}).") from error
    if not isinstance(net, nn.Module):
        raise ModelError(f"'{text}' returned a {type(net).__name__}; it must return a torch.nn.Module.")
    return net.to("cpu", torch.float32)


def code_hash(text: str) -> str:
    """Return a hash of the file that `module:function` comes from: the same weights in other code answer differently.

    Empty where there is no such file, as for a module that is compiled. What the file imports is not looked at.
    """
    with _current_folder():
        try:
            found = importlib.util.find_spec(text.partition(":")[0])
        except (ImportError, ValueError):
            return ""
    path = Path(found.origin) if found is not None and found.origin else None
    return storage.hash_file(path) if path is not None and path.is_file() else ""


@contextmanager
def _current_folder() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _module(name: str, text: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ModelError(
                f"There is no module '{name}' for '{text}'. It must be installed or lie in the current folder."
            ) from None
        raise ModelError(f"The module of '{text}' cannot be imported ({quote(error)}).") from error
    except Exception as error:
        raise ModelError(f"The module of '{text}' cannot be imported ({quote(error)}).") from error


def _function(module: ModuleType, name: str, text: str) -> Callable[..., object]:
    function = vars(module).get(name)
    if function is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"'{text}' cannot be used. " + unknown(f"function of '{module.__name__}'", name, own))
    if not callable(function):
        raise ModelError(f"'{text}' is a {type(function).__name__}; it must be a function that returns a network.")
    return function  # type: ignore[no-any-return]


def _arguments(function: Callable[..., object], given: Mapping[str, Any], text: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [one for one in parameters if one.kind not in variadic]
    for one in named:
        positional = one.kind is inspect.Parameter.POSITIONAL_ONLY
        if one.default is inspect.Parameter.empty and (positional or one.name not in given):
            raise ModelError(
                f"'{text}' needs an argument '{one.name}' that is not known here. "
                f"Give it a default; known are {', '.join(given)}."
            )
    return {one.name: given[one.name] for one in named if one.name in given}
