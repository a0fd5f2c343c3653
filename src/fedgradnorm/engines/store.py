"""Where the gradients of a round are kept."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedgradnorm.messages import Report

__all__ = ["GradientStore"]


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
                _allocate(file.fileno(), num_bytes)
                elements = len(clients) * len(encoder)
                mapped = torch.from_file(file.name, True, elements, dtype=encoder.dtype)
            self.rows = dict(zip(clients, mapped.view(len(clients), -1).unbind(), strict=True))

    def keep(self, report: Report) -> Report:
        """The same report, with its gradient in this store."""
        if not self.rows:
            return report
        return replace(report, gradient=self.rows[report.client].copy_(report.gradient))


def _allocate(file: int, length: int) -> None:
    """Reserve the space, so that a full disk is an error now and not later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, length)
    else:
        os.truncate(file, length)
