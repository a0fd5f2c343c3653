"""Training what users bring, drawn at random: each run ends with the same numbers on both engines, or with an error that names the client.

A normal run tries 240 federations. A long one, with 20,000:

    FEDGRADNORM_FUZZ_FEDERATIONS=20000 pytest tests/fuzz/test_training.py -q -n 2
"""

import itertools
import math
import os
import random
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from fedgradnorm import Client, Federation, FedGradNorm, FedGradNormError, Metric, Task, train
from tests.helpers import examples, small_task

TOTAL = int(os.environ.get("FEDGRADNORM_FUZZ_FEDERATIONS", examples(240)))
PARTS = 4
"""The examples are shared out over so many tests, which can run side by side."""

FEATURES = 4
CLOSE = {"rtol": 2e-3, "atol": 1e-5}

SOUND, REFUSED, EITHER = "sound", "refused", "either"


class Broken(Exception):  # noqa: N818
    """What a user's own code raises."""


@dataclass(frozen=True)
class Recipe:
    """One awkward client, and the encoder that it shares with two ordinary ones."""

    task: str = "classes"
    values: str = "normal"
    container: str = "tensors"
    examples: int = 12
    head: str = "linear"
    metric: str = "none"
    encoder: str = "mlp"
    late: int = 3
    """Where something is to happen late: at which call, or at which example."""

    same_task: bool = False
    """Whether several clients have this task, so that they are trained together."""

    options: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ losses


class Late:
    """A loss that does something at a late call."""

    def __init__(self, what: str, at: int) -> None:
        self.what, self.at, self.calls = what, at, 0

    def __call__(self, outputs, targets):
        self.calls += 1
        loss = functional.cross_entropy(outputs, targets)
        if self.what == "counts":
            return loss * (1 + 0.01 * self.calls)
        if self.calls < self.at * 4:
            return loss
        if self.what == "raises":
            raise Broken("at last")
        return loss * {"nan": math.nan, "inf": math.inf, "zero": 0.0, "negative": -1.0}[self.what]


def noisy(draw):
    def loss(outputs, targets):
        return functional.cross_entropy(outputs * (1 + 0.1 * draw()), targets)

    return loss


def sometimes(draw):
    def loss(outputs, targets):
        value = functional.cross_entropy(outputs, targets)
        return value + outputs.square().mean() if draw() < 0.1 else value

    return loss


DRAWS = {"python": random.random, "numpy": np.random.random, "torch": lambda: float(torch.rand(()))}


def wide_likelihood(outputs, targets):
    return functional.gaussian_nll_loss(outputs[:, :1], targets, outputs[:, 1:].exp())


LOSSES: dict[str, tuple[str, int, Any, str]] = {
    # name: (targets, outputs, loss, what has to come of it)
    "classes": ("classes", 3, functional.cross_entropy, SOUND),
    "yes or no": ("binary", 1, functional.binary_cross_entropy_with_logits, SOUND),
    "numbers": ("numbers", 1, functional.mse_loss, SOUND),
    "ranks": ("numbers", 1, functional.smooth_l1_loss, SOUND),
    "counts": (
        "whole",
        1,
        lambda outputs, targets: functional.mse_loss(outputs, targets.float()),
        SOUND,
    ),
    "hinge": ("classes", 3, functional.multi_margin_loss, SOUND),
    "solved": (
        "numbers",
        1,
        lambda outputs, targets: (outputs - targets).abs().sub(50).clamp_min(0).mean(),
        EITHER,
    ),
    "constant": ("numbers", 1, lambda outputs, targets: outputs.sum() * 0 + 1, EITHER),
    "below zero": ("numbers", 2, wide_likelihood, EITHER),
    "cosine": (
        "vectors",
        3,
        lambda outputs, targets: -functional.cosine_similarity(outputs, targets).mean(),
        EITHER,
    ),
    "broadcasts": (
        "flat",
        1,
        lambda outputs, targets: (outputs - targets).square().mean(),
        REFUSED,
    ),
    "sum": ("classes", 3, partial(functional.cross_entropy, reduction="sum"), REFUSED),
    "for each": ("classes", 3, partial(functional.cross_entropy, reduction="none"), REFUSED),
    "ignores": (
        "numbers",
        2,
        lambda outputs, targets: functional.mse_loss(outputs[:, :1], targets),
        REFUSED,
    ),
    "a float": (
        "classes",
        3,
        lambda outputs, targets: float(functional.cross_entropy(outputs, targets)),
        REFUSED,
    ),
    "too many classes": ("classes", 2, functional.cross_entropy, REFUSED),
    "a nan": (
        "classes",
        3,
        lambda outputs, targets: functional.cross_entropy(outputs, targets) * math.nan,
        REFUSED,
    ),
    **{f"noisy, {kind}": ("classes", 3, noisy(draw), SOUND) for kind, draw in DRAWS.items()},
    **{
        f"sometimes, {kind}": ("classes", 3, sometimes(draw), SOUND) for kind, draw in DRAWS.items()
    },
    **{
        f"late: {what}": ("classes", 3, what, EITHER)
        for what in ("counts", "raises", "nan", "inf", "zero", "negative")
    },
}

