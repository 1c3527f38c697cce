"""What networks are given and what they answer: images, or named tensors such as the tokens of sentences.

Used by the distiller and by whatever runs a network that is not ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from understudy.errors import ModelError

Inputs = Tensor | Mapping[str, Tensor]
"""Images [batch, channels, height, width], or tensors by the names of a network's arguments."""


def answer(network: nn.Module, inputs: Inputs) -> Tensor:
    """Run a network once and return its logits [batch, classes].

    Args:
        network: given images as its only argument, or named tensors as keyword arguments.
        inputs: either of them.

    Raises:
        ModelError: no logits to be found in what it returns.
    """
    returned = network(inputs) if isinstance(inputs, Tensor) else network(**inputs)
    return returned if isinstance(returned, Tensor) else logits_of(returned)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Return inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: value.to(device) for name, value in inputs.items()}


def logits_of(answer: object) -> Tensor:
    """Return the logits from whatever a network returns: a tensor, a tuple, or an object or mapping with `logits`.

    torchvision's Inception and GoogLeNet return tuples with auxiliary logits in training mode, Hugging Face's models
    return mappings.

    Raises:
        ModelError: no logits to be found.
    """
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, Mapping):
        found = answer.get("logits")
    elif isinstance(answer, tuple | list):
        found = answer[0] if answer else None
    else:
        found = getattr(answer, "logits", None)
    if not isinstance(found, Tensor):
        raise ModelError(f"The network returns a {type(answer).__name__}; logits [batch, classes] are needed.")
    return found
