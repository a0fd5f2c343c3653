import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fedgradnorm import FederationError, RunError, train
from fedgradnorm.export import export_model
from tests.helpers import batch_norm_encoder, small_client, small_federation

QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def federation():
    return small_federation(encoder=batch_norm_encoder)


@pytest.fixture(scope="module")
def folder(federation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    train(federation, run_dir=folder, **QUICK)
    return folder


def expected(folder, federation, inputs):
    from fedgradnorm import load_model

    return load_model(folder, "b", federation)(inputs).detach()


def test_a_program_gives_the_models_outputs_without_this_package(folder, federation, tmp_path):
    path = export_model(folder, "b", federation=federation)
    assert path == folder / "models" / "b.pt2"
    inputs = small_client("other", examples=7).train[0]
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    code = (
        "import sys, torch, numpy as np\n"
        "sys.modules['fedgradnorm'] = None\n"
        f"model = torch.export.load({str(path)!r}).module()\n"
        f"inputs = torch.tensor(np.load({str(tmp_path / 'inputs.npy')!r}))\n"
        f"np.save({str(tmp_path / 'outputs.npy')!r}, model(inputs).detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    outputs = torch.tensor(np.load(tmp_path / "outputs.npy"))
    torch.testing.assert_close(outputs, expected(folder, federation, inputs))


def test_onnx_gives_the_models_outputs(folder, federation, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = export_model(folder, "b", tmp_path / "b.onnx", federation, onnx=True)
    inputs = small_client("other", examples=7).train[0]
    session = onnxruntime.InferenceSession(path)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.tensor(outputs), expected(folder, federation, inputs))


def test_what_cannot_be_exported_is_an_error_and_leaves_no_file(tmp_path):
    class Odd(nn.Sequential):
        def forward(self, inputs):
            features = super().forward(inputs)
            return features if float(features.detach().sum()) > 1e9 else features * 1.0

    federation = small_federation(encoder=lambda: Odd(nn.Linear(6, 4)))
    train(federation, run_dir=tmp_path / "run", **QUICK)
    with pytest.raises(RunError, match="cannot be exported"):
        export_model(tmp_path / "run", "a", federation=federation)
    assert not list((tmp_path / "run").rglob("*.pt2*"))


def test_wrong_arguments_are_named(folder, federation, tmp_path):
    with pytest.raises(FederationError, match="nobody"):
        export_model(folder, "nobody", federation=federation)
    with pytest.raises(RunError, match="no folder"):
        export_model(folder, "a", tmp_path / "nowhere" / "a.pt2", federation)
    with pytest.raises(RunError, match="missing"):
        export_model(tmp_path / "missing", "a", federation=federation)
