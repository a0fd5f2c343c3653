"""A client whose state is lost: it refuses, or uses its newest state or a fresh head."""

import shutil
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedgradnorm import RunError, StoppedError
from fedgradnorm.client import ClientState
from fedgradnorm.flower.client import Node
from fedgradnorm.flower.messages import control_of
from fedgradnorm.flower.states import LostStateError, StateFiles, begin
from fedgradnorm.runs.reader import Run
from tests.flower.nodes import Site, dropped, in_round, lost, notes_of
from tests.flower.own_app import Own
from tests.flower.place import DIGITS, Place
from tests.helpers import batch_norm_encoder, small_federation

pytestmark = pytest.mark.filterwarnings("ignore::fedgradnorm.FedGradNormWarning")

OPTIONS = {"num_rounds": 6, "eval_every": 1, "head_momentum": 0.9}


class Forgetful(Site):
    """A site whose nodes have a policy for lost states; client b loses states after a round."""

    def __init__(self, policy, **options):
        self.policy = policy
        super().__init__(small_federation(encoder=batch_norm_encoder), **options)

    def node(self, client):
        return Node(
            self.federation,
            self.federation.client(client),
            self.seed,
            self.states(client),
            self.policy,
        )

    def losing(self, after, rounds):
        """An ``on_round`` after which b has no states of these rounds."""

        def act(rows):
            if rows[0]["round"] == after:
                store = self.stores["b"].by_round
                for round in rounds:
                    store.pop(round, None)

        return act


def begun(site):
    """The base and F(0) of every message for training to b, and what its replies say they began with."""
    asked, said = [], []
    for one in site.wire.messages:
        if one.metadata.message_type != "train":
            continue
        if one.metadata.reply_to_message_id:
            if "arrays" in one.content and one.content["fedgradnorm"]["client"] == "b":
                said.append(one.content["fedgradnorm"].get("began"))
        elif control_of(one).client == "b":
            asked.append((control_of(one).base, control_of(one).initial_loss))
    return asked, said


def test_it_is_refused_unless_the_node_says_otherwise():
    site = Forgetful("refuse")
    rows = site.train(on_round=site.losing(3, range(9)), **OPTIONS).rows
    assert dropped(rows, "b").keys() == {4, 5, 6}


def test_the_newest_state_stands_in():
    site = Forgetful("newest")
    engine = site.engine()
    notes, note = notes_of(site.losing(4, (3, 4)))
    rows = site.train(engine=engine, on_round=note, **OPTIONS).rows
    assert not dropped(rows, "b")
    assert notes == {
        1: {},
        2: {},
        3: {},
        4: {},
        5: {"b": ["its state of round 4 is lost: it trained with that of round 2"]},
        6: {},
    }
    asked, said = begun(site)
    first = rows[1]["initial_loss"]
    assert asked == [(0, None), *((round, first) for round in range(1, 6))]
    assert said == [None, None, None, None, 2, None]
    assert {row["initial_loss"] for row in rows if row["client"] == "b"} == {first}


def message_for(site, base):
    """A message to b that names its round of a finished run's as the one to begin with."""
    sent = next(
        one
        for one in reversed(site.wire.messages)
        if one.content["fedgradnorm"].get("kind") == "train"
    )
    control = {**sent.content["fedgradnorm"], "client": "b", "base": base, "round": 9, "keep": [0]}
    content = RecordDict(
        {
            "arrays": sent.content["arrays"],
            "config": sent.content["config"],
            "fedgradnorm": ConfigRecord(control),
        }
    )
    return site.wire.create_message(content, "train", 3, "9")


def test_head_momentum_and_buffers_are_those_of_the_newest_state():
    site = Forgetful("newest")
    site.train(on_round=site.losing(4, (3, 4)), num_rounds=4, head_momentum=0.9)
    node, store, states = site.node("b"), site.stores["b"], []
    for base in (4, 2):
        node.answer(message_for(site, base))
        states.append(store.load(9))
    for part in ("head", "head_velocity", "encoder_buffers"):
        one, other = (getattr(state, part) for state in states)
        assert one
        assert {name: value.tolist() for name, value in one.items()} == {
            name: value.tolist() for name, value in other.items()
        }


