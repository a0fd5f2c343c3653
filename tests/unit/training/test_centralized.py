"""All clients in lockstep: multi-task SGD on pooled data."""

import numpy as np
import pytest
import torch

from fedgradnorm import ConfigError, FedGradNorm, StoppedError, train
from fedgradnorm.aggregation import Mean
from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.federations import digits
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.weighting import Equal
from tests.helpers import dropout_encoder, small_federation
from tests.unit.training.plain import (
    ROUNDS,
    STEPS,
    batches,
    check_close,
    federation_of,
    head_vector,
    models,
    ours,
    training,
    vector,
)


def multi_task_sgd(federation, settings, optimizer=None):
    """One network with a head for each task, SGD on the mean of the tasks' losses; a head's step size is for its own loss."""
    encoder, heads = models(federation, settings)
    count = len(federation.clients)
    own = torch.optim.SGD(
        [p for head in heads.values() for p in head.parameters()], lr=count * settings.head_lr
    )
    shared = (
        optimizer(encoder.parameters())
        if optimizer
        else torch.optim.SGD(encoder.parameters(), lr=settings.encoder_lr)
    )
    losses = []
    for round in range(1, ROUNDS + 1):
        drawn, here = (
            {client.id: batches(client, round, settings) for client in federation.clients},
            [],
        )
        for step in range(STEPS):
            own.zero_grad()
            shared.zero_grad()
            each = {}
            for client in federation.clients:
                inputs, targets = drawn[client.id][step]
                each[client.id] = client.task.loss(heads[client.id](encoder(inputs)), targets)
            (sum(each.values()) / count).backward()
            own.step()
            shared.step()
            here.append({id: loss.item() for id, loss in each.items()})
        losses.append({id: np.mean([step[id] for step in here]) for id in here[0]})
    return encoder, heads, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", [ReferenceEngine, VectorizedEngine])
def test_with_equal_weights_it_is_multi_task_sgd(dtype, engine):
    federation, settings = federation_of(dtype), training("centralized")
    encoder, heads, losses = multi_task_sgd(federation, settings)
    state, made, found = ours(federation, settings, engine=engine)
    check_close(state.encoder, vector(encoder))
    for id, head in heads.items():
        check_close(head_vector(made, id), vector(head))
    for one, other in zip(found, losses, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert state.round == ROUNDS


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        (
            {"server_momentum": 0.7},
            lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.7),
        ),
        (
            {"server_optimizer": "adam", "server_lr": 0.1},
            lambda parameters: torch.optim.Adam(parameters, lr=0.005),
        ),
    ],
)
def test_the_servers_optimiser_is_the_encoders(settings, optimizer):
    federation, settings = federation_of(torch.float64), training("centralized", **settings)
    encoder, _, _ = multi_task_sgd(federation, settings, optimizer)
    state, _, _ = ours(federation, settings)
    torch.testing.assert_close(state.encoder, vector(encoder), rtol=1e-9, atol=1e-12)


def gradnorm(federation, settings, gamma, weight_lr):
    """GradNorm with autograd on its own loss, L_grad(w) = Σ |w_i n_i - target_i|, one round: the weights and losses of every step."""
    encoder, heads = models(federation, settings)
    ids = sorted(heads)
    w, seen = torch.ones(len(ids), dtype=torch.float64), []
    drawn = {id: batches(federation.client(id), 1, settings) for id in ids}
    with torch.no_grad():
        whole = {id: federation.client(id) for id in ids}
        first = torch.stack(
            [
                one.task.loss(heads[id](encoder(one.train_data[0])), one.train_data[1])
                for id, one in whole.items()
            ]
        )
    for step in range(STEPS):
        losses = torch.stack(
            [
                whole[id].task.loss(heads[id](encoder(drawn[id][step][0])), drawn[id][step][1])
                for id in ids
            ]
        )
        last = list(encoder.parameters())[-2:]  # the last shared layer, bias included
        norms = torch.stack(
            [
                torch.cat(
                    [g.reshape(-1) for g in torch.autograd.grad(loss, last, retain_graph=True)]
                ).norm()
                for loss in losses
            ]
        )
        rates = losses.detach() / first
        with torch.no_grad():
            target = (w * norms).mean() * (rates / rates.mean()) ** gamma
        free = w.clone().requires_grad_()
        (slope,) = torch.autograd.grad((free * norms.detach() - target).abs().sum(), free)
        w = w - weight_lr * slope
        w = w * len(ids) / w.sum()
        of_encoder = torch.autograd.grad(
            (w * losses).sum() / len(ids), list(encoder.parameters()), retain_graph=True
        )
        of_heads = {
            id: torch.autograd.grad(loss, list(heads[id].parameters()), retain_graph=True)
            for id, loss in zip(ids, losses, strict=True)
        }
        with torch.no_grad():
            for parameter, gradient in zip(encoder.parameters(), of_encoder, strict=True):
                parameter -= settings.encoder_lr * gradient
            for id in ids:
                for parameter, gradient in zip(heads[id].parameters(), of_heads[id], strict=True):
                    parameter -= settings.head_lr * gradient
        seen.append(w)
    return encoder, seen


