"""Tests of models, a batch at a time, and what is kept of them."""

from functools import partial
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedgradnorm import Client, Federation, FederationError, Metric, Task, train
from fedgradnorm.data import LARGE_BYTES, in_batches
from fedgradnorm.evaluation import NotFinite, evaluate
from tests.helpers import accuracy, small_client, small_encoder

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
LINEAR = partial(nn.Linear, out_features=2)


def sizes_seen():
    seen = []

    def metric(outputs, targets):
        seen.append(len(outputs))
        assert len(targets) == len(outputs)
        return accuracy(outputs, targets)

    return seen, metric


@pytest.mark.parametrize("batch_size", [1, 7, 50, 512])
@pytest.mark.parametrize("data", [(X, Y), TensorDataset(X, Y)])
def test_a_metric_may_be_told_to_take_batches(batch_size, data):
    seen, metric = sizes_seen()
    whole, by_batch = (
        Task(
            "sign",
            LINEAR,
            functional.cross_entropy,
            (Metric("accuracy", metric, True, batched=batched),),
        )
        for batched in (False, True)
    )
    encoder, head = small_encoder(), nn.Linear(4, 2)
    expected = evaluate(whole, encoder, head, data, batch_size)
    assert seen == [50]
    seen.clear()
    found = evaluate(by_batch, encoder, head, data, batch_size)
    assert sum(seen) == 50
    assert max(seen) <= batch_size
    assert found.metrics["accuracy"] == pytest.approx(expected.metrics["accuracy"])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_no_more_than_a_batch_of_outputs_is_alive_beside_what_metrics_keep(batched):
    outputs, most = [], []

    class Head(nn.Linear):
        def forward(self, features):
            made = super().forward(features)
            outputs.append(ref(made))
            return made

    def metric(*_):
        most.append(sum(one() is not None for one in outputs))
        return 0.5

    task = Task(
        "sign", LINEAR, functional.cross_entropy, (Metric("m", metric, True, batched=batched),)
    )
    evaluate(task, small_encoder(), Head(4, 2), (X, Y), 5)
    assert len(outputs) == 10
    assert max(most) <= 2


def test_the_settings_say_how_many_examples_pass_at_once():
    for engine in ("reference", "vectorized", "flower-local"):
        seen, metric = sizes_seen()
        task = Task(
            "sign",
            LINEAR,
            functional.cross_entropy,
            (Metric("accuracy", metric, True, batched=True),),
        )
        train(
            Federation([Client("a", task, (X, Y), (X, Y)), small_client("b")], small_encoder),
            engine=engine,
            num_rounds=1,
            eval_batch_size=9,
        )
        assert max(seen[-6:]) == 9
        assert sum(seen[-6:]) == 50


def test_large_inputs_pass_a_few_at_once_whatever_the_settings_say():
    images = torch.zeros(20, 3, 512, 512)
    most = max(len(inputs) for inputs, _ in in_batches((images, torch.zeros(20)), 512))
    assert most == LARGE_BYTES // images[0].nbytes
    assert sum(len(inputs) for inputs, _ in in_batches((images, torch.zeros(20)), 512)) == 20


@pytest.mark.parametrize("small", [True, False])
def test_a_metric_that_changes_its_arguments_spoils_no_other(monkeypatch, small):
    monkeypatch.setattr("fedgradnorm.evaluation.COPIED_BYTES", 2**20 if small else 0)

    def spoiling(outputs, targets):
        outputs.zero_()
        return float(targets.zero_().sum())

    metrics = [
        Metric("first", accuracy, True),
        Metric("spoils", spoiling, True),
        Metric("last", accuracy, True),
    ]
    data = X.clone(), Y.clone()
    found = evaluate(
        Task("sign", LINEAR, functional.cross_entropy, metrics),
        small_encoder(),
        nn.Linear(4, 2),
        data,
    )
    assert torch.equal(data[1], Y)
    if small:
        assert found.metrics["first"] == found.metrics["last"]
        assert found.failed == {}
    else:
        assert found.failed.keys() == {"spoils", "last"}
        assert "'spoils'" in found.failed["last"]


