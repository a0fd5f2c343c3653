"""A run's curves as a figure: the lines hold the figures of the run's rows."""

import sys

import numpy as np
import pytest

from fedgradnorm import ConfigError, train
from fedgradnorm.federations import digits
from fedgradnorm.report.charts import MOST_LINES
from fedgradnorm.report.figure import curves
from fedgradnorm.report.looks import looks_for
from fedgradnorm.runs.reader import Run

QUICK = {"num_rounds": 4, "head_steps": 1, "encoder_steps": 1, "eval_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    everyone = ("class", "parity", "loop", "mass")
    participants = (everyone, everyone, ("class", "mass"), everyone)
    train(digits.make(0), "fedgradnorm", run_dir=folder, participants=participants, **QUICK)
    return folder


@pytest.fixture
def run(folder):
    return Run(folder)


def lines_of(panel):
    return {
        line.get_label(): dict(zip(*map(np.ndarray.tolist, line.get_data()), strict=True))
        for line in panel.lines
        if not line.get_label().startswith("_")
    }


def by_client(rows, key, scale=1):
    values = {}
    for row in rows:
        value = row[key]
        values.setdefault(row["client"], {})[row["round"]] = (
            float("nan") if value is None else scale * value
        )
    return values


def test_the_lines_hold_the_figures_of_the_rows(run):
    rows = run.rows()
    loss, weight, accuracy, error = curves(rows, run.summary()).axes
    np.testing.assert_equal(lines_of(loss), by_client(rows, "inverse_training_rate"))
    assert np.isnan(lines_of(loss)["parity"][3]), "an absent client has a gap"
    assert lines_of(weight) == by_client(rows, "weight")
    tested = [row for row in rows if row["metric"] is not None]
    shares = by_client([row for row in tested if row["client"] != "mass"], "metric", 100)
    assert lines_of(accuracy) == shares
    assert accuracy.get_title() == "Test accuracy, %"
    assert lines_of(error) == by_client(
        [row for row in tested if row["client"] == "mass"], "metric"
    )
    guesses = {line.get_ydata()[0] for line in error.lines if line.get_label().startswith("_")}
    assert guesses == {run.summary()["tasks"]["mass"]["metric"]["guess"]}


def test_a_client_is_drawn_alike_in_every_panel(run):
    figure = curves(run.rows(), run.summary())
    looks = {look.name: look for look in looks_for(["class", "parity", "loop", "mass"])}
    for line in (line for panel in figure.axes for line in panel.lines):
        if line.get_label() in looks:
            assert line.get_color() == looks[line.get_label()].colour
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(looks)


def test_many_clients_become_a_mean_and_a_band_by_task(run):
    rows = [
        row | {"client": f"{row['client']}-{number}", "weight": number}
        for row in run.rows()
        for number in range(MOST_LINES + 1)
    ]
    _, weight, *_ = curves(rows, run.summary()).axes
    assert lines_of(weight).keys() == {"class", "parity", "loop", "mass"}
    assert set(lines_of(weight)["mass"].values()) == {MOST_LINES / 2}
    bounds = weight.collections[0].get_paths()[0].vertices[:, 1]
    assert (bounds.min(), bounds.max()) == (0, MOST_LINES)


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "fedgradnorm\[report\]"'):
        curves(run.rows(), run.summary())
