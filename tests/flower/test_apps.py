"""The ready apps: a federation from a configuration file, with one client on each node."""

import fcntl
import shutil

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedgradnorm import ConfigError, FedGradNormError, FedGradNormWarning, RunError, StoppedError
from fedgradnorm.flower import training
from fedgradnorm.flower.init import MAX_UPDATE_RATIO
from fedgradnorm.flower.messages import control_of
from fedgradnorm.runs.reader import Run
from tests.flower.lazy import opened
from tests.flower.nodes import in_round, lost, raising
from tests.flower.place import DIGITS, Place
from tests.helpers import timeless
from tests.runs import contents

pytestmark = pytest.mark.filterwarnings(
    "ignore::fedgradnorm.FedGradNormWarning"
)  # of clients that are lost here on purpose

RADCOM = DIGITS.replace('{ name = "digits" }', '{ name = "radcom", snapshots = 6 }')
LAZY = DIGITS.replace('"digits"', '"tests.flower.lazy:make"')


def same(one, other):
    """Whether two runs have the same rows and the same encoder."""
    encoders = [
        {name: value.tolist() for name, value in Run(folder).tensors("encoder.safetensors").items()}
        for folder in (one, other)
    ]
    return timeless(Run(one).rows()) == timeless(Run(other).rows()) and encoders[0] == encoders[1]


@pytest.mark.parametrize("by", ["client-key", "partition-id"])
@pytest.mark.parametrize("text", [DIGITS, RADCOM], ids=["digits", "radcom"])
def test_the_apps_give_what_the_simulation_gives(tmp_path, text, by):
    place = Place(tmp_path, text, by)
    deployed, simulated = place.deployed(), place.simulated()
    assert same(deployed, simulated)
    for number, client in enumerate(place.clients):
        own = place.head(number, client, 3)
        expected = Run(simulated).tensors(f"heads/{client}.safetensors")
        assert {f"head.{name}": value.tolist() for name, value in own.items()} == {
            name: value.tolist() for name, value in expected.items() if name.startswith("head.")
        }


WORDS = [
    "train.seed=3",
    "train.fraction_train=0.5 weighting.name=equal",
    "train.min_clients=4 faults.drop=0.3 train.max_retries=50",
]


@pytest.mark.parametrize("words", WORDS)
def test_the_server_says_how_to_train_and_the_seed_too(tmp_path, words):
    place = Place(tmp_path)
    deployed, simulated = place.deployed(settings=words), place.simulated(*words.split())
    for row, expected in zip(Run(deployed).rows(), Run(simulated).rows(), strict=True):
        for key in (
            "participated",
            "retries",
            "loss",
            "weight",
            "test_loss",
            "metrics",
            "initial_loss",
        ):
            assert row[key] == expected[key], key


FEDERATIONS = [
    "federation.sizes=dirichlet federation.alpha=0.2",
    "model.name=mlp model.hidden=[8]",
    "model.norm_layer=1",
]


@pytest.mark.parametrize("words", FEDERATIONS)
def test_the_clients_have_the_servers_federation_and_model(tmp_path, words):
    place = Place(tmp_path, DIGITS.replace("[train]", 'model = { buffers = "averaged" }\n[train]'))
    assert same(place.deployed(settings=words), place.simulated(*words.split()))


def test_a_nodes_own_words_win_over_the_servers(tmp_path):
    place = Place(tmp_path)
    place.wire.contexts[3].node_config["settings"] = "federation.sizes.parity=20"
    rows = Run(place.deployed(settings="federation.sizes={class=30,parity=40}")).rows()
    assert [row["examples"] for row in rows if row["round"] == 3] == [30, 20, 336, 336]


def test_started_again_it_goes_on(tmp_path):
    place, gone = Place(tmp_path), []

    def failing(message, answer):
        if message.metadata.group_id != "3":
            return answer(message)
        gone.append(1)
        return raising(message, answer)

    place.wire.twists[3] = failing
    with pytest.raises(StoppedError, match="start its Flower app again"):
        place.deployed(settings="train.min_clients=4")
    assert gone == [1] * 4
    place.wire.twists.clear()
    assert same(
        place.deployed(settings="train.min_clients=4"), place.simulated("train.min_clients=4")
    )


def lie(message, answer):
    """A gradient of finite numbers that would saturate any encoder."""
    reply = answer(message)
    arrays = reply.content["arrays"]
    reply.content["arrays"] = ArrayRecord(
        {name: Array(np.full_like(array.numpy(), 1e30)) for name, array in arrays.items()}
    )
    return reply


@pytest.mark.parametrize("round", [1, 2, 4])
def test_with_the_ratio_of_a_deployment_one_lie_counts_as_no_report(tmp_path, round):
    runs = []
    for name, twist in (("lie", lie), ("raises", raising)):
        (tmp_path / name).mkdir()
        place = Place(
            tmp_path / name,
            DIGITS.replace("[train]", f"[train]\nmax_update_ratio = {MAX_UPDATE_RATIO}"),
        )
        place.wire.twists[3] = in_round(round, twist)
        runs.append(place.deployed(settings="train.num_rounds=5"))
    rows, expected = (
        [
            {key: value for key, value in row.items() if key != "dropped"}
            for row in timeless(Run(run).rows())
        ]
        for run in runs
    )
    assert rows == expected
    reasons = {row["dropped"] for row in Run(runs[0]).rows() if row["dropped"]}
    assert len(reasons) == 1
    assert (
        f"times as long as usual{' for all clients' if round < 4 else ''}, expected at most 10 times"
        in reasons.pop()
    )


