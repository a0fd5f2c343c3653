"""The division of training examples among clients: disjoint parts, equal, Dirichlet or explicit."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedgradnorm.errors import ConfigError, nearest, require
from fedgradnorm.randomness import generator


def client_ids_of(
    tasks: Sequence[str], clients_per_task: int, known: Collection[str]
) -> dict[str, str]:
    """Client ids to task names.

    With one client for each task, its id is the task's name. With more, they are ``name-0``,
    ``name-1``, ...

    Raises:
        ConfigError: no task, an unknown task, a task named twice, or fewer than one client.

    >>> client_ids_of(["smile", "pose"], 1, {"smile", "pose"})
    {'smile': 'smile', 'pose': 'pose'}
    >>> list(client_ids_of(["smile"], 2, {"smile", "pose"}))
    ['smile-0', 'smile-1']
    """
    if not tasks:
        raise ConfigError("tasks: expected at least one task, found none")
    for task in tasks:
        if task not in known:
            raise ConfigError(f"tasks: there is no task '{task}'; {nearest(task, known)}")
    if len(set(tasks)) < len(tasks):
        raise ConfigError(
            f"tasks: a task is named twice in {list(tasks)}; "
            "for several clients use clients_per_task"
        )
    require(clients_per_task >= 1, "clients_per_task", "at least 1", clients_per_task)
    if clients_per_task == 1:
        return {task: task for task in tasks}
    return {f"{task}-{index}": task for task in tasks for index in range(clients_per_task)}


def partition(
    num_examples: int,
    clients: Mapping[str, str],
    sizes: str | Mapping[str, int | float],
    alpha: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Disjoint random parts of ``range(num_examples)``, one for each client.

    They do not depend on the order of the clients.

    Args:
        num_examples: the size of the pool.
        clients: client ids to task names, as `client_ids_of` gives them.
        sizes: ``"equal"``; ``"dirichlet"``: at least 1 each, in proportions drawn from
            Dir(alpha, ..., alpha); or a number of examples by client id, or by task name for each
            client of the task. Other clients get ``num_examples // len(clients)``. A number below
            1 is a share of that, such as 0.1 for a tenth.
        alpha: the concentration for ``"dirichlet"``. Sizes are more unequal if it is small.
        seed: seed of the shuffle and of the Dirichlet draw.

    Raises:
        ConfigError: an unknown kind or name, a size of 0 or less, a size above 1 that is not
            whole, or sizes with a sum above the pool's.
    """
    ids, count = sorted(clients), len(clients)
    if num_examples < count:
        raise ConfigError(f"sizes: {num_examples} examples cannot give each of {count} clients one")
    rng = generator(seed, 0, "", "partition")
    order = rng.permutation(num_examples)
    if isinstance(sizes, Mapping):
        by_id = _explicit(sizes, clients, num_examples)
        counts = [by_id[id] for id in ids]
    elif sizes == "equal":
        counts = [len(part) for part in np.array_split(order, count)]
    elif sizes == "dirichlet":
        counts = _dirichlet(alpha, count, num_examples, rng)
    else:
        expected = "'equal', 'dirichlet' or a table of numbers"
        raise ConfigError(f"sizes: expected {expected}, found '{sizes}'")
    parts = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    return dict(zip(ids, parts, strict=True))


def _dirichlet(
    alpha: float, num_clients: int, num_examples: int, rng: np.random.Generator
) -> list[int]:
    require(alpha > 0, "alpha", "a number above 0", alpha)
    shares = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1]
    spare = num_examples - num_clients
    counts = np.diff(np.rint(shares * spare), prepend=0, append=spare)
    return [int(count) + 1 for count in counts]


def _explicit(
    sizes: Mapping[str, int | float], clients: Mapping[str, str], num_examples: int
) -> dict[str, int]:
    known, equal = set(clients) | set(clients.values()), num_examples // len(clients)
    given = {}
    for name, count in sizes.items():
        if name not in known:
            raise ConfigError(f"sizes.{name}: no such client or task; {nearest(name, known)}")
        require(count > 0, f"sizes.{name}", "at least 1 example", count)
        whole = "a whole number of examples, or a share below 1"
        require(count < 1 or count == int(count), f"sizes.{name}", whole, count)
        given[name] = int(count) if count >= 1 else max(1, round(count * equal))
    counts = {id: given.get(id, given.get(task, equal)) for id, task in clients.items()}
    total = sum(counts.values())
    if total > num_examples:
        raise ConfigError(
            f"sizes: {total} examples asked for, the training data have {num_examples}"
        )
    return counts
