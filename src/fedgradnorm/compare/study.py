"""A whole study: tune the step sizes, train the missing cells, and gather the results."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from fedgradnorm.build import build_federation
from fedgradnorm.compare.cells import Ended, Order, folder_of, order_for, state_of
from fedgradnorm.compare.estimates import estimates_of
from fedgradnorm.compare.grid import Cell, Point, final_cells, points_of, tuning_cells
from fedgradnorm.compare.measures import diverged, measure, tuning_score
from fedgradnorm.compare.results import CellResult, Results, TunedMethod
from fedgradnorm.compare.spec import Study
from fedgradnorm.compare.workers import Listener, Workers
from fedgradnorm.errors import RunError, StoppedError

NOT_TUNED = "– (not for this method)"
"""Why a method has no score at a point of the grid that is only for others."""


def compare(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    listener: Callable[[str, Sequence[Order]], Listener] = lambda _stage, _orders: Listener(),
    should_stop: Callable[[], bool] = lambda: False,
) -> Results:
    """Train every cell of a study that is not trained yet, and gather the results.

    Args:
        study: the study.
        folder: the folder of its cells and figures; made if it does not exist. Cells of earlier
            calls are used.
        jobs: the number of cells trained at a time, each in a process of one thread. With 1 they
            are trained in this process.
        listener: takes ``"tuning"`` or ``"comparison"`` and the cells to train, and gives the
            listener for their progress.
        should_stop: called after every round. True stops the study, and a later call resumes it.

    Raises:
        ConfigError: a setting of a method is unknown or out of range. Nothing is trained then.
        StoppedError: it was stopped.
        RunError: the folder cannot be written.
    """
    _check(study)
    with Workers(jobs) as workers:
        train = partial(_train, folder, workers, listener, should_stop)
        train("tuning", tuning_cells(study))
        train("comparison", final_cells(study, _points(_tuned(study, folder))))
    return found_in(study, folder)


def found_in(study: Study, folder: Path) -> Results:
    """The results in a study's folder so far. Untrained cells are missing."""
    tuned = _tuned(study, folder)
    cells = [_result(study, folder, cell) for cell in final_cells(study, _points(tuned))]
    return Results(study, tuned, cells, estimates_of(study, cells))


def _points(tuned: Sequence[TunedMethod]) -> dict[tuple[str, str], Point | None]:
    return {(method.variant, method.method): method.chosen for method in tuned}


def _check(study: Study) -> None:
    """Build every method's federation once, so that its errors come before any training."""
    first = {(variant, method): points_of(study)[0] for variant, method in _pairs(study)}
    with_one_seed = study.model_copy(update={"seeds": study.seeds[:1]})
    known: set[str] = set()
    for cell in [*final_cells(with_one_seed, first), *tuning_cells(study)]:
        federation = cell.config.federation.model_dump_json() + cell.config.model.model_dump_json()
        if federation not in known:
            known.add(federation)
            build_federation(cell.config)


def _pairs(study: Study) -> list[tuple[str, str]]:
    """The names of every variant and method."""
    return [
        (variant.name, method.name) for variant, method in product(study.variants, study.methods)
    ]


def _train(
    folder: Path,
    workers: Workers,
    listener: Callable[[str, Sequence[Order]], Listener],
    should_stop: Callable[[], bool],
    stage: str,
    cells: Sequence[Cell],
) -> None:
    by_folder = {cell.name: cell for cell in cells}  # the same settings are trained once
    orders = [
        order_for(folder, cell)
        for cell in by_folder.values()
        if state_of(folder, cell).state in ("missing", "failed")
    ]
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"study folder {folder}: cannot be written: {reason}") from error
    if not workers.train(orders, listener(stage, orders), should_stop):
        left = len(orders) - workers.finished
        raise StoppedError(
            f"stopped with {left} of {len(by_folder)} cells of the {stage} to go; "
            "the same command goes on"
        )


def _result(study: Study, folder: Path, cell: Cell) -> CellResult:
    ended = state_of(folder, cell)
    if ended.state != "trained":
        return CellResult(cell, ended, None)
    measured = measure(folder_of(folder, cell), study.targets)
    if reason := diverged(measured):
        return CellResult(cell, Ended("diverged", reason), None)
    return CellResult(cell, ended, measured)


def _tuned(study: Study, folder: Path) -> list[TunedMethod]:
    targets = study.targets.model_copy(update={"metrics": {}})
    without_metrics = study.model_copy(update={"targets": targets})
    results: dict[tuple[str, str, Point], list[CellResult]] = {}
    for cell in tuning_cells(study):
        key = (cell.variant, cell.method, cell.point)
        results.setdefault(key, []).append(_result(without_metrics, folder, cell))
    return [_chosen(study, variant, method, results) for variant, method in _pairs(study)]


def _chosen(
    study: Study,
    variant: str,
    method: str,
    results: Mapping[tuple[str, str, Point], Sequence[CellResult]],
) -> TunedMethod:
    if study.tuning is None:
        return TunedMethod(variant, method, {}, {}, (), ())
    scores: dict[Point, float | None] = {}
    reasons: dict[Point, str] = {}
    for point in points_of(study):
        trained = results.get((variant, method, point), ())
        bad = [result for result in trained if result.measured is None]
        known = [tuning_score(result.measured) for result in trained if result.measured]
        own = [score for score in known if score is not None]
        scores[point] = None
        if not trained:
            reasons[point] = NOT_TUNED
        elif bad:
            ended, seed = bad[-1].ended, bad[-1].cell.seed
            reasons[point] = f"{ended.state} with seed {seed} {ended.reason}".strip()
        else:
            scores[point] = sum(own) / len(own)
    candidates = {point: score for point, score in scores.items() if score is not None}
    incomplete = any(reason.startswith("missing") for reason in reasons.values())
    best = None if incomplete else min(candidates, key=candidates.__getitem__, default=None)
    edges = [
        " = ".join([*axis.keys, f"{value:g}"])
        for axis, value in zip(study.axes, best or (), strict=False)
        if len(axis.values) > 1 and method not in axis.not_for
        if value in (axis.values[0], axis.values[-1])
    ]
    return TunedMethod(variant, method, scores, reasons, best, tuple(edges))
