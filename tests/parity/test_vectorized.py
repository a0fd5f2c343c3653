"""The vectorised engine gives the numbers of the reference engine."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from benchmarks.cases import case
from fedgradnorm import Client, Federation, Task
from fedgradnorm.aggregation import Mean
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.federations import digits, mtfl, radcom
from fedgradnorm.models import cnn
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.weighting import MGDA, FedGradNorm, NashMTL
from tests.helpers import small_federation

ROUNDS, WEIGHTING = 3, FedGradNorm()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def trained(engine, federation, training, rounds=ROUNDS, weighting=WEIGHTING):
    """Three rounds: the encoders, weights, losses and heads as one vector each, and the last evaluation."""
    state, losses = initial_state(federation, weighting, training.seed), []
    for _ in range(rounds):
        state, record = run_round(state, federation, engine, weighting, Mean(), training)
        assert not record.dropped
        losses += [
            number for report in record.reports for number in (report.loss, report.initial_loss)
        ]
    states = engine.client_states
    return {
        "encoder": state.encoder,
        "weights": torch.tensor(list(state.weighting.weights.values()), dtype=torch.float64),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "heads": vector(states[id].head for id in sorted(states)),
        "velocity": vector(states[id].head_velocity for id in sorted(states)),
        "buffers": vector([*(states[id].encoder_buffers for id in sorted(states)), state.buffers]),
        "evaluations": torch.tensor(
            [one.loss for _, one in sorted(engine.evaluate(state.encoder, state.buffers).items())]
        ),
        "metrics": [
            one.metrics for _, one in sorted(engine.evaluate(state.encoder, state.buffers).items())
        ],
    }


def vector(tensors_by_name):
    return torch.cat(
        [
            torch.zeros(0),
            *(
                value.double().reshape(-1)
                for tensors in tensors_by_name
                for value in tensors.values()
            ),
        ]
    )


def check_same(
    federation,
    training,
    tolerance,
    *,
    device="cpu",
    metrics=True,
    threads=2,
    weighting=WEIGHTING,
    **options,
):
    reference = trained(
        ReferenceEngine(federation, training.seed), federation, training, weighting=weighting
    )
    engine = VectorizedEngine(federation, training.seed, threads=threads, device=device, **options)
    found = trained(engine, federation, training, weighting=weighting)
    expected_metrics, found_metrics = reference.pop("metrics"), found.pop("metrics")
    for name, expected in reference.items():
        assert found[name].shape == expected.shape, name
        apart, size = (
            torch.linalg.vector_norm(found[name] - expected),
            torch.linalg.vector_norm(expected),
        )
        assert apart <= tolerance * size, (
            f"{name}: {apart / size:.2g} apart, expected at most {tolerance}"
        )
    if metrics:
        for one, other in zip(found_metrics, expected_metrics, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    return engine


def ways(engine):
    return {plan.way for plan in engine.shortcuts.plan_of.values()}


def doubled(federation):
    """The same federation in double precision."""

    def wide(data):
        return tuple(part.double() if part.is_floating_point() else part for part in data)

    tasks = {}
    clients = []
    for client in federation.clients:
        task = client.task
        tasks.setdefault(
            id(task),
            Task(
                task.name,
                lambda features, make=task.head: make(features).double(),
                task.loss,
                task.metrics,
            ),
        )
        test = None if client.test_data is None else wide(client.test_data)
        clients.append(Client(client.id, tasks[id(task)], wide(client.train_data), test))
    return Federation(
        clients, lambda: federation.encoder().double(), federation.norm_layer, federation.buffers
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "clients", "way"), [("W1", 4, "looped"), ("W2", 4, "looped"), ("W5", 40, "stacked")]
)
def test_the_workloads_of_the_benchmark(name, clients, way, device):
    """W2 with small steps: in single precision rounding puts some of its millions of ReLUs on the other side of their kink."""
    federation, training = case(name, clients)
    if name == "W2":
        training = training.model_copy(update={"encoder_lr": 0.001})
    assert ways(check_same(federation, training, 1e-5, device=device)) == {way}


@pytest.mark.parametrize(("name", "clients"), [("W1", 2), ("W2", 2), ("W5", 40)])
def test_the_workloads_in_double_precision(name, clients):
    federation, training = case(name, clients)
    check_same(doubled(federation), training, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "federation",
    [
        lambda: digits.make(0),
        lambda: radcom.make(0, snapshots=30),
        lambda: radcom.make(0, snapshots=30, clients_per_task=6),
    ],
)
def test_the_federations(federation, device):
    federation = federation()
    check_same(federation, TrainConfig(batch_size=32), 1e-5, device=device)
    check_same(doubled(federation), TrainConfig(batch_size=32), 1e-10, device=device)


@pytest.mark.parametrize(
    "weighting", [MGDA(), NashMTL(), FedGradNorm()], ids=lambda one: type(one).__name__
)
def test_gradients_that_are_compared_keep_their_digits(weighting):
    """Read off how far the encoder has gone, gradients as small as these would have three."""
    federation = small_federation()
    tasks = {
        one.task.name: Task(one.task.name, one.task.head, partial(scaled, one.task.loss))
        for one in federation.clients
    }
    clients = [
        Client(one.id, tasks[one.task.name], one.train_data, one.test_data)
        for one in federation.clients
    ]
    training = TrainConfig(head_steps=3, encoder_steps=10, batch_size=8, encoder_lr=0.002)
    check_same(Federation(clients, smooth_encoder), training, 1e-6, weighting=weighting)


def scaled(loss, outputs, targets):
    return 0.1 * loss(outputs, targets)


def smooth_encoder():
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_real_faces(mtfl_zip, batch_norm):
    """With small steps where batches are normalised: the reference itself ends 2e-3 from its double-precision self with larger ones."""
    federation = mtfl.make(0, path=str(mtfl_zip))
    small = [
        Client(
            one.id,
            one.task,
            tuple(part[:50] for part in one.train_data),
            tuple(part[:20] for part in one.test_data),
        )
        for one in federation.clients
    ]
    model = partial(cnn, federation.input_shape, batch_norm=batch_norm)
    training = TrainConfig(
        head_steps=2, encoder_steps=2, batch_size=16, encoder_lr=0.001 if batch_norm else 0.05
    )
    check_same(Federation(small, model), training, 1e-5, metrics=False)
    check_same(doubled(Federation(small, model)), training, 1e-10)


class Mixing(nn.Module):
    """Not one example at a time: the mean of the batch is taken off."""

    def forward(self, inputs):
        return inputs - inputs.mean(dim=0)


class Noisy(nn.Module):
    """Draws random numbers when it trains."""

    def forward(self, inputs):
        return functional.dropout(inputs, 0.3, training=self.training)


def huber(outputs, targets):
    return functional.huber_loss(outputs[:, 0], targets.to(outputs.dtype))


def one_number_in_a_vector(outputs, targets):
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1).reshape(1)


def weighted(outputs, targets):
    return functional.cross_entropy(
        outputs, targets, weight=torch.tensor([0.3, 1.0, 2.0], dtype=outputs.dtype)
    )


LOSSES = (functional.cross_entropy, huber, one_number_in_a_vector, weighted)
LAYERS = {
    "plain": nn.Identity,
    "layer norm": lambda: nn.LayerNorm(7),
    "batch norm": lambda: nn.BatchNorm1d(7),
    "dropout": Noisy,
    "mixing": Mixing,
}


@st.composite
def federations(draw, dtype):
    """Clients with different tasks, sizes and heads, on an encoder with any of these layers."""
    layer = draw(st.sampled_from(sorted(LAYERS)))
    convolution, frozen, two_layers = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    activation = draw(st.sampled_from([nn.Tanh, nn.Softplus]))

    def encoder():
        first = (
            [
                nn.Unflatten(1, (1, 4, 4)),
                nn.Conv2d(1, 2, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
            ]
            if convolution
            else []
        )
        linear = nn.Linear(2 if convolution else 16, 7)
        if frozen:
            linear.bias.requires_grad_(False)
        return nn.Sequential(*first, linear, LAYERS[layer](), activation(), nn.Linear(7, 5)).to(
            dtype
        )

    def head(features):
        layers = (
            [nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 3)]
            if two_layers
            else [nn.Linear(features, 3)]
        )
        return nn.Sequential(*layers).to(dtype)

    tasks = [
        Task(f"task {index}", head, draw(st.sampled_from(LOSSES)))
        for index in range(draw(st.integers(1, 3)))
    ]
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    clients = []
    for index in range(draw(st.integers(1, 12))):
        examples = draw(st.integers(8, 30))
        inputs, targets = (
            torch.tensor(rng.normal(size=(examples, 16)), dtype=dtype),
            torch.tensor(rng.integers(3, size=examples)),
        )
        targets[:3] = torch.arange(3)
        clients.append(
            Client(
                f"c{index}",
                draw(st.sampled_from(tasks)),
                (inputs, targets),
                (inputs[:5], targets[:5]),
            )
        )
    return Federation(clients, encoder, buffers=draw(st.sampled_from(["local", "averaged"])))


@st.composite
def trainings(draw):
    return TrainConfig(
        head_steps=draw(st.integers(1, 6)),
        encoder_steps=draw(st.integers(1, 4)),
        head_lr=0.1,
        head_momentum=draw(st.sampled_from([0.0, 0.5])),
        encoder_lr=0.05,
        batch_size=draw(st.integers(4, 12)),
        fraction_train=draw(st.sampled_from([0.5, 1.0])),
        loss_estimate=draw(st.sampled_from(["batches", "exact"])),
        loss_examples=draw(st.sampled_from([5, 4096])),
        seed=draw(st.integers(0, 5)),
    )


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(federations(torch.float64), trainings())
def test_random_federations_in_double_precision(federation, training):
    check_same(federation, training, 1e-10)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(federations(torch.float32), trainings())
def test_random_federations_in_single_precision(federation, training):
    check_same(federation, training, 1e-5, metrics=False)


@pytest.mark.parametrize(
    ("limit", "executor"),
    [(1, "torchscript"), (1, "python"), (100_000, "torchscript")],
    indirect=["executor"],
)
def test_little_memory_gives_the_same_numbers(limit):
    federation, training = case("W5", 20)
    check_same(federation, training, 1e-5, memory_limit=limit)


@pytest.mark.parametrize("executor", ["torchscript", "python"], indirect=True)
def test_participants_that_change_from_round_to_round():
    ids = "abcdefgh"
    training = TrainConfig(
        participants=(tuple(ids), ("a", "b"), tuple("cdefgh")), head_momentum=0.9, batch_size=8
    )
    check_same(small_federation(ids), training, 1e-5)
