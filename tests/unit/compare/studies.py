"""A small study, and studies whose figures are made up."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fedgradnorm.build import resolve_config
from fedgradnorm.compare.cells import Ended
from fedgradnorm.compare.estimates import estimates_of
from fedgradnorm.compare.grid import Cell, final_cells
from fedgradnorm.compare.measures import Measured, Target, TaskMeasures
from fedgradnorm.compare.results import CellResult, Results, TunedMethod
from fedgradnorm.compare.spec import Study, load_study

TINY = """
title = "Two digits tasks"
question = "Which is faster?"
seeds = [0, 1, 2]
[base]
federation = {name = "digits", tasks = ["class", "parity"]}
engine = {name = "reference"}
train = {num_rounds = 4, head_steps = 2, encoder_steps = 2, batch_size = 8, eval_every = 2}
[tuning]
seeds = [7]
num_rounds = 3
axes = [{keys = ["train.encoder_lr", "train.head_lr"], values = [0.05, 0.1]}]
[[methods]]
name = "equal"
weighting.name = "equal"
[[methods]]
name = "FedGradNorm"
weighting.name = "fedgradnorm"
"""


def written(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def loaded(folder: Path, text: str = TINY, *words: str) -> Study:
    return load_study(written(folder, text), words)


def measured(
    rounds: float | None,
    *,
    task: str = "smile",
    of: int = 50,
    last: float = 0.8,
    weight: float = 1.0,
) -> Measured:
    """A run that got to 60 % of its loss after so many rounds; None: never."""
    target = Target(True, rounds, rounds / 10) if rounds is not None else Target(False, of, of / 10)
    metric = {
        "name": "accuracy",
        "higher_is_better": True,
        "percent": True,
        "guess": 0.6,
        "first": 0.6,
        "best": last,
        "best_round": 5,
        "last": last,
    }
    curves = {
        "inverse_training_rate": {1: 1.0, of: 0.5},
        "weight": {1: 1.0, of: weight},
        "metric": {1: 0.6, of: last},
    }
    figures = TaskMeasures(metric, 0.5, weight, {"loss ratio 0.6": target}, curves)
    return Measured(of, {task: figures}, 0.25, 0.125, (task, 50.0), 2_000_000, 0)


def made_up(
    by_method: dict[str, list[Measured | Ended]],
    single: str | None = None,
    variant: str = "",
    weightings: Mapping[str, str] = MappingProxyType({}),
) -> Results:
    """Results with these cells, by method and seed; an `Ended` in place of figures is a run that did not end well."""
    study = Study(
        title="A made-up study",
        question="Who is faster?",
        seeds=range(max(map(len, by_method.values()))),
        single=single,
        methods=[
            {"name": name, "weighting": {"name": weightings.get(name, "equal")}}
            for name in by_method
        ],
        variants=[{"name": variant}],
    )
    cells = []
    for cell in final_cells(study, {(variant, name): () for name in by_method}):
        found = by_method[cell.method][cell.seed]
        cells.append(
            CellResult(cell, found, None)
            if isinstance(found, Ended)
            else CellResult(cell, Ended("trained"), found)
        )
    tuned = [TunedMethod(variant, name, {}, {}, (), ()) for name in by_method]
    return Results(study, tuned, cells, estimates_of(study, cells))


def cell_of(study: Study) -> Cell:
    """Some cell of a study that tunes nothing."""
    (first, *_) = final_cells(
        study,
        {(variant.name, method.name): () for variant in study.variants for method in study.methods},
    )
    assert resolve_config(first.config) == first.config
    return first
