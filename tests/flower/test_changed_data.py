"""What the server is told when a client's training data or versions change."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord

from fedgradnorm import StoppedError
from fedgradnorm.client import ClientState
from fedgradnorm.flower import client
from fedgradnorm.flower.client import Node
from fedgradnorm.flower.messages import VERSIONS
from fedgradnorm.flower.states import StateFiles
from tests.flower.nodes import Site, dropped, in_round, lost, notes_of
from tests.helpers import small_federation, with_clients

pytestmark = pytest.mark.filterwarnings("ignore::fedgradnorm.FedGradNormWarning")


class Watched(Site):
    """A site whose nodes watch their data and keep states in files, as new processes would."""

    def __init__(self, folder):
        self.own = {}
        super().__init__(
            small_federation(),
            states=lambda client: lambda experiment: StateFiles(folder, experiment, client),
        )

    def join(self, number, client):
        self.wire.join(number, lambda message, _: self.node(client).answer(message))

    def node(self, client):
        federation = self.own.get(client, self.federation)
        return Node(
            federation, federation.client(client), self.seed, self.states(client), watch_data=True
        )

    def give(self, client, inputs, targets):
        """Let a client have other training data."""
        clients = [
            replace(one, train=(inputs, targets)) if one.id == client else one
            for one in self.federation.clients
        ]
        self.own[client] = with_clients(self.federation, clients)


def numbers(seed, examples):
    inputs = torch.randn(examples, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long()


def changing(site, **data):
    """An ``on_round`` that gives b other data after rounds: ``after_2=(seed, examples)``."""

    def act(rows):
        given = data.get(f"after_{rows[0]['round']}")
        if given is not None:
            site.give("b", *numbers(*given))

    return act


def test_changed_data_are_told_once_a_change_with_both_numbers(tmp_path, caplog):
    site = Watched(tmp_path)
    engine = site.engine()
    notes, note = notes_of(changing(site, after_2=(1, 50), after_4=(2, 50)))
    rows = site.train(engine=engine, on_round=note, num_rounds=6).rows
    texts = {
        3: "its training data changed after round 2: 50 examples, before 25",
        5: "its training data changed after round 4: 50 other examples",
    }
    assert notes == {
        round: {"b": [texts[round]]} if round in texts else {} for round in range(1, 7)
    }
    assert [
        record.getMessage() for record in caplog.records if "changed" in record.getMessage()
    ] == [f"client b: {text}" for text in texts.values()]
    assert [row["examples"] for row in rows if row["client"] == "b"] == [25, 25, 50, 50, 50, 50]
    told = [
        one.content["fedgradnorm"]
        for one in site.wire.messages
        if "data_since" in one.content["fedgradnorm"]
    ]
    assert [(one["data_since"], one["data_before"], len(one)) for one in told] == [
        (2, 25, 5),
        (4, 50, 5),
    ]  # and nothing else of them


def test_one_change_is_told_once_however_often_its_report_is_dropped(tmp_path):
    site = Watched(tmp_path)
    engine = site.engine()
    notes, note = notes_of(changing(site, after_1=(1, 50)))

    def spoilt(message, answer):
        reply = answer(message)
        if message.content["fedgradnorm"]["round"] in (2, 3):
            reply.content["metrics"]["loss"] = float("nan")
        return reply

    site.wire.twists[3] = spoilt
    rows = site.train(engine=engine, on_round=note, num_rounds=5).rows
    assert dropped(rows, "b").keys() == {2, 3}
    assert {round: bool(texts) for round, texts in notes.items()} == {
        1: False,
        2: True,
        3: False,
        4: False,
        5: False,
    }


def test_a_round_that_is_repeated_notes_it_again(tmp_path):
    site = Watched(tmp_path)
    site.wire.twists[4] = in_round(2, lost)
    engine = site.engine()
    notes, note = notes_of(changing(site, after_1=(1, 50)))
    rows = site.train(engine=engine, on_round=note, num_rounds=3, min_clients=3).rows
    assert {row["retries"] for row in rows if row["round"] == 2} == {1}
    assert notes[2] == {"b": ["its training data changed after round 1: 50 examples, before 25"]}


def test_a_client_that_was_away_is_held_against_its_last_round(tmp_path):
    site = Watched(tmp_path)
    engine = site.engine()
    notes, note = notes_of(changing(site, after_2=(1, 30)))
    site.train(
        engine=engine,
        on_round=note,
        num_rounds=5,
        participants=(("a", "b"), ("a", "b"), ("a",), ("a",), ("a", "b")),
    )
    assert notes[5] == {"b": ["its training data changed after round 2: 30 examples, before 25"]}


def test_states_of_an_older_version_are_held_against_nothing(tmp_path):
    site = Watched(tmp_path)
    engine = site.engine()

    def act(rows):
        if rows[0]["round"] == 2:
            states = StateFiles(tmp_path, engine.experiment, "b")
            assert states.data(2)["examples"] == 25
            states.save(states.load(2), [0])  # without, as it was before
            assert states.data(2) is None
            site.give("b", *numbers(1, 50))

    notes, note = notes_of(act)
    rows = site.train(engine=engine, on_round=note, num_rounds=4).rows
    assert not any(notes.values())
    assert not dropped(rows, "b")


def test_what_is_known_of_the_data_stays_in_the_file(tmp_path):
    states = StateFiles(tmp_path, "x", "a")
    record = {"examples": 5, "sample": [[1.0], [2.0]], "targets": [0.5, 0.5, 0.1]}
    states.save(ClientState({}, 0.5, round=1), [0], record)
    assert states.data(1) == record
    assert states.data(2) is None
    states.save(ClientState({}, 0.5, round=2), [0], {"examples": "many"})
    assert states.data(2) is None
    assert states.load(2).round == 2


class Unreadable:
    """Examples of which those that are looked at cannot be read."""

    def __init__(self):
        self.inputs, self.targets = numbers(0, 40)
        self.broken = False

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.broken:
            raise OSError("Jane Doe")
        return self.inputs[index], self.targets[index]


def test_data_that_cannot_be_looked_at_fail_no_round(tmp_path, monkeypatch):
    site, data = Watched(tmp_path), Unreadable()
    clients = [
        replace(one, train=data) if one.id == "b" else one for one in site.federation.clients
    ]
    site.own["b"] = with_clients(site.federation, clients)
    record = client.data_record

    def broken(id, given):
        data.broken = given is data
        found = record(id, given)
        data.broken = False
        assert found is None or given is not data
        return found

    monkeypatch.setattr(client, "data_record", broken)
    assert not dropped(site.train(num_rounds=3).rows, "b")


# ----------------------------------------------------------------------------------------- versions


def running(site, number, **versions):
    """Let a node say that it runs these versions; without ``version``, it does not say which."""
    answer = site.wire.nodes[number]

    def other(message, context):
        reply = answer(message, context)
        if message.content["fedgradnorm"]["kind"] == "hello":
            control = {
                key: value
                for key, value in reply.content["fedgradnorm"].items()
                if key not in VERSIONS
            }
            reply.content["fedgradnorm"] = ConfigRecord({**control, **versions})
        return reply

    site.wire.nodes[number] = other


OWN = VERSIONS["version"]
MIXED = [
    ({**VERSIONS}, []),
    (
        {**VERSIONS, "version": "9.0"},
        [f"it runs fedgradnorm 9.0, this server {OWN}: expected one version on every machine"],
    ),
    (
        {**VERSIONS, "torch_version": "1.0"},
        [
            f"it runs torch 1.0, this server {VERSIONS['torch_version']}: its figures may differ by more than rounding"
        ],
    ),
]


@pytest.mark.parametrize(("versions", "texts"), MIXED)
def test_a_client_of_another_version_is_told_of_once(versions, texts, caplog):
    site = Site(small_federation())
    running(site, 3, **versions)
    engine = site.engine()

    def act(rows):
        if rows[0]["round"] == 2:  # the same client comes back
            site.wire.join(9, lambda message, _, answer=site.wire.nodes[3]: answer(message, _))
            site.leave(3)

    notes, note = notes_of(act)
    rows = site.train(engine=engine, on_round=note, num_rounds=4).rows
    assert not dropped(rows, "b")
    assert notes == {1: {"b": texts} if texts else {}, 2: {}, 3: {}, 4: {}}
    for text in texts:
        assert [record.getMessage() for record in caplog.records].count(f"client b: {text}") == 1
    assert caplog.text.count(" runs ") == len(texts)


def test_a_version_is_noted_in_the_first_round_whatever_becomes_of_it():
    site = Site(small_federation())
    running(site, 3, **{**VERSIONS, "version": "9.0"})
    site.wire.twists[3] = in_round(1, lost)
    engine = site.engine()
    notes, note = notes_of(lambda rows: None)
    site.train(engine=engine, on_round=note, num_rounds=3)
    assert {round: sorted(texts) for round, texts in notes.items()} == {1: ["b"], 2: [], 3: []}


def test_a_node_that_does_not_say_its_version_stays_out():
    site = Site(small_federation())
    running(site, 3, torch_version=VERSIONS["torch_version"])
    engine = site.engine(min_nodes=3)
    with pytest.raises(StoppedError, match=r"node 3 stays out: fedgradnorm\.version: "):
        engine.wait()
    assert engine.attendance.refusals[3].code == "no-greeting"


def test_a_version_is_a_short_word():
    site = Site(small_federation())
    running(site, 3, **{**VERSIONS, "version": "9.0\nclient a is fine"})
    with pytest.raises(
        StoppedError, match="node 3 stays out: fedgradnorm.version: String should match pattern"
    ):
        site.engine(min_nodes=3).wait()
