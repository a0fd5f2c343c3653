import copy
import logging
import os
import random
import tempfile
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedgradnorm import Client, Federation, Task, train
from fedgradnorm.aggregation import Mean
from fedgradnorm.config import TrainConfig, load_config
from fedgradnorm.engines.jobs import QUARTER, WIDE, chunks, stack_widths
from fedgradnorm.engines.planning import plan_for
from fedgradnorm.engines.vectorized import VectorizedEngine
from fedgradnorm.engines.workspace import Workspace, arrange, pool_first
from fedgradnorm.errors import ConfigError
from fedgradnorm.registry import build
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.weighting import Equal
from tests.helpers import (
    batch_norm_encoder,
    dropout_encoder,
    small_client,
    small_encoder,
    small_federation,
    small_task,
)

TRAINING = TrainConfig(head_steps=2, encoder_steps=2, batch_size=8)
CPU = torch.device("cpu")


class OneByOne(torch.utils.data.Dataset):
    def __init__(self, inputs, targets):
        self.pairs = list(zip(inputs, targets, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


class Centred(nn.Module):
    def forward(self, inputs):
        return inputs - inputs.mean(dim=0)


class Branching(nn.Module):
    """Decides by the values that it sees, which cannot be stacked."""

    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(features, 2)

    def forward(self, features):
        outputs = self.linear(features)
        return outputs if outputs.sum() > 0 else 2 * outputs


class OtherInEvaluation(nn.Linear):
    def forward(self, features):
        return super().forward(features) * (1.0 if self.training else 2.0)


def plan(encoder=small_encoder, head=None, client=None, training=TRAINING):
    task = Task("sign", head or partial(nn.Linear, out_features=2), functional.cross_entropy)
    client = client or small_client("a", task=task)
    federation = Federation([client], encoder)
    return plan_for(client, Workspace(federation, 0, CPU), training)


def convolutions():
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Flatten())


@pytest.mark.parametrize(
    ("options", "way", "encode_once", "why"),
    [
        ({}, "stacked", True, "MFLOP"),
        ({"encoder": dropout_encoder}, "alone", False, "random numbers"),
        ({"encoder": batch_norm_encoder}, "looped", False, "statistics"),
        (
            {"encoder": lambda: nn.Sequential(nn.Linear(6, 4), Centred())},
            "looped",
            False,
            "every example by itself",
        ),
        ({"encoder": convolutions}, "looped", True, "convolutions"),
        (
            {"encoder": lambda: nn.Sequential(nn.Linear(6, 2000), nn.ReLU(), nn.Linear(2000, 300))},
            "looped",
            True,
            "calls count for little",
        ),
        ({"head": Branching}, "looped", True, "cannot be stacked"),
        ({"head": partial(OtherInEvaluation, out_features=2)}, "looped", True, "cannot be stacked"),
        (
            {
                "head": lambda features: nn.Sequential(
                    nn.BatchNorm1d(features), nn.Linear(features, 2)
                )
            },
            "looped",
            True,
            "buffers",
        ),
        ({"client": small_client("a", examples=600)}, "looped", True, "more than 512 examples"),
        (
            {"client": Client("a", small_task("sign"), OneByOne(*small_client("a").train))},
            "alone",
            False,
            "not tensors",
        ),
    ],
)
def test_the_way_that_fits_is_found_by_trying(options, way, encode_once, why):
    found = plan(**options)
    assert (found.way, found.encode_once) == (way, encode_once)
    assert why in found.why


def test_clients_are_alike_whose_heads_and_losses_are_made_alike():
    def alike(one, other):
        tasks = [
            Task(name, head, loss) for name, (head, loss) in zip("ab", (one, other), strict=True)
        ]
        made = Federation([small_client(task.name, task=task) for task in tasks], small_encoder)
        return made.head_kind(made.client("a"), 3) == made.head_kind(made.client("b"), 3)

    linear, entropy = partial(nn.Linear, out_features=2), functional.cross_entropy
    assert alike((linear, entropy), (partial(nn.Linear, out_features=2), entropy))
    assert not alike((linear, entropy), (partial(nn.Linear, out_features=3), entropy))
    assert alike(
        (linear, partial(functional.huber_loss, delta=1.0)),
        (linear, partial(functional.huber_loss, delta=1.0)),
    )
    assert not alike(
        (linear, partial(functional.huber_loss, delta=1.0)),
        (linear, partial(functional.huber_loss, delta=2.0)),
    )
    unhashable = partial(functional.cross_entropy, weight=[torch.ones(2)])
    assert alike((linear, unhashable), (linear, unhashable))
    assert not alike((linear, unhashable), (linear, entropy))


class Shifted(nn.Module):
    """A head with something that is neither parameter nor buffer."""

    def __init__(self, features, by):
        super().__init__()
        self.linear, self.by = nn.Linear(features, 2), by

    def forward(self, features):
        return self.linear(features) * (
            self.by[0] if isinstance(self.by, list) else getattr(self.by, "value", self.by)
        )


class Held:
    def __init__(self, value):
        self.value = value


def hooked(features):
    head, by = nn.Linear(features, 2), random.random()
    head.register_forward_hook(lambda module, inputs, outputs: outputs * by)
    return head


def one_of_two(features):
    return nn.Sequential(
        nn.Linear(features, 2), nn.Tanh() if random.random() < 0.5 else nn.Hardtanh()
    )


@pytest.mark.parametrize(
    "head",
    [
        lambda features: Shifted(features, random.random()),
        lambda features: Shifted(features, [np.random.random()]),
        lambda features: Shifted(features, float(torch.rand(()))),
        lambda features: Shifted(features, Held(random.random())),
        lambda features: Shifted(features, torch.rand(2)),
        lambda features: Shifted(features, np.random.random(2)[0]),
        hooked,
        one_of_two,
    ],
)
def test_heads_of_one_factory_that_do_other_things_are_not_one_program(head):
    task = Task("t", head, functional.cross_entropy)
    made = Federation(
        [small_client("a" * (1 + number), task=task) for number in range(9)], small_encoder
    )
    rows = [
        train(made, engine=engine, num_rounds=2, head_steps=2, encoder_steps=2).rows
        for engine in ("reference", "vectorized")
    ]
    for expected, row in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["initial_loss"] == pytest.approx(expected["initial_loss"], rel=1e-4)


def test_heads_that_hold_equal_values_are_trained_together():
    task = Task("t", lambda features: Shifted(features, [2.0]), functional.cross_entropy)
    made = Federation([small_client(id, task=task) for id in "ab"], small_encoder)
    assert made.head_kind(made.client("a"), 0) == made.head_kind(made.client("b"), 0)


def test_planning_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    plan(encoder=dropout_encoder)
    assert torch.equal(before, torch.get_rng_state())


def test_pooling_before_a_relu_gives_the_same_features_and_gradients():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 2, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    inputs = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    usual, other = make().double(), make().double()
    pool_first(other)
    assert [type(module).__name__ for module in other] == ["Conv2d", "MaxPool2d", "ReLU"] * 2
    results = []
    for module in (usual, other):
        outputs = module(inputs)
        results.append(
            (outputs, *torch.autograd.grad((outputs**2).sum(), list(module.parameters())))
        )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    returning = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    pool_first(returning)
    assert isinstance(returning[0], nn.ReLU)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_arranged_convolution_gives_its_output_in_the_channels_last_layout(channels):
    layer = nn.Conv2d(channels, 16, 3)
    encoder, images = nn.Sequential(copy.deepcopy(layer)), torch.randn(4, channels, 8, 8)
    arrange(encoder)
    output = encoder(images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(encoder[0].weight, layer.weight)
    assert torch.allclose(output, layer(images), atol=1e-6)


@pytest.mark.parametrize(
    ("count", "most", "lengths"), [(10, 4, [3, 3, 4]), (4, 9, [4]), (0, 3, [])]
)
def test_chunks_are_even(count, most, lengths):
    parts = chunks(list(range(count)), most)
    assert [len(part) for part in parts] == lengths
    assert [item for part in parts for item in part] == list(range(count))


@given(st.integers(1, 700), st.integers(2, 700), st.integers(1, 8))
def test_stacks_hold_all_clients_and_waste_little(count, most, workers):
    widths = stack_widths(count, most, workers)
    assert max(widths) <= most
    assert sum(widths[:-1]) < count <= sum(widths) < count + QUARTER
    assert widths.count(WIDE) % workers == 0
    assert len(set(widths)) <= 3  # each width is a program of its own


def rounds(engine, federation, count=1):
    state = initial_state(federation, Equal(), 0)
    records = []
    for _ in range(count):
        state, record = run_round(state, federation, engine, Equal(), Mean(), TRAINING)
        records.append(record)
    return state, records


def test_workers_use_one_kernel_thread_each_and_the_number_is_put_back(monkeypatch):
    monkeypatch.setattr("fedgradnorm.engines.vectorized.THREADED_FLOPS", 0)
    torch.set_num_threads(2)
    seen, log = (
        [],
        logging.getLogger("tests.threads"),
    )  # a list that a model adds to would be a reason to train it alone
    log.setLevel("INFO")
    log.addHandler(handler := logging.Handler())
    handler.emit = lambda record: seen.append((record.args[0], record.threadName))

    class Watched(nn.Linear):
        def forward(self, inputs):
            log.info("%d threads", torch.get_num_threads())
            return super().forward(inputs)

    federation = small_federation(encoder=lambda: Watched(6, 4))
    engine = VectorizedEngine(federation, seed=0)
    seen.clear()
    try:
        state, _ = rounds(engine, federation)
        engine.evaluate(state.encoder, {})
        threads, names = zip(*seen, strict=True)
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
        assert {name.partition("_")[0] for name in names} == {"fedgradnorm", "MainThread"}
    finally:
        torch.set_num_threads(1)


def test_kernels_share_idle_cores_only_when_they_are_large():
    large = lambda: nn.Sequential(nn.Linear(6, 4000), nn.ReLU(), nn.Linear(4000, 1000))  # noqa: E731
    for encoder, count, expected in (
        (large, 1, 4),
        (large, 3, 1),
        (large, 2, 2),
        (small_encoder, 1, 1),
    ):
        federation = small_federation("abc"[:count], encoder=encoder)
        engine = VectorizedEngine(federation, seed=0, threads=4)
        rounds(engine, federation)
        jobs = engine.jobs(
            [
                instruction
                for _, records in [rounds(engine, federation)]
                for instruction in records[0].instructions
            ]
        )
        assert engine.kernels(jobs) == expected


def test_gradients_beyond_the_limit_lie_in_a_file_that_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []
    allocate = os.posix_fallocate
    monkeypatch.setattr(
        os,
        "posix_fallocate",
        lambda file, start, size: (made.append(size), allocate(file, start, size)),
    )
    federation = small_federation("abcdefgh")
    _, free = rounds(VectorizedEngine(federation, seed=0), federation)
    assert made == []
    _, tight = rounds(VectorizedEngine(federation, seed=0, memory_limit=100), federation)
    assert made == [8 * len(tight[0].reports[0].gradient) * 4]
    assert list(tmp_path.iterdir()) == []
    for one, other in zip(free[0].reports, tight[0].reports, strict=True):
        torch.testing.assert_close(one.gradient, other.gradient)


def test_the_limit_makes_stacks_narrower():
    federation = small_federation("abcdefghijklmnop")
    free = VectorizedEngine(federation, seed=0, threads=1)
    _, (record,) = rounds(free, federation)
    of_a_client = max(plan.num_bytes for plan in free.shortcuts.plan_of.values())
    for limit, expected in (
        (None, [(16, 16)]),
        (2 * 6 * of_a_client, [(6, 6), (6, 6), (4, 4)]),
        (1, [(1, None)] * 16),
    ):
        engine = VectorizedEngine(federation, seed=0, threads=1, memory_limit=limit)
        engine.shortcuts.plan(TRAINING)
        jobs = engine.jobs(record.instructions)
        assert [(len(job.instructions), job.stack and job.stack.width) for job in jobs] == expected


def test_memory_mapped_data_are_trained_on_as_they_are(tmp_path):
    federation = small_federation("abcdef")
    mapped = []
    for client in federation.clients:
        parts = []
        for name, part in zip("xy", client.train, strict=True):
            np.save(tmp_path / f"{client.id}-{name}.npy", part.numpy())
            parts.append(
                torch.from_numpy(np.load(tmp_path / f"{client.id}-{name}.npy", mmap_mode="c"))
            )
        mapped.append(Client(client.id, client.task, tuple(parts), client.test))
    expected = train(federation, num_rounds=2).state.encoder
    assert torch.equal(
        train(Federation(mapped, small_encoder), num_rounds=2).state.encoder, expected
    )


def test_many_rounds_and_partial_participation_hold_no_chunk_by_a_client_of_it():
    """A client's head owns its memory: else one that trains seldom would keep a whole chunk alive."""
    federation = small_federation("abcdefgh")
    engine = VectorizedEngine(federation, seed=0)
    rounds(engine, federation)
    for state in engine.client_states.values():
        for tensor in state.head.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_was_chosen_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="fedgradnorm"):
        federation = small_federation("abcdef")
        rounds(VectorizedEngine(federation, seed=0), federation, count=2)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(
        "a, and clients like it: stacked where 5 or more are alike, encoded once for all head steps"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("engine.threads=0", "engine.threads: expected a number from 1 to 1024, found 0"),
        (
            "engine.memory_limit=0",
            "engine.memory_limit: expected a number of bytes above 0, found 0",
        ),
        ("engine.memory_limit=lots", "engine.memory_limit: "),
        ("engine.device=tpu", "engine.device: expected 'cpu' or 'cuda', found 'tpu'"),
        ("engine.device=meta", "engine.device: expected 'cpu' or 'cuda', found 'meta'"),
        ("engine.device=cuda:77", "engine.device: 'cuda:77' is not here: torch finds"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(ConfigError) as caught:
        build("engine", load_config(None, [words]).engine, federation=small_federation(), seed=0)
    assert str(caught.value).startswith(message)


def test_a_limit_may_be_a_text():
    engine = build(
        "engine",
        load_config(None, ["engine.memory_limit=1.5GB"]).engine,
        federation=small_federation(),
        seed=0,
    )
    assert engine.memory_limit == 1_500_000_000
