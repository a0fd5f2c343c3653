"""The strategy in a user's own ServerApp."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedgradnorm import ConfigError, StoppedError, Weighting, WeightingState, Weights
from fedgradnorm.errors import RunError
from fedgradnorm.flower import FedGradNorm
from fedgradnorm.registry import BUILT_INS
from fedgradnorm.report import write_report
from fedgradnorm.runs.checkpoint import load_newest
from fedgradnorm.runs.reader import Run
from tests.flower.nodes import changed, dropped, evaluating, in_round, lost, untouched, with_loss
from tests.flower.own_app import SHARED, Net, Own, initial, spoil, values
from tests.helpers import timeless


def strategy(**options):
    return FedGradNorm(head="head", **{"min_nodes": 3, "node_timeout": 0, **options})


def rows_in(folder):
    return timeless(Run(folder).rows())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 rounds: its result, its folder, and its clients."""
    folder, own = tmp_path_factory.mktemp("whole") / "run", Own()
    return own.start(6, strategy=strategy(run_dir=folder)), folder, own


# -------------------------------------------------------------------------------------- a whole run


def test_training_goes_down_and_weights_move(whole):
    result, folder, _ = whole
    rates = [one["inverse_training_rate"] for one in result.train_metrics_clientapp.values()]
    assert rates[0] == 1
    assert rates[-1] < 0.95
    weights = [row["weight"] for row in Run(folder).rows() if row["round"] == 6]
    assert sum(weights) == pytest.approx(3)
    assert max(weights) > 1.01
    assert set(result.arrays) == set(SHARED)


def test_the_metrics_are_the_means_over_clients(whole):
    result, folder, _ = whole
    rows = Run(folder).rows()
    for round in range(1, 7):
        for metrics, names in (
            (result.train_metrics_clientapp[round], {"loss", "inverse_training_rate", "grad_norm"}),
            (result.evaluate_metrics_clientapp[round], {"test_loss", "metric"}),
        ):
            assert set(metrics) == names
            for name in names:
                assert metrics[name] == pytest.approx(
                    sum(row[name] for row in rows if row["round"] == round) / 3
                )


def test_its_folder_is_a_run_that_can_be_reported(whole, tmp_path):
    _, folder, _ = whole
    summary = Run(folder).summary()
    assert summary["rounds"] == 6
    assert set(summary["clients"]) == {"client-0", "client-1", "client-2"}
    assert summary["tasks"]["client-0"]["metric"]["name"] == "eval_acc"
    assert not list((folder / "models" / "heads").iterdir())
    write_report([Run(folder)], tmp_path / "report.html")
    assert "client-2" in (tmp_path / "report.html").read_text()
    assert set(Run(folder).tensors("encoder.safetensors")) == set(SHARED)


def test_the_checkpoint_holds_rounds_and_no_head(whole):
    _, folder, _ = whole
    checkpoint, _, _ = load_newest(folder / "checkpoints")
    assert {id: (state.round, dict(state.head)) for id, state in checkpoint.clients.items()} == {
        f"client-{n}": (6, {}) for n in range(3)
    }
    assert checkpoint.clients["client-0"].initial_loss > 0


def test_flowers_own_loop_gives_the_same_encoder(whole):
    result, _, _ = whole
    own = Own()
    other = Strategy.start(strategy(), grid=own.wire, initial_arrays=initial(), num_rounds=6)
    assert values(other.arrays) == values(result.arrays)
    for round in range(1, 7):
        assert other.train_metrics_clientapp[round] == result.train_metrics_clientapp[round]
        assert (
            other.evaluate_metrics_clientapp[round]["test_loss"]
            == result.evaluate_metrics_clientapp[round]["test_loss"]
        )


def test_flowers_own_loop_can_begin_again(whole):
    result, _, _ = whole
    own, method = Own(), strategy()
    for _ in range(2):
        again = Strategy.start(method, grid=own.wire, initial_arrays=initial(), num_rounds=6)
        assert values(again.arrays) == values(result.arrays)


