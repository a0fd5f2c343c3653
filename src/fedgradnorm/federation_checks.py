"""Whether the parts of a federation fit together. Every check raises a FederationError."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedgradnorm import modules
from fedgradnorm.errors import FederationError, described, warn
from fedgradnorm.members import Client
from fedgradnorm.modules import Source
from fedgradnorm.parameters import names_in, norm_layer_slices, trainable
from fedgradnorm.task import Task


def listed(clients: object) -> tuple[Client, ...]:
    """The clients as a tuple. Refuses anything but an iterable of at least one `Client`."""
    expected = "clients: expected a list of Client, found"
    if not isinstance(clients, Iterable) or isinstance(clients, Mapping | str):
        raise FederationError(f"{expected} {type(clients).__name__}")
    members = tuple(clients)
    for place, client in enumerate(members):
        if not isinstance(client, Client):
            raise FederationError(f"{expected} {type(client).__name__} at place {place}")
    if not members:
        raise FederationError("a federation needs at least one client")
    return members


def check_ids(ids: Sequence[str]) -> None:
    """Refuse ids that are equal, or that differ in case only: files are named by them."""
    known: dict[str, str] = {}
    for id in ids:
        other = known.setdefault(id.lower(), id)
        if other != id:
            expected = "expected ids that name different files on every system"
            raise FederationError(f"the ids '{other}' and '{id}' differ by case only: {expected}")
    if len(known) < len(ids):
        twice = next(id for place, id in enumerate(ids) if id in ids[:place])
        raise FederationError(f"two clients have the id '{twice}': expected different ids")


def check_factory(encoder: object) -> None:
    """Refuse an encoder that is a module, or cannot be called."""
    is_module = isinstance(encoder, nn.Module)
    if is_module or not callable(encoder):
        hint = "; for a trained one: encoder=lambda: module" if is_module else ""
        expected = "expected a function that makes the encoder"
        raise FederationError(f"encoder: {expected}, found {type(encoder).__name__}{hint}")


def check_example(example: object) -> None:
    """Refuse anything but None or one input as a batch of one."""
    if example is None or (isinstance(example, Tensor) and example.shape[:1] == (1,)):
        return
    found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
    expected = "expected one input as a batch of one, of shape (1, ...)"
    raise FederationError(f"example: {expected}, found {found}")


def check_tasks(clients: Sequence[Client]) -> None:
    """Refuse tasks of one name with different metrics."""
    tasks: dict[str, Task] = {}
    for client in clients:
        first = tasks.setdefault(client.task.name, client.task)
        pair = first.metrics, client.task.metrics
        kinds = [[(metric.name, metric.higher_is_better) for metric in metrics] for metrics in pair]
        if kinds[0] != kinds[1]:
            text = f"two tasks with different metrics have the name '{client.task.name}'"
            raise FederationError(f"client '{client.id}': {text}")


def check_types(encoder: nn.Module) -> None:
    """Refuse an encoder without trainable parameters, or with parameters of several types."""
    kinds = {str(parameter.dtype).removeprefix("torch.") for _, parameter in trainable(encoder)}
    if len(kinds) > 1:
        found = f"found {' and '.join(sorted(kinds))}: encoder.float() makes them alike"
        raise FederationError(f"encoder: expected trainable parameters of one type, {found}")
    if not kinds:
        found = "it has no parameters"
        if list(encoder.parameters()):
            found = "all parameters are frozen: requires_grad_(True) lets them be trained"
        raise FederationError(f"encoder: expected trainable parameters, and {found}")


def check_memory(module: nn.Module, what: str) -> None:
    """Refuse tensors that share memory, unless they are one parameter, and hooks that never run."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and modules.overlaps_itself(parameter):
            text = f"several numbers of '{name}' lie in the same memory"
            raise FederationError(f"{what}: {text}: expected a parameter of its own, .clone()")
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            text = f"'{name}' has a hook after its gradient is accumulated, which never runs here"
            raise FederationError(f"{what}: {text}: take it off")
    if (names := modules.shared_memory(module)) is not None:
        text = f"'{names[0]}' and '{names[1]}' share memory, and would be trained as two"
        hint = "use one parameter in both places, or compute one from the other in forward()"
        raise FederationError(f"{what}: {text}: {hint}")


