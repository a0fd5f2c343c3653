"""Factories that give one object, tensors that share memory, lazy modules, and what is saved of a model."""

import copy
import random
import types
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import (
    Federation,
    FederationError,
    FedGradNormWarning,
    Task,
    evaluate_run,
    load_model,
    train,
)
from fedgradnorm.evaluation import evaluate
from fedgradnorm.modules import (
    Source,
    duplicate,
    follow,
    held_tensors,
    is_lazy,
    load_held,
    reads_tensors_of,
    shared_memory,
)
from tests.helpers import (
    batch_norm_encoder,
    small_client,
    small_encoder,
    small_federation,
    small_task,
    timeless,
)

QUICK = {"num_rounds": 3, "head_steps": 2, "encoder_steps": 2, "batch_size": 8}
ENGINES = pytest.mark.parametrize("engine", ["reference", "vectorized"])


def tensors(module):
    return {name: tensor.clone() for name, tensor in held_tensors(module).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ one object again and again


@ENGINES
@pytest.mark.parametrize("make", [small_encoder, batch_norm_encoder])
def test_one_encoder_given_again_and_again_is_never_written_to(tmp_path, engine, make):
    net = make()
    before, federation = tensors(net), small_federation(encoder=lambda: net)
    runs = [train(federation, engine=engine, run_dir=tmp_path / name, **QUICK) for name in "ab"]
    assert timeless(runs[0].rows) == timeless(runs[1].rows)
    assert same(tensors(net), before)
    assert not torch.equal(
        runs[0].state.encoder,
        torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]),
    )


@ENGINES
def test_one_head_given_to_all_clients_again_and_again_is_each_clients_own(engine):
    head = nn.Linear(4, 2)
    before = tensors(head)
    shared = train(
        Federation(
            [
                small_client(id, task=Task("sign", lambda _: head, functional.cross_entropy))
                for id in "abc"
            ],
            small_encoder,
        ),
        engine=engine,
        **QUICK,
    )
    expected = train(
        Federation(
            [
                small_client(
                    id, task=Task("sign", lambda _: copy.deepcopy(head), functional.cross_entropy)
                )
                for id in "abc"
            ],
            small_encoder,
        ),
        engine=engine,
        **QUICK,
    )
    assert timeless(shared.rows) == timeless(expected.rows)
    assert same(tensors(head), before)


@pytest.mark.parametrize("shared", [True, False])
def test_the_models_of_two_clients_do_not_share_anything(tmp_path, shared):
    net = batch_norm_encoder()
    federation = small_federation(encoder=(lambda: net) if shared else batch_norm_encoder)
    result = train(federation, run_dir=tmp_path / "run", **QUICK)
    for model in (result.model, lambda client: load_model(tmp_path / "run", client, federation)):
        first = model("a")
        before = tensors(first)
        second = model("b")
        assert same(tensors(first), before)
        assert not torch.equal(first.encoder[1].running_mean, second.encoder[1].running_mean)


def test_a_part_that_two_calls_have_in_common_is_copied_too():
    part = nn.Linear(6, 8)
    source = Source(lambda _: nn.Sequential(part, nn.Linear(8, 4)), 0, "encoder")
    assert source.shared
    one, other = source.make(0), source.make(0)
    assert one[0].weight is not part.weight
    assert one[0].weight.data_ptr() != other[0].weight.data_ptr()


def test_attributes_without_tensors_are_copied_and_followed():
    net = nn.Linear(2, 2)
    net.options, net.table, net.scale = types.SimpleNamespace(beta=1.0), {"a": [1]}, 1.0
    net.generator, net.constant, net.pair = torch.Generator(), torch.ones(2), {"weight": net.weight}
    source = Source(lambda _: net, 0, "encoder")
    own = source.make(0)
    assert own.options is not net.options
    assert own.table is not net.table
    assert own.generator is not net.generator
    assert own.constant is not net.constant
    assert own.pair["weight"] is own.weight
    net.scale, net.new = 2.0, "new"
    net.options.beta = 3.0
    net.table["a"].append(2)
    follow(own)
    assert (own.scale, own.new, own.options.beta, own.table) == (2.0, "new", 3.0, {"a": [1, 2]})
    own.scale = 5.0  # the copy's own doing, as a counter's, stays
    own.table["b"] = [3]
    follow(own)
    assert (own.scale, own.table) == (5.0, {"a": [1, 2], "b": [3]})
    assert net.table == {"a": [1, 2]}


