import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import Client, Federation, FederationError, Metric, Task
from fedgradnorm.parameters import flatten, load_flat, norm_layer_slices, trainable
from tests.helpers import accuracy, small_client, small_encoder, small_federation, small_task


def refused(message, *args, **options):
    with pytest.raises(FederationError, match=message) as caught:
        Federation(*args, **options)
    assert str(caught.value).count("\n") <= 1


def test_what_does_not_fit_together_is_refused_when_it_is_built():
    a, b = small_client("a"), small_client("b")
    refused("at least one client", [], small_encoder)
    refused("two clients have the id 'a'", [a, b, small_client("a")], small_encoder)
    refused(
        "buffers: expected 'local' or 'averaged', found 'shared'",
        [a],
        small_encoder,
        buffers="shared",
    )
    refused("norm_layer '9' names no encoder parameter", [a], small_encoder, norm_layer="9")
    refused(r"did you mean '2.weight'", [a], small_encoder, norm_layer="2.weigth")
    refused("client 'a': its inputs do not pass through the encoder", [a], lambda: nn.Linear(5, 4))
    refused("trainable parameters", [a], nn.Identity)
    refused("norm_layer", [a], lambda: nn.BatchNorm1d(6))


def test_a_head_that_the_encoder_does_not_fit_is_named_with_its_client():
    stubborn = Task("stubborn", lambda _: nn.Linear(7, 2), functional.cross_entropy)
    refused(
        r"client 'b': the encoder's output of shape \(1, 4\) does not fit its head",
        [small_client("a"), small_client("b", task=stubborn)],
        small_encoder,
    )


@pytest.mark.parametrize("id", ["", "a/b", "..", "-x", "a b", "x" * 101, "ä"])
def test_an_id_that_is_no_file_name_is_refused(id):
    with pytest.raises(FederationError, match="client id"):
        small_client(id)


def test_empty_clients_and_unequal_lengths_are_refused():
    task = small_task("sign")
    with pytest.raises(
        FederationError, match="client 'a' is empty: expected at least one training example"
    ):
        Client("a", task, (torch.zeros(0, 6), torch.zeros(0)))
    with pytest.raises(FederationError, match="client 'a': 3 training inputs, but 2 targets"):
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
            "client 'a': its training data do not pass through its model and loss",
        ),
        (torch.zeros(3, 2, 2), "do not pass"),
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
    with pytest.raises(FederationError, match="expected a tensor of one number for a batch"):
        federation.check_data()


def test_a_task_needs_different_metric_names():
    metric = Metric("accuracy", accuracy, higher_is_better=True)
    with pytest.raises(FederationError, match="different names"):
        Task("sign", nn.Identity, functional.cross_entropy, (metric, metric))


def test_an_unknown_client_names_the_nearest():
    with pytest.raises(FederationError, match="did you mean 'smile'"):
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
