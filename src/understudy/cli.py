"""The commands. Heavy imports stand inside them, so that `--help` answers at once.

Every mistake that a user can mend ends as one sentence and exit code 1; no traceback reaches the screen.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from understudy import (
    __version__,
    answercommands,
    cachecommands,
    comparing,
    compresscommands,
    exportcommands,
    merging,
    methodcommands,
    options,
    profilecommands,
    recipecommands,
    reruncommands,
    sweeping,
)
from understudy.errors import ConfigError, Interrupted, UnderstudyError
from understudy.launch import Stop, launched

if TYPE_CHECKING:
    from understudy.api import DistillResult
    from understudy.config import RunConfig
    from understudy.pipeline import Plan

app = typer.Typer(
    name="understudy",
    help="Knowledge distillation, whole: from a folder of images to a small model proven on your device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"understudy {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    open_report: options.Open = False,
) -> None:
    """Run the main job on the handwritten digits that ship with scikit-learn: about a minute, no network."""
    from understudy import config

    _run(config.validate(options.DEMO), out, open_report)


@app.command()
def distill(
    data: options.Data = None,
    config: options.Config = None,
    words: options.Words = None,
    teacher: options.Teachers = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="A torchvision or timm name, transformers:KIND, one of ours, or module:function.  [default: cnn3]"
        ),
    ] = None,
    image_size: options.ImageSize = None,
    epochs: options.EpochsOption = None,
    teacher_epochs: Annotated[int | None, typer.Option(help="The teacher's own.  [default: as --epochs]")] = None,
    seeds: Annotated[int | None, typer.Option(help="Students, and baselines, to train.  [default: 3]")] = None,
    method: Annotated[str | None, typer.Option(help="Distillation method.  [default: kd]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Softens the teacher.  [default: 4]")] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the distillation term.  [default: 0.5]")] = None,
    ce_weight: Annotated[float | None, typer.Option(help="Weight of the labels' term, instead of --alpha.")] = None,
    kd_weight: Annotated[float | None, typer.Option(help="Weight of the teacher's term, instead of --alpha.")] = None,
    assistant: options.Assistants = None,
    generations: options.Generations = None,
    batch_size: options.BatchSize = None,
    lr: options.Lr = None,
    weight_decay: options.WeightDecay = None,
    clip_norm: options.ClipNorm = None,
    augment: options.Augment = None,
    views: options.Views = None,
    mix: options.Mix = None,
    teacher_ready: Annotated[
        bool, typer.Option("--teacher-ready", help="The model is trained: do not train it.")
    ] = False,
    pretrained: options.Pretrained = False,
    teacher_weights: options.TeacherWeights = None,
    out: options.Out = None,
    name: options.Name = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    max_bad_share: options.MaxBadShare = None,
    val_fraction: options.ValFraction = None,
    label_share: options.LabelShare = None,
    no_unlabelled: options.NoUnlabelled = False,
    min_gain: Annotated[
        float | None, typer.Option(help="Smallest gain worth having, as a share.  [default: 0.005]")
    ] = None,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
    force: options.Force = False,
    unsafe_pickle: options.UnsafePickle = False,
    track: options.Track = None,
    log_weights: options.LogWeights = False,
    open_report: options.Open = False,
    dry_run: options.DryRun = False,
    as_json: options.DryJson = False,
) -> None:
    """Take DATA to a proven student: teacher, baseline, student, verdict, exported file, report."""
    given = {
        "name": name,
        "data": options.data(
            data, image_size, data_dir, download, max_bad_share, val_fraction, label_share, no_unlabelled
        ),
        "teacher": options.teacher(teacher, teacher_epochs, teacher_ready, pretrained, teacher_weights),
        "student": {"model": student},
        "train": options.train(epochs, batch_size, lr, weight_decay, clip_norm, augment, views, mix),
        "distill": {
            "method": method,
            "temperature": temperature,
            "alpha": alpha,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "assistants": assistant,
            "generations": generations,
        },
        "seeds": seeds,
        "min_gain": min_gain,
        **options.machine(device, precision, threads, force, unsafe_pickle),
        **options.tracking(track, log_weights),
    }
    if as_json and not dry_run:
        raise ConfigError("--json prints what --dry-run finds: give both, or neither.")
    if not dry_run:
        return _run(_load(config, given, words), out, open_report)
    from understudy import api
    from understudy.display import Display, Screen

    with Display(Screen(stderr=True)) as display:
        found = api.dry_run(_load(config, given, words), out, progress=display)
    return print(json.dumps(found.as_dict(), indent=1) if as_json else found.text())


@app.command()
def train(
    data: options.Data = None,
    config: options.Config = None,
    words: options.Words = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A torchvision or timm name, transformers:KIND, one of ours, or module:function.  [default: resnet18]"
        ),
    ] = None,
    image_size: options.ImageSize = None,
    epochs: options.EpochsOption = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights and order.  [default: 0]")] = None,
    batch_size: options.BatchSize = None,
    lr: options.Lr = None,
    weight_decay: options.WeightDecay = None,
    clip_norm: options.ClipNorm = None,
    augment: options.Augment = None,
    pretrained: options.Pretrained = False,
    weights: Annotated[Path | None, typer.Option(help="Start from weights in a local file.")] = None,
    out: options.Out = None,
    name: options.Name = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    max_bad_share: options.MaxBadShare = None,
    val_fraction: options.ValFraction = None,
    device: options.Device = None,
    precision: options.Precision = None,
    threads: options.Threads = None,
    force: options.Force = False,
    unsafe_pickle: options.UnsafePickle = False,
    track: options.Track = None,
    log_weights: options.LogWeights = False,
    open_report: options.Open = False,
) -> None:
    """Train one model alone, as a teacher for later."""
    given = {
        "name": name,
        "data": options.data(data, image_size, data_dir, download, max_bad_share, val_fraction),
        "teacher": {"model": model, "seed": seed, "pretrained": pretrained or None, "weights": weights},
        "train": options.train(epochs, batch_size, lr, weight_decay, clip_norm, augment),
        **options.machine(device, precision, threads, force, unsafe_pickle),
        **options.tracking(track, log_weights),
    }
    _run(_load(config, given, words), out, open_report, kind="train")


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")], open_report: options.Open = False
) -> None:
    """Go on with a run that was stopped, killed or failed."""
    from understudy import api

    _show(lambda **ways: api.resume(run, **ways), open_report, run)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    merge: Annotated[
        list[Path] | None, typer.Option(help="What conformance.py found on a device; may be repeated.", metavar="FILE")
    ] = None,
    open_report: options.Open = False,
) -> None:
    """Make the report of a run anew from its record."""
    from understudy import record as records
    from understudy.display import Screen
    from understudy.report import terminal, write

    if merge:
        merging.merge(run, merge)
    record = records.load(run)
    path = run / "report.html"
    write(record, path)
    Screen().print(terminal(record, report=path))
    if open_report:
        _open(path)


sweeping.add(app, lambda config, given, words, out, open_report: _run(_load(config, given, words), out, open_report))
comparing.add(app, lambda *given: _load(*given), lambda *asked: _run(*asked))
answercommands.add(app)
methodcommands.add(app)
compresscommands.add(app, lambda *shown: _show(*shown))
exportcommands.add(app)
profilecommands.add(app)
recipecommands.add(app)
reruncommands.add(app, lambda *shown: _show(*shown))
app.add_typer(cachecommands.app, name="cache")

# newer typers carry a click of their own, older ones use the installed one: the class is found by way of one of its own
_WrongUsage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a mistake to mend, 2 wrong usage, 70 a fault of ours, 130 stopped."""
    _escape_what_the_terminal_lacks()
    if launched()[1] > 1:  # what torch says of connections that end is no news
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        words = sys.argv[1:]
        for given in (sweeping, comparing, exportcommands, merging, recipecommands):
            words = given.spread(words)
        code = typer.main.get_command(app).main(words, prog_name="understudy", standalone_mode=False)
    except _WrongUsage as error:
        if launched()[0] == 0:
            error.show()
        code = error.exit_code
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        _say("Stopped.")
        code = 130
    except BrokenPipeError:
        # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        sentence, code = _sentence(error)
        _say(sentence)
    sys.exit(code if isinstance(code, int) else 0)


