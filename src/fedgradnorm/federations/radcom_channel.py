"""Radar and communication waveforms through a dynamic radio channel, made with NumPy.

They imitate the snapshots of RadComDynamic. The channel is that of GNU Radio's
``channels.dynamic_channel_model`` with the parameters that RadComDynamic publishes. It names the
waveforms but does not publish their parameters, so these are our choice. Lengths are in samples of
0.1 µs.

Source: Jagannath and Jagannath, "Dataset for modulation classification and signal type
classification for multi-task and single task learning", Computer Networks 199 (2021) 108441.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import signal as sp

from fedgradnorm.errors import ConfigError, nearest

SAMPLE_RATE = 10e6  # Hz
NUM_SAMPLES = 128
NUM_VALUES = 2 * NUM_SAMPLES

WALK_STD = 0.05  # Hz per sample, of the carrier frequency offset and of the sample rate offset
MAX_CARRIER_OFFSET = 250.0  # Hz
MAX_RATE_OFFSET = 60.0  # Hz
RICIAN_K = 3.0
NUM_SINUSOIDS = 5
DELAYS = np.array([0.2, 0.3, 0.1])  # samples
MAGNITUDES = np.array([1.0, 0.5, 0.5])
NUM_TAPS = 5

STREAM = 8192  # the length of a transmission, over which power and peak are normalised
SLOT = 256  # each slot of a transmission contains one snapshot
SYMBOL_FILTER_TAPS = 33
NOISE_BANDWIDTH = 0.06  # of Nyquist
NOISE_FILTER_TAPS = 65
MODULATION_DEPTH = 0.8
MAX_PULSE_OFFSET = 0.02  # cycles a sample
FMCW_PERIODS = (60.0, 110.0)
FMCW_DEVIATIONS = (0.05, 0.15)  # cycles a sample

Waveform = Callable[[int, int, np.random.Generator], np.ndarray]


def snapshots(
    modulation: str, signal: str, snr: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Independent snapshots of one waveform at one signal-to-noise ratio.

    Args:
        modulation: with ``signal``, one of the pairs in ``WAVEFORMS``.
        signal: such as ``"Satcom"``.
        snr: in dB: a transmission of unit mean power before the channel against the noise. Fading
            changes the ratio at the receiver.
        count: the number n of snapshots.
        rng: the only source of randomness.

    Returns:
        Shape ``(n, 256)``, float32: 128 in-phase samples, then 128 quadrature samples, at 10 MS/s.

    Raises:
        ConfigError: an unknown pair, or fewer than one snapshot.

    >>> snapshots("bpsk", "Satcom", 10, count=3, rng=np.random.default_rng(0)).shape
    (3, 256)
    """
    if (modulation, signal) not in WAVEFORMS:
        name, known = f"{modulation} / {signal}", [" / ".join(pair) for pair in WAVEFORMS]
        raise ConfigError(f"there is no waveform '{name}'; {nearest(name, known)}")
    if count < 1:
        raise ConfigError(f"count: expected at least 1 snapshot, found {count}")
    # The multipath filter looks back by its taps, and the resampling ahead by one sample.
    sent = WAVEFORMS[modulation, signal](count, NUM_SAMPLES + NUM_TAPS, rng)
    received = _multipath(_carrier_offset(_rate_offset(sent, rng), rng), rng)
    values = np.concatenate([received.real, received.imag], axis=1)
    values += rng.normal(0, 10 ** (-snr / 20) * np.sqrt(0.5), values.shape)
    return values.astype(np.float32)


