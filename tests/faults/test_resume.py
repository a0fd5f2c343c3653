"""A run that was stopped and resumed is the run that never stopped."""

import dataclasses
import gc
import json
import signal
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fedgradnorm
from fedgradnorm import ConfigError, FedGradNorm, RunError, StoppedError, train
from fedgradnorm.api import resume, run
from fedgradnorm.config import load_config
from fedgradnorm.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation, timeless
from tests.launcher import launcher, wait_until
from tests.runs import ENCODERS, QUICK, ROUNDS, after, changed, contents, lines, outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore::fedgradnorm.FedGradNormWarning"
)  # whose reports were dropped is no matter here

ALMOST_ALL = ["faults.drop=0.2", "faults.delay=0.2", "faults.nan=0.1", "faults.corrupt=0.2"]
REFERENCE, DEFAULT = "engine.name=reference", "engine.name=vectorized"
"""The first is used for what the server does alone: in a short run most of the default one's time is its start."""
SCREENED = ["train.max_update_ratio=1.1", "train.min_clients=0"]


def settings(folder, *words):
    return load_config(None, [*QUICK, REFERENCE, f"run.dir={folder}", *words])


def stopped(folder, *words, round=4):
    """The folder of a run that was stopped after a round."""
    with pytest.raises(StoppedError):
        run(settings(folder, *words), should_stop=after(round))
    return folder


def checkpoints(folder):
    """The files of the checkpoints, oldest first."""
    return sorted((folder / "checkpoints").iterdir())


def rounds_of(folder):
    """The rounds that are kept."""
    return [load_checkpoint(path).server.round for path in checkpoints(folder)]


