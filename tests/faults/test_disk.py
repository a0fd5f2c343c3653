"""A disk that is full or read-only: an error of a line or two, nothing lost, and the run goes on when there is room."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.runs.checkpoint import load_newest
from fedgradnorm.runs.reader import Run
from tests.launcher import launcher
from tests.runs import lines, outcome

pytestmark = pytest.mark.xdist_group("disk")  # they share an undisturbed run

ROUNDS, EVERY, CLIENTS = 45, 5, 4
CONFIG = f"""
federation = {{ name = "digits" }}
engine = {{ name = "reference" }}
[train]
num_rounds = {ROUNDS}
head_steps = 1
encoder_steps = 1
encoder_lr = 0.01
head_momentum = 0.5
batch_size = 8
loss_examples = 64
eval_every = 20
[run]
checkpoint_every = {EVERY}
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "config.toml").write_text(CONFIG)
    run(load_config(folder / "config.toml", [f"run.dir={folder / 'run'}"]))
    return outcome(folder / "run")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own of this size, or the test is skipped."""
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode != 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_error(code: int, error: str, folder: Path, *, resumable: bool) -> None:
    """Exit code 2, and a line or two that name the folder and, for a run that is there, how to go on."""
    assert code == 2, error
    assert error.startswith("error: "), error
    assert error.count("\n") <= 2, error
    assert str(folder) in error
    assert f"fedgradnorm resume {folder}" in error or not resumable, error


def newest_round(folder: Path) -> int:
    """The round of the newest checkpoint; none of them is damaged."""
    checkpoint, _, faults = load_newest(folder / "checkpoints")
    assert not faults
    return 0 if checkpoint is None else checkpoint.server.round


def test_a_full_disk(tmp_path, config, undisturbed):
    with disk(tmp_path / "small", "256k") as small:
        folder = small / "run"
        code, _, error = launcher().call(tmp_path, "run", config, f"run.dir={folder}")
        check_error(code, error, folder, resumable=True)
        assert "No space left on device" in error
        done = newest_round(folder)
        assert 0 < done < ROUNDS
        assert done % EVERY == 0
        assert lines(folder) >= done * CLIENTS

        code, _, error = launcher().call(tmp_path, "resume", folder)  # too soon
        check_error(code, error, folder, resumable=True)
        assert done <= newest_round(folder) < ROUNDS

        remount(small, "size=32m")
        code, _, error = launcher().call(tmp_path, "resume", folder)
        assert (code, error) == (0, "")
        assert outcome(folder) == undisturbed
        assert not list(folder.rglob("*.writing"))


@pytest.mark.parametrize(
    ("largest", "what"),
    [
        (20_000, "checkpoints"),
        (70_000, "metrics.jsonl"),
        (1_000_000, "report.html"),
    ],
)
def test_a_file_that_cannot_grow(tmp_path, config, undisturbed, largest, what):
    folder = tmp_path / "run"
    code, _, error = launcher().call(
        tmp_path, "run", config, f"run.dir={folder}", largest_file=largest
    )
    check_error(code, error, folder, resumable=what != "report.html")
    assert "File too large" in error
    done = newest_round(folder)
    assert (
        done == 0
        if what == "checkpoints"
        else 0 < done < ROUNDS
        if what == "metrics.jsonl"
        else done == ROUNDS
    )
    if what == "report.html":
        assert outcome(folder) == undisturbed
    else:
        assert not (folder / "summary.json").exists()
    assert not list(folder.rglob("*.writing"))

    code, _, error = launcher().call(tmp_path, "resume", folder)
    assert (code, error) == (0, "")
    assert outcome(folder) == undisturbed
    assert (folder / "report.html").stat().st_size > 1_000_000


def test_a_run_that_cannot_even_begin_leaves_nothing(tmp_path, config):
    folder = tmp_path / "runs" / "run"
    code, _, error = launcher().call(tmp_path, "run", config, f"run.dir={folder}", largest_file=300)
    check_error(code, error, folder, resumable=False)
    assert not folder.exists()
    code, _, error = launcher().call(
        tmp_path, "run", config, f"run.dir={folder}", "train.num_rounds=1"
    )
    assert (code, error) == (0, "")


def test_a_read_only_disk(tmp_path, config, undisturbed):
    with disk(tmp_path / "small", "32m") as small:
        folder = small / "run"
        code, _, error = launcher().call(
            tmp_path, "run", config, f"run.dir={folder}", largest_file=70_000
        )
        assert code == 2, error
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        remount(small, "ro")

        code, _, error = launcher().call(tmp_path, "resume", folder)
        check_error(code, error, folder, resumable=True)
        assert "Read-only file system" in error
        for other, *words in ((small / "new",), (folder, "--overwrite")):
            code, _, error = launcher().call(tmp_path, "run", config, f"run.dir={other}", *words)
            check_error(code, error, other, resumable=False)
            assert "Read-only file system" in error
        after = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
        assert after == before | {small / ".run.lock": b""}

        remount(small, "rw")
        code, _, error = launcher().call(tmp_path, "resume", folder)
        assert (code, error) == (0, "")
        assert outcome(folder) == undisturbed


@pytest.mark.parametrize("below", ["/dev/null", "a file"])
def test_a_folder_that_cannot_be_made(tmp_path, config, below):
    file = Path(below) if below.startswith("/") else tmp_path / below
    if not file.exists():
        file.write_text("")
    folder = file / "run"
    code, _, error = launcher().call(tmp_path, "run", config, f"run.dir={folder}")
    check_error(code, error, folder, resumable=False)
    assert "Not a directory" in error
    code, _, error = launcher().call(tmp_path, "resume", folder)
    check_error(code, error, folder, resumable=False)


def test_a_full_disk_spoils_no_older_run(tmp_path, config):
    folder = tmp_path / "run"
    run(load_config(config, [f"run.dir={folder}", "train.num_rounds=2"]))
    before = outcome(folder)
    code, _, error = launcher().call(
        tmp_path, "run", config, f"run.dir={folder}", "--overwrite", largest_file=300
    )
    check_error(code, error, folder, resumable=False)
    assert outcome(folder) == before
    assert Run(folder).config.train.num_rounds == 2
