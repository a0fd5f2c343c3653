"""Who trains what on which data: what has to be the same when a run is resumed, or its models are tested."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import Data, size, take
from fedgradnorm.federation import Client, Federation, Members, names_in
from fedgradnorm.modules import held_tensors, load_held
from fedgradnorm.parameters import norm_layer_slices, trainable
from fedgradnorm.randomness import seeded
from fedgradnorm.runs.records import ClientRecord, DataRecord, MembersRecord, ModelRecord, Sketch

__all__ = [
    "data_record",
    "members_record",
    "of_clients",
    "of_data",
    "of_encoder",
    "of_fixed_tensors",
    "of_models",
    "of_training",
    "same_data",
]

SAMPLE = 8
"""Examples of a client's data that are looked at."""

GROUPS = 4
"""Groups of columns, at most, of which a sketch has numbers."""

DIGITS = 5
"""Digits of a sketch's numbers after the point."""

MODELS = 64
"""Clients of which the models are looked at."""

CLOSE = 1e-3
"""Numbers that differ by less than this share of their scale are the same: data that another machine computes differ by rounding."""

SKETCH_SCALE, WHOLE_SCALE = 3.0, 0.1
"""Scales of the numbers in a sketch of examples, and of all targets."""

NEGLIGIBLE = 1e-7
"""A column whose numbers are below this share of those of the middle one is rounding."""


def members_record(members: Members, seed: int, *, with_data: bool = True) -> MembersRecord:
    """Who trains what, as far as it is known here: of clients on other machines neither head nor data is.

    Args:
        members: the clients.
        seed: of the encoder's initialisation.
        with_data: whether the data are to be looked at, which loads them.
    """
    encoder = members.make_encoder(seed)
    trained = {name for name, _ in trainable(encoder)} | {
        name for name, _ in encoder.named_buffers()
    }
    fixed = {
        name: list(_means(tensor[None]))
        for name, tensor in held_tensors(encoder).items()
        if name not in trained
    }
    record: MembersRecord = {
        "encoder": members.layout,
        "fixed": fixed,
        "clients": {},
        "buffers": members.buffers,
    }
    looked_at = set(sorted(members.client_ids)[:MODELS])
    if isinstance(members, Federation):
        record["norm_layer"] = names_in(encoder, norm_layer_slices(encoder, members.norm_layer))
        record["modules"] = _class_names(encoder)
        start = {name: tensor.clone() for name, tensor in held_tensors(encoder).items()}
        for client in members.clients:
            record["clients"][client.id] = _record_here(
                members, client, with_data, encoder, start, client.id in looked_at
            )
    else:
        record["clients"] = {
            client.id: _record_elsewhere(members, client, with_data) for client in members.clients
        }
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
    }


def _record_here(
    federation: Federation,
    client: Client,
    with_data: bool,
    encoder: nn.Module,
    start: dict[str, Tensor],
    with_model: bool,
) -> ClientRecord:
    """The record of a client whose head and data are here. The encoder's tensors are set to ``start`` before it is used."""
    head = federation.make_head(client, 0)
    record = _record_elsewhere(federation, client, with_data)
    record |= {
        "head": [(name, tuple(tensor.shape)) for name, tensor in held_tensors(head).items()],
        "loss_floor": client.task.loss_floor,
        "modules": _class_names(head),
    }
    if with_data:
        record["train"], sample = _data_record(client.id, client.train_data)
        if client.test_data is not None:
            record["test"] = _data_record(client.id, client.test_data)[0]
        shared = (
            federation.encoders.shared or federation.heads_of(client).shared
        )  # what a user sets in such a module is state
        if with_model and sample is not None and not shared:
            load_held(encoder, start)
            record["model"] = _model_record(client, encoder, head, sample)
    return record


def _class_names(module: nn.Module) -> list[str]:
    """The names of the classes of a module's parts; of users' own classes none, for these may be renamed."""
    return [
        type(part).__name__ if type(part).__module__.startswith("torch.") else ""
        for part in module.modules()
    ]


