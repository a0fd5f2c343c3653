"""Two tasks on the digits, one of whose clients loads its data on first use. It is part of the deployed app."""

from dataclasses import replace
from functools import partial

import torch

from fedgradnorm import Federation
from fedgradnorm.federations import digits


def make(seed: int) -> Federation:
    """Client ``class`` has its data at once, and ``parity`` loads them."""
    federation = digits.make(seed, tasks=("class", "parity"))
    clients = [
        replace(client, train=partial(data, seed, "train"), test=partial(data, seed, "test"))
        if client.id == "parity"
        else client
        for client in federation.clients
    ]
    return replace(federation, clients=clients, example=torch.zeros(1, 64))


def data(seed: int, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The training or test data of client ``parity``."""
    _, client = digits.make(seed, tasks=("class", "parity")).clients
    return client.train if part == "train" else client.test
