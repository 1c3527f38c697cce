"""`understudy methods` and `understudy layers`. Imported by `cli.py`; heavy imports stand inside the commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from understudy.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from understudy.distillation.layers import Head, Layer
    from understudy.distillation.methods import Method
    from understudy.record import InputSpec, Role

_WIDEST = 110
"""Columns: longer lines are hard to read."""


def add(app: typer.Typer) -> None:
    """Give the commands `methods` and `layers` to an application."""
    app.command()(methods)
    app.command()(layers)


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain one, or several joined by +.", metavar="[NAME]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/methods.md.")] = False,
) -> None:
    """List the distillation methods, or explain one: equation, defaults, needs, when it helps, how to use it."""
    from understudy import methodtexts
    from understudy.distillation import methods as table

    if as_markdown:
        if name or as_json:
            raise ConfigError("--markdown prints the page of all methods; give neither a name nor --json with it.")
        print(methodtexts.markdown(), end="")
        return
    chosen = table.split(name) if name else list(table.METHODS.values())
    if as_json:
        print(json.dumps([methodtexts.as_dict(method) for method in chosen], indent=1))
    else:
        _print(*([_explained(method) for method in chosen] if name else [_listed()]))


def _print(*parts: RenderableType) -> None:
    """Print at most `_WIDEST` columns, without the blanks that tables are filled up with."""
    from understudy.display import Screen

    screen = Screen()
    with screen.capture() as shown:
        for part in parts:
            screen.print(part, width=min(screen.width, _WIDEST), highlight=False, markup=False, emoji=False)
    for line in shown.get().splitlines():
        print(line.rstrip())


def _listed() -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from understudy import methodtexts
    from understudy.distillation.methods import FAMILIES, METHODS

    wide = max(map(len, METHODS))
    parts: list[RenderableType] = []
    for family, rows in FAMILIES.items():
        table = _grid(wide)
        for row in rows:
            about = Text.assemble(row.summary, ("\n" + methodtexts.in_short(row), "dim"))
            table.add_row(Text(row.name, style="bold"), about)
        parts += [Text(family.capitalize(), style="bold underline"), table, Text()]
    ways = "Explained by: understudy methods NAME. Used by: understudy distill DATA --method NAME, or NAME+NAME."
    return Group(*parts, Text(ways))


def _explained(method: Method) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from understudy import methodtexts

    title = Text.assemble((method.name, "bold"), f" ({methodtexts.family_of(method)}): {method.summary}")
    whole = f"It stands beside the cross-entropy with the labels: {methodtexts.objective(method)}."
    return Group(
        title,
        Padding(Text(method.equation), (1, 0, 1, 4)),
        Text(whole + "\n"),
        _pairs(methodtexts.facts(method)),
        Text("\nOn the command line, with the weights of its authors or beside another method:", style="bold"),
        *(Padding(Text(line), (0, 0, 0, 4)) for line in methodtexts.command_lines(method)),
        Text("\nIn a file for --config, with all that it takes:", style="bold"),
        Padding(Text(methodtexts.settings(method)), (0, 0, 1, 4)),
        _pairs(methodtexts.hints(method)),
        Text(),
    )


def _pairs(said: Mapping[str, str]) -> Table:
    from rich.text import Text

    table = _grid(max(map(len, said)))
    for heading, text in said.items():
        table.add_row(Text(heading, style="bold"), Text(text))
    return table


def _grid(wide: int) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=wide)
    table.add_column(overflow="fold")
    return table


@dataclass(frozen=True)
class _Network:
    """A network and what a run of it showed."""

    title: str
    layers: list[Layer]
    stages: list[Layer]
    head: Head | None

    def name(self, layer: Layer) -> str:
        """Return the shortest name by which a layer is found: without what the network is wrapped in."""
        from understudy.distillation.layers import find

        short = layer.name.removeprefix("net.")
        return short if find(self.layers, short).name == layer.name else layer.name


def layers(
    model: Annotated[str, typer.Argument(help="As for --student, or a model file or run folder.", metavar="MODEL")],
    teacher: Annotated[str | None, typer.Option("--with", help="A teacher: show which layers are paired.")] = None,
    size: Annotated[
        int, typer.Option("--size", "--image-size", help="Side in pixels of the images; files say their own.", min=1)
    ] = 64,
    channels: Annotated[int, typer.Option(help="1 or 3, likewise.", min=1, max=3)] = 3,
    classes: Annotated[int, typer.Option(help="Likewise.", min=2)] = 10,
    every: Annotated[bool, typer.Option("--all", help="List every layer that gives a feature map.")] = False,
) -> None:
    """Show the feature maps and the embedding of MODEL that methods compare, by the names that terms take."""
    from understudy.record import InputSpec

    if channels == 2:
        raise ConfigError("Images have 1 or 3 channels, not 2.")
    middle = (0.5,) * channels
    spec = InputSpec(channels=1 if channels == 1 else 3, sizes=(size,), mean=middle, std=middle)
    names = [str(number) for number in range(classes)]
    student = _network(model, spec, names)
    _print(_shown(student, every))
    if teacher is not None:
        other = _network(teacher, spec, names, prefer="teacher")
        _print(_shown(other, every))
        _print_pairs(student, other)


def _network(text: str, spec: InputSpec, classes: Sequence[str], *, prefer: Role | None = None) -> _Network:
    """Run a network once: loaded where the text names a file or a run, else with initial weights."""
    import torch

    from understudy.distillation.layers import head, stages, trace
    from understudy.models import build, files

    if build.kind(text) in ("file", "run"):
        model, _ = files.load(text, prefer=prefer)
    else:
        model = build.build(text, classes=classes, spec=spec, seed=0)
    sees = model.spec
    images = torch.zeros(2, sees.channels, sees.size, sees.size)
    ran = trace(model, images)
    title = f"{text}: images of {sees.channels} x {sees.size} x {sees.size}, {len(model.classes)} classes"
    return _Network(title, ran, stages(ran), head(model, images))


def _shown(network: _Network, every: bool) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from understudy.report.screen import plain

    maps = {layer.name: layer for layer in network.layers if layer.kind != "vector"}
    table = _table("Layer" if every else "Stage", "Kind", "Channels", "Side", *(["Stage"] if every else []))
    for layer in maps.values() if every else network.stages:
        mark = ["yes" if layer in network.stages else ""] if every else []
        table.add_row(Text(plain(network.name(layer))), layer.kind, str(layer.channels), str(layer.side), *mark)
    none = Text("No layer gives a feature map: choose methods that compare logits or embeddings.")
    return Group(Text(plain(network.title), style="bold"), table if maps else none, Text(_embedding(network)), Text())


def _embedding(network: _Network) -> str:
    if network.head is None:
        return "Embedding: none, since no final linear layer yields the logits."
    return f"Embedding: what '{network.head.name.removeprefix('net.')}' is given, {network.head.width} values."


def _print_pairs(student: _Network, teacher: _Network) -> None:
    from rich.text import Text

    from understudy.distillation.layers import pair
    from understudy.methodtexts import flow
    from understudy.report.screen import plain

    pairs = pair(student.stages, teacher.stages)
    if not pairs:
        _print(Text("No pairs: one of the networks has no feature maps."))
        return
    table = _table("Student's", "Map", "Teacher's", "Map")
    for one, other in pairs:
        table.add_row(Text(student.name(one)), _size(one), Text(teacher.name(other)), _size(other))
    _print(Text("Pairs that are compared where none are named", style="bold"), table)
    named = flow([[student.name(one), teacher.name(other)] for one, other in pairs])
    print(plain(f"layers: {named}"))  # one line, to be copied


def _size(layer: Layer) -> str:
    return f"{layer.channels} x {layer.side} x {layer.side}"


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        number = head in ("Channels", "Side")
        table.add_column(head, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table
