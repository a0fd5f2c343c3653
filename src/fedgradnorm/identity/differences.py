"""How two records of a federation differ, in words, for the message of an error."""

from collections.abc import Sequence
from itertools import zip_longest

from fedgradnorm.identity.records import ClientRecord, DataRecord, MembersRecord, ModelRecord
from fedgradnorm.identity.sketches import SKETCH_SCALE, WHOLE_SCALE, is_close


def of_encoder(before: MembersRecord, now: MembersRecord) -> str | None:
    """How the encoder's parameters or modules differ, or None."""
    for old, new in zip_longest(before["encoder"], now["encoder"]):
        if old != new:
            text = "the encoder has other parameters, or in another order, than when the run began"
            return f"{text}: {new}, was {old}"
    why = _other_modules(before["modules"], now["modules"])
    return None if why is None else f"the encoder {why}"


def of_fixed_tensors(before: MembersRecord, now: MembersRecord) -> str | None:
    """Which of the encoder's tensors that are not trained has other values, or None."""
    for name in before["fixed"].keys() | now["fixed"].keys():
        old, new = before["fixed"].get(name), now["fixed"].get(name)
        if old is None or new is None or not is_close(old, new):
            what = f"the encoder's '{name}', which is not trained"
            return f"{what}, has other values than when the run began"
    return None


def of_training(before: MembersRecord, now: MembersRecord) -> str | None:
    """Which part of the federation that only matters for training differs, or None."""
    if before["buffers"] != now["buffers"]:
        return f"buffers: the federation has '{now['buffers']}', and had '{before['buffers']}'"
    old, new = before["norm_layer"], now["norm_layer"]
    if old is not None and new is not None and old != new:
        return f"norm_layer: the federation has {', '.join(new)}, and had {', '.join(old)}"
    for id, client in before["clients"].items():
        floor = client["loss_floor"]
        other = now["clients"][id]["loss_floor"] if id in now["clients"] else None
        if floor is not None and other is not None and floor != other:
            return f"client '{id}' has the loss_floor {other:g}, and had {floor:g}"
    return None


def of_clients(before: MembersRecord, now: MembersRecord) -> str | None:
    """How the clients, their tasks or their heads differ, or None."""
    if odd := before["clients"].keys() ^ now["clients"].keys():
        return f"it belongs to other clients: '{min(odd)}' is in one of the two alone"
    for id, old in before["clients"].items():
        if (why := _other_client(old, now["clients"][id])) is not None:
            return f"client '{id}' {why}"
    return None


def _other_client(old: ClientRecord, new: ClientRecord) -> str | None:
    """How the task or the head of a client differs, or None."""
    if old["task"] != new["task"]:
        return f"has task '{new['task']}', and had '{old['task']}'"
    metrics = [(client["metric"], client["higher_is_better"]) for client in (old, new)]
    if metrics[0] != metrics[1]:
        return f"has the main metric '{new['metric']}', and had '{old['metric']}'"
    if old["head"] is not None and new["head"] is not None:
        for layer, other in zip_longest(old["head"], new["head"]):
            if layer != other:
                return f"has another head: {other}, was {layer}"
    why = _other_modules(old["modules"], new["modules"])
    return None if why is None else f"has another head: it {why}"


def _other_modules(old: Sequence[str] | None, new: Sequence[str] | None) -> str | None:
    if old is None or new is None:
        return None
    for place, (kind, other) in enumerate(zip_longest(old, new)):
        if kind != other:
            return f"has {_named(other)} as its module {place}, and had {_named(kind)}"
    return None


def _named(kind: str | None) -> str:
    return "none" if kind is None else f"'{kind}'" if kind else "one of your own classes"


def of_data(before: MembersRecord, now: MembersRecord, *, test_only: bool = False) -> str | None:
    """How the clients' data differ, or None. Data that are drawn anew at every look are skipped."""
    for id, old in before["clients"].items():
        new = now["clients"][id]
        both_known = old["train"] is not None and new["train"] is not None
        pairs = [("training", old["train"], new["train"]), ("test", old["test"], new["test"])]
        for kind, data, other in pairs[1:] if test_only else pairs:
            if data is None or other is None:
                if data is not other and both_known:
                    return f"client '{id}' has {'no' if other is None else 'now'} {kind} data"
            elif (had := data["examples"]) != (has := other["examples"]):
                return f"client '{id}' has {has} {kind} examples, and had {had}"
            elif (part := _other_part(data, other)) is not None:
                return f"client '{id}' has other {kind} data of the same size: the {part} differ"
    return None


def same_data(old: DataRecord, new: DataRecord) -> bool:
    """Whether two records have the same number of examples and show no difference."""
    return old["examples"] == new["examples"] and _other_part(old, new) is None


def _other_part(old: DataRecord, new: DataRecord) -> str | None:
    """Which part of two data sets of one size differs, or None."""
    if old["sample"] is not None and new["sample"] is not None:
        pairs = zip(old["sample"], new["sample"], strict=True)
        for part, (before, now) in zip(("inputs", "targets"), pairs, strict=True):
            if not is_close(before, now, SKETCH_SCALE):
                return part
    all_old, all_new = old["targets"], new["targets"]
    if all_old is None or all_new is None or is_close(all_old, all_new, WHOLE_SCALE):
        return None
    return "targets"


def of_models(before: MembersRecord, now: MembersRecord) -> str | None:
    """Whose model or loss gives other numbers for the same examples, or None.

    Models that are initialised differently are skipped: a resumed run has its own parameters.
    """
    for id, record in before["clients"].items():
        other = now["clients"][id]
        old, new = record["model"], other["model"]
        data, other_data = record["train"], other["train"]
        if old is None or new is None or data is None or other_data is None:
            continue
        comparable = same_data(data, other_data) and is_close(old["initial"], new["initial"])
        if comparable and (why := _other_model(id, old, new)) is not None:
            return why
    return None


def _other_model(id: str, old: ModelRecord, new: ModelRecord) -> str | None:
    """How the model or the loss of a client differs, or None."""
    for part, numbers, others, whose in (
        ("features", old["features"], new["features"], "the encoder is another one"),
        ("outputs", old["outputs"], new["outputs"], f"client '{id}' has another head"),
    ):
        for mode, row, other in zip(("training", "evaluation"), numbers, others, strict=True):
            if not is_close(row, other, SKETCH_SCALE):
                where = f"in {mode} mode it gives other {part} for the same examples"
                return f"{whose}: {where} of client '{id}'"
    losses, others_losses = old["losses"], new["losses"]
    if losses is None or others_losses is None or is_close(losses, others_losses):
        return None
    now, was = (", ".join(f"{loss:.4g}" for loss in found) for found in (others_losses, losses))
    what = f"client '{id}' has another loss: for the same outputs and targets"
    return f"{what} it is {now}, and was {was}"