# ------------------------------------------------------------------------------------------------ data


def inputs_of(values, examples, generator):
    inputs = torch.randn(examples, FEATURES, generator=generator)
    match values:
        case "zeros":
            inputs.zero_()
        case "ties":
            inputs = inputs.sign()
        case "tiny":
            inputs *= 1e-30
        case "large":
            inputs *= 30
        case "huge":
            inputs *= 1e25
        case "one nan":
            inputs[-1, 0] = math.nan
        case "one inf":
            inputs[0, -1] = math.inf
        case "double":
            inputs = inputs.double()
        case "whole":
            inputs = inputs.long()
        case "flat":
            inputs = inputs[:, 0]
        case "wide":
            inputs = inputs.repeat(1, 2)
    return inputs


VALUES = {
    **dict.fromkeys(("normal", "zeros", "ties", "tiny", "large"), SOUND),
    **dict.fromkeys(("one nan", "one inf", "double", "whole", "flat", "wide"), REFUSED),
    "huge": EITHER,
}


def targets_of(kind, examples, generator):
    match kind:
        case "classes":
            return torch.arange(examples) % 3
        case "binary":
            return (torch.arange(examples)[:, None] % 2).float()
        case "numbers":
            return torch.randn(examples, 1, generator=generator)
        case "flat":
            return torch.randn(examples, generator=generator)
        case "vectors":
            return torch.randn(examples, 3, generator=generator)
        case "whole":
            return torch.randint(0, 5, (examples, 1), generator=generator)
    raise AssertionError(kind)


