import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import (
    Client,
    ConfigError,
    Federation,
    FederationError,
    FedGradNorm,
    Metric,
    Task,
    train,
)
from fedgradnorm.parameters import flatten, load_flat, norm_layer_slices, trainable
from tests.helpers import (
    accuracy,
    batch_norm_encoder,
    small_client,
    small_encoder,
    small_federation,
    small_task,
)


def refused(message, *args, **options):
    with pytest.raises(FederationError, match=message) as caught:
        Federation(*args, **options)
    assert str(caught.value).count("\n") <= 1


def test_what_does_not_fit_together_is_refused_when_it_is_built():
    a, b = small_client("a"), small_client("b")
    refused("client", [], small_encoder)
    refused("the id 'a'", [a, b, small_client("a")], small_encoder)
    refused(
        "buffers: .*'shared'",
        [a],
        small_encoder,
        buffers="shared",
    )
    refused("norm_layer '9'", [a], small_encoder, norm_layer="9")
    refused(r"'2.weight'", [a], small_encoder, norm_layer="2.weigth")
    refused("client 'a': .* encoder", [a], lambda: nn.Linear(5, 4))
    refused("trainable parameters", [a], nn.Identity)
    refused("norm_layer", [a], lambda: nn.BatchNorm1d(6))


def test_a_head_that_the_encoder_does_not_fit_is_named_with_its_client():
    stubborn = Task("stubborn", lambda _: nn.Linear(7, 2), functional.cross_entropy)
    refused(
        r"client 'b': .*\(1, 4\).* head",
        [small_client("a"), small_client("b", task=stubborn)],
        small_encoder,
    )


@pytest.mark.parametrize("id", ["", "a/b", "..", "-x", "a b", "x" * 101, "ä"])
def test_an_id_that_is_no_file_name_is_refused(id):
    with pytest.raises(FederationError, match="client id"):
        small_client(id)


def test_empty_clients_and_unequal_lengths_are_refused():
    task = small_task("sign")
    with pytest.raises(FederationError, match="client 'a' .* training"):
        Client("a", task, (torch.zeros(0, 6), torch.zeros(0)))
    with pytest.raises(FederationError, match="client 'a': 3 .* 2 "):
        Client("a", task, (torch.zeros(3, 6), torch.zeros(2)))


def test_data_may_load_on_first_use_and_are_checked_then():
    calls = []

    def load():
        calls.append(1)
        return torch.zeros(3, 6), torch.tensor([0, 1, 1])

    federation = Federation(
        [Client("a", small_task("sign"), load, load)], small_encoder, example=torch.zeros(1, 6)
    )
    assert federation.num_features == 4
    assert federation.input_shape == (6,)
    assert calls == []
    federation.check_data()
    federation.check_data()
    assert len(calls) == 2  # once for training, once for testing


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            torch.tensor([5, 0, 0]),
            "client 'a': .* training data",
        ),
        (torch.zeros(3, 2, 2), "client 'a': .* training data"),
    ],
)
def test_data_that_the_loss_cannot_take_are_refused(targets, message):
    federation = Federation(
        [Client("a", small_task("sign"), (torch.zeros(3, 6), targets))], small_encoder
    )
    with pytest.raises(FederationError, match=message):
        federation.check_data()


def test_a_loss_that_is_no_mean_is_refused():
    task = Task("sign", lambda features: nn.Linear(features, 2), nn.MSELoss(reduction="none"))
    federation = Federation(
        [Client("a", task, (torch.zeros(3, 6), torch.zeros(3, 2)))], small_encoder
    )
    with pytest.raises(FederationError, match="client 'a': .* loss"):
        federation.check_data()


def test_a_task_needs_different_metric_names():
    metric = Metric("accuracy", accuracy, higher_is_better=True)
    with pytest.raises(FederationError, match="metrics"):
        Task("sign", nn.Identity, functional.cross_entropy, (metric, metric))


def test_an_unknown_client_names_the_nearest():
    with pytest.raises(FederationError, match="'smile'"):
        small_federation(("smile", "pose")).client("smle")


