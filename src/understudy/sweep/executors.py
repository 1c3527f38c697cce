"""Who carries out trials: this process, several processes of this machine, or (in `cluster.py`) Ray. One interface.

The same trials give the same outcomes wherever they run, if each has the same number of threads.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from understudy.errors import Interrupted, RunError
from understudy.sweep.stacks import Stacks
from understudy.sweep.trials import Outcome, Reply, Trial, forget, outcome_of

Stop = Callable[[], bool]
Tell = Callable[[str, float], None]
"""Told the name of a trial and the share of it that is done."""
_LOOK_SECONDS = 0.2


class Executor(Protocol):
    """Carries out trials while its `with` block lasts."""

    def __enter__(self) -> Self:
        """Get ready."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of all processes; those still at work stop with a checkpoint."""

    def __str__(self) -> str:
        """Say in words who carries out the trials."""

    def run(self, trials: Iterable[Trial]) -> Iterator[Outcome]:
        """Yield the outcome of each trial as it is completed, in any order.

        Raises:
            Interrupted: the user asked to stop; finished trials and checkpoints are kept.
            UnderstudyError: a trial met what the user can mend.
        """


class InProcess:
    """Trials one after another in this process, or several at once where `stacks` says so.

    Args:
        stacks: groups trials, and carries out each group.
        stop: asked after each step.
        tell: told how far trials are.
    """

    def __init__(self, stacks: Stacks, *, stop: Stop, tell: Tell) -> None:
        self._stacks, self._stop, self._tell = stacks, stop, tell

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        forget()

    def __str__(self) -> str:
        together = self._stacks.largest
        return "one process" if together == 1 else f"one process, up to {together} students together"

    def run(self, trials: Iterable[Trial]) -> Iterator[Outcome]:
        """Yield the outcomes group by group; as for `Executor`."""
        for group in self._stacks.groups(trials):
            if self._stop():
                raise Interrupted
            yield from self._stacks.carry_out(group, self._stop, self._share)

    def _share(self, task: str, /, *, done: int, total: int, note: str = "") -> None:
        self._tell(task, done / max(total, 1))


class LocalProcesses:
    """Trials side by side in processes of this machine.

    Args:
        workers: how many.
        threads: of each; for libraries that read it from the environment.
        stop: asked a few times a second.
        tell: told how far trials are.
        log: what the processes print goes there.
    """

    def __init__(self, workers: int, *, threads: int, stop: Stop, tell: Tell, log: Path) -> None:
        self._workers, self._threads = workers, threads
        self._stop, self._tell, self._log = stop, tell, log
        self._crew: list[_Worker] = []
        self._heard: queue.SimpleQueue[tuple[_Worker, str]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._crew:
            worker.dismiss()
        try:
            if not isinstance(error, KeyboardInterrupt):
                self._wait()
        finally:
            for worker in self._crew:
                worker.process.kill()  # nothing happens to one that has ended
                worker.process.wait()

    def __str__(self) -> str:
        return f"{self._workers} processes"

    def run(self, trials: Iterable[Trial]) -> Iterator[Outcome]:
        """Yield the outcomes as they come; as for `Executor`."""
        waiting = deque(trials)
        while len(self._crew) < min(self._workers, len(waiting)):
            self._crew.append(_Worker(self._heard, self._log, self._threads))
        for worker in self._crew[: len(waiting)]:
            worker.give(waiting.popleft())
        while any(worker.trial for worker in self._crew):
            worker, reply = self._next()
            if reply.outcome or reply.trouble or reply.fault:
                worker.trial = None
                outcome = outcome_of(reply)
                if waiting:
                    worker.give(waiting.popleft())
                yield outcome
            elif worker.trial:
                self._tell(worker.trial.name, reply.share)

    def _next(self) -> tuple[_Worker, Reply]:
        while not self._stop():
            try:
                worker, line = self._heard.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if not line:
                raise RunError(
                    "A process of the sweep has died, perhaps for want of memory. What was finished is kept; go on "
                    f"with fewer at a time (--workers). What it printed is in {self._log}."
                )
            return worker, Reply.model_validate_json(line)
        raise Interrupted

    def _wait(self) -> None:
        """Let every process write its checkpoint and end."""
        for worker in self._crew:
            worker.process.wait()


class _Worker:
    """One process, and the thread that hears it."""

    def __init__(self, heard: queue.SimpleQueue[tuple[_Worker, str]], log: Path, threads: int) -> None:
        surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "understudy.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env={**surroundings, "OMP_NUM_THREADS": str(threads)},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the parent, which then ends the input
            )
        self.trial: Trial | None = None
        threading.Thread(target=self._listen, args=(heard, self.process.stdout), daemon=True).start()

    def _listen(self, heard: queue.SimpleQueue[tuple[_Worker, str]], out: IO[str]) -> None:
        for line in out:
            heard.put((self, line))
        out.close()
        heard.put((self, ""))

    def give(self, trial: Trial) -> None:
        """Hand over a trial."""
        self.trial = trial
        assert self.process.stdin is not None
        with suppress(OSError):  # it has died, as its output will say
            print(trial.model_dump_json(), file=self.process.stdin, flush=True)

    def dismiss(self) -> None:
        """End its input: it stops at the next step, with a checkpoint."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
