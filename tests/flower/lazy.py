"""A federation whose data are loaded on first use, and which notes whose."""

from functools import partial

import torch

from fedgradnorm import Client, Federation
from tests.helpers import small_client, small_encoder, small_task

OPENED: list[str] = []


def make(seed: int, names: tuple[str, ...] = ("a", "b", "c"), failing: str = "") -> Federation:
    """Clients with 20, 25, 30, ... examples. The data of one client cannot be read."""
    del seed
    clients = [
        Client(
            id,
            small_task(id),
            broken if id == failing else partial(load, id, 20 + 5 * place),
            partial(load, id, 20),
        )
        for place, id in enumerate(names)
    ]
    return Federation(clients, small_encoder, example=torch.zeros(1, 6))


def load(id: str, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    OPENED.append(id)
    return small_client(id, examples=examples).train_data


def broken() -> tuple[torch.Tensor, torch.Tensor]:
    raise ValueError("line 17: Jane Doe, born 1970")


def opened() -> list[str]:
    """Whose data were loaded since this was asked last."""
    found = sorted(set(OPENED))
    OPENED.clear()
    return found