class Items:
    """A map-style dataset."""

    def __init__(self, pair, change=lambda index, item: item):
        self.pair, self.change = pair, change

    def __len__(self):
        return len(self.pair[0])

    def __getitem__(self, index):
        return self.change(index, (self.pair[0][index], self.pair[1][index]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def jittered(draw):
    return lambda index, item: (item[0] * (1 + 0.1 * draw()), item[1])


def spoilt(at, how):
    return lambda index, item: how(item) if index == at else item


def raising(_):
    raise Broken("unreadable")


def contained(kind, pair, late):
    """The data as a user may give them, and what has to come of it."""
    at = min(late, len(pair[0]) - 1)
    match kind:
        case "tensors":
            return pair
        case "function":
            return lambda: pair
        case "dataset":
            return Items(pair)
        case "list":
            return list(zip(*pair, strict=True))
        case "numpy items":
            return Items(tuple(part.numpy() for part in pair))
        case "a raising item":
            return Items(pair, spoilt(at, raising))
        case "an item of another shape":
            return Items(pair, spoilt(at, lambda item: (item[0][..., :-1], item[1])))
        case "three parts":
            return (*pair, torch.ones(len(pair[0])))
        case "items of three parts":
            return Items(pair, lambda index, item: (*item, 1.0))
        case "arrays":
            return tuple(part.numpy() for part in pair)
        case "lists":
            return tuple(part.tolist() for part in pair)
        case "loader":
            return DataLoader(Items(pair))
        case "stream":
            return Stream()
        case "dictionary":
            return {"x": pair[0], "y": pair[1]}
        case "nothing":
            return None
        case "empty":
            return pair[0][:0], pair[1][:0]
        case "unequal":
            return pair[0], pair[1][:-1]
        case "a raising function":
            return lambda: raising(None)
        case _:
            return Items(pair, jittered(DRAWS[kind.removeprefix("random items, ")]))


CONTAINERS = {
    **dict.fromkeys(("tensors", "function", "dataset", "list", "numpy items"), SOUND),
    **{f"random items, {kind}": SOUND for kind in DRAWS},
    **dict.fromkeys(
        (
            "three parts",
            "items of three parts",
            "arrays",
            "lists",
            "loader",
            "stream",
            "dictionary",
            "nothing",
        ),
        REFUSED,
    ),
    **dict.fromkeys(("empty", "unequal", "a raising function"), REFUSED),
    **dict.fromkeys(("a raising item", "an item of another shape"), EITHER),
}

# ------------------------------------------------------------------------------------------------ factories


class Scaled(nn.Module):
    """A layer with a frozen random parameter that no flat vector holds."""

    def __init__(self, features, outputs):
        super().__init__()
        self.linear = nn.Linear(features, outputs)
        self.scale = nn.Parameter(torch.rand(features) + 0.5, requires_grad=False)

    def forward(self, inputs):
        return self.linear(inputs * self.scale)


def zeroed(features, outputs):
    made = nn.Linear(features, outputs)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


class Branching(nn.Module):
    """Another way with a small probability, as Python's generators have it."""

    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(FEATURES, 6), draw

    def forward(self, inputs):
        features = self.linear(inputs)
        return features.tanh() if self.draw() < 0.8 else features.relu()


class Tied(nn.Module):
    """Two parameters that share their storage."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 6), nn.Linear(FEATURES, 6)
        self.second.weight = nn.Parameter(self.first.weight.data)

    def forward(self, inputs):
        return self.first(inputs).tanh() + self.second(inputs)


class Twice(nn.Module):
    """One parameter in two places, which is sound."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 6), nn.Linear(FEATURES, 6)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.first(inputs).tanh() + self.second(inputs)


def raising_at(call, make):
    calls = itertools.count(1)

    def made(*args):
        if next(calls) >= call:
            raise Broken("no more")
        return make(*args)

    return made


def head_of(kind, outputs, late):
    linear = partial(nn.Linear, out_features=outputs)
    match kind:
        case "shared":
            one = nn.Linear(6, outputs)
            return lambda features: one
        case "zeros":
            return partial(zeroed, outputs=outputs)
        case "lazy":
            return lambda features: nn.LazyLinear(outputs)
        case "frozen":
            return partial(Scaled, outputs=outputs)
        case "python":
            return lambda features: Shifted(nn.Linear(features, outputs), random.random())
        case "raises":
            return raising_at(1, linear)
        case "raises late":
            return raising_at(late, linear)
        case "no module":
            return lambda features: "a head"
        case "wrong size":
            return lambda features: nn.Linear(features + 1, outputs)
        case "all frozen":
            return lambda features: nn.Linear(features, outputs).requires_grad_(False)
    return linear


class Shifted(nn.Module):
    def __init__(self, linear, by):
        super().__init__()
        self.linear, self.by = linear, by

    def forward(self, inputs):
        return self.linear(inputs) + self.by


HEADS = {
    **dict.fromkeys(("linear", "shared", "zeros", "lazy", "frozen", "python"), SOUND),
    **dict.fromkeys(("raises", "no module", "wrong size"), REFUSED),
    **dict.fromkeys(("raises late", "all frozen"), EITHER),
}


def plain():
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())


def encoder_of(kind, late):
    match kind:
        case "shared":
            one = plain()
            return lambda: one
        case "batch norm":
            return lambda: nn.Sequential(
                nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6)
            )
        case "dropout":
            return lambda: nn.Sequential(
                nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 6)
            )
        case "frozen":
            return lambda: nn.Sequential(Scaled(FEATURES, 8), nn.Tanh(), nn.Linear(8, 6))
        case "lazy":
            return lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(6))
        case "tied":
            return Tied
        case "twice":
            return Twice
        case "raises late":
            return raising_at(late, plain)
        case "no module":
            return lambda: None
        case "an unused layer":
            return Unused
        case _ if kind.startswith("branching"):
            return partial(Branching, DRAWS[kind.removeprefix("branching, ")])
    return plain


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.last = nn.Linear(FEATURES, 6), nn.Linear(6, 6)

    def forward(self, inputs):
        return self.used(inputs).tanh()


ENCODERS = {
    **dict.fromkeys(("mlp", "shared", "batch norm", "dropout", "frozen", "lazy", "twice"), SOUND),
    **{f"branching, {kind}": SOUND for kind in DRAWS},
    **dict.fromkeys(("tied", "no module", "an unused layer"), REFUSED),
    "raises late": EITHER,
}

