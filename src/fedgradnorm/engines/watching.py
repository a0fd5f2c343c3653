"""The Python values that models and losses read: whether a shortcut that was right is right still.

A program, and every other shortcut that stands for calls of a user's code, keeps what that code
read when it was tried: an attribute, a global, the state of a generator. `Watch` remembers all
places that the code can read, and says whether one has another value.
"""

from collections.abc import Iterable

from torch import nn

from fedgradnorm.engines.walking import CannotTell, Walk

__all__ = ["CannotTell", "Watch"]


class Watch:
    """The values that some modules and functions read, as they are when the watch begins.

    Args:
        models: modules, whose parameters and buffers do not count.
        functions: what else is called.

    Raises:
        CannotTell: there is something whose value cannot be seen, or there are too many places.
    """

    def __init__(self, models: Iterable[nn.Module], functions: Iterable[object]) -> None:
        self._places = list(Walk(models, functions).places())
        self._seen = [place.look() for place in self._places]
        self._copies = [place.copy() for place in self._places]

    def changed(self) -> str | None:
        """The first place that has another value now, in words; None where there is none."""
        for place, seen in zip(self._places, self._seen, strict=True):
            if place.look() != seen:
                return place.name
        return None

    def put_back(self) -> None:
        """Set the places to the values that they had, as far as Python can."""
        for place, seen, copy in zip(self._places, self._seen, self._copies, strict=True):
            if place.look() != seen:
                place.set(copy)
