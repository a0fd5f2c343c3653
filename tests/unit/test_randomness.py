from hashlib import blake2b

import numpy as np
import pytest

from fedgradnorm.randomness import quick_generator


def test_uniform_numbers_are_pcg64_seeded_with_the_hash_of_what_they_are_for():
    """As NumPy documents it: the four words are the state's high and low half, and the stream's."""
    words = np.frombuffer(
        blake2b("\0".join(["5", "7", "smile", "head batches"]).encode(), digest_size=32).digest(),
        "<u8",
    ).tolist()
    mask, multiplier = 2**128 - 1, 0x2360ED051FC65DA44385DF649FCCF645
    increment = ((words[2] << 64 | words[3]) << 1 | 1) & mask
    state = (increment + (words[0] << 64 | words[1])) * multiplier + increment & mask
    expected = []
    for _ in range(6):
        state = state * multiplier + increment & mask
        word, turns = (state >> 64) ^ state & 2**64 - 1, state >> 122
        expected.append(((word >> turns | word << 64 - turns) & 2**64 - 1) >> 11)
    assert np.array_equal(
        quick_generator(5, 7, "smile", "head batches").random(6), np.array(expected) / 2**53
    )


@pytest.mark.parametrize(
    "other",
    [
        (6, 7, "smile", "head"),
        (5, 8, "smile", "head"),
        (5, 7, "gender", "head"),
        (5, 7, "smile", "encoder"),
    ],
)
def test_uniform_numbers_differ_with_any_part_of_their_key(other):
    assert not np.intersect1d(
        quick_generator(5, 7, "smile", "head").random(100), quick_generator(*other).random(100)
    ).size
