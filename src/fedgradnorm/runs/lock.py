"""One process per run's folder: a lock of the operating system."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

from filelock import FileLock, Timeout

from fedgradnorm.errors import RunError
from fedgradnorm.runs.entries import not_writable, writing

LOCK_TIMEOUT = 5.0
"""Seconds that a run waits for another one in its folder to end, such as one just killed."""

HELD: dict[Path, int] = {}
"""The folders that runs of this process write to, with links resolved, and the thread of each."""


@contextmanager
def alone_in(folder: Path, timeout: float | None = None, hint: str = "") -> Iterator[None]:
    """Lock a run's folder. A second run waits a little, and is then refused.

    The lock is an empty file beside the folder. The operating system releases it when the process
    ends, however it ends. Links to the folder are resolved first. A second run in the same thread,
    such as one that a callback starts, is refused at once.

    Args:
        folder: the run's folder. It need not exist yet.
        timeout: seconds to wait; None: `LOCK_TIMEOUT`.
        hint: what to do when the disk can be written again.

    Raises:
        RunError: another run writes to the folder, or no file can be written beside it.
    """
    hint = hint and f"when it can be: {hint}"
    real = _with_lock_file(folder, hint)
    if HELD.get(real) == get_ident():
        text = f"run folder {folder}: a run of this program is writing to it"
        raise RunError(f"{text}: expected another run to begin after its end")
    lock = FileLock(lock_of(real))
    with writing(folder, hint):
        try:
            lock.acquire(timeout=LOCK_TIMEOUT if timeout is None else timeout, poll_interval=0.1)
        except Timeout:
            what_to_do = "wait for it, or stop it (with Flower: `flwr stop`)"
            text = f"run folder {folder}: another run is writing to it: {what_to_do}"
            raise RunError(text) from None
    HELD[real] = get_ident()
    try:
        yield
    finally:
        del HELD[real]
        lock.release()


def _with_lock_file(folder: Path, hint: str) -> Path:
    """Resolve the links to a folder and make its lock file: FileLock would wait if it cannot."""
    try:
        real = folder.resolve()
        if real.parent.exists() and not real.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        real.parent.mkdir(parents=True, exist_ok=True)
        lock_of(real).touch()
    except (OSError, ValueError, RuntimeError) as error:  # an odd path, or a circle of links
        raise not_writable(folder, error, hint) from error
    return real


def being_written(folder: Path) -> bool | None:
    """Whether a process of this machine writes a run to a folder.

    None if no lock can tell: for a folder that was copied, and on Windows.
    """
    try:
        import fcntl  # not on Windows

        real = folder.resolve()
        if real in HELD:
            return True
        lock = os.open(lock_of(real), os.O_RDONLY)  # a reader of the folder need not write to it
    except (ImportError, OSError, RuntimeError):
        return None
    try:
        # a shared lock, so that two processes that ask at once do not see each other
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(lock)
    return False


def lock_of(real: Path) -> Path:
    """The lock file of a run's folder whose links are resolved. It remains after the run."""
    return real.with_name(f".{real.name}.lock")
