"""A run in several processes, as `accelerate launch` and torchrun start them: one leads, the others follow.

The main process owns the run folder; it alone writes, prints and judges. For a training, and for the teacher's outputs
before it, it calls the others, which do the same work on their share of the images. `api.py` calls `leading` in the
main process and `follow` in the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from understudy import engine
from understudy.config import validate
from understudy.engine import Channel
from understudy.errors import Interrupted, RunError, TrainingError, UnderstudyError
from understudy.launch import launched
from understudy.pipeline import trainings
from understudy.pipeline.folder import Order, Run
from understudy.pipeline.materials import Materials, gather
from understudy.progress import silent

_DONE, _FAILED = "done", "failed"
_LINGER = 2.0  # seconds that the others outlive a main process that fails: it must speak before the launcher ends all
_LONG, _SHORT = 60.0, 3.0  # seconds that the main process waits for the others to leave: all is well, or is not


class MainProcessError(RunError):
    """The main process ended the run early; it says why, so whoever follows need not."""


def follows() -> bool:
    """Tell whether this process follows another one."""
    return launched()[0] > 0


@contextmanager
def leading() -> Iterator[Callable[[Order], None]]:
    """Lead the other processes, where there are any: yields what calls them to a training. They are told of the end.

    Raises:
        UnderstudyError: the processes cannot meet, or another one has gone.
    """
    if launched()[1] == 1:
        yield lambda order: None
        return
    channel = engine.join()
    try:
        yield lambda order: _call(channel, order)
    except BaseException as error:
        channel.say(_FAILED)
        channel.see_off(_SHORT)
        if engine.is_loss_of_a_process(error):
            raise RunError(
                "Another process of this run has ended early; see what it said. What was finished is kept: start the "
                "same command again."
            ) from error
        raise
    channel.say(_DONE)
    channel.see_off(_LONG)


def follow(stop: Callable[[], bool] = lambda: False) -> None:
    """Take part in what the main process calls for, until it says that the run is over. Writes and prints nothing.

    Args:
        stop: asked during training; where one process says so, all stop.

    Raises:
        MainProcessError: the main process ended the run early.
        Interrupted: the training that went on was stopped, in all processes.
        UnderstudyError: something that went wrong in this process alone.
    """
    try:
        channel = engine.join()
    except UnderstudyError as error:  # nor could the main process join
        time.sleep(_LINGER)
        raise MainProcessError(str(error)) from error
    follower = _Follower(stop)
    try:
        while (said := channel.hear()) not in (_DONE, _FAILED):
            follower.obey(Order.model_validate_json(said))
        channel.leave()
    except RuntimeError as error:
        if not engine.is_loss_of_a_process(error):
            raise
        said = _FAILED
    if said == _FAILED:
        time.sleep(_LINGER)
        raise Interrupted if follower.interrupted else MainProcessError("The main process has ended the run early.")


def _call(channel: Channel, order: Order) -> None:
    """Call the others to a training, and wait until all are ready for it."""
    channel.say(order.model_dump_json())
    for rank, trouble in enumerate(engine.agree("")):
        if trouble:
            raise RunError(f"Process {rank} cannot take part: {trouble}")


class _Follower:
    """What a process that follows keeps from one order to the next."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.interrupted = False
        self._stop = stop
        self._materials: Materials | None = None

    def obey(self, order: Order) -> None:
        """Carry out an order, unless one of the processes is not ready for it."""
        run = _Following(order.folder, validate(order.record.config), order.record, silent, self._stop)
        trouble = ""
        try:
            self._materials = self._materials or _gather(run)
        except UnderstudyError as error:
            trouble = str(error)
        if any(engine.agree(trouble)) or self._materials is None:
            return
        try:
            trainings.take_part(run, self._materials, order.name)
        except TrainingError:
            pass  # all processes see the same loss, and the main one says so
        except Interrupted:
            self.interrupted = True


class _Following(Run):
    """A run as a process sees it that follows: every stage is to be done, and nothing to be written."""

    def stage(self, name: str, inputs: dict[str, Any], outputs: Iterable[str], work: Callable[[], None]) -> None:
        """Do the stage."""
        work()

    def save(self) -> None:
        """Leave the record to the main process."""

    def log(self, text: str) -> None:
        """Leave the log to the main process."""


def _gather(run: Run) -> Materials:
    """Return the same materials as those of the main process."""
    known = run.record.data.fingerprint if run.record.data else ""
    materials = gather(run)
    if materials.store.fingerprint != known:
        raise RunError(f"it sees other images in {run.config.data.source} than the main process does.")
    return materials
