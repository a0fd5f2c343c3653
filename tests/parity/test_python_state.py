"""Python values that change while training, and random numbers of three kinds: the default engine gives what the code as it is gives."""

import array
import ctypes
import functools
import itertools
import os
import random
import sys
import types
import warnings
from collections import UserList
from contextvars import ContextVar
from functools import partial
from os import getenv

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from fedgradnorm import Client, Federation, FedGradNormWarning, Metric, Task, train
from tests.helpers import accuracy, small_client, small_encoder, small_task, timeless

SETTINGS = {
    "num_rounds": 6,
    "head_steps": 3,
    "encoder_steps": 3,
    "batch_size": 8,
    "head_lr": 0.1,
    "encoder_lr": 0.1,
}
BETA, CONFIG, TABLE = 0.0, types.SimpleNamespace(beta=0.0), {"beta": 0.0}
CHANGED = "has another value than when training began: from now on trained without shortcuts"


def data(seed, examples=40):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 6, generator=generator)
    return inputs, (inputs.sum(dim=1) > 0).long()


def encoder():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def with_task(task, make=encoder, clients=6):
    """A federation whose first clients have this task: enough of them to be stacked."""
    other = small_task("other")
    members = [
        Client(f"c{index}", task if index < clients else other, data(index), data(100 + index))
        for index in range(clients + 1)
    ]
    return Federation(members, make)


def penalised(outputs, targets, beta):
    return functional.cross_entropy(outputs, targets) + beta * outputs.square().mean()


class Attribute:
    beta = 0.0

    def __call__(self, outputs, targets):
        return penalised(outputs, targets, self.beta)


class Slotted:
    __slots__ = ("beta",)

    def __init__(self):
        self.beta = 0.0

    def __call__(self, outputs, targets):
        return penalised(outputs, targets, self.beta)


def anneal(owner, name="beta"):
    setattr(owner, name, getattr(owner, name) + 0.5)


def global_loss(outputs, targets):
    return penalised(outputs, targets, BETA)


def namespace_loss(outputs, targets):
    return penalised(outputs, targets, CONFIG.beta)


def table_loss(outputs, targets):
    return penalised(outputs, targets, TABLE["beta"])


def helper(outputs):
    return BETA * outputs.square().mean()


def indirect_loss(outputs, targets):
    return functional.cross_entropy(outputs, targets) + helper(outputs)


def set_global(_):
    global BETA
    BETA += 0.5


def closure():
    beta = 0.0

    def loss(outputs, targets):
        return penalised(outputs, targets, beta)

    def change(_):
        nonlocal beta
        beta += 0.5

    return loss, change


def by_attribute():
    loss = Attribute()
    return loss, lambda _: anneal(loss)


def by_class():
    kind = type("Own", (Attribute,), {})
    return kind(), lambda _: anneal(kind)


def by_slot():
    loss = Slotted()
    return loss, lambda _: anneal(loss)


def by_partial():
    options = types.SimpleNamespace(beta=0.0)
    return partial(
        lambda outputs, targets, options: penalised(outputs, targets, options.beta), options=options
    ), lambda _: anneal(options)


def by_array():
    beta = np.zeros(1)

    def change(_):
        beta[0] += 0.5

    return lambda outputs, targets: penalised(outputs, targets, float(beta[0])), change


def by_module_weight():
    loss = nn.CrossEntropyLoss(weight=torch.ones(2))

    def change(_):
        loss.weight = loss.weight * torch.tensor([1.0, 1.3])

    return loss, change


def by_attribute_of_a_function():
    def loss(outputs, targets):
        return penalised(outputs, targets, loss.beta)

    loss.beta = 0.0
    return loss, lambda _: anneal(loss)


def by_default_value():
    def loss(outputs, targets, beta=0.0):
        return penalised(outputs, targets, beta)

    def change(_):
        loss.__defaults__ = (loss.__defaults__[0] + 0.5,)

    return loss, change


def by_keyword_of_a_partial():
    loss = partial(penalised, beta=0.0)
    return loss, lambda _: loss.keywords.update(beta=loss.keywords["beta"] + 0.5)


def by_import():
    module = types.ModuleType("annealed_options")
    module.beta, sys.modules["annealed_options"] = 0.0, module

    def loss(outputs, targets):
        import annealed_options

        return penalised(outputs, targets, annealed_options.beta)

    return loss, lambda _: anneal(module)


