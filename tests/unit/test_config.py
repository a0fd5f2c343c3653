import codecs
import sys

import pytest

from fedgradnorm import ConfigError
from fedgradnorm.build import resolve_training
from fedgradnorm.config import (
    Component,
    MethodConfig,
    RunConfig,
    TrainConfig,
    WeightingConfig,
    load_config,
)
from fedgradnorm.registry import BUILT_INS, build, describe, name_of, resolve, resolved
from fedgradnorm.weighting import FedGradNorm

FILE = """
[federation]
name = "digits"
tasks = ["class", "parity"]

[train]
num_rounds = 7

[weighting]
name = "fedgradnorm"
gamma = 0.5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text(FILE)
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file):
    config = load_config(
        file, ["weighting.gamma=0.9", "train.seed=3", "run.dir=out", "federation.sizes.class=10"]
    )
    assert config.train.num_rounds == 7
    assert config.train.seed == 3
    assert config.train.batch_size == RunConfig().train.batch_size
    assert config.weighting.options == {"gamma": 0.9}
    assert config.federation.options == {"tasks": ["class", "parity"], "sizes": {"class": 10}}
    assert config.run.dir == "out"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("federation.path=../some file.zip", "../some file.zip"),
        ("federation.path='quoted'", "quoted"),
        ("federation.path=", ""),
        ("federation.path=a=b", "a=b"),
        ("federation.path=true", True),
        ("federation.path=[1, 2]", [1, 2]),
    ],
)
def test_a_value_is_toml_or_else_a_plain_string(word, value):
    assert load_config(None, [word]).federation.options == {"path": value}


def test_a_number_may_name_a_folder():
    assert load_config(None, ["run.dir=2026"]).run.dir == "2026"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train.num_round=5"],
            "unknown key 'train.num_round'; did you mean 'num_rounds'? on the command line",
        ),
        (["trian.num_rounds=5"], "unknown key 'trian'; did you mean 'train'?"),
        (
            ["train.num_rounds=0"],
            "train.num_rounds: expected a number of at least 1, found 0 on the command line",
        ),
        (["train.num_rounds=many"], "train.num_rounds: expected a valid integer"),
        (["train.encoder_lr=nan"], "train.encoder_lr: expected"),
        (
            ["train.server_optimizer=rmsprop"],
            "train.server_optimizer: expected 'sgd' or 'adam', found 'rmsprop'",
        ),
        (["train=5"], "train: expected"),
        (["train.num_rounds"], "'train.num_rounds': expected table.key=value"),
        (["train.num_rounds.x=1"], "'train.num_rounds.x=1': 'num_rounds' is a value, not a table"),
        ([".x=1"], "'.x=1': expected table.key=value"),
        (["weighting.gamma=1", "weighting.name=3"], "weighting.name: expected a text, found 3"),
    ],
)
def test_bad_settings_are_named_with_what_was_expected_and_where(file, words, message):
    with pytest.raises(ConfigError) as caught:
        load_config(file, words)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_another_part_starts_from_its_own_defaults(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text(FILE + '[model]\nname = "mlp"\nhidden = [3]\nnorm_layer = "1"\n')
    config = load_config(path, ["weighting.damping=0.1", "weighting.name=equal", "model.name=cnn"])
    assert config.weighting.options == {
        "damping": 0.1
    }  # said on the command line, so it is refused later
    assert (config.model.options, config.model.norm_layer) == ({}, "1")
    assert load_config(path, ["weighting.name=fedgradnorm"]).weighting.options == {"gamma": 0.5}


def test_a_fault_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nnum_rounds = -1\nbatchsize = 3\n")
    with pytest.raises(
        ConfigError, match=r"train.num_rounds: .* found -1 in .*bad.toml \(and 1 more\)"
    ):
        load_config(path)
    path.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"bad.toml: not valid TOML: .*line 1"):
        load_config(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(ConfigError, match="expected a readable TOML file"):
        load_config(tmp_path / "absent.toml")


def test_a_table_without_a_name_keeps_the_default_part():
    assert load_config(None, ["weighting.gamma=0.3"]).weighting == WeightingConfig(
        name="fedgradnorm", gamma=0.3
    )
    assert load_config(None, ["federation.tasks=[]"]).federation.name == "radcom"


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        (
            "weighting",
            Component(name="fedgradnrom"),
            "weighting.name: there is no weighting 'fedgradnrom'; did you mean 'fedgradnorm'?",
        ),
        (
            "weighting",
            Component(name="nowhere:Mine"),
            "weighting.name: 'nowhere:Mine' cannot be imported",
        ),
        ("weighting", Component(name="fedgradnorm.weighting.equal:Mine"), "cannot be imported"),
        (
            "weighting",
            Component(name="fedgradnorm", gama=1),
            "unknown key 'weighting.gama'; did you mean 'gamma'?",
        ),
        (
            "weighting",
            Component(name="fedgradnorm", gamma=-1),
            "weighting.gamma: expected a number from 0 to 10, found -1",
        ),
        (
            "weighting",
            Component(name="fedgradnorm", gamma="high"),
            "weighting.gamma: expected a valid number",
        ),
        (
            "weighting",
            Component(name="fedgradnorm", solver="newton"),
            "weighting.solver: expected 'step' or 'exact', found 'newton'",
        ),
        (
            "engine",
            Component(name="vectorized", memory_limit="3XB"),
            "engine.memory_limit: expected a number of bytes, or a text such as '2GB'",
        ),
        (
            "engine",
            Component(name="vectorized", memory_limit=-3),
            "engine.memory_limit: expected a number of bytes, or a text such as '2GB'",
        ),
        ("federation", Component(name="digits", tasks="class"), "federation.tasks: expected"),
        (
            "federation",
            Component(name="digits", tasks=["clas"]),
            "federation.tasks: there is no task 'clas'; did you mean 'class'?",
        ),
        (
            "federation",
            Component(name="digits", sizes={"clas": 3}),
            "federation.sizes.clas: no such client or task",
        ),
        (
            "federation",
            Component(name="digits", sizes="huge"),
            "federation.sizes: expected 'equal', 'dirichlet'",
        ),
        ("federation", Component(name="digits", seed=3), "unknown key 'federation.seed'"),
        (
            "method",
            Component(name="fedpre"),
            "train.method.name: there is no method 'fedpre'; did you mean 'fedrep'?",
        ),
        (
            "method",
            Component(name="fedprox", mue=1),
            "unknown key 'train.method.mue'; did you mean 'mu'?",
        ),
        (
            "method",
            Component(name="fedprox", mu=-1),
            "train.method.mu: expected a number from 0 to 1e6, found -1",
        ),
        (
            "method",
            Component(name="tests.helpers:small_encoder"),
            "train.method.name: 'tests.helpers:small_encoder' makes an object of type Sequential, not a valid method: "
            "derive it from fedgradnorm.training.Method",
        ),
    ],
)
def test_a_part_with_bad_options_is_refused(kind, part, message):
    given = {"seed": 0} if kind == "federation" else {}
    with pytest.raises(ConfigError) as caught:
        build(kind, part, **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in BUILT_INS.items() for name in names]
)
def test_every_built_in_resolves_and_describes_itself(kind, name):
    assert callable(resolve(kind, name))
    summary, _ = describe(kind, name)
    assert len(summary) > 10


def test_a_users_own_part_is_found_by_module_and_attribute():
    with pytest.raises(
        ConfigError,
        match=r"federation.name: 'tests.helpers:small_federation' cannot be made: .*seed",
    ):
        build("federation", Component(name="tests.helpers:small_federation"), seed=0)
    assert build(
        "weighting", Component(name="fedgradnorm.weighting.fedgradnorm:FedGradNorm", gamma=2)
    ) == FedGradNorm(gamma=2)
    assert name_of("weighting", FedGradNorm) == "fedgradnorm"
    assert name_of("weighting", Component) == "fedgradnorm.config:Component"


def test_resolved_fills_in_the_defaults():
    assert (
        resolved("weighting", Component(name="fedgradnorm", gamma=2)).options["weight_steps"]
        == FedGradNorm().weight_steps
    )


def test_a_method_is_a_name_or_a_table(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nmethod = "fedper"\n')
    assert load_config(path).train.method.name == "fedper"
    assert load_config(path, ["train.method=local"]).train.method.name == "local"
    path.write_text('[train.method]\nname = "fedprox"\nmu = 0.5\n')
    assert load_config(path).train.method == MethodConfig(name="fedprox", mu=0.5)
    assert load_config(path, ["train.method.mu=2"]).train.method == MethodConfig(
        name="fedprox", mu=2
    )
    assert load_config(path, ["train.method.name=fedprox"]).train.method == MethodConfig(
        name="fedprox", mu=0.5
    )
    assert load_config(path, ["train.method.name=fedper"]).train.method == MethodConfig(
        name="fedper"
    )
    assert load_config(path, ["train.method=fedper"]).train.method == MethodConfig(name="fedper")
    assert TrainConfig(method="fedper") == TrainConfig(method={"name": "fedper"})
    assert TrainConfig().method.name == "fedrep"
    assert resolve_training(TrainConfig(method="fedprox")).method.options == {"mu": 0.1}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "train.method=5",
            'train.method: expected a name, such as "fedrep", or a table with a name and options, found 5',
        ),
        ("weighting=5", "weighting: expected a table with a name and options, found 5"),
        ("train=5", "train: expected a table, found 5"),
        ("train.participants=[5]", "train.participants.0: expected a list, found 5"),
        (
            "train.participants=[[]]",
            r"train.participants: expected at least one client id in every list, found \[\[\]\]",
        ),
        ("federation.name=5", "federation.name: expected a text, found 5"),
    ],
)
def test_wrong_kinds_are_named_in_the_words_of_a_configuration(word, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [word])


@pytest.mark.parametrize(
    "content",
    [
        FILE.encode("utf-16-le"),
        FILE.encode("utf-16-be"),
        FILE.encode("utf-32"),
        FILE.encode("utf-32-be"),
        2 * codecs.BOM_UTF8 + FILE.encode(),
        "# ü".encode("latin-1"),
    ],
)
def test_another_encoding_is_named(file, content):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="some.toml: not valid TOML: its encoding is not UTF-8"):
        load_config(file)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("def make(:", r"cannot be imported: SyntaxError: .*line 1\)"),
        (
            "1 / 0",
            r"cannot be imported: ZeroDivisionError: division by zero \(own_part.py, line 1\)",
        ),
        (
            "import sys\nsys.exit('stop')",
            r"cannot be imported: SystemExit: stop \(own_part.py, line 2\)",
        ),
        (
            "def make(seed):\n    {}['key']",
            r"cannot be made: KeyError: 'key' \(own_part.py, line 2\)",
        ),
        (
            "def make(seed):\n    raise SystemExit('stop')",
            r"cannot be made: SystemExit: stop \(own_part.py, line 2\)",
        ),
    ],
)
def test_whatever_a_users_module_raises_names_it(tmp_path, monkeypatch, module, message):
    (tmp_path / "own_part.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_part", raising=False)
    with pytest.raises(ConfigError, match=f"federation.name: 'own_part:make' {message}"):
        build("federation", Component(name="own_part:make"), seed=0)
    sys.modules.pop("own_part", None)


def test_the_file_keeps_its_options_when_the_default_part_is_named_on_the_command_line(tmp_path):
    (tmp_path / "a.toml").write_text("[weighting]\ngamma = 0.5\n")
    assert load_config(tmp_path / "a.toml", ["weighting.name=fedgradnorm"]).weighting.options == {
        "gamma": 0.5
    }
    assert load_config(tmp_path / "a.toml", ["weighting.name=equal"]).weighting.options == {}
