"""Options that are declared once: the same ranges in a configuration and in Python."""

import gc
import weakref
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Literal

import pytest
from pydantic import Field

from fedgradnorm import ConfigError
from fedgradnorm.options import Options, options_model


@dataclass(frozen=True)
class Mine(Options):
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.25
    steps: Annotated[int, Field(ge=1)] = 1
    limit: Annotated[float, Field(gt=0, le=1e6)] | None = None
    kind: Literal["one", "other"] = "one"
    by_name: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share: expected a number between 0 and 0.5, found 0"),
        ({"share": float("nan")}, "share: expected a finite number between 0 and 0.5, found nan"),
        ({"share": "much"}, "share: expected a valid number"),
        ({"steps": 0}, "steps: expected a number of at least 1, found 0"),
        ({"steps": 1.5}, "steps: expected a valid integer"),
        ({"limit": 1e7}, "limit: expected a number above 0, at most 1e6, found 10000000.0"),
        ({"kind": "third"}, "kind: expected 'one' or 'other', found 'third'"),
        ({"by_name": {"a": -1}}, "by_name.a: expected a number above 0, found -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(options, message):
    with pytest.raises(ConfigError) as caught:
        Mine(**options)
    assert str(caught.value).startswith(message)


def test_it_is_a_plain_frozen_dataclass():
    mine = Mine(share=0.125, steps=2)
    assert is_dataclass(mine)
    assert [option.name for option in fields(mine)] == [
        "share",
        "steps",
        "limit",
        "kind",
        "by_name",
    ]
    assert mine == Mine(0.125, 2)
    with pytest.raises(AttributeError):
        mine.steps = 3
    assert isinstance(Mine(limit=3).limit, float)
    assert Mine().by_name == {}
    assert Mine().by_name is not Mine().by_name


def test_the_model_of_a_part_is_made_once_and_goes_with_it():
    @dataclass(frozen=True)
    class Own(Options):
        power: float = 1.0

    assert options_model(Own) is options_model(Own)
    assert options_model(Own, ("power",)).model_fields == {}
    gone = weakref.ref(Own)
    del Own
    gc.collect()
    assert gone() is None


def test_a_class_of_the_same_name_has_its_own_model():
    """As in a module that is loaded anew."""
    made = []
    for default in (1.0, 2.0):

        @dataclass(frozen=True)
        class Own(Options):
            power: float = default

        made.append(Own)
    assert [options_model(own).model_fields["power"].default for own in made] == [1.0, 2.0]
