import pytest

from fedgradnorm import ConfigError
from fedgradnorm.compare.grid import final_cells, points_of, tuning_cells
from fedgradnorm.compare.spec import load_study
from fedgradnorm.compare.study import compare
from tests.unit.compare.studies import TINY, loaded, written

METHODS = TINY[TINY.index("[[methods]]") :]


def cells_of(study, point=()):
    return final_cells(
        study, {(v.name, m.name): point for v in study.variants for m in study.methods}
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'question = "Which is faster?"',
            "sedes = [1]",
            "unknown key 'sedes'; did you mean 'seeds'?",
        ),
        (
            "num_rounds = 3\n",
            "rounds = 3\n",
            "unknown key 'tuning.rounds'; did you mean 'num_rounds'?",
        ),
        (
            "seeds = [7]",
            "seeds = [2, 7]",
            "expected tuning.seeds that are not among seeds, but 2 is in both",
        ),
        ("seeds = [0, 1, 2]", "seeds = [0, 1, 1]", "expected seeds without repetition"),
        ("seeds = [0, 1, 2]", "seeds = []", r"seeds: expected at least 1 in it, found \[\]"),
        (
            "axes = [{keys",
            "axes = [{keyz",
            r"unknown key 'tuning.axes.0.keyz'; did you mean 'keys'\?",
        ),
        ("axes = [", "axes = [] #", r"tuning.axes: expected at least 1 in it, found \[\]"),
        (
            'question = "Which is faster?"',
            'baseline = "eqaul"',
            "there is no method 'eqaul'; did you mean 'equal'?",
        ),
        (
            'question = "Which is faster?"',
            'single = "local"',
            "^expected single to name a method, but there is no method 'local'[^{]*$",
        ),
        (
            'name = "FedGradNorm"',
            'name = "equal"',
            "expected methods with different names, found 'equal' twice",
        ),
        (
            'weighting.name = "equal"',
            'weigthing.name = "equal"',
            "there is no table 'weigthing'; did you mean 'weighting'?",
        ),
        (
            'weighting.name = "equal"',
            "train.encoder_lr = 1.0",
            "'equal' to leave train.encoder_lr alone, which is tuned",
        ),
        (
            'weighting.name = "equal"',
            "train.seed = 1",
            "'equal' to leave train.seed alone, which the comparison sets",
        ),
        ("values = [0.05, 0.1]", "values = [0.1, 0.05]", "expected values in ascending order"),
        (
            "values = [0.05, 0.1]",
            'values = [0.1], not_for = ["eqaul"]',
            "there is no method 'eqaul'; did you mean 'equal'",
        ),
    ],
)
def test_a_mistake_is_named_with_what_is_near(tmp_path, old, new, message):
    text = TINY.replace(old, new, 1)
    assert text != TINY
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'weighting.name = "fedgradnorm"',
            'weighting.name = "fedgradnrom"',
            "methods 'FedGradNorm': .*did you mean 'fedgradnorm'",
        ),
        (
            'weighting.name = "fedgradnorm"',
            'weighting = {name = "fedgradnorm", gama = 1}',
            "unknown key 'weighting.gama'; did you mean 'gamma'",
        ),
        (
            'weighting.name = "fedgradnorm"',
            "train.head_step = 3",
            "unknown key 'train.head_step'; did you mean 'head_steps'",
        ),
        (
            '"train.head_lr"]',
            '"train.heads_lr"]',
            "unknown key 'train.heads_lr'; did you mean 'head_lr'",
        ),
        (
            'tasks = ["class", "parity"]',
            'tasks = ["class", "partiy"]',
            "there is no task 'partiy'; did you mean 'parity'",
        ),
    ],
)
def test_a_methods_settings_are_checked_before_anything_is_written(tmp_path, old, new, message):
    study = loaded(tmp_path, TINY.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        compare(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_are_every_method_variant_and_seed_with_the_same_grid(tmp_path):
    study = loaded(
        tmp_path,
        TINY
        + '[[variants]]\nname = "all"\n[[variants]]\nname = "few"\nfederation.sizes.class = 0.1\n',
    )
    tuning, final = tuning_cells(study), cells_of(study, (0.1,))
    assert points_of(study) == [(0.05,), (0.1,)]
    assert len(tuning) == 2 * 2 * 2
    assert len(final) == 2 * 2 * 3
    assert len({cell.name for cell in tuning + final}) == len(tuning + final)
    for cell in tuning:
        train = cell.config.train
        assert (train.num_rounds, train.seed, train.encoder_lr, train.head_lr) == (
            3,
            7,
            *cell.point,
            *cell.point,
        )
    for cell in final:
        assert cell.config.train.num_rounds == 4
        assert (
            cell.config.weighting.name
            == {"equal": "equal", "FedGradNorm": "fedgradnorm"}[cell.method]
        )
        assert cell.config.federation.options["sizes"] == (
            "equal" if cell.variant == "all" else {"class": 0.1}
        )


def test_a_cells_name_tells_its_settings_apart_and_nothing_else(tmp_path):
    study = loaded(tmp_path)
    names = [cell.name for cell in cells_of(study, (0.1,))]
    assert [
        cell.name
        for cell in cells_of(
            loaded(tmp_path, TINY, "run.loss_targets=[0.5]", "title=Other"), (0.1,)
        )
    ] == names
    for word in (
        "train.batch_size=9",
        "federation.test_fraction=0.3",
        "engine.name=vectorized",
        "faults.drop=0.1",
    ):
        assert not set(names) & {
            cell.name for cell in cells_of(loaded(tmp_path, TINY, word), (0.1,))
        }


def test_words_and_the_table_full_change_the_study_or_the_base(tmp_path):
    path = written(
        tmp_path,
        TINY + '[full]\nseeds = [0, 1, 2, 3]\ntrain.num_rounds = 9\nfederation.name = "radcom"\n',
    )
    small, large = load_study(path), load_study(path, full=True)
    assert (
        len(small.seeds),
        small.base["train"]["num_rounds"],
        small.base["federation"]["name"],
    ) == (3, 4, "digits")
    assert (
        len(large.seeds),
        large.base["train"]["num_rounds"],
        large.base["train"]["batch_size"],
    ) == (4, 9, 8)
    assert large.base["federation"] == {"name": "radcom"}, (
        "options of another federation are dropped"
    )
    worded = load_study(path, ["seeds=[5]", "train.num_rounds=2", "tuning.num_rounds=1"], full=True)
    assert (worded.seeds, worded.base["train"]["num_rounds"], worded.tuning.num_rounds) == (
        (5,),
        2,
        1,
    )
    with pytest.raises(ConfigError, match=r"there is no table \[full\]"):
        load_study(written(tmp_path), full=True)


def test_a_study_begins_with_a_runs_file_beside_it(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[federation]\nname = "digits"\n[train]\nbatch_size = 5\nhead_steps = 3\n[run]\ndir = "elsewhere"\n'
    )
    study = loaded(
        tmp_path,
        'title = "t"\nconfig = "run.toml"\nseeds = [0]\nbase = {train = {batch_size = 6}}\n'
        + METHODS,
    )
    cell = cells_of(study)[0]
    assert (cell.config.train.batch_size, cell.config.train.head_steps, cell.config.run.dir) == (
        6,
        3,
        None,
    )
    with pytest.raises(ConfigError, match="absent.toml: expected a readable TOML file"):
        loaded(tmp_path, 'title = "t"\nconfig = "absent.toml"\nseeds = [0]\n' + METHODS)


SHARED = """
title = "t"
seeds = [0]
methods_file = "shared.toml"
"""


def shared(folder, text, *words):
    (folder / "shared.toml").write_text(METHODS)
    return loaded(folder, SHARED + text, *words)


def test_methods_are_taken_by_name_from_a_file_beside_others(tmp_path):
    assert [method.name for method in shared(tmp_path, "").methods] == ["equal", "FedGradNorm"]
    own = '{ name = "own", weighting = { name = "dwa" } }'
    study = shared(tmp_path, f'methods = ["FedGradNorm", {own}, "equal"]')
    assert [method.name for method in study.methods] == ["FedGradNorm", "own", "equal"]
    assert study.methods[0].options == loaded(tmp_path).methods[1].options
    assert [method.name for method in shared(tmp_path, "", 'methods=["equal"]').methods] == [
        "equal"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'methods = ["eqaul"]',
            "methods: there is no method 'eqaul' in .*shared.toml; did you mean 'equal'",
        ),
        ("methods = 3", "methods: expected"),
        ("methods = [3]", "methods.0: expected"),
    ],
)
def test_a_mistake_in_shared_methods_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        shared(tmp_path, text)


