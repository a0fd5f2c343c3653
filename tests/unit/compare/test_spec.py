import pytest

from fedgradnorm import ConfigError
from fedgradnorm.compare.grid import final_cells, points_of, tuning_cells
from fedgradnorm.compare.spec import load_study
from fedgradnorm.compare.study import compare
from tests.unit.compare.studies import TINY, loaded, written

METHODS = TINY[TINY.index("[[methods]]") :]


def cells_of(study, point=()):
    return final_cells(study, {(v.name, m.name): point for v in study.variants for m in study.methods})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('question = "Which is faster?"', "sedes = [1]", "unknown key 'sedes'; did you mean 'seeds'?"),
        ("num_rounds = 3\n", "rounds = 3\n", "unknown key 'tuning.rounds'; did you mean 'num_rounds'?"),
        ("seeds = [7]", "seeds = [2, 7]", "expected tuning.seeds that are not among seeds, but 2 is in both"),
        ("seeds = [0, 1, 2]", "seeds = [0, 1, 1]", "expected seeds without repetition"),
        ("seeds = [0, 1, 2]", "seeds = []", r"seeds: expected at least 1 in it, found \[\]"),
        ("axes = [{keys", "axes = [{keyz", r"unknown key 'tuning.axes.0.keyz'; did you mean 'keys'\?"),
        ("axes = [", "axes = [] #", r"tuning.axes: expected at least 1 in it, found \[\]"),
        ('question = "Which is faster?"', 'baseline = "eqaul"', "there is no method 'eqaul'; did you mean 'equal'?"),
        ('question = "Which is faster?"', 'single = "local"', "expected single to name a method, but there is no method 'local'"),
        ('name = "FedGradNorm"', 'name = "equal"', "expected methods with different names, found 'equal' twice"),
        ('weighting.name = "equal"', 'weigthing.name = "equal"', "there is no table 'weigthing'; did you mean 'weighting'?"),
        ('weighting.name = "equal"', "train.encoder_lr = 1.0", "'equal' to leave train.encoder_lr alone, which is tuned"),
        ('weighting.name = "equal"', "train.seed = 1", "'equal' to leave train.seed alone, which the comparison sets"),
        ("values = [0.05, 0.1]", "values = [0.1, 0.05]", "expected values in ascending order"),
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
        ('weighting.name = "fedgradnorm"', 'weighting.name = "fedgradnrom"', "methods 'FedGradNorm': .*did you mean 'fedgradnorm'"),
        (
            'weighting.name = "fedgradnorm"',
            'weighting = {name = "fedgradnorm", gama = 1}',
            "unknown key 'weighting.gama'; did you mean 'gamma'",
        ),
        ('weighting.name = "fedgradnorm"', "train.head_step = 3", "unknown key 'train.head_step'; did you mean 'head_steps'"),
        ('"train.head_lr"]', '"train.heads_lr"]', "unknown key 'train.heads_lr'; did you mean 'head_lr'"),
        ('tasks = ["class", "parity"]', 'tasks = ["class", "partiy"]', "there is no task 'partiy'; did you mean 'parity'"),
    ],
)
def test_a_methods_settings_are_checked_before_anything_is_written(tmp_path, old, new, message):
    study = loaded(tmp_path, TINY.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        compare(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_are_every_method_variant_and_seed_with_the_same_grid(tmp_path):
    study = loaded(tmp_path, TINY + '[[variants]]\nname = "all"\n[[variants]]\nname = "few"\nfederation.sizes.class = 0.1\n')
    tuning, final = tuning_cells(study), cells_of(study, (0.1,))
    assert points_of(study) == [(0.05,), (0.1,)]
    assert len(tuning) == 2 * 2 * 2
    assert len(final) == 2 * 2 * 3
    assert len({cell.name for cell in tuning + final}) == len(tuning + final)
    for cell in tuning:
        train = cell.config.train
        assert (train.num_rounds, train.seed, train.encoder_lr, train.head_lr) == (3, 7, *cell.point, *cell.point)
    for cell in final:
        assert cell.config.train.num_rounds == 4
        assert cell.config.weighting.name == {"equal": "equal", "FedGradNorm": "fedgradnorm"}[cell.method]
        assert cell.config.federation.options["sizes"] == ("equal" if cell.variant == "all" else {"class": 0.1})


def test_a_cells_name_tells_its_settings_apart_and_nothing_else(tmp_path):
    study = loaded(tmp_path)
    names = [cell.name for cell in cells_of(study, (0.1,))]
    assert [cell.name for cell in cells_of(loaded(tmp_path, TINY, "run.loss_targets=[0.5]", "title=Other"), (0.1,))] == names
    for word in ("train.batch_size=9", "federation.test_fraction=0.3", "engine.name=reference", "faults.drop=0.1"):
        assert not set(names) & {cell.name for cell in cells_of(loaded(tmp_path, TINY, word), (0.1,))}


def test_words_and_the_table_full_change_the_study_or_the_base(tmp_path):
    path = written(tmp_path, TINY + '[full]\nseeds = [0, 1, 2, 3]\ntrain.num_rounds = 9\nfederation.name = "radcom"\n')
    small, large = load_study(path), load_study(path, full=True)
    assert (len(small.seeds), small.base["train"]["num_rounds"], small.base["federation"]["name"]) == (3, 4, "digits")
    assert (len(large.seeds), large.base["train"]["num_rounds"], large.base["train"]["batch_size"]) == (4, 9, 8)
    assert large.base["federation"] == {"name": "radcom"}, "options of another federation are dropped"
    worded = load_study(path, ["seeds=[5]", "train.num_rounds=2", "tuning.num_rounds=1"], full=True)
    assert (worded.seeds, worded.base["train"]["num_rounds"], worded.tuning.num_rounds) == ((5,), 2, 1)
    with pytest.raises(ConfigError, match=r"there is no table \[full\]"):
        load_study(written(tmp_path), full=True)


def test_a_study_begins_with_a_runs_file_beside_it(tmp_path):
    (tmp_path / "run.toml").write_text('[federation]\nname = "digits"\n[train]\nbatch_size = 5\nhead_steps = 3\n[run]\ndir = "elsewhere"\n')
    study = loaded(tmp_path, 'title = "t"\nconfig = "run.toml"\nseeds = [0]\nbase = {train = {batch_size = 6}}\n' + METHODS)
    cell = cells_of(study)[0]
    assert (cell.config.train.batch_size, cell.config.train.head_steps, cell.config.run.dir) == (6, 3, None)
    with pytest.raises(ConfigError, match="absent.toml: expected a readable TOML file"):
        loaded(tmp_path, 'title = "t"\nconfig = "absent.toml"\nseeds = [0]\n' + METHODS)
