"""Named tensors in files: safetensors, pickles only where a flag allows them. `build.py` and `files.py` use it.

No knowledge of architectures here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from understudy import storage
from understudy.errors import ModelError
from understudy.models.foreign import quote

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def of(net: nn.Module) -> dict[str, Tensor]:
    """Return copies on the CPU of all that a network's `state_dict` holds; tied tensors are copied apart.

    Raises:
        ModelError: the network keeps something else than tensors.
    """
    state: dict[str, Any] = net.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"The network keeps '{name}', a {type(value).__name__}; only tensors can be saved.")
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    storage.write_bytes(path, to_bytes(dict(tensors), metadata={"format": "pt"}))


def read(path: Path, *, unsafe_pickle: bool = False) -> dict[str, Tensor]:
    """Read a file of named tensors.

    Args:
        path: safetensors, or a pickle by torch (`.pt`, `.pth`, ...).
        unsafe_pickle: allow pickles, which can run any code when they are loaded.

    Raises:
        ModelError: no such file, a damaged one, or a pickle that is not allowed.
    """
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.")
    if is_pickle(path):
        if not unsafe_pickle:
            raise ModelError(
                f"{path} is a pickle, which can run any code when loaded. Convert it to safetensors, "
                "or allow it with --unsafe-pickle if you trust its source."
            )
        return _read_pickle(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged, cut short or not a safetensors file ({quote(error)}).") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error}).") from None


def is_pickle(path: Path) -> bool:
    """Tell whether a file is a pickle (of torch), by its name or its first bytes."""
    if path.suffix.lower() in PICKLES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # torch.save writes a zip archive or a bare pickle; safetensors starts with 8 bytes of length, which may look like
    # a pickle's first two, and then a brace
    return start[8:] != b"{" and start.startswith((b"PK\x03\x04", b"\x80"))


def fingerprint(net: nn.Module) -> str:
    """Return 32 hexadecimal digits that name the weights: names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(of(net).items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what keeps `tensors` from fitting a network: name of the tensor to a few words."""
    own = {name: value.shape for name, value in net.state_dict().items()}
    found = {name: f"'{name}' is missing in the file" for name in own if name not in tensors}
    found |= {name: f"'{name}' is in the file only" for name in tensors if name not in own}
    return found | {
        name: f"'{name}' is {list(tensors[name].shape)} in the file and {list(shape)} in the network"
        for name, shape in own.items()
        if name in tensors and tensors[name].shape != shape
    }


def first_few(differences: Mapping[str, str]) -> str:
    """Return the first three differences in words, and how many more there are."""
    words = list(differences.values())
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        value = _read_any_pickle(path)
    if isinstance(value, nn.Module):
        value = value.state_dict()
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not all(isinstance(one, Tensor) for one in value.values()) or not value:
        raise ModelError(f"{path} holds a {type(value).__name__}; named tensors (a state_dict) are needed.")
    return dict(value)


def _read_any_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ModelError(f"{path} is damaged or not a file of torch.save ({quote(error)}).") from error
