"""The order of the stages."""

from __future__ import annotations

from collections.abc import Callable

from understudy.evaluate import profile
from understudy.pipeline import chain, exporting, judge, objective, plan, suiting, trainings
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import gather
from understudy.pipeline.plan import Plan

Announce = Callable[[Plan], None]


def distill(run: Run, announce: Announce = lambda plan: None) -> None:
    """Run all stages: data, teacher, assistants, baseline, student, evaluation, verdict, export.

    Args:
        run: an opened run.
        announce: told the plan before the long work.

    Raises:
        UnderstudyError: what the user can mend; finished stages are kept.
    """
    objective.terms(run.config.distill)  # refuses before anything long
    materials = gather(run)
    suiting.examine(run, materials)
    announce(plan.make(run, materials))
    trainings.teacher(run, materials)
    for link in chain.links(run.config):
        trainings.train(run, materials, link)
    judge.evaluate(run, materials)
    exporting.export(run, materials)
    note_memory(run)


def train(run: Run, announce: Announce = lambda plan: None) -> None:
    """Train one model alone, as a teacher for later, and measure it; arguments as for `distill`."""
    materials = gather(run)
    announce(plan.make(run, materials))
    trainings.teacher(run, materials)
    judge.evaluate(run, materials)
    note_memory(run)


def note_memory(run: Run) -> None:
    """Keep the largest resident memory of the processes that owned the run; workers are not counted."""
    if run.record.environment is not None and run.record.status == "running":
        known = [run.record.environment.peak_memory_bytes, profile.peak_rss()]
        run.record.environment.peak_memory_bytes = max((value for value in known if value), default=None)
