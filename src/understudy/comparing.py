"""The command `compare`: a table of distillation methods, same data and same budget. Imported by `cli.py`.

A sweep over methods does the work; this file says what it is asked and shows what it found. Heavy imports stand inside
functions, as there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy import options
from understudy.errors import ConfigError

if TYPE_CHECKING:
    from understudy.config import RunConfig

Load = Callable[[Path | None, dict[str, Any], list[str] | None], "RunConfig"]
"""Takes a configuration file, what was given, and `--set` words."""
Start = Callable[["RunConfig", Path, bool], None]
"""Takes a configuration, the run folder, and whether to open the report."""
_ALL = "all"
_LIST = "--methods"


def add(app: typer.Typer, load: Load, start: Start) -> None:
    """Give the command `compare` to an application; it calls `load`, then `start`, with what its options say."""

    @app.command()
    def compare(
        data: options.Data = None,
        methods: Annotated[
            list[str] | None,
            typer.Option(
                _LIST, help="Methods, such as kd dkd kd+attention; or all that suit the data.  [default: all]"
            ),
        ] = None,
        workers: Annotated[
            int | None, typer.Option(help="Trainings at a time.  [default: one for each core, where it pays]")
        ] = None,
        ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Train on a Ray cluster, or local.")] = None,
        markdown: Annotated[Path | None, typer.Option(help="Write the table to this file, as Markdown.")] = None,
        as_json: Annotated[Path | None, typer.Option("--json", help="Write it to this file, as JSON.")] = None,
        config: options.Config = None,
        words: options.Words = None,
        teacher: options.Teacher = None,
        student: Annotated[str | None, typer.Option(help="As for distill.  [default: cnn3]")] = None,
        image_size: options.ImageSize = None,
        epochs: options.EpochsOption = None,
        teacher_epochs: Annotated[int | None, typer.Option(help="The teacher's own.  [default: as --epochs]")] = None,
        seeds: Annotated[int | None, typer.Option(help="Students to train by each method.  [default: 3]")] = None,
        batch_size: options.BatchSize = None,
        lr: options.Lr = None,
        weight_decay: options.WeightDecay = None,
        clip_norm: options.ClipNorm = None,
        augment: options.Augment = None,
        views: options.Views = None,
        mix: options.Mix = None,
        out: options.Out = None,
        name: options.Name = None,
        data_dir: options.DataDir = None,
        download: options.Download = False,
        max_bad_share: options.MaxBadShare = None,
        val_fraction: options.ValFraction = None,
        label_share: options.LabelShare = None,
        no_unlabelled: options.NoUnlabelled = False,
        device: options.Device = None,
        precision: options.Precision = None,
        threads: Annotated[int | None, typer.Option(help="CPU threads of each training.")] = None,
        force: options.Force = False,
        unsafe_pickle: options.UnsafePickle = False,
        open_report: options.Open = False,
    ) -> None:
        """Compare methods on DATA: same budget, same initial weights, ranked on validation images.

        Each method has its own temperature and weights, and half of the objective; the best is judged as distill does.
        """
        given = {
            "name": name,
            "data": options.data(
                data, image_size, data_dir, download, max_bad_share, val_fraction, label_share, no_unlabelled
            ),
            "teacher": {"model": teacher, "epochs": teacher_epochs},
            "student": {"model": student},
            "train": options.train(epochs, batch_size, lr, weight_decay, clip_norm, augment, views, mix),
            "sweep": {"method": named(methods), "workers": workers, "ray": ray},
            "seeds": seeds,
            **options.machine(device, precision, threads, force, unsafe_pickle),
        }
        asked = load(config, given, words)
        folder = out or default_folder(asked)
        start(asked, folder, open_report)
        keep(folder, markdown, as_json)


def named(words: list[str] | None) -> list[str]:
    """Return the methods that words name, each once: one by one, with commas, or all of them.

    Raises:
        ConfigError: no such method; the nearest name is given.
    """
    from understudy.distillation import methods

    given = [value.strip() for word in words or [_ALL] for value in word.split(",") if value.strip()]
    found = [name for value in given for name in (methods.METHODS if value == _ALL else [value])]
    if not found:
        raise ConfigError("No method given: name some after --methods, or all.")
    return list(dict.fromkeys("+".join(method.name for method in methods.split(name)) for name in found))


def default_folder(config: RunConfig) -> Path:
    """Return `runs/<name>`, as for one method with `-compare` behind it where no name is given."""
    from understudy import api

    folder = api.default_folder(config.model_copy(update={"sweep": None}), "distill")
    return folder if config.name else folder.with_name(f"{folder.name}-compare")


def keep(folder: Path, markdown: Path | None = None, as_json: Path | None = None) -> None:
    """Write the table of a finished comparison to files where they are named.

    Raises:
        UnderstudyError: no such run, or a file that cannot be written.
    """
    from understudy import record as records
    from understudy import storage
    from understudy.report import compare

    record = records.load(folder)
    if record.sweep is None:
        raise ConfigError(f"{folder} holds no comparison of methods.")
    if markdown is not None:
        storage.write_text(markdown, compare.markdown(record, record.sweep))
    if as_json is not None:
        storage.write_text(as_json, json.dumps(compare.as_dict(record, record.sweep), indent=1) + "\n")


def spread(words: Sequence[str]) -> list[str]:
    """Join the names that follow `--methods` of `compare` to one value, as the parser wants it; else change nothing.

    The names end with an option, or with what names data: a folder or a built-in data set.
    """
    if "compare" not in words[:1] or _LIST not in words:
        return list(words)
    start = words.index(_LIST) + 1
    end = start
    while end < len(words) and not words[end].startswith("-") and (end == start or not _is_data(words[end])):
        end += 1
    if end == start:  # no value at all: the parser says so
        return list(words)
    return [*words[: start - 1], f"{_LIST}={','.join(words[start:end])}", *words[end:]]


def _is_data(word: str) -> bool:
    from understudy.data.builtin import BUILTIN

    return word in BUILTIN or os.path.isdir(word)
