"""scikit-learn's 1,797 handwritten digits with five tasks, bundled and small."""

from collections.abc import Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from fedgradnorm.errors import require
from fedgradnorm.federation import Client, Federation
from fedgradnorm.federations.partition import client_ids_of, partition
from fedgradnorm.federations.tasks import classification, with_loss_scale
from fedgradnorm.metrics import MEAN_ABSOLUTE_ERROR
from fedgradnorm.models import linear_head, mlp
from fedgradnorm.task import Task

HAS_LOOP = torch.tensor([True, False, False, False, False, False, True, False, True, True])
BRIGHTEST = 16


def _tenth_of_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error / 10, whose gradients are about as large as those of cross-entropies.

    So the default step sizes are stable for it too.
    """
    return functional.mse_loss(outputs, targets) / 10


MASS_HEAD = partial(linear_head, out_features=1)
TASKS = {
    "class": classification("class", 10),
    **{name: classification(name, 2) for name in ("parity", "loop", "large")},
    "mass": Task("mass", MASS_HEAD, _tenth_of_squared_error, (MEAN_ABSOLUTE_ERROR,)),
}


@cache
def _pool() -> tuple[Tensor, dict[str, Tensor]]:
    """All images, shape ``(1797, 64)``, standardised over all pixels, and the targets by task."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / BRIGHTEST
    labels = torch.tensor(digits.target, dtype=torch.int64)
    mass = images.sum(dim=1, keepdim=True)
    targets = {
        "class": labels,
        "parity": labels % 2,
        "loop": HAS_LOOP[labels].long(),
        "large": (labels >= 5).long(),
    }
    targets["mass"] = (mass - mass.mean()) / mass.std()
    return (images - images.mean()) / images.std(), targets


def make(
    seed: int,
    tasks: Sequence[str] = ("class", "parity", "loop", "mass"),
    clients_per_task: int = 1,
    sizes: str | Mapping[str, int | float] = "equal",
    alpha: float = 0.5,
    test_fraction: float = 0.25,
    loss_scale: Mapping[str, float] = {},
) -> Federation:
    """Handwritten digits of 8 x 8 pixels with up to five tasks.

    ``class``: which digit; ``parity``: odd or even; ``loop``: whether it has a loop (0, 6, 8, 9);
    ``mass``: the stroke mass, a regression; ``large``: whether it is 5 or more.

    Args:
        seed: seed of the split into clients. The test split is the same for every seed.
        tasks: which of ``class``, ``parity``, ``loop``, ``large``, ``mass``.
        clients_per_task: the number of clients of each task.
        sizes: how the training images are divided among the clients; see `partition`.
        alpha: the concentration for ``sizes="dirichlet"``.
        test_fraction: the share of the images for testing. Every client has all test images.
        loss_scale: by task, a factor on its loss, and so on its gradients.

    Raises:
        ConfigError: an unknown task, or a value out of range.
    """
    in_range = 0.01 <= test_fraction <= 0.9
    require(in_range, "test_fraction", "a number from 0.01 to 0.9", test_fraction)
    images, targets = _pool()
    train, test = train_test_split(
        np.arange(len(images)), test_size=test_fraction, random_state=0, stratify=targets["class"]
    )
    clients = client_ids_of(tasks, clients_per_task, TASKS)
    parts = partition(len(train), clients, sizes, alpha, seed)
    known = with_loss_scale(TASKS, loss_scale)
    members = []
    for id, task in clients.items():
        own = train[parts[id]]
        data = (images[own], targets[task][own])
        members.append(Client(id, known[task], data, (images[test], targets[task][test])))
    encoder = partial(mlp, input_shape=(64,), hidden=(64, 32), he_init=False)
    return Federation(members, encoder=encoder)
