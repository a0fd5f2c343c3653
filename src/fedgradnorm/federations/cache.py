"""Arrays that take long to make, kept in a cache folder under a key of everything they depend on."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

__all__ = ["cache_folder", "cached_arrays", "file_hash"]


def cache_folder() -> Path:
    """``$FEDGRADNORM_CACHE``, or ``fedgradnorm`` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(
        os.environ.get("FEDGRADNORM_CACHE") or Path(user_cache) / "fedgradnorm"
    ).expanduser()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_arrays(
    name: str, key: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What ``make()`` gives, read back from the cache where it was made before.

    Args:
        name: what the arrays are; the start of the file's name.
        key: everything that they depend on, as JSON values. A changed value is another file.
        make: makes the arrays. A damaged cache file counts as absent; a folder that cannot be written is done without.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    path = cache_folder() / f"{name}-{digest}.safetensors"
    with suppress(SafetensorError, OSError):
        return load_file(path)
    arrays = {label: np.ascontiguousarray(array) for label, array in make().items()}
    with suppress(
        OSError
    ):  # without a cache folder that can be written, they are made anew every time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="writing-") as folder:
            aside = Path(folder) / path.name
            save_file(arrays, aside)
            aside.replace(path)
    return arrays
