"""The encoder as arrays in messages, and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor, nn

from fedgradnorm.errors import FederationError, MessageError
from fedgradnorm.flower.records import ARRAYS, BUFFERS, check_size, one_line
from fedgradnorm.parameters import trainable


@dataclass(frozen=True)
class Layout:
    """The encoder's trainable parameters: names and shapes in the flat vector's order, and type."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, encoder: nn.Module) -> "Layout":
        """The layout of an encoder."""
        parameters = trainable(encoder)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        return cls(shapes, parameters[0][1].dtype)

    def arrays(self, vector: Tensor) -> ArrayRecord:
        """A flat vector as arrays by name."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return arrays_of({name: part.view(shape) for (name, shape), part in pairs})

    def vector(self, record: ArrayRecord) -> Tensor:
        """The flat vector of arrays.

        Raises:
            MessageError: names, shapes or types differ from the encoder's.
        """
        if record.keys() != self.shapes.keys():
            odd = sorted(record.keys() ^ self.shapes.keys())[0]
            found = f"found {len(record)}; '{odd}' is in one alone"
            raise MessageError(f"arrays: expected those of the encoder, {found}")
        for name, shape in self.shapes.items():
            size = math.prod(shape) * self.dtype.itemsize
            check_size(f"array '{name}'", len(record[name].data), size)
        tensors = tensors_of(record)
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
                expected = f"expected {self.dtype} of {shape}"
                found = f"found {tensor.dtype} of {tuple(tensor.shape)}"
                raise MessageError(f"array '{name}': {expected}, {found}")
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as arrays. Raises FederationError for types that NumPy lacks, such as bfloat16."""
    numbers = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in numbers.items()})
    except TypeError as error:
        types = sorted({str(tensor.dtype) for tensor in tensors.values()})
        expected = "expected numbers of a type that a message can hold, such as float32"
        raise FederationError(f"encoder: {expected}, found {types}") from error


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Arrays as tensors with their own memory. Raises MessageError if one is not of numbers."""
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except Exception as error:  # NumPy reads bytes of any kind here
        raise MessageError(f"arrays: expected arrays of numbers; {one_line(error)}") from error


def encoder_of(records: RecordDict) -> ArrayRecord:
    """The encoder's arrays. Raises MessageError where there are none."""
    arrays = records.array_records.get(ARRAYS)
    if arrays is None:
        raise MessageError(f"expected a record '{ARRAYS}', found {sorted(records)}")
    return arrays


def buffers_in(records: RecordDict) -> dict[str, Tensor]:
    """The encoder's buffers by name, maybe none. Raises MessageError if one is not of numbers."""
    buffers = records.array_records.get(BUFFERS)
    return {} if buffers is None else tensors_of(buffers)
