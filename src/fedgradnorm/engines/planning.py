"""Which way is the fastest for a client that gives the same numbers, found out by trying it on a batch."""

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
from fedgradnorm.engines.looped import Programs
from fedgradnorm.engines.phases import ENCODER, HEAD, Batch, Phase, both
from fedgradnorm.engines.stacked import stack_of
from fedgradnorm.engines.watching import CannotTell, Watch
from fedgradnorm.engines.workspace import Workspace, has_hooks, holds_more_than_its_state, same
from fedgradnorm.evaluation import EVALUATION_BATCH
from fedgradnorm.federation import Client
from fedgradnorm.parameters import buffers_of, flatten, trainable
from fedgradnorm.randomness import Generators, seeded
from fedgradnorm.training import FedRep, method_of

__all__ = ["Plan", "batch_of", "plan_for", "programs_for"]

STACKED_FLOPS = 20_000_000
"""A client whose encoder steps take more floating-point operations keeps a core busy by itself; below, calls cost more than arithmetic."""


@dataclass(frozen=True)
class Plan:
    """How a client is trained.

    Attributes:
        way: ``alone``: as the reference does, while no other client trains; ``looped``: one client at a time in each thread;
            ``stacked``: many clients in one batched operation.
        encode_once: whether the encoder runs once over the examples of the head's steps, in place of once a step.
        why: what decided.
        flops: floating-point operations of an encoder step.
        traceable: whether the steps of a client by itself may be had as programs: its model changes nothing but what is trained.
        num_bytes: working memory that a client takes in a stack.
        watch: the values that its model and its loss read; None where it is trained ``alone``, without any shortcut.
    """

    way: Literal["alone", "looped", "stacked"]
    encode_once: bool
    why: str
    flops: int = 0
    traceable: bool = False
    num_bytes: int = 0
    watch: Watch | None = None


def plan_for(client: Client, workspace: Workspace, training: TrainConfig) -> Plan:
    """The fastest way that gives this client's numbers. Tries them on its first batch.

    What the user's code draws or changes in Python meanwhile is put back.
    """
    if not isinstance(client.train_data, tuple):
        return Plan(
            "alone", False, "its data are not tensors, and may differ from one access to the next"
        )
    encoder, head = workspace.encoder.train(), workspace.head(client).train()
    try:
        watch = Watch((encoder, head), (client.task.loss,))
    except CannotTell as reason:
        return Plan("alone", False, f"what its code reads cannot be seen: {reason}")
    before = Generators.now(workspace.device)
    plan = _watched_plan(client, workspace, head, training, watch)
    place = watch.changed()
    before.put_back(workspace.device)
    watch.put_back()
    return plan if place is None else Plan("alone", False, f"{place} changes in a step")


def _watched_plan(
    client: Client, workspace: Workspace, head: nn.Module, training: TrainConfig, watch: Watch
) -> Plan:
    encoder = workspace.encoder
    inputs, targets = batch_of(client, training, workspace.device)
    encoder.zero_grad()
    head.zero_grad()
    kept = _Bytes()
    with seeded(0, 0, client.id, "plan", workspace.device):
        _move(encoder, head)
        statistics, buffers, parameters = (
            buffers_of(encoder),
            buffers_of(head),
            _parameters(encoder, head),
        )
        drawn = Generators.now(workspace.device)
        with (
            FlopCounterMode(display=False) as counter,
            saved_tensors_hooks(kept.count, lambda tensor: tensor),
        ):
            client.task.loss(head(encoder(inputs)), targets).backward()
        if Generators.now(workspace.device) != drawn:
            return Plan("alone", False, "its model or its loss draws random numbers")
    if (place := watch.changed()) is not None:  # nothing more is tried, which might change it again
        return Plan("alone", False, f"{place} changes in a step")
    flops = counter.get_total_flops()
    if _differ(statistics, encoder):
        return Plan(
            "looped", False, "its encoder keeps statistics of the batches", flops, watch=watch
        )
    if not torch.equal(parameters, _parameters(encoder, head)):
        return Plan("looped", False, "its model changes its own parameters", flops, watch=watch)
    once = _one_by_one(encoder, inputs)
    why = (
        _why_not_stacked(client, workspace, training, flops)
        if once
        else "its encoder does not treat every example by itself"
    )
    if why is not None:
        own = holds_more_than_its_state(head) or any(
            _is_bound(module) for module in (encoder, head)
        )
        return Plan(
            "looped",
            once,
            why,
            flops,
            traceable=not own and not _differ(buffers, head),
            watch=watch,
        )
    steps = training.head_steps + training.encoder_steps
    held = (
        inputs.nbytes * (steps + 2 * size(client.train_data) / len(inputs))
        + 4 * flatten(encoder).nbytes
    )
    num_bytes = int(held + 2 * kept.total)
    return Plan(
        "stacked",
        True,
        f"an encoder step takes {flops / 1e6:.1f} MFLOP",
        flops,
        True,
        num_bytes,
        watch,
    )


