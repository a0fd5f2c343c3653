"""Weightings and aggregations of users, whose answers are checked."""

import numpy as np
import pytest
import torch

from fedgradnorm import Weighting, WeightingState, Weights, train
from fedgradnorm.aggregation import Mean
from fedgradnorm.errors import WeightingError
from fedgradnorm.runs.checkpoint import load_newest
from tests.helpers import small_federation

QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}


class Own(Weighting):
    """After a sound first round, its answers are those of a function of the clients' ids."""

    def __init__(self, answer, first=lambda ids: WeightingState(dict.fromkeys(ids, 1.0))):
        self.answer, self.init, self.rounds = answer, first, 0

    def update(self, state, reports):
        self.rounds += 1
        ids = [report.client for report in reports]
        return self.answer(ids) if self.rounds > 1 else (Weights(dict.fromkeys(ids, 1.0)), state)


def weights_of(number, memory=None, state=1.0):
    return lambda ids: (
        Weights(dict.fromkeys(ids, number)),
        WeightingState(dict.fromkeys(ids, state), memory or {}),
    )


@pytest.mark.parametrize(
    "answer",
    [
        weights_of(
            np.float32(0.5),
            {"steps": np.int64(3), "losses": [np.float32(0.25), torch.tensor(1.5)]},
            np.float64(2),
        ),
        weights_of(torch.tensor(0.5), {"steps": 3, "losses": [0.25, 1.5]}, torch.tensor(2.0)),
    ],
)
def test_numbers_of_numpy_and_torch_are_taken_as_pythons(tmp_path, answer):
    result = train(small_federation(), Own(answer), run_dir=tmp_path / "run", **QUICK)
    assert [row["weight"] for row in result.rows[3:]] == [0.5] * 3
    checkpoint, _, _ = load_newest(tmp_path / "run/checkpoints")
    assert checkpoint.server.weighting.weights == dict.fromkeys("abc", 2.0)
    assert checkpoint.server.weighting.memory == {"steps": 3, "losses": [0.25, 1.5]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ids: 1 / 0, r"update\(\) .*ZeroDivisionError: "),
        (
            lambda ids: dict.fromkeys(ids, 1.0),
            r"update\(\): .*\(Weights, WeightingState\), .* dict",
        ),
        (lambda ids: (Weights({"a": 1.0}), WeightingState({})), "weights.values: .*'b'"),
        (weights_of(float("nan")), "weights.values: .*'a', .* nan"),
        (weights_of("much"), "weights.values: .*'a', .*'much'"),
        (weights_of(0.0), "weights.values: .* 0$|weights.values: .* 0"),
        (lambda ids: (Weights(dict.fromkeys(ids, 1.0)), {}), "WeightingState, .* dict"),
        (weights_of(1.0, {"seen": {1, 2}}), r"state.memory\['seen'\]: .* set"),
        (weights_of(1.0, {"seen": np.ones(2)}), r"ndarray; .tolist\(\)"),
        (weights_of(1.0, {3: 1.0}), "state.memory: .* 3"),
        (weights_of(1.0, state=float("inf")), "state.weights: .*'a', .* inf"),
    ],
)
def test_a_weighting_that_gives_what_it_must_not_is_named_and_the_rounds_before_are_kept(
    tmp_path, answer, message
):
    with pytest.raises(WeightingError, match=f"weighting '.*:Own'.*{message}") as caught:
        train(small_federation(), Own(answer), run_dir=tmp_path / "run", **QUICK)
    assert caught.value.result.state.round == 1
    assert load_newest(tmp_path / "run/checkpoints")[0].server.round == 1


def test_a_weighting_without_a_first_state_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(WeightingError, match=r"init\(\): .*WeightingState, .* dict"):
        train(
            small_federation(),
            Own(None, lambda ids: dict.fromkeys(ids, 1.0)),
            run_dir=tmp_path / "run",
            **QUICK,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (lambda reports: 1 / 0, "ZeroDivisionError: "),
        (lambda reports: reports[0].gradient.numpy(), "torch.float32 .* ndarray"),
        (lambda reports: reports[0].gradient.double(), "torch.float32 .* torch.float64"),
        (lambda reports: reports[0].gradient[1:], "torch.float32"),
    ],
)
def test_an_aggregation_that_gives_what_it_must_not_is_named(monkeypatch, direction, message):
    monkeypatch.setattr(Mean, "__call__", lambda self, reports, weights: direction(reports))
    with pytest.raises(WeightingError, match=f"aggregation 'mean'.* {message}"):
        train(small_federation(), **QUICK)
