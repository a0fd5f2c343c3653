"""How a loss or a metric behaves: whether it is a mean, pairs outputs with targets, and reads all outputs and all examples."""

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fedgradnorm.broadcasting import Pairing, sample_size, watched
from fedgradnorm.parameters import trainable
from fedgradnorm.randomness import seeded
from fedgradnorm.task import Task

__all__ = ["NUMBERS", "SAMPLE", "Unsound", "check_loss", "check_pairs", "one_number", "shapes"]

SAMPLE = 64
"""Examples that a loss's behaviour is tried with."""

NUMBERS = 2**22
"""Numbers that are looked at at once, of inputs and of outputs."""

DRAWN = 2**18
"""Numbers in outputs that are drawn at random, to see which of them a loss reads."""

CLASSES = 64
"""Entries of outputs that are looked at further if random outputs and targets do not show that they are read."""

ORDERS = 3
"""Orders of the targets in which a loss that pairs them with outputs has other values."""

EQUAL = 1e-4
"""Two losses that are closer than this share of their size are the same but for rounding."""


class Unsound(Exception):  # noqa: N818  # `check_client` makes a FederationError of it
    """What is wrong, in words."""


def one_number(loss: object) -> Tensor:
    """A loss, as a tensor of shape ``()``. Raises TypeError for anything else."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the loss gives {found}, expected a tensor of one number for a batch")
    return loss.squeeze()


def shapes(what: str, outputs: Tensor, targets: Tensor) -> str:
    """What is wrong, with the shapes of outputs and targets."""
    return f"{what}: outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}"


def check_loss(task: Task, head: nn.Module, features: Tensor, targets: Tensor) -> str | None:
    """Raise Unsound for a loss that is no mean, does not pair outputs with targets, or has outputs or examples that it does not read.

    Args:
        task: whose loss.
        head: the task's head, in evaluation mode.
        features: what the encoder gives for a sample of examples. They differ from example to example.
        targets: of these examples.

    Returns:
        A doubt about how the loss pairs outputs with targets, in words, or None.
    """
    with torch.no_grad():
        outputs = head(features.clone())
    note = check_pairs(task.loss, outputs, targets, "the loss")
    first = _tried(task.loss, outputs, targets)
    if (
        first is None
        or not math.isfinite(first[0])
        or first[0] == 0
        or not bool(first[1].any())
        or len(outputs) < 2
    ):
        return note  # these outputs may be none to this loss, such as probabilities above 1; or there is nothing left to learn
    slopes = first[1]
    twice = _tried(task.loss, torch.cat([outputs, outputs]), torch.cat([targets, targets]))
    if twice is not None and _alike(twice[1], torch.cat([slopes, slopes])):
        raise Unsound(
            'the loss of a batch given twice is twice the loss: expected the mean over a batch, such as reduction="mean"'
        )
    number = max(2, DRAWN // outputs[0].numel())
    tries = [
        _tried(task.loss, *drawn, draw)
        for draw, drawn in enumerate(_drawn(outputs[:number], targets[:number]))
    ]
    all_slopes = [made[1] for made in tries if made is not None and bool(made[1].any())]
    _check_examples(all_slopes)
    if outputs.ndim >= 2 and all_slopes:
        _check_entries(task, head, features, targets, [slopes, *all_slopes])
    return note


def _tried(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor, draw: int = 0
) -> tuple[float, Tensor] | None:
    """A loss and its slopes with respect to the outputs, or None where these are none to it."""
    leaf = outputs.detach().clone().requires_grad_(outputs.is_floating_point())
    try:
        with seeded(0, draw, "", "loss"), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = one_number(loss(leaf.clone(), targets.clone()))
            (slopes,) = torch.autograd.grad(value, leaf)
    except Exception:  # noqa: BLE001  # the user's own loss may raise anything
        return None
    return value.item(), slopes


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= EQUAL * other.abs().max())


def _drawn(outputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and targets in which any example and any entry counts, for nearly all losses."""
    number = sample_size((outputs.shape, targets.shape), len(outputs)) or len(outputs)
    outputs, targets = outputs[:number], targets[:number]
    spread, middle = outputs.std(correction=0) + 1, outputs.mean()
    yield outputs, targets
    yield _shuffled(outputs), _shuffled(targets)
    for times in (1, 2, 100):
        yield middle + times * spread * torch.randn_like(outputs), _shuffled(targets)
    yield outputs.roll(1, dims=0), torch.ones_like(targets)


def _shuffled(tensor: Tensor) -> Tensor:
    return tensor.flatten()[torch.randperm(tensor.numel())].view(tensor.shape)


