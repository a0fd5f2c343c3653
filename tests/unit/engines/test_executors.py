"""Without TorchScript steps are run from Python: the same numbers, and one warning."""

from threading import Event

import pytest
import torch

from fedgradnorm import FedGradNormWarning, train
from fedgradnorm.engines import executors
from fedgradnorm.engines.executors import executable_of
from fedgradnorm.engines.failures import Untraceable
from fedgradnorm.federations import digits
from tests.helpers import small_federation

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


def test_a_source_that_torchscript_cannot_compile_is_not_taken_for_a_missing_torchscript():
    unknown = [line.replace("aten.mul(v_inputs, 2.0)", "aten.mul(2.0)") for line in SOURCE]
    with pytest.raises(Untraceable, match="TorchScript"):
        executable_of(unknown)
    assert not executors.WARNED.is_set()


def test_the_digits_train_without_a_warning():
    settings = {"num_rounds": 1, "head_steps": 1, "encoder_steps": 1}
    assert train(digits.make(seed=0), **settings).summary["rounds"] == 1
