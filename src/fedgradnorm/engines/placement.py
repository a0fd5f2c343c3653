"""Moves values between the CPU, where messages and states are, and the device that trains."""

from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.data import Data, Dataset
from fedgradnorm.errors import ConfigError
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction, Report

__all__ = ["at_home", "client_on", "device_named", "free_memory", "instructions_on"]


def device_named(name: str) -> torch.device:
    """The device of this name. Raises ConfigError where there is none."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: expected 'cpu' or 'cuda', found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected 'cpu' or 'cuda', found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} is not here: torch finds {torch.cuda.device_count()} GPUs"
        )
    return device


def free_memory(device: torch.device) -> int:
    """The free memory of the machine or of the GPU, in bytes."""
    return (
        psutil.virtual_memory().available
        if device.type == "cpu"
        else torch.cuda.mem_get_info(device)[0]
    )


def instructions_on(
    device: torch.device, instructions: Sequence[Instruction]
) -> Sequence[Instruction]:
    """The instructions with their encoders on the device. A shared encoder is copied once."""
    if device.type == "cpu":
        return instructions
    copies: dict[int, Tensor] = {}
    for instruction in instructions:
        if id(instruction.encoder) not in copies:
            copies[id(instruction.encoder)] = instruction.encoder.to(device)
    return [
        replace(instruction, encoder=copies[id(instruction.encoder)])
        for instruction in instructions
    ]


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

    def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    return (
        replace(report, gradient=report.gradient.cpu(), buffers=home(dict(report.buffers))),
        replace(
            state,
            head=home(dict(state.head)),
            encoder_buffers=home(dict(state.encoder_buffers)),
            head_velocity=home(dict(state.head_velocity)),
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
