"""The engine `flower-local` gives what `reference` gives, bit for bit."""

import pytest
import torch
from torch import nn

from fedgradnorm import ConfigError, FederationError, StoppedError, train
from fedgradnorm.api import resume, run
from fedgradnorm.config import load_config
from fedgradnorm.flower import FlowerLocalEngine
from fedgradnorm.runs.reader import Run
from tests.helpers import small_encoder, small_federation, timeless
from tests.runs import QUICK as SMALL
from tests.runs import after, contents, outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore::fedgradnorm.FedGradNormWarning"
)  # of clients that are lost here on purpose

RADCOM = [
    "federation.name=radcom",
    "federation.snapshots=6",
    "train.head_steps=3",
    "train.encoder_steps=3",
    "train.eval_every=2",
]
DIGITS = [
    "federation.name=digits",
    "train.head_steps=3",
    "train.encoder_steps=3",
    "train.eval_every=2",
]
SETTINGS = {
    "digits": DIGITS,
    "radcom": RADCOM,
    "partial": [*SMALL, "train.fraction_train=0.34"],
    "momentum": [*SMALL, "train.head_momentum=0.9", "train.server_momentum=0.5"],
    "local buffers": [*SMALL, "federation.encoder='batch norm'", "train.fraction_train=0.67"],
    "averaged buffers": [
        *SMALL,
        "federation.encoder='batch norm'",
        "federation.buffers=averaged",
        "train.server_optimizer=adam",
    ],
    "dropout": [*SMALL, "federation.encoder=dropout"],
    "faults": [
        *SMALL,
        "faults.drop=0.2",
        "faults.delay=0.2",
        "faults.nan=0.1",
        "faults.corrupt=0.2",
    ],
    "repeated rounds": [
        *SMALL,
        "train.min_clients=3",
        "train.max_retries=50",
        "faults.drop=0.3",
        "faults.nan=0.1",
        "train.head_momentum=0.5",
    ],
    "repeated partial rounds": [
        *SMALL,
        "train.fraction_train=0.67",
        "train.min_clients=2",
        "train.max_retries=50",
        "faults.drop=0.4",
    ],
    "participants": [*SMALL, "train.participants=[['a'], ['b', 'c'], ['a', 'c']]"],
    "by task": [*SMALL, "weighting.group_by=task", "aggregation.name=median"],
}


def done(*words):
    return run(load_config(None, list(words)))


def plain(result):
    """What a run has come to, heads and all, as values that compare."""
    states = {}
    for id, state in result.client_states.items():
        parts = (state.head, state.encoder_buffers, state.head_velocity)
        states[id] = (
            state.initial_loss,
            state.round,
            [{name: value.tolist() for name, value in part.items()} for part in parts],
        )
    return result.state.encoder.tolist(), result.state.weighting, states, timeless(result.rows)


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_it_is_the_reference_bit_for_bit(words, tmp_path):
    results, names = [], []
    for engine in ("reference", "flower-local"):
        folder = tmp_path / engine
        results.append(
            plain(done(*words, f"run.dir={folder}", "train.num_rounds=5", f"engine.name={engine}"))
        )
        names.append(sorted(path.name for path in (folder / "models").rglob("*.safetensors")))
    assert results[0] == results[1]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.fraction_train=0.34"],
        ["train.min_clients=3", "train.max_retries=50", "faults.drop=0.3"],
    ],
)
@pytest.mark.parametrize("back", [0, 2])
def test_resumed_is_uninterrupted(words, back, tmp_path):
    words = [
        *SMALL,
        "engine.name=flower-local",
        "federation.encoder='batch norm'",
        "train.head_momentum=0.9",
        *words,
    ]
    done(*words, f"run.dir={tmp_path / 'whole'}")
    with pytest.raises(StoppedError, match="to resume: fedgradnorm resume"):
        run(load_config(None, [*words, f"run.dir={tmp_path / 'run'}"]), should_stop=after(5))
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[3 - back :]:
        path.unlink()
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_federation_given_in_python():
    federation = small_federation()
    one, other = (
        train(federation, engine=engine, num_rounds=2, batch_size=8)
        for engine in ("reference", "flower-local")
    )
    assert plain(one) == plain(other)


def test_its_run_folder_is_that_of_any_run(tmp_path):
    done(*SMALL, "engine.name=flower-local", f"run.dir={tmp_path / 'run'}", "train.num_rounds=2")
    found = Run(tmp_path / "run")
    assert found.config.run.experiment is None
    assert found.summary()["rounds"] == 2
    assert len(list((tmp_path / "run" / "models" / "heads").iterdir())) == 3


@pytest.mark.parametrize("threads", [0, -1, 2000])
def test_threads_out_of_range_are_refused(threads):
    with pytest.raises(ConfigError, match="threads: expected a number from 1 to 1024"):
        FlowerLocalEngine(small_federation(), 0, threads)


def test_a_method_in_lockstep_is_refused_before_a_run_is_replaced(tmp_path):
    done(*SMALL, f"run.dir={tmp_path / 'run'}")
    before = contents(tmp_path / "run")
    words = [
        *SMALL,
        "engine.name=flower-local",
        "train.method=centralized",
        f"run.dir={tmp_path / 'run'}",
    ]
    with pytest.raises(
        ConfigError,
        match="train.method: centralized keeps all clients in lockstep",
    ):
        run(load_config(None, words), overwrite=True)
    assert contents(tmp_path / "run") == before


class Half(nn.Module):
    """An encoder whose parameters are of a type that NumPy does not have."""

    def __init__(self):
        super().__init__()
        self.inner = small_encoder().bfloat16()

    def forward(self, inputs):
        return self.inner(inputs.bfloat16()).float()


class Counting(nn.Module):
    """An encoder with such a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = small_encoder()
        self.register_buffer("count", torch.zeros(1, dtype=torch.bfloat16))

    def forward(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize("encoder", [Half, Counting])
def test_numbers_that_no_message_can_hold_are_refused_at_once(encoder, tmp_path):
    federation = small_federation(encoder=encoder, buffers="averaged")
    with pytest.raises(
        FederationError,
        match="encoder: expected numbers of a type that a message can hold.*bfloat16",
    ):
        train(federation, engine="flower-local", num_rounds=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_name_of_an_experiment_is_refused_where_clients_are_here(tmp_path):
    with pytest.raises(
        ConfigError, match="run.experiment: the clients of 'x' are on other machines"
    ):
        done(*SMALL, "run.experiment=x", f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
