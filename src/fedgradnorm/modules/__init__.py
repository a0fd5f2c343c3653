"""The modules that users' factories give: copied, compared, and saved with all their tensors."""

from fedgradnorm.modules.comparing import GENERATORS, kind_of, makeup_of, slots_of
from fedgradnorm.modules.copying import Source, duplicate, follow
from fedgradnorm.modules.tensors import (
    have_memory_in_common,
    held_tensors,
    is_lazy,
    load_held,
    materialise,
    overlaps_itself,
    reads_tensors_of,
    shared_memory,
)

__all__ = [
    "GENERATORS",
    "Source",
    "duplicate",
    "follow",
    "have_memory_in_common",
    "held_tensors",
    "is_lazy",
    "kind_of",
    "load_held",
    "makeup_of",
    "materialise",
    "overlaps_itself",
    "reads_tensors_of",
    "shared_memory",
    "slots_of",
]
