"""`understudy cache ls|verify|prune`. Imported by `cli.py`; heavy imports stand inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from understudy import cachefolder, storage
from understudy.errors import ConfigError, UnderstudyError

if TYPE_CHECKING:
    from rich.table import Table

    from understudy.housekeeping import Line

app = typer.Typer(
    help="Look after what is kept between runs: decoded images and teachers' outputs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("ls")
def list_entries(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List what is kept, the least recently used first: it is the first to go when room is needed."""
    from understudy import housekeeping

    folder, limit, lines = storage.cache_dir(), cachefolder.limit(), housekeeping.lines()
    total = sum(line.nbytes for line in lines)
    if as_json:
        told = [line.as_dict() for line in lines]
        print(json.dumps({"folder": str(folder), "bytes": total, "limit": limit, "entries": told}, indent=1))
        return
    from understudy.display import Screen
    from understudy.report.screen import plain

    screen = Screen()
    if lines:
        screen.print(_table(lines))
    text = f"{cachefolder.size_text(total)} of at most {cachefolder.size_text(limit)} in {folder}"
    screen.print(plain(text), markup=False, highlight=False, soft_wrap=True)


@app.command()
def verify(
    run: Annotated[Path | None, typer.Argument(help="Check what is kept for one run folder.", metavar="[RUN]")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged; it is made again.")] = False,
) -> None:
    """Check sizes and checksums of what is kept, and let teachers that are still there answer a sample again."""
    from understudy import housekeeping
    from understudy.display import Display, Screen
    from understudy.report.screen import plain

    screen = Screen()
    with Display(screen) as display:
        checked = housekeeping.verify_run(run, progress=display) if run else housekeeping.verify(progress=display)
    told = [f"{problem.path}: {problem.text}" for problem in checked.problems]
    told += [f"note: {note}" for note in checked.notes]
    told.append(f"{checked.entries} entries checked, {checked.answers} answers of teachers computed again.")
    gone = housekeeping.repair(checked) if repair else []
    told += [f"removed {path}" for path in gone]
    for line in told:
        screen.print(plain(line), markup=False, highlight=False, soft_wrap=True)
    left = {problem.path for problem in checked.problems} - set(gone)
    if left:
        hint = "Is the folder writable?" if repair else "Remove them with understudy cache verify --repair."
        raise UnderstudyError(f"What is kept is damaged in {len(left)} places. {hint}")


@app.command()
def prune(
    max_size: Annotated[
        str | None,
        typer.Option(help=f"Leave at most this, such as 5GB.  [default: the limit, ${cachefolder.LIMIT} or 20GB]"),
    ] = None,
    older_than: Annotated[float | None, typer.Option(help="Remove what was not used for so many days.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
) -> None:
    """Remove what is kept, the least recently used first. Whatever is needed again is made again."""
    from understudy import housekeeping

    if older_than is not None and not older_than >= 0:
        raise ConfigError(f"--older-than takes days, 0 or more, not {older_than:g}.")
    allowed = None if max_size is None else cachefolder.parse_size(max_size, "--max-size")
    if allowed is None and older_than is None and not everything:
        allowed = cachefolder.limit()
    gone = housekeeping.prune(max_bytes=allowed, older_than=older_than, everything=everything)
    freed = cachefolder.size_text(sum(entry.nbytes for entry in gone))
    left = cachefolder.size_text(sum(entry.nbytes for entry in cachefolder.entries()))
    print(f"Removed {len(gone)} entries, {freed}; {left} are left.")


def _table(lines: list[Line]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from understudy.report.screen import plain

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Kind", no_wrap=True)
    table.add_column("What", overflow="fold")
    for head in ("Images", "Views", "Size"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Last used (UTC)", no_wrap=True)
    for line in lines:
        counts = ("" if count is None else f"{count:,}" for count in (line.images, line.views))
        used = line.used[:16].replace("T", " ")
        size = cachefolder.size_text(line.nbytes)
        table.add_row(line.kind, Text(plain(line.what)), *counts, size, used)
    return table
