"""Trials on a Ray cluster; the only file that imports ray, which is an extra.

The machines of the cluster must share the run folder and the cache.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from understudy.errors import ConfigError, Interrupted, RunError
from understudy.storage import cache_dir
from understudy.sweep.executors import Stop
from understudy.sweep.trials import Outcome, Reply, Trial, outcome_of, reply_to

_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 10.0


class RayTrials:
    """Trials as tasks of a Ray cluster, as many at a time as its cores and GPUs allow.

    Args:
        address: of the cluster; "local" starts one on this machine and ends it afterwards.
        threads: CPU threads, and so cores, of each trial.
        gpu: whether a trial takes a GPU.
        stop: asked a few times a second.
        flag: a file that is written to stop all trials at their next step.

    Raises:
        ConfigError: ray is not installed.
    """

    def __init__(self, address: str, *, threads: int, gpu: bool, stop: Stop, flag: Path) -> None:
        self._ray = library()
        self._address, self._threads, self._gpu = address, threads, gpu
        self._stop, self._flag = stop, flag
        self._ours = False

    def __enter__(self) -> Self:
        self._flag.unlink(missing_ok=True)
        if not self._ray.is_initialized():
            self._connect()
            self._ours = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            self._ray.shutdown()
        self._flag.unlink(missing_ok=True)

    def __str__(self) -> str:
        return f"Ray ({self._address})"

    def run(self, trials: Iterable[Trial]) -> Iterator[Outcome]:
        """Yield the outcomes as they come; as for `Executor`."""
        options = {"num_cpus": self._threads, "num_gpus": int(self._gpu)}
        task = self._ray.remote(**options)(carry_out_there)
        waiting = [task.remote(trial.model_dump_json(), str(self._flag), str(cache_dir())) for trial in trials]
        while waiting:
            ready, waiting = self._ray.wait(waiting, timeout=_LOOK_SECONDS)
            for reference in ready:
                yield outcome_of(self._reply(reference))
            if self._stop():
                self._end(waiting)
                raise Interrupted

    def _reply(self, reference: Any) -> Reply:
        try:
            return Reply.model_validate_json(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"Ray could not carry out a trial ({first}). What was finished is kept: start the same command again."
            ) from error

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        quiet = {"log_to_driver": False, "configure_logging": False}
        try:
            if self._address == "local":
                self._ray.init(address="local", include_dashboard=False, **quiet)
            else:
                self._ray.init(address=self._address, **quiet)
        except (ConnectionError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"There is no Ray cluster at '{self._address}' ({first}).") from None

    def _end(self, waiting: list[Any]) -> None:
        """Let every trial that has begun write its checkpoint."""
        self._flag.parent.mkdir(parents=True, exist_ok=True)
        self._flag.touch()
        if waiting:
            self._ray.wait(waiting, num_returns=len(waiting))


def carry_out_there(text: str, flag: str, cache: str) -> str:
    """Carry out a trial in a process of the cluster: a `Trial` and its `Reply`, as JSON."""
    os.environ["UNDERSTUDY_CACHE"] = cache
    stop = flagged(Path(flag))
    reply = Reply(stopped=True) if stop() else reply_to(Trial.model_validate_json(text), stop)
    return reply.model_dump_json()


def flagged(flag: Path) -> Callable[[], bool]:
    """Return a function that tells whether a file is there; it looks once a second at most."""
    looked, found = -math.inf, False

    def stop() -> bool:
        nonlocal looked, found
        if not found and time.monotonic() - looked >= 1:
            looked, found = time.monotonic(), flag.exists()
        return found

    return stop


def library() -> Any:
    """Return ray.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("A sweep on Ray needs an extra library: pip install 'understudy[ray]'.") from None
    return ray


def check(address: str) -> None:
    """Find out whether a cluster can be there at all; Ray itself would try for minutes.

    Raises:
        ConfigError: ray is not installed.
        RunError: nothing answers at an address of the form `host:port`.
    """
    library()
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdigit():
        return  # "local", "auto" and "ray://..." are Ray's to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"There is no Ray cluster at '{address}' ({error}). Start one with: ray start --head") from None
