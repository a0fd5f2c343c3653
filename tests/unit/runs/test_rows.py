"""The lines of metrics.jsonl."""

import json

import pytest

from fedgradnorm import Weighting, WeightingState, Weights, train
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation
from tests.unit.runs.quick import QUICK, run_digits


def test_rows_have_what_was_promised_and_hold_together(tmp_path):
    result = run_digits(
        tmp_path / "run",
        "train.participants=[['class', 'mass'], ['loop', 'class', 'mass', 'parity']]",
        "weighting.gamma=1",
    )
    rows = Run(tmp_path / "run").rows()
    assert rows == json.loads(json.dumps(result.rows))
    assert [(row["round"], row["client"]) for row in rows[:5]] == [
        (1, "class"),
        (1, "parity"),
        (1, "loop"),
        (1, "mass"),
        (2, "class"),
    ]
    for row in rows:
        assert (row["metric"] is not None) == (row["round"] in (1, 2, 4))
        if not row["participated"]:
            assert row["round"] == 1
            assert (row["loss"], row["weight"], row["bytes_up"]) == (None, 1.0, 0)
            continue
        assert row["inverse_training_rate"] == row["loss"] / row["initial_loss"]
        assert row["bytes_up"] > row["bytes_down"] > 0
    for round in (2, 3, 4):
        here = [row for row in rows if row["round"] == round]
        assert sum(row["weight"] for row in here) == pytest.approx(4)
        before = {row["client"]: row["weight"] for row in rows if row["round"] == round - 1}
        pushes = [before[row["client"]] * row["grad_norm"] for row in here]
        rates = [row["inverse_training_rate"] for row in here]
        for row, rate in zip(here, rates, strict=True):
            assert row["target"] == pytest.approx(sum(pushes) / 4 * rate / (sum(rates) / 4))


def test_the_recorded_weight_is_the_one_that_was_applied():
    class Half(Weighting):
        def init(self, client_ids):
            return WeightingState({})

        def update(self, state, reports):
            return Weights({report.client: 0.5 for report in reports}), state

    assert {row["weight"] for row in train(small_federation(), Half(), **QUICK).rows} == {0.5}
