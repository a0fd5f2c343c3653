"""The workloads of the speed benchmark, in torch alone, so that every peer trains the very same thing in its own environment.

A round is FedRep's: every client takes ``head_steps`` SGD steps on its head with the encoder fixed, then ``encoder_steps`` on the encoder
with the head fixed, on mini-batches drawn without replacement; then the encoders are averaged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A federation of alike clients, and how they train.

    Attributes:
        encoder: makes the shared network.
        head: makes a client's head.
        input_shape: of one example.
        classes: of the targets.
        clients: how many there are, unless the benchmark is asked for another number.
        examples: training examples a client.
        batch_size: examples a step.
        head_steps: SGD steps on the head a round.
        encoder_steps: SGD steps on the encoder a round.
        step_size: of both.
    """

    encoder: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    clients: int
    examples: int
    batch_size: int
    head_steps: int
    encoder_steps: int
    step_size: float = 0.01

    def data(self, client: int) -> tuple[Tensor, Tensor]:
        """The training data of a client: Gaussian inputs, and as class the largest of a few fixed projections."""
        inputs = torch.randn(
            self.examples, *self.input_shape, generator=torch.Generator().manual_seed(1 + client)
        )
        projections = torch.randn(
            prod(self.input_shape), self.classes, generator=torch.Generator().manual_seed(0)
        )
        return inputs, (inputs.flatten(1) @ projections).argmax(dim=1)


def _mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((1, 16, 5), (16, 48, 3), (48, 64, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 100), nn.ReLU())


def _head_w1() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 8))


WORKLOADS = {
    "W1": Workload(partial(_mlp, 256, 512, 512, 256), _head_w1, (256,), 8, 10, 512, 64, 10, 10),
    "W2": Workload(_cnn, partial(nn.Linear, 100, 5), (1, 40, 40), 5, 10, 256, 64, 10, 10),
    "W5": Workload(
        partial(_mlp, 64, 32, 32), partial(nn.Linear, 32, 4), (64,), 4, 1000, 32, 16, 5, 5
    ),
}
"""W1: an MLP. W2: a CNN on grey 40 x 40 images. W5: many small clients."""