def _data_record(client: str, data: Data) -> tuple[DataRecord, tuple[Tensor, Tensor] | None]:
    """The record, and the examples that it is of; None where no two looks at them are the same."""
    count = size(data)
    places = np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64))

    def sample() -> tuple[Tensor, Tensor]:
        with seeded(0, 0, client, "sample"):
            return take(data, places)

    examples = sample()
    sketches = [_sketch(part) for part in examples]
    if isinstance(data, tuple):
        return {"examples": count, "sample": sketches, "targets": _whole(data[1])}, examples
    if [_sketch(part) for part in sample()] != sketches:
        return {"examples": count, "sample": None}, None  # it draws numbers of its own
    return {"examples": count, "sample": sketches}, examples


def data_record(client: str, data: Data) -> DataRecord | None:
    """What a client's data are known by; None where an example that is looked at cannot be read."""
    try:
        return _data_record(client, data)[0]
    except Exception:  # noqa: BLE001  # the user's own code may raise anything
        return None


def same_data(then: DataRecord, now: DataRecord) -> bool:
    """Whether data have as many examples as before, and no difference shows in what they are known by."""
    return then["examples"] == now["examples"] and _other_part(then, now) is None


@torch.no_grad()
def _model_record(
    client: Client, encoder: nn.Module, head: nn.Module, sample: tuple[Tensor, Tensor]
) -> ModelRecord | None:
    """What the model and the loss give, in training mode and then with what that left in the buffers. None where they raise an error."""
    initial = [
        number for module in (encoder, head) for number in _of_all(held_tensors(module).values())
    ]
    record: ModelRecord = {"initial": initial, "features": [], "outputs": [], "losses": []}
    losses: list[float] = []
    with seeded(0, 0, client.id, "model"):
        try:
            for training in (True, False):
                encoder.train(training)
                head.train(training)
                features = encoder(sample[0].clone())
                record["features"].append(_sketch(features))
                outputs = head(features)
                record["outputs"].append(_sketch(outputs))
                losses.append(float(client.task.loss(outputs.clone(), sample[1].clone())))
            for place in range(len(outputs)):  # with a mean over several, a change can hide
                one = slice(place, place + 1)
                losses.append(float(client.task.loss(outputs[one].clone(), sample[1][one].clone())))
        except Exception:  # noqa: BLE001  # the user's own code may raise anything, such as BatchNorm for one example
            return None
    record["losses"] = losses if np.isfinite(losses).all() else None
    return record


def _of_all(tensors: Iterable[Tensor]) -> list[float]:
    """Two numbers for all the values of some tensors."""
    values = [_numbers(tensor[None])[0] for tensor in tensors]
    return list(_means(torch.cat(values)[None])) if values else []


def _means(part: Tensor) -> Iterator[float]:
    """Two numbers for each example: its mean, and one in which every place has a weight of its own."""
    values = _numbers(part)
    weights = torch.cos(torch.arange(values.shape[1], dtype=torch.float64))
    yield from values.mean(dim=1).nan_to_num().tolist()
    yield from ((values @ weights) / max(values.shape[1], 1)).tolist()


def _sketch(part: Tensor) -> Sketch:
    """Numbers around 1 for a few examples, in which a change of any column shows, whatever the scales of the others are.

    Of every column there are its deviations from its mean, relative to the largest, that mean and that deviation relative to the largest
    number, and the logarithm of the latter. The sketch has weighted sums of these over groups of columns.
    """
    values = _numbers(part)
    if values.numel() == 0:
        return []
    scales = values.abs().amax(dim=0)
    known = scales > NEGLIGIBLE * (scales[scales > 0].median() if (scales > 0).any() else 1.0)
    scales = scales.where(known, torch.ones_like(scales))
    relative = (values / scales).where(known, torch.zeros(()).double())
    centre = relative.mean(dim=0)
    spread = (relative - centre).abs().amax(dim=0)
    varied = spread > CLOSE
    deviations = ((relative - centre) / spread.where(varied, torch.ones_like(spread))).where(
        varied, torch.zeros(()).double()
    )
    rows = torch.cat([deviations, torch.stack([centre, spread, scales.log()])])
    weights = 1 + 0.5 * torch.cos(torch.arange(values.shape[1], dtype=torch.float64))
    groups = (rows * weights).tensor_split(min(GROUPS, values.shape[1]), dim=1)
    sums = torch.cat([group.sum(dim=1) / group.shape[1] ** 0.5 for group in groups])
    return [round(number, DIGITS) for number in sums.tolist()]


