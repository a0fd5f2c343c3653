"""FedPer and FedAvg against a loop in plain torch."""

from dataclasses import dataclass

import pytest
import torch

from fedgradnorm import Weighting, WeightingState, Weights
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.federations import digits
from fedgradnorm.weighting import FedGradNorm
from tests.unit.training.plain import (
    batches,
    check_close,
    federation_of,
    fedper,
    head_vector,
    ours,
    training,
    vector,
)


@dataclass(frozen=True)
class ByExamples(Weighting):
    """p_i in proportion to the number of examples."""

    def update(self, state, reports):
        total = sum(report.num_examples for report in reports)
        values = {report.client: report.num_examples * len(reports) / total for report in reports}
        return Weights(values), WeightingState({**state.weights, **values})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("engine", [ReferenceEngine, VectorizedEngine])
def test_three_rounds_of_fedper_are_those_of_plain_torch(dtype, momentum, engine):
    federation, settings = federation_of(dtype), training("fedper", head_momentum=momentum)
    encoder, heads, losses = fedper(federation, settings)
    state, made, found = ours(federation, settings, engine=engine)
    check_close(state.encoder, vector(encoder))
    for id, head in heads.items():
        check_close(head_vector(made, id), vector(head))
    assert [round[id] for round in found for id in sorted(round)] == pytest.approx(
        [round[id] for round in losses for id in sorted(round)],
        rel=1e-6 if dtype == torch.float32 else 1e-12,
    )
    assert bool(made.client_states["class"].head_velocity) == (momentum > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fedavg_with_weights_by_examples_averages_the_encoders_by_examples(dtype):
    federation = federation_of(dtype, sizes={"class": 600, "parity": 300, "loop": 60, "mass": 100})
    settings = training("fedavg")
    encoder, heads, _ = fedper(
        federation, settings, share_of=lambda client: len(client.train_data[0])
    )
    state, made, _ = ours(federation, settings, ByExamples())
    check_close(state.encoder, vector(encoder))
    check_close(head_vector(made, "loop"), vector(heads["loop"]))
    other, _, _ = ours(federation, settings)
    assert not torch.allclose(other.encoder, state.encoder, atol=1e-5)


def test_the_head_moves_from_where_the_encoder_was_in_the_same_step():
    """One step: both gradients are taken at the received encoder and the old head."""
    federation, settings = (
        federation_of(torch.float64, ("parity",)),
        training("fedper", encoder_steps=1),
    )
    client = federation.clients[0]
    encoder, head = federation.make_encoder(2), federation.make_head(client, 2)
    state, engine, _ = ours(federation, settings, rounds=1)
    inputs, targets = batches(client, 1, settings)[0]
    client.task.loss(head(encoder(inputs)), targets).backward()
    expected = torch.cat(
        [(p - settings.head_lr * p.grad).detach().reshape(-1) for p in head.parameters()]
    )
    torch.testing.assert_close(head_vector(engine, "parity"), expected, rtol=1e-13, atol=1e-15)
    moved = torch.cat(
        [(p - settings.encoder_lr * p.grad).detach().reshape(-1) for p in encoder.parameters()]
    )
    torch.testing.assert_close(state.encoder, moved, rtol=1e-13, atol=1e-15)


def test_fedper_and_fedgradnorm_go_together():
    federation = digits.make(0)
    settings = TrainConfig(method="fedper", encoder_steps=4, batch_size=16)
    state, _, _ = ours(federation, settings, FedGradNorm())
    equal, _, _ = ours(federation, settings)
    assert max(abs(weight - 1) for weight in state.weighting.weights.values()) > 0.01
    assert not torch.equal(state.encoder, equal.encoder)


def test_an_exact_loss_is_the_one_before_the_joint_steps():
    federation, settings = federation_of(torch.float64), training("fedper", loss_estimate="exact")
    _, engine, losses = ours(federation, settings, rounds=1)
    assert losses[0] == {id: state.initial_loss for id, state in engine.client_states.items()}
