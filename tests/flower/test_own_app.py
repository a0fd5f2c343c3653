"""The example of a user's own app: at most ten lines more, and it trains."""

import importlib
import json
import subprocess
import sys
import tomllib
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from fedgradnorm.report import write_report
from fedgradnorm.runs.reader import Run
from tests.flower.nodes import Wire

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower-own-app"


def sources(folder):
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".toml")
    }


def test_ten_lines_change_at_most():
    before, after = sources(EXAMPLE / "before"), sources(EXAMPLE / "after")
    assert before.keys() == after.keys()
    changed = {}
    for name, path in before.items():
        one, other = path.read_text().splitlines(), after[name].read_text().splitlines()
        steps = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
        changed[name] = sum(max(b - a, d - c) for kind, a, b, c, d in steps if kind != "equal")
    assert changed["quickstart/task.py"] == 0
    assert changed["quickstart/client_app.py"] + changed["quickstart/server_app.py"] > 2
    assert sum(changed.values()) <= 10


@pytest.fixture
def app(monkeypatch):
    """Give the apps of a folder, freshly imported."""

    def app(folder):
        for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(EXAMPLE / folder))
        config = tomllib.loads((EXAMPLE / folder / "pyproject.toml").read_text())["tool"]["flwr"][
            "app"
        ]
        parts = []
        for part in ("clientapp", "serverapp"):
            module, _, name = config["components"][part].partition(":")
            parts.append(getattr(importlib.import_module(module), name))
        return *parts, config["config"]

    yield app
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        monkeypatch.delitem(sys.modules, name)


def run(client, server, config, folder, rounds):
    wire = Wire()
    config |= {"num-server-rounds": rounds, "run-dir": str(folder / "run")}
    for place in range(3):
        wire.join(
            2 + place,
            client,
            **{
                "partition-id": place,
                "num-partitions": 3,
                "state-dir": str(folder / "states" / str(place)),
            },
        )
        wire.contexts[2 + place].run_config = config
    server(wire, Context(1, 1, {}, RecordDict(), config))
    return wire


def test_after_trains_with_heads_of_their_own(app, tmp_path, capsys):
    wire = run(*app("after"), tmp_path, 20)
    rows = Run(tmp_path / "run").rows()
    for client in ("client-0", "client-1", "client-2"):
        ratios = [row["inverse_training_rate"] for row in rows if row["client"] == client]
        assert ratios[0] == 1
        assert ratios[-1] < 0.9
    assert not any(row["dropped"] for row in rows)
    assert "Aggregated ClientApp-side Train Metrics" in capsys.readouterr().out
    files = [
        next((tmp_path / "states" / str(place)).rglob("round-00000020.safetensors"))
        for place in range(3)
    ]
    heads = [load_file(path)["head/fc2.weight"] for path in files]
    for place, head in enumerate(heads):
        assert (head - heads[place - 1]).abs().max() > 0.01
        assert not any(head.numpy().tobytes() in sent for sent in wire.sent)
    assert not any(
        "fc2" in name
        for one in wire.messages
        for name in one.content.array_records.get("arrays", {})
    )
    write_report([Run(tmp_path / "run")], tmp_path / "report.html")


def test_before_is_a_working_app_that_shares_its_heads(app, tmp_path, monkeypatch, capsys):
    for name in (
        "_task_id",
        "_run_id",
        "_node_id",
    ):  # as in Flower's own process, for its own strategy
        monkeypatch.setattr(TaskIdentity, name, 1)
    wire = run(*app("before"), tmp_path, 2)
    assert "Aggregated ClientApp-side Train Metrics" in capsys.readouterr().out
    assert any("fc2.weight" in one.content.array_records.get("arrays", {}) for one in wire.messages)


def test_the_readmes_command(tmp_path):
    process = subprocess.run(
        [sys.executable, EXAMPLE / "run_local.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["rounds"] == 20
    assert all(task["loss_ratio"] < 0.9 for task in summary["tasks"].values())
    assert len(list((tmp_path / "states").glob("*/client-*"))) == 3
    assert str(EXAMPLE) not in process.stderr