def check_copied(source: Source, key: object, example: Tensor) -> None:
    """Refuse a factory that gives one module again and again, if its copies read that module."""
    original, copy = source.original(key), source.make(key).eval()
    with torch.no_grad():
        if modules.reads_tensors_of(original, lambda: copy(example)):
            text = "its factory gives the same module again and again"
            why = "a copy of it still reads the original, by a hook or a stored function"
            hint = "let every call make a new one"
            raise FederationError(f"{source.what}: {text}, and {why}: {hint}")


def check_ties(what: str, encoder: nn.Module, head: nn.Module, features: Tensor) -> None:
    """Refuse a head that has or reads tensors of the encoder.

    Args:
        what: names the head in errors.
        encoder: the encoder that the factory gives, not a copy.
        head: the head that the factory gives, not a copy.
        features: the encoder's output for a batch of one.
    """
    with torch.no_grad():
        tied = modules.have_memory_in_common(encoder, head)
        if tied or modules.reads_tensors_of(encoder, lambda: head.eval()(features)):
            text = "it has or reads a tensor of the encoder, of which every client trains copies"
            expected = "expected a head with tensors of its own, which gets the encoder's output"
            raise FederationError(f"{what}: {text}: {expected}")


@torch.no_grad()
def encoded(encoder: nn.Module, inputs: Tensor) -> Tensor:
    """The encoder's output in evaluation mode. Raises TypeError if it is not a tensor."""
    output = encoder.eval()(inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"expected the encoder to give a tensor, found {type(output).__name__}")
    return output


def features_of(client: Client, encoder: nn.Module, example: Tensor) -> Tensor:
    """The features of an example of a client, shape ``(1, features, ...)``."""
    try:
        features = encoded(encoder, example)
    except Exception as error:  # the user's own code may raise anything
        reason = f"its inputs do not pass through the encoder one at a time: {described(error)}"
        raise FederationError(f"client '{client.id}': {reason}") from error
    if features.ndim < 2:
        shape = f"the encoder gives shape {tuple(features.shape)} for a batch of one"
        raise FederationError(f"{shape}, expected (1, features)")
    return features


def output_of(client: Client, head: nn.Module, features: Tensor) -> Tensor:
    """The output of a client's head for the features of one example, shape ``(1, ...)``."""
    try:
        with torch.no_grad():
            output = head.eval()(features)
    except Exception as error:  # the user's own code may raise anything
        text = f"the encoder's output of shape {tuple(features.shape)} does not fit its head"
        raise FederationError(f"client '{client.id}': {text}: {described(error)}") from error
    if not isinstance(output, Tensor):
        found = type(output).__name__
    elif output.ndim == 0 or len(output) != 1:
        found = f"shape {tuple(output.shape)}"
    else:
        return output
    expected = "expected outputs of shape (1, ...) for a batch of one"
    raise FederationError(f"client '{client.id}': head: {expected}, found {found}")


def check_reached(
    encoder: nn.Module, norm_layer: str | Sequence[str] | None, reached: Mapping[str, Sequence[str]]
) -> None:
    """Refuse a norm layer that no gradient reaches, and warn if one client's does not.

    ``reached`` has, by client, the names of the parameters that its loss has a gradient for.
    """
    layer = names_in(encoder, norm_layer_slices(encoder, norm_layer))
    without = [id for id, names in reached.items() if not set(layer) & set(names)]
    if len(without) == len(reached):
        any_client = set().union(*reached.values())
        matrices = [name for name, parameter in trainable(encoder) if parameter.ndim >= 2]
        used = [name for name in matrices if name in any_client]
        hint = f", such as '{used[-1].rpartition('.')[0] or used[-1]}'" if used else ""
        text = f"no gradient reaches '{layer[0]}' from any client"
        raise FederationError(f"norm_layer: {text}; name another layer{hint}")
    for id in without:
        text = f"no gradient reaches the norm layer, '{layer[0]}', from it"
        warn(f"client '{id}': {text}: FedGradNorm leaves its weight as it is")


def check_measures(clients: Sequence[Client], failed: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a metric that fails for all clients of its task, and warn of others that fail.

    ``failed`` has, by client and metric, why the metric cannot be computed on its test data.
    """
    tasks = {client.id: client.task.name for client in clients}
    tested = [client.id for client in clients if client.test is not None]
    for id, reasons in failed.items():
        for metric, why in reasons.items():
            text = f"client '{id}': metric '{metric}' cannot be taken of its test data"
            alike = [other for other in tested if tasks[other] == tasks[id]]
            if all(metric in failed[other] for other in alike):
                raise FederationError(f"{text}: {why}")
            warn(f"{text}, and will be missing: {why}")
