"""Where values are: messages and states on the CPU, training on a device, gradients in a store."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.data import Data, Dataset
from fedgradnorm.errors import ConfigError
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction, Report


def device_named(name: str) -> torch.device:
    """The device of this name. Raises ConfigError where there is none."""
    refusal = ConfigError(f"device: expected 'cpu' or 'cuda', found {name!r}")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise refusal from error
    if device.type not in ("cpu", "cuda"):
        raise refusal
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device: {name!r} is not here: torch finds {count} GPUs")
    return device


def free_memory(device: torch.device) -> int:
    """The free memory of the machine or of the GPU, in bytes."""
    cpu = device.type == "cpu"
    return int(psutil.virtual_memory().available if cpu else torch.cuda.mem_get_info(device)[0])


def instructions_on(device: torch.device, sent: Sequence[Instruction]) -> Sequence[Instruction]:
    """The instructions with their encoders on the device. A shared encoder is copied once."""
    if device.type == "cpu":
        return sent
    encoders = {id(instruction.encoder): instruction.encoder for instruction in sent}
    copies = {key: encoder.to(device) for key, encoder in encoders.items()}
    return [replace(instruction, encoder=copies[id(instruction.encoder)]) for instruction in sent]


def client_on(device: torch.device, client: Client) -> Client:
    """The client with its data on the device."""
    if device.type == "cpu":
        return client
    test = None if client.test_data is None else _data_on(device, client.test_data)
    return replace(client, train=_data_on(device, client.train_data), test=test)


def at_home(report: Report, state: ClientState) -> tuple[Report, ClientState]:
    """A report and a state with their tensors on the CPU."""
    if report.gradient.device.type == "cpu":
        return report, state

    def home(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    return (
        replace(report, gradient=report.gradient.cpu(), buffers=home(report.buffers)),
        replace(
            state,
            head=home(state.head),
            encoder_buffers=home(state.encoder_buffers),
            head_velocity=home(state.head_velocity),
            encoder=None if state.encoder is None else state.encoder.cpu(),
        ),
    )


def _data_on(device: torch.device, data: Data) -> Data:
    if isinstance(data, tuple):
        return data[0].to(device), data[1].to(device)
    return _DatasetOn(device, data)


class _DatasetOn:
    def __init__(self, device: torch.device, dataset: Dataset) -> None:
        self.device, self.dataset = device, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.dataset[index]
        return torch.as_tensor(inputs).to(self.device), torch.as_tensor(targets).to(self.device)


class GradientStore:
    """Keeps a round's gradients in memory, or beyond a limit in a temporary file mapped into it.

    Args:
        clients: the clients that report.
        encoder: a vector with the shape and type of a gradient.
        limit: bytes.
    """

    def __init__(self, clients: Sequence[str], encoder: Tensor, limit: int) -> None:
        self.rows: dict[str, Tensor] = {}
        num_bytes = len(clients) * encoder.nbytes
        if num_bytes > limit:
            with tempfile.NamedTemporaryFile(prefix="fedgradnorm-") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is then an error here, not later
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                else:
                    os.truncate(file.fileno(), num_bytes)
                elements = len(clients) * len(encoder)
                mapped = torch.from_file(file.name, True, elements, dtype=encoder.dtype)
            self.rows = dict(zip(clients, mapped.view(len(clients), -1).unbind(), strict=True))

    def keep(self, report: Report) -> Report:
        """The same report, with its gradient in this store."""
        if not self.rows:
            return report
        return replace(report, gradient=self.rows[report.client].copy_(report.gradient))