def changed_buffer(net):
    net.steps.add_(1)


def changed_layer(net):
    net.act = nn.ReLU()


def frozen(net):
    net.last.weight.requires_grad_(False)


def hooked_late(net):
    net.last.register_forward_hook(lambda module, inputs, outputs: outputs)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (changed_buffer, "steps"),
        (changed_layer, "layers"),
        (frozen, "last.weight"),
        (hooked_late, "hooks"),
    ],
)
@pytest.mark.parametrize("engine", ["reference", "vectorized"])
def test_what_copies_cannot_follow_is_refused_when_it_changes(change, name, engine):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.act = nn.Linear(6, 4), nn.Tanh()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, inputs):
            return self.act(self.last(inputs))

    net = Net()
    with pytest.raises(
        FederationError, match=f"encoder: .*{name}.* was (changed while training|frozen)"
    ):
        train(
            small_federation(encoder=lambda: net),
            engine=engine,
            on_round=lambda _: change(net),
            **QUICK,
        )


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen, self.draw = nn.Linear(6, 4), {"calls": 0}, random.Random(0).random

    def forward(self, inputs):
        self.seen["calls"] += 1
        return self.linear(inputs) * (1 + self.seen["calls"] / 100 + self.draw() / 10)


def test_what_a_copy_counts_and_draws_is_its_own():
    net = Counting()
    rows = [
        train(small_federation(encoder=lambda: net), engine=engine, **QUICK).rows
        for engine in ("reference", "reference", "vectorized")
    ]
    assert net.seen == {"calls": 0}
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    for expected, row in zip(rows[0], rows[2], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_scripted_network_is_copied_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    before = [parameter.clone() for parameter in net.parameters()]
    rows = [
        train(small_federation(encoder=lambda: net), engine=engine, **QUICK).rows
        for engine in ("reference", "reference", "vectorized")
    ]
    assert all(torch.equal(one, two) for one, two in zip(before, net.parameters(), strict=True))
    for other in rows[1:]:
        for expected, row in zip(rows[0], other, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def of_one_layer(net):
    head = nn.Linear(4, 2)
    head.other = nn.Parameter(net[0].weight.t())
    return head


def of_the_same_parameter(net):
    head = nn.Linear(4, 2)
    head.weight_of_encoder = net[0].weight
    return head


class Peeking(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.linear, self.read = nn.Linear(4, 2), lambda: net[0].weight.square().mean()

    def forward(self, features):
        return self.linear(features) * (1 + self.read())


@pytest.mark.parametrize("head", [of_one_layer, of_the_same_parameter, Peeking])
def test_a_head_that_is_tied_to_the_encoder_is_refused(head):
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    task = Task("tied", lambda features: head(net), nn.functional.cross_entropy)
    with pytest.raises(FederationError, match="client 'a': head: .* of the encoder"):
        Federation([small_client("a", task=task)], lambda: net)


def test_parameters_in_one_memory_are_refused_of_a_network_that_is_given_again_and_again():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    net[1].weight.data = net[0].weight.data.t()
    with pytest.raises(FederationError, match=r"encoder: '0.weight' and '1.weight' share memory"):
        small_federation(encoder=lambda: net)


def test_a_parameter_that_lies_on_itself_is_refused():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(1).expand(4))

        def forward(self, inputs):
            return self.linear(inputs) * self.scale

    with pytest.raises(
        FederationError, match="encoder: several numbers of 'scale' lie in the same memory"
    ):
        small_federation(encoder=Wide)


def test_halves_of_one_tensor_are_two_parameters():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(6, 8)
            self.one, self.two = nn.Parameter(both[:, :4]), nn.Parameter(both[:, 4:])

        def forward(self, inputs):
            return inputs @ self.one + inputs @ self.two

    train(small_federation(encoder=Halves), **QUICK)


def test_a_factory_that_gives_other_numbers_in_every_call_is_told_of_and_its_first_ones_are_used():
    draws = np.random.default_rng(0)

    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.order = nn.Linear(6, 4), draws.permutation(6).tolist()

        def forward(self, inputs):
            return self.linear(inputs[:, self.order])

    made = small_federation(encoder=Permuted)
    with pytest.warns(FedGradNormWarning, match="encoder: .*'order'"):
        first = train(made, engine="reference", **QUICK)
    with pytest.warns(FedGradNormWarning):
        second = train(made, engine="vectorized", **QUICK)
    for expected, row in zip(first.rows, second.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_copy_that_leads_back_to_the_original_is_refused():
    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.block = lambda inputs: self.linear(
                inputs
            )  # which keeps the first self in every copy

        def forward(self, inputs):
            return self.block(inputs)

    net = Stored()
    assert reads_tensors_of(net, lambda: duplicate(net)(torch.ones(1, 6)))
    with pytest.raises(FederationError, match="encoder: .* a copy of it still reads"):
        small_federation(encoder=lambda: net)
    train(small_federation(encoder=Stored), **QUICK)

    hooked = nn.Linear(6, 4)
    gate = nn.Linear(4, 4)
    hooked.add_module("gate", gate)
    hooked.register_forward_hook(lambda module, inputs, outputs: gate(outputs))
    with pytest.raises(FederationError, match="still reads the original, by a hook"):
        small_federation(encoder=lambda: hooked)


def test_what_cannot_be_copied_is_refused_and_a_factory_that_makes_new_ones_is_not():
    def normed():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.utils.weight_norm(nn.Linear(6, 4))

    net = normed()
    with pytest.raises(FederationError, match="encoder: .*'weight' cannot be copied"):
        small_federation(encoder=lambda: net)
    train(small_federation(encoder=normed), **QUICK)

    def with_hook():
        made = nn.Linear(6, 4)
        made.weight.register_hook(lambda gradient: gradient * 0.5)
        return made

    hooked = with_hook()
    with pytest.raises(FederationError, match="hooks on its parameters would be lost in a copy"):
        small_federation(encoder=lambda: hooked)
    train(small_federation(encoder=with_hook), **QUICK)


# ------------------------------------------------------------------------------------------------ frozen and varying


class Frozen(nn.Module):
    """A random projection that is not trained: frozen, a buffer that a state dict leaves out, or a plain tensor."""

    def __init__(self, kind, draw):
        super().__init__()
        projection = torch.tensor(draw(), dtype=torch.float32)
        if kind == "parameter":
            self.projection = nn.Parameter(projection, requires_grad=False)
        elif kind == "buffer":
            self.register_buffer("projection", projection, persistent=False)
        else:
            self.projection = projection
        self.linear = nn.Linear(8, 4)

    def forward(self, inputs):
        return torch.tanh(self.linear(inputs @ self.projection))


def of_the_seed():
    return np.random.randn(6, 8)


OWN = np.random.default_rng(0)


def of_its_own():
    return OWN.normal(size=(6, 8))


@ENGINES
@pytest.mark.parametrize("draw", [of_the_seed, of_its_own])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "tensor"])
def test_what_is_not_trained_comes_back_as_it_was_in_use(tmp_path, kind, draw, engine):
    federation = small_federation(encoder=partial(Frozen, kind, draw))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train(federation, engine=engine, run_dir=tmp_path / "run", **QUICK)
    text = "encoder: two calls of its factory under one seed give other values of 'projection'"
    assert any(text in str(warning.message) for warning in said) == (draw is of_its_own)
    again = small_federation(
        encoder=partial(Frozen, kind, draw)
    )  # as another process would have it
    for client in federation.clients:
        recorded = result.summary["clients"][client.id]["test_loss"]
        for model in (result.model(client.id), load_model(tmp_path / "run", client.id, again)):
            assert evaluate(
                client.task, model.encoder, model.head, client.test_data
            ).loss == pytest.approx(recorded, rel=1e-6)
    if draw is of_the_seed:
        assert {id: one.loss for id, one in evaluate_run(tmp_path / "run", again).items()} == {
            id: pytest.approx(client["test_loss"], rel=1e-6)
            for id, client in result.summary["clients"].items()
        }


def test_two_runs_of_a_varying_factory_are_the_same_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedGradNormWarning)
        federation = small_federation(encoder=partial(Frozen, "parameter", of_its_own))
        runs = [
            timeless(train(federation, engine=engine, **QUICK).rows)
            for engine in ("reference", "reference", "vectorized")
        ]
    assert runs[0] == runs[1]
    assert [row["loss"] for row in runs[0]] == pytest.approx(
        [row["loss"] for row in runs[2]], rel=1e-4
    )


