"""Programs take the steps that autograd and torch's SGD take, or say that they cannot be had."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fedgradnorm import Task
from fedgradnorm.engines import executors
from fedgradnorm.engines.phases import ENCODER, HEAD, Phase, both
from fedgradnorm.engines.programs import Program

STEPS, BATCH, RATE = 4, 6, 0.05


class LowRank(nn.Module):
    """The gradient of each factor is a product with the other one, which is trained too."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, inputs):
        return inputs @ (self.left @ self.right)


class Twice(nn.Module):
    """One matrix in two places."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.matrix(torch.tanh(self.matrix(inputs)))[:, :3]


class Unused(nn.Linear):
    """With a parameter that is in no gradient."""

    def __init__(self):
        super().__init__(8, 3)
        self.spare = nn.Parameter(torch.ones(2))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.linear(self.embedding(inputs.abs().mul(3).long().clamp(max=8)).mean(dim=1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs):
        sequence = inputs.view(-1, 2, 4)
        return self.linear(
            self.attention(sequence, sequence, sequence, need_weights=False)[0].mean(dim=1)
        )


def convolutions():
    layers = [
        nn.Unflatten(1, (1, 2, 4)),
        nn.Conv2d(1, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d((1, 3)),
        nn.Flatten(),
        nn.LayerNorm(3),
        nn.Linear(3, 3),
    ]
    return nn.Sequential(*layers)


MODELS = {
    "perceptron": lambda: nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 7), nn.GELU(), nn.Linear(7, 3, bias=False)
    ),
    "convolutions": convolutions,
    "two factors": LowRank,
    "one matrix twice": Twice,
    "a parameter without a gradient": Unused,
    "tokens": Tokens,
    "attention": Attention,
    "half frozen": lambda: frozen(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))),
}


def frozen(model):
    model[0].requires_grad_(False)
    return model


def huber(outputs, targets):
    return functional.huber_loss(outputs[:, 0], targets.to(outputs.dtype))


def mean_of_a_batch_that_is_weighted(outputs, targets):
    return functional.cross_entropy(
        outputs,
        targets,
        weight=torch.tensor([0.2, 1.0, 3.0], dtype=outputs.dtype),
        label_smoothing=0.1,
    )


LOSSES = [functional.cross_entropy, huber, mean_of_a_batch_that_is_weighted]


def model_and_batches(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    batches = [
        (torch.randn(BATCH, 8, dtype=torch.float64), torch.randint(0, 3, (BATCH,)))
        for _ in range(STEPS)
    ]
    return model, batches


def program_of(model, loss, batch):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [*trained, *(name for name in tensors if name not in trained)]

    def of(learned, others, inputs, targets):
        return loss(
            functional_call(model, dict(zip(names, [*learned, *others], strict=True)), (inputs,)),
            targets,
        )

    copies = [tensors[name].detach().clone() for name in names]
    return (
        Program(of, copies[: len(trained)], copies[len(trained) :], *batch),
        copies[: len(trained)],
        copies[len(trained) :],
    )


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_its_steps_are_those_of_torchs_sgd(name, loss, momentum):
    model, batches = model_and_batches(name)
    program, trained, fixed = program_of(model, loss, batches[0])
    velocity = (
        [
            torch.zeros_like(one) if has else None
            for one, has in zip(trained, program.has_gradient, strict=True)
        ]
        if momentum
        else ()
    )
    inputs, targets = zip(*batches, strict=True)
    found = program.run(
        trained, fixed, inputs, targets, [RATE] * len(trained), momentum=momentum, velocity=velocity
    )

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(learned, lr=RATE, momentum=momentum), []
    for one, other in batches:
        optimizer.zero_grad()
        losses.append(loss(model(one), other))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(found, torch.stack(losses).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        trained, [parameter.detach() for parameter in learned], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_of_the_gradients_along_the_way(name):
    model, batches = model_and_batches(name)
    program, trained, fixed = program_of(model, functional.cross_entropy, batches[0])
    starts, sums = [one.clone() for one in trained], [torch.zeros_like(one) for one in trained]
    rates = [RATE * (1 + place) for place in range(len(trained))]
    program.run(trained, fixed, *zip(*batches, strict=True), rates, starts=starts, sums=sums)
    for start, one, total, rate in zip(starts, trained, sums, rates, strict=True):
        torch.testing.assert_close(one, start - rate * total, rtol=1e-12, atol=1e-14)
    other = [one.clone() for one in starts]
    program.run(other, fixed, *zip(*batches, strict=True), rates)
    torch.testing.assert_close(trained, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_without_torchscript_they_give_the_same_bits(name, monkeypatch):
    def run():
        model, batches = model_and_batches(name)
        program, trained, fixed = program_of(model, functional.cross_entropy, batches[0])
        starts, sums = [one.clone() for one in trained], [torch.zeros_like(one) for one in trained]
        batches, rates = tuple(zip(*batches, strict=True)), [RATE] * len(trained)
        losses = [
            program.run(trained, fixed, *batches, rates, starts=starts, sums=sums),
            program.run(trained, fixed, *batches, rates),
        ]
        return program.in_python, [*losses, *trained, *sums]

    def removed(_):
        raise RuntimeError("TorchScript was removed")

    warned = Event()
    warned.set()
    in_torchscript, expected = run()
    monkeypatch.setattr(executors, "WARNED", warned)
    monkeypatch.setattr(torch.jit, "CompilationUnit", removed)
    in_python, found = run()
    assert (in_torchscript, in_python) == (False, True)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_a_gradient_that_is_a_trained_tensor_is_taken_before_that_changes():
    one, other = torch.tensor([2.0]), torch.tensor([3.0])
    program = Program(
        lambda trained, *_: (trained[0] * trained[1]).sum(),
        [one, other],
        [],
        torch.ones(1),
        torch.ones(1),
    )
    program.run([one, other], [], [torch.ones(1)], [torch.ones(1)], [0.5, 0.5])
    assert (one.item(), other.item()) == (2 - 0.5 * 3, 3 - 0.5 * 2)


def test_programs_may_be_made_in_many_threads_at_once():
    model, batches = model_and_batches("perceptron")
    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda _: program_of(model, functional.cross_entropy, batches[0]), range(12))
        )
    ends = []
    for program, trained, fixed in made:
        program.run(trained, fixed, *zip(*batches, strict=True), [RATE] * len(trained))
        ends.append(torch.cat([one.reshape(-1) for one in trained]))
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_every_run_gives_the_same_bits():
    model, batches = model_and_batches("perceptron")
    program, trained, fixed = program_of(
        model.float(), functional.cross_entropy, (batches[0][0].float(), batches[0][1])
    )
    inputs, targets = [one.float() for one, _ in batches], [other for _, other in batches]
    ends = []
    for _ in range(5):
        moved = [one.float().clone() for one in trained]
        program.run(moved, fixed, inputs, targets, [RATE] * len(moved))
        ends.append(torch.cat([one.reshape(-1) for one in moved]))
    assert all(torch.equal(end, ends[0]) for end in ends)


def branching(outputs, targets):
    return outputs.sum() if targets.sum() > 0 else outputs.mean()


def masked(outputs, targets):
    return outputs[targets > 0].square().mean()


def listed(outputs, targets):
    return outputs.sum() * len(set(targets.tolist()))


def counted(outputs, targets):
    """Weighs classes by how many there are in a batch, out of torch's sight."""
    weight = torch.from_numpy(1 / np.bincount(targets.numpy(), minlength=3).clip(1)).to(
        outputs.dtype
    )
    return functional.cross_entropy(outputs, targets, weight=weight)


