"""The names of a run's files, and the errors of a folder that cannot be written.

::

    RUN/config.toml               the resolved settings, and the versions that ran
    RUN/metrics.jsonl             one line per round and client
    RUN/members.json              who trains what, on which data
    RUN/summary.json              by task and client: first, best and last metric, rounds to targets
    RUN/models/encoder.safetensors, RUN/models/heads/CLIENT.safetensors
    RUN/checkpoints/              the last rounds that the run can be resumed from
    RUN/tensorboard/              the same figures as TensorBoard events
    RUN/profile/                  with --profile, a trace of two rounds
    RUN/undone/1/, 2/, ...        lines, checkpoints and results of rounds that were undone
    RUN/report.html               the same figures as one page
    RUN/status.json               with clients on other machines: progress, and who is connected
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedgradnorm.config import RunConfig
from fedgradnorm.errors import RunError

CHECKPOINTS, PROFILE, UNDONE, STATUS = "checkpoints", "profile", "undone", "status.json"

ENTRIES = {
    *("config.toml", "members.json", "metrics.jsonl", "summary.json", STATUS),
    *("models", CHECKPOINTS, "tensorboard", PROFILE, UNDONE, "report.html"),
}
"""Everything that a run's folder may hold."""

RESULTS = ("summary.json", "report.html", "models/encoder.safetensors")
"""The files that are written when a run ends."""


def how_to_resume(folder: Path, config: RunConfig) -> str:
    """How to resume a run: the command line, or, with remote clients, its Flower app."""
    remote = config.run.experiment is not None
    return "start its Flower app again" if remote else f"fedgradnorm resume {folder}"


def not_writable(folder: Path, error: Exception, hint: str = "") -> RunError:
    """The error for a run's folder that cannot be written; the hint says how to resume the run."""
    reason = getattr(error, "strerror", None) or error
    text = f"run folder {str(folder)!r:.300}: cannot be written: {reason}"
    return RunError(f"{text}; {hint}" if hint else text)


@contextmanager
def writing(folder: Path, hint: str = "") -> Iterator[None]:
    """Convert errors of the file system in this block into the RunError of `not_writable`."""
    try:
        yield
    except OSError as error:
        raise not_writable(folder, error, hint) from error
