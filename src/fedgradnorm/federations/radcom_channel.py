"""Radar and communication waveforms through a dynamic radio channel: the snapshots of RadComDynamic, made with NumPy.

The channel is that of GNU Radio's ``channels.dynamic_channel_model`` under the parameters that RadComDynamic publishes.
RadComDynamic names the waveforms but publishes no parameters of theirs: the ones here are a choice. Lengths are in samples of 0.1 µs.

Source: Jagannath and Jagannath, "Dataset for modulation classification and signal type classification for multi-task and
single task learning", Computer Networks 199 (2021) 108441.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import signal as sp

from fedgradnorm.errors import ConfigError, nearest

__all__ = ["MODULATIONS", "NUM_VALUES", "PAIRS", "SIGNALS", "WAVEFORMS", "snapshots"]

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

STREAM = 8192  # a transmission, over which power and peak are normalised
SLOT = 256  # one snapshot lies somewhere in each slot of a transmission
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
        snr: in dB, of a transmission of unit mean power before the channel against the noise. Fading moves the ratio at the receiver.
        count: how many, n.
        rng: the only source of randomness.

    Returns:
        Shape ``(n, 256)``, float32: 128 in-phase samples, then 128 quadrature samples, at 10 MS/s.

    Raises:
        ConfigError: an unknown pair, or fewer than one snapshot.

    >>> snapshots("bpsk", "Satcom", 10, count=3, rng=np.random.default_rng(0)).shape
    (3, 256)
    """
    if (modulation, signal) not in WAVEFORMS:
        known = [" / ".join(pair) for pair in WAVEFORMS]
        raise ConfigError(
            f"there is no waveform '{modulation} / {signal}'; {nearest(f'{modulation} / {signal}', known)}"
        )
    if count < 1:
        raise ConfigError(f"count: expected at least 1 snapshot, found {count}")
    # The multipath filter looks back by its taps, and the resampling ahead by one sample.
    sent = WAVEFORMS[modulation, signal](count, NUM_SAMPLES + NUM_TAPS, rng)
    received = _multipath(_carrier_offset(_rate_offset(sent, rng), rng), rng)
    values = np.concatenate([received.real, received.imag], axis=1)
    values += rng.normal(0, 10 ** (-snr / 20) * np.sqrt(0.5), values.shape)
    return values.astype(np.float32)


