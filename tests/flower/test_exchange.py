"""Messages and replies: a late reply delays no other, and enough answers shorten the wait."""

import math
import threading

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedgradnorm import StoppedError
from fedgradnorm.flower import GridEngine
from fedgradnorm.flower import engine as engine_module
from fedgradnorm.flower import exchange as exchange_module
from fedgradnorm.flower.exchange import exchange
from fedgradnorm.flower.limits import Limits
from fedgradnorm.flower.messages import Refusal, refusal_reply
from fedgradnorm.flower.roster import roster_of
from tests.flower.nodes import AT_ONCE, Site, dropped, in_round, lost, raising
from tests.helpers import small_federation

pytestmark = pytest.mark.filterwarnings("ignore:client '.' (never|seldom) counted")

LONG = 600.0
"""Seconds that no test waits: it would be stuck."""


class Apart(Grid):
    """A site's wire behind calls that wait, as Flower's do while a reply is on its way.

    They wait for ``held`` nodes, until ``release`` is set.
    """

    def __init__(self, site, held=()):
        self.wire, self.held, self.release = site.wire, set(held), threading.Event()
        self.to, self.lock = {}, threading.Lock()

    def set_run(self, run):
        self.wire.set_run(run)

    @property
    def run(self):
        return self.wire.run

    def create_message(self, *words):
        return self.wire.create_message(*words)

    def get_node_ids(self):
        return self.wire.get_node_ids()

    def push_messages(self, messages):
        messages = list(messages)
        with self.lock:
            ids = self.wire.push_messages(messages)
        self.to |= {
            id: message.metadata.dst_node_id for id, message in zip(ids, messages, strict=True)
        }
        return ids

    def pull_messages(self, message_ids):
        if any(self.to[id] in self.held for id in message_ids):
            self.release.wait(LONG)
        with self.lock:
            return self.wire.pull_messages(message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("Flower's own call waits for too long")


class ApartEngine(GridEngine):
    def create_message(self, content, kind, node, group, ttl=None):
        return self.grid.create_message(
            content, kind, node, group, ttl or self.limits.round_timeout
        )


def apart_engine(site, held=(), **limits):
    grid = Apart(site, held)
    engine = ApartEngine(
        grid,
        roster_of(site.federation),
        site.engine().layout,
        Limits(**{**AT_ONCE, "min_nodes": 3, **limits}),
    )
    engine.experiment = "experiment"
    return engine


def hello(grid, node):
    return grid.create_message(RecordDict({}), "train", node, "1", LONG)


@pytest.fixture
def site():
    site = Site(small_federation())
    for number in (2, 3, 4):
        site.wire.nodes[number] = lambda message, _: Message(RecordDict({}), reply_to=message)
    return site


def test_a_reply_that_is_on_its_way_holds_nobody_longer_than_the_time(site):
    grid = Apart(site, held={3})
    came = exchange(grid, [hello(grid, node) for node in (2, 3, 4)], timeout=0.5)
    assert not grid.release.is_set()
    assert {reply.metadata.src_node_id for reply in came.replies} == {2, 4}
    assert (came.seconds, came.early) == (0.5, False)


def test_when_enough_have_answered_the_others_have_as_long_again(site):
    grid = Apart(site, held={3})
    came = exchange(grid, [hello(grid, node) for node in (2, 3, 4)], timeout=LONG, enough=2)
    assert {reply.metadata.src_node_id for reply in came.replies} == {2, 4}
    assert came.seconds < LONG
    assert came.early


def test_who_is_only_a_little_slower_than_enough_others_counts(site):
    grid = Apart(site, held={3})
    threading.Timer(0.3, grid.release.set).start()
    came = exchange(grid, [hello(grid, node) for node in (2, 3, 4)], timeout=LONG, enough=2)
    assert {reply.metadata.src_node_id for reply in came.replies} == {2, 3, 4}
    assert not came.early


def refusing(message, _):
    return refusal_reply(Refusal(code="wrong-client", words="no"), message)


def failing(message, _):
    return Message(Error(2, "no"), reply_to=message)


@pytest.mark.parametrize("answer", [failing, refusing])
def test_an_error_and_a_refusal_are_answers_and_not_among_the_enough(site, answer):
    site.wire.nodes[2] = answer
    grid = Apart(site, held={3})
    came = exchange(grid, [hello(grid, node) for node in (2, 3, 4)], timeout=1.5, enough=2)
    assert len(came.replies) == 2
    assert not came.early


class Busy:
    """Fails some times, and then does what it stands for."""

    def __init__(self, call, times):
        self.call, self.left = call, times

    def __call__(self, *words):
        if self.left:
            self.left -= 1
            raise OSError("busy")
        return self.call(*words)


@pytest.fixture
def at_once(monkeypatch):
    """A call that failed is made again without waiting."""
    monkeypatch.setattr(exchange_module, "AGAIN", 0.01)
    monkeypatch.setattr(exchange_module, "POLL", 0.01)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["push_messages", "pull_messages", "get_node_ids"])
