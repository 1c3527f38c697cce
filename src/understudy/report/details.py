"""The lower part of the page: exported files, data, objective, and how all of it came about.

Only the report imports it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import get_args

import yaml

from understudy.record import DataSummary, Environment, Export, Record, Role, Trained
from understudy.report import numbers, roles
from understudy.report.markup import Child, Html, tag
from understudy.report.overview import section
from understudy.report.perclass import scrolling

MOST_CLASSES = 20


def export_section(record: Record) -> Html | None:
    """Build the table of exported files; None where nothing was exported."""
    if not record.exports:
        return None
    heads = ("File", "Size", "Same answer as PyTorch", "Largest difference", "Time per image")
    about = f"The chosen model is {record.chosen}; it was picked on the validation images. " if record.chosen else ""
    text = f"{about}Each file was run again on its own runtime and compared with PyTorch, image by image."
    return section(
        "Exported files", tag("p", None, text), _table(heads, map(_export, record.exports), "Exported files")
    )


def _export(export: Export) -> Sequence[Child]:
    frames, latency = export.on_frames, export.latency
    file = tag("code", None, export.path), _small(f"{export.format}, seed {export.seed}, {export.runtime}")
    same = numbers.percent(frames.agreement), _small(f"of {numbers.count(frames.images, 'image')}")
    largest = f"{frames.max_difference:.1e}", _small(f"tolerated {frames.tolerance:.0e}")
    time = numbers.milliseconds(latency.p50), _small(f"P95 {numbers.milliseconds(latency.p95)}")
    return file, numbers.size(export.bytes), same, largest, time


def _small(text: str) -> Html:
    return tag("small", None, text)


def data_section(record: Record) -> Html | None:
    """Build the counts of images per split and class; None where the data were not read yet."""
    data = record.data
    if data is None:
        return None
    splits = list(data.counts)
    shown = data.classes[:MOST_CLASSES]
    rows: list[Sequence[Child]] = [[name, *_counts(data, splits, [name])] for name in shown]
    if len(data.classes) > len(shown):
        rest = data.classes[MOST_CLASSES:]
        rows.append([f"{len(rest):,} more classes", *_counts(data, splits, rest)])
    rows.append(["All", *_counts(data, splits, data.classes)])
    colour = "colour" if data.channels == 3 else "grey"
    text = f"{data.source}: {colour} images, stored at {data.frame} px, seen by the student at {data.image_size} px."
    table = _table(("Class", *splits), rows, "Images per class and split", style="counts")
    return section("Data", tag("p", None, text), table)


def _counts(data: DataSummary, splits: list[str], names: list[str]) -> list[str]:
    return [f"{sum(data.counts[split].get(name, 0) for name in names):,}" for split in splits]


def provenance_section(record: Record) -> Html:
    """Build the collapsed parts: method of the verdict, gate, models, times, environment, configuration."""
    parts = [_method(record), _gate(record), _suitability(record), _folded_models(record), _stages(record)]
    parts += [_environment(record.environment) if record.environment else None, _config(record)]
    return section("How this came about", *parts)


def _folded(title: str, *children: Child) -> Html:
    return tag("details", None, tag("summary", None, title), *children)


def _method(record: Record) -> Html | None:
    if record.verdict is None:
        return None
    verdict = record.verdict
    design = f"{numbers.count(verdict.seeds, 'seed')}, {numbers.count(verdict.images, 'test image')}; smallest gain "
    design += f"worth having {numbers.points(verdict.min_gain)} percentage points."
    rule = "BEATS: the whole interval lies above zero. NO GAIN: it lies below the smallest gain worth having. "
    rule += "INCONCLUSIVE: neither."
    texts = (verdict.method, design, rule)
    return _folded("How the verdict was computed", *(tag("p", None, text) for text in texts))


def _gate(record: Record) -> Html | None:
    if not record.gate:
        return None
    rows = [["passed" if one.ok else one.severity, one.check, one.text] for one in record.gate]
    table = _table(("Result", "Check", "Finding"), rows, "Checks of the teacher", style="words")
    return _folded("How the teacher was checked", table)


def _suitability(record: Record) -> Html | None:
    if not record.suitability:
        return None
    rows = [["passed" if one.ok else one.severity, one.check, one.text] for one in record.suitability]
    table = _table(("Result", "Check", "Finding"), rows, "Checks of the methods", style="words")
    return _folded("How the methods were checked", table)


def models_section(record: Record) -> Html | None:
    """Build the table of all trained models for a run without its final table; None where there is one."""
    table = None if record.summary else _models(record)
    return section("Finished so far", table) if table else None


def _folded_models(record: Record) -> Html | None:
    table = _models(record) if record.summary else None
    return _folded("Models, seeds and hashes", table) if table else None


def _models(record: Record) -> Html | None:
    heads = ("Model", "Seed", "Best epoch", "Val", "Test", "Time", "Precision", "Hash of the weights")
    trained = [model for role in get_args(Role) for model in roles.models(record, role)]
    names = {id(model): name for name, model in record.models.items()}
    rows = [_model(names[id(model)], model) for model in trained]
    return _table(heads, rows, "Trained models") if rows else None


def _model(name: str, model: Trained) -> Sequence[Child]:
    val = model.val.accuracy if model.val else None
    test = model.test.accuracy if model.test else None
    seed, epoch = (str(number) if number is not None else numbers.MISSING for number in (model.seed, model.best_epoch))
    hashed = tag("code", None, model.weights_hash or numbers.MISSING)
    started = _small(f"started from {model.initial}") if model.initial else None
    shares, time = (numbers.percent(val), numbers.percent(test)), numbers.duration(model.seconds)
    return name, seed, epoch, *shares, time, model.precision, (hashed, started)


def _stages(record: Record) -> Html | None:
    if not record.stages:
        return None
    rows = [
        [name, numbers.duration(stage.seconds), stage.finished[:19].replace("T", " ")]
        for name, stage in record.stages.items()
    ]
    return _folded("Time per stage", _table(("Stage", "Time", "Finished (UTC)"), rows, "Time per stage"))


def _environment(environment: Environment) -> Html:
    threads = numbers.count(environment.threads, "thread")
    facts = {
        "understudy": environment.understudy,
        "Python": environment.python,
        "System": environment.platform,
        "Processor": f"{environment.processor}, {numbers.count(environment.cores, 'core')}, {threads}",
        "Device": environment.device,
        "Peak memory": numbers.size(environment.peak_memory_bytes),
        **{f"Precision of {name}": text for name, text in environment.precision.items()},
        **environment.versions,
    }
    rows = [[name, text] for name, text in facts.items()]
    return _folded("Environment", _table(("What", "Value"), rows, "Environment", style="words"))


def _config(record: Record) -> Html:
    values = json.loads(json.dumps(record.config, default=str))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    block = tag("pre", {"tabindex": "0"}, tag("code", None, text))
    return _folded("Configuration", block)


def _table(heads: Iterable[str], rows: Iterable[Sequence[Child]], name: str, style: str = "plain") -> Html:
    head = tag("thead", None, tag("tr", None, *(tag("th", {"scope": "col"}, text) for text in heads)))
    body = tag("tbody", None, *(_table_row(row) for row in rows))
    return scrolling(tag("table", {"class": style}, head, body), name)


def _table_row(cells: Sequence[Child]) -> Html:
    first, *others = cells
    return tag("tr", None, tag("th", {"scope": "row"}, first), *(tag("td", None, cell) for cell in others))
