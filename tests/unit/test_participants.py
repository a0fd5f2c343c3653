"""Who takes part in a round."""

import pytest

from fedgradnorm import Equal, FederationError
from fedgradnorm.config import TrainConfig
from fedgradnorm.participants import participants
from fedgradnorm.server import initial_state, instruct
from tests.helpers import small_federation

TRAINING = TrainConfig(head_steps=2, encoder_steps=3, encoder_lr=0.1, server_lr=0.5, batch_size=8)


def test_everyone_takes_part_by_default_in_sorted_order():
    federation = small_federation(("c", "a", "b"))
    assert participants(federation, TRAINING, 1) == ["a", "b", "c"]
    assert [
        instruction.client
        for instruction in instruct(initial_state(federation, Equal(), 0), federation, TRAINING)
    ] == ["a", "b", "c"]


def test_a_share_is_drawn_anew_each_round_from_the_seed():
    federation = small_federation("abcdefghij")
    training = TRAINING.model_copy(update={"fraction_train": 0.3})
    drawn = [participants(federation, training, round) for round in range(1, 21)]
    assert {len(ids) for ids in drawn} == {3}
    assert len({tuple(ids) for ids in drawn}) > 10
    assert set().union(*drawn) == set("abcdefghij")
    assert drawn == [
        participants(small_federation("jihgfedcba"), training, round) for round in range(1, 21)
    ]
    assert drawn != [
        participants(federation, training.model_copy(update={"seed": 1}), round)
        for round in range(1, 21)
    ]
    assert (
        len(participants(federation, training.model_copy(update={"fraction_train": 0.01}), 1)) == 1
    )


def test_participants_may_be_listed_by_round_and_the_last_list_holds():
    training = TRAINING.model_copy(update={"participants": (("b", "a"), ("c",))})
    federation = small_federation()
    assert [participants(federation, training, round) for round in (1, 2, 3, 9)] == [
        ["a", "b"],
        ["c"],
        ["c"],
        ["c"],
    ]
    with pytest.raises(FederationError, match="'d'"):
        participants(federation, training.model_copy(update={"participants": (("d",),)}), 1)
