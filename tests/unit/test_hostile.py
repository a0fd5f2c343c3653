"""Odd input that once got through: each is an error of ours, and nothing is lost."""

import dataclasses
import json
import shutil
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import (
    Client,
    ConfigError,
    Equal,
    Federation,
    FederationError,
    FedGradNorm,
    FedGradNormWarning,
    Metric,
    RunError,
    StoppedError,
    Task,
    Weighting,
    WeightingState,
    Weights,
    load_model,
    train,
)
from fedgradnorm.aggregation import Mean
from fedgradnorm.api import run
from fedgradnorm.config import Component, load_config
from fedgradnorm.engine import Engine
from fedgradnorm.errors import WeightingError
from fedgradnorm.evaluation import evaluate
from fedgradnorm.registry import build
from fedgradnorm.runs.checkpoint import load_newest
from fedgradnorm.runs.reader import Run
from tests.helpers import (
    accuracy,
    batch_norm_encoder,
    report,
    small_client,
    small_encoder,
    small_federation,
    small_task,
)

QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}
WORDS = ["federation.name=digits", *(f"train.{key}={value}" for key, value in QUICK.items())]
X, Y = torch.linspace(-1, 1, 240).reshape(40, 6), torch.arange(40) % 2


def with_task(**changes):
    return dataclasses.replace(small_task("sign"), **changes)


def client_with(task=None, train=(X, Y), test=(X, Y)):
    return Client("a", task or small_task("sign"), train, test)


class Ragged:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.zeros(6 + (index > 3)), torch.tensor(0)


class Detached(nn.Module):
    def forward(self, features):
        return features.detach()[:, :2]


@pytest.mark.parametrize(
    "client",
    [
        client_with(train=(X, torch.cat([Y[:-1], torch.tensor([7])]))),
        client_with(test=(X, torch.cat([Y[:-1], torch.tensor([7])]))),
        client_with(with_task(loss=partial(functional.cross_entropy, reduction="none"))),
        client_with(
            with_task(loss=lambda outputs, targets: (outputs.argmax(1) != targets).float().mean())
        ),
        client_with(with_task(loss=lambda outputs, targets: 1.5)),
        client_with(with_task(head=lambda _: Detached())),
        client_with(train=Ragged()),
        client_with(
            with_task(
                metrics=(Metric("none", lambda outputs, targets: None, higher_is_better=True),)
            )
        ),
        client_with(
            with_task(
                metrics=(Metric("bad", lambda outputs, targets: 1 / 0, higher_is_better=True),)
            )
        ),
    ],
)
def test_data_that_would_fail_later_are_refused_before_a_run_is_replaced(tmp_path, client):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    refused = (
        "client 'a': (its (training|test) data do not pass through its model and loss|metric '.*' cannot be taken of its test data"
        "|the (loss does|outputs do) not depend on)"
    )
    with pytest.raises(FederationError, match=refused):
        train(
            Federation([client], small_encoder), run_dir=tmp_path / "run", overwrite=True, **QUICK
        )
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_batch_norm_on_a_batch_of_one_is_refused():
    with pytest.raises(FederationError, match="Expected more than 1 value per channel"):
        train(Federation([small_client("a", examples=1)], batch_norm_encoder), **QUICK)


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


@pytest.mark.parametrize("norm_layer", [[], (), 5, [3]])
def test_a_norm_layer_that_names_nothing_is_refused(norm_layer):
    with pytest.raises(FederationError, match="norm_layer: expected names of encoder parameters"):
        small_federation(norm_layer=norm_layer)


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


