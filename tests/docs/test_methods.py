"""The guide to the methods: its toy method is one file that trains, and its table is complete."""

import re
from pathlib import Path

from fedgradnorm.registry import BUILT_INS
from fedgradnorm.runs.reader import Run
from tests.docs.test_docs import ROOT, blocks, call


def test_the_toy_method_of_the_guide_takes_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/methods.md", "python")
    (command,) = (
        line.split()
        for line in (ROOT / "docs/methods.md").read_text().splitlines()
        if line.startswith("fedgradnorm run ")
    )
    Path("slowest.py").write_text(code)
    assert command[:3] == ["fedgradnorm", "run", "configs/digits.toml"]
    call(
        monkeypatch,
        [
            "fedgradnorm",
            "run",
            str(ROOT / command[2]),
            *command[3:],
            "train.num_rounds=2",
            "run.dir=toy",
        ],
    )
    run = Run(Path("toy"))
    assert run.config.weighting.name == "slowest:Slowest"
    assert run.config.weighting.options == {"power": 2.0}
    last = {row["client"]: row for row in run.rows() if row["round"] == 2}
    squares = {client: row["inverse_training_rate"] ** 2 for client, row in last.items()}
    for client, row in last.items():
        assert abs(row["weight"] - len(last) * squares[client] / sum(squares.values())) < 1e-9


def test_the_guides_tables_name_every_weighting_once():
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/methods.md").read_text(), flags=re.M)
    assert sorted(named) == sorted(BUILT_INS["weighting"])
