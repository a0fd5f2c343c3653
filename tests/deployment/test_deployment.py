"""Flower's own processes on this machine, with TLS and authenticated nodes, from a folder that `flower init` wrote."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.report import write_report
from tests.deployment import misbehaving
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
    "federation.name=digits",
    'federation.tasks=["class", "parity"]',
    "train.num_rounds=4",
    "train.eval_every=9",
    "train.head_steps=3",
    "train.encoder_steps=3",
)
RADCOM = (
    *(
        "federation.name=radcom",
        'federation.tasks=["modulation", "anomaly"]',
        "federation.snapshots=5",
        "federation.snr_min=-8",
        "federation.snr_max=4",
    ),
    *(
        "model.name=mlp",
        "model.hidden=[16, 8]",
        "train.num_rounds=2",
        "train.eval_every=2",
        "train.batch_size=16",
    ),
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


@pytest.mark.xdist_group("deployment")
def test_digits_give_the_same_numbers_across_processes_even_if_the_superlink_is_killed_between(
    deploy,
):
    deployment = deploy("digits", *DIGITS)
    local = deployment.start("local", "local.py")
    wait_until(
        lambda: "ready" in deployment.log("local") or local.poll() is not None, "local.py is ready"
    )
    first = deployment.start_run()
    wait_until(lambda: deployment.round() >= 2 or first.poll() is not None, "two rounds")
    deployment.kill_superlink_of("local")
    deployment.kill("run")
    done = (
        deployment.saved_round()
    )  # the SuperLink may have ended between a round's lines and its checkpoint
    before = [row for row in deployment.run.rows() if row["round"] <= done]
    assert 1 <= done < 4
    deployment.start_superlink()
    run = deployment.finish(deployment.start_run())
    assert f"going on after round {done} of 4" in deployment.log("run")
    assert [row for row in run.rows() if row["round"] <= done] == before
    reference = in_process(deployment, "reference")
    assert_same(run, reference)
    assert_same(run, in_process(deployment, "flower-local"))
    assert all(row["dropped"] is None for row in run.rows())
    assert write_report([run], deployment.folder / "report.html").stat().st_size > 1000
    assert_heads_are_at_home(deployment, run)
    deployment.kill("superlink")
    local.send_signal(signal.SIGINT)
    local.wait(timeout=PATIENCE)
    assert not deployment.left_over()


@pytest.mark.xdist_group("deployment")
def test_radcom_gives_the_same_numbers_across_processes_and_goes_back_without_a_state_that_is_lost(
    deploy,
):
    deployment = deploy("radcom", *RADCOM)
    deployment.set("nodes/anomaly/node.env", "LOST_STATE", "newest")
    deployment.start_superlink()
    deployment.do("server/register.sh")
    deployment.start_nodes()
    run = deployment.finish(deployment.start_run())
    assert_same(run, in_process(deployment, "reference"))
    assert_same(run, in_process(deployment, "flower-local"))
    assert_heads_are_at_home(deployment, run)

    before = run.rows()
    (lost,) = (deployment.folder / "nodes/anomaly/state").rglob("round-00000001.safetensors")
    lost.unlink()
    rows = deployment.finish(deployment.start_run("--run-config", "start-round=2")).rows()
    log = deployment.log("run")
    assert "the rounds after round 1 are undone: their lines and checkpoints are in " in log
    assert (
        "client anomaly: its state of round 1 is lost: it trained with a fresh head and its F(0) of "
        in log
    )
    assert (run.folder / "undone/1/metrics.jsonl").exists()
    assert rows[:2] == before[:2]
    again = {row["client"]: row for row in rows[2:]}
    assert {id: row["dropped"] for id, row in again.items()} == {
        "modulation": None,
        "anomaly": None,
    }
    assert any("is lost" in note for note in again["anomaly"]["notes"])
    assert again["anomaly"]["initial_loss"] == next(
        row["initial_loss"] for row in before if row["client"] == "anomaly"
    )
    assert again["modulation"]["loss"] == pytest.approx(
        before[2]["loss"] if before[2]["client"] == "modulation" else before[3]["loss"], rel=1e-5
    )


def test_faults_end_no_run_and_cost_no_more_than_their_rounds(deploy, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.syspath_prepend(str(Path(misbehaving.__file__).parent))
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
    shutil.copy(misbehaving.__file__, deployment.folder / "app")
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
