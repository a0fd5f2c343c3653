"""The studies that ship: sound, fair, and each runs from end to end at a tiny size."""

import csv
from pathlib import Path

import pytest

from fedgradnorm.compare.page import write_page
from fedgradnorm.compare.spec import load_study
from fedgradnorm.compare.study import compare
from fedgradnorm.compare.tables import write_tables

STUDIES = Path(__file__).parents[2] / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.toml") if path.stem != "methods")
REAL_DATA = {"mtfl", "radcom-hdf5"}
WHOLE_FIELD = {"radcom", "radcom-hdf5", "mtfl"}
OTHERS = {
    "imbalance",
    "imbalance-digits",
    "loss-scale",
    "many-clients",
    "options",
    "options-digits",
    "participation",
}
WITHOUT_A_SHARED_ENCODER = {"local", "centralized", "centralized GradNorm"}
FIELD = {
    *(
        "equal",
        "fedgradnorm step",
        "fedgradnorm exact",
        "dwa",
        "uncertainty",
        "gls",
        "rlw",
        "qffl",
        "afl",
        "pcgrad",
        "cagrad",
        "mgda",
    ),
    *(
        "fedmgda_plus",
        "nash_mtl",
        "imtl_g",
        "fedhca2",
        "fedper",
        "fedprox",
        *WITHOUT_A_SHARED_ENCODER,
    ),
    *("fedgradnorm exact norm", "equal unit length", "exact unit length"),
}
TINY = (
    "engine.name='reference'",
    "seeds=[0]",
    "train.num_rounds=2",
    "train.eval_every=2",
    "train.head_steps=1",
    "train.encoder_steps=1",
)
TUNING = (
    "tuning.seeds=[100]",
    "tuning.num_rounds=1",
    "tuning.axes=[{keys=['train.encoder_lr'],values=[0.05]}]",
)
SMALL = {
    **dict.fromkeys(("options-digits", "imbalance-digits"), "seeds=[0]"),
    "many-clients": "federation.clients_per_task=2",
    "participation": "federation.clients_per_task=3",
}
"""In place of a few snapshots."""
VARIANT = {"participation": 1}
"""Which variant, in place of the last: in two rounds with a fifth of the clients some task has none."""


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_fair(name, full):
    study = load_study(STUDIES / f"{name}.toml", full=full)
    assert len(study.seeds) >= 6
    assert study.tuning is not None
    assert len(study.tuning.seeds) >= 2
    assert not set(study.seeds) & set(study.tuning.seeds)
    assert {"equal", "fedgradnorm step", "fedgradnorm exact"} <= {
        method.name for method in study.methods
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_length_of_the_servers_step_is_tuned_where_there_is_one(name):
    study = load_study(STUDIES / f"{name}.toml")
    clients, server = study.axes
    assert set(clients.keys) == {"train.encoder_lr", "train.head_lr"}
    assert server.keys == ("train.server_lr",)
    assert server.values[0] == 1
    assert set(server.not_for) == WITHOUT_A_SHARED_ENCODER & {
        method.name for method in study.methods
    }
    assert not clients.not_for


@pytest.mark.parametrize("name", sorted(WHOLE_FIELD))
def test_the_main_studies_have_the_whole_field(name):
    study = load_study(STUDIES / f"{name}.toml")
    assert {method.name for method in study.methods} >= FIELD
    assert study.single == "local"


def test_there_are_all_the_studies():
    assert set(NAMES) == WHOLE_FIELD | OTHERS


@pytest.mark.parametrize("name", sorted(set(NAMES) - REAL_DATA))
def test_a_tiny_version_runs_from_end_to_end(name, tmp_path):
    study = load_study(
        STUDIES / f"{name}.toml", [*TINY, *TUNING, SMALL.get(name, "federation.snapshots=5")]
    )
    variant = study.variants[VARIANT.get(name, -1)]
    study = study.model_copy(
        update={"variants": (variant,), "tuning": study.tuning if name == "options" else None}
    )
    results = compare(study, tmp_path)
    assert {one.ended.state for one in results.cells} == {"trained"}, [
        one.ended.reason for one in results.cells
    ]
    write_tables(results, tmp_path)
    assert study.title in write_page(results, tmp_path / "index.html").read_text()
    with (tmp_path / "results.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {
            method.name for method in study.methods
        }
