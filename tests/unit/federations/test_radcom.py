import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgradnorm.errors import ConfigError, DataError, FedGradNormError
from fedgradnorm.federations import radcom, radcom_channel
from fedgradnorm.federations.radcom import make, read_hdf5, write_hdf5
from fedgradnorm.federations.radcom_channel import (
    DELAYS,
    MODULATIONS,
    NUM_TAPS,
    PAIRS,
    SIGNALS,
    STREAM,
    WAVEFORMS,
    snapshots,
)

h5py = pytest.importorskip("h5py")

SNRS = range(-20, 20, 2)
SMALL = {"snapshots": 5, "snr_min": -8, "snr_max": 0}
NEIGHBOURS = 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGRADNORM_CACHE", str(tmp_path / "cache"))


def power(values: np.ndarray) -> np.ndarray:
    """Of each snapshot; 256 numbers make 128 complex samples."""
    return 2 * np.square(values, dtype=np.float64).mean(axis=1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# The waveforms


@pytest.mark.parametrize("pair", PAIRS)
def test_waveform_has_mean_power_one_and_the_shape_asked_for(pair: tuple[str, str]) -> None:
    waves = WAVEFORMS[pair](2000, 133, rng())
    assert waves.shape == (2000, 133)
    assert (np.abs(waves) ** 2).mean() == pytest.approx(1, abs=0.02)


def test_there_are_nine_pairs_of_six_modulations_and_eight_signals() -> None:
    assert (len(PAIRS), len(MODULATIONS), len(SIGNALS)) == (9, 6, 8)


@pytest.mark.parametrize(
    ("signal", "widths", "intervals"),
    [
        ("Airborne-detection", (5, 14), (30, 49)),
        ("Airborne-range", (20, 39), (80, 119)),
        ("Air-Ground-MTI", (10, 19), (35, 89)),
        ("Ground mapping", (2, 5), (20, 29)),
    ],
)
def test_pulses_have_the_documented_widths_intervals_and_offsets(
    signal: str, widths: tuple[int, int], intervals: tuple[int, int]
) -> None:
    waves = WAVEFORMS["pulsed", signal](400, 250, rng())
    found_widths, found_intervals, offsets = [], [], []
    for wave in waves:
        edges = np.diff((np.abs(wave) > 0).astype(int))
        starts, ends = np.flatnonzero(edges == 1) + 1, np.flatnonzero(edges == -1) + 1
        found_intervals += np.diff(starts).tolist()
        for start in starts:
            if (later := ends[ends > start]).size:
                found_widths.append(later[0] - start)
                offsets += (
                    np.angle(wave[start + 1 : later[0]] / wave[start : later[0] - 1]) / (2 * np.pi)
                ).tolist()
    assert (min(found_widths), max(found_widths)) == widths
    assert intervals[0] <= min(found_intervals) <= max(found_intervals) <= intervals[1]
    assert max(found_intervals) - min(found_intervals) > 0.7 * (intervals[1] - intervals[0])
    assert 0.019 < np.abs(offsets).max() <= 0.02 + 1e-9


def test_fmcw_has_a_constant_envelope_and_the_documented_deviation() -> None:
    waves = WAVEFORMS["fmcw", "Radar-Altimeter"](500, 133, rng())
    np.testing.assert_allclose(np.abs(waves), 1)
    deviation = np.abs(np.angle(waves[:, 1:] / waves[:, :-1]) / (2 * np.pi)).max(axis=1)
    assert 0.045 < deviation.min() < 0.06
    assert 0.14 < deviation.max() <= 0.15


def test_bpsk_and_amdsb_are_real_and_ask_and_amdsb_do_not_change_sign() -> None:
    bpsk, ask = (
        WAVEFORMS["bpsk", "Satcom"](300, 133, rng()),
        WAVEFORMS["ask", "short-range"](300, 133, rng()),
    )
    amdsb = WAVEFORMS["amdsb", "AM radio"](300, 133, rng())
    assert all(np.isrealobj(waves) for waves in (bpsk, ask, amdsb))
    assert abs(bpsk.mean()) < 0.05
    assert ask.min() > -0.1
    assert amdsb.min() > 0
    assert amdsb.max() / amdsb.min() < 1.81 / 0.19


def test_amssb_has_only_the_upper_sideband() -> None:
    waves = WAVEFORMS["amssb", "AM radio"](500, 128, rng())
    spectrum = (np.abs(np.fft.fft(waves * np.hanning(128), axis=1)) ** 2).mean(axis=0)
    assert spectrum[1:64].sum() > 100 * spectrum[-62:-2].sum()
    assert spectrum[:8].sum() > 0.99 * spectrum[:64].sum()


def test_a_window_lies_within_one_transmission() -> None:
    streams = np.repeat(np.array([[1.0], [1j]]), STREAM, axis=1)
    windows = radcom_channel._windows(streams, 64, 133, rng())
    assert (windows == windows[:, :1]).all()


# The channel


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("snr", [-20, 0, 18])
def test_power_is_that_of_the_paths_and_of_the_noise(pair: tuple[str, str], snr: int) -> None:
    values = snapshots(*pair, snr, 3000, rng(1))
    assert values.shape == (3000, 256)
    assert values.dtype == np.float32
    noise = 10 ** (-snr / 10)
    assert np.isfinite(values).all()
    assert power(values).mean() - noise == pytest.approx(1.75, abs=0.2 + 0.005 * noise)


def test_without_fading_the_noise_is_circular_and_of_the_stated_power(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        radcom_channel, "_multipath", lambda sent, _: np.zeros((len(sent), 128), dtype=complex)
    )
    values = snapshots("bpsk", "Satcom", -10, 2000, rng())
    assert (values[:, :128] ** 2).mean() == pytest.approx(5, rel=0.01)
    assert (values[:, 128:] ** 2).mean() == pytest.approx(5, rel=0.01)
    assert (values[:, :128] * values[:, 128:]).mean() == pytest.approx(0, abs=0.05)


def test_fading_gains_have_mean_power_one_and_only_the_first_is_rician() -> None:
    squares = np.abs(radcom_channel._fading(100_000, rng())) ** 2
    np.testing.assert_allclose(squares.mean(axis=0), 1, atol=0.01)
    k, sinusoids = radcom_channel.RICIAN_K, radcom_channel.NUM_SINUSOIDS
    fourth_moment = (
        3 / 8 + 3 / 4 * (sinusoids - 1)
    ) / sinusoids  # of the real part, a sum of cosines scaled by 1/√N
    scattered = 2 * fourth_moment - 1 / 2
    rician = (scattered + 2 * k) / (k + 1) ** 2
    np.testing.assert_allclose(squares.var(axis=0), [rician, scattered, scattered], rtol=0.03)


def test_multipath_agrees_with_a_plain_loop() -> None:
    sent = rng(3).standard_normal((4, 128 + NUM_TAPS - 1)) + 1j * rng(4).standard_normal(
        (4, 128 + NUM_TAPS - 1)
    )
    gains = radcom_channel._fading(4, rng(5))
    expected = np.zeros((4, 128), dtype=complex)
    for n in range(4):
        for path, magnitude in enumerate([1, 0.5, 0.5]):
            for tap in range(NUM_TAPS):
                x = math.pi * (tap - DELAYS[path])
                for t in range(128):
                    expected[n, t] += (
                        magnitude
                        * gains[n, path]
                        * math.sin(x)
                        / x
                        * sent[n, t + NUM_TAPS - 1 - tap]
                    )
    np.testing.assert_allclose(radcom_channel._multipath(sent, rng(5)), expected)


def test_walks_stay_within_their_limits_and_start_anywhere_within() -> None:
    walk = radcom_channel._random_walk(60, (2000, 128), rng())
    assert np.abs(walk).max() <= 60
    assert walk[:, 0].std() == pytest.approx(60 / math.sqrt(3), rel=0.05)
    assert np.diff(walk[np.abs(walk[:, 0]) < 50], axis=1).std() == pytest.approx(0.05, rel=0.02)


def test_offsets_turn_and_shift_by_little() -> None:
    tone = np.exp(2j * np.pi * 0.01 * np.arange(134))[None].repeat(50, axis=0)
    turned = radcom_channel._carrier_offset(tone, rng())
    assert np.abs(np.angle(turned / tone)).max() <= 2 * np.pi * 250 * 134 / 10e6
    shifted = radcom_channel._rate_offset(tone, rng())
    assert 0 < np.abs(np.angle(shifted / tone[:, :-1])).max() <= 2 * np.pi * 0.01 * 60 * 134 / 10e6


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("count", [1, 32, 33])
def test_any_number_of_snapshots(pair: tuple[str, str], count: int) -> None:
    assert np.isfinite(snapshots(*pair, 0, count, rng())).all()
    assert snapshots(*pair, 0, count, rng()).shape == (count, 256)


def test_same_generator_same_snapshots_and_another_generator_other_ones() -> None:
    first, again, other = (snapshots("ask", "short-range", 4, 6, rng(seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any(axis=1).all()


def test_an_unknown_pair_and_no_snapshots_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bpsk / AM radio'"):
        snapshots("bpsk", "AM radio", 0, 1, rng())
    with pytest.raises(ConfigError, match="count: expected at least 1 snapshot, found 0"):
        snapshots("bpsk", "Satcom", 0, 0, rng())


# The federation


def rows(inputs: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in inputs.numpy()}


def test_clients_have_disjoint_training_data_and_one_test_set() -> None:
    federation = make(0, clients_per_task=2, **SMALL)
    assert federation.client_ids == [
        "modulation-0",
        "modulation-1",
        "signal-0",
        "signal-1",
        "anomaly-0",
        "anomaly-1",
    ]
    parts = [rows(client.train_data[0]) for client in federation.clients]
    tests = [client.test_data[0] for client in federation.clients]
    assert all((test == tests[0]).all() for test in tests)
    assert (
        len(set().union(*parts, rows(tests[0])))
        == sum(map(len, parts)) + len(tests[0])
        == 9 * 5 * 5
    )
    assert len(tests[0]) == 9 * 5
    federation.check_data()


def test_labels_are_those_of_the_snapshots() -> None:
    federation = make(3, anomaly_threshold=-3, **SMALL)
    truth = {}
    for pair in PAIRS:
        for snr in range(-8, 2, 2):
            generator = radcom.generator(3, 0, "", f"radcom {pair[0]} {pair[1]} {snr}")
            labels = {
                "modulation": MODULATIONS.index(pair[0]),
                "signal": SIGNALS.index(pair[1]),
                "anomaly": int(snr < -3),
            }
            truth |= dict.fromkeys(
                (row.tobytes() for row in snapshots(*pair, snr, 5, generator)), labels
            )
    for client in federation.clients:
        for inputs, targets in (client.train_data, client.test_data):
            assert targets.dtype == torch.int64
            assert [truth[row.tobytes()][client.id] for row in inputs.numpy()] == targets.tolist()


def test_test_set_has_its_share_of_every_pair_and_snr() -> None:
    targets = {
        client.id: client.test_data[1]
        for client in make(0, snapshots=10, snr_min=-6, snr_max=0).clients
    }
    assert targets["signal"].bincount().tolist() == [8, 8, 8, 8, 8, 8, 16, 8]
    assert targets["modulation"].bincount().tolist() == [32, 8, 8, 8, 8, 8]
    assert targets["anomaly"].bincount().tolist() == [54, 18]


def test_same_seed_same_data_and_another_seed_other_data() -> None:
    radcom._generated.cache_clear()
    first = make(0, **SMALL).clients[0].train_data
    radcom._generated.cache_clear()
    again = make(0, **SMALL).clients[0].train_data
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert not rows(first[0]) & rows(make(1, **SMALL).clients[0].train_data[0])


def test_a_pair_at_an_snr_does_not_depend_on_the_range() -> None:
    narrow = make(0, tasks=["signal"], snapshots=5, snr_min=0, snr_max=0).clients[0]
    wide = make(0, tasks=["signal"], **SMALL).clients[0]
    assert rows(narrow.train_data[0]) <= rows(wide.train_data[0]) | rows(wide.test_data[0])


def test_building_a_federation_makes_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(radcom, "_generated", lambda *args: calls.append(args))
    federation = make(0)
    assert federation.num_features == 64
    assert not calls


def test_the_environment_does_not_choose_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGRADNORM_RADCOM", "no such file")
    assert len(make(0, **SMALL).clients[0].test_data[0]) == 45


def test_sizes_are_followed() -> None:
    federation = make(0, sizes={"anomaly": 7}, **SMALL)
    assert [len(client.train_data[0]) for client in federation.clients] == [60, 60, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["modulaton"]}, "did you mean 'modulation'"),
        ({"tasks": []}, "at least one task"),
        ({"test_fraction": 0.0}, "test_fraction: expected a number between 0 and 1, found 0.0"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"test_fraction": math.nan}, "test_fraction"),
        ({"snapshots": 4}, "snapshots: expected at least 5 .*, found 4"),
        ({"snapshots": 9, "test_fraction": 0.9}, "snapshots: expected at least 10"),
        ({"anomaly_threshold": -20}, "anomaly_threshold: .*, found -20 for SNRs from -20 to 18 dB"),
        ({"anomaly_threshold": 18.5}, "anomaly_threshold"),
        ({"anomaly_threshold": -7, "snr_min": -8, "snr_max": -7}, "from -8 to -8 dB"),
        ({"snr_min": 4, "snr_max": 2}, "snr_min"),
        ({"snr_min": -1000}, "snr_min"),
        ({"sizes": {"signl": 3}}, "did you mean 'signal'"),
        ({"sizes": {"signal": 10**6}}, "sizes"),
        ({"sizes": "equall"}, "sizes"),
        ({"clients_per_task": 0}, "clients_per_task"),
    ],
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(0, **options)


@pytest.mark.parametrize("test_fraction", [0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9])
def test_the_fewest_snapshots_allowed_are_enough(test_fraction: float) -> None:
    least = radcom._least_snapshots(test_fraction)
    client = make(
        0, tasks=["signal"], snapshots=least, snr_min=0, snr_max=2, test_fraction=test_fraction
    ).clients[0]
    for _, targets in (client.train_data, client.test_data):
        assert len(targets.unique()) == 8


def test_without_the_anomaly_task_its_threshold_does_not_matter() -> None:
    assert make(0, tasks=["signal"], snr_min=0, snapshots=5).client_ids == ["signal"]


# The file


def small_file(
    path: Path, count: int = 5, snrs: tuple[int, ...] = (-6, 0)
) -> dict[tuple[str, str, int], np.ndarray]:
    cells = {
        (*pair, snr): snapshots(*pair, snr, count, rng(index))
        for index, pair in enumerate(PAIRS)
        for snr in snrs
    }
    labels = [label for label in cells for _ in range(count)]
    modulation, signal, snr = zip(*labels, strict=True)
    write_hdf5(path, np.concatenate(list(cells.values())), modulation, signal, snr)
    return cells


def test_hdf5_round_trip(tmp_path: Path) -> None:
    cells = small_file(tmp_path / "small.hdf5", count=12)
    read = read_hdf5(tmp_path / "small.hdf5")
    assert read.data.dtype == np.float32
    assert len(read.data) == len(cells) * 12
    for (modulation, signal, snr), values in cells.items():
        pairs = zip(read.modulation, read.signal, read.snr.tolist(), strict=True)
        chosen = np.array([label == (modulation, signal, snr) for label in pairs])
        assert (read.data[chosen] == values).all()


def test_hdf5_is_the_public_format(tmp_path: Path) -> None:
    cells = small_file(tmp_path / "small.hdf5")
    with h5py.File(tmp_path / "small.hdf5") as file:
        stored = file["('bpsk', 'Satcom', -6, 3)"]
        assert (stored.shape, stored.dtype) == ((256, 1), np.float32)
        assert (stored[:, 0] == cells["bpsk", "Satcom", -6][3]).all()


def test_federation_of_a_file(tmp_path: Path) -> None:
    cells = small_file(tmp_path / "small.hdf5", count=7)
    federations = [make(seed, path=str(tmp_path / "small.hdf5")) for seed in (0, 1)]
    first, second = (federation.clients for federation in federations)
    assert all((one.test_data[0] == first[0].test_data[0]).all() for one in (*first, *second))
    assert rows(first[0].train_data[0]) != rows(second[0].train_data[0])
    everything = set().union(
        *(rows(client.train_data[0]) for client in first), rows(first[0].test_data[0])
    )
    assert everything == {row.tobytes() for values in cells.values() for row in values}
    truth = {row.tobytes(): label for label, values in cells.items() for row in values}
    for client in first:
        for row, target in zip(
            client.train_data[0].numpy(), client.train_data[1].tolist(), strict=True
        ):
            modulation, signal, snr = truth[row.tobytes()]
            labels = {
                "modulation": MODULATIONS.index(modulation),
                "signal": SIGNALS.index(signal),
                "anomaly": int(snr < -4),
            }
            assert labels[client.id] == target


def test_a_file_is_read_on_first_use_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_file(tmp_path / "small.hdf5")
    calls = []
    read = radcom.read_arrays
    monkeypatch.setattr(radcom, "read_arrays", lambda path: calls.append(path) or read(path))
    federation = make(0, path=str(tmp_path / "small.hdf5"))
    assert not calls
    federation.check_data()
    make(0, path=str(tmp_path / "small.hdf5")).check_data()
    assert len(calls) == 1
    small_file(tmp_path / "other.hdf5", count=6)
    (tmp_path / "other.hdf5").replace(tmp_path / "small.hdf5")
    assert len(make(0, path=str(tmp_path / "small.hdf5")).clients[0].test_data[0]) == round(
        0.2 * 9 * 2 * 6
    )
    assert len(calls) == 2


def test_options_choose_among_the_snapshots_of_a_file(tmp_path: Path) -> None:
    cells = small_file(tmp_path / "small.hdf5", count=8)
    client = make(
        0, path=str(tmp_path / "small.hdf5"), tasks=["signal"], snapshots=5, snr_min=-2
    ).clients[0]
    chosen = rows(client.train_data[0]) | rows(client.test_data[0])
    assert chosen == {
        row.tobytes() for (*_, snr), values in cells.items() if snr == 0 for row in values[:5]
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"snr_min": 2, "anomaly_threshold": 4},
            DataError,
            "no snapshot at 2 to 18 dB, found -6 to 0 dB",
        ),
        ({"anomaly_threshold": 2}, ConfigError, "anomaly_threshold: .* from -6 to 0 dB"),
        (
            {"test_fraction": 0.1},
            DataError,
            "5 snapshots of a pair at an SNR, expected at least 10",
        ),
        ({"sizes": {"signal": 1000}}, ConfigError, "sizes"),
    ],
)
def test_options_that_do_not_fit_a_file_are_told_on_first_use(
    tmp_path: Path, options: dict[str, Any], error: type[FedGradNormError], message: str
) -> None:
    small_file(tmp_path / "small.hdf5")
    federation = make(0, path=str(tmp_path / "small.hdf5"), **options)
    with pytest.raises(error, match=message):
        federation.check_data()