def by_imported_name():
    module = types.ModuleType("annealed_options")
    module.beta, sys.modules["annealed_options"] = 0.0, module

    def loss(outputs, targets):
        from annealed_options import beta

        return penalised(outputs, targets, beta)

    return loss, lambda _: anneal(module)


def by_getattr():
    def loss(outputs, targets):
        return penalised(outputs, targets, getattr(CONFIG, "beta"))  # noqa: B009

    return loss, lambda _: anneal(CONFIG)


def by_globals():
    return lambda outputs, targets: penalised(outputs, targets, globals()["BETA"]), set_global


def by_environment():
    os.environ["ANNEALED"] = "0"

    def change(_):
        os.environ["ANNEALED"] = str(float(os.environ["ANNEALED"]) + 0.5)

    return lambda outputs, targets: penalised(outputs, targets, float(getenv("ANNEALED"))), change


def by_mode_of_a_loss():
    class Loss(nn.Module):
        def forward(self, outputs, targets):
            return penalised(outputs, targets, 0.0 if self.training else 1.0)

    loss = Loss()
    return loss, lambda _: loss.eval()


def by_scheduler():
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)

    def change(_):
        optimiser.param_groups[0]["lr"] += 0.5

    return lambda outputs, targets: penalised(
        outputs, targets, optimiser.param_groups[0]["lr"]
    ), change


class Looked:
    """Reads a global where no name is called."""

    def __getattr__(self, name):
        return TABLE[name]

    def __getitem__(self, name):
        return TABLE[name]


def by_special_method(read):
    looked = Looked()
    return lambda: (
        lambda outputs, targets: penalised(outputs, targets, read(looked)),
        lambda _: TABLE.update(beta=TABLE["beta"] + 0.5),
    )


@functools.cache
def table():
    return {"beta": 0.0}


def by_cached_table():
    table()["beta"] = 0.0
    return lambda outputs, targets: penalised(
        outputs, targets, table()["beta"]
    ), lambda _: table().update(beta=table()["beta"] + 0.5)


def by_bound_method():
    held = {"beta": 0.0}
    get = held.get
    return lambda outputs, targets: penalised(outputs, targets, get("beta")), lambda _: held.update(
        beta=held["beta"] + 0.5
    )


def by_holder(make, read, write):
    def made():
        holder = make()
        return lambda outputs, targets: penalised(outputs, targets, read(holder)), lambda _: write(
            holder, read(holder) + 0.5
        )

    return made


def first(holder):
    return holder[0]


def set_first(holder, value):
    holder[0] = value


def by_far_element():
    many = np.zeros(100_000)

    def change(_):
        many[12_345] += 0.5

    return lambda outputs, targets: penalised(outputs, targets, float(many[12_345])), change


class Private:
    __slots__ = "__beta"

    def __init__(self):
        self.__beta = 0.0

    def __call__(self, outputs, targets):
        return penalised(outputs, targets, self.__beta)

    def anneal(self, _):
        self.__beta += 0.5


def by_private_slot():
    loss = Private()
    return loss, loss.anneal


ANNEALED = {
    "a private slot": by_private_slot,
    "an attribute of a function": by_attribute_of_a_function,
    "a default value": by_default_value,
    "a keyword of a partial": by_keyword_of_a_partial,
    "an import": by_import,
    "an imported name": by_imported_name,
    "getattr": by_getattr,
    "globals()": by_globals,
    "the environment": by_environment,
    "the mode of a loss": by_mode_of_a_loss,
    "an optimiser": by_scheduler,
    "__getattr__": by_special_method(lambda looked: looked.beta),
    "__getitem__": by_special_method(lambda looked: looked["beta"]),
    "a cached table": by_cached_table,
    "a bound method": by_bound_method,
    "an array of the standard library": by_holder(
        lambda: array.array("d", [0.0]), first, set_first
    ),
    "a list of a user's": by_holder(lambda: UserList([0.0]), first, set_first),
    "a number in C": by_holder(
        lambda: ctypes.c_double(0.0),
        lambda holder: holder.value,
        lambda holder, to: setattr(holder, "value", to),
    ),
    "a variable of a context": by_holder(
        lambda: ContextVar("beta", default=0.0),
        lambda holder: holder.get(),
        lambda holder, to: holder.set(to),
    ),
    "one of many elements": by_far_element,
    "an attribute": by_attribute,
    "an attribute of the class": by_class,
    "a slot": by_slot,
    "a variable of a closure": closure,
    "an argument of a partial": by_partial,
    "an array": by_array,
    "a weight of a loss": by_module_weight,
    "a global": lambda: (global_loss, set_global),
    "a global of a function that is called": lambda: (indirect_loss, set_global),
    "an attribute of a global": lambda: (namespace_loss, lambda _: anneal(CONFIG)),
    "an entry of a global": lambda: (table_loss, lambda _: TABLE.update(beta=TABLE["beta"] + 0.5)),
}


