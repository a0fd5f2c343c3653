"""A run in figures."""

import dataclasses
import json

import pytest

from fedgradnorm import FedGradNormWarning, train
from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.summary import rounds_to, silent_texts
from tests.helpers import small_federation
from tests.unit.runs.quick import QUICK, run_digits


def test_the_summary_counts_rounds_to_targets(tmp_path):
    words = [
        "train.num_rounds=30",
        "run.loss_targets=[0.97, 0.0]",
        "run.metric_targets.loop=0.5",
        "run.metric_targets.mass=0.0",
    ]
    result = run_digits(tmp_path / "run", *words)
    loop, mass = result.summary["tasks"]["loop"], result.summary["tasks"]["mass"]
    ratios = [row["inverse_training_rate"] for row in result.rows if row["client"] == "loop"]
    means = [
        sum(ratios[max(0, end - 5) : end]) / len(ratios[max(0, end - 5) : end])
        for end in range(1, 31)
    ]
    assert loop["rounds_to"]["loss ratio 0.97"] == next(
        round for round, mean in enumerate(means, 1) if mean <= 0.97
    )
    assert loop["rounds_to"]["loss ratio 0"] is None
    assert loop["rounds_to"]["accuracy 0.5"] == 1
    assert mass["rounds_to"]["mean absolute error 0"] is None
    values = {
        row["round"]: row["metric"]
        for row in result.rows
        if row["client"] == "mass" and row["metric"] is not None
    }
    assert mass["metric"]["first"] == values[1]
    assert mass["metric"]["best"] == min(values.values()) == values[mass["metric"]["best_round"]]
    assert mass["metric"]["last"] == values[30]


def test_a_single_lucky_round_reaches_no_target():
    noisy = {1: 0.9, 2: 0.4, 3: 0.9, 4: 0.8, 5: 0.8, 6: 0.6, 7: 0.3, 8: 0.4, 9: 0.4}
    assert rounds_to(noisy, 0.51) == 9, "(0.8 + 0.6 + 0.3 + 0.4 + 0.4) / 5"
    assert (
        rounds_to({round: -value for round, value in noisy.items()}, -0.51, higher_is_better=True)
        == 9
    )
    assert rounds_to(noisy, 0.4) is None
    assert rounds_to({1: 0.9, 20: 0.3}, 0.5) == 20, (
        "a test every few rounds has no neighbours to be averaged with"
    )


def test_a_client_that_was_never_asked_is_named_and_left_out_of_its_tasks_figures():
    with pytest.warns(FedGradNormWarning, match="'b', 'c'"):
        result = train(small_federation(), participants=[["a"]], engine="reference", **QUICK)
    (task,) = result.summary["tasks"].values()
    client = result.summary["clients"]["a"]
    assert task["metric"]["last"] == client["metrics"]["accuracy"]
    assert task["metric"]["guess"] == client["guess"]["accuracy"]
    (text,) = silent_texts(result.summary)
    assert "'b', 'c'" in text


def test_a_client_without_test_data_has_no_metric():
    federation = small_federation()
    clients = [
        dataclasses.replace(client, test=None) if client.id == "b" else client
        for client in federation.clients
    ]
    result = train(dataclasses.replace(federation, clients=clients), **QUICK)
    assert {row["client"] for row in result.rows if row["metric"] is not None} == {"a", "c"}
    assert result.summary["clients"]["b"]["metrics"] == {}


def test_a_run_that_diverges_ends_with_gaps_and_counts_what_it_dropped(tmp_path):
    words = [
        "federation.tasks=['mass', 'loop']",
        "train.num_rounds=12",
        "train.encoder_lr=500",
        "train.head_lr=500",
        "train.min_clients=0",
    ]
    with pytest.warns(FedGradNormWarning) as said:
        result = run_digits(tmp_path / "run", *words)
    for client in ("mass", "loop"):
        assert any(
            f"client '{client}' seldom counted: 11 of 12 " in str(warning.message)
            for warning in said
        )
    assert result.summary["dropped"] > 0
    assert all(weight > 0 for weight in result.weights.values())
    dropped = [row for row in Run(tmp_path / "run").rows() if row["dropped"]]
    assert len(dropped) == result.summary["dropped"]
    assert all(row["loss"] is None for row in dropped)


def test_a_last_metric_is_that_of_the_last_round_or_none(tmp_path):
    words = [
        "federation.name=digits",
        "federation.tasks=['mass']",
        "train.num_rounds=12",
        "train.encoder_lr=5000",
        "train.head_lr=5000",
    ]
    with pytest.warns(FedGradNormWarning, match="client 'mass' .* 12 of 12 .*gradient: "):
        result = run(
            load_config(None, [*words, "train.min_clients=0", "run.dir=" + str(tmp_path / "run")])
        )
    mass = result.summary["tasks"]["mass"]
    assert mass["metric"] is None, "a site of which no report counted is no figure of its task"
    assert mass["loss_ratio"] is None
    assert json.loads((tmp_path / "run/summary.json").read_text()) == result.summary