def _windows(streams: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Windows at random places, shape ``(count, length)``, of transmissions of shape ``(s, STREAM)`` scaled to unit mean power."""
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
    """Each value held for some samples, low-passed below ``cutoff`` of Nyquist, as transmissions of shape ``(s, STREAM)``."""
    smooth: np.ndarray = sp.oaconvolve(
        np.repeat(values, repeats), sp.firwin(num_taps, cutoff), mode="valid"
    )
    return smooth[: len(smooth) // STREAM * STREAM].reshape(-1, STREAM)


def _symbols(
    count: int, length: int, rng: np.random.Generator, levels: tuple[float, ...], symbol_length: int
) -> np.ndarray:
    """Random levels, each held for ``symbol_length`` samples; the filter passes up to half the symbol rate."""
    num_symbols = (_num_streams(count) * STREAM + SYMBOL_FILTER_TAPS) // symbol_length + 1
    streams = _filtered(
        rng.choice(levels, num_symbols), symbol_length, SYMBOL_FILTER_TAPS, 1 / symbol_length
    )
    return _windows(streams, count, length, rng)


def _amplitude_modulation(
    count: int, length: int, rng: np.random.Generator, single_sideband: bool
) -> np.ndarray:
    """Low-pass noise as the message: around a carrier in both sidebands, or in the upper one without a carrier."""
    noise = rng.standard_normal(_num_streams(count) * STREAM + NOISE_FILTER_TAPS - 1)
    message = _filtered(noise, 1, NOISE_FILTER_TAPS, NOISE_BANDWIDTH)
    message /= np.abs(message).max(axis=1, keepdims=True)
    return _windows(
        sp.hilbert(message) if single_sideband else 1 + MODULATION_DEPTH * message,
        count,
        length,
        rng,
    )


def _pulses(
    count: int,
    length: int,
    rng: np.random.Generator,
    widths: tuple[int, int],
    intervals: tuple[int, int],
    stagger: float = 0.0,
) -> np.ndarray:
    """Pulses, each of its own width, interval to the next, carrier offset and phase; ranges are of samples, without their ends."""
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
    """A triangular sweep of the frequency between plus and minus the deviation; period and deviation differ by snapshot."""
    period, deviation = (
        rng.uniform(*FMCW_PERIODS, (count, 1)),
        rng.uniform(*FMCW_DEVIATIONS, (count, 1)),
    )
    place = (np.arange(length) / period + rng.random((count, 1))) % 1
    cycles = np.cumsum(deviation * (4 * np.abs(place - 0.5) - 1), axis=1) + rng.random((count, 1))
    return _phasor(cycles)


WAVEFORMS: Mapping[tuple[str, str], Waveform] = MappingProxyType(
    {
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
)
"""Every (modulation, signal) pair of RadComDynamic, to a function ``(count, length, rng) -> (count, length)`` of mean power 1."""

PAIRS = tuple(WAVEFORMS)
MODULATIONS = tuple(dict.fromkeys(modulation for modulation, _ in PAIRS))
SIGNALS = tuple(dict.fromkeys(signal for _, signal in PAIRS))


def _random_walk(limit: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Offsets in Hz: a walk that is clipped at plus and minus ``limit``, started from its stationary (uniform) distribution."""
    start = rng.uniform(-limit, limit, (shape[0], 1))
    walk: np.ndarray = np.clip(
        start + np.cumsum(rng.normal(0, WALK_STD, shape), axis=1), -limit, limit
    )
    return walk


def _rate_offset(sent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a receiver with another clock samples; its clock is aligned at the start, as GNU Radio's is.

    The clocks drift apart by at most 0.0008 samples in a snapshot, so linear interpolation is exact enough.
    """
    drift = (
        np.cumsum(_random_walk(MAX_RATE_OFFSET, (len(sent), sent.shape[1] - 1), rng), axis=1)
        / SAMPLE_RATE
    )
    received: np.ndarray = sent[:, :-1] + drift * np.diff(sent, axis=1)
    return received


def _carrier_offset(sent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cycles = (
        np.cumsum(_random_walk(MAX_CARRIER_OFFSET, (len(sent), sent.shape[1]), rng), axis=1)
        / SAMPLE_RATE
    )
    received: np.ndarray = sent * _phasor(cycles)
    return received


def _fading(count: int, rng: np.random.Generator) -> np.ndarray:
    """The complex gain of each path, shape ``(count, paths)``, of mean power 1: the first is Rician, the others Rayleigh.

    A gain is held for the whole snapshot: a Doppler shift of at most 2 Hz turns it by at most 0.0002 rad in 12.8 µs.
    """
    phases = rng.uniform(-np.pi, np.pi, (2, count, len(DELAYS), NUM_SINUSOIDS))
    gains: np.ndarray = (
        np.cos(phases[0]).sum(axis=-1) + 1j * np.sin(phases[1]).sum(axis=-1)
    ) / np.sqrt(NUM_SINUSOIDS)
    line_of_sight = np.exp(1j * rng.uniform(-np.pi, np.pi, count))
    gains[:, 0] = (gains[:, 0] + np.sqrt(RICIAN_K) * line_of_sight) / np.sqrt(RICIAN_K + 1)
    return gains


def _multipath(sent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sum the paths, each delayed by a truncated sinc interpolation: ``(n, 128 + NUM_TAPS - 1)`` to ``(n, 128)``."""
    interpolation = MAGNITUDES[:, None] * np.sinc(np.arange(NUM_TAPS) - DELAYS[:, None])
    taps = _fading(len(sent), rng) @ interpolation
    windows = sliding_window_view(sent, NUM_TAPS, axis=1)
    received: np.ndarray = np.einsum("nsk,nk->ns", windows, taps[:, ::-1])
    return received
