"""Who trains what on which data: what must be the same when a run is resumed or tested."""

from fedgradnorm.identity.differences import (
    of_clients,
    of_data,
    of_encoder,
    of_fixed_tensors,
    of_models,
    of_training,
    same_data,
)
from fedgradnorm.identity.recording import data_record, members_record

__all__ = [
    "data_record",
    "members_record",
    "of_clients",
    "of_data",
    "of_encoder",
    "of_fixed_tensors",
    "of_models",
    "of_training",
    "same_data",
]
