"""The clients behind a Grid: who takes part, what goes wrong, and what is undone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedgradnorm import ConfigError, RunError, StoppedError, resume, train
from fedgradnorm.config import TrainConfig
from fedgradnorm.flower.limits import Limits
from fedgradnorm.flower.replies import CODES
from fedgradnorm.flower.states import StateFiles
from fedgradnorm.messages import Instruction
from fedgradnorm.runs.entries import STATUS
from fedgradnorm.runs.reader import Run
from tests.flower.nodes import (
    QUICK,
    Site,
    changed,
    dropped,
    evaluating,
    in_round,
    lost,
    raising,
    untouched,
    with_loss,
    with_nan,
    without_arrays,
)
from tests.helpers import batch_norm_encoder, small_federation, timeless
from tests.runs import contents


def plain(result):
    """What a run has come to, as values that compare."""
    buffers = {name: value.tolist() for name, value in result.state.buffers.items()}
    return result.state.encoder.tolist(), buffers, result.state.weighting, timeless(result.rows)


# --------------------------------------------------------------------------------------- no failure


@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_messages_as_bytes_change_nothing(buffers):
    federation = small_federation(encoder=batch_norm_encoder, buffers=buffers)
    site = Site(federation, seed=3)
    result = site.train(num_rounds=4, head_momentum=0.5, fraction_train=0.67)
    expected = train(
        federation,
        engine="reference",
        **QUICK,
        num_rounds=4,
        head_momentum=0.5,
        fraction_train=0.67,
        seed=3,
    )
    assert plain(result) == plain(expected)
    heads = {
        id: {name: value.tolist() for name, value in state.head.items()}
        for id, state in expected.client_states.items()
    }
    assert site.heads(result) == {
        id: head for id, head in heads.items() if expected.client_states[id].round
    }
    assert {id: state.round for id, state in result.client_states.items()} == {
        id: s.round for id, s in expected.client_states.items()
    }


def test_clients_keep_what_a_checkpoint_may_ask_for_and_no_more():
    site = Site(small_federation())
    site.train(engine=site.engine(keep=2), num_rounds=7)
    assert {tuple(store.by_round) for store in site.stores.values()} == {(4, 5, 6, 7)}


# ----------------------------------------------------------------------------------------- failures


def as_other_client(content):
    content["fedgradnorm"] = ConfigRecord({**content["fedgradnorm"], "client": "a"})


def for_another_round(content):
    content["fedgradnorm"] = ConfigRecord({**content["fedgradnorm"], "round": 10**9})


def with_another_task(content):
    content["fedgradnorm"] = ConfigRecord({**content["fedgradnorm"], "task": "another"})


def without_control(content):
    del content["fedgradnorm"]


def without_metrics(content):
    del content["metrics"]


def with_wrong_shape(content):
    content["arrays"]["2.bias"] = Array(np.zeros(5, np.float32))


def with_wrong_type(content):
    content["arrays"]["2.bias"] = Array(np.zeros(4))


def with_wrong_name(content):
    content["arrays"]["head.bias"] = content["arrays"].pop("2.bias")


def with_pickle(content):
    array = content["arrays"]["2.bias"]
    content["arrays"]["2.bias"] = Array(array.dtype, array.shape, array.stype, b"\x80\x04N.")


def without_seconds(content):
    del content["metrics"]["seconds"]


def with_endless_seconds(content):
    content["metrics"]["seconds"] = float("nan")


def with_a_lifetime_of_seconds(content):
    content["metrics"] = MetricRecord(
        {**content["metrics"], "seconds": 1e308, "head-seconds": 1e308}
    )


def with_a_long_task(content):
    content["fedgradnorm"] = ConfigRecord({**content["fedgradnorm"], "task": "x\n" * 10**6})


def with_many_long_names(content):
    content["arrays"] = ArrayRecord(
        {f"{number}{'x' * 10**4}": Array(np.zeros(1)) for number in range(10)}
    )


def with_a_long_norm(content):
    content["metrics"]["grad-norm"] = 1e30


def with_half_an_example(content):
    content["metrics"]["num-examples"] = 0.5


def with_nan_at_the_start(content):
    content["metrics"]["initial-loss"] = float("nan")


def with_strange_buffers(content):
    content["buffers"] = ArrayRecord({"x": Array(np.zeros(1))})


def with_large_buffers(content):
    content["buffers"] = ArrayRecord({"x": Array(np.zeros(10**6))})


def with_more_in_it(content):
    content["stuff"] = ArrayRecord({"x": Array(np.zeros(10**6))})


def with_another_metric(content):
    content["metrics"]["x"] = [0.5] * 10**6


def with_more_in_an_array(content):
    array = content["arrays"]["2.bias"]
    content["arrays"]["2.bias"] = Array(
        array.dtype, array.shape, array.stype, array.data + b"\0" * 10**6
    )


def with_more_in_its_name(content):
    content["fedgradnorm"] = ConfigRecord({**content["fedgradnorm"], "x": "x" * 10**6})


def raising_at_a_terminal(_message, _answer):
    raise RuntimeError("no\x1b[2J\x07\u202e luck")


def raising_at_length(_message, _answer):
    raise RuntimeError("no\n" * 10**6)


FAILURES = {
    "raises": (raising, "no report: its app raised an error: RuntimeError: no luck"),
    "hangs": (lost, "no report: no answer within 3600 s"),
    "never gets it": (untouched, "no report: no answer within 3600 s"),
    "is gone": (
        lambda message, _: Message(Error(5), reply_to=message),
        "no report: its node is gone",
    ),
    "unknown code": (
        lambda message, _: Message(Error(77, "odd"), reply_to=message),
        "no report: error code 77: odd",
    ),
    "NaN": (changed(with_nan), "gradient: not finite"),
    "shape": (
        changed(with_wrong_shape),
        "no report: array '2.bias': expected torch.float32 of (4,), found torch.float32 of (5,)",
    ),
    "type": (
        changed(with_wrong_type),
        "no report: array '2.bias': expected torch.float32 of (4,), found torch.float64 of (4,)",
    ),
    "name": (
        changed(with_wrong_name),
        "no report: arrays: expected those of the encoder, found 4; '2.bias' is in one alone",
    ),
    "pickle": (changed(with_pickle), "no report: arrays: expected arrays of numbers; "),
    "other client": (
        changed(as_other_client),
        "no report: it answered as client 'a' with task 'sign' for round 2",
    ),
    "other round": (
        changed(for_another_round),
        "no report: it answered as client 'b' with task 'sign' for round 1000000000",
    ),
    "other task": (
        changed(with_another_task),
        "no report: it answered as client 'b' with task 'another' for round 2",
    ),
    "no control": (
        changed(without_control),
        "no report: expected a record 'fedgradnorm', found ['arrays', 'metrics']",
    ),
    "no metrics": (
        changed(without_metrics),
        "no report: expected a record 'metrics', found ['arrays', 'fedgradnorm']",
    ),
    "no arrays": (
        changed(without_arrays),
        "no report: expected a record 'arrays', found ['fedgradnorm', 'metrics']",
    ),
    "no seconds": (
        changed(without_seconds),
        "no report: metrics.seconds: expected a number, found None",
    ),
    "endless": (
        changed(with_endless_seconds),
        "no report: metrics.seconds: expected seconds, from 0 to 1e+09, found nan",
    ),
    "a lifetime": (
        changed(with_a_lifetime_of_seconds),
        "no report: metrics.seconds: expected seconds, from 0 to 1e+09, found 1e+308",
    ),
    "unknown record": (
        changed(with_more_in_it),
        "no report: records: expected none but arrays, buffers, metrics, fedgradnorm, found 'stuff'",
    ),
    "unknown metric": (
        changed(with_another_metric),
        "no report: metrics: expected none but loss, initial-loss, ",
    ),
    "unknown field": (
        changed(with_more_in_its_name),
        "no report: fedgradnorm.x: Extra inputs are not permitted, found 'xxx",
    ),
    "too many bytes": (
        changed(with_more_in_an_array),
        "no report: array '2.bias': expected at most 4,112 bytes, found 1,000,144",
    ),
    "control characters": (
        raising_at_a_terminal,
        "no report: its app raised an error: RuntimeError: no\\x1b[2J\\x07\\u202e luck",
    ),
    "long task": (
        changed(with_a_long_task),
        "no report: fedgradnorm.task: String should have at most 200 characters, found 'x",
    ),
    "long names": (
        changed(with_many_long_names),
        "no report: arrays: expected those of the encoder, found 10; '",
    ),
    "long error": (raising_at_length, "no report: its app raised an error: RuntimeError: no no"),
    "half an example": (
        changed(with_half_an_example),
        "no report: metrics.num-examples: expected a whole number from 0, found 0.5",
    ),
    "NaN at the start": (
        changed(with_nan_at_the_start),
        "initial_loss: expected a number from -1e+100 to 1e+100, found nan",
    ),
    "buffers": (changed(with_strange_buffers), "buffers: not those that were sent"),
    "large buffers": (
        changed(with_large_buffers),
        "no report: buffer 'x': expected at most 4,096 bytes, found 8,000,128",
    ),
    "a long norm": (
        changed(with_a_long_norm),
        "no report: metrics.grad-norm: expected at most the length of the gradient, ",
    ),
}


@pytest.mark.parametrize(("twist", "reason"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("round", [1, 2])
def test_a_client_that_fails_is_named_and_its_round_is_undone(twist, reason, round, tmp_path):
    reason = reason.replace("for round 2", f"for round {round}")
    site, as_if = Site(small_federation()), Site(small_federation())
    site.wire.twists[3] = in_round(round, twist)
    as_if.wire.twists[3] = in_round(round, untouched)
    result, expected = site.train(tmp_path / "run", num_rounds=4), as_if.train(num_rounds=4)
    found = dropped(result.rows, "b")
    assert found.keys() == {round}
    assert found[round].startswith(reason)
    assert len(found[round]) < 400
    assert "\n" not in found[round]
    assert not dropped(result.rows, "a")
    assert not dropped(result.rows, "c")
    assert site.heads(result) == as_if.heads(expected)
    assert result.state.encoder.tolist() == expected.state.encoder.tolist()
    assert result.weights == expected.weights


@pytest.mark.parametrize("twist", [lost, changed(with_nan), raising], ids=["lost", "NaN", "raises"])
def test_a_repeated_round_is_the_round_that_went_well(twist):
    site, well = Site(small_federation()), Site(small_federation())
    site.wire.twists[3] = in_round(2, twist)
    result, expected = (
        site.train(num_rounds=4, min_clients=3, head_momentum=0.9),
        well.train(num_rounds=4, head_momentum=0.9),
    )
    assert {row["retries"] for row in result.rows if row["round"] == 2} == {1}
    assert site.heads(result) == well.heads(expected)
    assert result.state.encoder.tolist() == expected.state.encoder.tolist()


def test_too_few_sound_reports_stop_the_run_and_it_can_be_resumed(tmp_path):
    site, well = Site(small_federation()), Site(small_federation())
    site.wire.twists[3] = lambda message, answer: (
        raising(message, answer) if message.metadata.group_id == "3" else answer(message)
    )
    with pytest.raises(
        StoppedError,
        match=r"round 3: 2 sound reports, expected at least 3: b: no report: .*start its Flower app again",
    ):
        site.train(tmp_path / "run", num_rounds=5, min_clients=3)
    site.wire.twists.clear()
    result, expected = (
        site.train(tmp_path / "run", num_rounds=5, min_clients=3),
        well.train(num_rounds=5, min_clients=3),
    )
    assert result.state.encoder.tolist() == expected.state.encoder.tolist()
    assert site.heads(result) == well.heads(expected)
    assert timeless(result.rows) == timeless(expected.rows)


def test_a_failed_test_leaves_a_gap_and_the_reason_of_training_stands():
    site = Site(small_federation())
    node = site.wire.nodes[3]

    def answer(message, context):
        if message.metadata.message_type == "evaluate":
            raise OSError("no")
        return node(message, context)

    site.wire.nodes[3] = answer
    rows = site.train(num_rounds=2).rows
    assert {row["client"] for row in rows if row["test_loss"] is None} == {"b"}
    assert not dropped(rows, "b")


@pytest.mark.parametrize(
    "twist",
    [untouched, lambda message, _: Message(Error(3), reply_to=message)],
    ids=["hangs", "expired"],
)
def test_a_client_that_was_too_late_is_not_waited_for_a_second_time_in_its_round(twist):
    site = Site(small_federation())
    site.wire.twists[3] = in_round(2, twist)
    rows = site.train(num_rounds=3, eval_every=1).rows
    asked = [
        one
        for one in site.wire.messages
        if one.metadata.message_type == "evaluate" and one.metadata.dst_node_id == 3
    ]
    assert [one.metadata.group_id for one in asked] == ["1", "3"]
    assert [row["test_loss"] is not None for row in rows if row["client"] == "b"] == [
        True,
        False,
        True,
    ]


def with_metrics(metrics):
    def change(content):
        content["fedgradnorm"] = ConfigRecord({**content["fedgradnorm"], "metrics": metrics})

    return change


ODD_METRICS = {
    "none": "{}",
    "text": '{"accuracy": "high"}',
    "null": '{"accuracy": null}',
    "list": "[]",
    "torn": "{",
    "endless": '{"accuracy": 1' + 400 * "0" + "}",
    "too large": '{"accuracy": 1.7e308}',
    "a name that is no text": '{"accuracy": 0.5, "\\ud800": 1}',
    "a long name": '{"accuracy": 0.5, "' + 300 * "x" + '": 1}',
    "many": '{"accuracy": 0.5, ' + ", ".join(f'"{number}": 1' for number in range(20_000)) + "}",
}


@pytest.mark.parametrize("metrics", ODD_METRICS.values(), ids=ODD_METRICS)
def test_an_odd_evaluation_counts_for_nothing(metrics, tmp_path):
    site = Site(small_federation())
    evaluating(site, 3, with_metrics(metrics))
    rows = site.train(tmp_path / "run", num_rounds=1).rows
    assert [row["client"] for row in rows if row["test_loss"] is None] == ["b"]
    assert Run(tmp_path / "run").rows() == rows


@pytest.mark.parametrize("loss", [1.7e308, -1.7e308, float("inf"), float("nan")])
def test_a_loss_without_bounds_is_a_gap(loss, tmp_path):
    site = Site(small_federation())
    for number in (2, 3):
        evaluating(site, number, with_loss(loss))
    rows = site.train(tmp_path / "run", num_rounds=2).rows
    assert {row["client"] for row in rows if row["test_loss"] is None} == {"a", "b"}
    assert Run(tmp_path / "run").summary()["rounds"] == 2


def test_a_reply_to_no_message_is_left_alone():
    site, expected = Site(small_federation()), Site(small_federation()).train(num_rounds=3)
    pull = site.wire.pull_messages

    def with_another(ids):
        replies = list(pull(ids))
        stray = (
            Message(replies[0].content, reply_to=replies[0]) if replies[0].has_content() else None
        )
        return [*replies, *replies, *([stray] if stray else [])]

    site.wire.pull_messages = with_another
    assert plain(site.train(num_rounds=3)) == plain(expected)


def test_every_code_of_flower_is_in_words():
    codes = {value for name, value in vars(ErrorCode).items() if name.isupper()}
    assert codes == CODES.keys()


# ----------------------------------------------------------------------------------- who takes part


def at(round, act):
    """An ``on_round`` that acts after a round."""
    return lambda rows: act() if rows[0]["round"] == round else None


@pytest.mark.parametrize("number", [3, 77])
def test_a_node_that_is_gone_comes_back_with_its_files(tmp_path, number):
    site = Site(
        small_federation(),
        states=lambda client: lambda experiment: StateFiles(tmp_path, experiment, client),
    )
    as_if = Site(small_federation())
    as_if.wire.twists[3] = in_round(3, untouched)

    def act(rows):
        if rows[0]["round"] == 2:
            site.leave(3)
        if rows[0]["round"] == 3:
            site.join(number, "b")

    engine = site.engine(ask_again=3600)
    result, expected = (
        site.train(engine=engine, on_round=act, num_rounds=5, head_momentum=0.5),
        as_if.train(num_rounds=5, head_momentum=0.5),
    )
    assert dropped(result.rows, "b") == {3: "no report: not connected"}
    site.states = lambda client: lambda _: StateFiles(tmp_path, engine.experiment, client)
    assert site.heads(result) == as_if.heads(expected)
    assert result.state.encoder.tolist() == expected.state.encoder.tolist()


def test_a_client_that_has_lost_its_head_is_named_and_the_others_go_on():
    site = Site(small_federation())

    def act(rows):
        if rows[0]["round"] == 2:
            site.stores["b"].by_round.clear()

    rows = site.train(num_rounds=4, on_round=act).rows
    found = dropped(rows, "b")
    assert found.keys() == {3, 4}
    assert "no state of round 2 is kept" in found[3]
    assert not dropped(rows, "a")


def test_a_late_node_joins_at_the_next_round():
    site = Site(small_federation())
    site.leave(3)
    rows = site.train(num_rounds=3, on_round=at(1, lambda: site.join(9, "b"))).rows
    assert dropped(rows, "b") == {1: "no report: not connected"}
    assert [row["loss"] is not None for row in rows if row["client"] == "b"] == [False, True, True]


def test_a_wrong_key_stays_out():
    federation = small_federation()
    site = Site(federation)
    other = Site(small_federation(("a", "z")))
    site.wire.nodes[9] = other.wire.nodes[3]
    site.wire.contexts[9] = other.wire.contexts[3]
    engine = site.engine()
    rows = site.train(engine=engine, num_rounds=2).rows
    assert {row["client"] for row in rows} == {"a", "b", "c"}
    assert not any(row["dropped"] for row in rows)
    with pytest.raises(
        StoppedError, match="node 9 stays out: there is no client 'z' in the federation"
    ):
        engine.wait(4)


def test_a_message_for_another_client_is_refused():
    site = Site(small_federation())
    site.train(num_rounds=1)
    engine = site.engine()
    engine.wait()
    a, b = site.wire.nodes[2], site.wire.nodes[3]
    site.wire.nodes[2], site.wire.nodes[3] = b, a  # two nodes swap their keys, unseen
    encoder = torch.zeros(sum(torch.Size(shape).numel() for shape in engine.layout.shapes.values()))
    assert (
        engine.execute([Instruction(1, id, encoder, {}, TrainConfig(**QUICK)) for id in ("a", "b")])
        == []
    )
    for client, failure in engine.failures.items():
        assert failure.kind == "error"
        assert f"for client '{client}'" in failure
    assert engine.clients == ["c"]  # the two nodes are asked again who they are


def test_a_key_of_a_connected_node_stays_out_until_that_one_is_gone():
    site = Site(small_federation())
    engine = site.engine(ask_again=3600)
    seen = []

    def act(rows):
        seen.append(dict(engine.attendance.nodes))
        if rows[0]["round"] == 1:
            site.join(9, "b")
        if rows[0]["round"] == 3:
            site.leave(3)

    rows = site.train(engine=engine, num_rounds=5, on_round=act).rows
    assert [nodes["b"] for nodes in seen] == [3, 3, 3, 9, 9]
    assert not dropped(rows, "b")


def test_two_nodes_with_one_key_stay_out_until_one_is_gone():
    site = Site(small_federation())
    site.join(9, "b")
    rows = site.train(
        num_rounds=4, on_round=at(2, lambda: site.leave(3)), limits={"ask_again": 3600}
    ).rows
    assert dropped(rows, "b") == dict.fromkeys(
        (1, 2), "no report: client key 'b' is claimed by 2 nodes"
    )
    assert [row["loss"] is not None for row in rows if row["client"] == "b"] == [
        False,
        False,
        True,
        True,
    ]


def test_one_of_two_nodes_with_one_key_does_not_come_in_while_the_other_is_silent():
    site = Site(small_federation())
    site.join(9, "b")
    engine, answer = site.engine(), site.wire.answer
    engine.wait()
    site.wire.answer = lambda message: (
        None if message.metadata.dst_node_id == 9 else answer(message)
    )
    engine.wait()
    assert engine.clients == ["a", "c"]
    site.leave(9)
    engine.wait()
    assert engine.clients == ["a", "b", "c"]


def test_a_node_that_does_not_answer_is_asked_less_and_less_often(monkeypatch):
    site, clock = Site(small_federation()), [0.0]
    monkeypatch.setattr("fedgradnorm.flower.engine.time.monotonic", lambda: clock[0])
    asked, answer = [], site.wire.answer

    def silent(message):
        if message.metadata.dst_node_id != 9:
            return answer(message)
        return asked.append(clock[0])

    site.join(9, "b")
    site.wire.answer = silent
    engine = site.engine(ask_again=10)
    for second in range(100):
        clock[0] = float(second)
        engine.wait()
    assert asked == [0, 10, 30, 70]
    assert engine.clients == ["a", "b", "c"]


def test_a_message_lives_as_long_as_its_answer_is_waited_for():
    site = Site(small_federation())
    site.train(num_rounds=1, limits={"round_timeout": 700.0, "greeting_timeout": 50.0})
    lives = {
        (one.content["fedgradnorm"]["kind"], one.metadata.ttl)
        for one in site.wire.messages
        if "kind" in one.content["fedgradnorm"]
    }
    assert lives == {("hello", 50.0), ("train", 700.0), ("evaluate", 700.0)}


def silent_app(message, _):
    return Message(RecordDict(), reply_to=message)


APPS = [
    (raising, "its app raised an error"),
    (silent_app, "expected a record 'fedgradnorm'"),
    (
        lambda *_: None,
        "its app raised an error: TypeError: expected the app to answer with a Message, found NoneType",
    ),
]


@pytest.mark.parametrize(("app", "why"), APPS)
def test_a_node_that_is_none_of_ours_stays_out(app, why):
    site = Site(small_federation())
    site.wire.join(9, app)
    with pytest.raises(StoppedError, match=f"node 9 stays out: {why}"):
        site.engine(min_nodes=4).wait()


def test_too_few_nodes_stop_the_run_and_say_who_is_there():
    site = Site(small_federation())
    site.leave(3)
    with pytest.raises(StoppedError) as error:
        site.train(num_rounds=1, engine=site.engine(min_nodes=3))
    assert (
        str(error.value)
        == "2 clients are connected after 0 s, expected at least 3; connected: a, c"
    )
    site.leave(2)
    site.leave(4)
    with pytest.raises(StoppedError, match="connected: none$"):
        site.engine().wait()


def test_a_run_that_lost_its_nodes_goes_on_when_they_are_back(tmp_path):
    site, well = Site(small_federation()), Site(small_federation())
    limits = {"min_nodes": 3}
    with pytest.raises(StoppedError, match="2 clients are connected"):
        site.train(
            tmp_path / "run", num_rounds=4, on_round=at(2, lambda: site.leave(3)), limits=limits
        )
    site.join(11, "b")
    result, expected = (
        site.train(tmp_path / "run", num_rounds=4, limits=limits),
        well.train(num_rounds=4),
    )
    assert plain(result) == plain(expected)


ONE_OF_THREE = {"num_rounds": 6, "fraction_train": 0.34}


def test_a_repeat_waits_until_a_client_that_was_drawn_is_back():
    site, well = Site(small_federation()), Site(small_federation())
    ids, looks = site.wire.get_node_ids, []

    def act(rows):
        if rows[0]["round"] == 1:
            site.leave(3)

    def seen():
        looks.append(3 not in site.wire.nodes)
        if sum(looks) == 20:
            site.join(3, "b")
        return ids()

    site.wire.get_node_ids = seen
    result = site.train(on_round=act, limits={"node_timeout": 60}, **ONE_OF_THREE)
    assert result.state.encoder.tolist() == well.train(**ONE_OF_THREE).state.encoder.tolist()
    assert {row["retries"] for row in result.rows} == {0, 1}


def test_a_repeat_waits_no_longer_than_for_nodes():
    site = Site(small_federation())
    with pytest.raises(
        StoppedError,
        match="0 of the clients b are connected after 0 s, expected at least 1; connected: a, c",
    ):
        site.train(on_round=at(1, lambda: site.leave(3)), **ONE_OF_THREE)


def test_clients_without_test_data_are_not_asked():
    federation = small_federation()
    clients = [
        replace(client, test=None) if client.id == "b" else client for client in federation.clients
    ]
    site = Site(replace(federation, clients=clients))
    rows = site.train(num_rounds=2).rows
    assert {row["client"] for row in rows if row["test_loss"] is None} == {"b"}
    assert (
        sum(message.metadata.message_type == "evaluate" for message in site.wire.messages)
        == 2 * 2 * 2
    )


# ------------------------------------------------------------------------------------------- resume


def after(rounds):
    seen = []
    return lambda: seen.append(1) or len(seen) == rounds


@pytest.mark.parametrize("back", [0, 1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_also_from_an_older_checkpoint(tmp_path, back):
    federation = small_federation(encoder=batch_norm_encoder)
    site, whole, options = (
        Site(federation),
        Site(federation),
        {"num_rounds": 7, "head_momentum": 0.9, "fraction_train": 0.67},
    )
    with pytest.raises(StoppedError):
        site.train(tmp_path / "run", should_stop=after(5), **options)
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[3 - back :]:
        path.unlink()
    result, expected = site.train(tmp_path / "run", **options), whole.train(**options)
    assert plain(result) == plain(expected)
    assert site.heads(result) == whole.heads(expected)


def test_after_a_resume_clients_still_have_what_older_checkpoints_ask_for(tmp_path):
    site, whole, options = Site(small_federation()), Site(small_federation()), {"num_rounds": 8}
    for rounds in (5, 1):
        with pytest.raises(StoppedError):
            site.train(tmp_path / "run", should_stop=after(rounds), **options)
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.unlink()  # of 4, 5, 6
    result, expected = site.train(tmp_path / "run", **options), whole.train(**options)
    assert plain(result) == plain(expected)
    assert site.heads(result) == whole.heads(expected)


@pytest.mark.parametrize(
    "torn", ['{"round": 3, "client": "a", "ta', "{}", "\x00\x00", '{"round": 3}\n{"rou']
)
def test_a_torn_last_line_is_cut_when_a_run_goes_on(tmp_path, torn):
    site, whole = Site(small_federation()), Site(small_federation())
    with pytest.raises(StoppedError):
        site.train(tmp_path / "run", num_rounds=5, should_stop=after(2))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert plain(site.train(tmp_path / "run", num_rounds=5)) == plain(whole.train(num_rounds=5))
    assert len(Run(tmp_path / "run").rows()) == 15


def test_other_settings_than_those_of_the_run_are_refused(tmp_path):
    site = Site(small_federation())
    site.train(tmp_path / "run", num_rounds=2)
    with pytest.raises(
        ConfigError,
        match=r"is resumed with the settings that it began with .*changed: train.head_lr = 0.5 \(was 0.03\)",
    ):
        site.train(tmp_path / "run", num_rounds=3, head_lr=0.5)


def test_damaged_checkpoints_are_not_begun_over_unasked(tmp_path):
    site = Site(small_federation())
    site.train(tmp_path / "run", num_rounds=2)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        RunError,
        match="damaged.*no sound checkpoint is left to resume from: start_round = 1 begins anew",
    ):
        site.train(tmp_path / "run", num_rounds=3)
    assert len(site.train(tmp_path / "run", num_rounds=3, start_round=1).rows) == 9


@pytest.mark.parametrize("left", ["all", "rows"])
def test_results_without_a_checkpoint_are_not_begun_over_unasked(tmp_path, left):
    site, run = Site(small_federation()), tmp_path / "run"
    site.train(run, num_rounds=3)
    shutil.rmtree(run / "checkpoints")
    if left == "rows":
        (run / "summary.json").unlink()
    before = contents(run)
    with pytest.raises(
        RunError,
        match="there are results of a run, and no checkpoint is left to resume from: start_round = 1 begins anew",
    ):
        site.train(run, num_rounds=3)
    assert contents(run) == before
    assert len(site.train(run, num_rounds=3, start_round=1).rows) == 9


def test_a_run_that_was_killed_in_its_first_round_begins_anew(tmp_path):
    site, run = Site(small_federation()), tmp_path / "run"
    site.train(run, num_rounds=1)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    assert len(site.train(run, num_rounds=2).rows) == 6


@pytest.mark.parametrize("start_round", [-1, 0, 2, 3, 5, 8])
def test_a_wrong_start_is_refused_with_those_that_can_be(tmp_path, start_round):
    site = Site(small_federation())
    site.train(tmp_path / "run", num_rounds=6)
    sorted((tmp_path / "run/checkpoints").iterdir())[0].write_bytes(b"")  # of round 4
    before = contents(tmp_path / "run")
    expected = r"expected 1, 6 or 7, as 6 rounds are done in .*, and there are checkpoints of round 5, 6, found {}$"
    with pytest.raises(ConfigError, match=expected.format(start_round)):
        site.train(tmp_path / "run", num_rounds=8, start_round=start_round)
    assert contents(tmp_path / "run") == before


def filed(federation, folder):
    """A site whose clients keep their states in files."""
    return Site(
        federation, states=lambda client: lambda experiment: StateFiles(folder, experiment, client)
    )


@pytest.mark.parametrize("start_round", [5, 6, 7])
@pytest.mark.parametrize("fraction", [1.0, 0.67])
def test_a_run_goes_back_and_ends_as_the_uninterrupted_one(tmp_path, start_round, fraction):
    federation = small_federation(encoder=batch_norm_encoder)
    site, whole = (
        filed(federation, tmp_path / "states"),
        filed(federation, tmp_path / "other states"),
    )
    options = {
        "num_rounds": 8,
        "head_momentum": 0.9,
        "fraction_train": fraction,
        "server_momentum": 0.5,
    }
    expected = whole.train(tmp_path / "whole", **options)
    site.train(tmp_path / "run", **{**options, "num_rounds": 6})
    found = site.train(tmp_path / "run", start_round=start_round, **options)
    assert plain(found) == plain(expected)
    assert timeless(Run(tmp_path / "run").rows()) == timeless(Run(tmp_path / "whole").rows())
    experiments = [Run(tmp_path / name).config.run.experiment for name in ("run", "whole")]
    for client, state in found.client_states.items():
        heads = [
            StateFiles(tmp_path / name, experiment, client).load(state.round).head
            for name, experiment in zip(("states", "other states"), experiments, strict=True)
        ]
        assert {name: value.tolist() for name, value in heads[0].items()} == {
            name: value.tolist() for name, value in heads[1].items()
        }


def test_a_lie_that_was_taken_is_undone_for_good_and_what_was_undone_is_kept(tmp_path, caplog):
    site, whole, run = (
        filed(small_federation(), tmp_path / "states"),
        Site(small_federation()),
        tmp_path / "run",
    )

    def lying(message, answer):
        reply = answer(message)
        if int(message.metadata.group_id) >= 4:
            reply.content["arrays"]["2.bias"] = Array(np.full(4, 1e30, np.float32))
        return reply

    site.wire.twists[3] = lying
    poisoned = site.train(run, num_rounds=6)
    assert poisoned.state.encoder.abs().max() > 1e20
    site.wire.twists.clear()
    caplog.set_level("INFO", logger="fedgradnorm")
    result = site.train(run, num_rounds=6, start_round=5)
    assert result.state.encoder.abs().max() > 1e20  # round 4 has the first lie
    assert (
        f"the rounds after round 4 are undone: their lines and checkpoints are in {run / 'undone/1'}"
        in caplog.text
    )
    assert [row["round"] for row in Run(run).rows()] == [
        round for round in range(1, 7) for _ in "abc"
    ]
    assert sorted(path.name for path in (run / "undone/1").iterdir()) == sorted(
        ["checkpoints", "encoder.safetensors", "metrics.jsonl", "report.html", "summary.json"]
    )
    assert [
        json.loads(line)["round"]
        for line in (run / "undone/1/metrics.jsonl").read_text().splitlines()
    ] == [5, 5, 5, 6, 6, 6]
    assert sorted(path.name[:14] for path in (run / "undone/1/checkpoints").iterdir()) == [
        "round-00000005",
        "round-00000006",
    ]
    site.train(run, num_rounds=7, start_round=5)
    assert {path.name for path in (run / "undone").iterdir()} == {"1", "2"}
    assert len(site.train(run, num_rounds=2, start_round=1).rows) == 6  # which replaces all of it
    assert not (run / "undone").exists()
    assert plain(site.train(run, num_rounds=4)) == plain(whole.train(num_rounds=4))


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_run_that_was_killed_on_its_way_back_has_lost_nothing(tmp_path, monkeypatch, calls):
    site, whole, run = Site(small_federation()), Site(small_federation()), tmp_path / "run"
    site.train(run, num_rounds=6)
    rename, made, lines = Path.rename, [], (run / "metrics.jsonl").read_bytes()

    def killed(path, target):
        made.append(path)
        if len(made) > calls:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        site.train(run, num_rounds=7, start_round=5)
    monkeypatch.undo()
    assert (run / "metrics.jsonl").read_bytes() == lines
    assert {path.name[:14] for path in run.rglob("round-*")} == {
        f"round-0000000{round}" for round in (4, 5, 6)
    }
    assert plain(site.train(run, num_rounds=7)) == plain(whole.train(num_rounds=7))


def test_what_is_wrong_is_said_before_a_run_goes_back(tmp_path):
    site, run = Site(small_federation()), tmp_path / "run"
    site.train(run, num_rounds=5)
    before = {path: content for path, content in contents(run).items() if path.name != STATUS}
    for wrong, message in (
        ({"head_lr": 0.5}, "changed: train.head_lr"),
        (
            {"num_rounds": 3},
            "train.num_rounds: expected at least the 4 rounds that are done, found 3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            site.train(run, **{"num_rounds": 8, **wrong}, start_round=5)
    for number in (2, 3, 4):
        site.leave(number)
    with pytest.raises(StoppedError, match="0 clients are connected"):
        site.train(run, num_rounds=8, start_round=5)
    assert {
        path: content for path, content in contents(run).items() if path.name != STATUS
    } == before


def test_a_run_across_machines_is_not_resumed_without_them(tmp_path):
    site = Site(small_federation())
    site.train(tmp_path / "run", num_rounds=2)
    with pytest.raises(
        ConfigError,
        match="are on other machines: to resume this run, start its Flower app again",
    ):
        resume(tmp_path / "run", num_rounds=4)
    assert not list((tmp_path / "run" / "models" / "heads").iterdir())


@pytest.mark.parametrize("numbers", [{"min_nodes": 0}, {"node_timeout": -1}, {"round_timeout": 0}])
def test_limits_out_of_range_are_refused(numbers):
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        Limits(**numbers)
