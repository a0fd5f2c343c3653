"""The fastest way to train a client that gives the same numbers, found by trying it on a batch."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedgradnorm.config import TrainConfig
from fedgradnorm.data import size, take
from fedgradnorm.engines.failures import Attempt
from fedgradnorm.engines.looped import Programs
from fedgradnorm.engines.phases import ENCODER, HEAD, Batch, Phase, both
from fedgradnorm.engines.stacked import stack_of
from fedgradnorm.engines.watching import CannotTell, Watch
from fedgradnorm.engines.workspace import Workspace, holds_more_than_its_state, same
from fedgradnorm.errors import FedGradNormWarning, warn
from fedgradnorm.evaluation import EVALUATION_BATCH
from fedgradnorm.federation import Client
from fedgradnorm.parameters import buffers_of, flatten, trainable
from fedgradnorm.randomness import Generators, seeded
from fedgradnorm.task import Task
from fedgradnorm.training import FedRep, method_of

STACKED_FLOPS = 20_000_000
"""The most floating-point operations of an encoder step for which stacking pays.

Larger steps keep a core busy by themselves. In smaller ones calls cost more than arithmetic.
"""


@dataclass(frozen=True)
class Plan:
    """How a client is trained.

    Attributes:
        way: ``alone``: as the reference does, while no other client trains; ``looped``: one client
            at a time in each thread; ``stacked``: many clients in one batched operation.
        encode_once: whether the encoder runs once over the examples of the head's steps, and not
            once a step.
        why: the reason.
        flops: floating-point operations of an encoder step.
        traceable: whether the steps of a single client may be programs: its model changes only
            what is trained.
        num_bytes: working memory that a client takes in a stack.
        watch: the values that its model and its loss read; None with the way ``alone``, which has
            no shortcut.
    """

    way: Literal["alone", "looped", "stacked"]
    encode_once: bool
    why: str
    flops: int = 0
    traceable: bool = False
    num_bytes: int = 0
    watch: Watch | None = None


def plan_for(client: Client, workspace: Workspace, training: TrainConfig) -> Plan:
    """The fastest way that gives this client's numbers, found by trying its first batch.

    Whatever the user's code draws or changes in Python meanwhile is put back.
    """
    if not isinstance(client.train_data, tuple):
        why = "its data are not tensors, and may differ from one access to the next"
        return Plan("alone", False, why)
    with Attempt(f"clients like '{client.id}' are trained without shortcuts"):
        encoder, head = workspace.encoder.train(), workspace.head(client).train()
        try:
            watch = Watch((encoder, head), (client.task.loss,))
        except CannotTell as reason:
            return Plan("alone", False, f"what its code reads cannot be seen: {reason}")
        before = Generators.now(workspace.device)
        try:
            plan = _watched_plan(client, workspace, head, training, watch)
            place = watch.changed()
        finally:
            before.put_back(workspace.device)
            watch.put_back()
        return plan if place is None else Plan("alone", False, f"{place} changes in a step")
    return Plan("alone", False, "a trial of its first batch failed")


def _watched_plan(
    client: Client, workspace: Workspace, head: nn.Module, training: TrainConfig, watch: Watch
) -> Plan:
    encoder, batch = workspace.encoder, batch_of(client, training, workspace.device)
    with seeded(0, 0, client.id, "plan", workspace.device):
        trial = _Trial(client.task, encoder, head, batch, workspace.device)
    if trial.draws:
        return Plan("alone", False, "its model or its loss draws random numbers")
    if (place := watch.changed()) is not None:  # another call might change it again
        return Plan("alone", False, f"{place} changes in a step")
    flops = trial.flops
    if _differ(trial.statistics, encoder):
        why = "its encoder keeps statistics of the batches"
        return Plan("looped", False, why, flops, watch=watch)
    if not torch.equal(trial.parameters, _parameters(encoder, head)):
        return Plan("looped", False, "its model changes its own parameters", flops, watch=watch)
    once = _one_by_one(encoder, batch[0])
    why_not: str | None = "its encoder does not treat every example by itself"
    if once:
        why_not = _why_not_stacked(client, workspace, training, flops)
    if why_not is not None:
        bound = _is_bound(encoder) or _is_bound(head)
        own = bound or holds_more_than_its_state(head) or _differ(trial.buffers, head)
        return Plan("looped", once, why_not, flops, traceable=not own, watch=watch)
    steps = training.head_steps + training.encoder_steps
    batches = steps + 2 * size(client.train_data) / len(batch[0])
    held = batch[0].nbytes * batches + 4 * flatten(encoder).nbytes
    num_bytes = int(held + 2 * trial.saved_bytes)
    why = f"an encoder step takes {flops / 1e6:.1f} MFLOP"
    return Plan("stacked", True, why, flops, True, num_bytes, watch)


class _Trial:
    """A step's forward and backward pass on a model whose parameters were moved a little.

    It counts the bytes that the forward pass keeps for the backward pass, and remembers the
    buffers and parameters as they were before it.
    """

    def __init__(
        self, task: Task, encoder: nn.Module, head: nn.Module, batch: Batch, device: torch.device
    ) -> None:
        both(encoder, head).zero_grad()
        _move(encoder, head)
        self.statistics, self.buffers = buffers_of(encoder), buffers_of(head)
        self.parameters, self.saved_bytes = _parameters(encoder, head), 0
        before, counter = Generators.now(device), FlopCounterMode(display=False)
        with counter, saved_tensors_hooks(self._count, lambda tensor: tensor):
            task.loss(head(encoder(batch[0])), batch[1]).backward()
        self.draws = Generators.now(device) != before
        self.flops = counter.get_total_flops()

    def _count(self, tensor: Tensor) -> Tensor:
        self.saved_bytes += tensor.nbytes
        return tensor


def batch_of(
    client: Client, training: TrainConfig, device: torch.device, *, last: bool = False
) -> Batch:
    """A batch of a client's first examples, or of its last ones in reverse order."""
    examples = size(client.train_data)
    order = np.arange(examples)[::-1].copy() if last else np.arange(examples)
    inputs, targets = take(client.train_data, order[: training.batch_size])
    return inputs.to(device), targets.to(device)


