"""The HDF5 format of RadComDynamic: a data set for each snapshot, with its labels in the key."""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedgradnorm.errors import DataError, nearest
from fedgradnorm.federations.radcom_channel import MODULATIONS, NUM_VALUES, PAIRS, SIGNALS

KEY_FORM = "a key like \"('bpsk', 'Satcom', 10, 0)\": modulation, signal, SNR in dB, number"
KEY = re.compile(
    r"""\( ?(['"])(?P<modulation>[^'"\\]{1,60})\1 ?, {0,2}(['"])(?P<signal>[^'"\\]{1,60})\3 ?,"""
    r""" {0,2}(?P<snr>[+-]?(?:0|[1-9][0-9]{0,5})) ?,"""
    r""" {0,2}(?P<number>[+-]?(?:0|[1-9][0-9]{0,14})) ?,? ?\)"""
)


class Snapshots(NamedTuple):
    """Labelled snapshots.

    Attributes:
        data: float32, shape ``(n, 256)``.
        modulation: n names.
        signal: n names.
        snr: in dB, int64, shape ``(n,)``.
    """

    data: np.ndarray
    modulation: list[str]
    signal: list[str]
    snr: np.ndarray


def existing_file(path: str | Path) -> Path:
    """The path of an existing file.

    Raises:
        DataError: there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"path: there is no file '{file}', expected an HDF5 file in the format of RadComDynamic"
        )
    return file


def read_hdf5(path: str | Path) -> Snapshots:
    """Read an HDF5 file in the format of RadComDynamic, in the order of pair, SNR and number.

    Each snapshot is a data set of shape ``(256, 1)``: 128 in-phase, then 128 quadrature samples.
    Its key is such as ``"('bpsk', 'Satcom', 10, 0)"``: modulation, signal, SNR in dB, number.

    Raises:
        DataError: a file that is missing, empty or not HDF5; a key of another form, or with an
            unknown modulation or signal; data of another shape; or numbers that are not finite.
            The message names the file and the key.
    """
    arrays = read_arrays(existing_file(path))
    modulations, signals = zip(*(PAIRS[index] for index in arrays["pair"]), strict=True)
    return Snapshots(arrays["data"], list(modulations), list(signals), arrays["snr"])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Like `read_hdf5`, but as arrays by name.

    ``data`` has shape ``(n, 256)``; ``pair``, an index into ``PAIRS``, and ``snr`` have ``(n,)``.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            keys = {key: _parse_key(path, key) for key in file}
            ordered = sorted(keys, key=keys.__getitem__)
            values = [_read_snapshot(h5py, path, file, key) for key in ordered]
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, OverflowError) as error:
        reason = (
            "expected an HDF5 file in the format of RadComDynamic, "
            f"found one that cannot be read: {error}"
        )
        if isinstance(error, BlockingIOError) or "unable to lock file" in str(error):
            reason = (
                "another program has the file open for writing, and has locked it: wait until it "
                "has ended, or, if the file system has no locks, set HDF5_USE_FILE_LOCKING=FALSE"
            )
        elif isinstance(error, PermissionError):
            reason = f"cannot be read: {error.strerror}"
        raise DataError(f"{path}: {reason}") from error
    if not values:
        raise DataError(f"{path}: expected a data set for each snapshot, found none")
    for key, other in pairwise(ordered):
        if keys[key] == keys[other]:
            keys_of_one = f"the keys {key!r} and {other!r} are of one snapshot"
            raise DataError(f"{path}: {keys_of_one}, expected different ones")
    pair, snr, _ = zip(*(keys[key] for key in ordered), strict=True)
    return {"data": np.stack(values), "pair": np.array(pair), "snr": np.array(snr)}


def write_hdf5(
    path: str | Path,
    data: np.ndarray,
    modulation: Sequence[str],
    signal: Sequence[str],
    snr: Sequence[int] | np.ndarray,
    overwrite: bool = False,
) -> None:
    """Write snapshots in the format of `read_hdf5`: the whole file or nothing.

    They are numbered within each pair and SNR.

    Args:
        path: the file to write.
        data: shape ``(n, 256)``.
        modulation: n names.
        signal: n names.
        snr: n whole numbers, in dB.
        overwrite: whether to replace an existing file.

    Raises:
        DataError: an existing file without ``overwrite``, a missing folder, arrays of different
            lengths, or values that `read_hdf5` refuses.
    """
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise DataError(f"{path}: there is such a file, expected a new name or overwrite=True")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder '{path.parent}'")
    keys = _checked_keys(path, data, modulation, signal, snr)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        aside = Path(folder) / path.name
        with _h5py().File(aside, "w") as file:
            for key, values in zip(keys, np.asarray(data, dtype=np.float32), strict=True):
                file.create_dataset(key, data=values[:, None])
        aside.replace(path)


def _checked_keys(
    path: Path,
    data: np.ndarray,
    modulation: Sequence[str],
    signal: Sequence[str],
    snr: Sequence[int] | np.ndarray,
) -> list[str]:
    """The keys of snapshots to write, which are checked."""
    lengths = {len(data), len(modulation), len(signal), len(snr)}
    if np.shape(data)[1:] != (NUM_VALUES,) or len(lengths) != 1 or lengths == {0}:
        raise DataError(
            f"{path}: expected data of shape (n, {NUM_VALUES}) with n labels of each kind, found "
            f"{np.shape(data)} with {len(modulation)}, {len(signal)} and {len(snr)} labels"
        )
    if not (np.abs(data) <= np.finfo(np.float32).max).all():
        raise DataError(f"{path}: expected finite float32 numbers to write")
    if not np.array_equal(snr, np.rint(snr)):
        raise DataError(f"{path}: expected SNRs in whole dB to write")
    keys: list[str] = []
    numbers: Counter[tuple[str, str, int]] = Counter()
    for label in zip(map(str, modulation), map(str, signal), map(int, snr), strict=True):
        keys.append(str((*label, numbers[label])))
        numbers[label] += 1
        _parse_key(path, keys[-1])
    return keys


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError('HDF5 files need h5py: pip install "fedgradnorm[hdf5]"') from error
    return h5py


def _parse_key(path: Path, key: str) -> tuple[int, int, int]:
    """The index of the pair, the SNR in dB and the number in a key."""
    parts = KEY.fullmatch(key)
    if parts is None:
        raise DataError(f"{path}: key {key[:200]!r}, expected {KEY_FORM}")
    modulation, signal = parts["modulation"], parts["signal"]
    snr, number = int(parts["snr"]), int(parts["number"])
    for kind, name, known in (("modulation", modulation, MODULATIONS), ("signal", signal, SIGNALS)):
        if name not in known:
            hint = nearest(name, known)
            raise DataError(f"{path}: key {key!r} has the unknown {kind} '{name}'; {hint}")
    if (modulation, signal) not in PAIRS:
        known_pairs = ", ".join(" / ".join(pair) for pair in PAIRS)
        raise DataError(f"{path}: key {key!r}, expected a pair of RadComDynamic: {known_pairs}")
    if not -200 <= snr <= 200 or number < 0:
        expected = "expected an SNR from -200 to 200 dB and a number from 0"
        raise DataError(f"{path}: key {key!r}, {expected}")
    return PAIRS.index((modulation, signal)), snr, number


def _read_snapshot(h5py: Any, path: Path, file: Any, key: str) -> np.ndarray:
    # A soft or external link, or external storage, could make this read some other file.
    item = file[key] if isinstance(file.get(key, getlink=True), h5py.HardLink) else None
    if not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
        expected = f"expected a plain data set of shape ({NUM_VALUES}, 1)"
        raise DataError(f"{path}: key {key!r}, {expected}")
    if item.shape != (NUM_VALUES, 1) or item.dtype.kind != "f":
        raise DataError(
            f"{path}: key {key!r}, expected floats of shape ({NUM_VALUES}, 1), "
            f"found {item.dtype} of shape {item.shape}"
        )
    with np.errstate(over="ignore"):  # the check below refuses infinities
        values: np.ndarray = item[:, 0].astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: key {key!r}, expected finite numbers")
    return values