def test_a_factory_of_two_architectures_is_refused():
    sizes = iter(range(4, 100))
    with pytest.raises(FederationError, match="encoder: two calls .*'bias'"):
        small_federation(encoder=lambda: nn.Linear(6, next(sizes)))


@pytest.mark.parametrize(
    "factory", [lambda: None, lambda: torch.ones(2), lambda: [nn.Linear(6, 4)]]
)
def test_a_factory_of_no_module_is_refused(factory):
    with pytest.raises(FederationError, match="encoder: expected .* an nn.Module"):
        small_federation(encoder=factory)
    with pytest.raises(FederationError, match="client 'a': head: expected .* an nn.Module"):
        Federation(
            [small_client("a", task=Task("sign", lambda _: factory(), functional.cross_entropy))],
            small_encoder,
        )


# ------------------------------------------------------------------------------------------------ memory


class Tied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 6)
        self.last = nn.Linear(6, 4)
        if how == "transposed":
            self.second.weight = nn.Parameter(self.first.weight.t())
        elif how == "data":
            self.last.weight.data = self.first.weight.data
        elif how == "part":
            self.second.bias = nn.Parameter(self.first.weight.data.view(-1)[:6])
        elif how == "frozen":
            self.second.weight = nn.Parameter(self.first.weight.data.t(), requires_grad=False)
        elif how == "buffer":
            self.register_buffer("copy_of_weight", self.first.weight.data)
        elif how == "same":
            self.last.weight = self.first.weight
        elif how == "halves":
            whole = torch.randn(48)
            self.first.weight = nn.Parameter(whole[:24].view(4, 6))
            self.second.weight = nn.Parameter(whole[24:].view(6, 4))

    def forward(self, inputs):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