# ------------------------------------------------------------------------------------------------ metrics


def raises_on_few(outputs, _):
    if len(outputs) < 5:
        raise Broken("too few")
    return 0.5


METRIC_FUNCTIONS = {
    "mean": lambda outputs, targets: float(outputs.double().mean()),
    "nan": lambda outputs, targets: math.nan,
    "inf": lambda outputs, targets: math.inf,
    "raises": lambda outputs, targets: raising(None),
    "nothing": lambda outputs, targets: None,
    "words": lambda outputs, targets: "good",
    "raises on few": raises_on_few,
    "correlation": lambda outputs, targets: float(
        torch.corrcoef(torch.stack([outputs.flatten()[:3], outputs.flatten()[-3:]]))[0, 1]
    ),
    "changes": lambda outputs, targets: float(outputs.mul_(0).sum()),
}
METRICS = {"none": SOUND, **dict.fromkeys(METRIC_FUNCTIONS, EITHER), "mean": SOUND}

# ------------------------------------------------------------------------------------------------ federations


def mostly_sound(parts):
    """Five in six are sound, so that a good part of the federations as a whole is."""
    names = sorted(parts)
    return st.one_of(
        *[st.sampled_from([name for name in names if parts[name] == SOUND])] * 5,
        st.sampled_from(names),
    )


RECIPES = st.builds(
    Recipe,
    task=mostly_sound({name: expected for name, (*_, expected) in LOSSES.items()}),
    values=mostly_sound(VALUES),
    container=mostly_sound(CONTAINERS),
    examples=st.integers(1, 24) | st.integers(6, 24),
    head=mostly_sound(HEADS),
    metric=mostly_sound(METRICS),
    encoder=mostly_sound(ENCODERS),
    late=st.integers(1, 12),
    same_task=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "num_rounds": st.integers(1, 3),
            "head_steps": st.integers(1, 2),
            "encoder_steps": st.integers(1, 3),
            "batch_size": st.sampled_from([1, 3, 8, 64]),
            "seed": st.integers(0, 3),
        },
        optional={
            "weighting": st.sampled_from(["equal", "fedgradnorm", "mgda", "uncertainty", "dwa"]),
            "method": st.sampled_from(
                ["fedrep", "fedper", "local", "centralized", {"name": "fedprox", "mu": 0.1}]
            ),
            "initial_loss": st.sampled_from(["measured", "guess"]),
            "eval_batch_size": st.sampled_from([1, 5, 512]),
            "fraction_train": st.sampled_from([0.5, 1.0]),
            "head_momentum": st.sampled_from([0.0, 0.9]),
            "loss_estimate": st.sampled_from(["batches", "exact"]),
        },
    ),
)


def verdict(recipe):
    """What has to come of it, as far as that is known beforehand."""
    parts = [
        LOSSES[recipe.task][3],
        VALUES[recipe.values],
        CONTAINERS[recipe.container],
        HEADS[recipe.head],
        METRICS[recipe.metric],
        ENCODERS[recipe.encoder],
    ]
    if recipe.examples < 6 or recipe.options.keys() & {"weighting", "method", "initial_loss"}:
        parts = [EITHER if part == SOUND else part for part in parts]
        parts = [EITHER if recipe.examples < 6 else part for part in parts]
    if recipe.encoder == "batch norm":
        parts.append(EITHER)  # a batch of one
    if recipe.values == "whole" and (
        recipe.container.startswith("random items") or recipe.encoder == "frozen"
    ):
        parts[1] = EITHER  # what is multiplied by a fraction is no whole number any more
    if recipe.task == "for each" and recipe.options.get("batch_size") == 1:
        parts[0] = EITHER  # one loss in a vector is one loss
    if recipe.values in ("one nan", "one inf") and recipe.container not in ("tensors", "function"):
        parts[1] = EITHER  # of a dataset only the examples that are drawn are seen
    if recipe.values == "zeros" or recipe.values == "tiny":
        parts = [
            EITHER if part == REFUSED else part for part in parts
        ]  # what a loss does with its pairs cannot be seen
    if REFUSED in parts:
        return REFUSED
    return SOUND if all(part == SOUND for part in parts) else EITHER


