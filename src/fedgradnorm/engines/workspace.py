"""Scratch models that a worker trains in, arranged for speed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedgradnorm.federation import Client, Federation
from fedgradnorm.parameters import norm_layer_slices, trainable

__all__ = ["Workspace", "head_kind", "pool_first", "views"]


def head_kind(client: Client) -> tuple[object, object]:
    """What clients with alike heads and the same loss have in common: the functions, or partials of one function with equal arguments."""
    return _kind(client.task.head), _kind(client.task.loss)


def _kind(function: Callable[..., object]) -> object:
    if isinstance(function, partial):
        try:
            key = (_kind(function.func), function.args, frozenset(function.keywords.items()))
            hash(key)
        except TypeError:
            return id(function)
        return key
    return id(function)


class Workspace:
    """An encoder, and a head of each kind, as scratch space of one worker.

    Args:
        federation: whose models.
        seed: of their initialisation, which is where frozen parameters stay.
        device: where they are.
    """

    def __init__(self, federation: Federation, seed: int, device: torch.device) -> None:
        self.federation, self.seed, self.device = federation, seed, device
        self.encoder = federation.make_encoder(seed).to(device)
        self.norm_layer = norm_layer_slices(self.encoder, federation.norm_layer)
        pool_first(self.encoder)
        if any(isinstance(module, nn.Conv2d) for module in self.encoder.modules()):
            self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub knows no memory_format alone
        self._heads: dict[object, nn.Module] = {}

    def head(self, client: Client) -> nn.Module:
        """A head such as this client's, with whatever parameters it was left with."""
        kind = head_kind(client)
        if kind not in self._heads:
            self._heads[kind] = self.federation.make_head(client, self.seed).to(self.device)
        return self._heads[kind]


def views(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """The parameters as views into flat vectors of shape ``(P,)`` or ``(clients, P)``, by name."""
    parameters = trainable(module)
    parts = flat.split([parameter.numel() for _, parameter in parameters], dim=-1)
    return {name: part.view(*flat.shape[:-1], *parameter.shape) for (name, parameter), part in zip(parameters, parts, strict=True)}


def pool_first(module: nn.Module) -> None:
    """In every ``nn.Sequential`` let max-pooling come before a ReLU that it follows: the same numbers for a quarter of the work."""
    for sequence in module.modules():
        if isinstance(sequence, nn.Sequential):
            for place in range(len(sequence) - 1):
                activation, pool = sequence[place], sequence[place + 1]
                if type(activation) is nn.ReLU and type(pool) is nn.MaxPool2d and not pool.return_indices:
                    sequence[place], sequence[place + 1] = pool, activation
