"""What every registered way to train must do: a new one is tested by being registered."""

import dataclasses
from functools import partial

import pytest
import torch

from fedgradnorm import train
from fedgradnorm.aggregation import Mean
from fedgradnorm.client import local_update
from fedgradnorm.config import Component, TrainConfig
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.federations import digits
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import flatten
from fedgradnorm.registry import BUILT_INS, build, resolve
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.training import Method, method_of
from fedgradnorm.weighting import Equal, FedGradNorm
from tests.helpers import (
    batch_norm_encoder,
    dropout_encoder,
    small_encoder,
    small_federation,
    timeless,
)
from tests.parity.test_awkward_models import Tokens
from tests.parity.test_awkward_models import federation as awkward_federation
from tests.parity.test_vectorized import DEVICES, check_same, doubled, ways

NAMES = sorted(BUILT_INS["method"])
EXCHANGING = [name for name in NAMES if not resolve("method", name).own_encoder]
EVERY_METHOD = pytest.mark.parametrize("name", NAMES)
EVERY_ENCODER = pytest.mark.parametrize(
    "encoder", [small_encoder, batch_norm_encoder, dropout_encoder]
)
QUICK = {"head_steps": 3, "encoder_steps": 4, "batch_size": 8, "head_lr": 0.1, "encoder_lr": 0.1}


def instructed(federation, settings, *, step=None):
    """An engine, a client of it, and an instruction for it."""
    engine = ReferenceEngine(federation, settings.seed)
    client = federation.clients[0]
    state = initial_state(federation, Equal(), settings.seed)
    return (
        engine,
        client,
        Instruction(1, client.id, state.encoder, state.buffers, settings, step=step),
    )


def update(engine, client, instruction):
    return local_update(
        client,
        engine.encoder,
        engine.heads[client.id],
        engine.norm_layer,
        engine.client_states[client.id],
        instruction,
    )


def tensors(state):
    parts = {"head": state.head, "velocity": state.head_velocity, "buffers": state.encoder_buffers}
    own = {} if state.encoder is None else {"encoder": state.encoder}
    return {
        **own,
        **{
            f"{part}.{name}": value
            for part, values in parts.items()
            for name, value in values.items()
        },
    }


@EVERY_METHOD
def test_it_learns_every_task_of_the_digits(name):
    result = train(
        digits.make(0),
        "equal",
        method=name,
        num_rounds=40,
        encoder_lr=0.1,
        head_lr=0.1,
        batch_size=32,
        eval_every=40,
    )
    for id in ("class", "parity", "loop", "mass"):
        rates = [row["inverse_training_rate"] for row in result.rows if row["client"] == id]
        assert min(rates[-3:]) < 0.7, (id, rates[-3:])


@EVERY_METHOD
def test_it_is_a_frozen_dataclass_of_options_with_a_documented_source(name):
    made_by = resolve("method", name)
    method = build("method", Component(name=name))
    assert isinstance(method, Method)
    assert dataclasses.is_dataclass(made_by)
    assert made_by.__dataclass_params__.frozen
    assert method == build("method", Component(name=name)) == method_of(TrainConfig(method=name))
    assert ">>>" in made_by.__doc__


@EVERY_METHOD
@pytest.mark.parametrize("step", [None, 2])
def test_the_gradient_is_the_way_that_the_encoder_went(name, step):
    federation = doubled(small_federation())
    engine, client, instruction = instructed(
        federation, TrainConfig(method=name, **QUICK), step=step
    )
    report, _ = update(engine, client, instruction)
    steps = QUICK["encoder_steps"] if step is None else 1
    way = (instruction.encoder - flatten(engine.encoder)) / (steps * QUICK["encoder_lr"])
    torch.testing.assert_close(report.gradient, way, rtol=1e-9, atol=1e-12)
    assert report.gradient.abs().max() > 1e-3


