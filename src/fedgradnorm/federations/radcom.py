"""RadCom: modulation, signal and noise of radio snapshots, generated or read from HDF5."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from fedgradnorm.errors import ConfigError, DataError, require
from fedgradnorm.federation import Client, Federation
from fedgradnorm.federations.cache import cached_arrays, file_hash
from fedgradnorm.federations.partition import client_ids_of, partition
from fedgradnorm.federations.radcom_channel import MODULATIONS, NUM_VALUES, PAIRS, SIGNALS
from fedgradnorm.federations.radcom_channel import snapshots as generate
from fedgradnorm.federations.radcom_hdf5 import Snapshots as Snapshots
from fedgradnorm.federations.radcom_hdf5 import existing_file, read_arrays
from fedgradnorm.federations.radcom_hdf5 import read_hdf5 as read_hdf5
from fedgradnorm.federations.radcom_hdf5 import write_hdf5 as write_hdf5
from fedgradnorm.federations.tasks import classification, with_loss_scale
from fedgradnorm.models import mlp
from fedgradnorm.randomness import generator

SNR_STEP = 2  # dB
GENERATED_SNAPSHOTS = 100

TASKS = {
    "modulation": classification("modulation", len(MODULATIONS)),
    "signal": classification("signal", len(SIGNALS)),
    "anomaly": classification("anomaly", 2),
}


class _Pool(NamedTuple):
    """All snapshots in the order of pair, SNR and number.

    Attributes:
        data: shape ``(n, 256)``.
        pair: indices into ``PAIRS``, shape ``(n,)``.
        snr: in dB, shape ``(n,)``.
    """

    data: np.ndarray
    pair: np.ndarray
    snr: np.ndarray


def make(
    seed: int,
    path: str | None = None,
    tasks: Sequence[str] = ("modulation", "signal", "anomaly"),
    snapshots: int | None = None,
    snr_min: int = -20,
    snr_max: int = 18,
    anomaly_threshold: float = -4.0,
    clients_per_task: int = 1,
    sizes: str | Mapping[str, int | float] = "equal",
    alpha: float = 0.5,
    test_fraction: float = 0.2,
    loss_scale: Mapping[str, float] = {},
) -> Federation:
    """Radio snapshots of 128 complex samples with three tasks.

    ``modulation``: 6 classes; ``signal``: its type, 8 classes; ``anomaly``: whether the channel is
    too noisy. Without a file, the snapshots are generated (see `radcom_channel`), others for each
    seed. With a file, the test split is the same for every seed. Every client has the same test
    snapshots. They are generated or read on first use.

    Args:
        seed: seed of the generated snapshots, and of the split into clients.
        path: an HDF5 file in the format of RadComDynamic; see `read_hdf5`. None: generate.
        tasks: which of ``modulation``, ``signal``, ``anomaly``.
        snapshots: the number for each pair at each SNR. None: 100, or all that the file has.
        snr_min: the lowest SNR in dB. Generated ones go up in steps of 2 dB.
        snr_max: the highest SNR in dB.
        anomaly_threshold: an SNR below it, in dB, is an anomaly.
        clients_per_task: the number of clients of each task.
        sizes: how the training snapshots are divided among the clients; see `partition`.
        alpha: the concentration for ``sizes="dirichlet"``.
        test_fraction: the share of the snapshots of each pair at each SNR for testing.
        loss_scale: by task, a factor on its loss, and so on its gradients.

    Raises:
        ConfigError: an unknown task, or a value out of range.
        DataError: on first use, a file that is missing or not in the format.
    """
    clients = client_ids_of(tasks, clients_per_task, TASKS)
    known = with_loss_scale(TASKS, loss_scale)
    _check_range(test_fraction, snapshots, snr_min, snr_max)
    snrs = range(snr_min, snr_max + 1, SNR_STEP)
    threshold = anomaly_threshold if "anomaly" in tasks else None
    _check_threshold(threshold, snr_min, snrs[-1] if path is None else snr_max)
    deal = partial(partition, clients=clients, sizes=sizes, alpha=alpha, seed=seed)
    pool: Callable[[], _Pool]
    if path is None:
        count = GENERATED_SNAPSHOTS if snapshots is None else snapshots
        pool = partial(_generated, seed, tuple(snrs), count)
        num_examples = len(PAIRS) * len(snrs) * count
        # Wrong sizes are an error now, and not on first use.
        deal(num_examples - _test_size(num_examples, test_fraction))
    else:
        file, least = Path(path).expanduser(), _least_snapshots(test_fraction)
        pool = partial(_from_file, file, snr_min, snr_max, snapshots, threshold, least)
    parts = cache(partial(_parts, pool, deal, anomaly_threshold, test_fraction))
    encoder = partial(mlp, input_shape=(NUM_VALUES,), hidden=(256, 128, 64), he_init=False)
    data = partial(_data, parts)
    members = [
        Client(id, known[task], partial(data, id, task), partial(data, "", task))
        for id, task in clients.items()
    ]
    return Federation(members, encoder=encoder, example=torch.zeros(1, NUM_VALUES))


def _check_range(test_fraction: float, snapshots: int | None, snr_min: int, snr_max: int) -> None:
    in_range = 0 < test_fraction < 1
    require(in_range, "test_fraction", "a number between 0 and 1", test_fraction)
    least = _least_snapshots(test_fraction)
    expected = f"at least {least} of each pair and SNR with test_fraction {test_fraction}"
    require(snapshots is None or snapshots >= least, "snapshots", expected, snapshots)
    if not -200 <= snr_min <= snr_max <= 200:
        raise ConfigError(
            "snr_min, snr_max: expected -200 <= snr_min <= snr_max <= 200, "
            f"found {snr_min} and {snr_max}"
        )


def _check_threshold(threshold: float | None, lowest: int, highest: int) -> None:
    if threshold is not None and not lowest < threshold <= highest:
        found = f"found {threshold} for SNRs from {lowest} to {highest} dB"
        raise ConfigError(f"anomaly_threshold: expected SNRs on both sides of it, {found}")


def _least_snapshots(test_fraction: float) -> int:
    """The least number for a pair at an SNR that gives training and test at least one each."""
    # The small number compensates for rounding.
    return ceil(1 / min(test_fraction, 1 - test_fraction) - 1e-9)


def _test_size(num_examples: int, test_fraction: float) -> int:
    return round(num_examples * test_fraction)


@lru_cache(maxsize=2)
def _generated(seed: int, snrs: tuple[int, ...], count: int) -> _Pool:
    parts = []
    for modulation, signal in PAIRS:
        for snr in snrs:
            rng = generator(seed, 0, "", f"radcom {modulation} {signal} {snr}")
            parts.append(generate(modulation, signal, snr, count, rng))
    pair = np.repeat(np.arange(len(PAIRS)), len(snrs) * count)
    return _Pool(np.concatenate(parts), pair, np.tile(np.repeat(snrs, count), len(PAIRS)))


def _from_file(
    path: Path, snr_min: int, snr_max: int, most: int | None, threshold: float | None, least: int
) -> _Pool:
    """The file's snapshots from ``snr_min`` to ``snr_max`` dB.

    Of each pair at each SNR there must be at least ``least``. The first ``most`` are used.
    """
    key = {"file": file_hash(existing_file(path)), "version": 1}
    pool = _Pool(**cached_arrays("radcom", key, partial(read_arrays, path)))
    _, first, group, counts = np.unique(
        _groups(pool), return_index=True, return_inverse=True, return_counts=True
    )
    keep = (pool.snr >= snr_min) & (pool.snr <= snr_max)
    if not keep.any():
        found = f"found {pool.snr.min()} to {pool.snr.max()} dB"
        raise DataError(f"{path}: no snapshot at {snr_min} to {snr_max} dB, {found}")
    fewest = int(counts[group[keep]].min())
    if fewest < least:
        expected = f"expected at least {least} for this test_fraction"
        raise DataError(f"{path}: {fewest} snapshots of a pair at an SNR, {expected}")
    if most is not None:
        keep &= np.arange(len(group)) - first[group] < most
    pool = _Pool(pool.data[keep], pool.pair[keep], pool.snr[keep])
    _check_threshold(threshold, int(pool.snr.min()), int(pool.snr.max()))
    return pool


def _groups(pool: _Pool) -> np.ndarray:
    """One number for each pair and SNR, in ascending order."""
    lowest, highest = int(pool.snr.min()), int(pool.snr.max())
    groups: np.ndarray = pool.pair * (highest - lowest + 1) + pool.snr - lowest
    return groups


def _parts(
    pool: Callable[[], _Pool],
    deal: Callable[[int], dict[str, np.ndarray]],
    threshold: float,
    test_fraction: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The training part of each client by its id, and the test part under ``""``.

    A part is the inputs, shape ``(n, 256)``, and the pair's index with the anomaly label, shape
    ``(n, 2)``.
    """
    data, pair, snr = snapshots = pool()
    size, groups = _test_size(len(data), test_fraction), _groups(snapshots)
    rows = np.arange(len(data))
    train, test = train_test_split(rows, test_size=size, random_state=0, stratify=groups)
    labels = np.stack([pair, snr < threshold], axis=1)
    chosen = {"": test} | {client: train[part] for client, part in deal(len(train)).items()}
    return {
        client: (torch.from_numpy(data[part]), torch.from_numpy(labels[part]))
        for client, part in chosen.items()
    }


def _data(
    parts: Callable[[], dict[str, tuple[Tensor, Tensor]]], client: str, task: str
) -> tuple[Tensor, Tensor]:
    inputs, labels = parts()[client]
    pair, anomaly = labels.unbind(dim=1)
    if task == "anomaly":
        return inputs, anomaly.contiguous()
    classes = [
        MODULATIONS.index(modulation) if task == "modulation" else SIGNALS.index(signal)
        for modulation, signal in PAIRS
    ]
    return inputs, torch.tensor(classes)[pair]