def _windows(streams: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Windows at random places, shape ``(count, length)``.

    The transmissions, shape ``(s, STREAM)``, are first scaled to unit mean power.
    """
    streams = streams / np.sqrt((np.abs(streams) ** 2).mean(axis=1, keepdims=True))
    starts = SLOT * np.arange(count) + rng.integers(SLOT - length + 1, size=count)
    windows: np.ndarray = sliding_window_view(streams.ravel(), length)[starts]
    return windows


def _phasor(cycles: np.ndarray) -> np.ndarray:
    phasor: np.ndarray = np.exp(2j * np.pi * cycles)
    return phasor


def _num_streams(count: int) -> int:
    return -(-count * SLOT // STREAM)


def _filtered(values: np.ndarray, repeats: int, num_taps: int, cutoff: float) -> np.ndarray:
    """Each value held for ``repeats`` samples, then low-passed below ``cutoff`` of Nyquist.

    The result is transmissions of shape ``(s, STREAM)``.
    """
    taps = sp.firwin(num_taps, cutoff)
    smooth: np.ndarray = sp.oaconvolve(np.repeat(values, repeats), taps, mode="valid")
    return smooth[: len(smooth) // STREAM * STREAM].reshape(-1, STREAM)


def _symbols(
    count: int, length: int, rng: np.random.Generator, levels: tuple[float, ...], symbol_length: int
) -> np.ndarray:
    """Random levels, each held for ``symbol_length`` samples.

    The filter passes up to half the symbol rate.
    """
    num_symbols = (_num_streams(count) * STREAM + SYMBOL_FILTER_TAPS) // symbol_length + 1
    symbols = rng.choice(levels, num_symbols)
    streams = _filtered(symbols, symbol_length, SYMBOL_FILTER_TAPS, 1 / symbol_length)
    return _windows(streams, count, length, rng)


def _amplitude_modulation(
    count: int, length: int, rng: np.random.Generator, single_sideband: bool
) -> np.ndarray:
    """Low-pass noise as the message.

    It has both sidebands around a carrier, or only the upper sideband without a carrier.
    """
    noise = rng.standard_normal(_num_streams(count) * STREAM + NOISE_FILTER_TAPS - 1)
    message = _filtered(noise, 1, NOISE_FILTER_TAPS, NOISE_BANDWIDTH)
    message /= np.abs(message).max(axis=1, keepdims=True)
    sent = sp.hilbert(message) if single_sideband else 1 + MODULATION_DEPTH * message
    return _windows(sent, count, length, rng)


def _pulses(
    count: int,
    length: int,
    rng: np.random.Generator,
    widths: tuple[int, int],
    intervals: tuple[int, int],
    stagger: float = 0.0,
) -> np.ndarray:
    """Pulses with random widths, intervals to the next pulse, carrier offsets and phases.

    Ranges are in samples and exclude their upper ends.
    """
    total = _num_streams(count) * STREAM
    num_pulses = int(total / (intervals[0] * (1 - stagger))) + 1
    stretch = rng.uniform(1 - stagger, 1 + stagger, num_pulses)
    spacing = np.maximum(rng.integers(*intervals, size=num_pulses) * stretch, 1).astype(int)
    pulse = np.repeat(np.arange(num_pulses), spacing)[:total]
    since_start = np.arange(total) - (np.cumsum(spacing) - spacing)[pulse]
    offsets = rng.uniform(-MAX_PULSE_OFFSET, MAX_PULSE_OFFSET, num_pulses)
    cycles = offsets[pulse] * since_start + rng.random(num_pulses)[pulse]
    on = since_start < rng.integers(*widths, size=num_pulses)[pulse]
    return _windows((on * _phasor(cycles)).reshape(-1, STREAM), count, length, rng)


def _frequency_sweep(count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """A triangular sweep of the frequency between plus and minus the deviation.

    Period and deviation differ by snapshot.
    """
    period = rng.uniform(*FMCW_PERIODS, (count, 1))
    deviation = rng.uniform(*FMCW_DEVIATIONS, (count, 1))
    place = (np.arange(length) / period + rng.random((count, 1))) % 1
    cycles = np.cumsum(deviation * (4 * np.abs(place - 0.5) - 1), axis=1) + rng.random((count, 1))
    return _phasor(cycles)


WAVEFORMS: Mapping[tuple[str, str], Waveform] = {
    ("pulsed", "Airborne-detection"): partial(_pulses, widths=(5, 15), intervals=(30, 50)),
    ("pulsed", "Airborne-range"): partial(_pulses, widths=(20, 40), intervals=(80, 120)),
    ("pulsed", "Air-Ground-MTI"): partial(
        _pulses, widths=(10, 20), intervals=(50, 70), stagger=0.3
    ),
    ("pulsed", "Ground mapping"): partial(_pulses, widths=(2, 6), intervals=(20, 30)),
    ("fmcw", "Radar-Altimeter"): _frequency_sweep,
    ("bpsk", "Satcom"): partial(_symbols, levels=(-1.0, 1.0), symbol_length=8),
    ("amdsb", "AM radio"): partial(_amplitude_modulation, single_sideband=False),
    ("amssb", "AM radio"): partial(_amplitude_modulation, single_sideband=True),
    ("ask", "short-range"): partial(_symbols, levels=(0.0, 0.33, 0.66, 1.0), symbol_length=10),
}
"""By (modulation, signal) pair of RadComDynamic, a function ``(count, length, rng)``.

It gives transmissions of shape ``(count, length)`` and mean power 1.
"""

PAIRS = tuple(WAVEFORMS)
MODULATIONS = tuple(dict.fromkeys(modulation for modulation, _ in PAIRS))
SIGNALS = tuple(dict.fromkeys(signal for _, signal in PAIRS))


def _random_walk(limit: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Offsets in Hz: a random walk, clipped at plus and minus ``limit``.

    It starts from its stationary distribution, which is uniform.
    """
    start = rng.uniform(-limit, limit, (shape[0], 1))
    steps = np.cumsum(rng.normal(0, WALK_STD, shape), axis=1)
    walk: np.ndarray = np.clip(start + steps, -limit, limit)
    return walk


def _rate_offset(sent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The samples of a receiver with another clock, which is aligned at the start, as in GNU Radio.

    The clocks drift apart by at most 0.0008 samples in a snapshot, so linear interpolation is exact
    enough.
    """
    offsets = _random_walk(MAX_RATE_OFFSET, (len(sent), sent.shape[1] - 1), rng)
    drift = np.cumsum(offsets, axis=1) / SAMPLE_RATE
    received: np.ndarray = sent[:, :-1] + drift * np.diff(sent, axis=1)
    return received


def _carrier_offset(sent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    offsets = _random_walk(MAX_CARRIER_OFFSET, (len(sent), sent.shape[1]), rng)
    cycles = np.cumsum(offsets, axis=1) / SAMPLE_RATE
    received: np.ndarray = sent * _phasor(cycles)
    return received


def _fading(count: int, rng: np.random.Generator) -> np.ndarray:
    """The complex gain of each path, shape ``(count, paths)``, of mean power 1.

    The first path is Rician, the others are Rayleigh. A gain is constant in a snapshot: a Doppler
    shift of at most 2 Hz turns it by at most 0.0002 rad in 12.8 µs.
    """
    phases = rng.uniform(-np.pi, np.pi, (2, count, len(DELAYS), NUM_SINUSOIDS))
    waves = np.cos(phases[0]).sum(axis=-1) + 1j * np.sin(phases[1]).sum(axis=-1)
    gains: np.ndarray = waves / np.sqrt(NUM_SINUSOIDS)
    line_of_sight = np.exp(1j * rng.uniform(-np.pi, np.pi, count))
    gains[:, 0] = (gains[:, 0] + np.sqrt(RICIAN_K) * line_of_sight) / np.sqrt(RICIAN_K + 1)
    return gains


def _multipath(sent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sum of the paths, each delayed by a truncated sinc interpolation.

    It has shape ``(n, 128)``, and ``sent`` has ``(n, 128 + NUM_TAPS - 1)``.
    """
    interpolation = MAGNITUDES[:, None] * np.sinc(np.arange(NUM_TAPS) - DELAYS[:, None])
    taps = _fading(len(sent), rng) @ interpolation
    windows = sliding_window_view(sent, NUM_TAPS, axis=1)
    received: np.ndarray = np.einsum("nsk,nk->ns", windows, taps[:, ::-1])
    return received
