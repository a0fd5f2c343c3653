"""A run is resumed, and its models are tested, with what it began with; and one process at a time writes to its folder."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional

from fedgradnorm import (
    Client,
    Federation,
    FederationError,
    Metric,
    RunError,
    StoppedError,
    Task,
    evaluate_run,
    load_model,
    resume,
    train,
)
from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.runs.reader import Run
from tests.helpers import accuracy, small_encoder
from tests.launcher import PATIENCE, launcher
from tests.runs import QUICK as WORDS
from tests.runs import after, contents, lines

QUICK = {"num_rounds": 4, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}
ACCURACY = Metric("accuracy", accuracy, higher_is_better=True)


def data(seed, examples=40):
    inputs = torch.randn(examples, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long()


def task(name="sign", classes=2, metric=ACCURACY):
    return Task(name, partial(nn.Linear, out_features=classes), functional.cross_entropy, (metric,))


def federation(encoder=small_encoder, **changes):
    """Two clients; ``changes`` are those of the first one."""
    one = Client("a", task(), data(1), data(2, 20))
    return Federation(
        [replace(one, **changes), Client("b", task("other"), data(3), data(4, 20))], encoder
    )


class Lines(torch.utils.data.Dataset):
    def __init__(self, pair):
        self.pair = pair

    def __len__(self):
        return len(self.pair[0])

    def __getitem__(self, index):
        return self.pair[0][index], self.pair[1][index]


class Drawing(Lines):
    """Augments with a generator of its own, so that no two looks are the same."""

    generator = torch.Generator()

    def __getitem__(self, index):
        return self.pair[0][index] + 0.01 * torch.randn(6, generator=self.generator), self.pair[1][
            index
        ]


class Projected(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.projection = nn.Parameter(torch.full((6, 8), scale), requires_grad=False)
        self.linear = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.linear(inputs @ self.projection)


def stopped(folder, made, **settings):
    with pytest.raises(StoppedError):
        train(made, run_dir=folder, should_stop=after(2), **QUICK, **settings)
    return folder


OTHERS = {
    "fewer examples": ({"train": data(1, 30)}, "client 'a' has 30 training examples, and had 40"),
    "other examples": ({"train": data(9)}, "client 'a' has other training data of the same size"),
    "other order": (
        {"train": tuple(part.flip(0) for part in data(1))},
        "client 'a' has other training data of the same size",
    ),
    "other targets": (
        {"train": (data(1)[0], 1 - data(1)[1])},
        "client 'a' has other training data of the same size",
    ),
    "other test data": ({"test": data(9, 20)}, "client 'a' has other test data of the same size"),
    "more test data": ({"test": data(2, 30)}, "client 'a' has 30 test examples, and had 20"),
    "no test data": ({"test": None}, "client 'a' has no test data"),
    "another task": ({"task": task("third")}, "client 'a' has task 'third', and had 'sign'"),
    "another metric": (
        {"task": task(metric=Metric("error", accuracy, False))},
        "client 'a' has the main metric 'error', and had 'accuracy'",
    ),
    "another head": (
        {"task": task(classes=5)},
        r"client 'a' has another head: \('weight', \(5, 4\)\), was \('weight', \(2, 4\)\)",
    ),
    "another id": ({"id": "c"}, "it belongs to other clients: '[ac]' is in one of the two alone"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that was stopped."""
    return stopped(tmp_path_factory.mktemp("begun") / "run", federation(), engine="reference")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    train(federation(), run_dir=folder, engine="reference", **QUICK)
    return folder


@pytest.mark.parametrize("what", OTHERS)
def test_with_other_clients_tasks_heads_or_data_no_run_is_resumed(begun, what):
    changes, message = OTHERS[what]
    before = contents(begun)
    with pytest.raises(RunError, match=message):
        resume(begun, federation(**changes))
    assert contents(begun) == before