def test_a_call_that_fails_is_made_again(monkeypatch, name):
    """Such as to a SuperLink whose database is busy for a moment, and which answers 500 then."""
    site, same = Site(small_federation()), Site(small_federation())
    engine = apart_engine(site, round_timeout=LONG)
    monkeypatch.setattr(engine.grid, name, Busy(getattr(engine.grid, name), 2))
    result, expected = site.train(engine=engine, num_rounds=2), same.train(num_rounds=2)
    assert torch.equal(result.state.encoder, expected.state.encoder)
    assert not [row["dropped"] for row in result.rows if row["dropped"]]


@pytest.mark.usefixtures("at_once")
def test_a_superlink_that_says_nothing_ends_the_run_in_time(monkeypatch):
    site = Site(small_federation())
    engine = apart_engine(site)
    monkeypatch.setattr(engine_module, "SHORTEST", 0.2)
    monkeypatch.setattr(engine.grid, "get_node_ids", Busy(None, 10**9))
    with pytest.raises(
        StoppedError,
        match="the SuperLink has not said within 0.2 s which nodes are connected: OSError: busy",
    ):
        site.train(engine=engine, num_rounds=1)
    monkeypatch.setattr(engine.grid, "get_node_ids", lambda: engine.grid.release.wait(LONG))
    with pytest.raises(StoppedError, match=r"within 0.2 s which nodes are connected$"):
        site.train(engine=engine, num_rounds=1)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["push_messages", "pull_messages"])
def test_what_the_superlink_fails_at_is_no_lateness_of_a_client(monkeypatch, caplog, name):
    site = Site(small_federation())
    engine = apart_engine(site, round_timeout=0.3)
    engine.wait(3)
    sound = getattr(engine.grid, name)
    monkeypatch.setattr(engine.grid, name, Busy(None, 10**9))
    what = "message could not be sent" if name == "push_messages" else "reply could not be fetched"
    with pytest.raises(StoppedError, match=f"a, b, c: no report: its {what}: OSError: busy"):
        site.train(engine=engine, num_rounds=3, max_retries=0)
    monkeypatch.setattr(engine.grid, name, sound)
    assert not engine.rests.times
    assert " of 3 exchanges, the last: OSError: busy" in caplog.text


@pytest.mark.usefixtures("at_once")
def test_a_reply_that_is_lost_by_a_fetch_that_failed_is_no_lateness(monkeypatch):
    """The SuperLink deletes a reply when it gives it out; then it says that the message expired."""
    site = Site(small_federation())
    engine = apart_engine(site, round_timeout=LONG)
    engine.wait(3)
    pull, failed = engine.grid.pull_messages, set()

    def pulled(ids):
        (id,) = ids
        if engine.grid.to[id] != 3:
            return pull(ids)
        if id not in failed:
            failed.add(id)
            raise OSError("busy")
        return [Message(Error(3, "expired"), reply_to=sent[id]) for _ in pull(ids)]

    sent, push = {}, engine.grid.push_messages

    def pushed(messages):
        ids = push(messages)
        sent.update(zip(ids, messages, strict=True))
        return ids

    monkeypatch.setattr(engine.grid, "pull_messages", pulled)
    monkeypatch.setattr(engine.grid, "push_messages", pushed)
    result = site.train(engine=engine, num_rounds=2, eval_every=9)
    assert set(dropped(result.rows, "b").values()) == {
        "no report: its reply could not be fetched: OSError: busy"
    }
    assert not engine.rests.times


class Stopped(BaseException):
    """What Flower raises when the run is not going on any more."""


@pytest.mark.parametrize("name", ["push_messages", "pull_messages"])
def test_that_the_run_is_over_is_raised_at_once(site, monkeypatch, name):
    grid = Apart(site)

    def over(_):
        raise Stopped

    monkeypatch.setattr(grid, name, over)
    with pytest.raises(Stopped):
        exchange(grid, [hello(grid, 2)], timeout=LONG)


def test_a_message_that_flower_does_not_take_is_not_waited_for(site, monkeypatch):
    grid = Apart(site)
    messages = [hello(grid, 2)]
    monkeypatch.setattr(grid, "push_messages", lambda _: [None])
    assert list(exchange(grid, messages, timeout=LONG).replies) == []


def test_threads_change_no_number():
    site, same = Site(small_federation(), seed=3), Site(small_federation(), seed=3)
    result, expected = site.train(engine=apart_engine(site), num_rounds=3), same.train(num_rounds=3)
    assert torch.equal(result.state.encoder, expected.state.encoder)
    assert result.weights == expected.weights


