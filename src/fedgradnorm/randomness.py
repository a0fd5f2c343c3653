"""All randomness, which depends on (seed, round, client id, purpose) alone.

So a run is the same on every engine, after a resume, and for every order of the clients. The global
generators of Python, NumPy and torch are left as they were.
"""

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.random.bit_generator import ISeedSequence

CPU = torch.device("cpu")
GLOBAL_GENERATOR = threading.RLock()


def derive_seed(seed: int, round: int, client: str, purpose: str) -> int:
    """A 63-bit seed that depends on every argument.

    >>> derive_seed(0, 1, "smile", "head batches") == derive_seed(0, 1, "smile", "head batches")
    True
    >>> derive_seed(0, 1, "smile", "head batches") == derive_seed(0, 2, "smile", "head batches")
    False
    """
    return int.from_bytes(_hash(8, seed, round, client, purpose), "little") >> 1


def generator(seed: int, round: int, client: str, purpose: str) -> np.random.Generator:
    """A new NumPy generator for this purpose."""
    return np.random.default_rng(derive_seed(seed, round, client, purpose))


def quick_generator(seed: int, round: int, client: str, purpose: str) -> np.random.Generator:
    """Like `generator`, but seeded in a fifth of the time, and with other numbers."""
    words = _Words(_hash(32, seed, round, client, purpose))
    return np.random.Generator(np.random.PCG64(words))  # type: ignore[arg-type]  # not in the stub


class _Words(ISeedSequence):
    """Seeds a bit generator with a hash, without the mixing of a ``SeedSequence``."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> np.ndarray:
        """The first words of the hash, the same on every machine."""
        return np.frombuffer(self.digest, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)


def _hash(size: int, *parts: int | str) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=size).digest()


class Generators(NamedTuple):
    """The states of the global generators that users' code may draw from.

    Two of them are equal if nothing was drawn in between.
    """

    of_python: tuple[Any, ...]
    of_numpy: tuple[Any, ...]
    of_torch: bytes
    of_cuda: bytes

    @classmethod
    def now(cls, device: torch.device = CPU) -> "Generators":
        """The states of the generators of Python, NumPy and torch, and of ``device`` if a GPU."""
        name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # users draw from it
        cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
        numpy = name, np.asarray(keys).tobytes(), *rest
        return cls(random.getstate(), numpy, torch.get_rng_state().numpy().tobytes(), cuda)

    def put_back(self, device: torch.device = CPU) -> None:
        """Set the generators to these states."""
        name, keys, *rest = self.of_numpy
        random.setstate(self.of_python)
        np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(torch.frombuffer(bytearray(self.of_torch), dtype=torch.uint8))
        if self.of_cuda:
            state = torch.frombuffer(bytearray(self.of_cuda), dtype=torch.uint8)
            torch.cuda.set_rng_state(state, device)


@contextmanager
def seeded(
    seed: int, round: int, client: str, purpose: str, device: torch.device = CPU
) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch inside the block, then restore them.

    It belongs around all code of the user: data sets, models, losses, metrics, factories. If
    ``device`` is a GPU, its generator is seeded too. Only one thread at a time can be inside.
    """
    with GLOBAL_GENERATOR:
        before = Generators.now(device)
        digest = _hash(32, seed, round, client, purpose)
        try:
            random.seed(digest)
            np.random.seed(np.frombuffer(digest, "<u4"))  # noqa: NPY002
            torch.default_generator.manual_seed(derive_seed(seed, round, client, purpose))
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(derive_seed(seed, round, client, purpose))
            yield
        finally:
            before.put_back(device)
