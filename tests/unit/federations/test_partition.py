import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgradnorm import ConfigError
from fedgradnorm.federations.partition import client_ids_of, partition

CLIENTS = {"smile-0": "smile", "smile-1": "smile", "pose-0": "pose", "pose-1": "pose"}


@given(
    st.integers(4, 300),
    st.sampled_from(["equal", "dirichlet", {"smile": 1}, {"pose-1": 1}]),
    st.floats(0.05, 10),
    st.integers(0, 9),
)
def test_parts_are_disjoint_never_empty_and_inside_the_pool(num_examples, sizes, alpha, seed):
    parts = partition(num_examples, CLIENTS, sizes, alpha, seed)
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together)
    assert set(together.tolist()) <= set(range(num_examples))
    assert all(len(part) >= 1 for part in parts.values())
    if isinstance(sizes, str):
        assert len(together) == num_examples


def test_equal_sizes_differ_by_one_at_most():
    assert sorted(len(part) for part in partition(10, CLIENTS, "equal", 1.0, 0).values()) == [
        2,
        2,
        3,
        3,
    ]


def test_explicit_sizes_by_client_or_by_task_leave_the_others_their_equal_part():
    sizes = {
        id: len(part)
        for id, part in partition(400, CLIENTS, {"smile": 10, "pose-1": 50}, 1.0, 0).items()
    }
    assert sizes == {"smile-0": 10, "smile-1": 10, "pose-0": 100, "pose-1": 50}


def test_a_size_below_1_is_a_share_of_the_equal_part():
    sizes = {
        id: len(part)
        for id, part in partition(400, CLIENTS, {"smile": 0.1, "pose-1": 0.001}, 1.0, 0).items()
    }
    assert sizes == {"smile-0": 10, "smile-1": 10, "pose-0": 100, "pose-1": 1}


def test_a_small_alpha_is_more_unequal_than_a_large_one():
    def spread(alpha):
        return np.mean(
            [
                np.std(
                    [
                        len(part)
                        for part in partition(1000, CLIENTS, "dirichlet", alpha, seed).values()
                    ]
                )
                for seed in range(20)
            ]
        )

    assert spread(0.1) > 3 * spread(10)


def test_the_seed_decides_and_the_order_of_clients_does_not():
    turned = dict(reversed(CLIENTS.items()))
    one, same, other = (
        partition(50, clients, "equal", 1.0, seed)
        for clients, seed in ((CLIENTS, 0), (turned, 0), (CLIENTS, 1))
    )
    assert all(np.array_equal(one[id], same[id]) for id in CLIENTS)
    assert not all(np.array_equal(one[id], other[id]) for id in CLIENTS)


@pytest.mark.parametrize(
    ("num_examples", "sizes", "alpha", "message"),
    [
        (3, "equal", 1, "3 examples cannot give each of 4 clients one"),
        (50, "unequal", 1, "sizes: expected 'equal', 'dirichlet'"),
        (50, "dirichlet", 0, "alpha: expected a number above 0, found 0"),
        (
            50,
            {"smile": 2.5},
            1,
            "sizes.smile: expected a whole number of examples, or a share below 1, found 2.5",
        ),
        (50, {"smile": 0}, 1, "sizes.smile: expected at least 1 example, found 0"),
        (50, {"smlie": 3}, 1, "sizes.smlie: no such client or task; did you mean 'smile'"),
        (50, {"smile": 40}, 1, "sizes: 104 examples asked for, the training data have 50"),
    ],
)
def test_bad_sizes_are_refused(num_examples, sizes, alpha, message):
    with pytest.raises(ConfigError, match=message):
        partition(num_examples, CLIENTS, sizes, alpha, 0)


@pytest.mark.parametrize(
    ("tasks", "count", "message"),
    [
        ([], 1, "at least one task"),
        (["smlie"], 1, "there is no task 'smlie'; did you mean 'smile'"),
        (["smile", "smile"], 1, "named twice"),
        (["smile"], 0, "clients_per_task: expected at least 1, found 0"),
    ],
)
def test_bad_tasks_are_refused(tasks, count, message):
    with pytest.raises(ConfigError, match=message):
        client_ids_of(tasks, count, {"smile", "pose"})
