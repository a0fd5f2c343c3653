"""Flower's own processes on this machine, with TLS and authenticated nodes, from a folder that `flower init` wrote."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.report import write_report
from tests.deployment import lazy_digits, misbehaving
from tests.deployment.processes import PATIENCE, free_ports, wait_until

pytestmark = pytest.mark.deployment

FIGURES = (
    "loss",
    "initial_loss",
    "inverse_training_rate",
    "grad_norm",
    "weight",
    "target",
    "test_loss",
    "metric",
)
DIGITS = (
    "federation.name=lazy_digits:make",
    "train.num_rounds=3",
    "train.eval_every=9",
    "train.head_steps=3",
    "train.encoder_steps=3",
)


def in_process(deployment, engine, *settings):
    """What an engine in this process gives with a deployment's settings."""
    config = load_config(
        deployment.folder / "app/fedgradnorm_app/federation.toml",
        [f"engine.name={engine}", *settings],
    )
    return run(config)


def assert_same(run, result):
    """A run across processes and one in this process are the same: every figure, and the encoder."""
    rows = run.rows()
    assert [(row["round"], row["client"]) for row in rows] == [
        (row["round"], row["client"]) for row in result.rows
    ]
    for found, expected in zip(rows, result.rows, strict=True):
        for key in FIGURES:
            assert found[key] == (
                None if expected[key] is None else pytest.approx(expected[key], rel=1e-5, abs=1e-7)
            ), (key, found)
    encoder = result.encoder().state_dict()
    saved = run.tensors("encoder.safetensors")
    assert saved.keys() == encoder.keys()
    for name, value in encoder.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)


def assert_heads_are_at_home(deployment, run):
    """Every client has its head after the last round in its own folder, and the server has none."""
    assert not list((run.folder / "models" / "heads").iterdir())
    for client in deployment.clients:
        newest = max((deployment.folder / "nodes" / client / "state").rglob("round-*.safetensors"))
        assert (newest.name, newest.parent.name) == (
            f"round-{deployment.round():08}.safetensors",
            client,
        )


def own_federation(module, monkeypatch):
    """Let this process find a module with a federation, as the deployed app does."""
    monkeypatch.syspath_prepend(str(Path(module.__file__).parent))
    return module.__file__


def test_a_run_across_processes_gives_the_same_numbers_through_kills_and_lost_states(
    deploy, forked_apps, monkeypatch
):
    module = own_federation(lazy_digits, monkeypatch)
    deployment = deploy("digits", *DIGITS)
    shutil.copy(module, deployment.folder / "app")
    deployment.set("nodes/parity/node.env", "LOST_STATE", "newest")
    deployment.fork_apps(forked_apps)
    local = deployment.start("local", "local.py")
    wait_until(
        lambda: "ready" in deployment.log("local") or local.poll() is not None, "local.py is ready"
    )
    check_a_killed_superlink(deployment)
    check_a_lost_state(deployment)
    deployment.kill("superlink")
    local.send_signal(signal.SIGINT)
    local.wait(timeout=PATIENCE)
    assert not deployment.left_over()


def check_a_killed_superlink(deployment):
    """A run whose SuperLink is killed and started again is the run of one process."""
    first = deployment.start_run()
    wait_until(lambda: deployment.round() >= 1 or first.poll() is not None, "a round")
    deployment.kill_superlink_of("local")
    deployment.kill("run")
    done = (
        deployment.saved_round()
    )  # the SuperLink may have ended between a round's lines and its checkpoint
    before = [row for row in deployment.run.rows() if row["round"] <= done]
    assert 1 <= done < 3
    deployment.start_superlink()
    run = deployment.finish(deployment.start_run())
    assert f"resuming after round {done} of 3" in deployment.log("run")
    assert [row for row in run.rows() if row["round"] <= done] == before
    assert_same(run, in_process(deployment, "reference"))
    assert_same(run, in_process(deployment, "flower-local"))
    assert all(row["dropped"] is None for row in run.rows())
    assert write_report([run], deployment.folder / "report.html").stat().st_size > 1000
    assert_heads_are_at_home(deployment, run)


