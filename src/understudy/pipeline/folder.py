"""`Run`: a run folder with its record, lock and log, and the rule by which a stage is done or skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from understudy import record as records
from understudy import storage
from understudy.config import RunConfig, validate
from understudy.errors import Interrupted, RunError, UnderstudyError
from understudy.launch import launched
from understudy.progress import Progress, silent
from understudy.record import Part, Record, Stage
from understudy.tracking import FILE, Journal, Place, Trackers

Kind = Literal["distill", "train"]
NO_RESULT = frozenset({"name", "force", "checkpoint_seconds", "track", "log_weights"})
"""Settings that change no result."""


class Order(Part):
    """What the main process of several asks the others to do with it: to train one model."""

    folder: Path
    """The run folder."""
    record: Record
    """Of the run so far: configuration, numerics, images, teacher."""
    name: str
    """Of that model."""


def _nobody(order: Order) -> None:
    """Ask no other process: the default."""


class Run:
    """A run folder that this process owns while `opened` lasts.

    Attributes:
        folder: where everything is written.
        config: what was asked for.
        record: what is known so far; `save` writes it.
        progress: told of long work.
        stop: asked by training; True to stop at the next step.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        record: Record,
        progress: Progress,
        stop: Callable[[], bool],
        others: Callable[[Order], None] = _nobody,
    ) -> None:
        self.folder = folder
        self.config = config
        self.record = record
        self.progress = progress
        self.stop = stop
        self._others = others
        self._start = time.monotonic()
        self._before = record.seconds

    @property
    def no_student(self) -> str:
        """The sentence for whoever asks a run for a student in which a teacher was trained alone."""
        return (
            f"{self.folder} trained a teacher alone, so it holds no student. "
            f"Let it teach one: understudy distill DATA --teacher {self.folder}"
        )

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: Path,
        config: RunConfig | None,
        *,
        kind: Kind = "distill",
        progress: Progress = silent,
        stop: Callable[[], bool] = lambda: False,
        others: Callable[[Order], None] = _nobody,
    ) -> Iterator[Run]:
        """Own a run folder: a new one, or one with the same configuration, which then goes on.

        Args:
            folder: the run folder.
            config: what is asked for; None takes what the folder holds.
            kind: of a new run.
            progress: told of long work.
            stop: asked by training.
            others: asks the other processes, where there are any, to take part in a training.

        Raises:
            RunError: the folder holds another run or other files, or another process owns it.
        """
        _refuse_strangers(folder, resumes=config is None)
        with storage.own(folder):
            for torn in folder.rglob(".*.tmp"):  # a process was killed while it wrote
                torn.unlink(missing_ok=True)
            run = cls(folder, *_enter(folder, config, kind), progress, stop, others)
            try:
                yield run
            except BaseException as error:
                run.fail(error)
                raise
            run.finish()

    def save(self) -> None:
        """Write the record."""
        self.record.seconds = self._before + time.monotonic() - self._start
        records.save(self.record, self.folder)

    def log(self, text: str) -> None:
        """Add a line to `log.txt`."""
        with (
            storage.disk_errors(self.folder / "log.txt"),
            (self.folder / "log.txt").open("a", encoding="utf-8") as file,
        ):
            file.write(f"{records.now()} {text}\n")

    def warn(self, text: str) -> None:
        """Say in the log, and on the screen, what the user should know."""
        self.log(text)
        self.progress("note", done=1, total=1, note=text)

    def call(self, name: str) -> None:
        """Call the other processes, where there are any, to train a model together with this one.

        Raises:
            RunError: another process cannot take part.
        """
        self._others(Order(folder=self.folder.absolute(), record=self.record, name=name))

    def journal(self, name: str, seed: int, checkpoint: Path, *, looks: bool = True) -> Journal:
        """Return what is told how a training goes: a file in the folder of its checkpoint, and trackers.

        Args:
            name: of the training.
            seed: likewise.
            checkpoint: whose name tells what the training depends on.
            looks: whether parameters and gradients can be looked at.
        """
        config, trackers = self.config, None
        if config.track:
            place = Place(self.folder.absolute(), str(checkpoint.parent.relative_to(self.folder)))
            settings = {"task": name, "seed": seed, **_flat(config.model_dump(mode="json"))}
            trackers = Trackers(config.track, place, key=checkpoint.name, settings=settings, warn=self.warn)
        looks = looks and config.log_weights
        return Journal(checkpoint.parent / FILE, task=name, seed=seed, trackers=trackers, looks=looks)

    def key(self, inputs: dict[str, Any]) -> str:
        """Return the fingerprint of what a stage depends on."""
        return storage.fingerprint(inputs)

    def stage(self, name: str, inputs: dict[str, Any], outputs: Iterable[str], work: Callable[[], None]) -> None:
        """Do a stage, unless it was done with the same inputs and its outputs are there.

        Args:
            name: of the stage.
            inputs: JSON-able; all that the result depends on.
            outputs: files, relative to the run folder.
            work: does it and fills the record.

        Raises:
            Interrupted: the user asked to stop before it began.
        """
        key = self.key(inputs)
        done = self.record.stages.get(name)
        if done and done.inputs == key and all((self.folder / output).exists() for output in outputs):
            return
        self.record.stages.pop(name, None)
        self.record.status, self.record.failure = "running", None
        if launched()[1] == 1 and self.stop():  # several processes stop together, in a training
            raise Interrupted
        self.log(f"{name}: started")
        start = time.monotonic()
        work()
        seconds = time.monotonic() - start
        self.record.stages[name] = Stage(inputs=key, seconds=seconds, finished=records.now())
        self.save()
        self.log(f"{name}: finished in {seconds:.1f} s")

    def fail(self, error: BaseException) -> None:
        """Note why the run ended early; what was finished before stays, and so does a run that was done."""
        if self.record.status != "running":
            return
        self.record.status = "failed"
        self.record.failure = str(error) if isinstance(error, UnderstudyError) else "stopped before its end"
        try:
            self.save()
            self.log(f"ended early: {self.record.failure}")
        except (UnderstudyError, OSError):
            pass  # the first error is the one to tell, and the disk may be full

    def finish(self) -> None:
        """Note that all stages are done; a run that was done before stays as it is."""
        if self.record.status != "done":
            self.record.status, self.record.failure = "done", None
            self.save()
            self.log("done")


