"""What is looked for before a run begins: numbers that are not finite, shapes that broadcast, losses that are no losses."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedgradnorm import Client, Federation, FederationError, FedGradNormWarning, Metric, Task, train
from fedgradnorm.trial import check_client
from tests.helpers import accuracy, batch_norm_encoder, small_client, small_encoder, small_task
from tests.unit.losses import contrastive, cox

QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(dim=1) > 0).long()
Z = X[:, :3].mean(dim=1)
ENGINES = pytest.mark.parametrize("engine", ["reference", "vectorized"])


def federation(task, train_data=(X, Z[:, None]), test=None, encoder=small_encoder):
    return Federation([Client("site", task, train_data, test), small_client("other")], encoder)


def regression(loss=functional.mse_loss, metrics=(), out_features=1, **options):
    return Task("dose", partial(nn.Linear, out_features=out_features), loss, metrics, **options)


def refused(made, message, **settings):
    with pytest.raises(FederationError, match=message):
        train(made, **{**QUICK, **settings})


# ------------------------------------------------------------------------------------------------ not finite


def spoilt(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@ENGINES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 39])
def test_numbers_that_are_not_finite_are_found_wherever_they_are(value, row, engine):
    inputs, targets = spoilt(X, (row, 2), value), Z[:, None]
    refused(
        federation(regression(), (inputs, targets)),
        f"client 'site': example {row} .*training.* input .*{value}.* (nan|inf)",
        engine=engine,
    )
    targets = spoilt(targets, (row, 0), value)
    refused(
        federation(regression(), (X, targets)),
        f"client 'site': example {row} .*training.* target .*{value}.* (nan|inf)",
        engine=engine,
    )


def test_a_model_that_knows_what_to_do_with_gaps_may_have_them():
    class Filling(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.nan_to_num(0.0))

    def masked(outputs, targets):
        known = targets.isfinite()
        return (outputs - targets.nan_to_num(0.0)).square().mul(
            known
        ).sum() / known.sum().clamp_min(1)

    gaps = (
        spoilt(X, (torch.arange(40), torch.arange(40) % 6), float("nan")),
        spoilt(Z[:, None], slice(0, 20), float("nan")),
    )
    result = train(
        federation(regression(masked), gaps, gaps, encoder=lambda: Filling(6, 4)), **QUICK
    )
    assert not any(row["dropped"] for row in result.rows)


def test_a_first_loss_or_gradient_that_is_not_finite_is_refused():
    refused(
        federation(regression(lambda outputs, targets: (outputs - targets).square().mean() / 0)),
        "client 'site': the loss of its first batch is inf",
    )
    root = regression(lambda outputs, targets: (0 * outputs).abs().sqrt().mean())
    refused(
        federation(root),
        "client 'site': the gradient of its first batch is not finite, at the encoder's '0.",
    )


# ------------------------------------------------------------------------------------------------ shapes and losses


ERROR = Metric(
    "error",
    lambda outputs, targets: float((outputs - targets).abs().mean()),
    higher_is_better=False,
)


@ENGINES
@pytest.mark.parametrize(
    "loss",
    [
        functional.mse_loss,
        functional.l1_loss,
        functional.huber_loss,
        nn.SmoothL1Loss(),
        lambda outputs, targets: (outputs - targets).square().mean(),
        lambda outputs, targets: torch.log(torch.cosh(outputs - targets)).mean(),
    ],
)
@pytest.mark.parametrize("flat", ["targets", "outputs"])
def test_targets_that_broadcast_against_outputs_are_refused(loss, flat, engine):
    task, targets = regression(loss), Z
    if flat == "outputs":
        task, targets = (
            Task(
                "dose", lambda features: nn.Sequential(nn.Linear(features, 1), nn.Flatten(0)), loss
            ),
            Z[:, None],
        )
    message = r"client 'site': the loss .* \((8|40)(, 1|,)\), targets \((8|40)(, 1|,)\)"
    refused(federation(task, (X, targets)), message, engine=engine)


def test_a_metric_that_broadcasts_is_refused():
    squeezing = regression(
        lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets), (ERROR,)
    )
    refused(
        federation(squeezing, (X, Z), (X, Z)),
        r"client 'site': metric 'error' .* \(40, 1\), targets \(40,\)",
    )
    refused(
        federation(squeezing, (X, Z), TensorDataset(X, Z)),
        "client 'site': metric 'error' broadcasts",
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets),
        lambda outputs, targets: functional.mse_loss(outputs, targets[:, None]),
        lambda outputs, targets: functional.binary_cross_entropy_with_logits(
            outputs.squeeze(1), (targets > 0).float()
        ),
    ],
)
def test_losses_that_know_of_the_other_shape_are_fine(loss):
    train(federation(regression(loss), (X, Z)), **QUICK)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (
            Task("survival", partial(nn.Linear, out_features=1), cox),
            torch.stack([Z.exp(), (Z > 0).float()], dim=1),
        ),
        (Task("alike", partial(nn.Linear, out_features=3), contrastive), Y),
        (Task("hinge", partial(nn.Linear, out_features=2), functional.multi_margin_loss), Y),
        (
            Task("poisson", partial(nn.Linear, out_features=1), functional.poisson_nll_loss),
            Z[:, None].exp().round(),
        ),
        (
            Task("soft", partial(nn.Linear, out_features=3), functional.cross_entropy),
            torch.rand(40, 3).softmax(dim=1),
        ),
        (
            Task(
                "log classes",
                lambda features: nn.Sequential(nn.Linear(features, 5), nn.LogSoftmax(1)),
                functional.nll_loss,
            ),
            Y,
        ),
        (
            Task(
                "weighted",
                partial(nn.Linear, out_features=2),
                nn.CrossEntropyLoss(weight=torch.tensor([0.1, 2.0])),
            ),
            Y,
        ),
        (
            Task(
                "interval",
                partial(nn.Linear, out_features=3),
                lambda o, t: torch.maximum(0.9 * (t - o), -0.1 * (t - o)).mean(),
            ),
            Z[:, None],
        ),
        (
            Task(
                "probability",
                lambda f: nn.Sequential(nn.Linear(f, 1), nn.Sigmoid()),
                functional.binary_cross_entropy,
            ),
            (Z[:, None] > 0).float(),
        ),
        (
            Task(
                "labels",
                partial(nn.Linear, out_features=3),
                functional.binary_cross_entropy_with_logits,
            ),
            (X[:, :3] > 0).float(),
        ),
    ],
)
@ENGINES
def test_losses_of_many_kinds_are_fine(task, targets, engine):
    result = train(federation(task, (X, targets), (X, targets)), "equal", engine=engine, **QUICK)
    assert not any(row["dropped"] for row in result.rows)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss(reduction="sum"), 'twice the loss: .*reduction="mean"'),
        (partial(functional.cross_entropy, reduction="none"), r"the loss gives shape \(8,\)"),
        (
            lambda outputs, targets: (outputs[:, :1] - targets).square().mean(),
            r"the loss does not depend on outputs\[:, 1\]",
        ),
        (lambda outputs, targets: 1.5, "the loss gives float, expected a tensor of one number"),
        (
            lambda outputs, targets: outputs.detach().mean(),
            "the loss does not depend on the outputs",
        ),
        (lambda outputs, targets: torch.tensor(1.0), "the loss does not depend on the outputs"),
        (
            lambda outputs, targets: (outputs[0] - targets[0]).square().mean(),
            "depends on 1 of them",
        ),
        (lambda outputs, targets: (outputs - targets).square().sum() + 10, "twice the loss"),
    ],
)
def test_losses_that_are_none_are_refused(loss, message):
    of_classes = isinstance(loss, partial)
    task, targets = (
        regression(loss, out_features=1 if isinstance(loss, nn.MSELoss) else 2),
        Y if of_classes else Z[:, None],
    )
    refused(federation(task, (X, targets)), f"client 'site': .*{message}")


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "place"),
    [
        (lambda outputs, targets: functional.cross_entropy(outputs[:, :2], targets), (3,), Y, 2),
        (
            lambda outputs, targets: functional.nll_loss(outputs[:, :2].log_softmax(1), targets),
            (3,),
            Y,
            2,
        ),
        (
            lambda outputs, targets: functional.binary_cross_entropy_with_logits(
                outputs[:, 0], targets
            ),
            (2, 4, 4),
            (torch.rand(40, 4, 4) > 0.5).float(),
            1,
        ),
        (lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets), (3,), Z, 1),
    ],
)
def test_outputs_that_no_loss_reads_are_refused(loss, shape, targets, place):
    def head(features):
        return nn.Sequential(nn.Linear(features, math.prod(shape)), nn.Unflatten(1, shape))

    refused(
        federation(Task("odd", head, loss), (X, targets)),
        rf"client 'site': the loss does not depend on outputs\[:, {place}\]",
    )


def dropping(outputs, targets):
    return functional.mse_loss(functional.dropout(outputs, 0.5), targets)


def triplet(outputs, targets):
    return (outputs[0::2] - outputs[1::2]).norm(dim=1).sub(50).clamp_min(
        0
    ).mean() + 0 * targets.sum()


def chosen(outputs, targets):
    """Of each output the number that its target names: an action, of which not all were tried."""
    return (outputs.gather(1, targets[:, None])[:, 0] - 1).square().mean()


def linear(out_features, *layers):
    return lambda features: nn.Sequential(nn.Linear(features, out_features), *layers)


GAPS = torch.full((40, 2), float("nan")).index_fill_(0, torch.tensor([3]), 1.0)


@pytest.mark.parametrize(
    ("head", "loss", "targets"),
    [
        (linear(1), lambda o, t: (o - t).abs().sub(50).clamp_min(0).mean(), Z[:, None]),
        (
            linear(2),
            lambda o, t: ((o - t).abs() - torch.tensor([50.0, 0.01])).clamp_min(0).mean(),
            X[:, :2],
        ),
        (linear(3), triplet, Y),
        (linear(1), dropping, Z[:, None]),
        (linear(1, nn.Flatten(0)), functional.mse_loss, Z),
        (linear(1, nn.Flatten(0)), lambda o, t: functional.mse_loss(o, t.float()), Y),
        (linear(1), lambda o, t: functional.mse_loss(o + 0.1 * torch.randn_like(o), t), Z[:, None]),
        (
            linear(2, nn.Softmax(1)),
            lambda o, t: functional.binary_cross_entropy(o[:, 1], t),
            (Z > 0).float(),
        ),
        (
            linear(5, nn.LogSoftmax(1)),
            lambda o, t: -(o * functional.one_hot(t, 5)).sum(dim=1).mean(),
            Y,
        ),
        (linear(5), chosen, Y),
        (linear(5), partial(functional.multi_margin_loss, margin=0.1), Y),
        (
            linear(3),
            partial(functional.cross_entropy, ignore_index=-1),
            torch.where(torch.arange(40) % 4 == 0, Y, -1),
        ),
        (
            linear(2),
            lambda o, t: (
                (o - t.nan_to_num(0.0)).square().mul(t.isfinite()).sum()
                / t.isfinite().sum().clamp_min(1)
            ),
            GAPS,
        ),
        (linear(1), lambda o, t: (o - t).square().max(), Z[:, None]),
        (
            lambda features: nn.Sequential(nn.Unflatten(1, (features, 1)), nn.Linear(1, 1)),
            lambda o, t: functional.mse_loss(o[:, -1], t),
            Z[:, None],
        ),
        (linear(1), lambda o, t: (o.mean() - t.mean()).abs(), Z),
        (linear(1), lambda o, t: functional.mse_loss(o[:, 0].sort().values, t.sort().values), Z),
        (linear(3), lambda o, t: (o[:, None] - t).square().mean(), X[:, :3]),
        (linear(2), lambda o, t: functional.cross_entropy(o.sub_(1), t.clamp_(0, 1)), Y),
    ],
)
def test_sound_losses_are_not_refused(head, loss, targets):
    train(federation(Task("odd", head, loss), (X, targets.clone())), "equal", **QUICK)


@pytest.mark.parametrize(
    ("function", "out_features", "targets"),
    [
        (lambda outputs, targets: (outputs.argmax(1) == targets).double().mean(), 2, Y[:, None]),
        (
            lambda outputs, targets: (outputs.argmax(1, keepdim=True) == targets).double().mean(),
            2,
            Y,
        ),
        (
            lambda outputs, targets: ((outputs - targets[:, 0]).square() * targets[:, 1]).mean(),
            1,
            X[:, :2],
        ),
        (
            lambda outputs, targets: functional.gaussian_nll_loss(
                outputs[:, :1], targets, outputs[:, 1:].exp()
            ),
            2,
            Z,
        ),
    ],
)
@pytest.mark.parametrize("examples", [1, 40])
def test_targets_that_broadcast_are_found_whatever_the_sizes(
    function, out_features, targets, examples
):
    task = regression(
        lambda outputs, targets: outputs.square().mean(),
        (Metric("error", function, False),),
        out_features,
    )
    data = X[:examples], targets[:examples]
    refused(federation(task, data, data), "client 'site': metric 'error' broadcasts")


@pytest.mark.parametrize(
    "function",
    [
        lambda outputs, targets: (outputs.mean() - targets.mean()).abs(),
        lambda outputs, targets: (outputs > 0).float().mean() / (targets > 0).float().mean(),
        lambda outputs, targets: functional.mse_loss(
            outputs[:, 0].sort().values, targets.sort().values
        ),
    ],
)
def test_a_metric_of_both_sums_is_fine(function):
    squeezing = regression(
        lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets),
        (Metric("bias", function, False),),
    )
    train(federation(squeezing, (X, Z), (X, Z)), **QUICK)


def test_a_metric_of_numpy_that_seems_to_broadcast_is_told_of():
    error = Metric(
        "error", lambda outputs, targets: abs(outputs.numpy() - targets.numpy()).mean(), False
    )
    squeezing = regression(
        lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets), (error,)
    )
    with pytest.warns(FedGradNormWarning, match="client 'site': metric 'error' does not depend"):
        train(federation(squeezing, (X, Z), (X, Z)), **QUICK)


@ENGINES
def test_what_users_code_changes_in_place_is_not_their_data(engine):
    class Moving(nn.Linear):
        def forward(self, inputs):
            inputs -= 0.3
            return super().forward(inputs)

    def loss(outputs, targets):
        targets[targets == 0] = -1
        return functional.soft_margin_loss(outputs[:, 0], targets)

    def spoiling(outputs, targets):
        outputs.zero_()
        targets.numpy().sort()
        return 0.5

    metrics = (
        Metric("spoils", spoiling, True),
        Metric("mean", lambda outputs, targets: outputs.abs().mean(), True),
    )
    data = X.clone(), (Z > 0).float()
    batched = Metric("batched", spoiling, True, batched=True)
    task = Task("moving", linear(1), loss, (*metrics, batched), guess=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        result = train(
            federation(task, data, data, encoder=partial(Moving, 6, 4)), engine=engine, **QUICK
        )
    assert torch.equal(data[0], X)
    assert torch.equal(data[1], (Z > 0).float())
    assert next(row for row in result.rows[::-1] if row["client"] == "site")["metrics"]["mean"] > 0


def test_a_loss_that_reads_what_training_copies_is_refused():
    encoder, head = nn.Linear(6, 4), nn.Linear(4, 2)
    client = Client("site", small_task("sign"), (X, Y))
    for weight, others in ((encoder.weight, [encoder]), (head.weight, [encoder, head])):
        task = Task(
            "sign",
            client.task.head,
            lambda o, t, weight=weight: functional.cross_entropy(o, t) + weight.square().mean(),
        )
        with pytest.raises(FederationError, match="client 'site': the loss reads"):
            check_client(
                Client("site", task, (X, Y)),
                nn.Linear(6, 4),
                nn.Linear(4, 2),
                8,
                8,
                set(),
                originals=others,
            )
    check_client(client, nn.Linear(6, 4), nn.Linear(4, 2), 8, 8, set(), originals=[encoder, head])


@pytest.mark.parametrize("part", ["input", "target"])
def test_test_data_that_are_not_finite_are_told_of(part):
    inputs, targets = X.clone(), Z[:, None].clone()
    (inputs if part == "input" else targets)[9, 0] = float("nan")
    with pytest.warns(
        FedGradNormWarning, match=f"client 'site': example 9 .*test data.* {part} .*nan"
    ):
        train(federation(regression(), test=(inputs, targets)), **QUICK)


def test_a_target_that_only_the_last_example_has_is_found():
    refused(
        federation(small_task("sign"), (X, spoilt(Y, 39, 7))),
        "client 'site': its training data do not pass .* out of bounds",
    )


# ------------------------------------------------------------------------------------------------ norm layer


class Branches(nn.Module):
    """One of two branches, by the first input of a batch; and a layer that nobody uses."""

    def __init__(self, spare):
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)
        if spare:
            self.spare = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.left(inputs) if bool(inputs[0, 0] > 5) else self.right(inputs)


def test_a_norm_layer_that_no_gradient_reaches_is_refused_with_another_to_name():
    made = federation(regression(), encoder=partial(Branches, spare=True))
    refused(made, "norm_layer: .*'spare.weight'.*'right'")
    train(federation(regression(), encoder=partial(Branches, spare=False)), **QUICK)


def test_a_client_that_never_moves_the_norm_layer_is_told_of_and_keeps_its_weight():
    clients = [
        Client("left", regression(), (spoilt(X, (slice(None), 0), 6.0), Z[:, None])),
        small_client("right"),
        small_client("other"),
    ]
    with pytest.warns(FedGradNormWarning, match="client 'left': no gradient .*'right.weight'"):
        result = train(Federation(clients, partial(Branches, spare=False)), **QUICK)
    assert result.weights["left"] == 1.0
    assert result.weights["right"] != 1.0
    assert not any(row["dropped"] for row in result.rows)


# ------------------------------------------------------------------------------------------------ metrics


def of_two(outputs, targets):
    if len(outputs) < 50:
        raise ValueError("too few")
    return accuracy(outputs, targets)


def test_a_metric_that_needs_many_examples_is_tried_with_all():
    many = torch.randn(200, 6)
    task = Task(
        "sign",
        partial(nn.Linear, out_features=2),
        functional.cross_entropy,
        (Metric("many", of_two, True),),
    )
    for test in ((many, (many[:, 0] > 0).long()), TensorDataset(many, (many[:, 0] > 0).long())):
        result = train(Federation([Client("site", task, (X, Y), test)], small_encoder), **QUICK)
        assert result.rows[-1]["metric"] is not None


def one_class_is_too_few(outputs, targets):
    if len(targets.unique()) < 2:
        raise ValueError("only one class")
    return accuracy(outputs, targets)


def test_a_metric_that_one_site_cannot_have_is_missing_there_and_one_that_nobody_can_have_is_refused():
    task = Task(
        "sign",
        partial(nn.Linear, out_features=2),
        functional.cross_entropy,
        (Metric("auc", one_class_is_too_few, True),),
    )
    poor = Client("poor", task, (X, Y), (X[Y == 1], Y[Y == 1]))
    with pytest.warns(
        FedGradNormWarning, match="client 'poor': metric 'auc' .*ValueError: only one class"
    ):
        result = train(
            Federation([poor, Client("rich", task, (X, Y), (X, Y))], small_encoder), **QUICK
        )
    assert [row["metric"] is None for row in result.rows[-2:]] == [True, False]
    assert result.summary["clients"]["poor"]["missing"] == {"auc": "ValueError: only one class"}
    refused(
        Federation([poor], small_encoder),
        "client 'poor': metric 'auc' .*ValueError: only one class",
    )


def test_a_batch_of_one_is_refused_where_batch_norm_cannot_take_it(tmp_path):
    made = Federation([small_client("site")], batch_norm_encoder)
    refused(
        made,
        "client 'site': train.batch_size is 1, .*BatchNorm",
        batch_size=1,
        run_dir=tmp_path / "run",
    )
    assert not (tmp_path / "run").exists()
    one = Federation([small_client("site", examples=1)], batch_norm_encoder)
    refused(one, "client 'site': .*one training example.*BatchNorm")