@pytest.mark.parametrize("policy", ["newest", "fresh"])
def test_a_fresh_head_keeps_the_first_loss_that_the_server_knows(policy, caplog):
    site = Forgetful(policy)
    engine = site.engine()
    notes, note = notes_of(site.losing(3, range(9)))
    rows = [
        row
        for row in site.train(engine=engine, on_round=note, **OPTIONS).rows
        if row["client"] == "b"
    ]
    assert not dropped(rows, "b")
    first = rows[0]["initial_loss"]
    assert [row["initial_loss"] for row in rows] == [first] * 6
    text = f"its state of round 3 is lost: it trained with a fresh head and its F(0) of {first:.4g}"
    assert notes[4] == {"b": [text]}
    assert notes[5] == notes[6] == {}
    assert f"client b: {text}" in caplog.text
    assert begun(site)[1] == [None, None, None, 0, None, None]


def test_a_fresh_head_is_the_initial_one():
    site = Forgetful("fresh")
    store, node = site.stores["b"], site.node("b")
    store.save(ClientState({}, 7.0, round=3), [0])
    begin_fresh = begin(store, 5, "fresh", lambda: node.initial, 1.25)
    assert (begin_fresh.round, begin_fresh.lost, begin_fresh.state) == (
        0,
        True,
        replace(node.initial, initial_loss=1.25),
    )
    newest = begin(store, 5, "newest", lambda: node.initial, 1.25)
    assert (newest.round, newest.lost, newest.state.initial_loss) == (3, True, 7.0)
    assert (
        begin(store, 2, "newest", lambda: node.initial, 1.25).state.initial_loss == 1.25
    )  # the one of round 3 is of a later time
    assert not begin(store, 3, "newest", lambda: node.initial).lost
    assert not begin(store, 0, "refuse", lambda: node.initial).lost


@pytest.mark.parametrize("policy", ["newest", "fresh"])
def test_a_client_that_does_not_train_is_tested_likewise(policy):
    site = Forgetful(policy)
    engine = site.engine()
    notes, note = notes_of(site.losing(2, (2,)))
    participants = (("a", "b", "c"), ("a", "b", "c"), ("a", "c"))
    rows = site.train(
        engine=engine, on_round=note, num_rounds=4, eval_every=1, participants=participants
    ).rows
    assert all(row["test_loss"] is not None for row in rows)
    start = (
        "that of round 1"
        if policy == "newest"
        else f"a fresh head and its F(0) of {rows[1]['initial_loss']:.4g}"
    )
    assert (
        notes[3] == notes[4] == {"b": [f"its state of round 2 is lost: it was tested with {start}"]}
    )


def test_what_stands_in_is_kept_until_its_report_counts():
    site = Forgetful("newest")
    site.wire.twists[3] = lambda message, answer: (
        lost(message, answer) if control_of(message).round in (5, 6, 7, 8) else answer(message)
    )
    engine = site.engine(keep=1, max_rest=0)
    rows = site.train(
        engine=engine, on_round=site.losing(4, (3, 4)), **{**OPTIONS, "num_rounds": 9}
    ).rows
    assert dropped(rows, "b").keys() == {5, 6, 7, 8}
    asked, said = begun(site)
    assert asked[-1][0] == 4
    assert said[-1] == 2


class Liar:
    """Lets b say that it began with the state of some round, from round 2 on."""

    def __init__(self, **said):
        self.said = said

    def __call__(self, message, answer):
        reply = answer(message)
        if control_of(message).round > 1:
            reply.content["fedgradnorm"] = ConfigRecord(
                {**reply.content["fedgradnorm"], **self.said}
            )
        return reply


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"began": 1}, "began: expected a round before 1, found 1"),
        ({"began": 10**9}, "began: expected a round before 1, found 1000000000"),
        ({"began": -1}, "fedgradnorm.began: Input should be greater than or equal to 0, found -1"),
        ({"began": "1"}, "fedgradnorm.began: Input should be a valid integer, found '1'"),
        ({"data_since": 7}, "data_since: expected a round before 2, found 7"),
        (
            {"data_since": 1, "data_before": -1},
            "fedgradnorm.data_before: Input should be greater than or equal to 0, found -1",
        ),
        ({"odd": 1}, "fedgradnorm.odd: Extra inputs are not permitted, found 1"),
    ],
)
def test_what_cannot_be_is_no_report(said, why):
    site = Forgetful("refuse")
    site.wire.twists[3] = in_round(2, Liar(**said))
    assert dropped(site.train(num_rounds=3).rows, "b") == {2: f"no report: {why}"}


