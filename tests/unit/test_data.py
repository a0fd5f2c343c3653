import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fedgradnorm import Client, Federation, FederationError, train
from fedgradnorm.data import (
    Dataset,
    batch_order,
    distinct,
    draws_few,
    in_batches,
    num_passes,
    size,
    take,
)
from tests.helpers import small_client, small_encoder, small_task

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
QUICK = {"num_rounds": 1, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}


class Squares:
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index * index


def test_a_dataset_and_the_same_tensors_give_the_same_batches():
    tensors = (torch.arange(7.0).unsqueeze(1), torch.arange(7) ** 2)
    assert isinstance(Squares(), Dataset)
    for indices in batch_order(np.random.default_rng(0).random((3, 7)), 3, 5):
        for one, other in zip(take(Squares(), indices), take(tensors, indices), strict=True):
            assert torch.equal(one, other)
    for found, expected in zip(in_batches(Squares(), 3), in_batches(tensors, 3), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_sources():
    tensors, task = (torch.zeros(2, 1), torch.zeros(2)), small_task("t")
    assert Client("a", task, tensors).train_data is tensors
    assert Client("a", task, lambda: tensors).train_data is tensors
    assert isinstance(Client("a", task, Squares()).train_data, Squares)
    assert size(Squares()) == 7
    assert torch.equal(take(Squares(), np.array([2, 5]))[1], torch.tensor([4, 25]))


# ------------------------------------------------------------------------------------------------ batches


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_batches_go_through_all_examples_before_one_comes_again(
    num_examples, batch_size, num_batches, seed
):
    numbers = np.random.default_rng(seed).random(
        (2, num_passes(num_examples, batch_size, num_batches), num_examples)
    )
    drawn, other = batch_order(numbers, batch_size, num_batches)
    assert np.array_equal(other, batch_order(numbers[1], batch_size, num_batches))
    assert drawn.shape == (num_batches, min(batch_size, num_examples))
    seen = drawn.reshape(-1)
    for start in range(0, len(seen), num_examples):
        one_pass = seen[start : start + num_examples]
        assert len(np.unique(one_pass)) == len(one_pass)


@given(st.integers(0, 5), st.integers(1, 500), st.integers(4, 10**12))
def test_few_of_many_examples_are_different_ones_and_the_first_of_more(seed, count, times):
    examples = count * times
    few = distinct(np.random.default_rng(seed), examples, count)
    assert few.shape == (count,)
    assert len(np.unique(few)) == count
    assert few.min() >= 0
    assert few.max() < examples
    assert np.array_equal(few, distinct(np.random.default_rng(seed), examples, count))


def test_every_example_and_every_order_is_as_likely():
    """A thousand draws of 2 of 5: each ordered pair comes up about as often as the others."""
    rng = np.random.default_rng(0)
    pairs = [tuple(distinct(rng, 5, 2).tolist()) for _ in range(8000)]
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert len(counts) == 20
    assert all(abs(count - 400) < 5 * 400**0.5 for count in counts.values())


def test_a_round_of_a_large_data_set_takes_the_memory_of_its_batches():
    import tracemalloc

    numbers = 50_000_000
    assert draws_few(numbers, 1280)
    tracemalloc.start()
    distinct(np.random.default_rng(0), numbers, 1280)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


class Long:
    """A hundred million examples that are nowhere in memory, of which it counts those that are asked for."""

    def __init__(self):
        self.seen = set()

    def __len__(self):
        return 100_000_000

    def __getitem__(self, index):
        self.seen.add(index)
        value = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return value, int(value[0] > 0)


def test_of_a_hundred_million_examples_a_round_reads_those_of_its_batches_alone():
    results = []
    for engine in ("reference", "vectorized"):
        data = Long()
        federation = Federation(
            [Client("long", small_task("sign"), data), small_client("b")], small_encoder
        )
        result = train(federation, engine=engine, loss_examples=16, **{**QUICK, "num_rounds": 2})
        assert len(data.seen) < 200
        results.append([row["loss"] for row in result.rows])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


# ------------------------------------------------------------------------------------------------ whatever is passed as data


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Frame:
    """As a table of pandas is: a length, items by column."""

    iloc = loc = None

    def __len__(self):
        return 3

    def __getitem__(self, name):
        raise KeyError(name)


class Items:
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.item(index)


Image = type("Image", (), {})

WRONG = {
    "a loader": (DataLoader(TensorDataset(X, Y)), "found DataLoader; give its .dataset"),
    "a stream": (Stream(), "an IterableDataset has no examples by number"),
    "a list of two tensors": ([X, Y], "example 0: expected a pair (input, target), found Tensor"),
    "a list of lists": (
        (X.tolist(), Y.tolist()),
        "inputs: expected a tensor, found list: torch.tensor(...) makes one",
    ),
    "arrays": (
        (X.numpy(), Y.numpy()),
        "inputs: expected a tensor, found ndarray: torch.from_numpy(array) makes one",
    ),
    "one array": (X.numpy(), "found ndarray; give a pair of tensors"),
    "one tensor": (X, "found Tensor; give the targets too"),
    "weights": (
        (X, Y, Y),
        "expected a pair (inputs, targets), found a tuple of 3; weights of examples belong in the targets",
    ),
    "inputs alone": ((X,), "expected a pair (inputs, targets), found a tuple of 1"),
    "a table": (Frame(), "found Frame"),
    "a dictionary": ({"x": X, "y": Y}, "found dict"),
    "a set": ({1, 2}, "found set"),
    "a text": ("data.csv", "found str"),
    "a number": (5, "found int"),
    "nothing": (None, "found None"),
    "sparse inputs": (
        (X.to_sparse(), Y),
        "inputs: expected a dense tensor, found layout torch.sparse_coo: .to_dense() makes one",
    ),
    "sparse targets": ((X, Y.to_sparse()), "targets: expected a dense tensor"),
    "a tensor of one number": (
        (X, torch.tensor(1)),
        "targets: expected the examples along dimension 0",
    ),
    "dictionaries": (
        [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
        "example 0: expected a pair (input, target), found dict",
    ),
    "triples": (
        TensorDataset(X, Y, Y),
        "example 0: expected a pair (input, target), found 3 parts; weights of examples belong",
    ),
    "dictionaries of a data set": (
        Items(lambda index: {"x": X[index]}),
        "example 0: expected a pair (input, target), found dict",
    ),
    "images": (
        Items(lambda index: (Image(), 1)),
        "example 0: input: expected a tensor, an array or a number, found Image",
    ),
    "text targets": (
        Items(lambda index: (X[index], "cat")),
        "example 0: target: expected a tensor, an array or a number, found str",
    ),
    "items that are missing": (
        Items(lambda index: None),
        "example 0: expected a pair (input, target), found None",
    ),
    "examples of two shapes": (
        Items(lambda index: (torch.zeros(6 + index // 3), 0)),
        "expected inputs of one shape, found (6,) and (7,)",
    ),
    "two lengths": ((X, Y[:-1]), "24 training inputs, but 23 targets"),
    "no examples": ((X[:0], Y[:0]), "is empty"),
    "a data set without examples": (Subset(TensorDataset(X, Y), []), "is empty"),
}


@pytest.mark.parametrize("engine", ["reference", "vectorized"])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_kinds_of_data_name_the_client_and_what_is_expected(kind, loaded, engine):
    data, message = WRONG[kind]
    with pytest.raises(FederationError) as caught:
        client = Client("site", small_task("sign"), (lambda: data) if loaded else data)
        train(Federation([client, small_client("b")], small_encoder), engine=engine, **QUICK)
    assert "client 'site'" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "nothing"])
def test_wrong_kinds_of_test_data_are_named_too(kind):
    data, message = WRONG[kind]
    with pytest.raises(FederationError) as caught:
        train(
            Federation([Client("site", small_task("sign"), (X, Y), data)], small_encoder), **QUICK
        )
    assert "client 'site'" in str(caught.value)
    assert message.replace("training", "test") in str(caught.value)


@pytest.mark.parametrize("engine", ["reference", "vectorized"])
@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        TensorDataset(X, Y),
        Subset(TensorDataset(X, Y), range(20)),
        list(zip(X, Y, strict=True)),
        [[x, y] for x, y in zip(X, Y, strict=True)],
        [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)],
        [(x.tolist(), bool(y)) for x, y in zip(X, Y.long(), strict=True)],
    ],
)
def test_right_kinds_of_data_are_taken(data, engine):
    task = small_task("sign")
    if isinstance(data, list) and isinstance(data[0][1], bool):
        data = [(x, int(y)) for x, y in data]
    result = train(
        Federation([Client("site", task, data, data)], small_encoder), engine=engine, **QUICK
    )
    assert result.rows[0]["loss"] is not None
