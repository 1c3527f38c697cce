"""Weights spread over several processes by PyTorch's FSDP2: each holds a part of every weight. Torch only.

What the launcher asks for is read from the environment, where `accelerate launch --use_fsdp` writes it. Imported by
`engine.py`, and by `snapshot.py` and `train.py`, which need weights whole again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from understudy.errors import ConfigError

Network = TypeVar("Network", bound=nn.Module)

_TRUE = ("true", "1", "yes")
_UNIT = 100_000  # weights: gathering fewer at once costs more time than it spares memory
# What of accelerate's FSDP can be said here, by variable: the values that change nothing, or that are obeyed below.
# What Transformers alone reads is not looked at.
_ACCEPTED = {
    "FSDP_SHARDING_STRATEGY": ("FULL_SHARD", "1"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "false"),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_AUTO_WRAP_POLICY": ("SIZE_BASED_WRAP", "NO_WRAP"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (),
    "FSDP_BACKWARD_PREFETCH": ("BACKWARD_PRE",),
    "FSDP_FORWARD_PREFETCH": ("false",),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT",),
    "FSDP_USE_ORIG_PARAMS": ("true",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_IGNORED_MODULES": (),
}


@dataclass(frozen=True)
class Sharding:
    """How weights are spread."""

    reshard: bool = True
    """Let go of gathered weights after the forward pass, and gather them again for the backward pass."""
    unit: int | None = _UNIT
    """Weights that a part of a network must hold to be gathered on its own; None gathers the whole network at once."""


def requested() -> Sharding | None:
    """Return how the launcher asks for weights to be spread; None where it does not ask.

    Raises:
        ConfigError: it asks for a version or an option of FSDP that there is not here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in _TRUE:
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP is offered in its version 2: add --fsdp_version 2, or set FSDP_VERSION=2.")
    for name, accepted in _ACCEPTED.items():
        said = os.environ.get(name)
        if said is not None and said.lower() not in (value.lower() for value in accepted):
            instead = f"set it to {' or '.join(accepted)}, or leave it out" if accepted else "leave it out"
            raise ConfigError(f"FSDP is not offered with {name}={said}: {instead}.")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()
    units = {"NO_WRAP": None, "SIZE_BASED_WRAP": _least()}
    return Sharding(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true", units.get(policy, _UNIT))


def _least() -> int:
    """Return what a part of a network must hold for accelerate's SIZE_BASED_WRAP."""
    said = os.environ.get("FSDP_MIN_NUM_PARAMS", str(_UNIT))
    try:
        return int(said)
    except ValueError:
        raise ConfigError(f"FSDP_MIN_NUM_PARAMS is a number of weights, not '{said}'.") from None


def spread(network: nn.Module, mesh: DeviceMesh, how: Sharding) -> None:
    """Spread the weights of a network over the processes of a mesh, in place; all must call it.

    All begin with the weights and buffers of the first process. An optimizer is to be made afterwards. What is spread
    already inside the network stays as it is.
    """
    plain = [weight for weight in network.parameters() if not isinstance(weight, DTensor)]
    equalise([*plain, *network.buffers()])
    for weight in plain:
        weight.data = weight.data.contiguous()  # FSDP takes no other layout; images may still have channels last
    frozen = not any(weight.requires_grad for weight in network.parameters())
    for unit in units(network, how.unit):
        fully_shard(unit, mesh=mesh, reshard_after_forward=how.reshard)
    # the last weights of a forward pass are the first of the backward pass, which a frozen network has not
    fully_shard(network, mesh=mesh, reshard_after_forward=how.reshard if frozen else None)


def equalise(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values of the first process, in place; all must call it."""
    with torch.no_grad():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def units(network: nn.Module, least: int | None) -> list[nn.Module]:
    """Return the parts of a network that are gathered one after another, inner ones before those around them.

    They are members of sequences and of lists, which run as a whole: of others, such as the last layer of torch's
    attention, the weights alone may be taken. Each holds at least `least` weights that no part inside it holds.
    """
    named = sum(1 for _ in network.named_parameters(remove_duplicate=False))
    if least is None or named > len(list(network.parameters())):  # a weight in two places belongs to no part
        return []
    members = {
        member
        for parent in network.modules()
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for member in parent.children()
        if not isinstance(member, nn.ModuleList | nn.ModuleDict)
    }
    found: list[nn.Module] = []
    taken: set[nn.Parameter] = {weight for weight in network.parameters() if isinstance(weight, DTensor)}
    for module in reversed(list(network.modules())):
        own = set(module.parameters()) - taken
        if module in members and sum(weight.numel() for weight in own) >= least:
            found.append(module)
            taken |= own
    return found


def hollow(network: Network) -> Network:
    """Return a copy of a network whose weights take no memory, to be filled by `fill`."""
    empty = {id(weight): nn.Parameter(weight.to("meta"), weight.requires_grad) for weight in network.parameters()}
    return copy.deepcopy(network, memo=dict(empty))


def fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a hollow network weights and buffers, by name, in place."""
    network.load_state_dict(tensors, assign=True)


@torch.no_grad()
def whole(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return tensors whole: those that are spread gathered in main memory, others as they are.

    All processes must call it where some are spread; with `keep` false for the others' sake only, and nothing is
    returned.
    """
    found = {}
    for name, tensor in tensors.items():
        gathered = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = gathered
    return found


def like(tensor: Tensor, pattern: Tensor | None) -> Tensor:
    """Return a whole tensor, which every process holds, spread as another one of its shape is; as it is otherwise."""
    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)