def test_a_missing_file_is_told_by_its_name_on_first_use(tmp_path: Path) -> None:
    for use in (lambda path: make(0, path=str(path)).check_data(), read_hdf5):
        with pytest.raises(DataError, match=r"there is no file '.*none\.hdf5'"):
            use(tmp_path / "none.hdf5")


def test_a_file_that_is_not_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "text.hdf5"
    path.write_text("not HDF5")
    with pytest.raises(DataError, match=r"text\.hdf5: expected an HDF5 file"):
        read_hdf5(path)


def test_a_file_that_another_program_has_locked_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "small.hdf5"
    small_file(path)
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            DataError,
            match=r"small\.hdf5: another program has the file open for writing, and has locked it",
        ):
            read_hdf5(path)
    assert len(read_hdf5(path).data)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "small.hdf5"
    small_file(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"small\.hdf5: expected an HDF5 file"):
        read_hdf5(path)


def test_a_file_without_data_sets(tmp_path: Path) -> None:
    h5py.File(tmp_path / "empty.hdf5", "w").close()
    with pytest.raises(
        DataError, match=r"empty\.hdf5: expected a data set for each snapshot, found none"
    ):
        read_hdf5(tmp_path / "empty.hdf5")


GOOD = np.zeros((256, 1), dtype=np.float32)
BAD_KEYS = [
    "bpsk",
    "('bpsk', 'Satcom', 10)",
    "('bpsk', 'Satcom', 10.5, 0)",
    "('bpsk', 'Satcom', True, 0)",
    "['bpsk', 'Satcom', 10, 0]",
    "__import__('os').getcwd()",
    "(" * 100,
    "('bpsk', 'Satcom', 10, 0" + " " * 200 + ")",
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_of_another_form(tmp_path: Path, key: str) -> None:
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        file.create_dataset(key, data=GOOD)
    with pytest.raises(DataError, match=r"bad\.hdf5: key .*, expected a key like"):
        read_hdf5(tmp_path / "bad.hdf5")


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("('bpks', 'Satcom', 10, 0)", GOOD, "unknown modulation 'bpks'; did you mean 'bpsk'"),
        ("('bpsk', 'Satcon', 10, 0)", GOOD, "unknown signal 'Satcon'; did you mean 'Satcom'"),
        ("('bpsk', 'AM radio', 10, 0)", GOOD, "expected a pair of RadComDynamic"),
        ("('bpsk', 'Satcom', 1000, 0)", GOOD, "expected an SNR from -200 to 200 dB"),
        ("('bpsk', 'Satcom', 10, -1)", GOOD, "a number from 0"),
        (
            "('bpsk', 'Satcom', 10, 0)",
            GOOD[:, 0],
            r"expected floats of shape \(256, 1\), found float32 of shape \(256,\)",
        ),
        (
            "('bpsk', 'Satcom', 10, 0)",
            np.zeros((1, 256), dtype=np.float32),
            r"found float32 of shape \(1, 256\)",
        ),
        ("('bpsk', 'Satcom', 10, 0)", GOOD.astype(np.int32), "found int32"),
        ("('bpsk', 'Satcom', 10, 0)", GOOD + np.nan, "expected finite numbers"),
        ("('bpsk', 'Satcom', 10, 0)", GOOD + np.inf, "expected finite numbers"),
    ],
)
def test_bad_data_are_named_by_file_and_key(
    tmp_path: Path, key: str, values: np.ndarray, message: str
) -> None:
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        file.create_dataset(key, data=values)
    with pytest.raises(DataError, match=message) as error:
        read_hdf5(tmp_path / "bad.hdf5")
    assert "bad.hdf5: key" in str(error.value)
    assert key in str(error.value)


