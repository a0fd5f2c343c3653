"""All randomness, drawn from (seed, round, client id, purpose) and from nothing else.

So a run is the same on every engine, after a resume, and whichever clients took part in which order;
and the global generators of NumPy and torch are left as they were.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "generator", "seeded_torch"]


def derive_seed(seed: int, round: int, client: str, purpose: str) -> int:
    """A 63-bit seed that any change to any argument changes.

    >>> derive_seed(0, 1, "smile", "head batches") == derive_seed(0, 1, "smile", "head batches")
    True
    >>> derive_seed(0, 1, "smile", "head batches") == derive_seed(0, 2, "smile", "head batches")
    False
    """
    key = "\0".join((str(seed), str(round), client, purpose)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def generator(seed: int, round: int, client: str, purpose: str) -> np.random.Generator:
    """A NumPy generator of its own for this purpose."""
    return np.random.default_rng(derive_seed(seed, round, client, purpose))


@contextmanager
def seeded_torch(seed: int, round: int, client: str, purpose: str) -> Iterator[None]:
    """Seed torch's global generator inside the block, and put it back after: for what reads no other one.

    That is the initialisation of modules, and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, round, client, purpose))
        yield
