"""The trainable parameters of a module as one flat vector, and the norm layer in it."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fedgradnorm.errors import FederationError, nearest


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters with their names, in the order of the flat vector."""
    return [pair for pair in module.named_parameters() if pair[1].requires_grad]


def concatenated(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors' values in one new vector, whatever their layout in memory."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def flatten(module: nn.Module) -> Tensor:
    """A copy of the trainable parameters, shape ``(P,)``."""
    return concatenated(parameter for _, parameter in trainable(module))


@torch.no_grad()
def load_flat(module: nn.Module, vector: Tensor) -> None:
    """Copy a flat vector of shape ``(P,)`` into the trainable parameters, in place."""
    parameters = [parameter for _, parameter in trainable(module)]
    parts = vector.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view(parameter.shape))


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the module's buffers, such as the running statistics of BatchNorm, by name."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def load_buffers(module: nn.Module, buffers: Iterable[tuple[str, Tensor]]) -> None:
    """Copy buffers into the module, in place."""
    own = dict(module.named_buffers())
    for name, buffer in buffers:
        own[name].copy_(buffer)


def default_norm_layer(module: nn.Module) -> str:
    """The name of the last layer with a weight matrix: the last shared layer, as in GradNorm.

    "Last" is in the order in which the encoder registers its layers. Layers without a matrix, such
    as BatchNorm, are skipped. Raises FederationError if there is no such layer.
    """
    names = [name for name, parameter in trainable(module) if parameter.ndim >= 2]
    if not names:
        why = "the encoder has no layer with a weight matrix; name the parameters to use"
        raise FederationError(f"norm_layer: {why}")
    layer, _, parameter = names[-1].rpartition(".")
    return layer or parameter


def norm_layer_slices(
    module: nn.Module, norm_layer: str | Sequence[str] | None
) -> tuple[slice, ...]:
    """Where the parameters of the norm layer ω̃ lie in the flat vector.

    Args:
        module: the encoder.
        norm_layer: the name of a layer (``"fc"``) or of a parameter (``"fc.weight"``), a pattern
            (``"block*.weight"``, or ``"*"`` for the whole encoder), or several of these. None: the
            last layer with a weight matrix.

    Raises:
        FederationError: a name fits no trainable parameter.
    """
    if norm_layer is None:
        norm_layer = default_norm_layer(module)
    patterns: list[Any] = list(norm_layer) if isinstance(norm_layer, list | tuple) else [norm_layer]
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        expected = "expected names of encoder parameters"
        raise FederationError(f"norm_layer: {expected}, found {norm_layer!r}")
    names = [name for name, _ in trainable(module)]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            known = {*names, *(name.rpartition(".")[0] for name in names)} - {""}
            hint = nearest(pattern, known)
            raise FederationError(f"norm_layer '{pattern}' names no encoder parameter; {hint}")
    slices, start = [], 0
    for name, parameter in trainable(module):
        if matches(name, patterns):
            slices.append(slice(start, start + parameter.numel()))
        start += parameter.numel()
    return tuple(slices)


def names_in(module: nn.Module, slices: Sequence[slice]) -> list[str]:
    """The names of the parameters that lie in these parts of the flat vector."""
    names, start = [], 0
    for name, parameter in trainable(module):
        names += [name] if any(part.start <= start < part.stop for part in slices) else []
        start += parameter.numel()
    return names


def norm_over(gradients: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The 2-norms n_i = ‖∇_ω̃ F_i‖₂ of parts of flat gradients ``(..., P)``, in double precision."""
    parts, double = [gradients[..., part] for part in slices], torch.float64
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=double) for part in parts]
    return torch.stack(norms).square().sum(dim=0).sqrt()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name or pattern is that of a parameter or of a layer that it lies in.

    >>> matches("fc.weight", ["fc"]), matches("fc.weight", ["*.weight"])
    (True, True)
    >>> matches("fc2.weight", ["fc"])
    False
    """
    return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)
