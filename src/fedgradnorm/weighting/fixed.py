"""Weights that a user has chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

from pydantic import Field

from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState
from fedgradnorm.weighting.combination import proportional, start

Chosen: TypeAlias = dict[str, Annotated[float, Field(gt=0)]] | None


@dataclass(frozen=True)
class Fixed(Weighting):
    """p_i ∝ the given weight of client i, or else of its task, or else 1: weighting by hand.

    How far this gets when it is tuned: Kurin et al., NeurIPS 2022 (arXiv 2201.04122).

    Args:
        clients: weights above 0 by client id.
        tasks: weights above 0 by task name, for clients that ``clients`` does not name.

    Raises:
        ConfigError: a weight that is not above 0; when training begins, a client that does not
            exist; and once every client has reported, a task that none of them has.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, task):
    ...     return Report(client, task, torch.zeros(1), 1.0, 1.0, 1.0, num_examples=9)
    >>> method = Fixed(tasks={"smile": 3.0})
    >>> reports = [report("a", "pose"), report("b", "smile")]
    >>> method.update(method.init(["a", "b"]), reports)[0].values
    {'a': 0.5, 'b': 1.5}
    """

    reads_gradients: ClassVar[bool] = False

    clients: Chosen = None
    tasks: Chosen = None

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for every client: tasks are not known before the first reports.

        Without ids, where clients come later, no client is unknown.
        """
        if client_ids:
            _check_known("client", self.clients or {}, client_ids)
        return start(client_ids, tasks={})

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """The given weights."""
        by_client, by_task = self.clients or {}, self.tasks or {}
        tasks = {**state.memory["tasks"], **{report.client: report.task for report in reports}}
        if state.weights.keys() <= tasks.keys():
            _check_known("task", by_task, tasks.values())
        shares = [by_client.get(report.client, by_task.get(report.task, 1.0)) for report in reports]
        return proportional(state, reports, shares, {"tasks": tasks})


def _check_known(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in sorted(set(given) - set(known)):
        reason = f"there is no {kind} '{name}'; {nearest(name, known)}"
        raise ConfigError(f"weighting.{kind}s.{name}: {reason}")