def _check_examples(all_slopes: list[Tensor]) -> None:
    """Raise Unsound if whatever the outputs and targets are, the loss reads the same few places of a batch."""
    if len(all_slopes) < ORDERS or len(all_slopes[0]) < 8:
        return
    reads = [slopes.reshape(len(slopes), -1).ne(0).any(dim=1) for slopes in all_slopes]
    if reads[0].sum() <= len(reads[0]) / 4 and all(torch.equal(read, reads[0]) for read in reads):
        count = int(reads[0].sum())
        raise Unsound(
            f"the loss of a batch of {len(reads[0])} examples depends on {count} of them: expected the mean over all examples of a batch"
        )


def _check_entries(
    task: Task, head: nn.Module, features: Tensor, targets: Tensor, all_slopes: list[Tensor]
) -> None:
    """Raise Unsound for an entry of the outputs, along dimension 1, that the loss never reads, and whose parameters it never trains."""
    others = [dimension for dimension in range(all_slopes[0].ndim) if dimension != 1]
    read = torch.stack([slopes.ne(0).sum(dim=others) > 0 for slopes in all_slopes]).any(dim=0)
    with torch.no_grad():
        outputs = head(features.clone())
    for place in (~read).nonzero().flatten().tolist()[:CLASSES]:
        if (
            targets.dtype != torch.bool
        ):  # each target may say which entry is read, such as its class
            made = _tried(task.loss, outputs, torch.full_like(targets, place))
            if made is not None and bool(made[1][:, place].any()):
                continue
        try:
            untrained = _is_untrained(task, head, features, targets, place)
        except Exception:  # noqa: BLE001  # the user's own code may raise anything
            return
        if untrained:
            raise Unsound(
                shapes(f"the loss does not depend on outputs[:, {place}]", outputs, targets)
            )


@torch.enable_grad()
def _is_untrained(
    task: Task, head: nn.Module, features: Tensor, targets: Tensor, place: int
) -> bool:
    """Whether some parameters of the head matter to one entry of the outputs, and get no gradient."""
    parameters = [parameter for _, parameter in trainable(head)]
    if not parameters:
        return False
    outputs = head(features.clone())
    own = torch.autograd.grad(
        (outputs[:, place] * torch.randn_like(outputs[:, place])).sum(),
        parameters,
        retain_graph=True,
        allow_unused=True,
    )
    with seeded(0, 0, "", "loss"):
        loss = one_number(task.loss(outputs.clone(), targets.clone()))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for one, gradient in zip(own, gradients, strict=True):
        if one is not None and bool(
            ((one != 0) & (torch.zeros_like(one) if gradient is None else gradient).eq(0)).any()
        ):
            return True
    return False


def check_pairs(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, targets: Tensor, what: str
) -> str | None:
    """Raise Unsound for a function that broadcasts targets against outputs.

    Returns:
        What is to be doubted about a function that cannot be watched, such as one of NumPy, or None.
    """
    most = min(SAMPLE, NUMBERS // max(outputs[0].numel(), targets[0].numel(), 1))
    number = sample_size((outputs.shape, targets.shape), most)
    if number is None:
        return None
    index = torch.arange(number) % len(outputs)

    def value(outputs: Tensor, targets: Tensor) -> float:
        with seeded(0, 0, "", "pairs"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(function(outputs.clone(), targets.clone()))  # type: ignore[arg-type]  # whatever it gives

    try:
        with seeded(0, 0, "", "pairs"):
            pairing = watched(lambda *pair: float(function(*pair)), outputs[index], targets[index])  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001  # the user's own code may raise anything
        pairing = Pairing()
    if pairing.broadcasts:
        raise Unsound(shapes(f"{what} broadcasts targets against outputs", outputs, targets))
    try:
        doubtful = (pairing.explicit or pairing.leaves_torch) and _ignores_pairs(
            value, outputs, targets
        )
    except Exception:  # noqa: BLE001  # what raises is told of elsewhere
        return None
    return (
        shapes(f"{what} does not depend on which target belongs to which output", outputs, targets)
        if doubtful
        else None
    )


def _ignores_pairs(of: Callable[[Tensor, Tensor], float], outputs: Tensor, targets: Tensor) -> bool:
    """Whether a function of outputs and targets, whose shapes differ by dimensions of size 1, does not care which target is whose."""
    if outputs.shape == targets.shape or outputs.numel() != targets.numel() or len(outputs) < 2:
        return False
    if bool((outputs == outputs[:1]).all()) or bool((targets == targets[:1]).all()):
        return False
    value, other = (
        of(outputs, targets),
        (targets != targets[:1]).reshape(len(targets), -1).any(dim=1).nonzero()[0],
    )
    at_one, at_other = (
        of(outputs, target.expand_as(targets)) for target in (targets[:1], targets[other])
    )
    if abs(at_one - at_other) <= 100 * EQUAL * abs(value):
        return False  # it hardly depends on the targets
    orders = [torch.roll(targets, shift, dims=0) for shift in range(1, ORDERS + 1)]
    return all(
        abs(of(outputs, other) - value) <= EQUAL * max(abs(value), EQUAL) for other in orders
    )