def _why_not_stacked(
    client: Client, workspace: Workspace, training: TrainConfig, flops: int
) -> str | None:
    encoder, head = workspace.encoder, workspace.head(client)
    if any(parameter.ndim > 2 for parameter in encoder.parameters()):
        return "convolutions are slower stacked"
    if not isinstance(method_of(training), FedRep):
        return "only fedrep is stacked"
    if flops > STACKED_FLOPS:
        return f"an encoder step takes {flops / 1e6:.0f} MFLOP, and calls count for little"
    if size(client.train_data) > EVALUATION_BATCH:
        return f"it has more than {EVALUATION_BATCH} examples"
    if [*encoder.buffers(), *head.buffers()]:
        return "its model has buffers"
    if holds_more_than_its_state(head):
        return "its head has tensors that are not parameters"
    if _is_bound(encoder) or _is_bound(head):
        return "its model uses parameters in several places, or has hooks on them"
    return None if _can_be_stacked(client, workspace, training) else "its model cannot be stacked"


def _can_be_stacked(client: Client, workspace: Workspace, training: TrainConfig) -> bool:
    """Whether two stacked clients have the gradients and the losses that they have by themselves.

    The head also has to give the same in evaluation mode.
    """
    encoder, head, task = workspace.encoder.train(), workspace.head(client).train(), client.task
    if not trainable(head):
        return False
    batches = [batch_of(client, training, workspace.device, last=last) for last in (False, True)]
    try:
        with Attempt(f"clients like '{client.id}' are not stacked"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                stack = stack_of(client, workspace, batches[0], width=2)
            # vmap says so where it calls an operation once for each of the stacked clients.
            if any("performance drop" in str(warning.message) for warning in caught):
                return False
            for warning in caught:
                if issubclass(warning.category, FedGradNormWarning):
                    warn(str(warning.message))
            features = _features(encoder, batches)
            if not stack.head.is_right(both(nn.Identity(), head), task, *features):
                return False
            if not stack.encoder.is_right(both(encoder, head), task, *batches):
                return False
            with torch.no_grad():
                inputs, targets = features[0]
                in_training = task.loss(head(inputs), targets)
                return same(in_training, task.loss(head.eval()(inputs), targets))
        return False
    finally:
        head.train()


def programs_for(client: Client, workspace: Workspace, training: TrainConfig) -> Programs:
    """The steps of a single client as programs: each one that can be traced and is right."""
    encoder, head = workspace.encoder.train(), workspace.head(client).train()
    batches = [batch_of(client, training, workspace.device, last=last) for last in (False, True)]

    def phase(first: nn.Module, parts: tuple[str, ...], batches: Sequence[Batch]) -> Phase | None:
        model = both(first, head)
        steps = " and ".join(part.strip(".") for part in parts)
        with Attempt(f"clients like '{client.id}' have no program of the steps on {steps}"):
            phase = Phase(model, client.task, parts, batches[0])
            return phase if phase.is_right(model, client.task, *batches) else None
        return None

    joint = trainable(head) and not isinstance(method_of(training), FedRep)
    return Programs(
        phase(nn.Identity(), (HEAD,), _features(encoder, batches)) if trainable(head) else None,
        phase(encoder, (ENCODER,), batches),
        phase(encoder, (ENCODER, HEAD), batches) if joint else None,
    )


@torch.no_grad()
def _features(encoder: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    return [(encoder(inputs), targets) for inputs, targets in batches]


def _differ(buffers: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether a module's buffers are no longer these."""
    return any(not torch.equal(buffers[name], value) for name, value in module.named_buffers())


@torch.no_grad()
def _move(*modules: nn.Module) -> None:
    """Move trainable parameters a little: one that is zero, such as a gate, hides what follows."""
    for module in modules:
        for _, parameter in trainable(module):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _parameters(*modules: nn.Module) -> Tensor:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    values = [parameter.detach().cpu().double().reshape(-1) for parameter in parameters]
    return torch.cat([torch.zeros(0), *values])


def _is_bound(module: nn.Module) -> bool:
    """Whether parameters have hooks or several names: ``functional_call`` cannot put these back."""
    names, parameters = module.named_parameters(remove_duplicate=False), list(module.parameters())
    hooked = any(parameter._backward_hooks for parameter in parameters)
    return hooked or len(list(names)) != len(parameters)


@torch.no_grad()
def _one_by_one(encoder: nn.Module, inputs: Tensor) -> bool:
    """Whether an example's features depend neither on the rest of its batch nor on the mode."""
    if len(inputs) < 2:
        return False
    whole, parts = encoder(inputs), None
    with Attempt("every example is encoded in each head step"):  # it may refuse a batch of one
        parts = torch.cat([encoder(inputs[:1]), encoder(inputs[1:].flip(0)).flip(0)])
    if parts is None:
        return False
    in_evaluation = encoder.eval()(inputs)
    encoder.train()
    return same(whole, parts) and same(whole, in_evaluation)
