"""Small runs, and what tests ask of their folders."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedgradnorm import Federation
from fedgradnorm.runs.reader import Run
from tests.helpers import (
    batch_norm_encoder,
    dropout_encoder,
    small_encoder,
    small_federation,
    timeless,
)

ENCODERS = {"plain": small_encoder, "batch norm": batch_norm_encoder, "dropout": dropout_encoder}
ROUNDS = 8
QUICK = [
    f"federation.name={__name__}:make",
    f"train.num_rounds={ROUNDS}",
    "train.head_steps=2",
    "train.encoder_steps=2",
    "train.batch_size=8",
    "train.eval_every=2",
    "run.checkpoint_every=1",
]


def make(
    seed: int, encoder: str = "plain", buffers: Literal["local", "averaged"] = "local"
) -> Federation:
    """Three small clients."""
    del seed
    return small_federation(encoder=ENCODERS[encoder], buffers=buffers)


def after(*rounds: int) -> Callable[[], bool]:
    """A ``should_stop`` that says yes at these of the rounds that it sees."""
    seen = 0

    def should_stop() -> bool:
        nonlocal seen
        seen += 1
        return seen in rounds

    return should_stop


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path) -> int:
    """The whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def changed(folder: Path) -> Callable[[], bool]:
    """Whether anything has been made, renamed or removed in a folder since."""
    before = folder.stat().st_mtime_ns
    return lambda: folder.stat().st_mtime_ns != before


def outcome(folder: Path) -> dict[str, Any]:
    """What a run gave, less the time that it took."""
    summary: Mapping[str, Any] = Run(folder).summary()
    rows: Sequence[Mapping[str, Any]] = timeless(Run(folder).rows())
    return {
        "metrics": [json.dumps(row) for row in rows],
        "models": {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.glob("models/**/*.safetensors"))
        },
        "summary": {
            key: value for key, value in summary.items() if key not in ("seconds", "costs")
        },
    }
