"""Which node stands for which client, without a grid: nodes are numbers, and the time is given."""

import pytest

from fedgradnorm.flower.attendance import Attendance
from fedgradnorm.flower.messages import VERSIONS, Greeting, Refusal

SILENT = Refusal(code="no-answer", words="no answer within 1 s")


def hello(client, task="sign"):
    return Greeting(client=client, task=task, **VERSIONS)


def admit(greeting):
    """Every client is admitted, except client z and other tasks than `sign`."""
    id, task = greeting.client, greeting.task
    if id == "z":
        return Refusal(code="unknown-client", words="no 'z', but 'a'", client=id)
    if task != "sign":
        return Refusal(code="other-task", words=f"'{id}' says '{task}'", client=id)
    return None


@pytest.fixture
def attendance():
    return Attendance(admit, ask_again=10)


def test_a_node_stands_for_the_client_that_it_names(attendance):
    attendance.see({5, 7})
    assert attendance.to_ask(0) == [5, 7]
    connected = attendance.hear({5: hello("b"), 7: hello("a")}, 0)
    assert [greeting.client for greeting in connected] == ["b", "a"]
    assert attendance.clients == ["a", "b"]
    assert attendance.nodes == {"b": 5, "a": 7}
    assert attendance.to_ask(1e9) == []


def test_a_node_that_is_gone_stands_for_nobody(attendance):
    attendance.see({5})
    attendance.hear({5: hello("a")}, 0)
    attendance.see(set())
    assert attendance.nodes == {}
    attendance.see({5})
    assert attendance.to_ask(20) == [5]


def test_a_refused_node_explains_the_absence_of_its_own_client_alone(attendance):
    attendance.see({1, 2})
    attendance.hear({1: hello("b", task="a"), 2: hello("z")}, 0)
    assert {node: why.code for node, why in attendance.refusals.items()} == {
        1: "other-task",
        2: "unknown-client",
    }
    assert attendance.why_absent("b") == "'b' says 'a'"
    assert attendance.why_absent("z") == "no 'z', but 'a'"
    assert attendance.why_absent("a") is None


def test_what_a_node_says_without_a_client_explains_nobodys_absence(attendance):
    attendance.see({1})
    attendance.hear({1: Refusal(code="no-greeting", words="odd 'a'")}, 0)
    assert attendance.words == {1: "odd 'a'"}
    assert attendance.why_absent("a") is None


def test_two_nodes_that_claim_one_client_both_stay_out_until_one_is_gone(attendance):
    attendance.see({1, 2})
    assert attendance.hear({1: hello("a"), 2: hello("a")}, 0) == []
    assert {why.code for why in attendance.refusals.values()} == {"key-claimed"}
    assert attendance.to_ask(9) == []
    attendance.see({2})
    assert attendance.to_ask(9) == [2]
    attendance.hear({2: hello("a")}, 9)
    assert attendance.nodes == {"a": 2}
    assert attendance.refusals == {}


def test_a_silent_node_keeps_its_claim_and_one_that_says_something_else_does_not(attendance):
    attendance.see({1, 2})
    attendance.hear({1: hello("a"), 2: hello("a")}, 0)
    attendance.hear({1: hello("a"), 2: SILENT}, 10)
    assert attendance.nodes == {}
    attendance.hear({1: hello("a"), 2: Refusal(code="no-greeting", words="odd")}, 20)
    assert attendance.nodes == {"a": 1}


def test_the_key_of_a_connected_node_is_in_use(attendance):
    attendance.see({1})
    attendance.hear({1: hello("a")}, 0)
    attendance.see({1, 2})
    attendance.hear({2: hello("a")}, 0)
    assert attendance.refusals[2].code == "key-in-use"
    assert attendance.nodes == {"a": 1}


def test_a_silent_node_is_asked_less_and_less_often_and_others_are_not(attendance):
    attendance.see({1, 2})
    asked = {1: [], 2: []}
    for now in range(100):
        answers = {1: SILENT, 2: hello("z")}
        new = attendance.to_ask(now)
        attendance.hear({node: answers[node] for node in new}, now)
        for node in new:
            asked[node].append(now)
    assert asked == {1: [0, 10, 30, 70], 2: list(range(0, 100, 10))}


def test_a_node_that_became_another_client_is_asked_at_once(attendance):
    attendance.see({1})
    attendance.hear({1: hello("a")}, 0)
    attendance.leave("a")
    assert attendance.clients == []
    assert attendance.to_ask(0) == [1]
    attendance.hear({1: hello("b")}, 0)
    assert attendance.nodes == {"b": 1}
    attendance.leave("nobody")
    assert attendance.nodes == {"b": 1}


def test_a_refusal_is_one_line_and_is_logged_when_it_changes(attendance, caplog):
    attendance.see({1})
    for words in ("no\x1b\nluck", "no\x1b\nluck", "other"):
        attendance.hear({1: Refusal(code="no-answer", words=words)}, 0)
    assert len(caplog.records) == 2
    assert "no\\x1b luck" in caplog.text
