"""The constant answer: what it is by the task's own loss, and that it is none where that is not known."""

from functools import partial

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional

from fedgradnorm import Client, Federation, FederationError, Metric, Task, train
from fedgradnorm.evaluation import constant_guess
from fedgradnorm.guess import answer_kind, constant_answer
from tests.helpers import accuracy, small_encoder
from tests.unit.losses import contrastive, cox

FLOAT = torch.float32
ERROR = Metric(
    "error",
    lambda outputs, targets: float((outputs - targets).abs().mean()),
    higher_is_better=False,
)


def task(loss, *metrics, **options):
    return Task("t", partial(nn.Linear, out_features=1), loss, metrics, **options)


CLASSES = torch.tensor([2, 2, 2, 0, 3])
NUMBERS = torch.tensor([[2.0], [5.0], [2.0]])


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "kind"),
    [
        (functional.cross_entropy, (4,), CLASSES, "scores"),
        (functional.multi_margin_loss, (4,), CLASSES, "scores"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), (4,), CLASSES, "scores"),
        (functional.nll_loss, (4,), CLASSES, "scores"),
        (functional.cross_entropy, (3,), CLASSES, None),  # a class without a score
        (functional.cross_entropy, (4,), CLASSES - 1, None),
        (
            functional.cross_entropy,
            (4, 5, 5),
            torch.zeros(3, 5, 5, dtype=torch.int64),
            None,
        ),  # maps
        (contrastive, (4,), CLASSES, None),
        (functional.mse_loss, (1,), NUMBERS, "values"),
        (functional.l1_loss, (1,), NUMBERS, "values"),
        (functional.huber_loss, (1,), NUMBERS, "values"),
        (
            lambda outputs, targets: functional.mse_loss(outputs, targets.float()),
            (1,),
            NUMBERS.long(),
            "values",
        ),
        (
            lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets.float()),
            (1,),
            CLASSES,
            None,
        ),
        (functional.binary_cross_entropy_with_logits, (1,), (NUMBERS > 3).float(), None),
        (functional.binary_cross_entropy, (1,), (NUMBERS > 3).float(), "values"),  # probabilities
        (functional.poisson_nll_loss, (1,), NUMBERS, None),
        (cox, (1,), torch.rand(6, 2), None),
        (
            lambda outputs, targets: torch.maximum(
                0.9 * (targets - outputs), 0.1 * (outputs - targets)
            ).mean(),
            (1,),
            NUMBERS,
            None,
        ),
        (lambda outputs, targets: 1 / 0, (1,), NUMBERS, None),
    ],
)
def test_what_outputs_are_is_found_out_by_the_loss(loss, shape, targets, kind):
    assert answer_kind(task(loss), shape, FLOAT, targets) == kind


def test_the_constant_guess_is_the_majority_class_or_the_mean():
    classes = task(functional.cross_entropy, Metric("accuracy", accuracy, higher_is_better=True))
    assert constant_guess(classes, (torch.zeros(5, 1), CLASSES), (4,), FLOAT) == {"accuracy": 0.6}
    assert constant_guess(
        task(functional.mse_loss, ERROR),
        (torch.zeros(2, 1), torch.tensor([[2.0], [5.0]])),
        (1,),
        FLOAT,
    ) == {"error": 1.5}
    whole = task(lambda outputs, targets: functional.mse_loss(outputs, targets.float()), ERROR)
    ages = torch.tensor([[60], [20], [20], [20]])
    assert constant_guess(whole, (torch.zeros(4, 1), ages), (1,), FLOAT) == {"error": 15.0}, (
        "the mean of 30, not a class 20"
    )


@pytest.mark.parametrize("batch_size", [1, 2, 512])
def test_it_is_the_same_whatever_the_batches(batch_size):
    classes = task(functional.cross_entropy, Metric("accuracy", accuracy, True, batched=True))
    found = constant_guess(classes, (torch.zeros(5, 1), CLASSES), (4,), FLOAT, batch_size)
    assert found == {"accuracy": pytest.approx(0.6)}
    error = Metric("error", ERROR.function, False, batched=True)
    assert constant_guess(
        task(functional.mse_loss, error), (torch.zeros(3, 1), NUMBERS), (1,), FLOAT, batch_size
    ) == {"error": pytest.approx(4 / 3)}