def _whole(targets: Tensor) -> Sketch:
    """Two sums over all targets, the second with other weights for every example, as shares of the sum of their magnitudes, and that."""
    if targets.is_complex():
        targets = torch.view_as_real(targets)
    sums = (
        targets.detach()
        .reshape(len(targets), -1)
        .sum(dim=1, dtype=torch.float64)
        .nan_to_num(0.0, 0.0, 0.0)
        .cpu()
    )
    total = max(float(sums.abs().sum()), 1e-300)
    weights = torch.cos(torch.arange(len(sums), dtype=torch.float64))
    return [float(sums.sum()) / total, float(sums @ weights) / total, float(np.log(total))]


def _numbers(part: Tensor) -> Tensor:
    """The numbers of some examples, a row for each; 0 for what is no finite number."""
    if part.is_complex():
        part = torch.view_as_real(part)
    return part.detach().cpu().double().reshape(len(part), -1).nan_to_num(0.0, 0.0, 0.0)


def of_encoder(before: MembersRecord, now: MembersRecord) -> str | None:
    """How the encoder's parameters differ, in words, or None."""
    for then, found in zip_longest(before["encoder"], now["encoder"]):
        if then != found:
            return f"the encoder has other parameters, or in another order, than when the run began: {found}, was {then}"
    if (why := _other_modules(before.get("modules"), now.get("modules"))) is not None:
        return f"the encoder {why}"
    return None


def of_fixed_tensors(before: MembersRecord, now: MembersRecord) -> str | None:
    """Which of the encoder's tensors that are not trained has other values, in words, or None."""
    for name in before["fixed"].keys() | now["fixed"].keys():
        then, found = before["fixed"].get(name), now["fixed"].get(name)
        if then is None or found is None or not _close(then, found):
            return f"the encoder's '{name}', which is not trained, has other values than when the run began"
    return None


def of_training(before: MembersRecord, now: MembersRecord) -> str | None:
    """Which parts of the federation that only training depends on differ, in words, or None."""
    if before.get("buffers", now.get("buffers")) != now.get("buffers"):
        return (
            f"buffers: the federation has '{now.get('buffers')}', and had '{before.get('buffers')}'"
        )
    then, found = before.get("norm_layer"), now.get("norm_layer")
    if then is not None and found is not None and then != found:
        return f"norm_layer: the federation has {', '.join(found)}, and had {', '.join(then)}"
    for id, client in before["clients"].items():
        floor = client.get("loss_floor")
        other = now["clients"][id].get("loss_floor") if id in now["clients"] else None
        if floor is not None and other is not None and floor != other:
            return f"client '{id}' has the loss_floor {other:g}, and had {floor:g}"
    return None


def of_clients(before: MembersRecord, now: MembersRecord) -> str | None:
    """How the clients, their tasks and their heads differ, in words, or None."""
    if before["clients"].keys() != now["clients"].keys():
        odd = sorted(before["clients"].keys() ^ now["clients"].keys())[0]
        return f"it belongs to other clients: '{odd}' is in one of the two alone"
    for id, then in before["clients"].items():
        found = now["clients"][id]
        if then["task"] != found["task"]:
            return f"client '{id}' has task '{found['task']}', and had '{then['task']}'"
        if (then["metric"], then["higher_is_better"]) != (
            found["metric"],
            found["higher_is_better"],
        ):
            return (
                f"client '{id}' has the main metric '{found['metric']}', and had '{then['metric']}'"
            )
        if then["head"] is not None and found["head"] is not None:
            for layer, other in zip_longest(then["head"], found["head"]):
                if layer != other:
                    return f"client '{id}' has another head: {other}, was {layer}"
        if (why := _other_modules(then.get("modules"), found.get("modules"))) is not None:
            return f"client '{id}' has another head: it {why}"
    return None


