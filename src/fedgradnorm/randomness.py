"""All randomness, drawn from (seed, round, client id, purpose) and from nothing else.

So a run is the same on every engine, after a resume, and whichever clients took part in which order;
and the global generators of NumPy and torch are left as they were.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "generator", "seeded_torch"]

CPU = torch.device("cpu")
GLOBAL_GENERATOR = threading.RLock()


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
