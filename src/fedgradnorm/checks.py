"""Whether settings, clients and engine fit, and whether a run may be resumed with them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgradnorm import identity
from fedgradnorm.config import RunConfig, dotted
from fedgradnorm.errors import ConfigError, FederationError, RunError
from fedgradnorm.federation import Federation, Members
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.runs.checkpoint import Checkpoint
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.summary import check_targets
from fedgradnorm.training import method_of

ARGUMENTS = {"on_round": ("rows",), "on_message": ("message",)}


def check_federation(federation: object) -> None:
    """Raise FederationError for an object of another class."""
    if not isinstance(federation, Federation):
        kind = type(federation).__name__
        raise FederationError(f"federation: expected a Federation, found {kind}")


def check_functions(**functions: object) -> None:
    """Raise ConfigError for what is neither None nor a function with the arguments of its name."""
    for name, function in functions.items():
        if function is None:
            continue
        arguments = ARGUMENTS.get(name, ())
        expected = f"{name}({', '.join(arguments)})"
        if not callable(function):
            raise ConfigError(f"{name}: expected a function {expected}, found {function!r:.100}")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some built-in functions have none
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{name}: expected a function that can be called as {expected}: {error}"
            ) from error


def check_settings(config: RunConfig, federation: Members) -> None:
    """Raise ConfigError or FederationError where the settings do not fit the clients."""
    check_targets(config.run, federation)
    for participants in config.train.participants:
        for client in participants:
            federation.client(client)
    count, least = len(federation.clients), config.train.min_clients
    if least > count:
        raise ConfigError(f"train.min_clients: expected at most the {count} clients, found {least}")
    _check_method(config, federation)


def _check_method(config: RunConfig, federation: Members) -> None:
    """Raise ConfigError where the settings ask for something that the method cannot do."""
    method, name = method_of(config.train), config.train.method.name
    if method.own_encoder and federation.buffers == "averaged":
        raise ConfigError(
            f"train.method: {name} exchanges nothing: "
            'expected model.buffers = "local", found "averaged"'
        )
    if method.lockstep and (config.train.fraction_train < 1 or config.train.participants):
        raise ConfigError(
            f"train.method: {name} trains on all data at every step: "
            "expected no fraction_train below 1 and no participants"
        )
    if method.lockstep and any(config.faults.model_dump().values()):
        raise ConfigError(
            f"train.method: {name} sends no reports that could meet faults: expected no [faults]"
        )


def refuse_lockstep(config: RunConfig) -> None:
    """Raise ConfigError for a method whose server steps after each of the clients' steps.

    An engine that sends messages cannot run it.
    """
    if method_of(config.train).lockstep:
        raise ConfigError(
            f"train.method: {config.train.method.name} keeps all clients in lockstep, "
            "which only the simulation can do"
        )


def check_clients_here(config: RunConfig) -> None:
    """Raise ConfigError for the settings of a run whose clients are on other machines."""
    if config.run.experiment is not None:
        raise ConfigError(
            f"run.experiment: the clients of '{config.run.experiment}' are on other machines: "
            "to resume this run, start its Flower app again"
        )


def check_same(path: Path, before: MembersRecord, federation: Members, config: RunConfig) -> None:
    """Raise RunError where clients, tasks, models or data are not those that the run began with."""
    now = identity.members_record(federation, config.train.seed)
    comparisons = [identity.of_encoder, identity.of_fixed_tensors, identity.of_training]
    if config.run.experiment is None:
        comparisons += [identity.of_clients, identity.of_data, identity.of_models]
    for compare in comparisons:
        if (why := compare(before, now)) is not None:
            raise RunError(f"{path}: {why}")


def config_to_resume(
    run: Run, checkpoint: Checkpoint | None, done: int, num_rounds: int | None
) -> RunConfig:
    """The settings of a run, with the number of rounds that it is to have; None: as it has.

    Raises:
        ConfigError: the settings are not those of the checkpoint, or fewer rounds are asked for
            than are done.
    """
    table = run.config.run.model_copy(update={"dir": str(run.folder)})
    config = run.config.model_copy(update={"run": table})
    if checkpoint is not None:
        changed = changes(checkpoint.settings, config.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"{run.folder / 'config.toml'}: a run has to be resumed with the settings "
                f"that it began with; changed: {changed}"
            )
    wanted = config.train.num_rounds if num_rounds is None else num_rounds
    if wanted < max(done, 1):
        raise ConfigError(
            f"train.num_rounds: expected at least the {done} rounds that are done, found {wanted}"
        )
    train = config.train.model_copy(update={"num_rounds": wanted})
    return config.model_copy(update={"train": train})


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """In words, which settings differ that have to stay when a run is resumed.

    These are all but those of its folder and the number of rounds.
    """
    then, now = (dotted({**settings, "run": {}, "versions": {}}) for settings in (before, after))
    differing = sorted(
        key
        for key in then.keys() | now.keys()
        if then.get(key) != now.get(key) and key != "train.num_rounds"
    )
    return ", ".join(f"{key} = {now.get(key)} (was {then.get(key)})" for key in differing)