def test_a_share_of_replies_ends_a_round_without_the_slow_one():
    site = Site(small_federation())
    engine = apart_engine(site, round_timeout=LONG, min_replies=0.6)
    site.train(engine=engine, num_rounds=1)  # all are known
    engine.grid.held = {3}
    result = site.train(engine=engine, num_rounds=1)
    assert dropped(result.rows, "b") == {
        1: "no report: no answer within twice the time of enough others"
    }
    assert not dropped(result.rows, "a") | dropped(result.rows, "c")


def test_a_share_of_answers_ends_a_test_without_the_slow_one_and_it_rests():
    site = Site(small_federation())
    engine = apart_engine(site, round_timeout=LONG, min_replies=0.6)
    push, tested = engine.grid.push_messages, []

    def pushed(messages):
        messages = list(messages)
        ids = push(messages)
        engine.grid.held = {3} if messages[0].metadata.message_type == "evaluate" else set()
        if engine.grid.held:
            tested.append({message.metadata.dst_node_id for message in messages})
        return ids

    engine.grid.push_messages = pushed
    result = site.train(engine=engine, num_rounds=5, eval_every=1)
    assert tested == [{2, 3, 4}, {2, 3, 4}, {2, 4}, {2, 3, 4}, {2, 4}]
    assert not dropped(result.rows, "b")
    assert {row["client"] for row in result.rows if row["test_loss"] is None} == {"b"}


def test_fewer_than_the_sound_reports_that_a_round_needs_are_never_enough():
    site = Site(small_federation())
    engine = apart_engine(site, round_timeout=2.0, min_replies=0.1)
    engine.wait(3)
    engine.grid.held = {3}
    with pytest.raises(
        StoppedError,
        match=r"2 sound reports, expected at least 3: b: no report: no answer within 2 s",
    ):
        site.train(engine=engine, num_rounds=1, min_clients=3, max_retries=0)


# -------------------------------------------------------------------------------------------- rests


def test_a_client_that_is_late_again_and_again_rests_for_twice_as_long_each_time(caplog):
    site = Site(small_federation())
    asked = []
    site.wire.twists[3] = lambda message, answer: (
        asked.append(int(message.metadata.group_id))
        if message.metadata.group_id != "hello"
        else answer(message)
    )
    result = site.train(num_rounds=20)
    assert asked == [1, 2, 4, 7, 12]  # 0, 1, 2, 4, 8 rounds of rest
    reasons = dropped(result.rows, "b")
    assert reasons[2] == "no report: no answer within 3600 s"
    assert {reasons[round] for round in (3, 5, 13, 20)} == {
        "no report: it rests, as it was late again and again"
    }
    assert "client b was late in 3 rounds in a row: it rests for 2" in caplog.text
    assert all(
        row["test_loss"] is None for row in result.rows if row["client"] == "b" and row["round"] > 1
    )
    assert not dropped(result.rows, "a")


def test_one_answer_ends_the_count_and_so_does_an_error_of_its_app():
    site = Site(small_federation())
    turns = {1: lost, 2: raising, 3: lost, 4: None, 5: lost, 6: lost}

    def twist(message, answer):
        turn = (
            turns.get(int(message.metadata.group_id))
            if message.metadata.group_id != "hello"
            else None
        )
        return turn(message, answer) if turn else answer(message)

    site.wire.twists[3] = twist
    result = site.train(num_rounds=8)
    rests = [round for round, reason in dropped(result.rows, "b").items() if "rests" in reason]
    assert rests == [7]  # late in 1, 3, 5 and 6


@pytest.mark.parametrize(("limits", "training"), [({}, {"min_clients": 2}), ({"max_rest": 0}, {})])
def test_nobody_rests_where_the_others_are_too_few_or_where_it_is_switched_off(limits, training):
    site = Site(small_federation())
    late = [in_round(number, lost) for number in (1, 2)]
    site.wire.twists[3] = lambda message, answer: late[0](message, lambda one: late[1](one, answer))
    site.leave(2)  # only two are left
    result = site.train(num_rounds=3, limits=limits, **training)
    assert [row["round"] for row in result.rows if row["client"] == "b" and row["retries"]] == (
        [1, 2] if training else []
    )
    assert 3 not in dropped(result.rows, "b")


def test_another_node_for_a_client_that_rests_is_asked_at_once():
    site = Site(small_federation())
    site.wire.twists[3] = lambda message, answer: (
        lost(message, answer) if message.metadata.group_id in "124" else answer(message)
    )

    def on_round(rows):
        if rows[0]["round"] == 4:
            site.leave(3)
            site.join(9, "b")

    result = site.train(num_rounds=6, on_round=on_round)
    assert sorted(dropped(result.rows, "b")) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "limits",
    [
        *({"min_replies": 0.0}, {"min_replies": 1.5}, {"max_rest": -1}),
        *(
            {name: value}
            for name in ("round_timeout", "node_timeout", "greeting_timeout")
            for value in (math.inf, math.nan, 1e12, -1.0)
        ),
    ],
)
def test_limits_out_of_range_are_named(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)
