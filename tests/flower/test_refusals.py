"""A refused node explains the absence of the client that it was refused as, and of no other."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedgradnorm.flower import LocalGrid
from fedgradnorm.flower.messages import Refusal, refusal_in, refusal_reply
from tests.flower.nodes import Site, dropped, in_round
from tests.helpers import small_federation

pytestmark = pytest.mark.filterwarnings("ignore:client '.*' never counted")


def saying(site, number, **fields):
    """Let a node say something else of itself when it is asked who it is."""
    node = site.wire.nodes[number]

    def answer(message, context):
        kind, reply = message.content["fedgradnorm"]["kind"], node(message, context)
        if kind == "hello":
            reply.content["fedgradnorm"] = ConfigRecord({**reply.content["fedgradnorm"], **fields})
        return reply

    site.wire.nodes[number] = answer


def test_a_refused_node_is_not_the_reason_of_a_client_that_its_words_name():
    site = Site(small_federation(("anomaly", "modulation", "signal")))
    saying(site, 3, task="signal")
    site.leave(4)
    engine = site.engine()
    rows = site.train(engine=engine, num_rounds=1).rows
    refusal = engine.attendance.refusals[3]
    assert (refusal.code, refusal.client) == ("other-task", "modulation")
    assert dropped(rows, "modulation") == {1: f"no report: {refusal.words}"}
    assert dropped(rows, "signal") == {1: "no report: not connected"}


def refusing(refusal):
    """A twist that answers with a refusal."""
    return lambda message, _: refusal_reply(refusal, message)


def test_a_refusal_drops_its_client_and_a_wrong_client_is_asked_again_who_it_is():
    site = Site(small_federation())
    engine = site.engine(ask_again=3600)
    refusal = Refusal(code="wrong-client", words="a message for client 'b' came\nto client 'c'")
    site.wire.twists[3] = in_round(2, refusing(refusal))
    rows = site.train(engine=engine, num_rounds=3).rows
    assert dropped(rows, "b") == {2: "no report: a message for client 'b' came to client 'c'"}
    hellos = [
        message.metadata.dst_node_id
        for message in site.wire.messages
        if message.metadata.group_id == "hello" and not message.metadata.reply_to_message_id
    ]
    assert sorted(hellos) == [2, 3, 3, 4]


def test_words_that_name_a_client_ask_nobody_again():
    site = Site(small_federation())
    engine = site.engine(ask_again=3600)
    refusal = Refusal(code="no-greeting", words="a message for client 'b' came to client 'c'")
    site.wire.twists[3] = in_round(1, refusing(refusal))
    site.train(engine=engine, num_rounds=2)
    hellos = [one for one in site.wire.messages if one.metadata.group_id == "hello"]
    assert len(hellos) == 6  # three questions and three answers


@pytest.mark.parametrize(
    "record",
    [{}, {"code": "odd", "words": "x"}, {"code": "no-answer"}, {"code": 1, "words": "x" * 10**6}],
)
def test_a_damaged_refusal_is_a_failure_like_any_other(record):
    site = Site(small_federation())
    record = ConfigRecord(record)
    site.wire.twists[3] = in_round(
        1, lambda message, _: Message(RecordDict({"refusal": record}), reply_to=message)
    )
    (why,) = dropped(site.train(num_rounds=2).rows, "b").values()
    assert why.startswith("no report: refusal.")
    assert len(why) < 400


def test_a_refusal_comes_back_as_it_was():
    refusal = Refusal(code="wrong-client", words="not here", client="b")
    message = LocalGrid({}).create_message(RecordDict({}), "train", 2, "1")
    assert refusal_in(refusal_reply(refusal, message)) == refusal
    assert refusal_in(Message(RecordDict({}), reply_to=message)) is None
