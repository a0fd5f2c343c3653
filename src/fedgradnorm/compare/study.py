"""A whole study: tune the step sizes, train the missing cells, and gather the results."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedgradnorm.build import build_federation
from fedgradnorm.compare.cells import Ended, Order, folder_of, note_end, order_for, state_of
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
    listener: Callable[[str, Sequence[Order]], Listener] | None = None,
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
        grid = _Grid(folder, workers, listener or (lambda _stage, _orders: _Silent()), should_stop)
        grid.train("tuning", tuning_cells(study))
        grid.train("comparison", final_cells(study, _points(_tuned(study, folder))))
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
    first = {
        (variant.name, method.name): points_of(study)[0]
        for variant in study.variants
        for method in study.methods
    }
    known: set[str] = set()
    for cell in [*final_cells(_with_one_seed(study), first), *tuning_cells(study)]:
        federation = cell.config.federation.model_dump_json() + cell.config.model.model_dump_json()
        if federation not in known:
            known.add(federation)
            build_federation(cell.config)


def _with_one_seed(study: Study) -> Study:
    """The study with its first seed alone."""
    return study.model_copy(update={"seeds": study.seeds[:1]})


class _Grid:
    def __init__(
        self,
        folder: Path,
        workers: Workers,
        listener: Callable[[str, Sequence[Order]], Listener],
        should_stop: Callable[[], bool],
    ) -> None:
        self.folder, self.workers = folder, workers
        self.listener, self.should_stop = listener, should_stop

    def train(self, stage: str, cells: Sequence[Cell]) -> None:
        by_folder = {cell.name: cell for cell in cells}  # the same settings are trained once
        orders = [
            order_for(self.folder, cell)
            for cell in by_folder.values()
            if state_of(self.folder, cell).state in ("missing", "failed")
        ]
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"study folder {self.folder}: cannot be written: {reason}") from error
        noting = _Noting(self.listener(stage, orders))
        if not self.workers.train(orders, noting, self.should_stop):
            left = len(orders) - noting.finished
            raise StoppedError(
                f"stopped with {left} of {len(by_folder)} cells of the {stage} to go; "
                "the same command goes on"
            )


class _Noting:
    """Writes down how cells ended, and passes everything on to another listener."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self.finished = listener, 0

    def began(self, order: Order) -> None:
        self.listener.began(order)

    def round(self, order: Order, round: int) -> None:
        self.listener.round(order, round)

    def ended(self, order: Order, ended: Ended | None) -> None:
        if ended is not None:
            self.finished += 1
            note_end(Path(order.folder), ended)
        self.listener.ended(order, ended)


class _Silent:
    def began(self, order: Order) -> None:
        pass

    def round(self, order: Order, round: int) -> None:
        pass

    def ended(self, order: Order, ended: Ended | None) -> None:
        pass


def _result(study: Study, folder: Path, cell: Cell) -> CellResult:
    ended = state_of(folder, cell)
    if ended.state != "trained":
        return CellResult(cell, ended, None)
    measured = measure(folder_of(folder, cell), study.targets)
    if reason := diverged(measured):
        return CellResult(cell, Ended("diverged", reason), None)
    return CellResult(cell, ended, measured)


def _tuned(study: Study, folder: Path) -> list[TunedMethod]:
    if study.tuning is None:
        return [
            TunedMethod(variant.name, method.name, {}, {}, (), ())
            for variant in study.variants
            for method in study.methods
        ]
    scores: dict[tuple[str, str, Point], list[float]] = {}
    reasons: dict[tuple[str, str, Point], str] = {}
    without_metrics = study.model_copy(
        update={"targets": study.targets.model_copy(update={"metrics": {}})}
    )
    for cell in tuning_cells(study):
        key = (cell.variant, cell.method, cell.point)
        result = _result(without_metrics, folder, cell)
        score = tuning_score(result.measured) if result.measured else None
        if score is None:
            text = f"{result.ended.state} with seed {cell.seed} {result.ended.reason}"
            reasons[key] = text.strip()
        else:
            scores.setdefault(key, []).append(score)
    return [
        _chosen(study, variant.name, method.name, scores, reasons)
        for variant in study.variants
        for method in study.methods
    ]


def _chosen(
    study: Study,
    variant: str,
    method: str,
    scores: dict[tuple[str, str, Point], list[float]],
    reasons: dict[tuple[str, str, Point], str],
) -> TunedMethod:
    by_point: dict[Point, float | None] = {}
    why: dict[Point, str] = {}
    own = set(points_of(study, method))
    for point in points_of(study):
        key = (variant, method, point)
        if point not in own:
            by_point[point], why[point] = None, NOT_TUNED
        elif key in reasons:
            by_point[point], why[point] = None, reasons[key]
        else:
            by_point[point] = sum(scores[key]) / len(scores[key])
    known = {point: score for point, score in by_point.items() if score is not None}
    if any(reason.startswith("missing") for reason in why.values()):
        known = {}  # an incomplete grid does not choose
    best = min(known, key=known.__getitem__) if known else None
    edges: list[str] = []
    if best is not None:
        for axis, value in zip(study.axes, best, strict=True):
            is_tuned = len(axis.values) > 1 and method not in axis.not_for
            if is_tuned and value in (axis.values[0], axis.values[-1]):
                edges.append(" = ".join([*axis.keys, f"{value:g}"]))
    return TunedMethod(variant, method, by_point, why, best, tuple(edges))