def test_initialisation_depends_on_the_seed_and_the_client_and_leaves_the_global_generator_alone():
    federation = small_federation()
    before = torch.get_rng_state()
    one, same, other = (flatten(federation.make_encoder(seed)) for seed in (0, 0, 1))
    heads = [federation.make_head(client, 0).weight for client in federation.clients]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(heads[0], heads[1])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.fc = nn.Linear(5, 4)
        self.fc2 = nn.Linear(4, 4, bias=False)
        self.fc2.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        return self.scale * self.fc2(self.fc(self.block(inputs)))


@pytest.mark.parametrize(
    ("norm_layer", "expected"),
    [
        (None, ["fc.weight", "fc.bias"]),  # the last trainable one with a matrix
        ("fc.weight", ["fc.weight"]),
        ("fc", ["fc.weight", "fc.bias"]),
        ("block", ["block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"]),
        ("*.bias", ["block.0.bias", "block.1.bias", "fc.bias"]),
        (["scale", "fc.bias"], ["scale", "fc.bias"]),
        (
            "*",
            [
                "scale",
                "block.0.weight",
                "block.0.bias",
                "block.1.weight",
                "block.1.bias",
                "fc.weight",
                "fc.bias",
            ],
        ),
    ],
)
def test_the_norm_layer_is_found_in_the_flat_vector(norm_layer, expected):
    module = Nested()
    vector, parameters = flatten(module), dict(trainable(module))
    found = torch.cat([vector[part] for part in norm_layer_slices(module, norm_layer)])
    inside = torch.cat(
        [parameters[name].detach().flatten() for name in parameters if name in expected]
    )
    assert torch.equal(found, inside)


def test_the_flat_vector_goes_in_and_out_and_leaves_frozen_parameters():
    module = Nested()
    frozen, vector = module.fc2.weight.clone(), torch.arange(float(len(flatten(module))))
    load_flat(module, vector)
    assert torch.equal(flatten(module), vector)
    assert torch.equal(module.fc2.weight, frozen)


QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}


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
    with pytest.raises(FederationError, match="client 'a': .*(data|metric|loss|outputs)"):
        train(
            Federation([client], small_encoder), run_dir=tmp_path / "run", overwrite=True, **QUICK
        )
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_batch_norm_on_a_batch_of_one_is_refused():
    with pytest.raises(FederationError, match="Expected more than 1 value per channel"):
        train(Federation([small_client("a", examples=1)], batch_norm_encoder), **QUICK)


@pytest.mark.parametrize("norm_layer", [[], (), 5, [3]])
def test_a_norm_layer_that_names_nothing_is_refused(norm_layer):
    with pytest.raises(FederationError, match="norm_layer: "):
        small_federation(norm_layer=norm_layer)


def test_two_tasks_of_one_name_are_refused():
    one = small_client("a")
    other = small_client(
        "b", task=with_task(metrics=(Metric("error", accuracy, higher_is_better=False),))
    )
    with pytest.raises(FederationError, match="client 'b': .*'sign'"):
        Federation([one, other], small_encoder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Client(1, small_task("sign"), (X, Y)), "client id '1'"),
        (
            lambda: Federation([small_client("a")], small_encoder()),
            "encoder: .* Sequential",
        ),
        (
            lambda: small_task("sign").__class__("t", nn.Identity, functional.mse_loss, accuracy),
            "metrics: .* Metric",
        ),
        (
            lambda: Federation([small_client("a")], lambda: nn.Embedding(2, 3)),
            "client 'a': .* encoder",
        ),
    ],
)
def test_likely_mistakes_are_named(make, message):
    with pytest.raises(FederationError, match=message):
        make()
    with pytest.raises(ConfigError, match="weighting: "):
        train(small_federation(), FedGradNorm, **QUICK)


def test_clients_may_come_from_a_generator():
    assert Federation((small_client(id) for id in "ab"), small_encoder).client_ids == ["a", "b"]
