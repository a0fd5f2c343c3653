"""A federation whose data are loaded on first use, and which notes whose."""

from functools import partial

import torch

from fedgradnorm import Client, Federation
from tests.helpers import small_client, small_encoder, small_task

OPENED: list[str] = []


def make(seed: int, example: bool = True) -> Federation:
    """Three clients with data of different sizes."""
    del seed
    clients = [
        Client(id, small_task(id), partial(load, id, examples), partial(load, id, 20)) for id, examples in (("a", 20), ("b", 25), ("c", 30))
    ]
    return Federation(clients, small_encoder, example=torch.zeros(1, 6) if example else None)


def load(id: str, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    OPENED.append(id)
    return small_client(id, examples=examples).train_data


def opened() -> list[str]:
    """Whose data were loaded since this was asked last."""
    found = sorted(set(OPENED))
    OPENED.clear()
    return found