def a_group(file: Any) -> None:
    file.create_group("('bpsk', 'Satcom', 10, 0)")


def a_soft_link(file: Any) -> None:
    file["('bpsk', 'Satcom', 10, 0)"] = h5py.SoftLink("/elsewhere")


def an_external_link(file: Any) -> None:
    file["('bpsk', 'Satcom', 10, 0)"] = h5py.ExternalLink("other.hdf5", "/data")


def external_storage(file: Any) -> None:
    file.create_dataset(
        "('bpsk', 'Satcom', 10, 0)", shape=(256, 1), dtype="f4", external=[("secret.bin", 0, 1024)]
    )


@pytest.mark.parametrize("put", [a_group, a_soft_link, an_external_link, external_storage])
def test_only_plain_data_sets_are_read(tmp_path: Path, put: Callable[[Any], None]) -> None:
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        put(file)
    with pytest.raises(DataError, match="expected a plain data set"):
        read_hdf5(tmp_path / "bad.hdf5")


def test_one_snapshot_under_two_keys(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        file.create_dataset("('bpsk', 'Satcom', 10, 0)", data=GOOD)
        file.create_dataset("('bpsk','Satcom',10,0)", data=GOOD)
    with pytest.raises(DataError, match="are of one snapshot"):
        read_hdf5(tmp_path / "bad.hdf5")


def test_writing_replaces_only_on_request_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "one.hdf5"
    with pytest.raises(DataError, match="there is no folder"):
        write_hdf5(path, GOOD.T, ["bpsk"], ["Satcom"], [10])
    path.parent.mkdir()
    write_hdf5(path, GOOD.T, ["bpsk"], ["Satcom"], [10])
    with pytest.raises(DataError, match="expected a new name or overwrite=True"):
        write_hdf5(path, GOOD.T + 1, ["bpsk"], ["Satcom"], [10])
    assert read_hdf5(path).data.max() == 0
    write_hdf5(path, GOOD.T + 1, ["bpsk"], ["Satcom"], np.array([10]), overwrite=True)
    assert read_hdf5(path).data.max() == 1
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("data", "modulation", "snr", "message"),
    [
        (GOOD, "bpsk", 10, r"expected data of shape \(n, 256\)"),
        (np.zeros((2, 256)), "bpsk", 10, "with 1, 1 and 1 labels"),
        (GOOD.T + np.nan, "bpsk", 10, "finite"),
        (np.full((1, 256), 1e300), "bpsk", 10, "finite float32"),
        (GOOD.T, "bpks", 10, "unknown modulation"),
        (GOOD.T, "bpsk", 10.5, "whole dB"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, data: np.ndarray, modulation: str, snr: float, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_hdf5(tmp_path / "one.hdf5", data, [modulation], ["Satcom"], np.array([snr]))
    assert not list(tmp_path.iterdir())


def test_without_h5py_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_file(tmp_path / "small.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r'pip install "fedgradnorm\[hdf5\]"'):
        read_hdf5(tmp_path / "small.hdf5")


# Against the reference file


@pytest.fixture(scope="module")
def reference(radcom_hdf5: Path) -> radcom.Snapshots:
    return read_hdf5(radcom_hdf5)


def pairs_of(file: radcom.Snapshots) -> np.ndarray:
    return np.array([PAIRS.index(pair) for pair in zip(file.modulation, file.signal, strict=True)])


def standard_error(powers: np.ndarray) -> float:
    """In dB, of the mean of powers in file order, where neighbours share one draw of the fading."""
    blocks = powers[: len(powers) // NEIGHBOURS * NEIGHBOURS].reshape(-1, NEIGHBOURS).mean(axis=1)
    return float(10 / math.log(10) * blocks.std(ddof=1) / math.sqrt(len(blocks)) / powers.mean())


@pytest.mark.real_data
def test_power_at_each_snr_is_that_of_the_reference(reference: radcom.Snapshots) -> None:
    # From 0 dB on, the reference's own mean over 90 draws of the fading is uncertain by some 0.4 dB: at an SNR where it is far
    # off by chance, 1 dB is less than three of its standard errors.
    differences = []
    for snr in SNRS:
        theirs = power(reference.data[reference.snr == snr])
        ours = np.mean(
            [
                power(snapshots(*pair, snr, 400, rng(index))).mean()
                for index, pair in enumerate(PAIRS)
            ]
        )
        differences.append(10 * math.log10(ours / theirs.mean()))
        assert abs(differences[-1]) < max(1, 3 * standard_error(theirs)), snr
    assert abs(np.mean(differences)) < 0.25
    assert np.sum(np.abs(differences) < 1) >= len(SNRS) - 1


@pytest.mark.real_data
@pytest.mark.parametrize("index", range(len(PAIRS)), ids=[signal for _, signal in PAIRS])
def test_power_of_each_pair_is_that_of_the_reference(
    reference: radcom.Snapshots, index: int
) -> None:
    theirs = power(reference.data[(pairs_of(reference) == index) & (reference.snr >= 0)])
    ours = np.mean(
        [power(snapshots(*PAIRS[index], snr, 300, rng(snr))).mean() for snr in SNRS if snr >= 0]
    )
    assert abs(10 * math.log10(ours / theirs.mean())) < 1


@pytest.mark.real_data
@pytest.mark.parametrize("index", range(len(PAIRS)), ids=[signal for _, signal in PAIRS])
def test_spectrum_of_each_pair_is_that_of_the_reference(
    reference: radcom.Snapshots, index: int
) -> None:
    def spectrum(values: np.ndarray) -> np.ndarray:
        values = values[power(values) > 0.4]  # in a deep fade there is more noise than signal
        waves = (values[:, :128] + 1j * values[:, 128:]) / np.sqrt(power(values))[:, None]
        return (np.abs(np.fft.fft(waves * np.hanning(128), axis=1)) ** 2).mean(axis=0)

    theirs = spectrum(reference.data[(pairs_of(reference) == index) & (reference.snr >= 14)])
    ours = spectrum(
        np.concatenate([snapshots(*PAIRS[index], snr, 600, rng(snr)) for snr in (14, 16, 18)])
    )
    in_band = theirs > theirs.max() / 100
    assert np.abs(10 * np.log10(ours / theirs))[in_band].max() < 3
    assert np.abs(10 * np.log10(ours / theirs))[in_band].mean() < 0.7


@pytest.mark.real_data
def test_the_reference_makes_a_federation(radcom_hdf5: Path) -> None:
    federation = make(0, path=str(radcom_hdf5))
    federation.check_data()
    assert sum(len(client.train_data[0]) for client in federation.clients) == round(0.8 * 9000)