def built(recipe):
    """The federation. Everything that it holds is made anew: what counts calls begins at none."""
    kind, outputs, loss, _ = LOSSES[recipe.task]
    if isinstance(loss, str):
        loss = Late(loss, recipe.late)
    function = METRIC_FUNCTIONS.get(recipe.metric)
    metrics = () if function is None else (Metric("score", function, True),)
    task = Task("odd", head_of(recipe.head, outputs, recipe.late), loss, metrics)

    def pair(number, examples):
        generator = torch.Generator().manual_seed(number)
        return inputs_of(recipe.values, examples, generator), targets_of(kind, examples, generator)

    def client(id, number):
        data = contained(recipe.container, pair(number, recipe.examples), recipe.late)
        return Client(id, task, data, None if recipe.metric == "none" else pair(number + 50, 7))

    def ordinary(id, number):
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(16, FEATURES, generator=generator)
        return Client(
            id,
            small_task("plain"),
            (inputs, (inputs[:, 0] > 0).long()),
            (inputs, (inputs[:, 0] > 0).long()),
        )

    odd = [
        client("odd", 1),
        *([client("odd-2", 2), client("odd-3", 3)] if recipe.same_task else []),
    ]
    return Federation(
        [ordinary("a", 11), *odd, ordinary("z", 12)], encoder_of(recipe.encoder, recipe.late)
    )


def outcome(recipe, engine):
    """The rows and the summary of a run, or the error that it ended with."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    options = dict(recipe.options)
    weighting = options.pop("weighting", None)
    if weighting in (None, "fedgradnorm"):
        weighting = FedGradNorm(
            weight_lr=1e-3
        )  # a step's sign turns by rounding where a norm is at its target
    try:
        result = train(
            built(recipe),
            weighting,
            engine=engine,
            head_lr=0.05,
            encoder_lr=0.05,
            eval_every=1,
            **options,
        )
    except FedGradNormError as error:
        return None, error
    return result, None


NAMED = re.compile(r"\b(odd|encoder|norm_layer|clients? '[az]'|train\.)")
FIGURES = (
    "loss",
    "initial_loss",
    "inverse_training_rate",
    "grad_norm",
    "weight",
    "test_loss",
    "metric",
)


@pytest.mark.parametrize("part", range(PARTS))
def test_both_engines_agree_or_say_what_is_wrong(part):
    found = Counter()

    @seed(part)
    @settings(max_examples=TOTAL // PARTS, deadline=None, suppress_health_check=list(HealthCheck))
    @given(recipe=RECIPES)
    def run(recipe):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            (expected, refused), (result, error) = (
                outcome(recipe, "reference"),
                outcome(recipe, "vectorized"),
            )
        end = "trained" if refused is None else type(refused).__name__
        event(end)
        found[end] += 1
        if refused is not None or error is not None:
            check_error(recipe, refused, error)
        else:
            check_numbers(recipe, expected, result)

    run()
    assert found.total() >= TOTAL // PARTS


def check_error(recipe, refused, error):
    if "raises late" not in (
        recipe.head,
        recipe.encoder,
    ):  # the engines call factories more and less often
        assert refused is not None, f"the reference engine trains what the other refuses: {error}"
        assert error is not None, f"the vectorized engine trains what the other refuses: {refused}"
        assert type(error) is type(refused), f"{refused!r} {error!r}"
    for one in (refused, error):
        assert one is None or NAMED.search(str(one)), str(one)
    assert verdict(recipe) != SOUND, f"a sound federation is refused: {refused}"


def check_numbers(recipe, expected, result):
    assert verdict(recipe) != REFUSED, "nothing was said"
    assert len(expected.rows) == len(result.rows)
    has_a_metric = recipe.metric != "correlation" or recipe.values not in (
        "zeros",
        "tiny",
    )  # of a constant it is rounding
    for reference, row in zip(expected.rows, result.rows, strict=True):
        where = f"round {row['round']}, client {row['client']}"
        for key in ("client", "participated", "dropped", "examples"):
            assert row[key] == reference[key], f"{where}: {key}"
        for key in FIGURES[: None if has_a_metric else -1]:
            same(reference[key], row[key], f"{where}: {key}")
    same(sum(expected.weights.values()), sum(result.weights.values()), "weights")


def same(expected, found, what):
    if expected is None or found is None:
        assert expected is found, f"{what}: {expected} and {found}"
        return
    np.testing.assert_allclose(found, expected, err_msg=what, **CLOSE)
