"""The encoder's aggregation of FedHCA²."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedgradnorm.weighting.cagrad import conflict_averse
from fedgradnorm.weighting.updates import FromUpdates, Updates


@dataclass(frozen=True)
class FedHCA2(FromUpdates):
    r"""The mean update plus a conflict-averse one.

    Source: Lu et al., CVPR 2024, arXiv 2311.13250, hyper conflict-averse aggregation of encoders.

    There client i gets its own encoder, moved by g_i + h_i u with u = d / (1 + c²), where d is
    CAGrad's direction. Here all share one encoder, which moves by the mean of that over clients::

        g_0 + h u        a_i = 1/n + h a_i(CAGrad) / (1 + c²)

    What is left out, and why:

    - own encoders, since there is one;
    - h_i learned by ⟨g_i(k + 1), u(k)⟩ through those encoders. Here h is an option; the authors'
      train.py starts it at 0.1, its --enc_alpha_init;
    - the mean over clients with the same task and data, which the mean over all contains;
    - the cross attention of the decoders, since heads never leave their clients.

    Args:
        c: CAGrad's c, from 0 to 100; 0.4 in the authors' code.
        hyper_weight: h from 0 to 1; 0.1 is where the authors' code begins to learn it.
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", 0.0, 1.0)]
    >>> weights, _ = FedHCA2(c=0.5).update(FedHCA2().init(["a", "b"]), reports)
    >>> weights.values, round(weights.scale, 2)  # no conflict: 1 + h (1 + c) / (1 + c²)
    ({'a': 1.0, 'b': 1.0}, 1.12)
    """

    c: Annotated[float, Field(ge=0, le=100)] = 0.4
    hyper_weight: Annotated[float, Field(ge=0, le=1)] = 0.1

    def solve(self, updates: Updates) -> np.ndarray:
        """The coefficients of both updates together."""
        averse = conflict_averse(updates.gram, self.c)
        return 1 / len(averse) + self.hyper_weight / (1 + self.c**2) * averse
