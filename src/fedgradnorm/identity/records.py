"""Who trains what on which data, as types: what members.json and checkpoints hold of it."""

from typing import Annotated

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict  # pydantic refuses the standard library's before 3.12

Count = Annotated[int, Field(ge=0)]

Sketch = list[FiniteFloat]
"""Some numbers of a tensor. They are close for tensors that differ by rounding only."""


class DataRecord(TypedDict):
    """How data are recognised.

    ``sample`` has sketches of some inputs and targets; None for data that are random at every look.
    ``targets`` is a sketch of all targets; None if they are not a tensor.
    """

    examples: Count
    sample: list[Sketch] | None
    targets: Sketch | None


class ModelRecord(TypedDict):
    """How a client's model and loss are recognised: what they give for some training examples.

    Features and outputs are taken in training mode, and then in evaluation mode. ``initial`` has
    numbers of the initial tensors. The losses are those of all these examples in either mode, and
    then of each example.
    """

    initial: Sketch
    features: list[Sketch]
    outputs: list[Sketch]
    losses: list[FiniteFloat] | None


class ClientRecord(TypedDict):
    """A client: its task, and its head, data and model, each None if it is on another machine.

    ``head`` has the names and shapes of the head's tensors, ``modules`` the classes of its modules.
    """

    task: str
    metric: str
    higher_is_better: bool
    examples: Count
    head: list[tuple[str, tuple[int, ...]]] | None
    train: DataRecord | None
    test: DataRecord | None
    percent: bool
    loss_floor: FiniteFloat | None
    modules: list[str] | None
    model: ModelRecord | None


class MembersRecord(TypedDict):
    """Who trains what. ``norm_layer`` and ``modules`` are None if the clients are elsewhere."""

    encoder: list[tuple[str, tuple[int, ...]]]
    """Names and shapes of the encoder's trainable parameters, in the order of the flat vector."""
    fixed: dict[str, list[FiniteFloat]]
    """Two numbers for each of its other tensors that are not buffers."""
    clients: dict[str, ClientRecord]
    buffers: str
    """Whether the encoder's buffers are "local" or "averaged"."""
    norm_layer: list[str] | None
    """The names of the parameters in the norm layer."""
    modules: list[str] | None
    """The classes of the encoder's modules; empty names for classes that are not torch's."""