def batch_of(
    client: Client, training: TrainConfig, device: torch.device, *, last: bool = False
) -> Batch:
    """As many of a client's examples as are in one of its batches: the first ones, or the last ones the other way round."""
    examples = size(client.train_data)
    order = np.arange(examples)[::-1].copy() if last else np.arange(examples)
    inputs, targets = take(client.train_data, order[: training.batch_size])
    return inputs.to(device), targets.to(device)


def _why_not_stacked(
    client: Client, workspace: Workspace, training: TrainConfig, flops: int
) -> str | None:
    """Why a client's encoder is not to be stacked with others, or None."""
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
        return "its head has tensors that are no parameters"
    if any(_is_bound(module) for module in (encoder, head)):
        return "its model uses parameters in several places, or has hooks on them"
    return None if _can_be_stacked(client, workspace, training) else "its model cannot be stacked"


def _can_be_stacked(client: Client, workspace: Workspace, training: TrainConfig) -> bool:
    """Whether two stacked clients have the gradients and the losses that they have by themselves, and the head no other mode."""
    encoder, head, task = workspace.encoder.train(), workspace.head(client).train(), client.task
    if not trainable(head):
        return False
    batches = [batch_of(client, training, workspace.device, last=last) for last in (False, True)]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            stack = stack_of(client, workspace, batches[0], width=2)
        if any(
            "performance drop" in str(one.message) for one in said
        ):  # vmap calls it once for each of the stacked clients
            return False
        features = _features(encoder, batches)
        if not stack.head.is_right(both(nn.Identity(), head), task, *features):
            return False
        if not stack.encoder.is_right(both(encoder, head), task, *batches):
            return False
        with torch.no_grad():
            inputs, targets = features[0]
            return same(task.loss(head(inputs), targets), task.loss(head.eval()(inputs), targets))
    except Exception:  # noqa: BLE001  # whatever cannot be done with the user's own code
        return False
    finally:
        head.train()


def programs_for(client: Client, workspace: Workspace, training: TrainConfig) -> Programs:
    """The steps of a client by itself as programs, each of them if it can be had and is right."""
    encoder, head = workspace.encoder.train(), workspace.head(client).train()
    batches = [batch_of(client, training, workspace.device, last=last) for last in (False, True)]

    def phase(first: nn.Module, parts: tuple[str, ...], batches: Sequence[Batch]) -> Phase | None:
        model = both(first, head)
        try:
            found = Phase(model, client.task, parts, batches[0])
            return found if found.is_right(model, client.task, *batches) else None
        except Exception:  # noqa: BLE001  # whatever cannot be done with the user's own code
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
    """Move trainable parameters a little: what begins with zero, a gate for one, would hide what comes behind it."""
    for module in modules:
        for _, parameter in trainable(module):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _parameters(*modules: nn.Module) -> Tensor:
    values = [
        parameter.detach().cpu().double().reshape(-1)
        for module in modules
        for parameter in module.parameters()
    ]
    return torch.cat([torch.zeros(0), *values])


def _is_bound(module: nn.Module) -> bool:
    """Whether a parameter has hooks, or it or a module several names: ``functional_call`` cannot put these back."""
    return has_hooks(module) or len(list(module.named_parameters(remove_duplicate=False))) != len(
        list(module.parameters())
    )


class _Bytes:
    """The bytes of the tensors that a forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.total = 0

    def count(self, tensor: Tensor) -> Tensor:
        """Count one of them."""
        self.total += tensor.nbytes
        return tensor


@torch.no_grad()
def _one_by_one(encoder: nn.Module, inputs: Tensor) -> bool:
    """Whether the features of an example depend on no other example of its batch, nor on the module's mode."""
    if len(inputs) < 2:
        return False
    whole = encoder(inputs)
    try:
        parts = torch.cat([encoder(inputs[:1]), encoder(inputs[1:].flip(0)).flip(0)])
    except Exception:  # noqa: BLE001  # a batch of one may be none to the user's own code
        return False
    in_evaluation = encoder.eval()(inputs)
    encoder.train()
    return same(whole, parts) and same(whole, in_evaluation)