def _refuse_strangers(folder: Path, *, resumes: bool) -> None:
    if resumes and not (folder / "record.json").exists():
        raise RunError(f"{folder} is not a run folder: it holds no record.json.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file. Choose a folder for the run with --out.")
    if not folder.is_dir() or (folder / "record.json").exists():
        return
    others = [path.name for path in folder.iterdir() if path.name not in (".lock", "config.yaml", "log.txt")]
    if others:
        raise RunError(
            f"{folder} holds files that are no run of ours (such as {others[0]}). Choose another folder with --out."
        )


def _enter(folder: Path, config: RunConfig | None, kind: Kind) -> tuple[RunConfig, Record]:
    known_already = (folder / "record.json").exists()
    if config is None and not known_already:
        raise RunError(f"{folder} is not a run folder: it holds no record.json.")
    record = records.load(folder) if known_already else None
    if config is not None and (record is None or _is_bare(record, folder)):
        return config, begin(folder, config, kind)
    assert record is not None
    known = validate(record.config)
    if config is not None:
        if _core(config) != _core(known) or kind != record.kind:
            raise RunError(
                f"{folder} already holds another run. Choose another folder with --out, or go on with it by "
                f"`understudy resume {folder}`."
            )
        known, record.config = config, config.model_dump(mode="json")
    if record.status != "done":
        record.status = "running"
    return known, record


def _is_bare(record: Record, folder: Path) -> bool:
    """Tell whether a run ended before any of its work was done, as one does that was misconfigured."""
    return not record.stages and not record.models and not any(folder.glob("*/checkpoint-*"))


def _core(config: RunConfig) -> dict[str, Any]:
    """Return what makes a run the run it is: all but settings that change no result."""
    spread = {"data": {"store_budget"}, "sweep": {"workers", "ray", "stacked"}}
    return config.model_dump(exclude={**dict.fromkeys(NO_RESULT, True), **spread})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return settings under names such as `train.lr`; lists as text."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value if isinstance(value, str | int | float) else str(value)
    return found


def begin(folder: Path, config: RunConfig, kind: Kind) -> Record:
    """Write what every run folder starts with; return its record."""
    values = config.model_dump(mode="json")
    storage.write_text(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    record = Record(kind=kind, name=config.name or folder.name, created=records.now(), config=values)
    records.save(record, folder)
    return record
