"""The server's half of a round."""

from dataclasses import replace

import pytest
import torch

from fedgradnorm import ConfigError, Equal, FedGradNorm, WeightingState
from fedgradnorm.aggregation import Mean
from fedgradnorm.client import loss_batches
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.server import ServerState, advance, initial_state, run_round
from fedgradnorm.weighting import Weights
from tests.helpers import batch_norm_encoder, report, small_federation

TRAINING = TrainConfig(head_steps=2, encoder_steps=3, encoder_lr=0.1, server_lr=0.5, batch_size=8)


def state_of(encoder=(1.0, 2.0, 3.0), **fields):
    return ServerState(
        0, torch.tensor(encoder), fields.pop("buffers", {}), WeightingState({}), **fields
    )


def test_aggregation_is_the_weighted_mean():
    reports = [
        report("a", 1, gradient=torch.tensor([1.0, 0.0])),
        report("b", 1, gradient=torch.tensor([0.0, 2.0])),
    ]
    direction = Mean()(reports, Weights({"a": 3.0, "b": 1.0}, scale=2.0))
    torch.testing.assert_close(direction, torch.tensor([1.5, 1.0]))


def test_the_plain_step_is_eta_times_the_direction():
    after = advance(
        state_of(), [], torch.tensor([1.0, -1.0, 0.0]), WeightingState({"a": 1.0}), TRAINING
    )
    torch.testing.assert_close(
        after.encoder, torch.tensor([1 - 0.15, 2 + 0.15, 3.0])
    )  # η = 3 · 0.1 · 0.5
    assert (after.round, after.weighting, after.optimizer) == (1, WeightingState({"a": 1.0}), {})


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        (
            {"server_momentum": 0.9},
            lambda parameters: torch.optim.SGD(parameters, lr=0.15, momentum=0.9),
        ),
        ({"server_optimizer": "adam"}, lambda parameters: torch.optim.Adam(parameters, lr=0.15)),
    ],
)
def test_a_server_optimiser_is_torchs_own_over_all_rounds(settings, optimizer):
    training = TRAINING.model_copy(update=settings)
    state, parameter = state_of(), torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    whole = optimizer([parameter])
    for step in range(1, 4):
        direction = torch.tensor([0.5, -1.0, 0.1]) * step
        state = advance(state, [], direction, state.weighting, training)
        parameter.grad = direction
        whole.step()
    torch.testing.assert_close(state.encoder, parameter.detach())


def test_buffers_are_averaged_and_counts_rounded():
    buffers = {"mean": torch.zeros(2), "count": torch.tensor(0)}
    reports = [
        report("a", 1, buffers={"mean": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}),
        report("b", 1, buffers={"mean": torch.tensor([3.0, 2.0]), "count": torch.tensor(4)}),
    ]
    after = advance(
        state_of(buffers=buffers), reports, torch.zeros(3), WeightingState({}), TRAINING
    )
    torch.testing.assert_close(after.buffers["mean"], torch.tensor([2.0, 2.0]))
    assert after.buffers["count"].dtype == torch.int64
    assert after.buffers["count"] in (3, 4)


class Faulty(ReferenceEngine):
    """An engine whose clients answer as ``spoil`` says."""

    def __init__(self, federation, spoil):
        super().__init__(federation, seed=0)
        self.spoil = spoil

    def execute(self, instructions):
        return [self.spoil(report) for report in super().execute(instructions)]


def test_a_round_without_a_sound_report_changes_nothing_but_its_number():
    federation, weighting = small_federation(), FedGradNorm()
    engine = Faulty(federation, lambda report: replace(report, loss=float("nan")))
    before = initial_state(federation, weighting, 0)
    training = TRAINING.model_copy(update={"min_clients": 0})
    after, record = run_round(before, federation, engine, weighting, Mean(), training)
    assert after.round == 1
    assert torch.equal(after.encoder, before.encoder)
    assert after.weighting == before.weighting
    assert record.weights is None
    assert record.dropped.keys() == {"a", "b", "c"}


def test_a_dropped_report_leaves_the_others_weights_summing_to_what_they_did():
    federation, weighting = small_federation(), FedGradNorm(solver="exact")
    engine = Faulty(
        federation,
        lambda sent: replace(sent, grad_norm=float("nan")) if sent.client == "b" else sent,
    )
    state = initial_state(federation, weighting, 0)
    for _ in range(3):
        state, record = run_round(state, federation, engine, weighting, Mean(), TRAINING)
    assert record.dropped.keys() == {"b"}
    assert state.weighting.weights["b"] == 1.0
    assert state.weighting.weights["a"] != 1.0
    assert sum(state.weighting.weights.values()) == pytest.approx(3)


def test_the_order_of_clients_and_replies_does_not_matter():
    states = []
    for ids, turn in ((("a", "b", "c"), list), (("c", "a", "b"), reversed)):
        federation, weighting = (
            small_federation(ids, batch_norm_encoder, buffers="averaged"),
            FedGradNorm(),
        )
        engine = ReferenceEngine(federation, seed=0)
        execute = engine.execute
        engine.execute = lambda instructions, execute=execute, turn=turn: list(
            turn(execute(list(turn(instructions))))
        )
        state = initial_state(federation, weighting, 0)
        for _ in range(3):
            state, _ = run_round(state, federation, engine, weighting, Mean(), TRAINING)
        states.append(state)
    assert torch.equal(states[0].encoder, states[1].encoder)
    assert states[0].weighting == states[1].weighting
    assert torch.equal(states[0].buffers["1.running_mean"], states[1].buffers["1.running_mean"])


def test_a_late_joiner_starts_with_weight_one_and_its_own_initial_loss():
    federation, weighting = small_federation(), FedGradNorm(solver="exact")
    training = TRAINING.model_copy(
        update={"participants": (("a", "b"), ("a", "b"), ("a", "b", "c"))}
    )
    engine, state = ReferenceEngine(federation, seed=0), initial_state(federation, weighting, 0)
    for round in (1, 2, 3):
        encoder = state.encoder
        state, record = run_round(state, federation, engine, weighting, Mean(), training)
        assert ("c" in record.weights.values) == (round == 3)
        assert (engine.client_states["c"].initial_loss is None) == (round < 3)
        if round < 3:
            assert state.weighting.weights["c"] == 1.0
    module, head = federation.make_encoder(0), federation.make_head(federation.client("c"), 0)
    torch.nn.utils.vector_to_parameters(encoder, module.parameters())
    client = federation.client("c")
    inputs, targets = client.train_data
    with torch.no_grad():
        losses = [
            client.task.loss(head(module(inputs[batch])), targets[batch])
            for batch in loss_batches(client, training)
        ]
        expected = torch.stack(losses).mean().item()
    assert engine.client_states["c"].initial_loss == pytest.approx(expected, rel=1e-5)
    assert sum(state.weighting.weights.values()) == pytest.approx(3)


def test_the_reference_engine_uses_its_threads_and_gives_them_back():
    seen = []

    class Watched(torch.nn.Linear):
        def forward(self, inputs):
            seen.append(torch.get_num_threads())
            return super().forward(inputs)

    federation = small_federation(encoder=lambda: Watched(6, 4))
    engine = ReferenceEngine(federation, seed=0, threads=2)
    seen.clear()
    state = initial_state(federation, Equal(), 0)
    run_round(state, federation, engine, Equal(), Mean(), TRAINING)
    engine.evaluate(state.encoder, {})
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    with pytest.raises(ConfigError, match="threads: .* 1024, .* 0"):
        ReferenceEngine(federation, seed=0, threads=0)
