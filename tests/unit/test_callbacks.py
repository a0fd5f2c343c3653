import json
import sys

import pytest

from fedgradnorm import Callback, ConfigError, EarlyStopping, TensorBoard, resume, train
from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.runs.checkpoint import load_checkpoint
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation, timeless

QUICK = {"num_rounds": 4, "head_steps": 1, "encoder_steps": 1, "batch_size": 8, "eval_every": 2}


class Noted(Callback):
    """Notes what it is called with."""

    def __init__(self):
        self.calls = []

    def on_start(self, session):
        self.calls.append(("start", session.round, session.num_rounds))

    def on_round(self, session):
        assert {row["round"] for row in session.rows} == {session.round}
        assert [row["client"] for row in session.rows] == session.federation.client_ids
        self.calls.append(("round", session.round, len(session.history)))

    def on_checkpoint(self, session):
        checkpoint = load_checkpoint(session.checkpoint)
        assert checkpoint.server.round == session.round
        self.calls.append(("checkpoint", session.round))

    def on_end(self, session):
        self.calls.append(("end", session.round, session.error))


def test_callbacks_are_called_in_order(tmp_path):
    noted = Noted()
    settings = {"dir": tmp_path / "run", "checkpoint_every": 2}
    train(small_federation(), callbacks=[noted], run=settings, **QUICK)
    assert noted.calls == [
        ("start", 0, 4),
        ("round", 1, 3),
        ("checkpoint", 2),
        ("round", 2, 6),
        ("round", 3, 9),
        ("checkpoint", 4),
        ("round", 4, 12),
        ("end", 4, None),
    ]


def test_a_resumed_run_tells_its_callbacks_where_it_continues(tmp_path):
    train(small_federation(), run={"dir": tmp_path / "run", "keep": 1}, **QUICK)
    noted = Noted()
    resume(tmp_path / "run", small_federation(), num_rounds=5, callbacks=[noted])
    assert noted.calls[0] == ("start", 4, 5)
    assert noted.calls[-1] == ("end", 5, None)


@pytest.mark.parametrize("hook", ["on_start", "on_round", "on_checkpoint", "on_end"])
def test_an_error_of_a_callback_has_the_result_and_leaves_a_checkpoint(tmp_path, hook):
    class Failing(Callback):
        pass

    def fail(_, session):
        if hook in ("on_start", "on_end") or session.round == 2:
            raise KeyError("mine")

    setattr(Failing, hook, fail)
    noted = Noted()
    settings = {"dir": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(KeyError, match="mine") as caught:
        train(small_federation(), callbacks=[noted, Failing()], run=settings, **QUICK)
    rounds = {"on_start": 0, "on_round": 2, "on_checkpoint": 2, "on_end": 4}[hook]
    result = caught.value.result
    assert (result.summary["rounds"] if result else 0) == rounds
    assert [call for call in noted.calls if call[0] == "end"][-1][:2] == ("end", rounds)
    whole = train(small_federation(), **QUICK)
    resumed = resume(tmp_path / "run", small_federation())
    assert json.dumps(timeless(resumed.rows)) == json.dumps(timeless(whole.rows))


def test_every_callback_is_ended_whatever_another_one_raises():
    class Failing(Callback):
        def on_end(self, session):
            raise KeyError("mine")

    noted = Noted()
    with pytest.raises(KeyError, match="mine"):
        train(small_federation(), callbacks=[Failing(), noted], **QUICK)
    assert noted.calls[-1] == ("end", 4, None)


def test_a_stopped_run_ends_as_a_finished_one_and_can_be_resumed(tmp_path):
    class Stops(Callback):
        def on_round(self, session):
            if session.round == 3:
                session.stop("enough")

    folder = tmp_path / "run"
    result = train(small_federation(), callbacks=[Stops()], run_dir=folder, **QUICK)
    assert result.stopped == "enough"
    assert result.summary["rounds"] == Run(folder).summary()["rounds"] == 3
    assert "3 of 4 rounds" in repr(result)
    whole = train(small_federation(), **QUICK)
    resumed = resume(folder, small_federation())
    assert resumed.stopped is None
    assert json.dumps(timeless(resumed.rows)) == json.dumps(timeless(whole.rows))


def test_early_stopping_ends_a_run_whose_losses_do_not_fall():
    tiny = {**QUICK, "num_rounds": 30, "head_lr": 1e-30, "encoder_lr": 1e-30}
    exact = {"loss_estimate": "exact"}
    stopping = EarlyStopping(patience=4)
    result = train(small_federation(), callbacks=[stopping], **tiny, **exact)
    assert result.summary["rounds"] < 30
    assert "no task has improved for 4 rounds" in result.stopped
    learns = train(small_federation(), callbacks=[EarlyStopping(patience=4)], **QUICK)
    assert learns.stopped is None


def test_early_stopping_by_a_metric_follows_its_direction():
    stopping = EarlyStopping(patience=3, figure="metric")
    settings = {**QUICK, "num_rounds": 60, "eval_every": 1, "head_lr": 0.1, "encoder_lr": 0.1}
    result = train(small_federation(), callbacks=[stopping], **settings)
    means = {}
    for row in result.rows:
        means.setdefault(row["round"], []).append(row["metric"])
    curve = [sum(values) / len(values) for values in means.values()]
    assert result.stopped is not None
    best = curve.index(max(curve))  # the first round with the highest accuracy
    assert len(curve) - 1 == best + 3


@pytest.mark.parametrize(
    ("options", "named"),
    [({"patience": 0}, "patience"), ({"figure": "f1"}, "figure"), ({"min_delta": -1}, "min_delta")],
)
def test_wrong_arguments_of_early_stopping_are_named(options, named):
    with pytest.raises(ConfigError, match=f"^{named}:"):
        EarlyStopping(**options)


@pytest.mark.parametrize("callbacks", [Callback(), [Callback], [print], 3])
def test_what_is_not_a_list_of_callbacks_is_refused(callbacks):
    with pytest.raises(ConfigError, match="callbacks"):
        train(small_federation(), callbacks=callbacks, **QUICK)


def test_tensorboard_events_are_those_of_a_configured_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    train(small_federation(), callbacks=[TensorBoard(tmp_path / "own")], run_dir=folder, **QUICK)
    curves = []
    for events in (tmp_path / "own", folder / "tensorboard"):
        accumulator = EventAccumulator(str(events)).Reload()
        curves.append(
            {
                tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
                for tag in accumulator.Tags()["scalars"]
            }
        )
    assert curves[0] == curves[1]
    assert len(curves[0]["loss/a"]) == 4


def test_tensorboard_without_a_folder_or_the_package_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="folder"):
        train(small_federation(), callbacks=[TensorBoard()], **QUICK)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard"):
        train(small_federation(), callbacks=[TensorBoard("/nowhere")], **QUICK)


def test_a_bar_is_shown_as_plain_lines_where_there_is_no_terminal(capsys):
    train(small_federation(), progress=True, **QUICK)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["round 1/4", "round 2/4", "round 4/4"]


def test_a_bar_of_a_configured_run(capsys):
    words = [f"train.{key}={value}" for key, value in QUICK.items()]
    run(load_config(None, ["federation.name=digits", *words]), progress=True)
    assert "round 4/4" in capsys.readouterr().out
