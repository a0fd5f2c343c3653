"""A federation whose data are loaded on first use, and which notes whose."""

from functools import partial

import torch

from fedgradnorm import Client, Federation
from tests.helpers import small_client, small_encoder, small_task

OPENED: list[str] = []


def make(seed: int, names: tuple[str, ...] = ("a", "b", "c")) -> Federation:
    """Clients with data of different sizes: 20 examples, 25, 30 and so on."""
    del seed
    clients = [Client(id, small_task(id), partial(load, id, 20 + 5 * place), partial(load, id, 20)) for place, id in enumerate(names)]
    return Federation(clients, small_encoder, example=torch.zeros(1, 6))


def load(id: str, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    OPENED.append(id)
    return small_client(id, examples=examples).train_data


def opened() -> list[str]:
    """Whose data were loaded since this was asked last."""
    found = sorted(set(OPENED))
    OPENED.clear()
    return found
