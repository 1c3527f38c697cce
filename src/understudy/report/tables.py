"""The final table, from a record: one row per role, and the measures that the terminal and the page show of it.

Only the report imports it. The command line uses it through `understudy.report`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from understudy.record import Interval, Profile, Record, Role, RoleSummary
from understudy.report import numbers, roles


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """The teacher's cost divided by the model's; None where one of them is not known."""

    parameters: float | None
    macs: float | None
    bytes: float | None
    peak_bytes: float | None
    latency: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One role in the final table: what `record.RoleSummary` says, flat; None where not known (yet)."""

    role: Role
    title: str
    architecture: str
    seeds: int
    accuracy: Interval | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    auroc: float | None = None
    macro_f1: float | None = None
    ece: float | None = None
    nll: float | None = None
    agreement: float | None = None
    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    peak_bytes: int | None = None
    latency_p50: float | None = None
    latency_p95: float | None = None
    ratios: Ratios | None = None
    """None for the teacher."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A line of the table: how to write it for a row, and what it means."""

    label: str
    value: Callable[[Row], str]
    note: Callable[[Row], str] | None = None
    """What stands below the value: the interval, or the ratio to the teacher."""
    cost: bool = False
    meaning: str


def final_table(record: Record) -> list[Row]:
    """Return one row per role: teacher, baseline, student; only the teacher for a run that trains one model."""
    return [_row(record, role) for role in roles.roles(record)]


def measures(rows: list[Row]) -> list[Measure]:
    """Return the lines that apply to these rows: those for two classes only where there are two."""
    two = any(row.sensitivity is not None or row.auroc is not None for row in rows)
    distilled = any(row.role != "teacher" for row in rows)
    hidden = (set() if two else TWO_CLASSES) | (set() if distilled else {"Agrees with teacher"})
    return [measure for measure in MEASURES if measure.label not in hidden]


def _row(record: Record, role: Role) -> Row:
    seeds = len(roles.models(record, role))
    title, architecture = roles.TITLES[role], roles.architecture(record, role)
    summary = record.summary.get(role)
    if summary is None:
        return Row(role=role, title=title, architecture=architecture, seeds=seeds)
    teacher = record.summary.get("teacher")
    ratios = _ratios(teacher.profile, summary.profile) if teacher and role != "teacher" else None
    return _filled(summary, role=role, title=title, architecture=architecture, seeds=seeds, ratios=ratios)


def _filled(
    summary: RoleSummary, *, role: Role, title: str, architecture: str, seeds: int, ratios: Ratios | None
) -> Row:
    profile = summary.profile
    return Row(
        role=role,
        title=title,
        architecture=architecture,
        seeds=seeds,
        accuracy=summary.accuracy,
        sensitivity=summary.sensitivity,
        specificity=summary.specificity,
        auroc=summary.auroc,
        macro_f1=summary.macro_f1,
        ece=summary.ece,
        nll=summary.nll,
        agreement=summary.agreement,
        parameters=profile.parameters,
        macs=profile.macs,
        bytes=profile.bytes,
        peak_bytes=profile.peak_bytes,
        latency_p50=profile.latency.p50,
        latency_p95=profile.latency.p95,
        ratios=ratios,
    )


def _ratios(teacher: Profile, model: Profile) -> Ratios:
    same_work = (teacher.parameters, teacher.macs) == (model.parameters, model.macs)  # then times differ by chance only
    return Ratios(
        parameters=_divide(teacher.parameters, model.parameters),
        macs=_divide(teacher.macs, model.macs),
        bytes=_divide(teacher.bytes, model.bytes),
        peak_bytes=_divide(teacher.peak_bytes, model.peak_bytes),
        latency=1.0 if same_work else _divide(teacher.latency.p50, model.latency.p50),
    )


def _divide(teacher: float, model: float) -> float | None:
    return teacher / model if numbers.known(teacher) and numbers.known(model) and model > 0 else None


def _ratio(read: Callable[[Ratios], float | None], better: str, worse: str) -> Callable[[Row], str]:
    return lambda row: numbers.times(read(row.ratios), better, worse) if row.ratios else ""


TWO_CLASSES = {"Sensitivity", "Specificity", "AUROC"}
MEASURES = (
    Measure(
        label="Accuracy",
        value=lambda row: numbers.percent(row.accuracy.value if row.accuracy else None),
        note=lambda row: numbers.percent_range(row.accuracy) if row.accuracy else "",
        meaning="Share of test images answered correctly, mean over seeds; below it, its 95 % interval.",
    ),
    Measure(
        label="Sensitivity",
        value=lambda row: numbers.percent(row.sensitivity),
        meaning="Share of the images of the second class that are recognised as such.",
    ),
    Measure(
        label="Specificity",
        value=lambda row: numbers.percent(row.specificity),
        meaning="Share of the images of the first class that are recognised as such.",
    ),
    Measure(
        label="AUROC",
        value=lambda row: numbers.decimal(row.auroc),
        meaning="How well the probabilities rank the two classes: 0.5 is chance, 1 is perfect.",
    ),
    Measure(
        label="Macro F1",
        value=lambda row: numbers.decimal(row.macro_f1),
        meaning="F1 averaged over classes, so that rare classes count as much as common ones.",
    ),
    Measure(
        label="Calibration error",
        value=lambda row: numbers.decimal(row.ece),
        meaning="Expected calibration error (ECE): how far stated confidence is from the accuracy seen; 0 is best.",
    ),
    Measure(
        label="NLL",
        value=lambda row: numbers.decimal(row.nll),
        meaning="Negative log-likelihood: the price of confident mistakes, in nats; lower is better.",
    ),
    Measure(
        label="Agrees with teacher",
        value=lambda row: numbers.percent(row.agreement),
        meaning="Share of test images on which the model gives the teacher's answer, right or wrong.",
    ),
    Measure(
        label="Parameters",
        value=lambda row: numbers.amount(row.parameters),
        note=_ratio(lambda ratios: ratios.parameters, "fewer", "more"),
        cost=True,
        meaning="Numbers that training sets.",
    ),
    Measure(
        label="MACs per image",
        value=lambda row: numbers.amount(row.macs),
        note=_ratio(lambda ratios: ratios.macs, "fewer", "more"),
        cost=True,
        meaning="Multiply-accumulate operations for one image.",
    ),
    Measure(
        label="Weights file",
        value=lambda row: numbers.size(row.bytes),
        note=_ratio(lambda ratios: ratios.bytes, "smaller", "larger"),
        cost=True,
        meaning="Size of the weights on disk.",
    ),
    Measure(
        label="Latency, median",
        value=lambda row: numbers.milliseconds(row.latency_p50),
        note=_ratio(lambda ratios: ratios.latency, "faster", "slower"),
        cost=True,
        meaning="Time for one image, half of the runs being faster (P50).",
    ),
    Measure(
        label="Latency, P95",
        value=lambda row: numbers.milliseconds(row.latency_p95),
        cost=True,
        meaning="Time for one image that 95 % of the runs stay below.",
    ),
    Measure(
        label="Peak memory",
        value=lambda row: numbers.size(row.peak_bytes),
        note=_ratio(lambda ratios: ratios.peak_bytes, "smaller", "larger"),
        cost=True,
        meaning="Weights and the most activations alive at once while one image passes.",
    ),
)