def test_only_a_run_is_overwritten_and_never_a_folder_that_also_holds_something_else(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.toml").write_text('[federation]\nname = "digits"\n')
    with pytest.raises(RunError, match="is no run, for its config.toml names no versions"):
        run(load_config(folder / "config.toml", [*WORDS, f"run.dir={folder}"]), overwrite=True)
    run(load_config(None, [*WORDS, f"run.dir={tmp_path / 'run'}"]))
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds what no run writes, such as 'thesis.txt'"):
        run(load_config(None, [*WORDS, f"run.dir={tmp_path / 'run'}"]), overwrite=True)
    assert (folder / "config.toml").exists()
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("folder", ["x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_is_an_error(tmp_path, folder):
    with pytest.raises(RunError, match="no such folder can be|cannot be written"):
        train(small_federation(), run_dir=tmp_path / folder, **QUICK)
    with pytest.raises(RunError, match="is no run"):
        Run(tmp_path / folder)


def test_a_link_is_not_overwritten(tmp_path):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunError, match="is a link"):
        train(small_federation(), run_dir=tmp_path / "link", overwrite=True, **QUICK)


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(small_federation(), run_dir="~/runs/one", **QUICK)
    assert (tmp_path / "runs/one/report.html").exists()


def test_a_weighting_whose_options_cannot_be_written_costs_no_run(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Odd(Equal):
        what: object = print

    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    with pytest.raises(ConfigError, match="cannot be written to config.toml"):
        train(small_federation(), Odd(), run_dir=tmp_path / "run", overwrite=True, **QUICK)
    assert (tmp_path / "run/summary.json").exists()


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


def test_the_recorded_weight_is_the_one_that_was_applied():
    class Half(Weighting):
        def init(self, client_ids):
            return WeightingState({})

        def update(self, state, reports):
            return Weights({one.client: 0.5 for one in reports}), state

    assert {row["weight"] for row in train(small_federation(), Half(), **QUICK).rows} == {0.5}


def test_norm_keeps_the_length_when_only_some_take_part():
    """Weights (1.9, 0.1), only b takes part with n = 19: equal weights would give a direction of length 19, and so it stays."""
    method = FedGradNorm(normalize="norm", weight_lr=1e-6)
    weights, _ = method.update(
        WeightingState({"a": 1.9, "b": 0.1}, {"groups": {}}), [report("b", 19.0)]
    )
    assert weights.scale == pytest.approx(1.0)


def test_two_tasks_of_one_name_are_refused():
    one = small_client("a")
    other = small_client(
        "b", task=with_task(metrics=(Metric("error", accuracy, higher_is_better=False),))
    )
    with pytest.raises(
        FederationError, match="client 'b': two tasks with different metrics have the name 'sign'"
    ):
        Federation([one, other], small_encoder)


class Drifting(nn.Module):
    """An encoder with a buffer that a state dict leaves out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, inputs):
        if self.training:
            self.seen += 0.1
        return self.linear(inputs) + self.seen


@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_buffers_that_are_not_persistent_are_saved_too(tmp_path, buffers):
    federation = small_federation(encoder=Drifting, buffers=buffers)
    result = train(federation, run_dir=tmp_path / "run", **QUICK)
    for client in federation.clients:
        model = load_model(tmp_path / "run", client.id, federation)
        assert model.encoder.seen[0] > 0
        found = evaluate(client.task, model.encoder, model.head, client.test_data).metrics
        assert dict(found) == result.summary["clients"][client.id]["metrics"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server_optimizer": "adam", "server_momentum": 0.9}, "server_momentum only with"),
        ({"participants": (("a",),), "fraction_train": 0.5}, "participants or fraction_train"),
        ({"head_lr": 1e308}, "head_lr: expected a number above 0, at most 1e6"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        train(small_federation(), **settings)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("weighting", ":x"),
        ("weighting", "..a:b"),
        ("weighting", "os:path"),
        ("weighting", "math:pi"),
        ("weighting", "os:getcwd"),
        ("weighting", "builtins:object"),
        ("engine", "fedgradnorm.federations.digits:make"),
        ("federation", "builtins:dict"),
    ],
)
def test_a_name_that_makes_no_such_part_is_refused(kind, name):
    given = {
        "federation": {"seed": 0},
        "model": {"input_shape": (3,)},
        "engine": {"federation": small_federation(), "seed": 0},
    }.get(kind, {})
    with pytest.raises(ConfigError, match=rf"{kind}\.name: '{name}'|unknown key"):
        build(kind, Component(name=name), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Client(1, small_task("sign"), (X, Y)), "client id '1'"),
        (
            lambda: Federation([small_client("a")], small_encoder()),
            "encoder: expected a function that makes the encoder, found Sequential",
        ),
        (
            lambda: small_task("sign").__class__("t", nn.Identity, functional.mse_loss, accuracy),
            "metrics: expected a tuple of Metric",
        ),
        (
            lambda: Federation([small_client("a")], lambda: nn.Embedding(2, 3)),
            "do not pass through the encoder",
        ),
    ],
)
def test_likely_mistakes_are_named(make, message):
    with pytest.raises(FederationError, match=message):
        make()
    with pytest.raises(
        ConfigError, match="weighting: expected a name or a weighting such as FedGradNorm"
    ):
        train(small_federation(), FedGradNorm, **QUICK)


def test_clients_may_come_from_a_generator():
    assert Federation((small_client(id) for id in "ab"), small_encoder).client_ids == ["a", "b"]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    from fedgradnorm.federations.cache import cached_arrays

    monkeypatch.setenv("FEDGRADNORM_CACHE", "/dev/null/nowhere")
    assert cached_arrays("x", {}, lambda: {"a": torch.zeros(2).numpy()})["a"].shape == (2,)


def test_the_file_keeps_its_options_when_the_default_part_is_named_on_the_command_line(tmp_path):
    (tmp_path / "a.toml").write_text("[weighting]\ngamma = 0.5\n")
    assert load_config(tmp_path / "a.toml", ["weighting.name=fedgradnorm"]).weighting.options == {
        "gamma": 0.5
    }
    assert load_config(tmp_path / "a.toml", ["weighting.name=equal"]).weighting.options == {}


def test_a_last_metric_is_that_of_the_last_round_or_none(tmp_path):
    words = [
        "federation.name=digits",
        "federation.tasks=['mass']",
        "train.num_rounds=12",
        "train.encoder_lr=5000",
        "train.head_lr=5000",
    ]
    with pytest.warns(
        FedGradNormWarning,
        match="client 'mass' never counted: 12 of 12 reports were dropped: gradient: not finite",
    ):
        result = run(
            load_config(None, [*words, "train.min_clients=0", "run.dir=" + str(tmp_path / "run")])
        )
    mass = result.summary["tasks"]["mass"]
    assert mass["metric"] is None, "a site of which no report counted is no figure of its task"
    assert mass["loss_ratio"] is None
    assert json.loads((tmp_path / "run/summary.json").read_text()) == result.summary


@pytest.mark.parametrize("text", ["[" * 100_000, '{"round": ' + "[" * 100_000])
def test_deep_nesting_is_an_error_like_any_other(tmp_path, text):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    (tmp_path / "run/summary.json").write_text(text)
    with pytest.raises(RunError, match="summary.json"):
        Run(tmp_path / "run").summary()
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "deep.toml")


# ------------------------------------------------------------------------------------------------ a user's own weighting


class Own(Weighting):
    """A weighting whose answers, after a sound first round, are what a function makes of the clients' ids."""

    def __init__(self, answer, first=lambda ids: WeightingState(dict.fromkeys(ids, 1.0))):
        self.answer, self.init, self.rounds = answer, first, 0

    def update(self, state, reports):
        self.rounds += 1
        ids = [one.client for one in reports]
        return self.answer(ids) if self.rounds > 1 else (Weights(dict.fromkeys(ids, 1.0)), state)


def weights_of(number, memory=None, state=1.0):
    return lambda ids: (
        Weights(dict.fromkeys(ids, number)),
        WeightingState(dict.fromkeys(ids, state), memory or {}),
    )


@pytest.mark.parametrize(
    "answer",
    [
        weights_of(
            np.float32(0.5),
            {"steps": np.int64(3), "losses": [np.float32(0.25), torch.tensor(1.5)]},
            np.float64(2),
        ),
        weights_of(torch.tensor(0.5), {"steps": 3, "losses": [0.25, 1.5]}, torch.tensor(2.0)),
    ],
)
def test_numbers_of_numpy_and_torch_are_taken_as_pythons(tmp_path, answer):
    result = train(small_federation(), Own(answer), run_dir=tmp_path / "run", **QUICK)
    assert [row["weight"] for row in result.rows[3:]] == [0.5] * 3
    checkpoint, _, _ = load_newest(tmp_path / "run/checkpoints")
    assert checkpoint.server.weighting.weights == dict.fromkeys("abc", 2.0)
    assert checkpoint.server.weighting.memory == {"steps": 3, "losses": [0.25, 1.5]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ids: 1 / 0, r"update\(\) raised ZeroDivisionError: division by zero"),
        (
            lambda ids: dict.fromkeys(ids, 1.0),
            r"update\(\): expected a pair \(Weights, WeightingState\), found dict",
        ),
        (
            lambda ids: (Weights({"a": 1.0}), WeightingState({})),
            "weights.values: expected a number for every client, found none for 'b'",
        ),
        (weights_of(float("nan")), "weights.values: expected a finite number for 'a', found nan"),
        (weights_of("much"), "weights.values: expected a number for 'a', found 'much'"),
        (weights_of(0.0), "weights.values: expected a sum above 0, found 0"),
        (
            lambda ids: (Weights(dict.fromkeys(ids, 1.0)), {}),
            "expected a WeightingState, found dict",
        ),
        (
            weights_of(1.0, {"seen": {1, 2}}),
            r"state.memory\['seen'\]: expected what JSON has: .*, found set",
        ),
        (weights_of(1.0, {"seen": np.ones(2)}), r"found ndarray; .tolist\(\) makes numbers of it"),
        (weights_of(1.0, {3: 1.0}), "state.memory: expected texts as keys, found 3"),
        (
            weights_of(1.0, state=float("inf")),
            "state.weights: expected a finite number for 'a', found inf",
        ),
    ],
)
def test_a_weighting_that_gives_what_it_must_not_is_named_and_the_rounds_before_are_kept(
    tmp_path, answer, message
):
    with pytest.raises(WeightingError, match=f"weighting '.*:Own'.*{message}") as caught:
        train(small_federation(), Own(answer), run_dir=tmp_path / "run", **QUICK)
    assert caught.value.result.state.round == 1
    assert load_newest(tmp_path / "run/checkpoints")[0].server.round == 1


def test_a_weighting_without_a_first_state_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(WeightingError, match=r"init\(\): expected a WeightingState, found dict"):
        train(
            small_federation(),
            Own(None, lambda ids: dict.fromkeys(ids, 1.0)),
            run_dir=tmp_path / "run",
            **QUICK,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (lambda reports: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (
            lambda reports: reports[0].gradient.numpy(),
            "expected a tensor of torch.float32 and shape .*, found ndarray",
        ),
        (
            lambda reports: reports[0].gradient.double(),
            "expected a tensor of torch.float32 and shape .*, found torch.float64",
        ),
        (lambda reports: reports[0].gradient[1:], "expected a tensor of torch.float32 and shape"),
    ],
)
def test_an_aggregation_that_gives_what_it_must_not_is_named(monkeypatch, direction, message):
    monkeypatch.setattr(Mean, "__call__", lambda self, reports, weights: direction(reports))
    with pytest.raises(WeightingError, match=f"aggregation 'mean'.* {message}"):
        train(small_federation(), **QUICK)


# ------------------------------------------------------------------------------------------------ a run that is replaced


def failing(_):
    raise KeyError("on_round")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"participants": [["a"], []]}, ConfigError),
        ({"on_round": lambda: 0}, ConfigError),
        ({"should_stop": lambda rows: True}, ConfigError),
        ({"on_round": failing}, KeyError),
        ({"weighting": Own(None, lambda ids: 1 / 0)}, WeightingError),
        (
            {"min_clients": 3, "max_retries": 0, "engine": "tests.unit.test_hostile:Silent"},
            StoppedError,
        ),
    ],
)
def test_a_run_is_replaced_only_when_the_new_one_has_done_a_round(tmp_path, arguments, error):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(error):
        train(
            small_federation(), run_dir=tmp_path / "run", overwrite=True, **{**QUICK, **arguments}
        )
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    train(
        small_federation(),
        run_dir=tmp_path / "run",
        overwrite=True,
        should_stop=None,
        **{**QUICK, "num_rounds": 1},
    )
    assert len(Run(tmp_path / "run").rows()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


def test_a_run_that_is_killed_in_its_first_round_leaves_the_one_before_beside_it(tmp_path):
    folder, old = tmp_path / "run", tmp_path / ".run.replaced"
    train(small_federation(), run_dir=folder, **QUICK)
    shutil.copytree(folder, old)
    (folder / "metrics.jsonl").write_text("")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(KeyError):
        train(small_federation(), run_dir=folder, overwrite=True, on_round=failing, **QUICK)
    assert (folder / "summary.json").exists()
    assert not old.exists()
    shutil.copytree(folder, old)
    assert train(small_federation(), run_dir=folder, overwrite=True, **QUICK).state.round == 2
    assert not old.exists()


class Silent(Engine):
    """An engine whose clients never answer."""

    client_states: ClassVar = {}

    def __init__(self, federation: Federation, seed: int):
        pass

    def execute(self, instructions):
        return []

    def evaluate(self, encoder, buffers, batch_size):
        return {}

    def restore(self, states):
        pass