@pytest.mark.parametrize("how", ["transposed", "data", "part", "frozen", "buffer"])
def test_weights_tied_by_memory_are_refused_and_named(how):
    names = shared_memory(Tied(how))
    assert names is not None
    with pytest.raises(
        FederationError, match=f"encoder: '{names[0]}' and '{names[1]}' share memory"
    ):
        small_federation(encoder=lambda: Tied(how))

    def head(_):
        return nn.Sequential(nn.Linear(4, 6), Tied(how))

    with pytest.raises(
        FederationError, match="client 'a': head: '1.first.weight' and '1..*' share memory"
    ):
        Federation(
            [small_client("a", task=Task("sign", head, functional.cross_entropy))], small_encoder
        )


@ENGINES
@pytest.mark.parametrize("how", ["same", "halves", "none"])
def test_one_parameter_in_two_places_and_parts_that_do_not_overlap_are_fine(how, engine):
    assert shared_memory(Tied(how)) is None
    train(small_federation(encoder=lambda: Tied(how)), engine=engine, **QUICK)


# ------------------------------------------------------------------------------------------------ lazy


def lazy_encoder():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))


@ENGINES
def test_lazy_modules_get_their_shapes_from_an_example(tmp_path, engine):
    federation = Federation(
        [
            small_client(
                id, task=Task("sign", lambda _: nn.LazyLinear(2), functional.cross_entropy)
            )
            for id in "ab"
        ],
        lazy_encoder,
    )
    assert not is_lazy(federation.make_encoder(0))
    assert federation.layout[0] == ("0.weight", (8, 6))
    result = train(federation, engine=engine, run_dir=tmp_path / "run", **QUICK)
    assert same(tensors(result.model("a")), tensors(load_model(tmp_path / "run", "a", federation)))


def test_a_lazy_module_that_no_example_fits_is_refused_in_words():
    with pytest.raises(FederationError, match="encoder: .*lazy.*RuntimeError"):
        small_federation(encoder=lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(9, 4)))


def test_tensors_are_held_under_their_names():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    module[1].register_buffer("passing", torch.zeros(1), persistent=False)
    module[1].constant = torch.ones(3)
    names = set(held_tensors(module))
    assert {
        "0.running_mean",
        "0.num_batches_tracked",
        "1.weight",
        "1.passing",
        "1.constant",
    } <= names
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[1].weight += 1
    other[1].constant += 1
    load_held(module, held_tensors(other))
    assert same(tensors(module), tensors(other))


def test_a_client_may_be_a_task_of_its_own_with_a_head_that_draws_from_numpy():
    def head(features):
        made = nn.Linear(features, 2)
        made.weight.data = torch.tensor(np.random.randn(2, features), dtype=torch.float32)
        return made

    federations = [
        Federation(
            [small_client("a", task=Task("sign", head, functional.cross_entropy))], small_encoder
        )
        for _ in range(2)
    ]
    one, other = (federation.make_head(federation.clients[0], 3) for federation in federations)
    assert torch.equal(one.weight, other.weight)
    assert small_task("sign").loss_floor == 0
