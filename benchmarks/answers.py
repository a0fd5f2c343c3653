"""How fast the command line answers, against `python -c "import torch"`.

    python -m benchmarks.answers --turns 9

Prints the median wall time of each command and its ratio to that of importing torch. All commands
take turns, so that they meet the same noise. Seconds differ between machines; the ratios differ
little.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

TORCH = "import torch"
COMMANDS = {
    TORCH: ["-c", TORCH],
    "an empty program": ["-c", ""],
    "import fedgradnorm": ["-c", "import fedgradnorm"],
    "--help": ["-m", "fedgradnorm", "--help"],
    "--version": ["-m", "fedgradnorm", "--version"],
    "list --help": ["-m", "fedgradnorm", "list", "--help"],
    "run --help": ["-m", "fedgradnorm", "run", "--help"],
    "an unknown key": ["-m", "fedgradnorm", "run", "empty.toml", "train.round=1"],
    "an unknown name": ["-m", "fedgradnorm", "run", "empty.toml", "weighting.name=equl"],
    "a wrong option": ["-m", "fedgradnorm", "run", "empty.toml", "weighting.gama=1"],
    "list": ["-m", "fedgradnorm", "list"],
}


def seconds(words: list[str], folder: str) -> float:
    """The wall time of a new Python process with these arguments."""
    begin = perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=False)
    return perf_counter() - begin


def main() -> None:
    """Measure all commands in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9, help="how often each command is measured")
    turns = parser.parse_args().turns
    with TemporaryDirectory() as folder:
        Path(folder, "empty.toml").touch()
        for words in COMMANDS.values():  # fills the caches of files
            seconds(words, folder)
        taken = [
            {name: seconds(words, folder) for name, words in COMMANDS.items()} for _ in range(turns)
        ]
    medians = {name: median(turn[name] for turn in taken) for name in COMMANDS}
    for name, value in medians.items():
        print(f"{name:20} {value:6.3f} s  {value / medians[TORCH]:5.2f} of importing torch")


if __name__ == "__main__":
    main()