def plain(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """A checkpoint as values that compare, less the settings."""
    server = checkpoint.server
    tensors = {
        "encoder": server.encoder,
        **server.buffers,
        **{f"optimizer {key}": value for key, value in server.optimizer.items()},
    }
    clients = {}
    for id, state in checkpoint.clients.items():
        parts = (state.head, state.encoder_buffers, state.head_velocity)
        own = None if state.encoder is None else state.encoder.tolist()
        clients[id] = (
            state.initial_loss,
            own,
            [{key: value.tolist() for key, value in part.items()} for part in parts],
        )
    return (
        server.round,
        {key: value.tolist() for key, value in tensors.items()},
        server.weighting,
        server.norms,
        clients,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run with these words gives when nothing stops it."""
    known = {}

    def whole(*words):
        if words not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            run(settings(folder, *words))
            known[words] = folder
        return known[words]

    return whole


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="step"),
        pytest.param([REFERENCE, "weighting.solver=exact"], id="exact"),
        pytest.param([REFERENCE, "weighting.group_by=task"], id="by task"),
        pytest.param([REFERENCE, "weighting.name=equal"], id="equal weights"),
        pytest.param(["train.fraction_train=0.34"], id="partial"),
        pytest.param(
            [REFERENCE, "train.participants=[['a'], ['b', 'c'], ['a', 'c']]"], id="participants"
        ),
        pytest.param(["federation.encoder='batch norm'"], id="local buffers"),
        pytest.param(
            ["federation.encoder='batch norm'", "federation.buffers=averaged"],
            id="averaged buffers",
        ),
        pytest.param(
            ["federation.encoder='batch norm'", "train.participants=[['a'], ['b']]"],
            id="local buffers, partial",
        ),
        pytest.param(
            [
                "federation.encoder='batch norm'",
                "federation.buffers=averaged",
                "train.fraction_train=0.34",
            ],
            id="averaged buffers, partial",
        ),
        pytest.param(["federation.encoder=dropout"], id="dropout"),
        pytest.param(["train.head_momentum=0.9"], id="head momentum"),
        pytest.param(
            ["train.head_momentum=0.9", "train.fraction_train=0.67"], id="head momentum, partial"
        ),
        pytest.param([REFERENCE, "train.server_momentum=0.5"], id="server momentum"),
        pytest.param([REFERENCE, "train.server_optimizer=adam", "train.server_lr=0.1"], id="adam"),
        pytest.param(["train.loss_estimate=exact"], id="exact loss"),
        pytest.param(
            ["train.method=fedper", "train.head_momentum=0.9"], id="fedper, head momentum"
        ),
        pytest.param(["train.method=fedavg", "train.fraction_train=0.67"], id="fedavg, partial"),
        pytest.param(["train.method.name=fedprox", "train.method.mu=2"], id="fedprox"),
        pytest.param(["train.method=local", "train.head_momentum=0.9"], id="local, head momentum"),
        pytest.param(["train.method=local", "train.fraction_train=0.34"], id="local, partial"),
        pytest.param(
            ["train.method=local", "federation.encoder='batch norm'"], id="local, local buffers"
        ),
        pytest.param(
            [
                "train.method=local",
                "federation.encoder=dropout",
                *ALMOST_ALL,
                "train.min_clients=0",
            ],
            id="local, dropout, faults",
        ),
        pytest.param(
            ["train.method=centralized", "federation.encoder=dropout"], id="centralized, dropout"
        ),
        pytest.param(
            [
                "train.method=centralized",
                "train.server_optimizer=adam",
                "train.server_lr=0.1",
                "federation.encoder='batch norm'",
            ],
            id="centralized, adam, local buffers",
        ),
        pytest.param(
            [
                "train.method=centralized",
                "federation.encoder='batch norm'",
                "federation.buffers=averaged",
            ],
            id="centralized, averaged buffers",
        ),
        pytest.param([REFERENCE, "aggregation.name=median"], id="median"),
        pytest.param([REFERENCE, "aggregation.name=clipped_mean"], id="clipped mean"),
        pytest.param([REFERENCE, *SCREENED], id="max_update_ratio"),
        pytest.param([*ALMOST_ALL, "train.min_clients=0"], id="faults"),
        pytest.param(
            [REFERENCE, *ALMOST_ALL, "train.min_clients=2", "train.max_retries=50"],
            id="faults, retries",
        ),
        pytest.param(
            [REFERENCE, *ALMOST_ALL, "train.min_clients=0", "train.max_update_ratio=3.0"],
            id="faults, max_update_ratio",
        ),
    ],
)
def test_stopped_after_every_round_and_resumed_is_the_same_as_never_stopped(tmp_path, whole, words):
    words = [*(() if REFERENCE in words else (DEFAULT,)), *words, "train.num_rounds=6"]
    expected, folder = whole(*words), tmp_path / "run"
    stopped(folder, *words, round=1)
    for _ in range(6 - 2):
        with pytest.raises(StoppedError):
            resume(folder, should_stop=after(1))
    result = resume(folder, should_stop=after(1))  # after the last round there is nothing to stop
    assert outcome(folder) == outcome(expected)
    assert timeless(result.rows) == timeless(Run(expected).rows())
    assert plain(load_checkpoint(checkpoints(folder)[-1])) == plain(
        load_checkpoint(checkpoints(expected)[-1])
    )


def test_these_settings_do_something(whole):
    plain_run = outcome(whole())
    methods = (
        ["train.method=fedper", "train.head_momentum=0.9"],
        ["train.method.name=fedprox", "train.method.mu=2"],
    )
    for words in (
        *methods,
        ["federation.encoder=dropout"],
        SCREENED,
        [*ALMOST_ALL, "train.min_clients=0"],
    ):
        assert outcome(whole(*words)) != plain_run
    assert any(row["dropped"] for row in Run(whole(*SCREENED)).rows())
    retried = Run(whole(*ALMOST_ALL, "train.min_clients=2", "train.max_retries=50")).rows()
    assert any(row["retries"] for row in retried)


def test_a_stop_finishes_the_round_and_says_how_to_go_on(tmp_path):
    folder, seen = tmp_path / "run", []
    with pytest.raises(StoppedError) as error:
        run(
            settings(folder, "run.checkpoint_every=100"),
            should_stop=after(3),
            on_round=lambda rows: seen.append(rows[0]["round"]),
        )
    assert (
        str(error.value)
        == f"stopped after round 3 of {ROUNDS}; to resume: fedgradnorm resume {folder}"
    )
    assert seen == [1, 2, 3]
    assert rounds_of(folder) == [3]
    assert lines(folder) == 9
    assert not (folder / "summary.json").exists()
    messages = []
    resume(folder, on_round=lambda rows: seen.append(rows[0]["round"]), on_message=messages.append)
    assert seen == list(range(1, ROUNDS + 1))
    assert messages == [
        f"resuming after round 3 of {ROUNDS}, from {messages[0].partition('from ')[2]}"
    ]
    assert "round-00000003-" in messages[0]


def test_a_run_without_a_folder_is_stopped_too():
    with pytest.raises(StoppedError, match=r"^stopped after round 2 of 4$"):
        train(small_federation(), num_rounds=4, should_stop=after(2))


def test_a_round_without_enough_reports_stops_the_run_as_it_was_before(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        StoppedError, match=r"^round 1: 0 sound reports.*to resume: fedgradnorm resume"
    ):
        run(settings(folder, "faults.drop=1.0", "train.max_retries=1"))
    assert rounds_of(folder) == [0]
    assert lines(folder) == 0
    with pytest.raises(StoppedError, match=r"^round 1: 0 sound reports"):
        resume(folder)
    assert {load_checkpoint(path).server.round for path in checkpoints(folder)} == {0}


def test_rounds_can_be_raised_and_a_finished_run_goes_on(tmp_path, whole):
    for folder in (stopped(tmp_path / "stopped", "train.num_rounds=6"), tmp_path / "finished"):
        if not folder.exists():
            run(settings(folder, "train.num_rounds=6"))
        resume(folder, num_rounds=ROUNDS)
        assert outcome(folder) == outcome(whole())
        assert Run(folder).config.train.num_rounds == ROUNDS


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, whole):
    folder = tmp_path / "run"
    run(settings(folder))
    resume(folder)
    assert outcome(folder) == outcome(whole())
    assert rounds_of(folder) == [6, 7, 8]


def test_rounds_that_are_done_are_not_undone(tmp_path):
    folder = stopped(tmp_path / "run")
    before = contents(folder)
    with pytest.raises(
        ConfigError,
        match=r"train.num_rounds: expected at least the 4 rounds that are done, found 3",
    ):
        resume(folder, num_rounds=3)
    assert contents(folder) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def rename(path):
    path.rename(path.with_name("round-00000004-0123456789abcdef.safetensors"))


def empty(path):
    path.write_bytes(b"")


DAMAGE = {
    "cut": cut,
    "a bit at the start": partial(flip, place=0.0),
    "a bit in the middle": flip,
    "a bit at the end": partial(flip, place=1.0),
    "renamed": rename,
    "empty": empty,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, whole, damage):
    folder, messages = stopped(tmp_path / "run"), []
    for path in folder.glob("checkpoints/round-00000004-*"):
        damage(path)
    remaining = list(folder.glob("checkpoints/round-00000004-*"))
    resume(folder, on_message=messages.append)
    *warnings, last = messages
    assert len(warnings) == len(remaining) >= 1
    for path in remaining:
        assert any(
            warning.startswith(f"warning: checkpoint {path}: ")
            and warning.endswith("; it is skipped")
            for warning in warnings
        )
    assert last.startswith(f"resuming after round 3 of {ROUNDS}, from ")
    assert outcome(folder) == outcome(whole())


def test_a_second_checkpoint_of_a_round_takes_the_place_of_the_first(tmp_path):
    folder = stopped(tmp_path / "run", "run.keep=1", REFERENCE)
    (path,) = checkpoints(folder)
    checkpoint = load_checkpoint(path)
    for seconds in range(8):  # the names of the files are in any order
        path = save_checkpoint(
            folder / "checkpoints", dataclasses.replace(checkpoint, seconds=float(seconds)), keep=1
        )
        assert checkpoints(folder) == [path]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_push_out_sound_ones(tmp_path, whole, keep):
    folder, messages = stopped(tmp_path / "run", f"run.keep={keep}"), []
    for path in checkpoints(folder):
        flip(path)
    with pytest.raises(StoppedError):
        resume(folder, should_stop=after(2))
    with pytest.raises(StoppedError):
        resume(folder, should_stop=after(1), on_message=messages.append)
    assert any(message.startswith("resuming after round 2 of") for message in messages), messages
    resume(folder)
    assert outcome(folder) == outcome(whole())


@pytest.mark.parametrize("how", ["none", "all damaged", "no folder"])
def test_without_a_sound_checkpoint_it_starts_over(tmp_path, whole, how):
    folder, messages = stopped(tmp_path / "run"), []
    for path in checkpoints(folder):
        empty(path) if how == "all damaged" else path.unlink()
    if how == "no folder":
        (folder / "checkpoints").rmdir()
    count = len(checkpoints(folder)) if how == "all damaged" else 0
    resume(folder, on_message=messages.append)
    assert len(messages) == count + 1
    assert messages[-1] == f"resuming after round 0 of {ROUNDS}: no checkpoint is there"
    assert outcome(folder) == outcome(whole())


@pytest.mark.parametrize(
    ("every", "keep", "kept"),
    [(1, 1, [8]), (1, 3, [6, 7, 8]), (3, 2, [6, 8]), (3, 10, [3, 6, 8]), (100, 3, [8])],
)
def test_checkpoints_come_every_so_many_rounds_and_the_last_ones_are_kept(
    tmp_path, every, keep, kept
):
    run(settings(tmp_path / "run", f"run.checkpoint_every={every}", f"run.keep={keep}"))
    assert rounds_of(tmp_path / "run") == kept


def test_a_round_takes_one_place_among_those_that_are_kept(tmp_path):
    folder = tmp_path / "run"
    stopped(folder, round=3)  # round 3 is written by itself, and by the stop
    for _ in range(4):
        assert rounds_of(folder) == sorted(set(rounds_of(folder)))
        with pytest.raises(StoppedError):
            resume(folder, should_stop=after(1))


def test_changed_settings_are_refused_and_named_and_nothing_changes(tmp_path):
    folder = stopped(tmp_path / "run")
    path = folder / "config.toml"
    changes = {
        "seed = 0": "seed = 1",
        "gamma = 0.9": "gamma = 0.5",
        'encoder = "plain"': 'encoder = "dropout"',
    }
    text = path.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    before = contents(folder)
    with pytest.raises(ConfigError) as error:
        resume(folder)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(
        "changed: federation.encoder = dropout (was plain), train.seed = 1 (was 0), weighting.gamma = 0.5 (was 0.9)"
    )
    assert "\n" not in message
    assert contents(folder) == before


def test_what_may_change_may_change(tmp_path, whole):
    folder = stopped(tmp_path / "run").rename(tmp_path / "moved")
    path = folder / "config.toml"
    text = (
        path.read_text()
        .replace("keep = 3", "keep = 5")
        .replace("checkpoint_every = 1", "checkpoint_every = 4")
    )
    path.write_text(text)
    resume(folder)
    assert outcome(folder) == outcome(whole())
    assert Run(folder).config.run.dir == str(folder)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_clients_is_refused(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        train(small_federation(), run_dir=folder, num_rounds=4, should_stop=after(2))
    before = contents(folder)
    with pytest.raises(
        RunError, match="it belongs to other clients: 'c' is in one of the two alone"
    ):
        resume(folder, small_federation(("a", "b")))
    assert contents(folder) == before


class Named(nn.Module):
    """Two layers of one shape, which are registered in this order."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)))


def test_an_encoder_whose_layers_changed_places_is_refused(tmp_path):
    with pytest.raises(StoppedError):
        train(
            small_federation(encoder=partial(Named, "first", "second")),
            num_rounds=4,
            run_dir=tmp_path / "run",
            should_stop=after(2),
        )
    before = contents(tmp_path / "run")
    with pytest.raises(
        RunError,
        match=r"in another order, than when the run began: \('second.weight', \(6, 6\)\), was \('first.weight'",
    ):
        resume(tmp_path / "run", small_federation(encoder=partial(Named, "second", "first")))
    assert contents(tmp_path / "run") == before
    assert (
        resume(
            tmp_path / "run", small_federation(encoder=partial(Named, "first", "second"))
        ).state.round
        == 4
    )


def test_figures_after_the_checkpoint_are_cut_and_not_doubled(tmp_path, whole):
    folder = stopped(tmp_path / "run", "run.checkpoint_every=3", round=5)
    next(path for path in checkpoints(folder) if "round-00000005" in path.name).unlink()
    assert lines(folder) == 15
    seen = []
    resume(folder, on_round=lambda _: seen.append(lines(folder)))
    assert seen[0] == 12  # round 4 on the heels of round 3
    assert outcome(folder) == outcome(whole())


@pytest.mark.parametrize(
    "torn",
    [
        b"{",
        b'{"round": 4',
        b'{"round": 4}',
        b"1",
        b"\xff\xfe",
        b"\0" * 100,
        b'{"round": 5, "client": "a"}',
    ],
)
def test_a_torn_last_line_is_cut(tmp_path, whole, torn):
    folder = stopped(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    resume(folder)
    assert outcome(folder) == outcome(whole())


@pytest.mark.parametrize("damage", ["{", "[1]", "{}", '{"round": null}', "\0\0\0", ""])
def test_a_damaged_line_before_is_an_error_that_names_the_line(tmp_path, damage):
    folder = stopped(tmp_path / "run")
    path = folder / "metrics.jsonl"
    text = path.read_text().splitlines()
    text[4] = damage
    path.write_text("\n".join(text) + "\n")
    before = contents(folder)
    with pytest.raises(RunError) as error:
        resume(folder)
    assert str(error.value).startswith(f"{path} line 5: ")
    del error
    gc.collect()  # a file that is left open is a warning, here and not in a later test
    after_it = contents(folder)
    assert after_it.pop(path) == before.pop(path)
    assert after_it.keys() == before.keys()


@pytest.mark.parametrize("left", [0, 5, 9])
def test_figures_that_are_missing_before_the_checkpoint_are_an_error(tmp_path, left):
    folder = stopped(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    with pytest.raises(RunError, match="metrics.jsonl"):
        resume(folder)


def test_figures_that_are_missing_from_a_finished_run_are_an_error(tmp_path):
    run(settings(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="metrics.jsonl"):
        resume(tmp_path / "run")


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="is no run"):
        resume(tmp_path)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_a_run_given_in_python_is_resumed_with_its_federation(tmp_path, encoder):
    federation = small_federation(encoder=encoder)
    options = {
        "weighting": FedGradNorm(gamma=0.5, solver="exact"),
        "num_rounds": 6,
        "head_momentum": 0.5,
        "seed": 3,
    }
    train(federation, run_dir=tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        train(federation, run_dir=tmp_path / "run", should_stop=after(4), **options)
    with pytest.raises(RunError, match="pass it as federation="):
        fedgradnorm.resume(tmp_path / "run")
    fedgradnorm.resume(tmp_path / "run", federation=small_federation(encoder=encoder))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_resuming_leaves_the_global_generators_alone(tmp_path):
    folder = stopped(tmp_path / "run", "federation.encoder=dropout")
    before = torch.get_rng_state()
    resume(folder)
    assert torch.equal(torch.get_rng_state(), before)


LONG = """
federation = { name = "digits" }
[train]
num_rounds = 400
head_steps = 1
encoder_steps = 1
encoder_lr = 0.01
batch_size = 8
loss_examples = 64
[run]
checkpoint_every = 100
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_round_with_a_checkpoint(tmp_path, number):
    config, folder = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(LONG)
    process = launcher().start(tmp_path, "run", config, f"run.dir={folder}")
    assert wait_until(process, lambda: lines(folder) > 10)
    process.signal(number)
    assert process.end() == 1
    (done,) = rounds_of(folder)
    assert lines(folder) == 4 * done
    assert done < 400
    assert (
        process.err.read_text()
        == f"error: stopped after round {done} of 400; to resume: fedgradnorm resume {folder}\n"
    )

    code, out, err = launcher().call(tmp_path, "resume", folder, "--rounds", done + 2)
    assert (code, err) == (0, "")
    assert f"resuming after round {done} of {done + 2}, from {folder}" in out
    run(load_config(config, [f"run.dir={tmp_path / 'whole'}", f"train.num_rounds={done + 2}"]))
    assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_a_second_signal_ends_it_at_once(tmp_path, first, second):
    config, folder = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(LONG)
    process = launcher().start(
        tmp_path, "run", config, f"run.dir={folder}", "train.encoder_steps=1000000"
    )  # its round takes minutes
    assert wait_until(process, folder.exists)
    assert wait_until(process, lambda: lines(folder) == 0 and (folder / "tensorboard").exists())
    process.signal(first)
    noted = process.cpu_time + 0.2  # the first one only asks it to stop, so it computes further
    assert wait_until(process, lambda: process.cpu_time > noted)
    process.signal(second)
    assert process.end() == 128 + second
    assert lines(folder) == 0


def test_a_signal_while_the_models_are_written_lets_it_finish(tmp_path):
    config, folder = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(LONG)
    process = launcher().start(tmp_path, "run", config, f"run.dir={folder}", "train.num_rounds=2")
    assert wait_until(process, folder.exists)
    assert wait_until(process, changed(folder / "models"))
    process.signal(signal.SIGTERM)
    code = process.end()
    assert code in (
        0,
        -signal.SIGTERM,
    )  # it came while the run was ended, or while its report was made
    json.loads((folder / "summary.json").read_text())
