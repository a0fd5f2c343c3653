"""Whole studies: what is trained, what is not trained again, and what becomes of cells that fail."""

import os
import signal
from itertools import count
from pathlib import Path

import pytest

from fedgradnorm import RunError, StoppedError
from fedgradnorm.compare.grid import final_cells
from fedgradnorm.compare.page import write_page
from fedgradnorm.compare.study import compare, found_in
from fedgradnorm.compare.tables import write_tables
from fedgradnorm.runs.reader import Run
from tests.helpers import timeless
from tests.launcher import launcher, wait_until
from tests.unit.compare.studies import TINY, loaded, written

CELLS = 2 * 2 + 2 * 3
"""Two methods at two step sizes while they are tuned, and with three seeds."""

HUGE = '[[methods]]\nname = "huge"\nweighting.name = "equal"\ntrain.server_lr = 1e6\n'
OWN = """
import os, signal
from dataclasses import dataclass
from fedgradnorm import Equal

@dataclass(frozen=True)
class Dies(Equal):
    "Ends its process."
    def update(self, state, reports):
        os.kill(os.getpid(), signal.SIGKILL)

@dataclass(frozen=True)
class Raises(Equal):
    "Has a fault."
    def update(self, state, reports):
        raise ArithmeticError("one and one is three")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a study that was trained at one go, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    compare(loaded(folder), folder / "out")
    return folder / "out"


def cells_in(folder):
    return {
        path.parent.name: path.stat().st_mtime_ns for path in folder.glob("cells/*/summary.json")
    }


def same_figures(one, other):
    assert cells_in(one).keys() == cells_in(other).keys()
    for name in cells_in(one):
        assert timeless(Run(one / "cells" / name).rows()) == timeless(
            Run(other / "cells" / name).rows()
        ), name


def test_every_cell_is_a_run_and_the_best_step_size_is_used(whole, tmp_path):
    study = loaded(tmp_path)
    results = found_in(study, whole)
    assert len(cells_in(whole)) == CELLS
    assert {result.ended.state for result in results.cells} == {"trained"}
    assert not list(whole.glob("cells/*/report.html"))
    assert not list(whole.glob("cells/*/tensorboard"))
    for tuned in results.tuned:
        assert tuned.chosen == min(tuned.scores, key=tuned.scores.get)
        assert tuned.edges == (f"train.encoder_lr = train.head_lr = {tuned.chosen[0]:g}",), (
            "of two values each is at the edge"
        )
        used = {
            r.cell.config.train.encoder_lr for r in results.cells if r.cell.method == tuned.method
        }
        assert used == {tuned.chosen[0]}
        for point, score in tuned.scores.items():
            (tuning,) = [
                Run(path.parent)
                for path in whole.glob("cells/*seed7*/summary.json")
                if _is(path.parent, tuned.method, point)
            ]
            ratios = [row["inverse_training_rate"] for row in tuning.rows() if row["round"] == 3]
            assert score == pytest.approx(sum(ratios) / len(ratios))


def _is(folder, method, point):
    config = Run(folder).config
    return config.weighting.name == method.lower() and config.train.encoder_lr == point[0]


def test_killed_and_begun_again_is_as_if_it_had_never_been_killed(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ("compare", written(tmp_path), "--jobs", 1, "--out", out)
    process = launcher().start(tmp_path, *words)
    wait_until(process, lambda: len(cells_in(out)) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.end()
    done = cells_in(tmp_path / "out")
    assert 3 <= len(done) <= CELLS
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    compare(loaded(tmp_path), tmp_path / "out", jobs=2)
    assert "OMP_NUM_THREADS" not in os.environ
    assert {name: cells_in(tmp_path / "out")[name] for name in done} == done, (
        "what is done is not trained again"
    )
    same_figures(tmp_path / "out", whole)


def test_stopped_between_rounds_it_goes_on_where_it_was(whole, tmp_path):
    rounds = count()
    with pytest.raises(
        StoppedError,
        match=r"stopped with 3 of 4 cells of the tuning to go; the same command goes on",
    ):
        compare(loaded(tmp_path), tmp_path / "out", should_stop=lambda: next(rounds) > 5)
    half = [
        path
        for path in (tmp_path / "out" / "cells").iterdir()
        if path.is_dir() and not (path / "summary.json").exists()
    ]
    assert len(half) == 1
    assert list((half[0] / "checkpoints").iterdir())
    missing = found_in(loaded(tmp_path), tmp_path / "out")
    assert [tuned.chosen for tuned in missing.tuned] == [None, None], (
        "nobody is tuned by half a grid"
    )
    compare(loaded(tmp_path), tmp_path / "out")
    same_figures(tmp_path / "out", whole)


def test_other_settings_are_other_cells_and_the_old_ones_stay(whole, tmp_path):
    study = loaded(tmp_path, TINY, "train.num_rounds=5", "tuning.num_rounds=3")
    before = cells_in(whole)
    compare(study, whole)
    after = cells_in(whole)
    assert {name: after[name] for name in before} == before
    assert len(after) == CELLS + 6, "the tuning is the same, the comparison another"
    assert {result.measured.rounds for result in found_in(study, whole).cells} == {5}
    for name in after.keys() - before.keys():
        for path in sorted((whole / "cells" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (whole / "cells" / name).rmdir()


def test_a_cell_that_was_changed_by_hand_is_refused(tmp_path):
    study = loaded(
        tmp_path, TINY[: TINY.index("[tuning]")] + TINY[TINY.index("[[methods]]") :], "seeds=[0]"
    )
    compare(study, tmp_path / "out")
    folder = next(path.parent for path in (tmp_path / "out").glob("cells/*seed0*/config.toml"))
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("batch_size = 8", "batch_size = 9"))
    with pytest.raises(RunError, match=r"config.toml was changed after it was made"):
        compare(study, tmp_path / "out")


def test_a_method_that_diverges_is_shown_and_stops_no_other(tmp_path):
    text = TINY.replace("[[methods]]", HUGE + "[[methods]]", 1)
    study = loaded(tmp_path, text)
    results = compare(study, tmp_path / "out")
    tuned = {one.method: one for one in results.tuned}
    assert tuned["huge"].chosen is None
    assert all("diverged with seed 7" in reason for reason in tuned["huge"].reasons.values())
    assert {result.cell.method for result in results.cells} == {"equal", "FedGradNorm"}
    assert {result.ended.state for result in results.cells} == {"trained"}
    page = write_page(results, tmp_path / "out" / "index.html").read_text()
    assert "huge: diverged or failed with all step sizes." in page
    write_tables(results, tmp_path / "out")
    assert (
        "| huge | diverged or failed with all step sizes |"
        in (tmp_path / "out" / "results.md").read_text()
    )
    assert "| huge | diverged | diverged |" in (tmp_path / "out" / "results.md").read_text()
    text = text.replace("train.server_lr = 1e6", "train.server_lr = 1e6\ntrain.encoder_lr = 0.1")
    untuned = text[: text.index("[tuning]")] + text[text.index("[[methods]]") :]
    results = compare(loaded(tmp_path, untuned), tmp_path / "out")
    assert {result.cell.method: result.ended.state for result in results.cells} == {
        "huge": "diverged",
        "equal": "trained",
        "FedGradNorm": "trained",
    }
    assert [
        result.ended for result in found_in(loaded(tmp_path, untuned), tmp_path / "out").cells
    ] == [r.ended for r in results.cells]


def test_a_process_that_dies_and_a_method_with_a_fault_cost_their_own_cells(tmp_path, monkeypatch):
    (tmp_path / "own_for_the_grid.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    methods = "".join(
        f'[[methods]]\nname = "{name}"\nweighting.name = "own_for_the_grid:{name}"\n'
        for name in ("Dies", "Raises")
    )
    text = TINY[: TINY.index("[tuning]")] + methods + TINY[TINY.index("[[methods]]") :]
    results = compare(loaded(tmp_path, text, "seeds=[0]"), tmp_path / "out", jobs=2)
    ended = {result.cell.method: result.ended for result in results.cells}
    assert {method: end.state for method, end in ended.items()} == {
        "Dies": "failed",
        "Raises": "failed",
        "equal": "trained",
        "FedGradNorm": "trained",
    }
    assert ended["Dies"].reason == "its process ended early: signal 9"
    assert ended["Raises"].reason.startswith(
        "weighting 'own_for_the_grid:Raises': update() raised ArithmeticError: one and one is three"
    )


def test_the_folder_is_told_when_it_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        compare(loaded(tmp_path), Path(tmp_path / "out"))


def test_what_draws_numbers_draws_others_in_every_run_unless_its_seed_is_set(tmp_path):
    text = (
        TINY
        + '[[methods]]\nname = "rlw"\nweighting.name = "rlw"\n[[methods]]\nname = "set"\nweighting = {name = "rlw", seed = 9}\n'
    )
    study = loaded(tmp_path, text)
    cells = final_cells(study, {("", method.name): (0.1,) for method in study.methods})
    seeds = {(cell.method, cell.seed): cell.config.weighting.options.get("seed") for cell in cells}
    assert [seeds["rlw", seed] for seed in study.seeds] == list(study.seeds)
    assert [seeds["set", seed] for seed in study.seeds] == [9, 9, 9]
    assert seeds["equal", 0] is None