def _other_modules(then: Sequence[str] | None, found: Sequence[str] | None) -> str | None:
    if then is None or found is None:
        return None
    for place, (one, other) in enumerate(zip_longest(then, found)):
        if one != other:
            return f"has {_named(other)} as its module {place}, and had {_named(one)}"
    return None


def _named(kind: str | None) -> str:
    return "none" if kind is None else f"'{kind}'" if kind else "one of your own classes"


def of_data(before: MembersRecord, now: MembersRecord, *, test_only: bool = False) -> str | None:
    """How the data of the clients differ, in words, or None. What a data set draws anew at every look is not compared."""
    for id, then in before["clients"].items():
        found = now["clients"][id]
        for kind, one, other in (
            ("training", then["train"], found["train"]),
            ("test", then["test"], found["test"]),
        ):
            if test_only and kind == "training":
                continue
            if (
                (one is None) != (other is None)
                and then["train"] is not None
                and found["train"] is not None
            ):
                return f"client '{id}' has {'no' if other is None else 'now'} {kind} data"
            if one is None or other is None:
                continue
            if one["examples"] != other["examples"]:
                return f"client '{id}' has {other['examples']} {kind} examples, and had {one['examples']}"
            if (part := _other_part(one, other)) is not None:
                return f"client '{id}' has other {kind} data of the same size: the {part} differ"
    return None


def _other_part(one: DataRecord, other: DataRecord) -> str | None:
    """Which part of some data of the same size differs, or None."""
    if one["sample"] is not None and other["sample"] is not None:
        for part, then, found in zip(
            ("inputs", "targets"), one["sample"], other["sample"], strict=True
        ):
            if not _close(then, found, SKETCH_SCALE):
                return part
    then_all, now_all = one.get("targets"), other.get("targets")
    return (
        "targets"
        if then_all is not None
        and now_all is not None
        and not _close(then_all, now_all, WHOLE_SCALE)
        else None
    )


def of_models(before: MembersRecord, now: MembersRecord) -> str | None:
    """Whose model or loss gives other numbers for the same examples, in words, or None.

    Models that are initialised in another way are not compared, for a run that goes on has its own parameters.
    """
    for id, record in before["clients"].items():
        other = now["clients"][id]
        then, found = record.get("model"), other.get("model")
        one_train, other_train = record["train"], other["train"]
        if then is None or found is None or one_train is None or other_train is None:
            continue
        if (
            _other_part(one_train, other_train) is not None
            or one_train["examples"] != other_train["examples"]
        ):
            continue
        if not _close(then["initial"], found["initial"]):
            continue
        for part, what in (("features", "encoder"), ("outputs", "head")):
            for mode, one, two in zip(
                ("training", "evaluation"),
                then[part],  # type: ignore[literal-required]
                found[part],  # type: ignore[literal-required]
                strict=True,
            ):
                if not _close(one, two, SKETCH_SCALE):
                    whose = (
                        "the encoder is another one"
                        if what == "encoder"
                        else f"client '{id}' has another head"
                    )
                    return f"{whose}: in {mode} mode it gives other {part} for the same examples of client '{id}'"
        if (
            then["losses"] is not None
            and found["losses"] is not None
            and not _close(then["losses"], found["losses"])
        ):
            return (
                f"client '{id}' has another loss: for the same outputs and targets it is {_listed(found['losses'])}, "
                f"and was {_listed(then['losses'])}"
            )
    return None


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def _close(one: Sequence[float], other: Sequence[float], scale: float | None = None) -> bool:
    """Whether numbers are the same but for rounding, by this scale or that of the largest of them."""
    if len(one) != len(other):
        return False
    if scale is None:
        scale = max((abs(number) for number in (*one, *other)), default=0.0)
    return all(abs(a - b) <= CLOSE * scale for a, b in zip(one, other, strict=True))