def reset():
    global BETA
    BETA = CONFIG.beta = TABLE["beta"] = 0.0


def losses_of(make, engine, **settings):
    """The losses of all rounds and clients; ``make`` gives a federation and what is done after every round."""
    reset()
    federation, change = make()
    result = train(federation, engine=engine, on_round=change, **{**SETTINGS, **settings})
    return [row["loss"] for row in result.rows], result


def check_same(make, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedGradNormWarning)
        expected, one = losses_of(make, "reference", **settings)
        found, other = losses_of(make, "vectorized", **settings)
    assert found == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(other.state.encoder, one.state.encoder, rtol=1e-4, atol=1e-5)
    return expected


@pytest.mark.parametrize("way", ANNEALED)
@pytest.mark.parametrize("clients", [1, 6])
def test_a_loss_that_is_annealed_between_rounds_is_followed(way, clients):
    def make():
        loss, change = ANNEALED[way]()
        return with_task(small_task_with(loss), clients=clients), change

    annealed = check_same(make)
    reset()
    loss, _ = ANNEALED[way]()
    unchanged = with_task(small_task_with(loss), clients=clients)
    constant = [row["loss"] for row in train(unchanged, engine="reference", **SETTINGS).rows]
    assert annealed != pytest.approx(constant, rel=1e-3), "the annealing does something"


def small_task_with(loss, **options):
    return Task(
        "sign",
        partial(nn.Linear, out_features=2),
        loss,
        (Metric("accuracy", accuracy, higher_is_better=True),),
        **options,
    )


def test_it_says_what_has_changed_and_for_whom_once():
    loss, change = by_attribute()
    with pytest.warns(FedGradNormWarning) as said:
        train(with_task(small_task_with(loss)), on_round=change, **SETTINGS)
    (text,) = [str(warning.message) for warning in said]
    assert text.startswith(f"client 'c0' and 5 like it: an attribute of Attribute {CHANGED}")


class Tempered(nn.Module):
    """An encoder with a temperature, or whatever it is given for one."""

    def __init__(self, options=None, made=None):
        super().__init__()
        self.linear, self.temperature, self.options = nn.Linear(6, 4), 1.0, options
        if made is not None:
            made.append(self)

    def forward(self, inputs):
        return torch.tanh(
            self.linear(inputs)
            * self.temperature
            * (self.options.scale if self.options is not None else 1.0)
        )


def of_the_same_object():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Tempered()
    return with_task(small_task("sign"), lambda: net), lambda _: setattr(
        net, "temperature", net.temperature + 0.5
    )


def of_made_objects():
    made = []

    def change(_):
        for module in made:
            module.temperature += 0.5

    return with_task(small_task("sign"), lambda: Tempered(made=made)), change


def of_a_shared_option():
    options = types.SimpleNamespace(scale=1.0)
    return with_task(small_task("sign"), lambda: Tempered(options)), lambda _: anneal(
        options, "scale"
    )


def of_a_shared_option_of_one_object():
    options = types.SimpleNamespace(scale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Tempered(options)
    return with_task(small_task("sign"), lambda: net), lambda _: anneal(options, "scale")


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, features):
        return super().forward(features) * self.scale


def of_made_heads():
    made = []

    def head(features):
        made.append(Scaled(features, 2))
        return made[-1]

    def change(_):
        for module in made:
            module.scale += 0.5

    return with_task(Task("sign", head, functional.cross_entropy)), change


class Reversed(torch.autograd.Function):
    strength = 0.0

    @staticmethod
    def forward(ctx, inputs, strength):
        ctx.strength = strength
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.strength), None