def strided(outputs, targets):
    return outputs.as_strided((len(targets),), (1,)).sum()


@pytest.mark.parametrize("loss", [branching, masked, listed, counted, strided])
def test_what_depends_on_values_cannot_be_had(loss):
    model, batches = model_and_batches("perceptron")
    with pytest.raises((RuntimeError, TypeError)):
        program_of(model, loss, batches[0])


def test_what_changes_what_it_was_given_cannot_be_had():
    def counting(trained, fixed, inputs, targets):
        fixed[0].add_(1)
        return (inputs @ trained[0] - targets).square().sum() * fixed[0]

    with pytest.raises(TypeError, match="changes what the program was given"):
        Program(counting, [torch.zeros(2)], [torch.zeros(())], torch.eye(2), torch.zeros(2))


class Meter:
    """A loss that counts its calls, which a trace does not see."""

    calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return functional.cross_entropy(outputs, targets) * self.calls


@pytest.mark.parametrize(("loss", "right"), [(functional.cross_entropy, True), (Meter(), False)])
@pytest.mark.parametrize("parts", [(ENCODER,), (HEAD,), (ENCODER, HEAD)])
def test_a_phase_finds_out_whether_something_was_wrongly_taken_for_a_constant(loss, right, parts):
    torch.manual_seed(0)
    task = Task("t", lambda features: nn.Linear(features, 3), loss)
    model = both(nn.Linear(8, 4), nn.Linear(4, 3))
    batch, other = (
        (torch.randn(5, 8), torch.tensor([0, 0, 1, 2, 2])),
        (torch.randn(5, 8), torch.tensor([2, 1, 1, 1, 1])),
    )
    assert Phase(model, task, parts, batch).is_right(model, task, batch, other) is right