def check_a_lost_state(deployment):
    """The run goes back to a round of which a client has lost its state and all before it."""
    before = deployment.run.rows()
    states = (deployment.folder / "nodes/parity/state").rglob("round-*.safetensors")
    for path in sorted(states)[:-1]:
        path.unlink()
    rows = deployment.finish(deployment.start_run("--run-config", "start-round=3")).rows()
    log = deployment.log("run")
    assert "the rounds after round 2 are undone: their lines and checkpoints are in " in log
    lost = "client parity: its state of round 2 is lost: it trained with a fresh head and its F(0) "
    assert lost in log
    assert (deployment.run.folder / "undone/1/metrics.jsonl").exists()
    assert rows[:4] == before[:4]
    again = {row["client"]: row for row in rows[4:]}
    assert {id: row["dropped"] for id, row in again.items()} == {"class": None, "parity": None}
    assert any("is lost" in note for note in again["parity"]["notes"])
    of_before = {row["client"]: row for row in before[4:]}
    assert again["parity"]["initial_loss"] == of_before["parity"]["initial_loss"]
    assert again["class"]["loss"] == pytest.approx(of_before["class"]["loss"], rel=1e-5)


def test_faults_end_no_run_and_cost_no_more_than_their_rounds(
    deploy, forked_apps, tmp_path, monkeypatch
):
    notes = tmp_path / "notes"
    notes.mkdir()
    module = own_federation(misbehaving, monkeypatch)
    faults = (
        "federation.faults.a.2=raise",
        "federation.faults.b.2=spoil",
        "federation.faults.b.3=hang",
        "federation.faults.c.3=hang",
    )
    settings = (
        "federation.name=misbehaving:make",
        f"federation.folder={notes}",
        "train.num_rounds=4",
        "train.eval_every=9",
        "train.batch_size=8",
    )
    deployment = deploy("faults", *settings, *faults)
    shutil.copy(module, deployment.folder / "app")
    deployment.fork_apps(forked_apps, "b", "c")  # the server's and a's start as Flower starts them
    other = deploy("other", *settings)  # another deployment, with a CA and keys of its own
    strangers = {"nobody": "nobody", "double": "a", "unknown-ca": "c", "unregistered": "c"}
    for (name, client), port in zip(strangers.items(), free_ports(len(strangers)), strict=True):
        shutil.copytree(
            deployment.folder / "nodes/a",
            deployment.folder / "nodes" / name,
            ignore=shutil.ignore_patterns("client.key*", "state"),
        )
        deployment.set(f"nodes/{name}/node.env", "CLIENT", client)
        deployment.set(f"nodes/{name}/node.env", "PORT", str(port))
    shutil.copy(other.folder / "ca/ca.crt", deployment.folder / "nodes/unknown-ca/ca.crt")
    deployment.do("keys.py")
    deployment.start_superlink()
    deployment.do("server/register.sh", "a", "b", "c", "nobody", "double", "unknown-ca")
    deployment.start_nodes("a", "b", "c")
    running = deployment.start_run("--run-config", "round-timeout=100")

    wait_until(lambda: (notes / "c-1").exists(), "round 1")
    for name in strangers:
        deployment.start(name, f"nodes/{name}/supernode.sh")
    for name in ("unknown-ca", "unregistered"):
        assert deployment.processes[name].wait(timeout=PATIENCE) != 0
        assert "Exit Code: 305" in deployment.log(name)

    wait_until(lambda: (notes / "c-3").exists(), "round 3")
    deployment.kill("c")
    deployment.restart_node("c")
    wait_until(lambda: deployment.round() >= 3, "round 3 ends without b and c")
    (notes / "release").touch()
    run = deployment.finish(running)

    dropped = {
        (row["round"], row["client"]): row["dropped"]
        for row in run.rows()
        if row["dropped"] is not None
    }
    assert dropped.keys() == {(2, "a"), (2, "b"), (3, "b"), (3, "c")}
    assert dropped[2, "a"].startswith("no report: its app raised an error")
    assert "RuntimeError" in dropped[2, "a"]
    assert "on purpose" not in dropped[2, "a"]
    assert "RuntimeError: on purpose" in deployment.log("a")
    assert dropped[2, "b"] == "gradient: not finite"
    late = ("no report: no answer within 100 s", "no report: the message expired")
    assert dropped[3, "b"].startswith(late)
    assert dropped[3, "c"].startswith(
        ("no report: its node is gone", *late)
    )  # late, if it was back before it was missed
    participants = '[["a", "b", "c"], ["c"], ["a"], ["a", "b", "c"]]'
    assert_same(
        run,
        in_process(
            deployment, "reference", "federation.faults={}", f"train.participants={participants}"
        ),
    )
    log = deployment.log("run")
    assert "stays out: its app raised an error" in log
    assert "there is no client 'nobody'" in log
    assert "client key 'a' belongs to a node that is connected" in log
