"""How a method is drawn: one colour, dash and marker by its name, in every page and figure."""

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The Okabe-Ito palette for colour-blind readers, without yellow, which is faint on white."""

DASHES = ((), (8, 4), (2, 3), (9, 3, 2, 3))
"""Lengths of strokes and gaps in pixels. An empty tuple is a solid line."""

MARKERS = {
    "circle": "M12.5 6a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M13 2h8v8h-8z",
    "diamond": "M17 0.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "triangle-up": "M17 1l5 9h-10z",
    "triangle-down": "M17 11l5 -9h-10z",
}
"""By Plotly's name of a marker, its outline around (17, 6), as an SVG path."""

KNOWN = (
    *("equal", "fedgradnorm step", "fedgradnorm exact", "nash_mtl", "dwa", "local", "fedper"),
    *("mgda", "rlw", "qffl", "gls", "cagrad", "uncertainty", "examples"),
    *("afl", "pcgrad", "imtl_g", "fedmgda_plus", "fedhca2", "fedprox", "centralized"),
    *("fixed", "fedavg", "fedgradnorm exact norm", "centralized GradNorm"),
    *("equal unit length", "exact unit length", "fedgradnorm exact by task"),
)
"""The methods that always look the same. Each seven have the seven colours and share a dash."""

PLACES = {name: place for place, name in enumerate(KNOWN)} | {
    "fedgradnorm": KNOWN.index("fedgradnorm step")
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        name: the method.
        colour: such as ``#0072B2``.
        dash: see `DASHES`.
        marker: one of `MARKERS`.
    """

    name: str
    colour: str
    dash: tuple[int, ...]
    marker: str

    @property
    def outline(self) -> str:
        """The marker's outline around (17, 6), as an SVG path."""
        return MARKERS[self.marker]


def looks_for(names: Sequence[str], *, colours_only: bool = False) -> list[Look]:
    """The looks of these methods. An unknown method gets the first look that is free.

    Args:
        names: the methods.
        colours_only: tell the methods apart by colour alone. Seven methods can be; of two known
            ones with the same colour, the second gets another.

    >>> [look.colour for look in looks_for(["my own", "fedgradnorm", "equal"])]
    ['#D55E00', '#0072B2', '#000000']
    """
    places = len(COLOURS) * (1 if colours_only else len(DASHES) * len(MARKERS))
    taken: dict[int, int] = {}
    for at, name in enumerate(names):
        if name in PLACES:
            taken.setdefault(PLACES[name] % places, at)
    free = (place for place in range(places) if place not in taken)
    known = {at: place for place, at in taken.items()}
    return [
        _look(name, known[at] if at in known else next(free, at % places))
        for at, name in enumerate(names)
    ]


def _look(name: str, place: int) -> Look:
    row, column = divmod(place, len(COLOURS))
    return Look(name, COLOURS[column], DASHES[row % len(DASHES)], list(MARKERS)[row % len(MARKERS)])
