"""A run's folder: made, replaced and checked, and its rounds undone; its files are in `entries`."""

import shutil
from pathlib import Path

from fedgradnorm.atomic import sync_folder, write_atomically
from fedgradnorm.config import RunConfig
from fedgradnorm.errors import RunError
from fedgradnorm.runs.checkpoint import later_than
from fedgradnorm.runs.entries import CHECKPOINTS, ENTRIES, RESULTS, UNDONE, not_writable, writing
from fedgradnorm.runs.settings import as_toml, load_config_of
from fedgradnorm.runs.writer import end_of_round


def create_run(folder: Path, config: RunConfig, *, overwrite: bool = False) -> None:
    """Make a run's folder with its settings, or leave everything as it is.

    A run that is replaced is kept at `replaced_by` until `remove_replaced` or `put_back` is called.

    Args:
        folder: the run's folder.
        config: the resolved settings.
        overwrite: whether a run in this folder is replaced.

    Raises:
        RunError: the folder exists and `check_free` refuses it, or it cannot be written.
        ConfigError: a setting cannot be written as TOML.
    """
    check_free(folder, overwrite=overwrite)
    content = as_toml(config)
    aside, old = folder.with_name(f".{folder.name}.starting"), replaced_by(folder)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        if old.exists() and folder.exists():  # the last run was killed in its first round
            shutil.rmtree(old if _has_rounds(folder) else folder)
        (aside / "models" / "heads").mkdir(parents=True)
        write_atomically(aside / "config.toml", content)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync_folder(folder.parent)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise not_writable(folder, error) from error


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise RunError if a run may not be written to this folder. Nothing is changed.

    Only a folder that holds a run, and nothing else, is ever replaced.
    """
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"run folder {str(folder)[:100]!r}: such a folder cannot exist"
        raise RunError(f"{text}: {reason}") from error
    if names is not None and folder.samefile("."):
        raise RunError(f"run folder {folder} is the current folder: expected one of its own")
    if names is None or folder.is_symlink():
        text = "exists, and is a link or no folder: choose another run.dir"
        raise RunError(f"run folder {folder} {text}")
    if not overwrite:
        how = "--overwrite on the command line, overwrite=True in Python"
        raise RunError(f"run folder {folder} exists: choose another one, or replace it: {how}")
    names = {name for name in names if not name.endswith(".writing")}
    if not names:
        return
    if foreign := sorted(names - ENTRIES):
        why = f"it holds what no run writes, such as '{foreign[0]}'"
        raise RunError(f"{folder} is not overwritten: {why}")
    if not load_config_of(folder).versions:
        why = "it is no run, for its config.toml names no versions"
        raise RunError(f"{folder} is not overwritten: {why}")


def set_rounds_aside(folder: Path, round: int) -> Path | None:
    """Move what a run has of later rounds to a new folder ``undone/NUMBER``.

    These are lines, checkpoints, and the results of its end. The lines are copied; `RunWriter` cuts
    them off. Nothing is lost if the process is killed: what is not moved yet is where it was.

    Returns:
        The new folder; None if there is nothing of later rounds.

    Raises:
        RunError: the folder cannot be written, or its metrics.jsonl is damaged before the end of
            that round.
    """
    with writing(folder):
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(end_of_round(file, folder, round))
            lines = file.read()
        later = later_than(folder / CHECKPOINTS, round)
        if not lines and not later:
            return None
        names = [entry.name for entry in (folder / UNDONE).glob("*")]
        last = max((int(name) for name in names if name.isdecimal()), default=0)
        aside = folder / UNDONE / str(last + 1)
        (aside / CHECKPOINTS).mkdir(parents=True)
        write_atomically(aside / "metrics.jsonl", lines)
        # results first: as long as the later checkpoints are there, the run has not gone back
        for name in RESULTS:
            if (folder / name).is_file():
                (folder / name).rename(aside / Path(name).name)
        for path in later:  # newest first: the newest one left is always the one to resume from
            path.rename(aside / CHECKPOINTS / path.name)
        sync_folder(aside)
        sync_folder(folder / CHECKPOINTS)
    return aside


def replaced_by(folder: Path) -> Path:
    """Where a replaced run is kept until the new run has completed a round."""
    return folder.with_name(f".{folder.name}.replaced")


def remove_replaced(folder: Path) -> None:
    """Remove the replaced run, if there is one, as far as that is possible."""
    shutil.rmtree(replaced_by(folder), ignore_errors=True)


def put_back(folder: Path) -> None:
    """Move the replaced run back to its folder. Raises RunError if that cannot be written."""
    old = replaced_by(folder)
    with writing(folder, f"the run that was there is in {old}"):
        if folder.exists():
            shutil.rmtree(folder)
        old.rename(folder)
        sync_folder(folder.parent)


def _has_rounds(folder: Path) -> bool:
    """Whether metrics.jsonl has a complete line."""
    path = folder / "metrics.jsonl"
    return path.exists() and b"\n" in path.read_bytes()