def _escape_what_the_terminal_lacks() -> None:
    """A run must not end because a terminal has no sign for a check mark or a letter in a file's name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    if launched()[0] == 0:  # of several processes, the first speaks for all
        print(text, file=sys.stderr)


def _sentence(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    if isinstance(error, UnderstudyError):
        return f"Error: {error}", 1
    if _memory_is_full(error):
        return "Error: The memory is full. Try a smaller --batch-size or --image-size.", 1
    return _fault(error), 70


def _memory_is_full(error: Exception) -> bool:
    told = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in told or "out of memory" in told


def _fault(error: Exception) -> str:
    """Return the sentence for a fault of ours; the traceback goes to a file."""
    from understudy import storage

    kept = ""
    try:
        path = storage.cache_dir() / "fault.txt"
        storage.write_text(path, f"understudy {__version__}\n{' '.join(sys.argv)}\n{traceback.format_exc()}")
        kept = f" The details for a bug report are in {path}."
    except (OSError, UnderstudyError):
        pass
    first = (str(error).splitlines() or [""])[0]
    return f"Error: a fault in understudy ({type(error).__name__}: {first}).{kept}"


def _load(file: Path | None, given: dict[str, Any], words: list[str] | None) -> RunConfig:
    from understudy import config

    return config.load(file, given, words or [])


def _run(config: RunConfig, out: Path | None, open_report: bool, kind: str = "distill") -> None:
    from understudy import api

    folder = out or api.default_folder(config, "train" if kind == "train" else "distill")
    _show(
        lambda **ways: api.run(config, folder, kind="train" if kind == "train" else "distill", **ways),
        open_report,
        folder,
    )


def _show(work: Callable[..., DistillResult], open_report: bool, folder: Path) -> None:
    """Do the work with progress, plan and a way to stop; print the table."""
    if launched()[0] > 0:
        _follow(work)
        return
    from understudy import engine
    from understudy.display import Display, Screen
    from understudy.report import terminal

    console = Screen()
    begun = time.monotonic()
    stop = Stop(_say)
    with Display(console) as display:

        def announce(plan: Plan) -> None:
            display.pause()
            console.print(plan.text(), markup=False, highlight=False, soft_wrap=True)

        try:
            result = work(progress=display, announce=announce, stop=stop)
        except Interrupted:
            display.pause()
            _say(f"Stopped; all that was done is kept. Go on with: understudy resume {folder}")
            raise typer.Exit(130) from None
    engine.depart()
    console.print(terminal(result.record, report=result.report))
    console.print(f"Finished in {time.monotonic() - begun:.0f} s.", highlight=False)
    if open_report:
        _open(result.report)


def _follow(work: Callable[..., DistillResult]) -> None:
    """Do this process's share of the work; only what goes wrong in it alone is said."""
    from understudy import engine
    from understudy.pipeline.together import MainProcessError

    try:
        work(stop=Stop(_say))
    except MainProcessError:
        raise typer.Exit(1) from None
    except Interrupted:
        raise typer.Exit(130) from None
    except Exception as error:
        sentence, code = _sentence(error)
        print(f"In process {launched()[0]}: {sentence}", file=sys.stderr)
        raise typer.Exit(code) from None
    engine.depart()


def _open(path: Path) -> None:
    import webbrowser

    webbrowser.open(path.resolve().as_uri())


if __name__ == "__main__":
    main()