def test_a_task_may_say_its_own():
    logits = task(
        functional.binary_cross_entropy_with_logits,
        ERROR,
        guess=lambda targets: torch.logit(targets.mean()),
    )
    positives = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    assert constant_answer(
        logits, (1,), FLOAT, [positives[:2], positives[2:]]
    ).item() == pytest.approx(-1.0986, abs=1e-4)
    for constant in (3.0, torch.tensor([3.0])):
        assert constant_guess(
            task(cox, ERROR, guess=constant), (torch.zeros(3, 1), NUMBERS), (1,), FLOAT
        ) == {"error": pytest.approx(4 / 3)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_a_constant_does_not_have_is_none(tmp_path, value):
    def correlation(outputs, _):
        return value if bool((outputs == outputs[:1]).all()) else 0.5

    def raising(outputs, _):
        if bool((outputs == outputs[:1]).all()):
            raise ValueError("all the same")
        return 0.5

    metrics = tuple(
        Metric(name, function, True)
        for name, function in (
            ("correlation", correlation),
            ("rank", raising),
            ("error", lambda o, t: 0.25),
        )
    )
    inputs = torch.randn(20, 6)
    made = Federation(
        [
            Client(
                "a",
                Task("dose", partial(nn.Linear, out_features=1), functional.mse_loss, metrics),
                (inputs, inputs[:, :1]),
                (inputs, inputs[:, :1]),
            )
        ],
        small_encoder,
    )
    result = train(made, num_rounds=1, run_dir=tmp_path / "run")
    assert result.summary["clients"]["a"]["guess"] == {"error": 0.25}
    assert result.summary["tasks"]["dose"]["metric"]["guess"] is None


def site(loss, targets, out_features, **options):
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    return Client(
        "site",
        Task("t", partial(nn.Linear, out_features=out_features), loss, **options),
        (inputs, targets(inputs)),
    )


@pytest.mark.parametrize("engine", ["reference", "vectorized"])
@pytest.mark.parametrize("clients", [1, 6])
def test_the_initial_loss_may_be_that_of_the_constant_answer(engine, clients):
    """log C for C classes, the spread for numbers: the same for every initial model."""
    settings = {
        "num_rounds": 1,
        "initial_loss": "guess",
        "engine": engine,
        "loss_examples": 40,
        "batch_size": 40,
    }
    for loss, targets, out_features, expected in (
        (functional.cross_entropy, lambda x: (x[:, 0] > 0).long(), 5, 1.6094379),
        (functional.mse_loss, lambda x: x[:, :1] * 3, 1, None),
    ):
        first = site(loss, targets, out_features)
        members = [Client(f"site-{index}", first.task, first.train) for index in range(clients)]
        rows = train(Federation(members, small_encoder), **settings).rows
        expected = expected or float(first.train[1].var(correction=0))
        assert [row["initial_loss"] for row in rows] == pytest.approx(
            [expected] * clients, rel=1e-5
        )


def test_an_initial_loss_by_an_answer_that_is_not_known_is_refused():
    made = Federation(
        [site(functional.binary_cross_entropy_with_logits, lambda x: (x[:, :1] > 0).float(), 1)],
        small_encoder,
    )
    with pytest.raises(FederationError, match="client 'site': initial_loss = 'guess': .*task 't'"):
        train(made, num_rounds=1, initial_loss="guess")
    own = Federation(
        [
            site(
                functional.binary_cross_entropy_with_logits,
                lambda x: (x[:, :1] > 0).float(),
                1,
                guess=0.0,
            )
        ],
        small_encoder,
    )
    assert train(own, num_rounds=1, initial_loss="guess").rows[0]["initial_loss"] == pytest.approx(
        0.6931, abs=1e-4
    )


@pytest.mark.parametrize(
    ("guess", "out_features", "message"),
    [
        (0.5, 3, r"expected one output of shape \(3,\), found the number 0.5"),
        (lambda targets: 0.5, 3, r"expected one output of shape \(3,\), found the number 0.5"),
        (lambda targets: float("inf"), 1, "expected finite numbers, found inf"),
        (torch.tensor([float("nan")]), 1, "expected finite numbers, found nan"),
        (lambda targets: True, 1, "expected numbers, found True"),
    ],
)
def test_an_answer_that_is_none_is_named(guess, out_features, message):
    made = Federation(
        [site(functional.mse_loss, lambda x: x[:, :out_features], out_features, guess=guess)],
        small_encoder,
    )
    with pytest.raises(FederationError, match=f"client 'site': its task's guess: {message}"):
        train(made, num_rounds=1)


@pytest.mark.parametrize("batch_size", [1, 2, 512])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [(functional.l1_loss, 3.0), (nn.L1Loss(), 3.0), (functional.mse_loss, 24.0)],
)
def test_the_constant_answer_to_an_absolute_error_is_the_median(loss, expected, batch_size):
    targets = torch.tensor([[2.0], [3.0], [100.0], [1.0], [14.0]])
    assert constant_answer(
        task(loss), (1,), FLOAT, targets.split(batch_size)
    ).item() == pytest.approx(expected)


def test_what_reads_the_order_of_outputs_alone_has_no_constant_answer():
    def auc(outputs, targets):
        return float(roc_auc_score(targets.flatten().numpy(), outputs.flatten().numpy()))

    def correct(outputs, targets):
        return float(((outputs > 0) == (targets > 0.5)).double().mean())

    metrics = tuple(
        Metric(name, function, True) for name, function in (("auc", auc), ("accuracy", correct))
    )
    task = Task(
        "sick",
        partial(nn.Linear, out_features=1),
        functional.binary_cross_entropy_with_logits,
        metrics,
        guess=-0.7,
    )
    targets = (torch.arange(100)[:, None] % 3 == 0).float()
    guess = constant_guess(task, (torch.zeros(100, 4), targets), (1,), torch.float32)
    assert guess == {"accuracy": pytest.approx(0.66)}


def test_an_answer_of_another_shape_is_named():
    inputs = torch.randn(20, 6)
    wrong = Task(
        "dose",
        partial(nn.Linear, out_features=1),
        functional.mse_loss,
        (ERROR,),
        guess=torch.zeros(3),
    )
    made = Federation(
        [Client("a", wrong, (inputs, inputs[:, :1]), (inputs, inputs[:, :1]))], small_encoder
    )
    with pytest.raises(
        FederationError, match=r"client 'a': its task's guess: expected one output of shape \(1,\)"
    ):
        train(made, num_rounds=1)