# -------------------------------------------------------------------------------------------- files


def test_damaged_files_are_lost_and_those_of_others_or_beyond_reach_are_not(tmp_path):
    states = StateFiles(tmp_path, "x", "b")
    for round in (1, 2, 3):
        states.save(ClientState({"w": torch.ones(1) * round}, 0.5, round=round), [0])
    (states.folder / "round-00000003.safetensors").write_bytes(b"half")
    with pytest.raises(LostStateError, match="cannot be read"):
        begin(states, 3, "refuse", dict)
    assert begin(states, 3, "newest", dict).round == 2
    (states.folder / "round-00000002.safetensors").write_bytes(b"")
    assert begin(states, 3, "newest", dict).round == 1
    (states.folder / "round-00000004.safetensors").mkdir()
    with pytest.raises(
        RunError, match="round-00000004.safetensors: cannot be read: Is a directory"
    ):
        begin(states, 4, "newest", dict)
    other = StateFiles(tmp_path, "x", "c")
    (tmp_path / "x" / "b").rename(tmp_path / "x" / "c")
    with pytest.raises(RunError, match="it is that of client 'b'"):
        begin(other, 1, "fresh", dict)


@pytest.mark.parametrize(
    ("policy", "told"), [("newest", "that of round 1"), ("fresh", "a fresh head and its F(0) of ")]
)
def test_a_node_whose_folder_came_from_an_older_backup_trains_again(tmp_path, policy, told, caplog):
    place = Place(tmp_path, DIGITS)
    place.wire.contexts[3].node_config["lost-state"] = policy
    place.deployed(settings="train.num_rounds=1")
    shutil.copytree(tmp_path / "states" / "1", tmp_path / "backup")
    place.deployed(settings="train.num_rounds=3")
    shutil.rmtree(tmp_path / "states" / "1")
    (tmp_path / "backup").rename(tmp_path / "states" / "1")
    rows = [
        row
        for row in Run(place.deployed(settings="train.num_rounds=5")).rows()
        if row["client"] == place.clients[1]
    ]
    assert not any(row["dropped"] for row in rows)
    assert len({row["initial_loss"] for row in rows}) == 1
    assert (
        caplog.text.count(
            f"client {place.clients[1]}: its state of round 3 is lost: it trained with {told}"
        )
        == 1
    )


def test_an_unknown_word_for_it_keeps_a_node_out(tmp_path):
    place = Place(tmp_path)
    place.wire.contexts[3].node_config["lost-state"] = "oldest"
    with pytest.raises(
        StoppedError,
        match="node 3 stays out: .*node config: lost-state: expected refuse, newest or fresh, found 'oldest'",
    ):
        place.deployed()


# --------------------------------------------------------------------------------- a user's own app


@pytest.mark.parametrize(
    ("policy", "start"), [("newest", "that of round 1"), ("fresh", "a fresh head and its F(0) of ")]
)
def test_a_mod_does_likewise(policy, start, caplog):
    own = Own()
    own.wire.contexts[11].node_config["lost-state"] = policy
    node = own.wire.nodes[11]

    def losing(message, context):
        if message.content["fedgradnorm"]["round"] == 3:
            own.stores["client-1"].by_round.pop(2, None)
        return node(message, context)

    own.wire.nodes[11] = losing
    own.start(4)
    assert f"client client-1: its state of round 2 is lost: it trained with {start}" in caplog.text
    first = {round: state.initial_loss for round, state in own.stores["client-1"].by_round.items()}
    assert len(set(first.values())) == 1
    assert set(first) >= {3, 4}
