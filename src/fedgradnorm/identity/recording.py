"""Records of who trains what on which data."""

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import Data, size, take
from fedgradnorm.federation import Client, Federation, Members
from fedgradnorm.identity.records import ClientRecord, DataRecord, MembersRecord, ModelRecord
from fedgradnorm.identity.sketches import means, of_all, sketch, whole
from fedgradnorm.modules import held_tensors, load_held
from fedgradnorm.parameters import names_in, norm_layer_slices, trainable
from fedgradnorm.randomness import seeded

SAMPLE = 8
"""The number of a client's examples that a record is made from."""

MODELS = 64
"""The number of clients whose models are recorded."""


def members_record(members: Members, seed: int, *, with_data: bool = True) -> MembersRecord:
    """Who trains what, as far as it is known here: not the heads and data on other machines.

    Args:
        members: the clients.
        seed: of the encoder's initialisation.
        with_data: whether the data are recorded too, which loads them.
    """
    encoder = members.make_encoder(seed)
    trained = {name for name, _ in (*trainable(encoder), *encoder.named_buffers())}
    start = {name: tensor.clone() for name, tensor in held_tensors(encoder).items()}
    record: MembersRecord = {
        "encoder": members.layout,
        "fixed": {name: list(means(start[name][None])) for name in start if name not in trained},
        "clients": {},
        "buffers": members.buffers,
        "norm_layer": None,
        "modules": None,
    }
    if not isinstance(members, Federation):
        for client in members.clients:
            record["clients"][client.id] = _record_elsewhere(members, client, with_data)
        return record
    record["norm_layer"] = names_in(encoder, norm_layer_slices(encoder, members.norm_layer))
    record["modules"] = _class_names(encoder)
    with_model = set(sorted(members.client_ids)[:MODELS])
    for client in members.clients:
        head = members.make_head(client, 0)
        known, sample = _record_here(members, client, head, with_data)
        # what a user sets in a shared module is state, and not compared
        shared = members.encoders.shared or members.heads_of(client).shared
        if client.id in with_model and sample is not None and not shared:
            load_held(encoder, start)
            known["model"] = _model_record(client, encoder, head, sample)
        record["clients"][client.id] = known
    return record


def _record_elsewhere(members: Members, client: Client, with_data: bool) -> ClientRecord:
    metric = client.task.main_metric
    return {
        "task": client.task.name,
        "metric": "" if metric is None else metric.name,
        "higher_is_better": metric is None or metric.higher_is_better,
        "percent": metric is not None and metric.percent,
        "examples": members.num_examples(client.id) if with_data else 0,
        "head": None,
        "train": None,
        "test": None,
        "loss_floor": None,
        "modules": None,
        "model": None,
    }


def _record_here(
    federation: Federation, client: Client, head: nn.Module, with_data: bool
) -> tuple[ClientRecord, tuple[Tensor, Tensor] | None]:
    """The record of a client whose head and data are here, and the examples that were looked at."""
    record, sample = _record_elsewhere(federation, client, with_data), None
    record["head"] = [(name, tuple(tensor.shape)) for name, tensor in held_tensors(head).items()]
    record["loss_floor"] = client.task.loss_floor
    record["modules"] = _class_names(head)
    if with_data:
        record["train"], sample = _data_record(client.id, client.train_data)
        if client.test_data is not None:
            record["test"] = _data_record(client.id, client.test_data)[0]
    return record, sample


def _class_names(module: nn.Module) -> list[str]:
    """The class names of a module's parts; empty for users' own classes, which may be renamed."""
    classes = [type(part) for part in module.modules()]
    return [kind.__name__ if kind.__module__.startswith("torch.") else "" for kind in classes]


def _data_record(client: str, data: Data) -> tuple[DataRecord, tuple[Tensor, Tensor] | None]:
    """The record, and the examples it was made from; None if they differ at every look."""
    count = size(data)
    places = np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64))

    def sample() -> tuple[Tensor, Tensor]:
        with seeded(0, 0, client, "sample"):
            return take(data, places)

    examples = sample()
    sketches = [sketch(part) for part in examples]
    if isinstance(data, tuple):
        return {"examples": count, "sample": sketches, "targets": whole(data[1])}, examples
    if [sketch(part) for part in sample()] != sketches:
        return {"examples": count, "sample": None, "targets": None}, None  # it draws random numbers
    return {"examples": count, "sample": sketches, "targets": None}, examples


def data_record(client: str, data: Data) -> DataRecord | None:
    """The record of a client's data; None if an example cannot be read."""
    try:
        return _data_record(client, data)[0]
    except Exception:  # noqa: BLE001  # the user's own code may raise anything
        return None


@torch.no_grad()
def _model_record(
    client: Client, encoder: nn.Module, head: nn.Module, sample: tuple[Tensor, Tensor]
) -> ModelRecord | None:
    """What the model and the loss give for a sample; None if they raise an error.

    They are called in training mode, and then in evaluation mode with the buffers as they are then.
    """
    initial = [*of_all(held_tensors(encoder).values()), *of_all(held_tensors(head).values())]
    record: ModelRecord = {"initial": initial, "features": [], "outputs": [], "losses": []}
    losses: list[float] = []
    inputs, targets = sample
    with seeded(0, 0, client.id, "model"):
        try:
            for training in (True, False):
                features = encoder.train(training)(inputs.clone())
                record["features"].append(sketch(features))
                outputs = head.train(training)(features)
                record["outputs"].append(sketch(outputs))
                losses.append(float(client.task.loss(outputs.clone(), targets.clone())))
            for place in range(len(outputs)):  # a mean over several can hide a change
                pair = outputs[place : place + 1].clone(), targets[place : place + 1].clone()
                losses.append(float(client.task.loss(*pair)))
        except Exception:  # noqa: BLE001  # the user's own code may raise anything
            return None
    record["losses"] = losses if np.isfinite(losses).all() else None
    return record
