"""Who teaches whom in a run: teachers, assistants between them and the student, generations of students.

A run is a chain of links, each a model to train and the model that teaches it; a plain run has one link for each seed.
Assistants are those of Mirzadeh et al. (2020), Improved Knowledge Distillation via Teacher Assistant; generations those
of Furlanello et al. (2018), Born-Again Neural Networks, but that every generation of a seed starts from the weights of
its baseline, so that the last one is compared with the same student. Imported by the other stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from understudy import record as records
from understudy.config import RunConfig
from understudy.errors import ConfigError, ModelError
from understudy.models import build
from understudy.pipeline import objective
from understudy.record import Record, Role

TEACHER = "teacher"
"""The model that teaches: one network, or the ensemble of all teachers."""


@dataclass(frozen=True)
class Link:
    """A model to train, and the model that teaches it."""

    name: str
    """Of its stage and of its folder."""
    role: Role
    model: str
    """A name or `module:function`."""
    seed: int
    teacher: str
    """The name of a model of the run; empty for one that is trained alone."""


def teachers(config: RunConfig) -> dict[str, RunConfig]:
    """Return every teacher that is loaded or trained, as if the run had no other: `teacher`, or `teacher-1`, ..."""
    members = config.teacher.members
    if len(members) == 1:
        return {TEACHER: config}
    return {
        f"{TEACHER}-{number}": config.model_copy(update={"teacher": member}) for number, member in enumerate(members, 1)
    }


def assistants(config: RunConfig) -> list[Link]:
    """Return the models between the teacher and the student of any seed, in the order in which they are trained."""
    models = config.distill.assistants
    names = [TEACHER, *(f"assistant-{number}" for number in range(1, len(models) + 1))]
    return [
        Link(name, "assistant", model, 0, before) for (before, name), model in zip(pairwise(names), models, strict=True)
    ]


def baseline(config: RunConfig, seed: int) -> Link:
    """Return the student trained alone."""
    return Link(f"baseline-{seed}", "baseline", config.student.model, seed, "")


def generations(config: RunConfig, seed: int) -> list[Link]:
    """Return the students of a seed, each taught by the one before it; the last is the one that is judged."""
    before = [TEACHER, *(link.name for link in assistants(config))][-1]
    earlier = [f"generation-{number}-{seed}" for number in range(1, config.distill.generations)]
    last = student(config, seed)
    links = [Link(name, "assistant", last.model, seed, by) for by, name in pairwise([before, *earlier])]
    return [*links, last]


def student(config: RunConfig, seed: int) -> Link:
    """Return the student that is judged: the last link of the chain."""
    before = [TEACHER, *(link.name for link in assistants(config))][-1]
    count = config.distill.generations
    by = before if count == 1 else f"generation-{count - 1}-{seed}"
    return Link(f"student-{seed}", "student", config.student.model, seed, by)


def of_seed(config: RunConfig, seed: int) -> list[Link]:
    """Return all that is trained for a seed, in order."""
    return [baseline(config, seed), *generations(config, seed)]


def links(config: RunConfig) -> list[Link]:
    """Return all that is trained after the teachers, in order."""
    return [*assistants(config), *(link for seed in config.seeds for link in of_seed(config, seed))]


def find(config: RunConfig, name: str) -> Link:
    """Return the link that trains a model of the run."""
    return next(link for link in links(config) if link.name == name)


def taught_by_teacher(config: RunConfig) -> list[str]:
    """Return the names of the models that learn from the teacher itself: students, or the first assistant."""
    return [link.name for link in links(config) if link.teacher == TEACHER]


def check(config: RunConfig, record: Record) -> None:
    """Refuse a chain that cannot be, before anything long.

    Raises:
        ConfigError: with a sweep, for a teacher alone, with a method that looks inside an ensemble, or with a teacher
            that is called ready and is new.
        ModelError: a teacher is a run whose own teacher was an ensemble.
    """
    several, linked = bool(config.teacher.also), bool(config.distill.assistants or config.distill.generations > 1)
    if config.sweep is not None and (several or linked):
        raise ConfigError(
            "A sweep tries objectives with one teacher and one student: leave out further teachers, assistants and "
            "generations, and give them to distill with the objective that the sweep chooses."
        )
    if record.kind == "train" and several:
        raise ConfigError("One model is trained alone at a time: leave teacher.also out, or use distill.")
    if several and any(term.takes_features for term in objective.terms(config.distill)):
        raise ConfigError(
            f"The method {config.distill.method} compares features, which several teachers do not share: choose one "
            "that compares logits, such as kd, or a single teacher."
        )
    for one in config.teacher.members:
        _refuse_ensemble(one.model)
        if one.ready and one.weights is None and build.kind(one.model) == "name":
            raise ConfigError(
                f"A new {one.model} has learned nothing, so it is not ready to teach: leave --teacher-ready out and it "
                "is trained first, or give its weights with --teacher-weights FILE."
            )


def _refuse_ensemble(model: str) -> None:
    if build.kind(model) != "run":
        return
    taught = records.load(Path(model).expanduser()).models.get(TEACHER)
    if taught is not None and taught.shares:
        first = next(iter(taught.shares))
        raise ModelError(
            f"The teacher of {model} is an ensemble, not one network: name its members, such as "
            f"{Path(model) / first / 'model.safetensors'}, with --teacher each."
        )
