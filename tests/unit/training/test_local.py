"""Every client by itself: single-task SGD, whoever else there is."""

import pytest
import torch

from fedgradnorm import ConfigError, evaluate_run, load_model, train
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.evaluation import evaluate
from fedgradnorm.federations import digits
from fedgradnorm.runs.reader import Run
from fedgradnorm.weighting import FedGradNorm
from tests.helpers import (
    batch_norm_encoder,
    dropout_encoder,
    small_encoder,
    small_federation,
    with_clients,
)
from tests.unit.training.plain import (
    ROUNDS,
    check_close,
    federation_of,
    head_vector,
    models,
    ours,
    sgd_round,
    training,
    vector,
)

QUICK = {
    "num_rounds": 4,
    "encoder_steps": 3,
    "batch_size": 8,
    "eval_every": 2,
    "encoder_lr": 0.2,
    "head_lr": 0.2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", [ReferenceEngine, VectorizedEngine])
def test_it_is_plain_sgd_on_each_task(dtype, engine):
    federation, settings = federation_of(dtype), training("local")
    state, made, losses = ours(federation, settings, FedGradNorm(), engine)
    for client in federation.clients:
        encoder, heads = models(federation, settings)
        expected = [
            sgd_round(client, encoder, heads[client.id], round, settings)
            for round in range(1, ROUNDS + 1)
        ]
        check_close(made.client_states[client.id].encoder, vector(encoder))
        check_close(head_vector(made, client.id), vector(heads[client.id]))
        assert [round[client.id] for round in losses] == pytest.approx(expected, rel=1e-6)
        found = made.evaluate(state.encoder, state.buffers)[client.id]
        assert found.loss == pytest.approx(
            evaluate(client.task, encoder, heads[client.id], client.test_data).loss, rel=1e-5
        )
    assert torch.equal(state.encoder, vector(federation.make_encoder(settings.seed)))


@pytest.mark.parametrize("engine", ["reference", "vectorized"])
@pytest.mark.parametrize("encoder", [small_encoder, batch_norm_encoder, dropout_encoder])
def test_the_others_do_not_matter(engine, encoder):
    """With one client fewer, and one that joins late, the rest have the same bits."""
    federation = small_federation(encoder=encoder)
    settings = {**QUICK, "method": "local", "engine": engine, "head_momentum": 0.5}
    whole = train(federation, **settings)
    fewer = train(
        with_clients(federation, [client for client in federation.clients if client.id != "b"]),
        **settings,
    )
    late = train(federation, participants=(("a", "c"), ("a", "c"), ("a", "b", "c")), **settings)
    for other in (fewer, late):
        for id in "ac":
            for key in ("loss", "grad_norm", "test_loss", "metric"):
                one, two = (
                    [row[key] for row in result.rows if row["client"] == id]
                    for result in (whole, other)
                )
                assert one == two, key
            one, two = (result.client_states[id] for result in (whole, other))
            assert torch.equal(one.encoder, two.encoder)
            assert all(torch.equal(one.head[name], two.head[name]) for name in one.head)
            assert all(
                torch.equal(one.encoder_buffers[name], two.encoder_buffers[name])
                for name in one.encoder_buffers
            )
    first = next(row for row in late.rows if row["client"] == "b" and row["loss"] is not None)
    assert first["initial_loss"] == next(
        row["initial_loss"] for row in whole.rows if row["client"] == "b"
    )


def test_every_client_has_an_encoder_of_its_own_and_its_saved_model_is_that(tmp_path):
    federation = small_federation(encoder=batch_norm_encoder)
    result = train(federation, method="local", run_dir=tmp_path / "run", **QUICK)
    evaluations = evaluate_run(tmp_path / "run", federation)
    for client in federation.clients:
        summary = Run(tmp_path / "run").summary()["clients"][client.id]
        for model in (load_model(tmp_path / "run", client.id, federation), result.model(client.id)):
            assert torch.equal(vector(model.encoder), result.client_states[client.id].encoder)
            assert (
                evaluate(client.task, model.encoder, model.head, client.test_data).loss
                == summary["test_loss"]
            )
        assert evaluations[client.id].loss == summary["test_loss"]
    assert not torch.equal(result.client_states["a"].encoder, result.client_states["b"].encoder)
    assert torch.equal(vector(result.encoder()), vector(federation.make_encoder(0)))


def test_nothing_is_sent():
    result = train(digits.make(0), method="local", num_rounds=1)
    assert result.summary["bytes_up"] == result.summary["bytes_down"] == 0
    assert train(digits.make(0), method="fedper", num_rounds=1).summary["bytes_up"] > 0


def test_averaged_buffers_would_be_an_exchange():
    with pytest.raises(
        ConfigError,
        match='train.method: local exchanges nothing: expected model.buffers = "local", found "averaged"',
    ):
        train(small_federation(encoder=batch_norm_encoder, buffers="averaged"), method="local")
