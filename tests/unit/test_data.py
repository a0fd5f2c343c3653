import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgradnorm.data import Dataset, batch_order, load, num_passes, size, take


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


def test_sources():
    tensors = (torch.zeros(2, 1), torch.zeros(2))
    assert load(tensors) is tensors
    assert load(lambda: tensors) is tensors
    assert isinstance(load(Squares()), Squares)
    assert size(Squares()) == 7
    assert torch.equal(take(Squares(), np.array([2, 5]))[1], torch.tensor([4, 25]))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_batches_go_through_all_examples_before_one_comes_again(num_examples, batch_size, num_batches, seed):
    numbers = np.random.default_rng(seed).random((2, num_passes(num_examples, batch_size, num_batches), num_examples))
    drawn, other = batch_order(numbers, batch_size, num_batches)
    assert np.array_equal(other, batch_order(numbers[1], batch_size, num_batches))
    assert drawn.shape == (num_batches, min(batch_size, num_examples))
    seen = drawn.reshape(-1)
    for start in range(0, len(seen), num_examples):
        one_pass = seen[start : start + num_examples]
        assert len(np.unique(one_pass)) == len(one_pass)