def test_flowers_own_loop_undoes_a_round_with_too_few_sound_reports():
    own, as_if = Own(), Own()
    own.wire.twists[11] = in_round(2, changed(spoil))
    for part in range(3):
        as_if.wire.twists[10 + part] = in_round(2, untouched)
    found = Strategy.start(
        strategy(min_clients=3), grid=own.wire, initial_arrays=initial(), num_rounds=4
    )
    expected = Strategy.start(
        strategy(min_clients=1), grid=as_if.wire, initial_arrays=initial(), num_rounds=4
    )
    assert sorted(found.train_metrics_clientapp) == [1, 3, 4]
    assert values(found.arrays) == values(expected.arrays)
    assert own.heads(4) == as_if.heads(4)


def lie(content):
    if "arrays" in content:
        content["arrays"]["body.bias"] = Array(np.full(6, 1e30, np.float32))


@pytest.mark.parametrize("round", [1, 2, 4])
@pytest.mark.parametrize("loop", ["ours", "flower"])
def test_one_lie_moves_nothing(round, loop):
    own, as_if = Own(), Own()
    own.wire.twists[11], as_if.wire.twists[11] = (
        in_round(round, changed(lie)),
        in_round(round, untouched),
    )
    start = Strategy.start if loop == "flower" else FedGradNorm.start
    found, expected = (
        start(strategy(), grid=one.wire, initial_arrays=initial(), num_rounds=4)
        for one in (own, as_if)
    )
    assert values(found.arrays) == values(expected.arrays)
    assert own.heads(4) == as_if.heads(4)
    own.wire.twists[11] = in_round(1, changed(lie))
    ruined = start(
        strategy(max_update_ratio=None), grid=own.wire, initial_arrays=initial(), num_rounds=1
    )
    assert max(abs(number) for number in values(ruined.arrays)["body.bias"]) > 1e20


@pytest.mark.parametrize("twist", [lost, changed(spoil)], ids=["lost", "NaN"])
def test_flowers_own_loop_goes_on_without_a_client_that_fails(twist):
    own, ours = Own(), Own()
    own.wire.twists[11] = ours.wire.twists[11] = in_round(2, twist)
    found = Strategy.start(strategy(), grid=own.wire, initial_arrays=initial(), num_rounds=4)
    assert values(found.arrays) == values(ours.start(4).arrays)
    assert own.heads(4) == ours.heads(4)


def test_aggregating_before_anything_was_sent_is_an_error():
    with pytest.raises(ConfigError, match="expected configure_train to be called before"):
        strategy().aggregate_train(1, [])


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("name", BUILT_INS["weighting"])
def test_any_weighting_of_the_registry(name, tmp_path):
    result = Own().start(3, strategy=strategy(weighting=name, run_dir=tmp_path / "run"))
    assert Run(tmp_path / "run").config.weighting.name == name
    assert result.train_metrics_clientapp[3]["inverse_training_rate"] < 1


@pytest.mark.parametrize("name", BUILT_INS["weighting"])
def test_a_client_that_comes_late_takes_part_from_the_next_round_on(name, tmp_path):
    own = Own()
    late = own.wire.nodes.pop(12)

    def come(_):
        own.wire.nodes[12] = late
        return False

    method = strategy(weighting=name, run_dir=tmp_path / "run", min_nodes=2)
    method.start(own.wire, initial(), num_rounds=3, should_stop=come)
    rows = Run(tmp_path / "run").rows()
    assert [
        (row["round"], row["loss"] is not None) for row in rows if row["client"] == "client-2"
    ] == [(2, False), (3, True)]
    assert sum(row["weight"] for row in rows if row["round"] == 3) == pytest.approx(3)


def test_a_share_of_the_clients(tmp_path):
    own = Own()
    own.start(8, strategy=strategy(fraction_train=0.34, run_dir=tmp_path / "run", seed=1))
    took_part = [row["client"] for row in Run(tmp_path / "run").rows() if row["participated"]]
    assert len(took_part) == 8
    assert len(set(took_part)) > 1
    assert {client for client, store in own.stores.items() if store.by_round} == set(took_part)


def test_a_step_of_half_the_size_goes_half_the_way():
    start = initial().to_torch_state_dict()
    whole, half = (Own().start(1, strategy=strategy(server_lr=size)).arrays for size in (1.0, 0.5))
    for name in SHARED:
        moved = torch.from_numpy(whole[name].numpy()) - start[name]
        torch.testing.assert_close(torch.from_numpy(half[name].numpy()) - start[name], moved / 2)


