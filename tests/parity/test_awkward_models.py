"""Models at which a shortcut could go wrong: the vectorised engine either gives the reference's numbers or does without the shortcut."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import Client, Federation, FedGradNormWarning, Task
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.parameters import flatten
from fedgradnorm.randomness import seeded
from tests.parity.test_vectorized import check_same, trained

LINEAR = partial(nn.Linear, out_features=2)
TRAINING = TrainConfig(
    head_steps=3, encoder_steps=3, batch_size=8, head_lr=0.1, encoder_lr=0.1, loss_estimate="exact"
)


def data(seed, examples=24, shape=(6,), change=lambda inputs, seed: inputs):
    inputs = torch.randn(examples, *shape, generator=torch.Generator().manual_seed(seed))
    targets = (inputs.flatten(1)[:, 0] > 0).long()
    targets[:2] = torch.tensor([0, 1])
    return change(inputs, seed), targets


def federation(encoder, clients=6, head=LINEAR, **options):
    task = Task("sign", head, functional.cross_entropy)
    return Federation(
        [
            Client(f"c{index}", task, data(index, **options), data(100 + index, 10))
            for index in range(clients)
        ],
        encoder,
    )


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Convolution(nn.Module):
    """Asks for the usual layout of memory."""

    def __init__(self):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(36, 5)

    def forward(self, inputs):
        maps = functional.max_pool2d(functional.relu(self.convolution(inputs.view(-1, 1, 8, 8))), 2)
        return self.linear(maps.view(len(maps), -1))


class Tap(nn.Module):
    """Looks at what is between the layers of its Sequential."""

    def __init__(self):
        super().__init__()
        self.layers, self.linear = (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Linear(8, 5),
        )

    def forward(self, maps):
        taps = []
        for layer in self.layers:
            maps = layer(maps)
            taps.append(maps.mean((2, 3)))
        return self.linear(torch.cat(taps[1:], 1))


def twice(features):
    layer = nn.Linear(features, features)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(features, 2))


class Gate(nn.Module):
    """Its gate is shut at first, and opens to a mean over the batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(6, 4), nn.Parameter(torch.zeros(4))

    def forward(self, inputs):
        features = torch.tanh(self.linear(inputs))
        return features + self.gate * features.mean(dim=0) * 10


class Mode(nn.Module):
    """Behind a gate that is shut at first, training and evaluation differ."""

    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(6, 4), nn.Parameter(torch.zeros(4))

    def forward(self, inputs):
        features = self.linear(inputs)
        return features + self.gate * (5.0 if self.training else 1.0) * features


class Groups(nn.Linear):
    """Takes the mean off groups of four neighbours in a batch."""

    def forward(self, inputs):
        features = super().forward(inputs)
        return torch.cat(
            [part - part.mean(dim=0) if len(part) > 1 else part for part in features.split(4)]
        )


class Clamped(nn.Linear):
    """Changes its own weights."""

    def forward(self, inputs):
        self.weight.data.clamp_(0)
        return super().forward(inputs)


class Imputing(nn.Linear):
    """Draws random numbers, in training, only where values are missing."""

    def forward(self, inputs):
        missing = inputs == 0
        return super().forward(
            torch.where(missing, torch.randn(inputs.shape), inputs)
            if self.training and missing.any()
            else inputs
        )


class Listed(nn.Module):
    """Keeps its parameters in a list as well, and takes them from there."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.tensors = [self.linear.weight, self.linear.bias]

    def forward(self, inputs):
        return functional.linear(inputs, *self.tensors)


class Halved(nn.Linear):
    """Its gradients pass through a hook."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.register_hook(lambda gradient: gradient * 0.5)


class OwnConstants(nn.Module):
    """A head with random constants, other ones for every client, that are in no state dict."""

    def __init__(self, features, buffer):
        super().__init__()
        self.linear, constants = nn.Linear(features, 2), torch.randn(features, features)
        if buffer:
            self.register_buffer("constants", constants, persistent=False)
        else:
            self.constants = constants

    def forward(self, features):
        return self.linear(torch.cos(features @ self.constants))


class Tokens(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8, **options), nn.Linear(8, 4)

    def forward(self, inputs):
        return self.linear(self.embedding((inputs.abs() * 7).long().clamp(max=19)).mean(dim=1))


def holes(inputs, seed):
    kept = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    return inputs * kept if seed % 2 else inputs


def of_two_layouts():
    """Images that lie in memory in two ways."""
    task = Task("sign", partial(nn.Linear, out_features=2), functional.cross_entropy)
    clients = []
    for index in range(4):
        inputs, targets = data(index, shape=(8, 8, 3))
        images = inputs.permute(0, 3, 1, 2)
        clients.append(
            Client(
                f"c{index}",
                task,
                (images if index else images.contiguous(), targets),
                (images, targets),
            )
        )
    return Federation(clients, lambda: nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(192, 4)))


def by_count(outputs, targets):
    """Weighs classes by how many there are in a batch, out of torch's sight."""
    return functional.cross_entropy(
        outputs,
        targets,
        weight=torch.tensor([1 / max(targets.tolist().count(one), 1) for one in range(2)]),
    )