def test_with_fedgradnorm_it_is_gradnorm_step_by_step():
    federation, settings = federation_of(torch.float64), training("centralized")
    encoder, weights = gradnorm(federation, settings, gamma=1.5, weight_lr=0.05)
    state, _, _ = ours(federation, settings, FedGradNorm(gamma=1.5, weight_lr=0.05), rounds=1)
    found = torch.tensor(
        [state.weighting.weights[id] for id in sorted(state.weighting.weights)], dtype=torch.float64
    )
    torch.testing.assert_close(found, weights[-1], rtol=1e-10, atol=1e-12)
    check_close(state.encoder, vector(encoder))
    assert (weights[-1] - 1).abs().max() > 0.02
    assert (weights[-1] - weights[0]).abs().max() > 0.01


def test_a_rounds_record_has_means_over_its_steps_and_the_last_weights():
    federation, method, settings = (
        federation_of(torch.float64),
        FedGradNorm(),
        training("centralized", encoder_steps=3),
    )
    seen = []

    class Watched(ReferenceEngine):
        def execute(self, instructions):
            assert [instruction.step for instruction in instructions] == [len(seen)] * 4
            assert {instruction.round for instruction in instructions} == {1}
            seen.append({report.client: report for report in super().execute(instructions)})
            return list(seen[-1].values())

    state = initial_state(federation, method, 2)
    after, record = run_round(state, federation, Watched(federation, 2), method, Mean(), settings)
    assert len(seen) == 3
    assert dict(record.weights.values) == dict(after.weighting.weights)
    assert [report.client for report in record.reports] == sorted(federation.client_ids)
    for report in record.reports:
        own = [step[report.client] for step in seen]
        assert report.loss == pytest.approx(np.mean([one.loss for one in own]))
        assert report.grad_norm == pytest.approx(np.mean([one.grad_norm for one in own]))
        assert report.seconds == pytest.approx(sum(one.seconds for one in own))
        torch.testing.assert_close(
            report.gradient, torch.stack([one.gradient for one in own]).mean(dim=0)
        )
    targets, weighting = [], method.init(sorted(federation.client_ids))
    for step in seen:
        weights, weighting = method.update(weighting, [step[id] for id in sorted(step)])
        targets.append(weights.targets)
    for id, target in record.weights.targets.items():
        assert target == pytest.approx(np.mean([each[id] for each in targets]))


def test_a_client_that_is_dropped_at_a_step_counts_as_dropped():
    federation, seen = digits.make(0), []

    class Failing(ReferenceEngine):
        def execute(self, instructions):
            seen.append(instructions)
            return [
                report
                for report in super().execute(instructions)
                if report.client != "loop" or len(seen) != 2
            ]

    _, record = run_round(
        initial_state(federation, Equal(), 2),
        federation,
        Failing(federation, 2),
        Equal(),
        Mean(),
        training("centralized"),
    )
    assert record.dropped == {"loop": "no report"}
    assert [report.client for report in record.reports] == ["class", "mass", "parity"]


def test_a_step_has_dropout_of_its_own():
    federation = small_federation(encoder=dropout_encoder)
    seen = []

    class Watched(ReferenceEngine):
        def execute(self, instructions):
            reports = super().execute(instructions)
            seen.append([report.loss for report in reports])
            return reports

    # steps of (almost) no length on all examples: only dropout makes one differ from another
    ours(
        federation,
        training("centralized", encoder_lr=1e-9, head_lr=1e-9, batch_size=100),
        engine=Watched,
        rounds=1,
    )
    assert len(seen) == STEPS
    assert len({tuple(losses) for losses in seen}) == STEPS


def test_a_round_that_stops_half_way_is_undone():
    federation, settings = digits.make(0), training("centralized", min_clients=4, max_retries=1)

    class Failing(ReferenceEngine):
        calls = 0

        def execute(self, instructions):
            Failing.calls += 1
            reports = super().execute(instructions)
            return reports if Failing.calls < 3 else reports[1:]

    engine = Failing(federation, 2)
    before, state = engine.client_states, initial_state(federation, Equal(), 2)
    with pytest.raises(StoppedError, match="round 1: 3 sound reports, expected at least 4"):
        run_round(state, federation, engine, Equal(), Mean(), settings)
    assert Failing.calls == 4
    assert all(engine.client_states[id] is before[id] for id in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.fraction_train=0.5"], "centralized trains on all data at every step"),
        (["train.participants=[['class']]"], "centralized trains on all data at every step"),
        (["faults.drop=0.1"], "centralized sends no reports that could meet faults"),
    ],
)
def test_what_it_cannot_do_is_refused(words, message, tmp_path):
    with pytest.raises(ConfigError, match=f"train.method: {message}"):
        run(
            load_config(
                None,
                [
                    "federation.name=digits",
                    "train.method=centralized",
                    f"run.dir={tmp_path / 'run'}",
                    *words,
                ],
            )
        )
    assert not (tmp_path / "run").exists()


def test_nothing_is_sent_and_the_rows_are_those_of_every_run():
    result = train(
        digits.make(0), method="centralized", num_rounds=2, encoder_steps=3, eval_every=1
    )
    federated = train(digits.make(0), method="fedper", num_rounds=2, encoder_steps=3, eval_every=1)
    assert result.summary["bytes_up"] == result.summary["bytes_down"] == 0
    assert [row.keys() for row in result.rows] == [row.keys() for row in federated.rows]
    for one, other in zip(result.rows, federated.rows, strict=True):
        assert {key for key, value in one.items() if value is None} == {
            key for key, value in other.items() if value is None
        }
        assert (one["round"], one["client"], one["initial_loss"]) == (
            other["round"],
            other["client"],
            other["initial_loss"],
        )
