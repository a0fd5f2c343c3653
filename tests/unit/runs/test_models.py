"""The models of a run, loaded from its folder and tested."""

import json

import pytest
import torch
from torch import nn

from fedgradnorm import FederationError, RunError, evaluate_run, load_model, train
from fedgradnorm.evaluation import evaluate
from fedgradnorm.runs.reader import Run
from tests.helpers import batch_norm_encoder, dropout_encoder, small_federation
from tests.unit.runs.quick import QUICK, run_digits


@pytest.mark.parametrize("encoder", [batch_norm_encoder, dropout_encoder])
@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_every_loaded_model_scores_what_the_summary_says(tmp_path, encoder, buffers):
    federation = small_federation(encoder=encoder, buffers=buffers)
    result = train(federation, run_dir=tmp_path / "run", **QUICK)
    summary = Run(tmp_path / "run").summary()
    assert summary == json.loads(json.dumps(result.summary))
    for client in federation.clients:
        for model in (load_model(tmp_path / "run", client.id, federation), result.model(client.id)):
            evaluation = evaluate(client.task, model.encoder, model.head, client.test_data)
            assert evaluation.metrics == summary["clients"][client.id]["metrics"]
            assert evaluation.loss == summary["clients"][client.id]["test_loss"]
            with torch.no_grad():
                assert torch.equal(
                    model(client.test_data[0]), model.head(model.encoder(client.test_data[0]))
                )


def test_a_configured_run_is_loaded_and_evaluated_from_its_folder_alone(tmp_path):
    result = run_digits(
        tmp_path / "run",
        "federation.tasks=['mass', 'class']",
        "model.name=mlp",
        "model.hidden=[16, 8]",
    )
    model = load_model(tmp_path / "run", "class")
    assert [type(layer).__name__ for layer in model.encoder] == [
        "Flatten",
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
    ]
    evaluations = evaluate_run(tmp_path / "run")
    for id, evaluation in evaluations.items():
        assert dict(evaluation.metrics) == result.summary["clients"][id]["metrics"]
    with pytest.raises(FederationError, match="'clas'.*'class'"):
        load_model(tmp_path / "run", "clas")


def test_a_run_given_in_python_needs_its_federation_to_load(tmp_path):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    with pytest.raises(RunError, match="federation="):
        load_model(tmp_path / "run", "a")


class Drifting(nn.Module):
    """An encoder with a buffer that a state dict leaves out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, inputs):
        if self.training:
            self.seen += 0.1
        return self.linear(inputs) + self.seen


@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_buffers_that_are_not_persistent_are_saved_too(tmp_path, buffers):
    federation = small_federation(encoder=Drifting, buffers=buffers)
    result = train(federation, run_dir=tmp_path / "run", **QUICK)
    for client in federation.clients:
        model = load_model(tmp_path / "run", client.id, federation)
        assert model.encoder.seen[0] > 0
        metrics = evaluate(client.task, model.encoder, model.head, client.test_data).metrics
        assert dict(metrics) == result.summary["clients"][client.id]["metrics"]
