"""The whole of FedGradNorm written once more, naively, with no code of the package but its generators: the oracle's oracle."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedgradnorm import FedGradNorm, train
from fedgradnorm.federations import digits
from fedgradnorm.randomness import quick_generator

ROUNDS, HEAD_STEPS, ENCODER_STEPS, HEAD_LR, ENCODER_LR, BATCH = 3, 4, 5, 0.1, 0.05, 16
GAMMA, WEIGHT_LR = 0.7, 0.2


def shuffled(num_examples, steps, *key):
    order = np.concatenate(
        [
            np.argsort(numbers)
            for numbers in quick_generator(*key).random(
                (-(-steps * BATCH // num_examples), num_examples)
            )
        ]
    )
    return [torch.from_numpy(order[step * BATCH : (step + 1) * BATCH]) for step in range(steps)]


def naive(federation, seed):
    clients = sorted(federation.clients, key=lambda client: client.id)
    encoder = federation.make_encoder(seed)
    heads = {client.id: federation.make_head(client, seed) for client in clients}
    weights, first, losses = {client.id: 1.0 for client in clients}, {}, {}
    for round in range(1, ROUNDS + 1):
        gradients, norms = {}, {}
        for client in clients:
            (x, y), task, head, own = (
                client.train_data,
                client.task,
                heads[client.id],
                copy.deepcopy(encoder),
            )
            if round == 1:
                first[client.id] = task.loss(head(own(x)), y).item()
            for batch in shuffled(len(x), HEAD_STEPS, seed, round, client.id, "head batches"):
                head.zero_grad()
                task.loss(head(own(x[batch])), y[batch]).backward()
                for parameter in head.parameters():
                    parameter.data -= HEAD_LR * parameter.grad
            seen = []
            for batch in shuffled(len(x), ENCODER_STEPS, seed, round, client.id, "encoder batches"):
                own.zero_grad()
                loss = task.loss(head(own(x[batch])), y[batch])
                loss.backward()
                seen.append(loss.item())
                for parameter in own.parameters():
                    parameter.data -= ENCODER_LR * parameter.grad
            steps = ENCODER_STEPS * ENCODER_LR
            gradients[client.id] = [
                (a.data - b.data) / steps
                for a, b in zip(encoder.parameters(), own.parameters(), strict=True)
            ]
            norms[client.id] = np.sqrt(
                sum((part.double() ** 2).sum().item() for part in gradients[client.id][-2:])
            )
            losses[client.id] = np.mean(seen)
        ids = [client.id for client in clients]
        rates = {id: losses[id] / first[id] for id in ids}
        weighted = np.mean([weights[id] * norms[id] for id in ids])
        for id, above in [
            (
                id,
                weights[id] * norms[id]
                > weighted * (rates[id] / np.mean([*rates.values()])) ** GAMMA,
            )
            for id in ids
        ]:
            weights[id] += (-1 if above else 1) * WEIGHT_LR * norms[id]
        total = sum(weights.values())
        weights = {id: weight * len(ids) / total for id, weight in weights.items()}
        for index, parameter in enumerate(encoder.parameters()):
            parameter.data -= (
                ENCODER_STEPS
                * ENCODER_LR
                * sum(weights[id] * gradients[id][index] for id in ids)
                / len(ids)
            )
    return encoder, heads, weights, losses


@pytest.mark.parametrize("seed", [0, 1])
def test_three_rounds_agree_with_the_algorithm_written_out(seed):
    federation = digits.make(seed)
    encoder, heads, weights, losses = naive(federation, seed)
    result = train(
        federation,
        FedGradNorm(gamma=GAMMA, weight_lr=WEIGHT_LR),
        num_rounds=ROUNDS,
        head_steps=HEAD_STEPS,
        encoder_steps=ENCODER_STEPS,
        head_lr=HEAD_LR,
        encoder_lr=ENCODER_LR,
        batch_size=BATCH,
        seed=seed,
    )
    assert result.weights == pytest.approx(weights, rel=1e-4)
    assert {row["client"]: row["loss"] for row in result.rows[-4:]} == pytest.approx(
        losses, rel=1e-4
    )
    pairs = [
        (result.encoder(), encoder),
        *((result.model(id).head, head) for id, head in heads.items()),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(
            nn.utils.parameters_to_vector(ours.parameters()),
            nn.utils.parameters_to_vector(theirs.parameters()),
            rtol=1e-4,
            atol=1e-5,
        )
    assert max(abs(weight - 1) for weight in weights.values()) > 0.01
