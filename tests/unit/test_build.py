"""From settings to a federation and its parts."""

import pytest

from fedgradnorm import ConfigError, Federation, FederationError
from fedgradnorm.build import build_federation
from fedgradnorm.config import Component, load_config
from fedgradnorm.registry import build
from tests.helpers import small_federation


def test_the_model_table_replaces_encoder_norm_layer_and_buffers():
    words = [
        "federation.name=digits",
        "model.name=mlp",
        "model.hidden=[12, 6]",
        "model.norm_layer=1",
        "model.buffers=averaged",
    ]
    federation = build_federation(load_config(None, words))
    assert federation.num_features == 6
    assert (federation.norm_layer, federation.buffers) == ("1", "averaged")
    with pytest.raises(ConfigError, match="'model.hiden'.*'hidden'"):
        build_federation(
            load_config(None, ["federation.name=digits", "model.name=mlp", "model.hiden=[3]"])
        )
    with pytest.raises(ConfigError, match="model.hidden: "):
        build_federation(
            load_config(None, ["federation.name=digits", "model.name=mlp", "model.hidden=[0]"])
        )
    with pytest.raises(FederationError, match="norm_layer 'fc'"):
        build_federation(load_config(None, ["federation.name=digits", "model.norm_layer=fc"]))


def test_options_of_the_default_model_are_refused():
    with pytest.raises(ConfigError, match="model.hidden: .*model.name="):
        build_federation(load_config(None, ["federation.name=digits", "model.hidden=[3]"]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("weighting", ":x"),
        ("weighting", "..a:b"),
        ("weighting", "os:path"),
        ("weighting", "math:pi"),
        ("weighting", "os:getcwd"),
        ("weighting", "builtins:object"),
        ("engine", "fedgradnorm.federations.digits:make"),
        ("federation", "builtins:dict"),
    ],
)
def test_a_name_that_makes_no_such_part_is_refused(kind, name):
    given = {
        "federation": {"seed": 0},
        "model": {"input_shape": (3,)},
        "engine": {"federation": small_federation(), "seed": 0},
    }.get(kind, {})
    with pytest.raises(ConfigError, match=rf"{kind}\.name: '{name}'|unknown key"):
        build(kind, Component(name=name), **given)


def test_a_federation_without_a_model_table_is_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(Federation, "__post_init__", lambda self: checked.append(self))
    federation = build_federation(load_config(None, ["federation.name=digits"]))
    assert checked == [federation]
