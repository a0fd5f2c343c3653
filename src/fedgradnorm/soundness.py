"""Whether a loss is a mean, pairs outputs with targets, and reads all outputs and all examples."""

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fedgradnorm.broadcasting import Pairing, sample_size, watched
from fedgradnorm.data import NUMBERS
from fedgradnorm.parameters import trainable
from fedgradnorm.randomness import seeded
from fedgradnorm.task import Task

SAMPLE = 64
"""The number of examples that a loss is tried with."""

DRAWN = 2**18
"""The most numbers in outputs that are drawn at random, to see which of them a loss reads."""

CLASSES = 64
"""The most entries of outputs that are tried one by one, if random outputs leave them unread."""

ORDERS = 3
"""The number of orders of the targets in which a loss that reads pairs has other values."""

EQUAL = 1e-4
"""Two losses are the same if they differ by less than this share of their size."""


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
    """Check that a loss is a mean, pairs outputs with targets, and reads all outputs and examples.

    Args:
        task: the task.
        head: the task's head, in evaluation mode.
        features: what the encoder gives for a sample of examples; all of them differ.
        targets: of these examples.

    Returns:
        A doubt about how the loss pairs outputs with targets, in words, or None.

    Raises:
        Unsound: the loss is not sound.
    """
    with torch.no_grad():
        outputs = head(features.clone())
    note = check_pairs(task.loss, outputs, targets, "the loss")
    value, slopes = _tried(task.loss, outputs, targets) or (math.nan, outputs)
    if not math.isfinite(value) or value == 0 or not bool(slopes.any()) or len(outputs) < 2:
        return note  # the loss may not accept these outputs, or there is nothing left to learn
    twice = _tried(task.loss, torch.cat([outputs, outputs]), torch.cat([targets, targets]))
    if twice is not None and _alike(twice[1], torch.cat([slopes, slopes])):
        expected = 'expected the mean over a batch, such as reduction="mean"'
        raise Unsound(f"the loss of a batch given twice is twice the loss: {expected}")
    number = max(2, DRAWN // outputs[0].numel())
    drawn = enumerate(_drawn(outputs[:number], targets[:number]))
    tries = [_tried(task.loss, *pair, draw) for draw, pair in drawn]
    all_slopes = [tried[1] for tried in tries if tried is not None and bool(tried[1].any())]
    _check_examples(all_slopes)
    if outputs.ndim >= 2 and all_slopes:
        _check_entries(task, head, features, targets, [slopes, *all_slopes])
    return note


def _tried(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor, draw: int = 0
) -> tuple[float, Tensor] | None:
    """A loss and its slopes with respect to the outputs, or None if it does not accept them."""
    leaf = outputs.detach().clone().requires_grad_(outputs.is_floating_point())
    try:
        with seeded(0, draw, "", "loss"), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = one_number(loss(leaf.clone(), targets.clone()))
            (slopes,) = torch.autograd.grad(value, leaf)
    except Exception:  # noqa: BLE001  # the user's own loss may raise anything
        return None
    return value.item(), slopes


def _alike(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= EQUAL * second.abs().max())


def _drawn(outputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and targets for which nearly every loss reads every example and every entry."""
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
    """Raise Unsound if the loss always reads the same few places of a batch."""
    if len(all_slopes) < ORDERS or len(all_slopes[0]) < 8:
        return
    reads = [slopes.reshape(len(slopes), -1).ne(0).any(dim=1) for slopes in all_slopes]
    count, size = int(reads[0].sum()), len(reads[0])
    if count <= size / 4 and all(torch.equal(read, reads[0]) for read in reads):
        text = f"the loss of a batch of {size} examples depends on {count} of them"
        raise Unsound(f"{text}: expected the mean over all examples of a batch")


def _check_entries(
    task: Task, head: nn.Module, features: Tensor, targets: Tensor, all_slopes: list[Tensor]
) -> None:
    """Raise Unsound for an entry of the outputs, along dimension 1, that the loss never reads.

    It is accepted if the head's parameters that matter to it are trained all the same.
    """
    others = [dimension for dimension in range(all_slopes[0].ndim) if dimension != 1]
    read = torch.stack([slopes.ne(0).sum(dim=others) > 0 for slopes in all_slopes]).any(dim=0)
    with torch.no_grad():
        outputs = head(features.clone())
    for place in (~read).nonzero().flatten().tolist()[:CLASSES]:
        # a target, such as a class, may say which entry is read
        if targets.dtype != torch.bool:
            tried = _tried(task.loss, outputs, torch.full_like(targets, place))
            if tried is not None and bool(tried[1][:, place].any()):
                continue
        try:
            untrained = _is_untrained(task, head, features, targets, place)
        except Exception:  # noqa: BLE001  # the user's own code may raise anything
            return
        if untrained:
            what = f"the loss does not depend on outputs[:, {place}]"
            raise Unsound(shapes(what, outputs, targets))


@torch.enable_grad()
def _is_untrained(
    task: Task, head: nn.Module, features: Tensor, targets: Tensor, place: int
) -> bool:
    """Whether an entry of the outputs depends on parameters of the head that get no gradient."""
    parameters = [parameter for _, parameter in trainable(head)]
    if not parameters:
        return False
    outputs = head(features.clone())
    entry = (outputs[:, place] * torch.randn_like(outputs[:, place])).sum()
    matter = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
    with seeded(0, 0, "", "loss"):
        loss = one_number(task.loss(outputs.clone(), targets.clone()))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return any(
        bool((slopes.ne(0) & (gradient is None or gradient.eq(0))).any())
        for slopes, gradient in zip(matter, gradients, strict=True)
        if slopes is not None
    )


def check_pairs(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, targets: Tensor, what: str
) -> str | None:
    """Raise Unsound if a function broadcasts targets against outputs.

    Returns:
        A doubt about a function that cannot be watched, such as one of NumPy, or None.
    """
    most = min(SAMPLE, NUMBERS // max(outputs[0].numel(), targets[0].numel(), 1))
    number = sample_size((outputs.shape, targets.shape), most)
    if number is None:
        return None
    index = torch.arange(number) % len(outputs)

    def number_of(outputs: Tensor, targets: Tensor) -> float:
        return float(function(outputs, targets))  # type: ignore[arg-type]  # a Tensor, or refused

    def value(outputs: Tensor, targets: Tensor) -> float:
        with seeded(0, 0, "", "pairs"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return number_of(outputs.clone(), targets.clone())

    try:
        with seeded(0, 0, "", "pairs"):
            pairing = watched(number_of, outputs[index], targets[index])
    except Exception:  # noqa: BLE001  # the user's own code may raise anything
        pairing = Pairing()
    if pairing.broadcasts:
        raise Unsound(shapes(f"{what} broadcasts targets against outputs", outputs, targets))
    if not pairing.explicit and not pairing.leaves_torch:
        return None
    try:
        doubtful = _ignores_pairs(value, outputs, targets)
    except Exception:  # noqa: BLE001  # other checks report what raises
        return None
    doubt = f"{what} does not depend on which target belongs to which output"
    return shapes(doubt, outputs, targets) if doubtful else None


def _ignores_pairs(of: Callable[[Tensor, Tensor], float], outputs: Tensor, targets: Tensor) -> bool:
    """Whether a function has the same value for every order of the targets.

    Outputs and targets have shapes that only differ by dimensions of size 1.
    """
    if outputs.shape == targets.shape or outputs.numel() != targets.numel() or len(outputs) < 2:
        return False
    if bool((outputs == outputs[:1]).all()) or bool((targets == targets[:1]).all()):
        return False
    value = of(outputs, targets)
    differs = (targets != targets[:1]).reshape(len(targets), -1).any(dim=1)
    first, other = targets[:1], targets[differs.nonzero()[0]]
    change = of(outputs, first.expand_as(targets)) - of(outputs, other.expand_as(targets))
    if abs(change) <= 100 * EQUAL * abs(value):
        return False  # it hardly depends on the targets
    limit = EQUAL * max(abs(value), EQUAL)
    orders = [torch.roll(targets, shift, dims=0) for shift in range(1, ORDERS + 1)]
    return all(abs(of(outputs, order) - value) <= limit for order in orders)