def test_with_the_same_ones_it_is(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    assert resume(tmp_path / "run", federation()).state.round == 4


@pytest.mark.parametrize("kind", [Lines, Drawing])
def test_data_sets_are_looked_at_too_unless_they_draw_anew_every_time(tmp_path, kind):
    folder = stopped(tmp_path / "run", federation(train=kind(data(1))), engine="reference")
    if kind is Lines:
        with pytest.raises(RunError, match="client 'a' has other training data of the same size"):
            resume(folder, federation(train=Lines(data(9))))
    with pytest.raises(RunError, match="client 'a' has 30 training examples, and had 40"):
        resume(folder, federation(train=kind(data(1, 30))))
    resume(folder, federation(train=kind(data(1))))


def test_data_that_differ_by_rounding_are_the_same(tmp_path):
    """Another machine computes them so."""
    folder = stopped(tmp_path / "run", federation())
    inputs, targets = data(1)
    resume(folder, federation(train=(inputs * (1 + 1e-6), targets)))


def test_an_encoder_that_is_frozen_elsewhere_is_noticed(tmp_path):
    folder = stopped(tmp_path / "run", federation(lambda: Projected(0.5)))
    with pytest.raises(
        RunError,
        match="the encoder's 'projection', which is not trained, has other values than when the run began",
    ):
        resume(folder, federation(lambda: Projected(0.6)))
    resume(folder, federation(lambda: Projected(0.5)))


@pytest.mark.parametrize("what", OTHERS)
def test_models_are_tested_on_the_test_data_that_the_run_had(ended, what):
    changes, message = OTHERS[what]
    other = federation(**changes)
    if "training" in message:
        assert evaluate_run(ended, other).keys() == {"a", "b"}, (
            "training data do not matter to a test"
        )
        return
    with pytest.raises(RunError, match=message):
        evaluate_run(ended, other)


def test_a_model_is_loaded_without_the_data_and_only_into_its_own_head(ended):

    def gone():
        raise OSError("the data are elsewhere")

    elsewhere = Federation(
        [Client("a", task(), gone, gone), Client("b", task("other"), gone, gone)],
        small_encoder,
        example=torch.zeros(1, 6),
    )
    assert isinstance(load_model(ended, "a", elsewhere), nn.Module)
    with pytest.raises(RunError, match="client 'a' has another head"):
        load_model(ended, "a", federation(task=task(classes=5)))


@pytest.mark.parametrize("ids", [("site", "Site"), ("a-1", "A-1")])
def test_ids_that_differ_by_case_alone_are_refused(ids):
    with pytest.raises(
        FederationError, match=f"the ids '{ids[0]}' and '{ids[1]}' differ by case only"
    ):
        Federation([Client(id, task(), data(1)) for id in ids], small_encoder)


def smoothed(outputs, targets):
    return functional.cross_entropy(outputs, targets, label_smoothing=0.3)


def normalised(momentum):
    return lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Tanh())


def scaled(column, first=0):
    """Data of which one column is far larger than the others."""
    inputs, targets = data(1)
    inputs[:, column] = 1e6
    inputs[:, :first] *= -1
    return inputs, targets


def with_loss(loss):
    return replace(task(), loss=loss)


class Scaled(nn.Module):
    """A user's own layer, whose parameters do not tell what it does."""

    def __init__(self, factor):
        super().__init__()
        self.linear, self.factor = nn.Linear(6, 4), factor

    def forward(self, inputs):
        return self.factor * self.linear(inputs)


SAME_SHAPES = {
    "norm layer": (
        {},
        {"norm_layer": "0"},
        "norm_layer: the federation has 0.weight, 0.bias, and had 2.weight, 2.bias",
    ),
    "buffers": (
        {},
        {"buffers": "averaged"},
        "buffers: the federation has 'averaged', and had 'local'",
    ),
    "loss floor": (
        {},
        {"task": replace(task(), loss_floor=-1.0)},
        "client 'a' has the loss_floor -1, and had 0",
    ),
    "smoothing": (
        {},
        {"task": with_loss(smoothed)},
        "client 'a' has another loss: for the same outputs and targets it is",
    ),
    "class weights": (
        {"task": with_loss(nn.CrossEntropyLoss(torch.tensor([1.0, 1.0])))},
        {"task": with_loss(nn.CrossEntropyLoss(torch.tensor([1.0, 9.0])))},
        "client 'a' has another loss",
    ),
    "activation": (
        {},
        {"encoder": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())},
        "'Tanh' as its module 2",
    ),
    "dropout": (
        {},
        {"encoder": lambda: nn.Sequential(*small_encoder(), nn.Dropout())},
        "has 'Dropout' as its module 5, and had none",
    ),
    "momentum": (
        {"encoder": normalised(0.1)},
        {"encoder": normalised(0.5)},
        "the encoder is another one: in evaluation mode",
    ),
    "own layer": (
        {"encoder": lambda: Scaled(1.0)},
        {"encoder": lambda: Scaled(2.0)},
        "the encoder is another one: in training mode",
    ),
    "labels of large inputs": (
        {"train": (1e5 * data(1)[0], data(1)[1])},
        {"train": (1e5 * data(1)[0], 1 - data(1)[1])},
        "client 'a' has other training data of the same size: the targets differ",
    ),
    "labels beside the sample": (
        {},
        {"train": (data(1)[0], torch.where(torch.arange(40) == 2, 1 - data(1)[1], data(1)[1]))},
        "client 'a' has other training data of the same size: the targets differ",
    ),
    "columns beside a large one": (
        {"train": scaled(5)},
        {"train": scaled(5, 1)},
        "the inputs differ",
    ),
}


def made(encoder=small_encoder, norm_layer=None, buffers="local", **changes):
    return replace(federation(encoder, **changes), norm_layer=norm_layer, buffers=buffers)


@pytest.mark.parametrize("what", SAME_SHAPES)
def test_what_shapes_do_not_tell_is_noticed_too(tmp_path, what):
    before, after, message = SAME_SHAPES[what]
    folder = stopped(tmp_path / "run", made(**before), engine="reference")
    with pytest.raises(RunError, match=message):
        resume(folder, made(**after))
    if message.startswith(("the encoder", "client 'a' has another")):
        with pytest.raises(RunError, match=message):
            evaluate_run(folder, made(**after))
    resume(folder, made(**before))


