"""Which cells are tried: all of a grid, or those that Optuna asks for; the only file that imports optuna, an extra.

The search goes by rounds whose size depends on the number of cells alone. So it asks for the same cells wherever the
trials run, and a sweep that was killed is gone through again from the start, finding its finished trials done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from understudy.config import SweepConfig, Weight
from understudy.errors import ConfigError
from understudy.sweep.book import Book
from understudy.sweep.cells import Cell, Space
from understudy.sweep.executors import Executor

_ROUNDS = 5
_SMALLEST_ROUND = 4
_DIGITS = 3  # of a temperature or learning rate that is drawn


def by_grid(space: Space, book: Book, executor: Executor) -> None:
    """Try all combinations: the first seed of all cells, then the second, ..."""
    cells = space.grid()
    book.note(cells)
    book.note(space.alone(), asked=False)
    book.measure([(cell, seed) for seed in book.seeds for cell in [*space.alone(), *cells]], executor)


def trainings_of_grid(space: Space, seeds: int) -> int:
    """Return how many students a grid trains: equal cells count once, and every student alone counts as well."""
    return seeds * len({cell.key for cell in [*space.alone(), *space.grid()]})


def by_optuna(space: Space, asked: SweepConfig, book: Book, executor: Executor) -> None:
    """Try the cells that a tree-structured Parzen estimator asks for, between the smallest and the largest values.

    A cell gets its further seeds only if its first one is not below the median of the finished cells.

    Raises:
        ConfigError: optuna is not installed.
    """
    optuna = library()
    cells = asked.trials or 1
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=asked.search_seed, n_startup_trials=max(_SMALLEST_ROUND, cells // 4)),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_SMALLEST_ROUND),
    )
    book.note(space.alone(), asked=False)
    book.measure([(cell, seed) for seed in book.seeds for cell in space.alone()], executor)
    for size in rounds(cells):
        trials = [study.ask() for _ in range(size)]
        _round(study, [(trial, _draw(trial, space)) for trial in trials], book, executor)


def rounds(cells: int) -> list[int]:
    """Return how many cells are asked for at a time: about five rounds, the last one may be smaller."""
    size = max(_SMALLEST_ROUND, -(-cells // _ROUNDS))
    return [min(size, cells - first) for first in range(0, cells, size)]


def _round(study: Any, asked: list[tuple[Any, Cell]], book: Book, executor: Executor) -> None:
    from optuna.trial import TrialState

    first, others = book.seeds[0], book.seeds[1:]
    book.note(cell for _, cell in asked)
    book.measure([(cell, first) for _, cell in asked], executor)
    going = []
    for trial, cell in asked:
        value = book.score(cell, [first])
        if value is None:
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.report(value, 0)
        if others and cell.role == "student" and trial.should_prune():
            book.prune(cell, len(others))
            study.tell(trial, state=TrialState.PRUNED)
        else:
            going.append((trial, cell))
    book.measure([(cell, seed) for seed in others for _, cell in going], executor)
    for trial, cell in going:
        value = book.score(cell, book.seeds)
        study.tell(trial, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


def _draw(trial: Any, space: Space) -> Cell:
    """Return the cell that a trial of Optuna asks for; a setting with one value is not asked about."""
    given = space.temperatures[0]
    heats = [heat for heat in space.temperatures if isinstance(heat, float)]
    temperature = _between(trial, "temperature", heats) if len(heats) > 1 else given
    method = trial.suggest_categorical("method", space.methods) if len(space.methods) > 1 else space.methods[0]
    student = trial.suggest_categorical("student", space.students) if len(space.students) > 1 else space.students[0]
    return space.cell(_weights(trial, space), temperature, method, _between(trial, "lr", space.lrs), student)


def _weights(trial: Any, space: Space) -> tuple[Weight, Weight]:
    shares = [kd_weight for _, kd_weight in space.weights if isinstance(kd_weight, float)]
    if len(shares) < 2:
        return space.weights[0]
    alpha = round(trial.suggest_float("alpha", min(shares), max(shares)), _DIGITS)
    return 1 - alpha, alpha


def _between(trial: Any, name: str, values: Sequence[float]) -> float:
    if len(set(values)) < 2:
        return values[0]
    return float(f"{trial.suggest_float(name, min(values), max(values), log=True):.{_DIGITS}g}")


def library() -> Any:
    """Return optuna.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("A search with --trials needs an extra library: pip install 'understudy[optuna]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
