"""Who takes part in a round."""

import math

from fedgradnorm.config import TrainConfig
from fedgradnorm.members import Members
from fedgradnorm.randomness import generator

__all__ = ["participants", "round_half_up"]


def participants(federation: Members, training: TrainConfig, round: int) -> list[str]:
    """The ids of a round's participants, sorted.

    They are those listed in the settings, or a share of all clients, at least one, drawn without
    replacement.
    """
    if training.participants:
        named = training.participants[min(round, len(training.participants)) - 1]
        return sorted({federation.client(id).id for id in named})
    ids = sorted(federation.client_ids)
    count = max(1, round_half_up(training.fraction_train * len(ids)))
    if count == len(ids):
        return ids
    random = generator(training.seed, round, "", "participants")
    return sorted(random.choice(ids, size=count, replace=False).tolist())


def round_half_up(number: float) -> int:
    """The nearest whole number, halves upwards."""
    return math.floor(number + 0.5)
