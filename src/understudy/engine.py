"""Where training runs: device, threads and processes; the only file that imports accelerate.

`accelerate launch` and torchrun start several processes of one command. The first is the main process; the others do
with it what it tells them through a `Channel`. All agree on what they train by way of an `Engine`.
Imported by `train.py`, the pipeline and `api.py`.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import gc
import os
import time
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from understudy import sharding
from understudy.distillation import Distiller
from understudy.distillation.heads import ClassMaps, SoftmaxRegression
from understudy.errors import ConfigError, RunError, TrainingError
from understudy.launch import launched
from understudy.models.norms import share_statistics
from understudy.numerics import Numerics

T = TypeVar("T")

_PATIENCE = datetime.timedelta(hours=12)  # the others wait while the main process measures and judges
_MEETING = datetime.timedelta(minutes=10)
_POLL_SECONDS = 0.05
_PARALLEL = {  # by what a launcher writes into the environment
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and sequence parallelism",
}


class Channel:
    """What the main process says to the others, in order, whenever they come to hear it.

    It lies in the launcher's key-value store: saying never waits, and never meets a half-done operation of tensors.
    """

    def __init__(self, store: Store, others: int) -> None:
        self._store = store
        self._others = others
        self._said = 0
        self._ended = 0

    def say(self, text: str) -> None:
        """Say something to all others."""
        self._store.set(f"said-{self._said}", text)
        self._said += 1

    def hear(self) -> str:
        """Wait for what the main process says next.

        Raises:
            RuntimeError: the main process has gone.
        """
        key = f"said-{self._said}"
        while not self._store.check([key]):
            time.sleep(_POLL_SECONDS)
        self._said += 1
        return str(self._store.get(key).decode())

    def leave(self) -> None:
        """Note that this process has heard the last of a run."""
        self._ended += 1
        self._store.add(f"left-{self._ended}", 1)

    def see_off(self, seconds: float) -> None:
        """Wait until all others have left, or some seconds: the store may end with the main process."""
        self._ended += 1
        end = time.monotonic() + seconds
        while self._store.add(f"left-{self._ended}", 0) < self._others and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


@functools.cache
def join() -> Channel:
    """Meet the other processes; waits for all of them.

    Raises:
        ConfigError: the launcher asks for a way of training that there is not here, or an option of FSDP.
        RunError: the processes cannot find one another.
    """
    found = [name for key, name in _PARALLEL.items() if os.environ.get(key, "false").lower() in ("true", "1", "yes")]
    if found:
        raise ConfigError(
            f"{found[0]} is not offered. Start with accelerate launch --multi_gpu instead, or with --use_fsdp "
            "--fsdp_version 2 where the memory of one device does not suffice."
        )
    sharding.requested()
    if dist.is_initialized():
        raise RunError("torch.distributed is in use already. Call understudy before anything sets it up.")
    rank, world = launched()
    try:
        store, *_ = next(rendezvous("env://", timeout=_MEETING))
    except (ValueError, RuntimeError) as error:
        raise RunError(f"The {world} processes cannot meet ({error}). Start them by accelerate launch.") from error
    channel = Channel(PrefixStore("understudy", store), world - 1)
    # gloo for what is agreed on, so that nothing of it waits for a device
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=_PATIENCE)
    if backend == "gloo":  # its threads must not outlive the interpreter; NCCL may wait for ever after an error
        atexit.register(depart)
    return channel


def depart() -> None:
    """Take leave of the other processes, at the end of a program in which all went well."""
    if dist.is_initialized():
        # a wrapped objective is a cycle that holds the group: gloo's threads end with the group's last holder, and one
        # that still drops a tensor while the interpreter ends aborts the process
        gc.collect()
        dist.destroy_process_group()
    join.cache_clear()


def is_loss_of_a_process(error: BaseException) -> bool:
    """Tell whether an error says that another process has gone; torch has no type of its own for all of these."""
    told = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in told for word in ("gloo/transport", "NCCL", "by peer"))
    )


def agree(text: str) -> list[str]:
    """Return what every process says, in the order of their ranks; all must call it."""
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return said


class Engine:
    """Where training runs.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        threads: of torch on the CPU, for each process; its own choice, all physical cores, where None.

    Raises:
        ConfigError: this machine has no such device, or not enough of them.
    """

    def __init__(self, *, device: str = "auto", threads: int | None = None) -> None:
        _, world = launched()
        if world > 1 and not dist.is_initialized():
            join()
        # Accelerate takes processes without a GPU for single ones, unless it is told that they use the CPU
        self._state = PartialState(cpu=device == "cpu" or (world > 1 and not torch.cuda.is_available()))
        if threads:
            torch.set_num_threads(threads)
        found: torch.device = self._state.device
        self.device = torch.device("cpu") if found.type == "cpu" else found  # with several processes it has a number
        if device != "auto" and self.device.type != device.split(":")[0]:
            raise ConfigError(
                f"This machine offers the device '{self.device.type}', not '{device}'. Leave --device out."
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.device.type == "cuda" and here > torch.cuda.device_count():
            raise ConfigError(
                f"{here} processes on this machine need as many GPUs; there are {torch.cuda.device_count()}. Start "
                "fewer, or take --device cpu."
            )
        self._sharding = sharding.requested()

    @property
    def shard(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self._state.is_main_process)

    @property
    def is_alone(self) -> bool:
        """Whether there is one process only."""
        return self.shard[1] == 1

    @property
    def spreads(self) -> bool:
        """Whether each process holds a part of every weight, so that all must take part in whatever needs them."""
        return self._sharding is not None and not self.is_alone

    def any(self, flag: bool) -> bool:
        """Return whether any process says so; waits for all."""
        return bool(self.total(torch.tensor([int(flag)])).item())

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.is_alone:
            return values
        summed = values.to("cpu", copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def from_main(self, value: T) -> T:
        """Return what the main process gives for `value`."""
        if self.is_alone:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def share_statistics(self, objective: nn.Module) -> None:
        """Let batch normalisation see the batches of all processes as one, in place."""
        if not self.is_alone:
            share_statistics(objective, self.device)

    def spread(self, objective: Distiller) -> None:
        """Spread the weights of student and teacher over the processes, in place, where the launcher asks for it.

        Raises:
            TrainingError: a term looks at the weights of a layer, of which no process holds all.
        """
        if self._sharding is None or self.is_alone:
            return
        if any(isinstance(part, ClassMaps | SoftmaxRegression) for part in objective.modules()):
            raise TrainingError(
                "This method looks at the weights of the last layers, of which FSDP gives each process a part: choose "
                "another one, or start with accelerate launch --multi_gpu."
            )
        mesh = init_device_mesh(self.device.type, (self.shard[1],))
        for network in (objective.teacher, objective.student):
            if network is not None:
                sharding.spread(network, mesh, self._sharding)
        if len(list(objective.parameters())) > len(list(objective.student.parameters())):  # it trains more of its own
            sharding.spread(objective, mesh, self._sharding)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return the objective ready for several processes; the objective itself where it needs nothing."""
        if self.is_alone or self.spreads:
            return objective
        place = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(objective, device_ids=place)

    def autocast(self, numerics: Numerics) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""
        return numerics.autocast(self.device)
