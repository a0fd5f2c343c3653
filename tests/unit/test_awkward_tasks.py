"""Ordinary tasks that are awkward: solved ones, heads that begin with zeros, losses below zero, BatchNorm, metrics that raise."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import (
    Client,
    ClientError,
    Federation,
    FederationError,
    FedGradNorm,
    FedGradNormWarning,
    Metric,
    StoppedError,
    Task,
    evaluate_run,
    load_model,
    resume,
    train,
)
from fedgradnorm.report import write_report
from fedgradnorm.runs.reader import Run
from tests.helpers import accuracy, small_client, small_encoder, small_task

QUICK = {"num_rounds": 4, "head_steps": 2, "encoder_steps": 2, "batch_size": 8}
ENGINES = pytest.mark.parametrize("engine", ["reference", "vectorized"])
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def rows_of(result, client):
    return [row for row in result.rows if row["client"] == client]


# ------------------------------------------------------------------------------------------------ nothing left to learn


@ENGINES
@pytest.mark.parametrize(
    "method", ["fedrep", "fedper", "fedprox", "fedavg", "local", "centralized"]
)
def test_a_solved_task_counts_and_keeps_its_head(method, engine):
    """A hinge loss on data far apart is 0 after a few steps, and all gradients with it."""
    inputs = X.clone()
    inputs[:, 0] = (2.0 * Y - 1) * 8
    hinge = Task(
        "easy",
        partial(nn.Linear, out_features=2),
        partial(functional.multi_margin_loss, margin=0.1),
        small_task("x").metrics,
    )
    members = [
        Client("easy", hinge, (inputs, Y), (inputs, Y)),
        small_client("b"),
        small_client("c"),
    ]
    result = train(
        Federation(members, small_encoder),
        engine=engine,
        method=method,
        **{**QUICK, "num_rounds": 20},
        head_lr=0.5,
        encoder_lr=0.2,
    )
    rows = rows_of(result, "easy")
    assert not any(row["dropped"] for row in rows)
    assert rows[-1]["loss"] == 0.0
    assert rows[-1]["grad_norm"] == 0.0
    assert rows[-1]["inverse_training_rate"] == 0.0
    assert result.summary["tasks"]["easy"]["metric"]["last"] == 1.0
    assert sum(result.weights.values()) == pytest.approx(3)


@ENGINES
@pytest.mark.parametrize("method", ["fedrep", "fedper", "fedavg", "local", "centralized"])
def test_a_head_that_begins_with_zeros_moves(method, engine):
    def zero(features):
        made = nn.Linear(features, 2)
        nn.init.zeros_(made.weight)
        nn.init.zeros_(made.bias)
        return made

    task = Task("zero", zero, functional.cross_entropy)
    made = Federation([Client("zero", task, (X, Y)), small_client("b")], small_encoder)
    result = train(
        made,
        engine=engine,
        method=method,
        head_lr=0.2,
        **{**QUICK, "encoder_steps": 1, "num_rounds": 10},
    )
    assert not any(row["dropped"] for row in result.rows)
    assert result.model("zero").head.weight.abs().max() > 0
    assert result.model("zero").encoder[0].weight.isfinite().all()


# ------------------------------------------------------------------------------------------------ below zero


def gaussian(outputs, targets):
    return functional.gaussian_nll_loss(outputs[:, :1], targets, outputs[:, 1:].exp(), eps=1e-4)


def cosine(outputs, targets):
    return -functional.cosine_similarity(outputs, targets, dim=1).mean()


def of(loss, out_features, targets, **options):
    task = Task("t", partial(nn.Linear, out_features=out_features), loss, **options)
    return Federation(
        [Client("site", task, (X, targets)), small_client("b"), small_client("c")], small_encoder
    )


def dull(outputs, targets):
    """Starts far below zero."""
    return (outputs - targets).square().mean() - 10


@ENGINES
@pytest.mark.parametrize(
    "weighting", ["equal", "examples", "mgda", "pcgrad", "rlw", "afl", FedGradNorm(gamma=0.0)]
)
def test_where_no_losses_are_read_a_client_with_negative_ones_takes_part_as_any_other(
    weighting, engine
):
    shifted, plain = (
        train(of(loss, 1, X[:, :1]), weighting, engine=engine, **QUICK)
        for loss in (dull, functional.mse_loss)
    )
    assert not any(row["dropped"] for row in shifted.rows)
    rows = rows_of(shifted, "site")
    if weighting != "afl":  # which reads them, whatever their sign
        assert shifted.weights == pytest.approx(plain.weights)
        assert [row["loss"] + 10 for row in rows] == pytest.approx(
            [row["loss"] for row in rows_of(plain, "site")], abs=1e-3
        )
    assert {row["inverse_training_rate"] for row in rows} == {None}
    assert shifted.summary["tasks"]["t"]["loss_ratio"] is None


@ENGINES
@pytest.mark.parametrize("weighting", ["fedgradnorm", "dwa", "gls", "uncertainty", "qffl"])
def test_where_losses_are_read_it_is_said_at_the_start_what_to_do(tmp_path, weighting, engine):
    message = r"client 'site': its first loss is -\d\.\d+, and the weighting needs losses above the task's loss_floor, which is 0: give Task\('t'"
    with pytest.raises(FederationError, match=message):
        train(of(dull, 1, X[:, :1]), weighting, engine=engine, run_dir=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        FederationError, match="which is -10:"
    ):  # a first loss that is no more than its floor
        train(
            of(
                lambda outputs, targets: (0 * outputs).square().mean() - 10,
                1,
                X[:, :1],
                loss_floor=-10,
            ),
            weighting,
            engine=engine,
            **QUICK,
        )


def test_a_first_loss_that_is_too_near_its_floor_is_told_so():
    with pytest.raises(
        FederationError,
        match=r"client 'site': its first loss is \d.*e-4\d \(it is too near its floor\), and the weighting",
    ):
        train(
            of(lambda outputs, targets: 1e-40 * functional.mse_loss(outputs, targets), 1, X[:, :1]),
            **QUICK,
        )


@ENGINES
@pytest.mark.parametrize("weighting", ["fedgradnorm", "dwa", "gls", "uncertainty", "qffl", "afl"])
def test_with_its_floor_such_a_loss_is_the_loss_above_it(weighting, engine):
    floored, plain = (
        train(of(loss, 1, X[:, :1], loss_floor=floor), weighting, engine=engine, **QUICK)
        for loss, floor in ((dull, -10.0), (functional.mse_loss, 0.0))
    )
    assert floored.weights == pytest.approx(plain.weights, rel=1e-4)
    for one, other in zip(rows_of(floored, "site"), rows_of(plain, "site"), strict=True):
        assert one["inverse_training_rate"] == pytest.approx(
            other["inverse_training_rate"], rel=1e-4
        )


@ENGINES
def test_a_loss_that_falls_below_its_floor_on_the_way_keeps_the_weight_and_is_told_of(engine):
    made = of(gaussian, 2, 1 + 0.01 * X[:, :1])
    with pytest.warns(
        FedGradNormWarning,
        match="client 'site': from round [0-9]+ on its weight stays as it is where its loss is -",
    ):
        result = train(made, engine=engine, **{**QUICK, "num_rounds": 30}, head_lr=0.05)
    rows = rows_of(result, "site")
    below = [index for index, row in enumerate(rows) if row["loss"] < 0]
    assert rows[0]["loss"] > 0
    assert len(below) > 3
    assert not any(row["dropped"] for row in rows)
    for index in below[1:]:
        assert rows[index]["inverse_training_rate"] is None
        assert rows[index]["weight"] == pytest.approx(rows[index - 1]["weight"])


def test_cosine_losses_train_with_their_floor():
    result = train(
        of(cosine, 3, X[:, :3], loss_floor=-1.0),
        **{**QUICK, "num_rounds": 20},
        head_lr=0.2,
        encoder_lr=0.2,
    )
    assert rows_of(result, "site")[-1]["inverse_training_rate"] < 0.8
    assert not any(row["dropped"] for row in result.rows)


@pytest.mark.parametrize("floor", [float("nan"), float("inf"), "0", None, True])
def test_a_floor_that_is_no_number_is_refused(floor):
    with pytest.raises(FederationError, match="task 't': loss_floor: expected a finite number"):
        Task("t", nn.Identity, cosine, loss_floor=floor)


# ------------------------------------------------------------------------------------------------ the initial loss


def normed():
    layers = []
    for inputs, outputs in ((6, 32), (32, 32), (32, 16)):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


@ENGINES
@pytest.mark.parametrize("estimate", ["batches", "exact"])
@pytest.mark.parametrize(
    "make", [normed, small_encoder, lambda: nn.Sequential(normed(), nn.Dropout(0.3))]
)
def test_where_nothing_is_learned_the_rate_is_one(make, estimate, engine):
    inputs = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)) * 3 + 2
    sorted_by_target = inputs[inputs[:, 0].argsort()]
    targets = 0.1 * sorted_by_target[:, :1]
    task = Task("small", partial(nn.Linear, out_features=1), functional.mse_loss)
    settings = {
        "num_rounds": 1,
        "head_lr": 1e-9,
        "encoder_lr": 1e-9,
        "loss_estimate": estimate,
        "batch_size": 32,
        "engine": engine,
    }
    result = train(
        Federation([Client("site", task, (sorted_by_target, targets))], make), **settings
    )
    assert result.rows[0]["inverse_training_rate"] == pytest.approx(1.0, abs=0.1)


@ENGINES
def test_with_few_examples_and_dropout_the_initial_loss_is_a_mean_over_many_draws(engine):
    inputs = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    task = Task("small", partial(nn.Linear, out_features=1), functional.mse_loss)

    def encoder():
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5))

    settings = {
        "num_rounds": 1,
        "head_lr": 1e-9,
        "encoder_lr": 1e-9,
        "encoder_steps": 64,
        "engine": engine,
    }
    result = train(
        Federation([Client("site", task, (inputs, 1 + inputs[:, :1]))], encoder), **settings
    )
    assert result.rows[0]["inverse_training_rate"] == pytest.approx(1.0, abs=0.1)


def test_measuring_it_leaves_statistics_and_modes_as_they_were():
    from fedgradnorm.client import mean_loss
    from fedgradnorm.config import TrainConfig

    encoder, head = normed().eval(), nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
    before = [
        {name: value.clone() for name, value in module.state_dict().items()}
        for module in (encoder, head)
    ]
    client = Client("site", small_task("sign"), (X, Y))
    assert mean_loss(client, encoder, head, TrainConfig(batch_size=8)) > 0
    for module, was in zip((encoder, head), before, strict=True):
        assert not module.training
        assert all(torch.equal(was[name], value) for name, value in module.state_dict().items())


# ------------------------------------------------------------------------------------------------ what raises on the way


class Late:
    """Raises, or gives NaN, from one of its calls on."""

    def __init__(self, calls, outcome):
        self.calls, self.outcome = calls, outcome

    def __call__(self, outputs, targets):
        self.calls -= 1
        if self.calls < 0:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome
        return accuracy(outputs, targets)


@ENGINES
@pytest.mark.parametrize(
    "outcome", [ValueError("Input contains NaN."), float("nan"), float("-inf"), KeyError("x")]
)
def test_a_metric_that_raises_or_is_no_number_is_missing_and_ends_no_run(tmp_path, outcome, engine):
    metric = Late(8, outcome)
    task = Task(
        "sign",
        partial(nn.Linear, out_features=2),
        functional.cross_entropy,
        (Metric("auc", metric, True), small_task("x").metrics[0]),
    )
    made = Federation([Client("b", task, (X, Y), (X, Y))], small_encoder)
    settings = {**QUICK, "num_rounds": 10, "eval_every": 1, "engine": engine}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train(made, run_dir=tmp_path / "run", **settings)
    texts = [
        str(warning.message) for warning in said if issubclass(warning.category, FedGradNormWarning)
    ]
    rows = result.rows
    assert rows[0]["metric"] is not None
    assert rows[-1]["metric"] is None
    assert rows[-1]["metrics"]["accuracy"] is not None
    assert result.summary["tasks"]["sign"]["metric"]["last"] is None
    assert json.loads((tmp_path / "run/summary.json").read_text()) == result.summary
    if isinstance(outcome, Exception):
        named = type(outcome).__name__
        assert any(
            text.startswith("client 'b': metric 'auc' is missing from round ") and named in text
            for text in texts
        )
        assert rows[-1]["missing"]["auc"].startswith(named)
        assert result.summary["clients"]["b"]["missing"]["auc"].startswith(named)
    else:
        assert result.summary["clients"]["b"]["missing"]["auc"] == f"it gives {outcome}"
    write_report([Run(tmp_path / "run")], tmp_path / "report.html")
    metric.calls = 0
    assert math.isnan(evaluate_run(tmp_path / "run", made)["b"].metrics["auc"]) or not isinstance(
        outcome, Exception
    )


class Breaking(torch.utils.data.Dataset):
    """A data set on a disk that is gone after some examples."""

    def __init__(self, good):
        self.good = good

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.good -= 1
        if self.good < 0:
            raise OSError("the disk is gone")
        return X[index], Y[index]


class BreakingLoss:
    def __init__(self, good):
        self.good = good

    def __call__(self, outputs, targets):
        self.good -= 1
        if self.good < 0:
            raise ZeroDivisionError("so it is")
        return functional.cross_entropy(outputs, targets)


@ENGINES
@pytest.mark.parametrize("what", ["data", "test data", "loss"])
def test_what_raises_on_the_way_names_the_client_and_the_last_round_is_kept(tmp_path, what, engine):
    good = Breaking(520 if what == "data" else 560)
    task = Task(
        "breaks",
        partial(nn.Linear, out_features=2),
        BreakingLoss(60) if what == "loss" else functional.cross_entropy,
    )

    def federation(task, data):
        train_data, test_data = (data if what == name else (X, Y) for name in ("data", "test data"))
        return Federation(
            [Client("bad", task, train_data, test_data), small_client("other")], small_encoder
        )

    settings = {**QUICK, "num_rounds": 40, "eval_every": 1, "loss_examples": 8, "engine": engine}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedGradNormWarning)
        with pytest.raises(ClientError) as caught:
            train(federation(task, good), run_dir=tmp_path / "run", **settings)
    doing = "testing" if what == "test data" else "training in round "
    assert str(caught.value).startswith(f"client 'bad': {doing}")
    assert (
        "ZeroDivisionError: so it is" if what == "loss" else "OSError: the disk is gone"
    ) in str(caught.value)
    assert f"to resume: fedgradnorm resume {tmp_path / 'run'}" in str(caught.value)
    done = caught.value.result
    assert 0 < len(done.rows) < 80
    assert Run(tmp_path / "run").rows() == done.rows
    healed = federation(Task("breaks", task.head, functional.cross_entropy), Breaking(10**9))
    assert isinstance(load_model(tmp_path / "run", "bad", healed), nn.Module)
    result = resume(tmp_path / "run", healed, num_rounds=len(done.rows) // 2 + 2)
    assert len(result.rows) == len(done.rows) + 4


class Pruned(Exception):  # noqa: N818
    """What a tuner raises in a callback, and waits for."""


@ENGINES
@pytest.mark.parametrize("error", [Pruned("enough"), KeyboardInterrupt()])
def test_what_a_callback_raises_comes_through_with_what_is_done(tmp_path, error, engine):
    made = Federation([small_client("a"), small_client("b")], small_encoder)
    seen = []

    def note(rows):
        seen.append(rows)
        if len(seen) == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        train(
            made,
            run_dir=tmp_path / "run",
            on_round=note,
            engine=engine,
            **{**QUICK, "num_rounds": 9},
        )
    assert caught.value is error
    assert caught.value.result.state.round == 3
    assert "3 rounds are done; to resume: fedgradnorm resume" in caught.value.__notes__[-1]
    assert isinstance(load_model(tmp_path / "run", "a", made), nn.Module)
    whole = train(made, engine=engine, **{**QUICK, "num_rounds": 9})
    assert resume(tmp_path / "run", made).weights == whole.weights


@ENGINES
def test_a_stop_carries_its_result_and_leaves_models(tmp_path, engine):
    made, seen = Federation([small_client("a"), small_client("b")], small_encoder), []
    settings = {**QUICK, "num_rounds": 9, "engine": engine}
    with pytest.raises(StoppedError) as caught:
        train(
            made,
            run_dir=tmp_path / "run",
            on_round=seen.append,
            should_stop=lambda: len(seen) >= 3,
            **settings,
        )
    result = caught.value.result
    assert result.state.round == 3
    models = result.model("a"), load_model(tmp_path / "run", "a", made)
    assert torch.equal(models[0](X), models[1](X))
    assert result.summary["rounds"] == 3
