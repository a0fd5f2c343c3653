"""Arrays that take long to make, kept in a cache folder under a key of all that they depend on."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def cache_folder() -> Path:
    """``$FEDGRADNORM_CACHE``, or ``fedgradnorm`` in the user's cache folder."""
    folder = os.environ.get("FEDGRADNORM_CACHE")
    return Path(folder or user_cache_path("fedgradnorm", appauthor=False)).expanduser()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_arrays(
    name: str, key: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of ``make()``, from the cache if they were made before.

    A damaged cache file counts as absent. If the cache folder cannot be written, the arrays are
    made anew every time.

    Args:
        name: what the arrays are; the start of the file's name.
        key: everything that they depend on, as JSON values. Another value means another file.
        make: makes the arrays.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    path = cache_folder() / f"{name}-{digest}.safetensors"
    with suppress(SafetensorError, OSError):
        return load_file(path)
    arrays = {label: np.ascontiguousarray(array) for label, array in make().items()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="writing-") as folder:
            aside = Path(folder) / path.name
            save_file(arrays, aside)
            aside.replace(path)
    return arrays
