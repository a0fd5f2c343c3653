"""The multiple-gradient descent algorithm."""

from dataclasses import dataclass

import numpy as np

from fedgradnorm.weighting.updates import FromUpdates, Updates, least_norm, without_zeros


@dataclass(frozen=True)
class MGDA(FromUpdates):
    r"""The shortest convex combination of the gradients: min ‖Σ a_i g_i‖ over a ≥ 0, Σ a_i = 1.

    Source: Désidéri, C. R. Math. 2012; for tasks, Sener, Koltun, NeurIPS 2018.

    Along this direction every loss falls, to first order, at the rate ‖Σ a_i g_i‖² or faster. If it
    is 0, no direction lowers all losses. It leans towards the shortest gradients, so a task that is
    nearly learned, or whose loss has a small unit, decides. Clients that it does not need have
    a_i = 0. The problem is solved exactly (`least_norm`), in place of the paper's Frank-Wolfe
    steps. A gradient of 0, of a task that has nothing to learn, is left out (ours): it would be the
    shortest combination, and stop the training of all.

    Args:
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", 0.0, 2.0)]
    >>> weights, _ = MGDA().update(MGDA().init(["a", "b"]), reports)
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}
    {'a': 1.6, 'b': 0.4}
    """

    def solve(self, updates: Updates) -> np.ndarray:
        """The weights of the least norm."""
        return without_zeros(updates.gram, least_norm)
