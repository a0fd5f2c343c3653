"""Golden values, worked out by hand."""

import pytest
import torch

from fedgradnorm import Weights
from fedgradnorm.aggregation import ClippedMean, Mean, Median, TrimmedMean
from fedgradnorm.aggregation.base import weighted_gradients
from tests.helpers import report


def round_of(*clients, scale=1.0):
    """Reports a, b, c, … and their weights, of (weight, gradient) pairs."""
    some = [
        report(id, 1.0, gradient=torch.tensor(gradient))
        for id, (_, gradient) in zip("abcdefghij", clients, strict=False)
    ]
    return some, Weights(
        {one.client: weight for one, (weight, _) in zip(some, clients, strict=True)}, scale=scale
    )


def equally(*values, scale=1.0):
    return round_of(*((1.0, [value]) for value in values), scale=scale)


def test_weighted_gradients_have_the_weighted_mean_as_their_mean():
    u = weighted_gradients(
        *round_of((1.0, [4.0, 0.0]), (3.0, [0.0, 4.0]), scale=2.0)
    )  # Σp = 4, n = 2: factors 2·1·2/4 and 2·3·2/4
    torch.testing.assert_close(u, torch.tensor([[4.0, 0.0], [0.0, 12.0]]))
    torch.testing.assert_close(
        Mean()(*round_of((1.0, [4.0, 0.0]), (3.0, [0.0, 4.0]), scale=2.0)), torch.tensor([2.0, 6.0])
    )


@pytest.mark.parametrize(
    ("method", "round", "direction"),
    [
        # (0.5·1 + 2.5·3) / 3 and (0.5·0 + 2.5·6) / 3
        (Mean(), round_of((0.5, [1.0, 0.0]), (2.5, [3.0, 6.0])), [8 / 3, 5.0]),
        (Mean(), equally(1.0, 2.0, 9.0, scale=0.5), [2.0]),
        # norms 5, 1, 1: M = 1, so the first becomes 3·(3, 4)/5
        (
            ClippedMean(clip=3.0),
            round_of((1.0, [3.0, 4.0]), (1.0, [1.0, 0.0]), (1.0, [0.0, 1.0])),
            [2.8 / 3, 3.4 / 3],
        ),
        # norms 2, 3, 5: nobody is longer than 9, and it is the mean
        (ClippedMean(clip=3.0), equally(2.0, -3.0, 5.0), [4 / 3]),
        # u = 1.5·(4), 0.75·(4), 0.75·(-100) = 6, 3, -75: M = 6, so -75 becomes -6
        (ClippedMean(clip=1.0), round_of((2.0, [4.0]), (1.0, [4.0]), (1.0, [-100.0])), [1.0]),
        # u = 2·(1, 3, 50) = 2, 6, 100: M = 6, so 100 becomes 18
        (ClippedMean(clip=3.0), equally(1.0, 3.0, 50.0, scale=2.0), [26 / 3]),
        (Median(), equally(7.0, -1.0, 3.0), [3.0]),
        (Median(), equally(7.0, -1.0, 3.0, 4.0), [3.5]),
        (Median(), equally(7.0, 2.0), [4.5]),
        # u = 0.5·8, 0.5·2, 2·3 = 4, 1, 6 and 0.5·-2, 0.5·2, 2·1 = -1, 1, 2
        (Median(), round_of((1.0, [8.0, -2.0]), (1.0, [2.0, 2.0]), (4.0, [3.0, 1.0])), [4.0, 1.0]),
        (Median(), equally(1.0, 2.0, 9.0, scale=0.5), [1.0]),
        # one or two clients: nothing is cut; three and four: one at either end
        (TrimmedMean(), equally(5.0), [5.0]),
        (TrimmedMean(), equally(5.0, 8.0), [6.5]),
        (TrimmedMean(), equally(5.0, 900.0, 8.0), [8.0]),
        (TrimmedMean(), equally(5.0, 900.0, 8.0, 6.0), [7.0]),
        # five: 0.2·5 = 1 at either end; six: 1.2, rounded up, 2
        (TrimmedMean(), equally(5.0, 900.0, 8.0, 6.0, 10.0), [8.0]),
        (TrimmedMean(), equally(5.0, 900.0, 8.0, 6.0, 10.0, 700.0), [9.0]),
        (TrimmedMean(trim=0.1), equally(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 999.0), [4.5]),
        # trim 0.4 of five is 2: the median
        (TrimmedMean(trim=0.4), equally(5.0, 900.0, 8.0, 6.0, 10.0), [8.0]),
        # u = 0.5·8, 0.5·2, 2·3 = 4, 1, 6, and each coordinate is cut by itself: -1, 1, 2
        (
            TrimmedMean(),
            round_of((1.0, [8.0, -2.0]), (1.0, [2.0, 2.0]), (4.0, [3.0, 1.0])),
            [4.0, 1.0],
        ),
    ],
)
def test_golden_values(method, round, direction):
    torch.testing.assert_close(method(*round), torch.tensor(direction))


def test_a_share_that_is_a_whole_number_of_clients_cuts_so_many():
    """0.07 · 100 is a little above 7 in binary: that must not make it 8."""
    values = [float(index**2) for index in range(100)]
    some = [
        report(f"c{index:03}", 1.0, gradient=torch.tensor([value]))
        for index, value in enumerate(values)
    ]
    direction = TrimmedMean(trim=0.07)(
        some, Weights(dict.fromkeys((one.client for one in some), 1.0))
    )
    torch.testing.assert_close(direction, torch.tensor([sum(values[7:93]) / 86]))


def test_in_the_clipped_mean_the_median_of_two_norms_is_the_lower_one():
    """Otherwise one of two clients could move it as far as it likes."""
    torch.testing.assert_close(ClippedMean(clip=3.0)(*equally(1.0, 1000.0)), torch.tensor([2.0]))