def test_a_poisoned_run_goes_back_to_a_sound_checkpoint(tmp_path):
    place = Place(tmp_path)
    place.wire.twists[3] = in_round(5, lie)
    poisoned = Run(place.deployed(settings="train.num_rounds=6")).tensors("encoder.safetensors")
    assert max(value.abs().max() for value in poisoned.values()) > 1e20
    place.wire.twists.clear()
    with pytest.raises(
        ConfigError,
        match="start_round: expected 1, 5, 6 or 7, as 6 rounds are done in .* round 4, 5, 6, found 4",
    ):
        place.deployed(settings="train.num_rounds=6", **{"start-round": 4})
    assert same(
        place.deployed(settings="train.num_rounds=6", **{"start-round": 5}),
        place.simulated("train.num_rounds=6"),
    )
    assert (tmp_path / "run/undone/1/metrics.jsonl").read_text().count('"round": 5') == 4


def test_a_node_that_is_gone_does_not_hold_up_the_others(tmp_path):
    place = Place(tmp_path)
    first = place.wire.nodes.pop(3)
    with pytest.raises(
        StoppedError, match="3 clients are connected after 0 s, expected at least 4"
    ):
        place.deployed()
    place.wire.nodes[3] = first
    place.wire.twists[3] = in_round(
        1, lambda message, answer: lost(message, answer) or (place.wire.nodes.pop(3, None) and None)
    )
    rows = Run(place.deployed()).rows()
    assert {
        row["round"]: row["dropped"]
        for row in rows
        if row["client"] == place.clients[1] and row["dropped"]
    } == {1: "no report: no answer within 3600 s"}


def test_a_client_that_is_late_rests_as_the_server_is_told(tmp_path):
    asked = {}
    for rest in (16, 0):
        folder = tmp_path / str(rest)
        folder.mkdir()
        place, asked[rest] = Place(folder), []
        place.wire.twists[3] = lambda message, answer, to=asked[rest]: (
            answer(message)
            if message.metadata.group_id == "hello"
            else to.append(message.metadata.group_id)
        )
        with pytest.warns(FedGradNormWarning, match="never counted"):
            place.deployed(**{"max-rest": rest})
    assert asked == {16: ["1", "2"], 0: ["1", "2", "3"]}


def test_min_nodes_holds_for_every_round(tmp_path):
    place = Place(tmp_path)
    place.wire.nodes.pop(3)
    rows = Run(place.deployed(**{"min-nodes": 2})).rows()
    assert {row["dropped"] for row in rows if row["client"] == place.clients[1]} == {
        "no report: not connected"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min-nodes": "two"},
            "run config: min-nodes: expected a whole number from 0, found 'two'",
        ),
        ({"node-timeout": -1}, "run config: node-timeout: expected a whole number"),
        ({"round-timeout": 0}, "round_timeout: expected seconds, more than 0"),
        (
            {"min-replies": 0},
            "run config: min-replies: expected a share, more than 0 and at most 1, found 0",
        ),
        (
            {"min-replies": True},
            "run config: min-replies: expected a share, more than 0 and at most 1, found True",
        ),
        ({"max-rest": 0.5}, "run config: max-rest: expected a whole number from 0, found 0.5"),
        ({"start-round": 5}, "start_round: expected 1, as 0 rounds are done"),
        ({"settings": "train.num_rnds=5"}, "unknown key 'train.num_rnds'"),
    ],
)
def test_a_wrong_setting_of_the_server_is_named(tmp_path, options, message):
    place = Place(tmp_path)
    with pytest.raises(ConfigError, match=message):
        place.deployed(**options)


UNFIT = {
    "train.method=centralized": "train.method: centralized keeps all clients in lockstep",
    'train.participants=[["nobody"]]': "there is no client 'nobody'",
    "train.min_clients=9": "train.min_clients: expected at most the 4 clients, found 9",
    "run.metric_targets={nope=0.5}": "run.metric_targets.nope: there is no task 'nope'",
    "train.method=local model.buffers=averaged": "train.method: local exchanges nothing",
}
CHANGED = ("train.head_lr=0.7", r"changed: train.head_lr = 0.7 \(was 0.03\)", 0)


