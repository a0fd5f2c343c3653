"""All randomness, drawn from (seed, round, client id, purpose) and from nothing else.

So a run is the same on every engine, after a resume, and whichever clients took part in which order;
and the global generators of NumPy and torch are left as they were.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from numpy.random.bit_generator import ISeedSequence

__all__ = ["derive_seed", "generator", "seeded_torch", "uniform"]

CPU = torch.device("cpu")
GLOBAL_GENERATOR = threading.RLock()


def derive_seed(seed: int, round: int, client: str, purpose: str) -> int:
    """A 63-bit seed that any change to any argument changes.

    >>> derive_seed(0, 1, "smile", "head batches") == derive_seed(0, 1, "smile", "head batches")
    True
    >>> derive_seed(0, 1, "smile", "head batches") == derive_seed(0, 2, "smile", "head batches")
    False
    """
    return int.from_bytes(_hash(8, seed, round, client, purpose), "little") >> 1


def generator(seed: int, round: int, client: str, purpose: str) -> np.random.Generator:
    """A NumPy generator of its own for this purpose."""
    return np.random.default_rng(derive_seed(seed, round, client, purpose))


def uniform(shape: tuple[int, ...], seed: int, round: int, client: str, purpose: str) -> np.ndarray:
    """Uniform random numbers from 0 to 1, for what thousands of clients draw in every round: seeded in a fifth of the time."""
    words = _Words(_hash(32, seed, round, client, purpose))
    return np.random.Generator(np.random.PCG64(words)).random(shape)  # type: ignore[arg-type]  # NumPy's types know SeedSequence only


class _Words(ISeedSequence):
    """Seeds a bit generator with a hash, which needs none of the mixing that a ``SeedSequence`` does."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> np.ndarray:
        """So many words of the hash, the same on every machine."""
        return np.frombuffer(self.digest, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)


def _hash(size: int, *parts: int | str) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=size).digest()


@contextmanager
def seeded_torch(seed: int, round: int, client: str, purpose: str, device: torch.device = CPU) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put them back after: for what reads no other ones.

    That is the initialisation of modules, and dropout. With a GPU as ``device`` its generator is seeded too. One thread at a time.
    """
    with GLOBAL_GENERATOR, torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type="cuda"):
        derived = derive_seed(seed, round, client, purpose)
        torch.default_generator.manual_seed(derived)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derived)
        yield
