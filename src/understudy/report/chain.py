"""Who taught whom, where there is more to say than teacher and student: ensembles, assistants, generations.

Only the report imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

from understudy.record import Record, Trained
from understudy.report import numbers
from understudy.report.markup import Child, Html, tag
from understudy.report.overview import section
from understudy.report.perclass import scrolling
from understudy.report.roles import mean

_BETWEEN = ("member", "assistant")
_HEADS = ("Model", "Network", "Learned from", "Val", "Test")


def chain_section(record: Record) -> Html | None:
    """Build the table of who taught whom; None for one teacher that taught the students itself."""
    if not _is_chain(record):
        return None
    shown = [(name, model) for name, model in record.models.items() if model.role != "baseline"]
    head = tag("tr", None, *(tag("th", {"scope": "col"}, text) for text in _HEADS))
    rows = [tag("tr", None, *_cells(name, model)) for name, model in shown]
    caption = tag("caption", None, "Every model that teaches, and whom it learned from")
    table = tag("table", None, caption, tag("thead", None, head), tag("tbody", None, *rows))
    text = "The verdict compares the last student with the same student trained alone."
    return section("Who taught whom", tag("p", None, text), scrolling(table, "Who taught whom"))


def chain_line(record: Record) -> str:
    """Return the same in one line, with test accuracies, such as "teacher 97 % → assistant-1 95 % → student 94 %"."""
    if not _is_chain(record):
        return ""
    members = ", ".join(f"{name} {_test([model])}" for name, model in record.models.items() if model.role == "member")
    groups: dict[str, list[Trained]] = {}
    for name, model in record.models.items():
        if model.role in ("teacher", "assistant", "student"):
            groups.setdefault(_group(name, model), []).append(model)
    last = groups.pop("student", [])
    told = [f"{name} {_test(models)}" for name, models in [*groups.items(), ("student", last)] if models]
    return f"{members}; {' → '.join(told)}" if members else " → ".join(told)


def _is_chain(record: Record) -> bool:
    return any(model.role in _BETWEEN for model in record.models.values())


def _group(name: str, model: Trained) -> str:
    """Return what models of several seeds have in common: students, or one generation of them."""
    return name.removesuffix(f"-{model.seed}") if name.startswith(("student", "generation")) else name


def _test(models: Sequence[Trained]) -> str:
    return numbers.percent(mean([model.test.accuracy if model.test else None for model in models]))


def _cells(name: str, model: Trained) -> Sequence[Child]:
    shares = [f"{member} ({numbers.percent(share)})" for member, share in model.shares.items()]
    learned = "mean of " + ", ".join(shares) if shares else model.taught_by or "the labels"
    accuracies = [metrics.accuracy if metrics else None for metrics in (model.val, model.test)]
    words = [model.architecture, learned, *map(numbers.percent, accuracies)]
    return [tag("th", {"scope": "row"}, name), *(tag("td", None, text) for text in words)]
