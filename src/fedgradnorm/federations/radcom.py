"""RadCom: which modulation, which signal, and whether the channel is too noisy, from radio snapshots; generated or read from HDF5."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from fedgradnorm.errors import ConfigError, DataError
from fedgradnorm.federation import Client, Federation
from fedgradnorm.federations.cache import cached_arrays, file_hash
from fedgradnorm.federations.partition import client_ids_of, partition
from fedgradnorm.federations.radcom_channel import MODULATIONS, NUM_VALUES, PAIRS, SIGNALS
from fedgradnorm.federations.radcom_channel import snapshots as generate
from fedgradnorm.federations.radcom_hdf5 import (
    Snapshots,
    existing_file,
    read_arrays,
    read_hdf5,
    write_hdf5,
)
from fedgradnorm.federations.tasks import classification, with_loss_scale
from fedgradnorm.models import mlp
from fedgradnorm.randomness import generator

__all__ = ["TASKS", "Snapshots", "make", "read_hdf5", "write_hdf5"]

SNR_STEP = 2  # dB
GENERATED_SNAPSHOTS = 100


TASKS = {
    "modulation": classification("modulation", len(MODULATIONS)),
    "signal": classification("signal", len(SIGNALS)),
    "anomaly": classification("anomaly", 2),
}


class _Pool(NamedTuple):
    """All snapshots in the order of pair, SNR and number: data ``(n, 256)``, index into ``PAIRS`` ``(n,)``, SNR in dB ``(n,)``."""

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
    """Radio snapshots of 128 complex samples: the modulation (6), the type of signal (8), and whether the channel is too noisy (2).

    Without a file, the snapshots are generated (see `radcom_channel`), anew under each seed. With a file, the test split is the same
    for every seed. In either case every client has the same test snapshots. Nothing is generated or read before first use.

    Args:
        seed: of the generated snapshots, and of the split into clients.
        path: an HDF5 file in the format of RadComDynamic; see `read_hdf5`. None: generate.
        tasks: which of ``modulation``, ``signal``, ``anomaly``.
        snapshots: how many of each pair at each SNR. None: 100, or all that the file has.
        snr_min: the lowest SNR in dB; generated ones go up in steps of 2 dB.
        snr_max: the highest.
        anomaly_threshold: an SNR below it, in dB, is an anomaly.
        clients_per_task: how many clients each task has.
        sizes: how the training snapshots are dealt out; see `partition`.
        alpha: for ``sizes="dirichlet"``.
        test_fraction: the share of the snapshots of each pair at each SNR that is kept for testing.
        loss_scale: by task, a factor on its loss, and so on its gradients.

    Raises:
        ConfigError: an unknown task, or a value out of range.
        DataError: on first use, no file at ``path``, or one that is not of the format.
    """
    clients, known = (
        client_ids_of(tasks, clients_per_task, TASKS),
        with_loss_scale(TASKS, loss_scale),
    )
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
        deal(
            num_examples - _test_size(num_examples, test_fraction)
        )  # so that wrong sizes are told now, not on first use
    else:
        pool = partial(
            _from_file,
            Path(path).expanduser(),
            snr_min,
            snr_max,
            snapshots,
            threshold,
            _least_snapshots(test_fraction),
        )
    parts = cache(partial(_parts, pool, deal, anomaly_threshold, test_fraction))
    return Federation(
        [
            Client(
                client,
                known[task],
                partial(_data, parts, client, task),
                partial(_data, parts, "", task),
            )
            for client, task in clients.items()
        ],
        encoder=partial(mlp, input_shape=(NUM_VALUES,), hidden=(256, 128, 64), he_init=False),
        example=torch.zeros(1, NUM_VALUES),
    )


def _check_range(test_fraction: float, snapshots: int | None, snr_min: int, snr_max: int) -> None:
    if not 0 < test_fraction < 1:
        raise ConfigError(
            f"test_fraction: expected a number between 0 and 1, found {test_fraction}"
        )
    least = _least_snapshots(test_fraction)
    if snapshots is not None and snapshots < least:
        raise ConfigError(
            f"snapshots: expected at least {least} of each pair and SNR with test_fraction {test_fraction}, found {snapshots}"
        )
    if not -200 <= snr_min <= snr_max <= 200:
        raise ConfigError(
            f"snr_min, snr_max: expected -200 <= snr_min <= snr_max <= 200, found {snr_min} and {snr_max}"
        )


def _check_threshold(threshold: float | None, lowest: int, highest: int) -> None:
    if threshold is not None and not lowest < threshold <= highest:
        raise ConfigError(
            f"anomaly_threshold: expected SNRs on both sides of it, found {threshold} for SNRs from {lowest} to {highest} dB"
        )


def _least_snapshots(test_fraction: float) -> int:
    """How many a pair needs at an SNR so that training and test get at least one; the small number makes up for rounding."""
    return ceil(1 / min(test_fraction, 1 - test_fraction) - 1e-9)


def _test_size(num_examples: int, test_fraction: float) -> int:
    return round(num_examples * test_fraction)


@lru_cache(maxsize=2)
def _generated(seed: int, snrs: tuple[int, ...], count: int) -> _Pool:
    parts = [
        generate(
            modulation,
            signal,
            snr,
            count,
            generator(seed, 0, "", f"radcom {modulation} {signal} {snr}"),
        )
        for modulation, signal in PAIRS
        for snr in snrs
    ]
    pair = np.repeat(np.arange(len(PAIRS)), len(snrs) * count)
    return _Pool(np.concatenate(parts), pair, np.tile(np.repeat(snrs, count), len(PAIRS)))


def _from_file(
    path: Path, snr_min: int, snr_max: int, most: int | None, threshold: float | None, least: int
) -> _Pool:
    """The file's snapshots from ``snr_min`` to ``snr_max`` dB: at least ``least`` of each pair at each SNR, the first ``most`` at most."""
    pool = _Pool(
        **cached_arrays(
            "radcom",
            {"file": file_hash(existing_file(path)), "version": 1},
            partial(read_arrays, path),
        )
    )
    _, first, group, counts = np.unique(
        _groups(pool), return_index=True, return_inverse=True, return_counts=True
    )
    keep = (pool.snr >= snr_min) & (pool.snr <= snr_max)
    if not keep.any():
        raise DataError(
            f"{path}: no snapshot at {snr_min} to {snr_max} dB, found {pool.snr.min()} to {pool.snr.max()} dB"
        )
    fewest = int(counts[group[keep]].min())
    if fewest < least:
        raise DataError(
            f"{path}: {fewest} snapshots of a pair at an SNR, expected at least {least} for this test_fraction"
        )
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

    A part is the inputs, shape ``(n, 256)``, and the pair's index with the anomaly label, shape ``(n, 2)``.
    """
    everything = pool()
    rows = np.arange(len(everything.data))
    train, test = train_test_split(
        rows,
        test_size=_test_size(len(rows), test_fraction),
        random_state=0,
        stratify=_groups(everything),
    )
    labels = np.stack([everything.pair, everything.snr < threshold], axis=1)
    chosen = {"": test} | {client: train[part] for client, part in deal(len(train)).items()}
    return {
        client: (torch.from_numpy(everything.data[part]), torch.from_numpy(labels[part]))
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
