"""Training loops in plain torch, with nothing of the package but its generators and its initial models."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedgradnorm import Client, Federation, Task
from fedgradnorm.aggregation import Mean
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.federations import digits
from fedgradnorm.randomness import quick_generator
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.weighting import Equal

ROUNDS, STEPS, BATCH = 3, 5, 16
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def training(method="fedrep", **settings):
    values = {
        "head_steps": 4,
        "encoder_steps": STEPS,
        "batch_size": BATCH,
        "head_lr": 0.03,
        "encoder_lr": 0.05,
        "seed": 2,
    }
    return TrainConfig(method=method, **(values | settings))


def federation_of(dtype, tasks=("class", "parity", "loop", "mass"), **options):
    """The digits in this precision."""

    def cast(data):
        return tuple(part.to(dtype) if part.is_floating_point() else part for part in data)

    made = digits.make(0, tasks, **options)
    tasks = {client.task.name: client.task for client in made.clients}
    tasks = {
        name: Task(
            name, lambda features, make=task.head: make(features).to(dtype), task.loss, task.metrics
        )
        for name, task in tasks.items()
    }
    clients = [
        Client(one.id, tasks[one.task.name], cast(one.train_data), cast(one.test_data))
        for one in made.clients
    ]
    return Federation(clients, lambda: made.encoder().to(dtype))


def batches(client, round, settings):
    """The examples of the round's encoder steps."""
    examples, batch = len(client.train_data[0]), settings.batch_size
    if examples > max(
        4 * STEPS * batch, 1024
    ):  # so few are drawn that the first different ones of random numbers are taken
        rng, drawn = quick_generator(settings.seed, round, client.id, "encoder batches"), {}
        while len(drawn) < STEPS * batch:
            drawn |= dict.fromkeys(rng.integers(examples, size=STEPS * batch).tolist())
        order = np.array(list(drawn)[: STEPS * batch])
        indices = [
            torch.from_numpy(order[step * batch : (step + 1) * batch]) for step in range(STEPS)
        ]
        return [(client.train_data[0][index], client.train_data[1][index]) for index in indices]
    numbers = quick_generator(settings.seed, round, client.id, "encoder batches").random(
        (-(-STEPS * batch // examples), examples)
    )
    order = np.concatenate([np.argsort(one) for one in numbers])
    indices = [torch.from_numpy(order[step * batch : (step + 1) * batch]) for step in range(STEPS)]
    return [(client.train_data[0][index], client.train_data[1][index]) for index in indices]


def models(federation, settings):
    """The initial encoder, and every client's initial head."""
    return federation.make_encoder(settings.seed), {
        one.id: federation.make_head(one, settings.seed) for one in federation.clients
    }


def sgd_round(client, encoder, head, round, settings, head_optimizer=None):
    """Joint SGD on encoder and head, in place: the mean loss."""
    optimizers = [
        torch.optim.SGD(encoder.parameters(), lr=settings.encoder_lr),
        head_optimizer or torch.optim.SGD(head.parameters(), lr=settings.head_lr),
    ]
    losses = []
    for inputs, targets in batches(client, round, settings):
        loss = client.task.loss(head(encoder(inputs)), targets)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return np.mean(losses)


def fedper(federation, settings, share_of=lambda client: 1.0):
    """Joint rounds whose encoders are averaged: the encoder, the heads, and the losses by round."""
    encoder, heads = models(federation, settings)
    optimizers = {
        id: torch.optim.SGD(head.parameters(), settings.head_lr, settings.head_momentum)
        for id, head in heads.items()
    }
    losses, total = [], sum(map(share_of, federation.clients))
    for round in range(1, ROUNDS + 1):
        mean, here = 0, {}
        for client in federation.clients:
            own = copy.deepcopy(encoder)
            here[client.id] = sgd_round(
                client, own, heads[client.id], round, settings, optimizers[client.id]
            )
            mean = mean + parameters_to_vector(own.parameters()).detach() * (
                share_of(client) / total
            )
        vector_to_parameters(mean, encoder.parameters())
        losses.append(here)
    return encoder, heads, losses


def ours(federation, settings, weighting=None, engine=ReferenceEngine, rounds=ROUNDS):
    """What the package gives: the server's last state, the engine, and the losses by round."""
    engine, weighting, losses = engine(federation, settings.seed), weighting or Equal(), []
    state = initial_state(federation, weighting, settings.seed)
    for _ in range(rounds):
        state, record = run_round(state, federation, engine, weighting, Mean(), settings)
        assert not record.dropped
        losses.append({report.client: report.loss for report in record.reports})
    return state, engine, losses


def vector(module: nn.Module) -> torch.Tensor:
    return parameters_to_vector(module.parameters()).detach()


def head_vector(engine, client):
    return torch.cat([value.reshape(-1) for value in engine.client_states[client].head.values()])


def check_close(found, expected):
    """Within 1e-6 of its length, in double precision 1e-12."""
    apart = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert apart <= TOLERANCE[expected.dtype], f"{apart:.2g} apart"
