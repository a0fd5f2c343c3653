"""status.json: where a run across machines has got to, and who takes part."""

import fcntl
import json
import logging
import os
import shutil
import socket

import pytest
from flwr.app import Error, Message

from fedgradnorm import FedGradNormWarning, RunError, StoppedError
from fedgradnorm.config import RunConfig
from fedgradnorm.flower import status as status_module
from fedgradnorm.flower import watcher as watcher_module
from fedgradnorm.flower.replies import CODE_KINDS, CODES
from fedgradnorm.flower.status import KINDS, beside, read_status, why_gone
from fedgradnorm.runs.lock import alone_in, being_written
from fedgradnorm.runs.reader import Run
from tests.flower.nodes import (
    Site,
    changed,
    in_round,
    lost,
    raising,
    with_nan,
    without_arrays,
)
from tests.helpers import small_federation
from tests.launcher import launcher


class Clock:
    """Seconds that go on by one each time that they are asked for."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        self.now += 1
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    for module in (status_module, watcher_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def site():
    return Site(small_federation())


@pytest.fixture
def written(monkeypatch):
    """Every status that is written, with the name of its file."""
    found = []
    write = watcher_module.write_atomically

    def noting(path, content):
        found.append((path.name, json.loads(content)))
        write(path, content)

    monkeypatch.setattr(watcher_module, "write_atomically", noting)
    return found


def test_a_run_says_where_it_has_got_to(site, tmp_path, written):
    site.train(tmp_path / "run", num_rounds=2)
    steps = [
        (
            name,
            one["state"],
            one["round"],
            one["done"],
            sum(c["connected"] for c in one["clients"].values()),
        )
        for name, one in written
    ]
    assert steps == [
        (".run.status.json", "waiting", 0, 0, 0),
        (".run.status.json", "waiting", 0, 0, 3),
        ("status.json", "training", 1, 0, 3),
        ("status.json", "training", 1, 0, 3),
        ("status.json", "testing", 1, 0, 3),
        ("status.json", "training", 1, 1, 3),
        ("status.json", "training", 2, 1, 3),
        ("status.json", "training", 2, 1, 3),
        ("status.json", "testing", 2, 1, 3),
        ("status.json", "training", 2, 2, 3),
        ("status.json", "completed", 2, 2, 3),
    ]
    status = read_status(tmp_path / "run")
    assert (status.num_rounds, status.pid, status.host) == (2, os.getpid(), socket.gethostname())
    assert status.experiment == Run(tmp_path / "run").config.run.experiment
    assert status.started < status.round_began < status.round_ended < status.written
    assert status.due == status.written + 3600 + 60
    a = status.clients["a"]
    assert (a.task, a.node, a.last_drop, a.drops, a.notes) == ("sign", "2", None, {}, [])
    assert status.started < a.since < status.round_began < a.last_seen
    assert not beside(tmp_path / "run").exists()


def test_without_a_folder_nothing_is_written(site, tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    site.train(num_rounds=1)
    assert written == []
    assert list(tmp_path.iterdir()) == []


def failing(code, message, _):
    return Message(Error(code, "x"), reply_to=message)


FAILURES = {
    "raises": (raising, "error"),
    "hangs": (lost, "late"),
    "NaN": (changed(with_nan), "refused-report"),
    "no arrays": (changed(without_arrays), "refused-report"),
    **{
        f"code {code}": (
            lambda message, _, code=code: Message(Error(code, "x"), reply_to=message),
            kind,
        )
        for code, kind in CODE_KINDS.items()
    },
    "code 0": (lambda message, _: Message(Error(0, "x"), reply_to=message), "other"),
}


@pytest.mark.parametrize(("twist", "kind"), FAILURES.values(), ids=FAILURES)
def test_a_drop_is_counted_by_its_kind(site, tmp_path, twist, kind):
    site.wire.twists[3] = in_round(2, twist)
    result = site.train(tmp_path / "run", num_rounds=3)
    b = read_status(tmp_path / "run").clients["b"]
    (reason,) = [row["dropped"] for row in result.rows if row["dropped"]]
    assert b.drops == {kind: 1}
    assert (b.last_drop.round, b.last_drop.kind, b.last_drop.reason) == (
        2,
        kind,
        reason.removeprefix("no report: "),
    )
    assert b.last_seen > b.last_drop.time
    assert not read_status(tmp_path / "run").clients["a"].drops


def test_every_code_of_flower_but_the_unknown_one_has_a_kind():
    assert CODE_KINDS.keys() | {0} == CODES.keys()
    assert set(CODE_KINDS.values()) < set(KINDS)


@pytest.mark.parametrize(("twist", "kind"), [(lost, "late"), (raising, "error")])
def test_a_client_is_seen_when_it_answers_whatever_it_says(site, tmp_path, twist, kind):
    site.wire.twists[3] = twist
    with pytest.warns(FedGradNormWarning, match="client 'b' never counted"):
        site.train(tmp_path / "run", num_rounds=2, eval_every=9)
    status = read_status(tmp_path / "run")
    b = status.clients["b"]
    assert b.drops == {kind: 2}
    assert (b.last_seen > status.round_began) == (kind == "error")


def test_who_is_gone_is_not_connected_and_who_comes_back_is(site, tmp_path):
    seen = []

    def act(rows):
        if rows[0]["round"] == 1:
            site.leave(3)
        if rows[0]["round"] == 2:
            seen.append(read_status(tmp_path / "run").clients["b"])
            site.join(9, "b")

    site.train(tmp_path / "run", num_rounds=3, on_round=act)
    (gone,) = seen
    assert (gone.connected, gone.node, gone.drops) == (False, None, {"not-connected": 1})
    assert gone.since > gone.last_seen
    back = read_status(tmp_path / "run").clients["b"]
    assert (back.connected, back.node) == (True, "9")
    assert back.since > gone.since


def test_a_node_that_stays_out_is_there_with_the_reason(site, tmp_path):
    site.wire.join(8, site.wire.nodes[2])
    with pytest.raises(StoppedError):
        site.train(tmp_path / "run", num_rounds=1, limits={"min_nodes": 3})
    status = read_status(tmp_path / "run")
    why = "client key 'a' is claimed by 2 nodes"
    assert status.strangers == {"2": why, "8": why}
    assert (status.state, status.round, status.done) == ("stopped", 0, 0)
    assert status.reason.startswith(
        "2 clients are connected after 0 s, expected at least 3; connected: b, c; node 2 stays out: "
    )
    assert not (tmp_path / "run").exists()
    assert [client.connected for client in status.clients.values()] == [False, True, True]


@pytest.mark.parametrize("error", [KeyError("x\ny"), KeyboardInterrupt(), SystemExit(0)])
def test_a_run_that_fails_says_why(site, tmp_path, error):
    def act(rows):
        if rows[0]["round"] == 2:
            raise error

    with pytest.raises(type(error)):
        site.train(tmp_path / "run", num_rounds=3, on_round=act)
    status = read_status(tmp_path / "run")
    assert (status.state, status.done) == ("stopped", 2)
    outside = "it was stopped from outside, by flwr stop or a signal"
    assert (
        status.reason
        == {KeyError: "KeyError: 'x\\ny'", KeyboardInterrupt: outside, SystemExit: outside}[
            type(error)
        ]
    )


def test_a_run_that_goes_on_keeps_what_is_known_of_its_clients(site, tmp_path, written):
    site.wire.twists[3] = in_round(1, raising)
    with pytest.raises(StoppedError):
        site.train(tmp_path / "run", num_rounds=4, should_stop=lambda: True)
    before = read_status(tmp_path / "run")
    written.clear()
    site.train(tmp_path / "run", num_rounds=4)
    name, first = written[0]
    assert (name, first["state"], first["round"], first["done"], first["num_rounds"]) == (
        "status.json",
        "waiting",
        1,
        1,
        4,
    )
    assert not any(client["connected"] for client in first["clients"].values())
    after = read_status(tmp_path / "run")
    assert (after.state, after.reason, after.done) == ("completed", None, 4)
    assert after.clients["b"].drops == {"error": 1}
    assert after.started > before.written
    site.wire.twists.clear()
    site.train(tmp_path / "run", num_rounds=1, start_round=1)
    assert read_status(tmp_path / "run").clients["b"].drops == {}


def test_a_run_that_is_put_back_has_its_own_status_and_the_failed_one_is_beside_it(site, tmp_path):
    site.train(tmp_path / "run", num_rounds=1)
    before = (tmp_path / "run/status.json").read_bytes()
    for number in (2, 3, 4):
        site.wire.twists[number] = raising
    with pytest.raises(StoppedError, match="is there again"):
        site.train(tmp_path / "run", num_rounds=2, start_round=1)
    assert (tmp_path / "run/status.json").read_bytes() == before
    status = read_status(tmp_path / "run")
    assert (status.state, status.num_rounds, status.clients["a"].drops) == (
        "stopped",
        2,
        {"error": 4},
    )
    site.wire.twists.clear()
    site.train(tmp_path / "run", num_rounds=2, start_round=1)
    assert read_status(tmp_path / "run").state == "completed"
    assert not beside(tmp_path / "run").exists()


def test_notes_are_kept_with_their_round(site, tmp_path):
    engine = site.engine()

    def act(_):
        engine.notes.add("b", "its data changed")

    site.train(tmp_path / "run", num_rounds=30, on_round=act, engine=engine, eval_every=30)
    b = read_status(tmp_path / "run").clients["b"]
    assert b.notes == [f"round {number}: its data changed" for number in range(11, 31)]


def test_a_client_that_rests_says_until_when(site, tmp_path):
    site.wire.twists[3] = lost
    seen = []

    def act(_):
        b = read_status(tmp_path / "run").clients["b"]
        seen.append((b.resting_until, dict(b.drops)))

    with pytest.warns(FedGradNormWarning, match="client 'b' never counted"):
        site.train(tmp_path / "run", num_rounds=6, on_round=act, eval_every=9)
    assert seen == [
        (None, {"late": 1}),
        (3, {"late": 2}),
        (None, {"late": 2, "resting": 1}),
        (6, {"late": 3, "resting": 1}),
        (6, {"late": 3, "resting": 2}),
        (None, {"late": 3, "resting": 3}),
    ]


def test_a_status_that_cannot_be_written_ends_no_run_and_is_said_once(
    site, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watcher_module, "write_atomically", full)
    caplog.set_level(logging.WARNING, logger="fedgradnorm")
    site.train(tmp_path / "run", num_rounds=2)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/run/status.json: cannot be written: No space left on device"
    ]


def sound(site, tmp_path):
    site.train(tmp_path / "run", num_rounds=1)
    return tmp_path / "run"


def set_to(**values):
    return lambda text: json.dumps(json.loads(text) | values)


DAMAGES = {
    "torn": (lambda text: text[:50], "damaged: expected JSON; "),
    "empty": (lambda text: "", "damaged: expected JSON; "),
    "bytes": (lambda text: "\ud800", "damaged: expected JSON; "),
    "deep": (lambda text: "[" * 100_000, "damaged: expected JSON; "),
    "a list": (lambda text: "[]", "damaged: the whole: "),
    "another format": (
        set_to(format=2),
        "expected format 1, found 2: another version of fedgradnorm has written it",
    ),
    "no format": (set_to(format=None), "damaged: format: Input should be 1, found None"),
    "a text": (set_to(round="x"), "damaged: round: Input should be a valid integer, .*found 'x'"),
    "another state": (set_to(state="\x1b[2J"), r"damaged: state: .*, found '\\x1b\[2J'"),
    "no time": (set_to(written=1e300), "damaged: written: Input should be less than 250000000000"),
    "no process": (set_to(pid=2**40), "damaged: pid: Input should be less than 2147483648"),
    "more": (set_to(more=1), "damaged: more: Extra inputs are not permitted, found 1"),
    "no clients": (set_to(clients={"a": {}}), "damaged: clients.a.task: Field required"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_status_is_an_error_that_names_the_file(site, tmp_path, damage, message):
    path = sound(site, tmp_path) / "status.json"
    path.write_bytes(damage(path.read_text()).encode("utf-8", "surrogatepass"))
    with pytest.raises(RunError, match=rf"^{path}: {message}"):
        read_status(tmp_path / "run")


def test_a_missing_status_is_an_error_that_says_what_has_one(tmp_path):
    with pytest.raises(
        RunError,
        match="nowhere/status.json: there is no such file: expected that of a run across machines",
    ):
        read_status(tmp_path / "nowhere")


def test_a_process_that_has_ended_is_told_by_the_lock_its_number_or_the_time(site, tmp_path, clock):
    folder = sound(site, tmp_path)
    status = read_status(folder)
    assert why_gone(status, folder) is None
    status.state = "training"
    assert (
        why_gone(status, folder)
        == f"its process (pid {os.getpid()} on {socket.gethostname()}) has ended without a word"
    )
    with alone_in(folder):
        assert why_gone(status, folder) is None
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert why_gone(status, copy) is None
    status.pid = 2**31 - 1
    assert "has ended without a word" in why_gone(status, copy)
    status.host = "elsewhere"
    assert why_gone(status, copy) is None
    clock.now = status.due + 40
    assert (
        why_gone(status, copy)
        == "its process (pid 2147483647 on elsewhere) has written nothing for 3702 s"
    )


def test_a_run_may_be_replaced_with_its_status(site, tmp_path):
    folder = sound(site, tmp_path)
    site.train(folder, num_rounds=1, start_round=1)
    assert read_status(folder).experiment == Run(folder).config.run.experiment


def test_a_run_that_waits_for_long_goes_on_saying_so(site, tmp_path, clock):
    engine, written = site.engine(min_nodes=3), []
    with engine.watcher.watching(tmp_path / "run", RunConfig()):
        for _ in range(6):
            clock.now += 40
            engine.watcher.waits()
            written.append(read_status(tmp_path / "run").written)
    assert len(set(written)) >= 3


# --------------------------------------------------------------------------------------- who writes


def test_whoever_may_read_a_runs_folder_is_told_whether_it_is_written(tmp_path):
    folder = tmp_path / "run"
    assert being_written(folder) is None  # no lock tells
    code = f"from pathlib import Path; from fedgradnorm.runs.lock import being_written; print(being_written(Path({str(folder)!r})))"

    def seen():
        status, out, error = launcher().call(tmp_path, code=code)
        assert status == 0, error
        return out.strip()

    with alone_in(folder):
        (tmp_path / ".run.lock").chmod(0o444)
        assert (seen(), being_written(folder)) == ("True", True)
    assert (seen(), being_written(folder)) == ("False", False)
    with (tmp_path / ".run.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another one who looks
        assert being_written(folder) is False


@pytest.mark.parametrize("last", [0, 1, 100, 299])
def test_the_last_round_of_hundreds_of_clients_is_a_whole_one(tmp_path, last):
    folder, clients = tmp_path / "run", [f"client-{number}" for number in range(300)]
    row = Site(small_federation()).train(folder, num_rounds=1).rows[0]
    lines = [
        json.dumps({**row, "round": round, "client": client})
        for round in (1, 2, 3, 4)
        for client in (clients if round < 4 else clients[:last])
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = Run(folder).last_round()
    assert {one["round"] for one in found} == {3}
    assert len(found) == 300
