"""Without TorchScript steps are run from Python: the same numbers, and one warning."""

import logging
from functools import partial
from threading import Event

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import Federation, FedGradNormWarning, Task, train
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines import executors
from fedgradnorm.engines.executors import executable_of
from fedgradnorm.engines.planning import plan_for
from fedgradnorm.engines.workspace import Workspace
from fedgradnorm.federations import digits
from tests.helpers import small_client, small_encoder, small_federation

SOURCE = [
    "def steps(inputs: List[Tensor], rates: List[float]) -> Tensor:",
    "    losses: List[Tensor] = []",
    "    v_kept = inputs[0]",
    "    for step in range(len(inputs)):",
    "        v_inputs = inputs[step]",
    "        v_twice = torch.ops.aten.mul(v_inputs, 2.0)",
    "        v_view = torch.ops.aten._unsafe_view(v_twice, [2])",
    "        v_kept.add_(v_view, alpha=-rates[0])",
    "        losses.append(v_kept.sum())",
    "    return torch.stack(losses)",
]


def raises(_):
    raise RuntimeError("TorchScript was removed")


def deprecated(_):
    raise DeprecationWarning("torch.jit is deprecated")  # as where warnings are errors


@pytest.fixture(params=[raises, deprecated, None], ids=["raises", "deprecated", "missing"])
def without_torchscript(request, monkeypatch):
    monkeypatch.setattr(executors, "WARNED", Event())
    if request.param is None:
        monkeypatch.delattr(torch.jit, "CompilationUnit")
    else:
        monkeypatch.setattr(torch.jit, "CompilationUnit", request.param)


def run(executable):
    inputs = [torch.ones(2), torch.tensor([3.0, -1.0])]
    return executable.steps(inputs, [0.1]), inputs


def test_both_executors_run_the_same_source(monkeypatch):
    by_torchscript = executable_of(SOURCE)
    monkeypatch.setattr(torch.jit, "CompilationUnit", raises)
    monkeypatch.setattr(executors, "WARNED", Event())
    with pytest.warns(FedGradNormWarning, match="RuntimeError: TorchScript was removed"):
        in_python = executable_of(SOURCE)
    assert (by_torchscript.in_python, in_python.in_python) == (False, True)
    torch.testing.assert_close(run(in_python), run(by_torchscript), rtol=0, atol=0)


@pytest.mark.usefixtures("without_torchscript")
def test_a_run_without_torchscript_has_the_same_bits_and_one_warning(monkeypatch):
    settings = {"num_rounds": 2, "head_steps": 3, "encoder_steps": 2, "head_momentum": 0.5}
    with pytest.warns(FedGradNormWarning) as caught:
        results = [train(small_federation(ids), **settings) for ids in ("abcdefgh", "ab")]
    (warning,) = caught
    assert "does not run TorchScript" in str(warning.message)
    assert "slower" in str(warning.message)
    monkeypatch.undo()
    for ids, result in zip(("abcdefgh", "ab"), results, strict=True):
        expected = train(small_federation(ids), **settings)
        assert torch.equal(result.state.encoder, expected.state.encoder)


def test_a_program_that_torchscript_does_not_take_is_run_from_python_without_a_warning(caplog):
    lines = [line.replace("v_inputs, 2.0", "v_inputs, (lambda: 2.0)()") for line in SOURCE]
    with caplog.at_level(logging.INFO, logger="fedgradnorm"):
        executable = executable_of(lines)
    assert executable.in_python
    assert "TorchScript cannot run a program" in caplog.text
    torch.testing.assert_close(run(executable), run(executable_of(SOURCE)), rtol=0, atol=0)


def shifted(outputs, targets):
    return functional.cross_entropy(outputs, targets) - 10.1


def test_losses_with_a_number_beside_a_stacked_tensor_are_stacked():
    task = Task("t", partial(nn.Linear, out_features=2), shifted)
    federation = Federation([small_client(id, task=task) for id in "abcdef"], small_encoder)
    plan = plan_for(
        federation.clients[0], Workspace(federation, 0, torch.device("cpu")), TrainConfig()
    )
    assert plan.way == "stacked"


def test_the_digits_train_without_a_warning():
    settings = {"num_rounds": 1, "head_steps": 1, "encoder_steps": 1}
    assert train(digits.make(seed=0), **settings).summary["rounds"] == 1