class Adversarial(nn.Linear):
    strength = 0.0

    def forward(self, inputs):
        return (
            super().forward(Reversed.apply(inputs, self.strength))
            if self.training
            else super().forward(inputs)
        )


def of_reversed_gradients():
    """The loss stays as it is, and only gradients change."""
    kind = type("Own", (Adversarial,), {})

    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), kind(8, 4))

    return with_task(small_task("sign"), make), lambda _: anneal(kind, "strength")


@pytest.mark.parametrize(
    "make",
    [
        of_the_same_object,
        of_made_objects,
        of_a_shared_option,
        of_a_shared_option_of_one_object,
        of_made_heads,
        of_reversed_gradients,
    ],
)
def test_models_that_are_annealed_between_rounds_are_followed(make):
    annealed = check_same(make)
    constant = [row["loss"] for row in train(make()[0], engine="reference", **SETTINGS).rows]
    assert annealed != pytest.approx(constant, rel=1e-3), "the annealing does something"


class Counting:
    """A loss that warms up with its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return functional.cross_entropy(outputs, targets) * min(1.0, self.calls / 200)


class CountingHead(nn.Linear):
    """Each client's head counts its own calls."""

    calls = 0

    def forward(self, features):
        self.calls += self.training
        return super().forward(features) * (1 + self.calls / 50)


class Iterating:
    """A loss whose state is an iterator's, which nobody can look into."""

    def __init__(self):
        self.factors = itertools.cycle([1.0, 2.0, 3.0])

    def __call__(self, outputs, targets):
        return functional.cross_entropy(outputs, targets) * next(self.factors)


def with_loss(loss):
    return lambda: (with_task(small_task_with(loss()), clients=1), None)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(with_loss(Counting), id="a loss counts its calls"),
        pytest.param(with_loss(Iterating), id="a loss with an iterator"),
        pytest.param(
            lambda: (
                with_task(
                    Task("sign", partial(CountingHead, out_features=2), functional.cross_entropy)
                ),
                None,
            ),
            id="a head",
        ),
    ],
)
def test_code_that_changes_in_every_call_gives_the_same_calls(make):
    check_same(make)


class Dropping(nn.Module):
    """LayerDrop, drawn with one of three generators."""

    def __init__(self, draw, often):
        super().__init__()
        self.first, self.second, self.draw, self.often = (
            nn.Linear(6, 4),
            nn.Linear(4, 4),
            draw,
            often,
        )

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        return (
            hidden
            if self.training and self.draw() < self.often
            else hidden + torch.tanh(self.second(hidden))
        )


DRAWS = {
    "python": random.random,
    "numpy": np.random.rand,
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("often", [0.02, 0.5])
@pytest.mark.parametrize("kind", DRAWS)
def test_branches_on_random_numbers_are_drawn_in_every_call(kind, often):
    check_same(lambda: (with_task(small_task("sign"), partial(Dropping, DRAWS[kind], often)), None))


@pytest.mark.parametrize("engine", ["reference", "vectorized"])
@pytest.mark.parametrize("kind", DRAWS)
def test_the_seed_alone_decides_whatever_generator_a_model_draws_from(kind, engine):
    def run(seed):
        result = train(
            with_task(small_task("sign"), partial(Dropping, DRAWS[kind], 0.5)),
            engine=engine,
            seed=seed,
            **SETTINGS,
        )
        return timeless(result.rows)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = run(0)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert run(0) == first
    assert run(1) != first
    random.setstate(states[0])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run(0)
    assert before == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ), "they are put back"


class Augmented(torch.utils.data.Dataset):
    def __init__(self, pair, draw):
        self.pair, self.draw = pair, draw

    def __len__(self):
        return len(self.pair[0])

    def __getitem__(self, index):
        return self.pair[0][index] + self.draw(), self.pair[1][index]


