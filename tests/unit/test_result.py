import sys

import pytest
import torch

from fedgradnorm import ConfigError, FederationError, RunError, evaluate_run, load_model, train
from fedgradnorm.report import write_report
from fedgradnorm.runs.reader import Run
from tests.helpers import batch_norm_encoder, small_client, small_federation

QUICK = {"num_rounds": 4, "head_steps": 1, "encoder_steps": 1, "batch_size": 8, "eval_every": 2}


@pytest.fixture(scope="module")
def result():
    return train(small_federation(encoder=batch_norm_encoder), **QUICK)


def test_a_result_says_in_a_line_what_it_is(result):
    text = repr(result)
    assert len(text) < 200
    assert "fedgradnorm" in text
    assert "4 rounds" in text
    assert "sign accuracy" in text
    html = result._repr_html_()
    assert html.count("<tr>") == 2
    assert "<td>sign</td>" in html


def test_the_frame_has_a_line_for_every_row(result):
    pandas = pytest.importorskip("pandas")
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(result.rows) == 12
    assert frame["loss"].tolist() == [row["loss"] for row in result.rows]
    tested = frame[frame["round"] == 4]
    assert tested["metrics.accuracy"].tolist() == [
        row["metrics"]["accuracy"] for row in result.rows if row["round"] == 4
    ]


@pytest.mark.parametrize(("method", "package"), [("to_frame", "pandas"), ("plot", "matplotlib")])
def test_a_missing_package_is_named(result, monkeypatch, method, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.figure", None)
    with pytest.raises(ConfigError, match=package):
        getattr(result, method)()


def test_it_evaluates_on_the_clients_test_data_and_on_other_data(result):
    last = {row["client"]: row for row in result.rows if row["round"] == 4}
    own = result.evaluate()
    assert {id: evaluation.loss for id, evaluation in own.items()} == {
        id: row["test_loss"] for id, row in last.items()
    }
    data = small_client("other", examples=50).train
    other = result.evaluate({"a": data})
    assert other.keys() == {"a"}
    model = result.model("a")
    with torch.no_grad():
        right = (model(data[0]).argmax(1) == data[1]).double().mean()
    assert other["a"].metrics["accuracy"] == float(right)


@pytest.mark.parametrize("data", [{"nobody": None}, {"a": 3}, [1, 2]])
def test_wrong_data_to_evaluate_on_is_named(result, data):
    with pytest.raises(FederationError, match="nobody|client 'a'|data"):
        result.evaluate(data)


def test_a_saved_result_is_a_run(result, tmp_path):
    folder = result.save(tmp_path / "saved")
    federation = result.federation
    assert Run(folder).is_finished()
    assert Run(folder).rows() == list(result.rows)
    evaluations = evaluate_run(folder, federation)
    assert evaluations["b"].metrics == result.evaluate()["b"].metrics
    x = small_client("other").train[0]
    assert torch.equal(load_model(folder, "b", federation)(x), result.model("b")(x))
    write_report([Run(folder)], tmp_path / "page.html")
    with pytest.raises(RunError, match="exists"):
        result.save(folder)
    result.save(folder, overwrite=True)


def test_a_model_is_loaded_from_what_a_killed_run_has_left(tmp_path):
    folder = tmp_path / "run"
    federation = small_federation(encoder=batch_norm_encoder)
    whole = train(federation, run_dir=folder, **QUICK)
    for file in (folder / "models").rglob("*.safetensors"):
        file.unlink()  # they are written at the end
    x = small_client("other").train[0]
    assert torch.equal(load_model(folder, "a", federation)(x), whole.model("a")(x))