def test_the_clients_get_what_the_user_sends_along():
    own = Own()
    own.wire.sent.clear()
    strategy().start(
        own.wire,
        initial(),
        2,
        train_config=ConfigRecord({"lr": 0.25}),
        evaluate_config=ConfigRecord({"lr": 0.5}),
    )
    found = {}
    for message in own.wire.messages:
        if "config" in message.content:
            kind = message.content["fedgradnorm"]["kind"]
            found.setdefault(kind, []).append(
                (message.content["config"]["server-round"], message.content["config"].get("lr"))
            )
    assert found["train"] == [(1, 0.25)] * 3 + [(2, 0.25)] * 3
    assert found["evaluate"] == [(1, 0.5)] * 3 + [(2, 0.5)] * 3


@pytest.mark.parametrize("loss", [1.7e308, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("loop", [FedGradNorm.start, Strategy.start], ids=["ours", "flower"])
def test_losses_without_bounds_are_in_no_mean(whole, loss, loop):
    own = Own()
    for number, factor in ((10, 1), (11, -1)):
        evaluating(own, number, with_loss(factor * loss))
    found = loop(strategy(), grid=own.wire, initial_arrays=initial(), num_rounds=1)
    (sound,) = [
        row["test_loss"]
        for row in Run(whole[1]).rows()
        if (row["round"], row["client"]) == (1, "client-2")
    ]
    assert found.evaluate_metrics_clientapp[1]["test_loss"] == pytest.approx(sound)


@pytest.mark.parametrize("loop", [FedGradNorm.start, Strategy.start], ids=["ours", "flower"])
def test_replies_are_waited_for_as_long_as_the_strategy_says(loop):
    own = Own()
    loop(strategy(round_timeout=700.0), grid=own.wire, initial_arrays=initial(), num_rounds=1)
    assert {
        one.metadata.ttl
        for one in own.wire.messages
        if one.metadata.group_id == "1" and not one.metadata.reply_to_message_id
    } == {700.0}
    own.wire.messages.clear()
    strategy(round_timeout=700.0).start(own.wire, initial(), num_rounds=1, timeout=50.0)
    assert {
        one.metadata.ttl for one in own.wire.messages if not one.metadata.reply_to_message_id
    } == {50.0}


def test_evaluation_every_so_many_rounds():
    result = Own().start(5, strategy=strategy(evaluate_every=2))
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 4, 5]


def test_the_servers_own_evaluation():
    seen = {}

    def evaluate(round, arrays):
        seen[round] = values(arrays)
        return None if round == 2 else MetricRecord({"round": round})

    result = strategy().start(Own().wire, initial(), num_rounds=3, evaluate_fn=evaluate)
    assert {round: dict(one) for round, one in result.evaluate_metrics_serverapp.items()} == {
        1: {"round": 1},
        3: {"round": 3},
    }
    assert seen[3] == values(result.arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "fedgradnrm"}, "did you mean 'fedgradnorm'"),
        ({"aggregation": "men"}, "did you mean 'mean'"),
        ({"fraction_train": 0.0}, "strategy.fraction_train"),
        ({"server_lr": -1.0}, "strategy.server_lr"),
        ({"min_clients": -1}, "strategy.min_clients"),
        ({"evaluate_every": 0}, "strategy.eval_every"),
        ({"min_nodes": 0}, "min_nodes"),
        ({"node_timeout": -1.0}, "node_timeout"),
        ({"round_timeout": 0.0}, "round_timeout"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        strategy(**options)


def test_arrays_without_an_encoder_are_refused():
    with pytest.raises(
        ConfigError, match="head: expected patterns that leave an encoder of the arrays"
    ):
        FedGradNorm(head="*").start(Own().wire, initial())
    mixed = initial().to_torch_state_dict()
    mixed["body.weight"] = mixed["body.weight"].double()
    with pytest.raises(
        ConfigError, match="initial_arrays: expected an encoder of one type of numbers"
    ):
        strategy().start(Own().wire, ArrayRecord(mixed))


# ----------------------------------------------------------------------------------- stop and go on


def stop_after(rounds):
    return lambda result: max(result.train_metrics_clientapp) == rounds


@pytest.mark.parametrize("start_round", [None, 4])
def test_a_run_that_was_stopped_goes_on(whole, tmp_path, start_round):
    expected, folder, _ = whole
    own = Own()
    options = {"grid": own.wire, "initial_arrays": initial(), "num_rounds": 6}
    first = strategy(run_dir=tmp_path / "run").start(**options, should_stop=stop_after(3))
    assert sorted(first.train_metrics_clientapp) == [1, 2, 3]
    result = strategy(run_dir=tmp_path / "run").start(**options, start_round=start_round)
    assert sorted(result.train_metrics_clientapp) == [4, 5, 6]
    assert values(result.arrays) == values(expected.arrays)
    assert rows_in(tmp_path / "run") == rows_in(folder)


class First(Weighting):
    """A weighting that is no dataclass: what it was made with is in no settings."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def update(self, state, reports):
        values = {
            report.client: self.factor if place == 0 else 1.0
            for place, report in enumerate(reports)
        }
        return Weights(values), WeightingState({**state.weights, **values})


def test_a_run_goes_on_with_the_weighting_that_the_strategy_was_given(tmp_path):
    own = Own()
    for rounds in (1, 2):
        own.start(rounds, strategy=strategy(weighting=First(5.0), run_dir=tmp_path / "run"))
    assert [row["weight"] for row in Run(tmp_path / "run").rows()] == [5.0, 1.0, 1.0] * 2


@pytest.mark.parametrize("gone", [1, 2])
def test_a_run_goes_on_from_an_older_checkpoint(whole, tmp_path, gone):
    expected, folder, clients = whole
    own = Own()
    strategy(run_dir=tmp_path / "run").start(
        own.wire, initial(), num_rounds=6, should_stop=stop_after(4)
    )
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[3 - gone :]:
        path.unlink()
    result = strategy(run_dir=tmp_path / "run").start(own.wire, initial(), num_rounds=6)
    assert values(result.arrays) == values(expected.arrays)
    assert own.heads(6) == clients.heads(6)
    assert rows_in(tmp_path / "run") == rows_in(folder)


def test_a_finished_run_gives_its_encoder_again_and_can_be_lengthened(tmp_path):
    own, method = Own(), strategy(run_dir=tmp_path / "run")
    done = own.start(2, strategy=method)
    again = own.start(2, strategy=strategy(run_dir=tmp_path / "run"))
    assert values(again.arrays) == values(done.arrays)
    longer = own.start(3, strategy=strategy(run_dir=tmp_path / "run"))
    assert sorted(longer.train_metrics_clientapp) == [3]


def test_a_finished_run_is_not_troubled_by_a_newcomer(tmp_path):
    own = Own()
    late = own.wire.nodes.pop(12)
    own.start(2, strategy=strategy(run_dir=tmp_path / "run", min_nodes=2))
    own.wire.nodes[12] = late
    own.start(2, strategy=strategy(run_dir=tmp_path / "run"))
    assert set(Run(tmp_path / "run").summary()["clients"]) == {"client-0", "client-1"}


@pytest.mark.parametrize("rounds", [2, 3])
def test_a_client_that_does_not_come_back_keeps_its_metric(tmp_path, rounds):
    own = Own()
    own.start(2, strategy=strategy(run_dir=tmp_path / "run"))
    before = Run(tmp_path / "run").summary()["tasks"]["client-2"]["metric"]
    own.wire.nodes.pop(12)
    own.start(rounds, strategy=strategy(run_dir=tmp_path / "run", min_nodes=2))
    found = Run(tmp_path / "run").summary()["tasks"]["client-2"]["metric"]
    assert found == {**before, "last": before["last"] if rounds == 2 else None}


class Moved(Net):
    """The same layers in another order."""

    def __init__(self):
        super().__init__()
        body = self.body
        del self.body
        self.body = body


def test_a_model_whose_layers_changed_places_does_not_go_on(tmp_path):
    own, moved = Own(parts=(0, 1)), Own(parts=(0, 1), model=Moved, net=lambda _: Moved())
    moved.stores.update(own.stores)
    own.start(2, strategy=strategy(min_nodes=2, run_dir=tmp_path / "run"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(
        RunError,
        match=r"other parameters, or in another order, than when the run began: \('norm.weight', \(6,\)\), was",
    ):
        moved.start(
            3,
            arrays=ArrayRecord(Moved().state_dict()),
            strategy=strategy(min_nodes=2, run_dir=tmp_path / "run"),
        )
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_round_one_begins_anew(whole, tmp_path):
    expected, folder, _ = whole
    own = Own()
    own.start(2, strategy=strategy(run_dir=tmp_path / "run"))
    experiment = Run(tmp_path / "run").config.run.experiment
    result = strategy(run_dir=tmp_path / "run").start(
        own.wire, initial(), num_rounds=6, start_round=1
    )
    assert values(result.arrays) == values(expected.arrays)
    assert rows_in(tmp_path / "run") == rows_in(folder)
    assert Run(tmp_path / "run").config.run.experiment != experiment


WRONG_STARTS = [
    (2, 0, "expected 1, 2 or 3, as 2"),
    (5, 2, "expected 1, 4, 5 or 6, as 5 rounds"),
    (0, 2, "expected 1, as 0"),
]


def test_a_run_goes_back_and_ends_as_the_uninterrupted_one(whole, tmp_path):
    expected, folder, other = whole
    own = Own()
    own.start(5, strategy=strategy(run_dir=tmp_path / "run"))
    found = strategy(run_dir=tmp_path / "run").start(
        own.wire, initial(), num_rounds=6, start_round=4
    )
    assert sorted(found.train_metrics_clientapp) == [4, 5, 6]
    assert values(found.arrays) == values(expected.arrays)
    assert rows_in(tmp_path / "run") == rows_in(folder)
    assert own.heads(6) == other.heads(6)


@pytest.mark.parametrize(("done", "start_round", "message"), WRONG_STARTS)
def test_a_start_that_does_not_fit_is_refused(tmp_path, done, start_round, message):
    own = Own()
    if done:
        own.start(done, strategy=strategy(run_dir=tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"start_round: {message}"):
        strategy(run_dir=tmp_path / "run").start(
            own.wire, initial(), num_rounds=6, start_round=start_round
        )


def test_changed_options_are_refused_when_it_goes_on(tmp_path):
    own = Own()
    own.start(2, strategy=strategy(run_dir=tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"changed: train.server_lr = 0.5 \(was 1.0\)"):
        own.start(3, strategy=strategy(run_dir=tmp_path / "run", server_lr=0.5))


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="thesis.txt"):
        Own().start(1, strategy=strategy(run_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_late_client_keeps_its_metric_when_a_run_goes_on(tmp_path):
    own = Own()
    own.start(2, strategy=strategy(run_dir=tmp_path / "run"))
    late = own.wire.nodes.pop(12)

    def come(_):
        own.wire.nodes[12] = late
        return False

    method = strategy(run_dir=tmp_path / "run", min_nodes=2)
    method.start(own.wire, initial(), num_rounds=5, should_stop=come)
    rows = [row for row in Run(tmp_path / "run").rows() if row["client"] == "client-2"]
    assert dropped(rows, "client-2") == {3: "no report: not connected"}
    assert [row["metric"] is not None for row in rows] == [True, True, False, True, True]


def test_too_few_nodes_end_it_and_it_goes_on(whole, tmp_path):
    expected, _, _ = whole
    own = Own()
    gone = {}

    def leave(result):
        if max(result.train_metrics_clientapp) == 3:
            gone[12] = own.wire.nodes.pop(12)
        return False

    with pytest.raises(
        StoppedError,
        match=r"2 clients are connected after 0 s.*connected: client-0, client-1.*start its Flower app again",
    ):
        strategy(run_dir=tmp_path / "run").start(
            own.wire, initial(), num_rounds=6, should_stop=leave
        )
    own.wire.nodes |= gone
    assert values(own.start(6, strategy=strategy(run_dir=tmp_path / "run")).arrays) == values(
        expected.arrays
    )


def test_clients_that_measure_one_task_differently_do_not_mix():
    own = Own(parts=(0, 1), task="t")
    other = Own(parts=(2,), task="t", metric="num-examples")
    own.wire.nodes[12], own.wire.contexts[12] = other.wire.nodes[12], other.wire.contexts[12]
    with pytest.raises(
        StoppedError,
        match="client 'client-2' measures task 't' in another way than client 'client-0'",
    ):
        strategy().start(own.wire, initial())
