"""FedMGDA+: the least norm of unit gradients near given weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedgradnorm.weighting.updates import FromUpdates, Updates, least_norm_near


@dataclass(frozen=True)
class FedMGDAPlus(FromUpdates):
    r"""min ‖Σ λ_i ĝ_i‖ over λ on the simplex with |λ_i - λ⁰_i| ≤ epsilon, and ĝ_i = g_i / ‖g_i‖.

    Source: Hu et al., IEEE TNSE 2022.

    The direction is Σ λ_i ĝ_i, so a_i = λ_i / ‖g_i‖. With unit gradients a client with a long one,
    honest or not, does not decide. epsilon leads from the base weights of unit gradients (0) to
    MGDA on them (1). A gradient of 0 adds nothing.

    The direction's length is at most 1, whatever the gradients' lengths are. It does not shrink as
    they do, and needs its own step size (``train.server_lr``). In the paper that decays.

    Args:
        epsilon: from 0 to 1; 0.1 is common.
        base: λ⁰ is ``"equal"``, or the share of the ``"examples"``.
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", 0.0, 3.0)]
    >>> weights, _ = FedMGDAPlus().update(FedMGDAPlus().init(["a", "b"]), reports)
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}  # λ = (½, ½)
    {'a': 1.5, 'b': 0.5}
    """

    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.1
    base: Literal["equal", "examples"] = "equal"

    def solve(self, updates: Updates) -> np.ndarray:
        """The coefficients of the least norm near the base weights."""
        gram, examples = updates.gram, updates.examples
        by_examples = self.base == "examples" and examples.sum() > 0
        base = examples / examples.sum() if by_examples else np.full(len(gram), 1 / len(gram))
        lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0))
        inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        near = least_norm_near(gram * inverse * inverse[:, None], base, self.epsilon)
        coefficients: np.ndarray = near * inverse
        return coefficients
