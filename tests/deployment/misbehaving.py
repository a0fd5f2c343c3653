"""A federation of three clients that misbehave on purpose, each in rounds that the settings name. It is part of the deployed app."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgradnorm import Client, Federation, Task

LONGEST = 900.0  # seconds that a client hangs at most


def make(
    seed: int, folder: str, faults: Mapping[str, Mapping[str, str]] | None = None
) -> Federation:
    """Linear tasks on random vectors.

    Args:
        seed: of the data.
        folder: where clients note that they train (``CLIENT-2`` the second time), and where they look for ``release``.
        faults: by client, and by how many times it has trained, ``raise``, ``spoil`` (it sends NaN) or ``hang`` (until there is a file
            ``release``).
    """
    clients = []
    for place, id in enumerate(("a", "b", "c")):
        inputs = torch.randn(
            40 + 10 * place, 5, generator=torch.Generator().manual_seed(seed + place)
        )
        targets = inputs[:, place : place + 1] * (place + 1) + 1
        loss = Loss(id, Path(folder), (faults or {}).get(id, {}))
        clients.append(
            Client(
                id,
                Task(id, partial(nn.Linear, out_features=1), loss),
                (inputs, targets),
                (inputs, targets),
            )
        )
    return Federation(clients, lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh()))


class Loss:
    """A mean squared error that misbehaves. Every message starts a process, so an object of it lives for one round."""

    def __init__(self, client: str, folder: Path, faults: Mapping[str, str]) -> None:
        self.client, self.folder, self.faults = client, folder, faults
        self.fault: str | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss."""
        loss = functional.mse_loss(outputs, targets)
        if not self.faults or not torch.is_grad_enabled():
            return loss
        if self.fault is None:
            self.fault = self._begin()
        return loss * float("nan") if self.fault == "spoil" else loss

    def _begin(self) -> str:
        time_of_training = len(list(self.folder.glob(f"{self.client}-*"))) + 1
        (self.folder / f"{self.client}-{time_of_training}").touch()
        fault = self.faults.get(str(time_of_training), "")
        if fault == "raise":
            raise RuntimeError("on purpose")
        end = time.monotonic() + LONGEST
        while fault == "hang" and time.monotonic() < end and not (self.folder / "release").exists():
            time.sleep(0.1)
        return fault
