"""One client at a time: a faster way to the same features, for `local_update` to use."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import size, take
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction
from fedgradnorm.training.steps import HEAD_BATCHES, order_of

__all__ = ["encoded_once"]

ENCODED_AT_ONCE = 128
"""Examples in one pass for features: enough for full speed, few enough for convolutions to stay in the cache."""


def encoded_once(client: Client, encoder: nn.Module, instruction: Instruction) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the head's steps as features, each example encoded once; for encoders that treat each by itself."""
    order = order_of(client, instruction, HEAD_BATCHES, instruction.training.head_steps)
    if order.size > size(client.train_data):  # then every example is drawn, and some are drawn again
        drawn = np.arange(size(client.train_data))
    else:
        drawn, order = order.reshape(-1), np.arange(order.size).reshape(order.shape)
    features, targets = [], []
    for start in range(0, len(drawn), ENCODED_AT_ONCE):
        inputs, expected = take(client.train_data, drawn[start : start + ENCODED_AT_ONCE])
        with torch.no_grad():
            features.append(encoder(inputs))
        targets.append(expected)
    encoded, expected = take((torch.cat(features), torch.cat(targets)), order.reshape(-1))
    yield from zip(encoded.split(order.shape[1]), expected.split(order.shape[1]), strict=True)
