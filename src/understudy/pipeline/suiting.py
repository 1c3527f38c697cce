"""Whether the methods of a run suit it: asked before the long work, and measured once before the first student trains.

Imported by the stages and by what trains students.
"""

from __future__ import annotations

from collections.abc import Iterator

from understudy.config import DistillConfig
from understudy.data.batches import Epochs
from understudy.distillation import Distiller, balance
from understudy.distillation.balance import Share, Step
from understudy.distillation.methods import METHODS
from understudy.evaluate import profile, suitability
from understudy.evaluate.suitability import Chosen, Pair, Setting
from understudy.models.classifier import Classifier
from understudy.numerics import Numerics
from understudy.pipeline import objective, plan, teaching
from understudy.pipeline.folder import Run
from understudy.pipeline.materials import Materials, new_student
from understudy.record import Finding, Objective


def examine(run: Run, materials: Materials) -> None:
    """Look at the methods of the run, note what speaks against them, and refuse those that could teach nothing.

    Raises:
        ConfigError: a method that is refused, unless the run was told to go on.
    """
    found = findings(run, materials, run.config.distill)
    run.record.suitability = found
    suitability.refuse(found, force=run.config.force)
    for finding in found:
        if not finding.ok:
            run.warn(finding.text)


def findings(run: Run, materials: Materials, distill: DistillConfig) -> list[Finding]:
    """Return what speaks for and against the methods of an objective with the images and networks of a run."""
    terms = [term for term in objective.terms(distill) if term.method]
    standardized = {one.method for one in distill.terms if one.standardize}
    chosen = [
        Chosen(METHODS[name], tuple(term for term in terms if term.method == name), name in standardized)
        for name in dict.fromkeys(term.method for term in terms)
    ]
    train = run.config.train
    setting = Setting(
        classes=len(materials.store.classes),
        images=len(materials.taught),
        batch_size=train.batch_size,
        processes=materials.engine.shard[1],
        mixed=train.mix != "none",
        ce_weight=objective.strength(distill.ce_weight),
        networks=_networks(run, materials) if any(term.takes_features for term in terms) else None,
        free_memory=profile.free_memory(materials.engine.device),
    )
    return suitability.examine_methods(chosen, setting)


def _networks(run: Run, materials: Materials) -> Pair:
    """Return both networks as they are before training, on the CPU: only what their layers give is looked at."""
    teacher = plan.some_teacher(run.config, materials.store.classes, materials.teacher_spec)
    student = new_student(run, materials, 0)
    example = next(materials.splits["val"].whole(teaching.EXAMPLE)).cpu()
    return Pair(student.cpu(), teacher.cpu(), example)


def measure(
    run: Run, materials: Materials, distiller: Distiller, network: Classifier, epochs: Epochs, numerics: Numerics
) -> None:
    """Measure each term's gradient in the first steps, note it, and warn of terms that hardly count or drown others.

    Nothing of the training to come is changed by it.
    """
    if not materials.engine.is_alone or run.record.objective is None:
        return
    distiller.to(materials.engine.device)
    numerics.prepare(network)
    with materials.engine.autocast(numerics):
        measured = balance.shares(distiller, _steps(epochs, numerics, run.config.seeds[0]))
    run.record.objective = _with(run.record.objective, measured)
    found = suitability.findings(measured)
    run.record.suitability = [*run.record.suitability, *found]
    for finding in found:
        run.warn(finding.text)


def _steps(epochs: Epochs, numerics: Numerics, seed: int) -> Iterator[Step]:
    for batch in epochs.epoch(seed, 0):
        yield (
            numerics.layout(batch.images),
            {
                "labels": batch.labels,
                "teacher_logits": batch.teacher_logits,
                "teacher_embedding": batch.teacher_embedding,
                "positions": batch.positions,
            },
        )


def _with(known: Objective, measured: list[Share]) -> Objective:
    by_name = {share.name: share for share in measured}
    terms = [
        term.model_copy(
            update={
                "gradient_norm": by_name[term.name].gradient_norm,
                "gradient_share": by_name[term.name].share,
            }
        )
        if term.name in by_name
        else term
        for term in known.terms
    ]
    return known.model_copy(update={"terms": terms})


def noted(run: Run) -> Objective:
    """Return what the record says of the run's objective, with what was measured before where it is the same."""
    assert run.record.data is not None  # images come before students
    fresh, known = objective.note(run.config.distill, classes=len(run.record.data.classes)), run.record.objective
    if known is None:
        return fresh
    bare = [term.model_copy(update={"gradient_norm": None, "gradient_share": None}) for term in known.terms]
    return known if known.model_copy(update={"terms": bare}) == fresh else fresh
