"""Which way is the fastest for a client that gives the same numbers, found out by trying it on a batch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedgradnorm.client import EVALUATION_BATCH
from fedgradnorm.config import TrainConfig
from fedgradnorm.data import size, take
from fedgradnorm.engines.stacked import stacked_encoder, stacked_losses
from fedgradnorm.engines.workspace import Workspace, holds_more_than_its_state, same, views
from fedgradnorm.federation import Client
from fedgradnorm.parameters import buffers_of, flatten, trainable
from fedgradnorm.randomness import seeded_torch
from fedgradnorm.task import Task
from fedgradnorm.training import FedRep, method_of

__all__ = ["Plan", "plan_for"]

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
        num_bytes: working memory that a client takes in a stack.
        stack: what clients of one stack have in common: the shape and the type of an input, and the size of a batch.
    """

    way: Literal["alone", "looped", "stacked"]
    encode_once: bool
    why: str
    flops: int = 0
    num_bytes: int = 0
    stack: tuple[object, ...] = ()


def plan_for(client: Client, workspace: Workspace, training: TrainConfig) -> Plan:
    """The fastest way that gives this client's numbers. Tries them on its first batch."""
    if not isinstance(client.train_data, tuple):
        return Plan("alone", False, "its data are no tensors, and may differ from one access to the next")
    examples = size(client.train_data)
    inputs, targets = (part.to(workspace.device) for part in take(client.train_data, np.arange(min(training.batch_size, examples))))
    encoder, head = workspace.encoder.train(), workspace.head(client).train()
    encoder.zero_grad()
    head.zero_grad()
    kept = _Bytes()
    with seeded_torch(0, 0, client.id, "plan", workspace.device):
        _move(encoder, head)
        buffers, parameters = buffers_of(encoder), _parameters(encoder, head)
        random_states = _random_states(workspace.device)
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(kept.count, lambda tensor: tensor):
            client.task.loss(head(encoder(inputs)), targets).backward()
        if not torch.equal(random_states, _random_states(workspace.device)):
            return Plan("alone", False, "its model draws random numbers")
    flops = counter.get_total_flops()
    if any(not torch.equal(buffers[name], value) for name, value in encoder.named_buffers()):
        return Plan("looped", False, "its encoder keeps statistics of the batches", flops)
    if not torch.equal(parameters, _parameters(encoder, head)):
        return Plan("looped", False, "its model changes its own parameters", flops)
    if not _one_by_one(encoder, inputs):
        return Plan("looped", False, "its encoder does not treat every example by itself", flops)
    if any(parameter.ndim > 2 for parameter in encoder.parameters()):
        return Plan("looped", True, "convolutions are slower stacked", flops)
    if not isinstance(method_of(training), FedRep):
        return Plan("looped", True, "only fedrep is stacked", flops)
    if flops > STACKED_FLOPS:
        return Plan("looped", True, f"an encoder step takes {flops / 1e6:.0f} MFLOP, and calls count for little", flops)
    if examples > EVALUATION_BATCH:
        return Plan("looped", True, f"it has more than {EVALUATION_BATCH} examples", flops)
    if [*encoder.buffers(), *head.buffers()]:
        return Plan("looped", True, "its model has buffers", flops)
    if holds_more_than_its_state(head):
        return Plan("looped", True, "its head has tensors that are no parameters", flops)
    if any(_is_shared(module) for module in (encoder, head)):
        return Plan("looped", True, "its model uses parameters in several places", flops)
    if not _same_stacked(client.task, workspace, head, inputs, targets):
        return Plan("looped", True, "its model cannot be stacked", flops)
    steps = training.head_steps + training.encoder_steps
    held = inputs.nbytes * (steps + 2 * examples / len(inputs)) + 4 * sum(parameter.nbytes for _, parameter in trainable(encoder))
    return Plan(
        "stacked", True, f"an encoder step takes {flops / 1e6:.1f} MFLOP", flops, int(held + 2 * kept.total), (inputs.dtype, inputs.shape)
    )


def _random_states(device: torch.device) -> Tensor:
    """The states of torch's global generators that a model on this device can draw from."""
    own = torch.get_rng_state()
    return own if device.type == "cpu" else torch.cat([own, torch.cuda.get_rng_state(device)])


@torch.no_grad()
def _move(*modules: nn.Module) -> None:
    """Move trainable parameters a little: what begins with zero, a gate for one, would hide what comes behind it."""
    for module in modules:
        for _, parameter in trainable(module):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _parameters(*modules: nn.Module) -> Tensor:
    values = [parameter.detach().cpu().double().reshape(-1) for module in modules for parameter in module.parameters()]
    return torch.cat([torch.zeros(0), *values])


def _is_shared(module: nn.Module) -> bool:
    """Whether a parameter or a module has several names: ``functional_call`` cannot put these back."""
    return len(list(module.named_parameters(remove_duplicate=False))) != len(list(module.parameters()))


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


def _same_stacked(task: Task, workspace: Workspace, head: nn.Module, inputs: Tensor, targets: Tensor) -> bool:
    """Whether two stacked copies of a client have the gradients and the loss that it has by itself, and its head no other mode."""
    if not len(list(head.parameters())):
        return False
    vectors = flatten(workspace.encoder).expand(2, -1).clone()
    parameters = {name: part.requires_grad_() for name, part in views(workspace.encoder, vectors).items()}
    heads = {name: value.detach().expand(2, *value.shape).clone() for name, value in head.named_parameters()}
    for name, _ in trainable(head):
        heads[name].requires_grad_()
    try:
        features = stacked_encoder(workspace.encoder)(parameters, inputs.expand(2, *inputs.shape))
        losses = stacked_losses(head, task)(heads, features, targets.expand(2, *targets.shape))
        learned = [*parameters.values(), *(heads[name] for name, _ in trainable(head))]
        stacked = torch.autograd.grad(losses.sum(), learned, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            in_evaluation = task.loss(head.eval()(workspace.encoder(inputs)), targets).reshape(())
    except Exception:  # noqa: BLE001  # whatever vmap cannot do with the user's own code
        return False
    finally:
        head.train()
    alone = [parameter.grad for _, parameter in (*trainable(workspace.encoder), *trainable(head))]
    if any(gradient is not None and gradient.is_sparse for gradient in alone):
        return False
    pairs = [(torch.zeros_like(many) if one is None else one.expand_as(many), many) for one, many in zip(alone, stacked, strict=True)]
    return all(same(one, many) for one, many in pairs) and same(in_evaluation.expand(2), losses.detach())