def test_a_model_that_begins_from_other_numbers_goes_on_with_its_own(tmp_path):

    def from_others():
        encoder = small_encoder()
        nn.init.constant_(encoder[0].bias, 0.25)
        return encoder

    folder = stopped(tmp_path / "run", federation())
    assert resume(folder, federation(from_others)).state.round == 4


# ------------------------------------------------------------------------------------------------ one process


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("fedgradnorm.runs.lock.LOCK_TIMEOUT", 0.1)


def held_by_another(folder):
    """The lock of a run's folder, as another process has it."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


@pytest.mark.usefixtures("impatient")
def test_a_folder_that_another_run_is_writing_to_is_left_alone(tmp_path):
    folder = stopped(tmp_path / "run", federation())
    before = contents(folder)
    with held_by_another(folder):
        with pytest.raises(RunError, match="another run is writing to it: wait for it, or stop it"):
            resume(folder, federation())
        with pytest.raises(RunError, match="another run is writing to it"):
            train(federation(), run_dir=folder, overwrite=True, **QUICK)
    assert contents(folder) == before
    assert resume(folder, federation()).state.round == 4


@pytest.mark.parametrize("how", ["resume", "overwrite", "link", "relative"])
def test_a_run_that_is_begun_in_on_round_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    path = {"link": tmp_path / "link", "relative": "run"}.get(how, tmp_path / "run")

    def again(rows):
        if rows[0]["round"] == 2:
            with pytest.raises(RunError, match="a run of this program is writing to it"):
                if how == "overwrite":
                    train(federation(), run_dir=path, overwrite=True, **QUICK)
                else:
                    resume(path, federation(), num_rounds=6)

    train(federation(), run_dir=tmp_path / "run", on_round=again, **QUICK)
    assert [row["round"] for row in Run(tmp_path / "run").rows()] == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.usefixtures("impatient")
def test_a_link_does_not_lead_round_the_lock(tmp_path):
    folder = stopped(tmp_path / "run", federation())
    (tmp_path / "link").symlink_to(folder)
    with held_by_another(folder), pytest.raises(RunError, match="another run is writing to it"):
        resume(tmp_path / "link", federation())


@pytest.mark.parametrize(("inside", "path"), [(".", "."), ("models", "..")])
def test_a_run_is_resumed_from_inside_its_folder(tmp_path, monkeypatch, inside, path):
    folder = stopped(tmp_path / "run", federation())
    monkeypatch.chdir(folder / inside)
    assert resume(path, federation()).state.round == 4
    assert Run(folder).config.run.dir == str(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".run.lock", "run"]


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a folder in which no file can be made"
)
def test_a_folder_that_cannot_be_written_is_not_said_to_be_in_use():
    with pytest.raises(RunError, match="run folder '/proc/run': cannot be written"):
        train(federation(), run_dir="/proc/run", **QUICK)


def test_a_run_waits_a_little_for_the_one_before_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("fedgradnorm.runs.lock.LOCK_TIMEOUT", PATIENCE)
    folder = stopped(tmp_path / "run", federation())
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), thread_local=False)
    lock.acquire()
    timer = threading.Timer(0.5, lock.release)
    timer.start()
    assert resume(folder, federation()).state.round == 4
    timer.join()


def test_a_command_is_refused_while_another_one_runs_and_its_lines_are_its_own(tmp_path):
    config = tmp_path / "long.toml"
    config.write_text(
        '[federation]\nname = "digits"\n[train]\nnum_rounds = 100000\n[run]\npage = false\ntensorboard = false\n'
    )
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "fedgradnorm", "run", config, f"run.dir={folder}"],
        stdout=subprocess.DEVNULL,
    ) as first:
        try:
            while first.poll() is None and not lines(folder):
                time.sleep(0.01)
            first.send_signal(signal.SIGSTOP)  # it has the folder, whether it computes or not
            code, _, error = launcher().call(tmp_path, "resume", folder)
        finally:
            first.kill()
    assert code == 2
    assert "another run is writing to it: wait for it, or stop it" in error
    rounds = [
        json.loads(line)["round"]
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        if line.endswith("}\n")
    ]
    assert rounds == sorted(rounds)
    assert all(rounds.count(round) <= 4 for round in set(rounds))


def test_seconds_and_costs_are_sums_over_all_starts(tmp_path):
    settings = load_config(None, [*WORDS, f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(StoppedError) as caught:
        run(settings, should_stop=after(4))
    before = caught.value.result.summary
    after_all = resume(tmp_path / "run").summary
    assert after_all["seconds"] > before["seconds"] > 0
    assert all(after_all["costs"][part] >= seconds for part, seconds in before["costs"].items())
    assert sum(after_all["costs"].values()) <= after_all["seconds"]
    assert Run(tmp_path / "run").summary() == after_all