def test_a_file_of_methods_is_there_and_holds_methods(tmp_path):
    with pytest.raises(ConfigError, match="shared.toml: expected a readable TOML file"):
        loaded(tmp_path, SHARED)
    (tmp_path / "shared.toml").write_text('methods = ["equal"]')
    with pytest.raises(
        ConfigError, match=r"methods_file: expected tables \[\[methods\]\], each with a name"
    ):
        loaded(tmp_path, SHARED)
    with pytest.raises(
        ConfigError, match="'equal' names a method of a file, but no methods_file is given"
    ):
        loaded(tmp_path, 'title = "t"\nseeds = [0]\nmethods = ["equal"]')


TWO_AXES = TINY.replace(
    "values = [0.05, 0.1]}",
    'values = [0.05, 0.1]}, {keys = ["train.server_lr"], values = [1, 2], not_for = ["equal"]}',
)


def test_an_axis_that_is_not_for_a_method_leaves_it_the_first_value(tmp_path):
    study = loaded(tmp_path, TWO_AXES)
    points = {
        name: [cell.point for cell in tuning_cells(study) if cell.method == name]
        for name in ("equal", "FedGradNorm")
    }
    assert points["equal"] == points_of(study, "equal") == [(0.05, 1), (0.1, 1)]
    assert points["FedGradNorm"] == points_of(study) == [(0.05, 1), (0.05, 2), (0.1, 1), (0.1, 2)]
    results = compare(study.model_copy(update={"seeds": (0,)}), tmp_path / "out")
    equal, other = results.tuned
    assert [point for point, score in equal.scores.items() if score is None] == [
        (0.05, 2),
        (0.1, 2),
    ]
    assert equal.chosen in points["equal"]
    assert not any("server_lr" in edge for edge in equal.edges)
    assert None not in other.scores.values()
