"""The part of the page that says what the student learned from: an equation, and the terms one by one.

Only the report imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

from understudy.record import Kept, Objective, Record, TermNote
from understudy.report import numbers, roles
from understudy.report.markup import Child, Html, tag
from understudy.report.overview import section
from understudy.report.perclass import scrolling

_LABELS = "ce"


def objective_section(record: Record) -> Html | None:
    """Build the objective in words, as an equation and term by term; None where there is none."""
    objective = record.objective
    if objective is None:
        return None
    words = (_plain_words if _is_plain(objective) else _words)(objective)
    return section(
        "What the student learned from",
        tag("p", {"class": "equation"}, numbers.tied(_equation(objective))),
        *(tag("p", None, numbers.tied(text)) for text in words),
        tag("p", {"class": "aside"}, _effective(objective)),
        _terms_table(record, objective) if objective.terms else None,
        tag("p", None, _outputs(record.outputs)) if record.outputs else None,
    )


def _is_plain(objective: Objective) -> bool:
    """Tell whether it is Hinton's alone, as the equation has it; records of old name no terms."""
    taught = [term for term in objective.terms if term.name != _LABELS]
    as_usual = all(
        (term.weight, term.temperature, term.standardized) == (objective.kd_weight, objective.temperature, False)
        for term in taught
    )
    return objective.method == "kd" and as_usual and not any(term.schedule for term in objective.terms)


def _equation(objective: Objective) -> str:
    labels = f"loss = {objective.ce_weight:g} × cross-entropy(labels)"
    if _is_plain(objective):
        heat = f"{objective.temperature:g}"
        return f"{labels} + {objective.kd_weight:g} × {heat}² × KL(teacher ‖ student; T = {heat})"
    taught = [f"{term.weight:g} × {term.name}" for term in objective.terms if term.name != _LABELS]
    return " + ".join([labels, *taught])


def _plain_words(objective: Objective) -> list[str]:
    softened = f"softened at T = {objective.temperature:g}, with weight {objective.kd_weight:g}"
    return [
        f"Method {objective.method}. The student learns from the labels with weight {objective.ce_weight:g} and from "
        f"the teacher's probabilities, {softened}. Softening makes gradients smaller by about T², which the factor "
        "T² undoes."
    ]


def _words(objective: Objective) -> list[str]:
    equations = {term.method: term.equation for term in objective.terms if term.equation}
    return [
        f"Method {objective.method}. Weights are those at the end of training.",
        *(f"{method}: {equation}." for method, equation in equations.items()),
        *(f"{term.name} takes standardised logits." for term in objective.terms if term.standardized),
    ]


def _effective(objective: Objective) -> str:
    first = next((term.name for term in objective.terms if term.name != _LABELS), "kd")
    name = "KL(teacher ‖ student)" if first == "kd" else first
    return (
        f"Effective weight on {name}, averaged over the batch: {objective.effective_kd_weight:g}, T² "
        "included. Compare this number with the weights of other systems."
    )


def _terms_table(record: Record, objective: Objective) -> Html:
    heads = ("Term", "Weight", "T", "Effective weight", "Gradient at the start", "Loss, first to last epoch")
    head = tag("tr", None, *(tag("th", {"scope": "col"}, text) for text in heads))
    rows = [tag("tr", None, *_cells(record, term)) for term in objective.terms]
    caption = tag("caption", None, "Terms of the objective")
    return scrolling(tag("table", None, caption, tag("thead", None, head), tag("tbody", None, *rows)), "Terms")


def _cells(record: Record, term: TermNote) -> Sequence[Child]:
    changing = tag("small", None, term.schedule) if term.schedule else None
    share = "" if term.gradient_share is None else f" ({numbers.percent(term.gradient_share)})"
    gradient = numbers.MISSING if term.gradient_norm is None else f"{term.gradient_norm:.2g}{share}"
    return (
        tag("th", {"scope": "row"}, term.name),
        tag("td", None, f"{term.weight:g}", changing),
        tag("td", None, numbers.MISSING if term.temperature is None else f"{term.temperature:g}"),
        tag("td", None, f"{term.effective_weight:g}"),
        tag("td", None, gradient),
        tag("td", None, _course(record, term.name)),
    )


def _course(record: Record, name: str) -> str:
    """Return a term's loss in the first and in the last epoch, mean over the students."""
    epochs = [model.epochs for model in roles.models(record, "student") if model.epochs]
    ends = [[rows[at].parts.get(name) for rows in epochs] for at in (0, -1)]
    known = [[value for value in end if value is not None] for end in ends]
    if not all(known):
        return numbers.MISSING
    first, last = (sum(values) / len(values) for values in known)
    return f"{first:.3g} → {last:.3g}"


def _outputs(kept: Kept) -> str:
    """Say what the teacher cost."""
    asked = kept.views * kept.images
    found = asked - min(kept.computed, asked)
    largest = f", the {kept.top} largest logits of each answer," if kept.top else ""
    before = f" {found:,} of them had been kept before." if found else ""
    views = "one view" if kept.views == 1 else f"{kept.views} views"
    return (
        f"The teacher answered once for all students: {asked:,} answers, for {views} of {kept.images:,} images, "
        f"kept in {numbers.size(kept.bytes)}{largest} and computed in {kept.seconds:.0f} s.{before}"
    )