@pytest.mark.parametrize("kind", DRAWS)
def test_data_sets_metrics_losses_and_factories_are_seeded_too(kind):
    draw = DRAWS[kind]

    def noisy_loss(outputs, targets):
        return functional.cross_entropy(outputs * (1 + 0.1 * draw()), targets)

    def noisy_metric(outputs, targets):
        return accuracy(outputs, targets) + 0.1 * draw()

    def head(features):
        made = nn.Linear(features, 2)
        made.weight.data += draw()
        return made

    def make():
        task = Task(
            "sign", head, noisy_loss, (Metric("noisy", noisy_metric, higher_is_better=True),)
        )
        plain = Task(
            "plain",
            partial(nn.Linear, out_features=2),
            functional.cross_entropy,
            (Metric("noisy", noisy_metric, True),),
        )
        members = [
            Client("augmented", task, Augmented(data(0), draw), Augmented(data(1), draw)),
            Client("loaded", plain, lambda: (data(2)[0] + draw(), data(2)[1]), data(3)),
        ]
        return Federation(members, lambda: nn.Linear(6, 4))

    runs = [
        timeless(train(make(), engine=engine, **SETTINGS).rows)
        for engine in ("reference", "vectorized", "reference")
    ]
    assert runs[0] == runs[2]
    for one, other in zip(runs[0], runs[1], strict=True):
        assert other["metric"] == pytest.approx(one["metric"], abs=1e-6)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("executor", ["torchscript", "python"], indirect=True)
def test_a_program_that_is_no_longer_its_code_is_dropped_and_its_round_repeated(monkeypatch):
    """What no look at Python can see, here behind a trusted name, is seen in the numbers."""
    hidden = types.ModuleType("torch_like")
    hidden.beta = 0.0

    def secret(outputs, targets):
        return penalised(outputs, targets, hidden.beta)

    secret.__module__ = "torch.secret"  # its globals and variables are then taken for granted
    monkeypatch.setattr("fedgradnorm.engines.vectorized.TRIED", 1.0)

    def make():
        hidden.beta = 0.0
        return with_task(small_task_with(secret)), lambda _: anneal(hidden)

    expected, _ = losses_of(make, "reference")
    with pytest.warns(FedGradNormWarning, match="a traced step is no longer the step of its code"):
        found, _ = losses_of(make, "vectorized")
    assert found == pytest.approx(expected, rel=1e-4)


class Normed(nn.Module):
    """Divides by the largest number of the batch, where that is above what the first batch has."""

    def __init__(self, most):
        super().__init__()
        self.linear, self.most = nn.Linear(6, 4), most

    def forward(self, inputs):
        return self.linear(inputs / inputs.abs().max().clamp(min=self.most))


@pytest.mark.parametrize("clients", ["ab", "abcdefgh"])
def test_an_encoder_whose_examples_come_to_depend_on_others_is_noticed(clients):
    made = [small_client(id, examples=40) for id in clients]
    largest = max(float(client.train[0][:8].abs().max()) for client in made)
    federation = Federation(made, lambda: Normed(largest))
    options = {"num_rounds": 30, "head_steps": 4, "encoder_steps": 2, "batch_size": 8}
    reference = train(federation, engine="reference", **options)
    with pytest.warns(
        FedGradNormWarning, match="other features among other examples|no longer the step"
    ):
        found = train(federation, **options)
    assert found.rows[-1]["loss"] == pytest.approx(reference.rows[-1]["loss"], rel=0.05)


class Drawing(Dataset):
    """A data set with a generator of its own."""

    def __init__(self):
        self.draws = np.random.default_rng(0)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.from_numpy(self.draws.normal(size=6)).float() + index / 20, torch.tensor(
            index % 2
        )


def test_a_data_set_with_a_generator_of_its_own_is_drawn_from_as_often_by_both_engines():
    def run(engine):
        clients = [Client("a", small_task("sign"), Drawing()), small_client("b")]
        return train(
            Federation(clients, small_encoder, example=torch.zeros(1, 6)),
            engine=engine,
            num_rounds=3,
            head_steps=2,
            encoder_steps=2,
        )

    for expected, row in zip(run("reference").rows, run("vectorized").rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


class Average(nn.Module):
    """A loss with a moving average, which it writes in place."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, outputs, targets):
        loss = functional.cross_entropy(outputs, targets)
        self.mean *= 0.9
        self.mean += 0.1 * float(loss.detach())
        return loss * (1 + float(self.mean[0]))


@pytest.mark.parametrize("mean", [lambda: np.zeros(1), lambda: torch.zeros(1)])
def test_what_planning_calls_leaves_no_trace_in_what_a_loss_keeps(mean):
    check_same(lambda: (with_task(small_task_with(Average(mean())), clients=1), None))
