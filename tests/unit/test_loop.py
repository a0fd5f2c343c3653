"""Whole runs: repeated, in another order, and with wrong arguments."""

import dataclasses
import json
from importlib.metadata import version

import pytest
import torch
from torch import nn

import fedgradnorm
from fedgradnorm import (
    Client,
    ConfigError,
    Federation,
    FederationError,
    FedGradNorm,
    Metric,
    Task,
    evaluate_run,
    load_model,
    resume,
    train,
)
from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.federations import digits
from fedgradnorm.runs.reader import Run
from tests.helpers import (
    batch_norm_encoder,
    dropout_encoder,
    small_client,
    small_encoder,
    small_federation,
    small_task,
    timeless,
)
from tests.unit.runs.quick import QUICK, run_digits


def metrics(folder):
    return timeless(Run(folder).rows())


def test_one_seed_gives_identical_metrics_and_models_and_another_differs(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run_digits(tmp_path / name, f"train.seed={seed}")
    assert json.dumps(metrics(tmp_path / "one")) == json.dumps(metrics(tmp_path / "same"))
    assert json.dumps(metrics(tmp_path / "one")) != json.dumps(metrics(tmp_path / "other"))
    for file in ("encoder.safetensors", "heads/mass.safetensors"):
        assert (tmp_path / "one/models" / file).read_bytes() == (
            tmp_path / "same/models" / file
        ).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.fraction_train=0.5"],
        ["weighting.group_by=task", "federation.clients_per_task=2"],
    ],
)
def test_the_order_of_clients_changes_nothing_but_the_order_of_rows(tmp_path, words):
    run_digits(tmp_path / "one", *words, "federation.tasks=['class', 'parity', 'loop']")
    run_digits(tmp_path / "turned", *words, "federation.tasks=['loop', 'class', 'parity']")
    one, turned = metrics(tmp_path / "one"), metrics(tmp_path / "turned")
    assert one != turned
    by_client = [sorted(map(json.dumps, rows)) for rows in (one, turned)]
    assert by_client[0] == by_client[1]


def test_local_buffers_differ_between_clients_and_averaged_ones_do_not():
    def running_means(buffers):
        result = train(small_federation(encoder=batch_norm_encoder, buffers=buffers), **QUICK)
        return [result.model(id).encoder[1].running_mean for id in "abc"]

    assert not torch.equal(*running_means("local")[:2])
    assert torch.equal(*running_means("averaged")[:2])


def test_the_resolved_config_of_a_run_repeats_it(tmp_path):
    run_digits(
        tmp_path / "one",
        "weighting.gamma=0.3",
        "train.participants=[['class', 'mass'], ['loop', 'parity']]",
    )
    run(load_config(tmp_path / "one/config.toml", [f"run.dir={tmp_path / 'two'}"]))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    versions = Run(tmp_path / "one").config.versions
    assert versions["fedgradnorm"] == fedgradnorm.__version__
    assert versions["torch"] == version("torch")


def test_train_takes_a_weighting_or_its_name_and_checks_its_settings(tmp_path):
    by_name = train(small_federation(), "fedgradnorm", **QUICK)
    by_object = train(small_federation(), FedGradNorm(), run_dir=tmp_path / "run", **QUICK)
    assert timeless(by_name.rows) == timeless(by_object.rows)
    assert by_name.weights == by_object.weights
    assert Run(tmp_path / "run").config.weighting.name == "fedgradnorm"
    with pytest.raises(ConfigError, match="'train.num_round'.*'num_rounds'"):
        train(small_federation(), num_round=3)
    with pytest.raises(ConfigError, match="'eqal'"):
        train(small_federation(), "eqal")


def test_training_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    train(small_federation(encoder=dropout_encoder), **QUICK)
    assert torch.equal(before, torch.get_rng_state())


