"""Heads and data are in no message: every one is read, both ways."""

import pytest
import torch
from flwr.app import ArrayRecord

from fedgradnorm.flower import FedGradNorm
from fedgradnorm.flower.messages import Control, Greeting
from fedgradnorm.flower.states import MemoryStates
from tests.flower.nodes import Site, Wire
from tests.flower.own_app import Net, app_with, data_of
from tests.helpers import batch_norm_encoder, small_federation

DOWN = {"arrays", "buffers", "config", "fedgradnorm"}
UP = {"arrays", "buffers", "metrics", "fedgradnorm"}
NUMBERS = {
    "loss",
    "initial-loss",
    "loss-floor",
    "grad-norm",
    "num-examples",
    "seconds",
    "head-seconds",
}


def check_keys(messages, parameters, buffers=()):
    """Check that messages have only the documented records and keys; count them by kind."""
    kinds = dict.fromkeys(("down", "hello", "report", "evaluation"), 0)
    for one in messages:
        content, control = one.content, set(one.content["fedgradnorm"])
        if not one.metadata.reply_to_message_id:
            kind = "down"
            assert set(content) <= DOWN
            assert control | {"initial_loss"} == set(
                Control.model_fields
            )  # which the client has said before
            assert set(content["config"]) <= {"server-round", "lr"}
        elif "metrics" not in content:
            kind = "hello"
            assert set(content) == {"fedgradnorm"}
            assert control == set(Greeting.model_fields)
        else:
            kind = "report" if "arrays" in content else "evaluation"
            assert set(content) <= UP
            assert control == {"client", "task", "round"} | (
                {"metrics", "failed"} if kind == "evaluation" else set()
            )
            assert set(content["metrics"]) == (
                NUMBERS if kind == "report" else {"loss", "num-examples"}
            )
            assert kind == "evaluation" or set(content["arrays"]) == set(parameters)
        if "arrays" in content:
            assert set(content["arrays"]) in (set(parameters), set())
        if "buffers" in content:
            assert set(content["buffers"]) == set(buffers)
        kinds[kind] += 1
    return kinds


def traces(tensors):
    """Bytes that give a tensor away: of the whole, and of every row of at least four numbers."""
    for tensor in tensors:
        for copy in (
            tensor.contiguous(),
            tensor.double().contiguous(),
            tensor.double().float().contiguous(),
        ):
            yield copy.numpy().tobytes()
            if copy.ndim > 1 and copy[0].numel() >= 4:
                yield from (row.numpy().tobytes() for row in copy)


def found(tensors, sent):
    return [
        trace for trace in traces(tensors) if len(trace) >= 8 and any(trace in one for one in sent)
    ]


@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_no_head_and_no_data_in_any_message_of_a_federation(buffers):
    federation = small_federation(encoder=batch_norm_encoder, buffers=buffers)
    site, private = Site(federation), []

    def note(_):
        for store in site.stores.values():
            for state in store.by_round.values():
                private.extend([*state.head.values(), *state.head_velocity.values()])
                if buffers == "local":
                    private.extend(value for value in state.encoder_buffers.values() if value.ndim)

    for client in federation.clients:
        private += [
            *federation.make_head(client, 0).state_dict().values(),
            *client.train_data,
            *client.test_data,
        ]
    result = site.train(num_rounds=4, head_momentum=0.9, on_round=note)
    encoder = federation.make_encoder(0)
    shared = [name for name, _ in encoder.named_buffers()] if buffers == "averaged" else []
    kinds = check_keys(site.wire.messages, [name for name, _ in encoder.named_parameters()], shared)
    assert kinds == {"down": 3 + 12 + 9, "hello": 3, "report": 12, "evaluation": 9}
    assert len(private) > 50
    assert found([value.detach() for value in private], site.wire.sent) == []
    with torch.no_grad():
        assert found(list(encoder.parameters()), site.wire.sent)  # what is sent is found
    assert result.state.round == 4


def test_no_head_and_no_data_in_any_message_of_a_users_own_app():
    stores = {f"client-{part}": MemoryStates() for part in range(3)}
    wire, private = Wire(), []
    for part in range(3):
        wire.join(
            10 + part,
            app_with(states=lambda _context, _experiment, client: stores[client]),
            **{"partition-id": part},
        )
        private += data_of(part)

    def note(_):
        private.extend(
            value
            for store in stores.values()
            for state in store.by_round.values()
            for value in state.head.values()
        )
        return False

    FedGradNorm(head="head", min_nodes=3, node_timeout=0).start(
        wire, ArrayRecord(Net().state_dict()), num_rounds=4, should_stop=note
    )
    shared = ["body.weight", "body.bias", "norm.weight", "norm.bias"]
    assert check_keys(wire.messages, shared) == {
        "down": 3 + 12 + 12,
        "hello": 3,
        "report": 12,
        "evaluation": 12,
    }
    assert len(private) > 50
    assert found([value for value in private if value.ndim], wire.sent) == []
    first = next(one for one in wire.messages if one.content.array_records.get("arrays"))
    assert found([torch.from_numpy(first.content["arrays"]["body.weight"].numpy())], wire.sent)
