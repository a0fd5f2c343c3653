"""FedProx: FedRep, held back."""

import pytest
import torch

from fedgradnorm import ConfigError
from fedgradnorm.client import local_update
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.server import initial_state, instruct
from fedgradnorm.training import FedProx
from fedgradnorm.weighting import Equal
from tests.helpers import batch_norm_encoder, dropout_encoder, small_encoder, small_federation
from tests.unit.training.plain import batches, federation_of, head_vector, ours, training


def prox(mu, **settings):
    return training({"name": "fedprox", "mu": mu}, **settings)


@pytest.mark.parametrize("encoder", [small_encoder, batch_norm_encoder, dropout_encoder])
@pytest.mark.parametrize("engine", [ReferenceEngine, VectorizedEngine])
def test_without_the_term_it_is_fedrep_bit_for_bit(encoder, engine):
    federation = small_federation(encoder=encoder)
    state, made, losses = ours(federation, prox(0.0, head_momentum=0.5), engine=engine)
    other, made_by_fedrep, losses_of_fedrep = ours(
        federation, training("fedrep", head_momentum=0.5), engine=engine
    )
    assert torch.equal(state.encoder, other.encoder)
    assert losses == losses_of_fedrep
    for id in "abc":
        assert torch.equal(head_vector(made, id), head_vector(made_by_fedrep, id))


def update(mu, dtype=torch.float64):
    """One round at one client: the report, and how far the encoder went."""
    federation = federation_of(dtype)
    state = initial_state(federation, Equal(), 2)
    instruction = next(
        one for one in instruct(state, federation, prox(mu)) if one.client == "class"
    )
    engine = ReferenceEngine(federation, 2)
    client = federation.client("class")
    report, _ = local_update(
        client,
        engine.encoder,
        engine.heads["class"],
        engine.norm_layer,
        engine.client_states["class"],
        instruction,
    )
    after = torch.cat([parameter.detach().reshape(-1) for parameter in engine.encoder.parameters()])
    return report, instruction, after


def test_more_of_the_term_keeps_the_encoder_closer():
    distances = [
        float((after - instruction.encoder).norm())
        for _, instruction, after in map(update, [0.0, 0.1, 1.0, 5.0, 20.0])
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.6 * distances[0]


@pytest.mark.parametrize("mu", [0.3, 5.0])
def test_the_reports_gradient_is_the_way_the_encoder_went(mu):
    report, instruction, after = update(mu)
    settings = instruction.training
    way = (instruction.encoder - after) / (settings.encoder_steps * settings.encoder_lr)
    torch.testing.assert_close(report.gradient, way, rtol=1e-9, atol=1e-12)


def test_two_steps_by_hand():
    """The first is plain, for ω = ω_k; the second has the term."""
    federation, mu, settings = (
        federation_of(torch.float64, ("mass",)),
        3.0,
        prox(3.0, encoder_steps=2, head_steps=1),
    )
    client, engine = (
        federation.clients[0],
        ReferenceEngine(federation_of(torch.float64, ("mass",)), 2),
    )
    state = initial_state(federation, Equal(), 2)
    (instruction,) = instruct(state, federation, settings)
    _, after = local_update(
        client,
        engine.encoder,
        engine.heads["mass"],
        engine.norm_layer,
        engine.client_states["mass"],
        instruction,
    )
    found = [parameter.detach().clone() for parameter in engine.encoder.parameters()]

    encoder, head = federation.make_encoder(2), federation.make_head(client, 2)
    head.load_state_dict(dict(after.head))
    received = [parameter.detach().clone() for parameter in encoder.parameters()]
    for inputs, targets in batches(client, 1, settings)[:2]:
        distance = sum(
            ((parameter - old) ** 2).sum()
            for parameter, old in zip(encoder.parameters(), received, strict=True)
        )
        loss = client.task.loss(head(encoder(inputs)), targets) + mu / 2 * distance
        gradients = torch.autograd.grad(loss, list(encoder.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
                parameter -= settings.encoder_lr * gradient
    for one, other in zip(found, encoder.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mu", [-1.0, 1e7])
def test_a_mu_out_of_range_is_refused(mu):
    with pytest.raises(ConfigError, match="mu: expected a number from 0 to 1e6"):
        FedProx(mu)
