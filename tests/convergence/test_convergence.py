"""What is claimed of the limit is measured: slopes are fitted, not assumed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedgradnorm import Client, Equal, Federation, FedGradNorm, FedGradNormWarning, Task, train
from fedgradnorm.federations import digits
from tests.helpers import report

NORMS = np.array([0.2, 1.0, 3.0, 0.5])
RATES = np.array([0.9, 0.4, 0.7, 0.6])


def fixed_point(gamma):
    p = (RATES / RATES.mean()) ** gamma / NORMS
    return p * len(p) / p.sum()


def distances(method, rounds):
    """The distance of the weights from the fixed point over rounds in which norms and rates stay as they are."""
    names = [f"c{index}" for index in range(len(NORMS))]
    state, found = method.init(names), []
    some = [report(name, norm, rate) for name, norm, rate in zip(names, NORMS, RATES, strict=True)]
    for _ in range(rounds):
        _, state = method.update(state, some)
        found.append(
            np.linalg.norm([state.weights[name] for name in names] - fixed_point(method.gamma))
        )
    return np.array(found)


@given(st.floats(0.05, 0.9), st.floats(0, 2))
def test_exact_goes_to_the_fixed_point_at_the_rate_that_the_damping_says(damping, gamma):
    method = FedGradNorm(gamma=gamma, solver="exact", damping=damping, min_weight=1e-9)
    found = distances(method, 12)
    slope = np.polyfit(np.arange(12), np.log(found), 1)[0]
    assert np.exp(slope) == pytest.approx(1 - damping, rel=1e-3)


@pytest.mark.parametrize("weight_lr", [0.05, 0.01, 0.005])
def test_step_goes_into_a_band_around_the_fixed_point_that_shrinks_with_its_step_size(weight_lr):
    found = distances(FedGradNorm(gamma=0.5, weight_lr=weight_lr), int(20 / weight_lr))
    assert found[-20:].max() < 4 * weight_lr * NORMS.max()
    assert found[0] > 0.5


def quadratic_federation(scales):
    """Client i pulls the encoder's four outputs to a target of its own, times a scale: strongly convex in the encoder."""

    def pull(scale):
        return Task(
            f"times {scale}",
            lambda _: nn.Identity(),
            lambda outputs, targets: scale * ((outputs - targets) ** 2).mean(),
        )

    def encoder():
        return nn.Linear(1, 4, bias=False)

    clients = []
    for index, scale in enumerate(scales):
        target = torch.zeros(8, 4)
        target[:, index] = 1.0
        clients.append(Client(f"c{index}", pull(scale), (torch.ones(8, 1), target)))
    return Federation(clients, encoder)


def test_a_task_of_a_hundredfold_loss_no_longer_has_the_encoder_to_itself():
    """Where every client pulls to a corner of its own, equal weights go to the loud one's; FedGradNorm stops between them."""
    training = {"num_rounds": 60, "head_steps": 1, "encoder_steps": 1, "encoder_lr": 0.02}
    federation = quadratic_federation([100.0, 1.0, 1.0])

    def rates(weighting):
        return [
            row["loss"] / row["initial_loss"]
            for row in train(federation, weighting, **training).rows[-3:]
        ]

    with pytest.warns(
        FedGradNormWarning,
        match="task 'times 1.0': its loss has been above its initial loss for 5 rounds",
    ):
        equal = rates(Equal())
    balanced = rates(FedGradNorm(solver="exact", gamma=1.0, normalize="norm"))
    assert max(equal) / min(equal) > 20
    assert max(balanced) / min(balanced) < 2


def test_all_four_digits_tasks_are_learned():
    result = train(digits.make(0), FedGradNorm(), num_rounds=100, head_lr=0.05, encoder_lr=0.05)
    for name, task in result.summary["tasks"].items():
        assert task["loss_ratio"] < 0.75, name
        metric = task["metric"]
        gain = (
            metric["last"] - metric["guess"]
            if metric["higher_is_better"]
            else (metric["guess"] - metric["last"]) / metric["guess"]
        )
        assert gain > 0.15, name