@pytest.mark.parametrize(
    ("words", "message", "start_round"),
    [CHANGED, *((*one, start) for one in UNFIT.items() for start in (0, 1))],
)
def test_settings_that_do_not_fit_are_refused_before_a_node_is_asked_or_a_run_replaced(
    tmp_path, words, message, start_round
):
    place = Place(tmp_path)
    place.deployed(settings="train.num_rounds=2")
    before = contents(tmp_path / "run")
    place.wire.nodes.clear()
    with pytest.raises(FedGradNormError, match=message):
        place.deployed(settings=words, **{"start-round": start_round})
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "folder", ["", ".", "..", "/", "../..", "a/..", "~nobody-of-this-name/x", "a\0b"]
)
def test_a_folder_that_cannot_be_a_runs_own_is_refused(tmp_path, folder, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = Place(tmp_path)
    with pytest.raises(ConfigError, match="run.dir: expected a folder"):
        place.deployed(**{"run-dir": folder})
    assert not list((tmp_path / "here").iterdir())
    assert not place.wire.messages


def test_a_run_of_the_simulation_is_not_taken_over(tmp_path):
    place = Place(tmp_path)
    place.simulated().rename(tmp_path / "run")
    before = contents(tmp_path / "run")
    for words in ("", "train.num_rounds=5"):
        with pytest.raises(
            RunError,
            match="its clients are not on other machines: `fedgradnorm resume` resumes it; start_round = 1",
        ):
            place.deployed(settings=words)
    assert contents(tmp_path / "run") == before
    assert same(place.deployed(**{"start-round": 1}), place.simulated())


def test_a_second_run_in_one_folder_asks_no_node(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOCK_TIMEOUT", 0.3)
    place = Place(tmp_path)
    with (tmp_path / ".run.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another run is writing to it"):
            place.deployed()
    assert not place.wire.messages


@pytest.mark.parametrize(
    ("node_config", "why"),
    [
        ({"client-key": "nobody"}, "there is no client 'nobody'"),
        ({"client-key": "a/b"}, "node config: client-key: expected letters"),
        ({"partition-id": 4}, "node config: partition-id: expected 0 to 3, found 4"),
        ({}, "node config: expected a 'client-key'"),
        (
            {"partition-id": 1, "threads": 0},
            "node config: threads: expected a whole number from 1, found 0",
        ),
        (
            {"partition-id": 1, "settings": "train.seed=1"},
            "node config: settings: expected words like federation.KEY=VALUE, found",
        ),
        ({"partition-id": 1, "settings": "federation.x=1"}, "unknown key 'federation.x'"),
        ({"partition-id": 1, "state-dir": None}, "node config: expected a 'state-dir'"),
    ],
)
def test_a_wrong_setting_of_a_node_keeps_it_out_and_says_why(tmp_path, node_config, why):
    place = Place(tmp_path)
    config = {"state-dir": str(tmp_path / "states" / "x"), **node_config}
    place.wire.join(
        3,
        place.wire.nodes[3],
        **{name: value for name, value in config.items() if value is not None},
    )
    with pytest.raises(StoppedError, match=f"node 3 stays out: .*{why}"):
        place.deployed()
    assert not (tmp_path / "run").exists()


def test_a_node_loads_its_own_data_alone_and_none_to_say_who_it_is(tmp_path):
    place, found = Place(tmp_path, LAZY), {}

    def noting(app):
        def answer(message, context):
            opened()
            reply = app(message, context)
            found.setdefault(
                (context.node_config["client-key"], control_of(message).kind), set()
            ).add(tuple(opened()))
            return reply

        return answer

    place.wire.nodes = {number: noting(app) for number, app in place.wire.nodes.items()}
    place.deployed()
    for client in ("a", "b", "c"):
        assert found[client, "hello"] == {()}
        assert found[client, "train"] == found[client, "evaluate"] == {(client,)}


def test_a_server_loads_no_data(tmp_path):
    place = Place(tmp_path, LAZY)
    place.wire.nodes.clear()
    opened()
    with pytest.raises(StoppedError, match="0 clients are connected"):
        place.deployed()
    assert opened() == []


def test_data_that_are_not_loaded_yet_are_counted_from_the_first_report_on(tmp_path):
    place, words = (
        Place(tmp_path, LAZY),
        "train.num_rounds={} train.participants=[['a'],['b'],['b'],['a']]",
    )
    place.deployed(settings=words.format(2))
    rows = Run(place.deployed(settings=words.format(4))).rows()
    assert [row["examples"] for row in rows] == [20, 0, 0, *(20, 25, 0) * 3]


def test_a_head_that_is_lost_is_an_error_that_says_what_to_do(tmp_path):
    place = Place(tmp_path)
    place.deployed(settings="train.num_rounds=2")
    shutil.rmtree(tmp_path / "states" / "1")
    rows = [
        row
        for row in Run(place.deployed(settings="train.num_rounds=3")).rows()
        if row["client"] == place.clients[1]
    ]
    assert (
        "needs its state of round 2, and there is no such file: restore it, or begin a new experiment"
        in rows[-1]["dropped"]
    )


def test_the_words_of_an_error_that_is_not_ours_stay_with_the_client(tmp_path):
    place = Place(tmp_path, LAZY.replace('make" }', 'make", failing = "b" }'))
    run = place.deployed(settings="train.num_rounds=1")
    assert [row["dropped"] for row in Run(run).rows()][1] == (
        "no report: its app raised an error: fedgradnorm.errors.FedGradNormError: client 'b': the function that loads its "
        "training data raised ValueError: what it says is in the log of the node"
    )
    assert not any(b"Jane Doe" in one for one in place.wire.sent)
