"""Every weighting in training: clients that come and go, several of a task, a run that is resumed."""

import math

import pytest
import torch

from fedgradnorm import ConfigError, FedGradNorm, resume, train
from fedgradnorm.config import Component
from fedgradnorm.registry import BUILT_INS, build
from fedgradnorm.weighting import Fixed
from tests.helpers import small_federation

EVERY_WEIGHTING = pytest.mark.parametrize("name", sorted(BUILT_INS["weighting"]))
SETTINGS = {"head_steps": 1, "encoder_steps": 1, "batch_size": 8, "engine": "reference"}


@EVERY_WEIGHTING
def test_it_trains_with_clients_that_come_late_and_stay_away(name):
    method = build("weighting", Component(name=name))
    participants = (("a", "b"), ("b",), ("a", "c"), ("a", "b", "c"))
    result = train(small_federation(), method, num_rounds=6, participants=participants, **SETTINGS)
    assert torch.isfinite(result.state.encoder).all()
    assert sum(result.weights.values()) == pytest.approx(3.0)
    by_round = {(row["round"], row["client"]): row["weight"] for row in result.rows}
    assert by_round[1, "c"] == by_round[2, "c"] == 1.0
    assert by_round[2, "a"] == pytest.approx(
        by_round[1, "a"], abs=2e-6
    )  # as remembered: 0 is then 10⁻⁶
    assert all(math.isfinite(weight) for weight in by_round.values())


@EVERY_WEIGHTING
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    federation = small_federation()
    whole = train(federation, name, num_rounds=4, **SETTINGS)
    train(federation, name, num_rounds=2, run_dir=tmp_path / "run", **SETTINGS)
    resumed = resume(tmp_path / "run", federation, num_rounds=4)
    assert resumed.weights == whole.weights
    assert torch.equal(resumed.state.encoder, whole.state.encoder)
    assert dict(resumed.state.weighting.memory) == dict(whole.state.weighting.memory)


@EVERY_WEIGHTING
def test_a_client_alone_is_followed(name):
    """Where there is one client, a method can only choose the length of the step."""
    method = build("weighting", Component(name=name))
    ours, plain = (
        train(small_federation(("a",)), weighting, num_rounds=1, **SETTINGS)
        for weighting in (method, FedGradNorm())
    )
    start = plain.federation.make_encoder(0)
    before = torch.nn.utils.parameters_to_vector(start.parameters()).detach()
    moves = [result.state.encoder - before for result in (ours, plain)]
    cosine = torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-4)


def test_a_fixed_weight_for_an_unknown_client_is_an_error_before_a_folder_is_touched(tmp_path):
    with pytest.raises(
        ConfigError, match=r"weighting\.clients\.z: there is no client 'z'; known: a, b, c"
    ):
        train(
            small_federation(),
            Fixed(clients={"z": 2.0}),
            num_rounds=1,
            run_dir=tmp_path / "run",
            **SETTINGS,
        )
    assert not (tmp_path / "run").exists()