@EVERY_METHOD
@EVERY_ENCODER
def test_a_round_is_a_pure_function_of_values_that_can_be_sent(name, encoder):
    settings = TrainConfig(method=name, head_momentum=0.5, **QUICK)
    engine, client, instruction = instructed(small_federation(encoder=encoder), settings)
    encoder_before, state_before = (
        instruction.encoder.clone(),
        {k: v.clone() for k, v in tensors(engine.client_states[client.id]).items()},
    )
    report, state = update(engine, client, instruction)
    received = dataclasses.replace(
        instruction, training=TrainConfig.model_validate_json(settings.model_dump_json())
    )
    again, same = update(engine, client, received)  # with what the first left in the modules
    assert torch.equal(instruction.encoder, encoder_before)
    assert all(
        torch.equal(value, state_before[key])
        for key, value in tensors(engine.client_states[client.id]).items()
    )
    assert torch.equal(report.gradient, again.gradient)
    assert (report.loss, report.grad_norm) == (again.loss, again.grad_norm)
    assert tensors(state).keys() == tensors(same).keys()
    assert all(torch.equal(value, tensors(same)[key]) for key, value in tensors(state).items())
    assert any(key.startswith("velocity.") for key in tensors(state))
    assert (state.encoder is not None) == method_of(settings).own_encoder


@pytest.mark.parametrize(
    ("name", "buffers"),
    [(name, "local") for name in NAMES] + [(name, "averaged") for name in EXCHANGING],
)
@EVERY_ENCODER
def test_the_engines_agree(name, encoder, buffers):
    settings = TrainConfig(method=name, head_momentum=0.5, **QUICK)
    federation = small_federation("abcdefgh", encoder=encoder, buffers=buffers)
    engine = check_same(doubled(federation), settings, 1e-10)
    check_same(federation, settings, 1e-5, metrics=False)
    if encoder is small_encoder:
        assert ways(engine) == {"stacked" if name == "fedrep" else "looped"}


@EVERY_METHOD
@pytest.mark.parametrize("device", DEVICES)
def test_the_engines_agree_on_the_digits_and_on_every_clients_own_encoder(name, device):
    federation, states = doubled(digits.make(0)), []
    for engine in (
        ReferenceEngine(federation, 0),
        VectorizedEngine(federation, 0, threads=2, device=device),
    ):
        state = initial_state(federation, FedGradNorm(), 0)
        for _ in range(2):
            state, _ = run_round(
                state,
                federation,
                engine,
                FedGradNorm(),
                Mean(),
                TrainConfig(method=name, loss_estimate="exact", **QUICK),
            )
        states.append(
            [tensors(engine.client_states[id]) for id in sorted(engine.client_states)]
            + [{"encoder": state.encoder}]
        )
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-11)


@EVERY_METHOD
@pytest.mark.parametrize("engine", [ReferenceEngine, VectorizedEngine])
def test_sparse_gradients_are_as_good_as_dense_ones(name, engine):
    encoders = []
    for sparse in (False, True):
        federation, settings = (
            awkward_federation(partial(Tokens, sparse=sparse)),
            TrainConfig(method=name, head_momentum=0.5, **QUICK),
        )
        made, state = engine(federation, 0), initial_state(federation, Equal(), 0)
        for _ in range(2):
            state, record = run_round(state, federation, made, Equal(), Mean(), settings)
            assert not record.dropped
        encoders.append(
            [
                state.encoder,
                *(each.encoder for each in made.client_states.values() if each.encoder is not None),
            ]
        )
    for dense, sparse in zip(*encoders, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@EVERY_METHOD
def test_buffers_are_averaged_or_stay(name):
    """As the federation says, whoever moves the encoder."""
    if name in EXCHANGING:
        result = train(
            small_federation(encoder=batch_norm_encoder, buffers="averaged"),
            method=name,
            num_rounds=2,
            **QUICK,
        )
        averaged = [result.model(id).encoder[1].running_mean for id in "abc"]
        assert all(torch.equal(mean, averaged[0]) for mean in averaged)
        assert not any(state.encoder_buffers for state in result.client_states.values())
    result = train(small_federation(encoder=batch_norm_encoder), method=name, num_rounds=2, **QUICK)
    means = [result.model(id).encoder[1].running_mean for id in "abc"]
    assert not torch.equal(means[0], means[1])
    assert result.state.buffers == {}
    steps = QUICK["encoder_steps"] + (QUICK["head_steps"] if name in ("fedrep", "fedprox") else 0)
    assert result.model("a").encoder[1].num_batches_tracked == 2 * steps


@EVERY_METHOD
def test_one_seed_gives_one_run_and_another_another(name):
    runs = [
        train(small_federation(), method=name, num_rounds=2, seed=seed, **QUICK)
        for seed in (0, 0, 1)
    ]
    rows = [timeless(one.rows) for one in runs]
    assert rows[0] == rows[1] != rows[2]