def of_other_counts():
    """Each client's batches have as many of a class as one another, and not as another client's."""
    task = Task("sign", partial(nn.Linear, out_features=2), by_count)
    pairs = [(data(index)[0], (torch.arange(24) % (index + 2) == 0).long()) for index in range(6)]
    return Federation(
        [Client(f"c{index}", task, pair, pair) for index, pair in enumerate(pairs)], plain
    )


def of_two_shapes():
    """Inputs of 3 or 5 vectors, of which the encoder takes the mean."""

    class Mean(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.mean(dim=1))

    task = Task("sign", partial(nn.Linear, out_features=2), functional.cross_entropy)
    clients = []
    for index in range(12):
        shape = (3 if index < 6 else 5, 6)
        clients.append(
            Client(f"c{index:02d}", task, data(index, shape=shape), data(50 + index, 10, shape))
        )
    return Federation(clients, lambda: Mean(6, 4))


def of_two_kinds_of_targets():
    """Hard classes for some clients of a task, probabilities for others."""
    task = Task("sign", partial(nn.Linear, out_features=2), functional.cross_entropy)
    clients = []
    for index in range(12):
        inputs, targets = data(index)
        soft = functional.one_hot(targets, 2).float() * 0.8 + 0.1
        clients.append(
            Client(
                f"c{index:02d}", task, (inputs, soft if index % 2 else targets), (inputs, targets)
            )
        )
    return Federation(clients, plain)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: federation(lambda: nn.Sequential(nn.Linear(6, 64), Convolution())),
            id="view after a convolution",
        ),
        pytest.param(
            lambda: federation(
                lambda: nn.Sequential(nn.Linear(6, 64), nn.Unflatten(1, (1, 8, 8)), Tap())
            ),
            id="taps",
        ),
        pytest.param(lambda: federation(plain, head=twice), id="a module used twice in a head"),
        pytest.param(lambda: federation(lambda: twice(6)), id="a module used twice in an encoder"),
        pytest.param(lambda: federation(Gate), id="a shut gate before the batch"),
        pytest.param(lambda: federation(Mode), id="a shut gate before the mode"),
        pytest.param(lambda: federation(lambda: Groups(6, 4)), id="groups in a batch"),
        pytest.param(
            lambda: federation(lambda: nn.Sequential(Clamped(6, 8), nn.Tanh(), nn.Linear(8, 4))),
            id="clamped weights",
        ),
        pytest.param(
            lambda: federation(plain, head=partial(OwnConstants, buffer=True)),
            id="a buffer of the head's own",
        ),
        pytest.param(
            lambda: federation(plain, head=partial(OwnConstants, buffer=False)),
            id="a tensor of the head's own",
        ),
        pytest.param(lambda: federation(Tokens), id="tokens"),
        pytest.param(
            lambda: federation(partial(Tokens, max_norm=1.0)),
            id="an embedding that renormalises itself",
        ),
        pytest.param(lambda: federation(partial(Tokens, sparse=True)), id="sparse gradients"),
        pytest.param(lambda: federation(Listed), id="parameters in a list"),
        pytest.param(lambda: federation(lambda: Halved(6, 4)), id="a hook on a parameter"),
        pytest.param(of_two_layouts, id="inputs in two layouts"),
        pytest.param(of_other_counts, id="a loss that counts in Python"),
        pytest.param(of_two_shapes, id="inputs of two shapes"),
        pytest.param(of_two_kinds_of_targets, id="targets of two kinds"),
    ],
)
@pytest.mark.parametrize("executor", ["torchscript", "python"], indirect=True)
def test_an_awkward_model_gets_the_numbers_of_the_reference(make):
    before = torch.get_rng_state()
    check_same(make(), TRAINING, 1e-5)
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_for_some_examples_are_noticed_in_the_round():
    before = torch.get_rng_state()
    with pytest.warns(
        FedGradNormWarning,
        match="client 'c0' and 5 like it: its code draws random numbers: from now on trained without",
    ):
        check_same(federation(lambda: Imputing(6, 4), change=holes), TRAINING, 1e-5)
    assert torch.equal(before, torch.get_rng_state())


def test_many_threads_make_frozen_random_layers_alike():
    def encoder():
        layers = [nn.Linear(6, 800), nn.ReLU(), nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, 8)]
        for parameter in (*layers[0].parameters(), *layers[2].parameters()):
            parameter.requires_grad_(False)
        return nn.Sequential(*layers)

    before = torch.get_rng_state()
    check_same(federation(encoder, clients=8), TRAINING, 1e-5, threads=8)
    assert torch.equal(before, torch.get_rng_state())


def test_a_factory_may_give_one_module_again_and_again():
    with seeded(0, 0, "", "encoder"):
        module = plain()
    before = flatten(module)
    shared = federation(lambda: module, clients=4)
    found = trained(VectorizedEngine(shared, 0, threads=2), shared, TRAINING)["encoder"]
    expected = trained(
        VectorizedEngine(federation(plain, clients=4), 0, threads=2),
        federation(plain, clients=4),
        TRAINING,
    )["encoder"]
    assert torch.equal(found, expected)
    assert torch.equal(flatten(module), before)