@pytest.mark.parametrize("batched", [True, False])
def test_a_loss_that_changes_its_arguments_spoils_no_metric(batched):
    def loss(outputs, targets):
        return functional.cross_entropy(outputs.mul_(-1), targets.mul_(0))

    encoder, head, metrics = (
        small_encoder(),
        nn.Linear(4, 2),
        (Metric("m", accuracy, True, batched=batched),),
    )
    for data in ((X.clone(), Y.clone()), TensorDataset(X, Y)):
        values = [
            evaluate(Task("sign", LINEAR, one, metrics), encoder, head, data, 7).metrics
            for one in (loss, functional.cross_entropy)
        ]
        assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_metric_that_is_no_number_says_so(value, batched):
    task = Task(
        "sign",
        LINEAR,
        functional.cross_entropy,
        (Metric("m", lambda outputs, targets: float(value), True, batched=batched),),
    )
    reason = evaluate(task, small_encoder(), nn.Linear(4, 2), (X, Y)).failed["m"]
    assert isinstance(reason, NotFinite)
    assert reason.endswith(f" {value}")


@pytest.mark.parametrize("function", [None, 3, "accuracy"])
def test_a_metric_that_is_no_function_is_refused(function):
    with pytest.raises(
        FederationError, match=r"metric 'm': expected a function \(outputs, targets\) -> float"
    ):
        Metric("m", function, higher_is_better=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metric("", accuracy, True), "metric: expected a name"),
        (
            lambda: Metric("m", accuracy, "yes"),
            "metric 'm': higher_is_better: expected True or False, found 'yes'",
        ),
        (
            lambda: Metric("m", accuracy, True, percent=1),
            "metric 'm': percent: expected True or False, found 1",
        ),
        (
            lambda: Metric("m", accuracy, True, batched=None),
            "metric 'm': batched: expected True or False, found None",
        ),
        (
            lambda: Task("t", LINEAR, functional.mse_loss, guess=True),
            "task 't': guess: expected a tensor, a number or a function",
        ),
        (
            lambda: Task("t", LINEAR, functional.mse_loss, guess=float("nan")),
            "task 't': guess: expected a finite number, found nan",
        ),
        (lambda: Task("", LINEAR, functional.cross_entropy), "task: expected a name"),
        (
            lambda: Task("t", nn.Linear(4, 2), functional.cross_entropy),
            "task 't': head: expected a function .*, found a module",
        ),
        (lambda: Task("t", 5, functional.cross_entropy), "task 't': head: expected a function"),
        (
            lambda: Task("t", LINEAR, nn.CrossEntropyLoss),
            r"loss: expected a function, found the class CrossEntropyLoss: CrossEntropyLoss\(\)",
        ),
        (lambda: Task("t", LINEAR, "mse"), "task 't': loss: expected a function"),
        (
            lambda: Task("t", LINEAR, nn.Bilinear(2, 2, 1)),
            "task 't': loss: it has parameters, which nothing would train",
        ),
        (
            lambda: Task("t", LINEAR, functional.cross_entropy, Metric("m", accuracy, True)),
            "metrics: expected a tuple of Metric",
        ),
        (
            lambda: Task("t", LINEAR, functional.cross_entropy, guess="majority"),
            "guess: expected a tensor, a number or a function",
        ),
        (lambda: Client("a", "sign", (X, Y)), "client 'a': task: expected a Task, found str"),
        (
            lambda: Federation(small_client("a"), small_encoder),
            "clients: expected a list of Client, found Client",
        ),
        (
            lambda: Federation({"a": small_client("a")}, small_encoder),
            "clients: expected a list of Client, found dict",
        ),
        (
            lambda: Federation([small_client("a"), "b"], small_encoder),
            "clients: expected a list of Client, found str at place 1",
        ),
        (
            lambda: Federation(None, small_encoder),
            "clients: expected a list of Client, found NoneType",
        ),
        (lambda: Federation([], small_encoder), "a federation needs at least one client"),
        (
            lambda: Federation([small_client("a")], None),
            "encoder: expected a function that makes the encoder, found NoneType",
        ),
        (
            lambda: Federation([small_client("a")], small_encoder, example=X),
            r"example: expected one input as a batch of one, .* found \(50, 6\)",
        ),
        (
            lambda: Federation([small_client("a")], small_encoder, example=[1.0]),
            "example: expected one input as a batch of one, .* found list",
        ),
        (
            lambda: Federation(
                [Client("a", Task("t", lambda _: nn.Flatten(0), functional.mse_loss), (X, Y))],
                small_encoder,
            ),
            "head: expected outputs of shape",
        ),
        (lambda: train([small_client("a")]), "federation: expected a Federation, found list"),
    ],
)
def test_arguments_of_other_kinds_are_named(make, message):
    with pytest.raises(FederationError, match=message):
        make()


def test_metrics_may_be_a_list():
    assert (
        Task("t", LINEAR, functional.cross_entropy, [Metric("m", accuracy, True)]).metrics[0].name
        == "m"
    )