def test_on_round_sees_every_round():
    seen = []
    train(
        digits.make(0), on_round=lambda rows: seen.append([row["round"] for row in rows]), **QUICK
    )
    assert seen == [[round] * 4 for round in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda run: evaluate_run(run, "x"), FederationError, "federation: .* str$"),
        (lambda run: load_model(run, "a", "x"), FederationError, "federation: .* str$"),
        (lambda run: resume(run, "x"), FederationError, "federation: .* str$"),
        *(
            (
                lambda run, client=client: load_model(run, client, small_federation()),
                FederationError,
                "client: ",
            )
            for client in (5, None, ["a"])
        ),
        *(
            (
                lambda run, rounds=rounds: resume(run, small_federation(), num_rounds=rounds),
                ConfigError,
                "num_rounds: ",
            )
            for rounds in ("8", 4.5, True, 0, -1)
        ),
        (
            lambda run: resume(run, small_federation(), on_message=5),
            ConfigError,
            r"on_message\(message\)",
        ),
        (
            lambda run: resume(run, small_federation(), on_round=lambda: 0),
            ConfigError,
            r"on_round\(rows\)",
        ),
        *(
            (
                lambda run, engine=engine: train(small_federation(), engine=engine),
                ConfigError,
                "engine: .*'vectorized'",
            )
            for engine in (None, 5, object())
        ),
    ],
)
def test_wrong_arguments_are_named_with_what_was_expected(trained, call, error, message):
    with pytest.raises(error, match=message):
        call(trained)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(small_federation(), run_dir=folder, engine="reference", **QUICK)
    return folder


def test_none_in_place_of_a_function_is_allowed(trained):
    assert (
        resume(
            trained, small_federation(), on_round=None, should_stop=None, on_message=None
        ).state.round
        == 4
    )


X, Y = torch.linspace(-1, 1, 240).reshape(40, 6), torch.arange(40) % 2


def with_task(**changes):
    return dataclasses.replace(small_task("sign"), **changes)


def client_with(task=None, train=(X, Y), test=(X, Y)):
    return Client("a", task or small_task("sign"), train, test)


def test_a_metric_may_give_a_tensor():
    def metric(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean()

    result = train(
        Federation(
            [client_with(with_task(metrics=(Metric("accuracy", metric, higher_is_better=True),)))],
            small_encoder,
        ),
        **QUICK,
    )
    assert isinstance(result.rows[-1]["metric"], float)


@pytest.mark.parametrize("targets", [Y.bool(), Y * 3_000_000_000])
def test_targets_that_are_no_classes_do_not_end_a_run(targets):
    task = Task(
        "odd",
        lambda features: nn.Linear(features, 1),
        lambda outputs, targets: (outputs[:, 0] - targets.float() / 3e9).square().mean(),
    )
    result = train(
        Federation([client_with(task, (X, targets), (X, targets))], small_encoder), **QUICK
    )
    assert result.summary["clients"]["a"]["guess"] == {}


def test_one_bad_round_does_not_spoil_a_client_for_ever():
    """A client whose features explode once is put back to where it was before that round."""

    class Once(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.linear, self.calls = nn.Linear(features, 2), 0

        def forward(self, features):
            self.calls += self.training
            return self.linear(features) * (
                float("nan") if self.calls in (4, 5) else 1
            )  # the first call is for F(0)

    federation = Federation(
        [small_client("a"), client_with(with_task(head=Once), test=None)][1:], small_encoder
    )
    rows = train(
        federation, num_rounds=4, head_steps=1, encoder_steps=1, min_clients=0, engine="reference"
    ).rows
    assert [row["dropped"] is not None for row in rows].count(True) == 1
    assert rows[-1]["dropped"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server_optimizer": "adam", "server_momentum": 0.9}, "server_momentum"),
        ({"participants": (("a",),), "fraction_train": 0.5}, "participants.*fraction_train"),
        ({"head_lr": 1e308}, "head_lr: "),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        train(small_federation(), **settings)
