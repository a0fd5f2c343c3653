"""The mod: what it does to a user's own app, held against the same training written out."""

import re
from functools import partial

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from torch import nn

from fedgradnorm import ConfigError, Equal, StoppedError
from fedgradnorm.errors import FedGradNormError, MessageError
from fedgradnorm.flower import FedGradNorm, FedGradNormMod
from fedgradnorm.flower.messages import Control, refusal_in
from fedgradnorm.flower.states import MemoryStates, StateFiles
from fedgradnorm.randomness import seeded
from tests.flower.nodes import changed, in_round, lost, raising, untouched
from tests.flower.own_app import (
    SHARED,
    Net,
    Own,
    app_with,
    data_of,
    direct,
    initial,
    net_of,
    spoil,
    trained,
    values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::fedgradnorm.FedGradNormWarning"
)  # of clients that are lost here on purpose


def first_model(part):
    """A client's model in its first round: the server's encoder, and its own head."""
    with seeded(0, 0, f"client-{part}", "head"):
        model = Net(3 if part == 2 else 2)
    shared = initial().to_torch_state_dict()
    model.load_state_dict({**model.state_dict(), **{name: shared[name] for name in SHARED}})
    return model


def test_one_client_trains_as_if_there_were_no_federation():
    own = Own(parts=(2,))
    result = own.start(4)
    model = first_model(2)
    losses = [trained(model, 2) for _ in range(4)]
    for name in SHARED:
        torch.testing.assert_close(
            torch.from_numpy(result.arrays[name].numpy()), model.state_dict()[name]
        )
    head = own.stores["client-2"].load(4).head
    assert set(head) == {
        "head.weight",
        "head.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    for name, value in head.items():
        torch.testing.assert_close(value, model.state_dict()[name])
    found = [result.train_metrics_clientapp[round] for round in range(1, 5)]
    assert [one["loss"] for one in found] == pytest.approx(losses)
    assert [one["inverse_training_rate"] for one in found] == pytest.approx(
        [loss / losses[0] for loss in losses]
    )


def test_a_round_of_three_is_the_mean_of_their_models():
    result = Own().start(1, weighting="equal")
    models = [first_model(part) for part in range(3)]
    for part, model in enumerate(models):
        trained(model, part)
    for name in SHARED:
        mean = torch.stack([model.state_dict()[name] for model in models]).mean(0)
        torch.testing.assert_close(torch.from_numpy(result.arrays[name].numpy()), mean)
    norms = []
    for part, model in enumerate(models):
        moved = [
            first_model(part).state_dict()[name] - model.state_dict()[name]
            for name in ("body.weight", "body.bias")
        ]
        norms.append(torch.cat([one.flatten() for one in moved]).norm().item())
    expected = sum(norms) / 3
    assert result.train_metrics_clientapp[1]["grad_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("norm_layer", "names"),
    [("norm", ["norm.weight", "norm.bias"]), ("*", SHARED), (["body.bias"], ["body.bias"])],
)
def test_the_norm_layer_can_be_named(norm_layer, names):
    result = Own(parts=(0,), norm_layer=norm_layer).start(1)
    before, after = first_model(0), first_model(0)
    trained(after, 0)
    moved = torch.cat(
        [(before.state_dict()[name] - after.state_dict()[name]).flatten() for name in names]
    )
    assert result.train_metrics_clientapp[1]["grad_norm"] == pytest.approx(
        moved.norm().item(), rel=1e-5
    )


def test_the_first_heads_differ_and_are_those_that_are_tested_before_training():
    own, seen = Own(), {}
    own.wire.twists = {10 + part: raising for part in range(3)}
    result = own.start(2, min_clients=0)
    tests = [result.evaluate_metrics_clientapp[round]["test_loss"] for round in (1, 2)]
    assert tests[0] == tests[1]
    for part in range(3):
        model = first_model(part).eval()
        inputs, targets = data_of(part)
        seen[part] = nn.functional.cross_entropy(model(inputs), targets).item()
    assert tests[0] == pytest.approx(sum(seen.values()) / 3)
    assert not torch.equal(first_model(0).head.weight, first_model(1).head.weight)


@pytest.mark.parametrize("twist", [lost, raising, changed(spoil)], ids=["lost", "raises", "NaN"])
def test_what_the_server_has_not_taken_is_undone(twist):
    own, as_if = Own(), Own()
    own.wire.twists[11], as_if.wire.twists[11] = in_round(2, twist), in_round(2, untouched)
    result, expected = own.start(4), as_if.start(4)
    assert values(result.arrays) == values(expected.arrays)
    assert own.heads(4) == as_if.heads(4)
    again, well = Own(), Own()
    again.wire.twists[11] = in_round(2, twist)
    repeated, expected = again.start(4, min_clients=3), well.start(4)
    assert values(repeated.arrays) == values(expected.arrays)
    assert again.heads(4) == well.heads(4)


def test_frozen_parameters_stay():
    def frozen(context):
        model = net_of(context)
        model.norm.requires_grad_(False)
        return model

    result = Own(model=frozen, net=frozen).start(2)
    for name in ("norm.weight", "norm.bias"):
        assert result.arrays[name].numpy().tolist() == initial()[name].numpy().tolist()


def test_double_precision_stays():
    def double(context):
        return net_of(context).double()

    torch.manual_seed(0)
    result = Own(model=double, net=double).start(2, arrays=ArrayRecord(Net().double().state_dict()))
    assert {str(array.numpy().dtype) for array in result.arrays.values()} == {"float64"}


def test_initial_arrays_may_come_without_a_head():
    arrays = initial()
    encoder = ArrayRecord({name: arrays[name] for name in SHARED})
    assert values(Own().start(2, arrays=encoder).arrays) == values(Own().start(2).arrays)


# ------------------------------------------------------------------------------------------- errors


def context_of(**node_config):
    return Context(1, 7, {"partition-id": 0, **node_config}, RecordDict(), {})


def training(arrays=None, client="client-0", kind="train", base=0):
    control = Control(kind=kind, experiment="x", client=client, round=1, base=base)
    arrays = arrays or ArrayRecord({name: initial()[name] for name in SHARED})
    return RecordDict({"arrays": arrays, "fedgradnorm": control.record(), "config": ConfigRecord()})


def error_of(app, content=None, context=None, kind="train"):
    with pytest.raises((MessageError, ConfigError)) as error:
        direct(app, content or training(kind=kind), context or context_of(), kind)
    return str(error.value)


def in_memory(**options):
    return app_with(states=lambda *_: MemoryStates(), **options)


def test_a_head_that_the_model_does_not_have_is_named():
    assert (
        error_of(in_memory(head=["head", "heat"]))
        == "head: 'heat' names no parameter of the model; did you mean 'head'?"
    )
    with pytest.raises(ConfigError, match="head: expected the names"):
        FedGradNormMod(Net, head=())


SAME_HEAD = "both sides have to be told the same head"
NOT_SHARED = {
    "head.weight": f"in the client's head: {SAME_HEAD}",
    "x": f"no parameter of its model: {SAME_HEAD}",
    "norm.running_mean": "a buffer of its model: buffers stay with the client: expected FedGradNorm(head=[..., 'norm.running_mean'])",
}


@pytest.mark.parametrize(("name", "what"), NOT_SHARED.items())
def test_arrays_that_are_not_the_encoders_are_refused(name, what):
    arrays = ArrayRecord(
        {"body.weight": initial()["body.weight"], name: Array(torch.zeros(3).numpy())}
    )
    message = error_of(in_memory(), training(arrays))
    assert message == f"array '{name}': the server sent it, and it is {what}"


class Positions(Net):
    """With a buffer of floating-point numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3))


def test_a_buffer_that_the_strategy_is_told_of_stays_with_the_client():
    own = Own(parts=(0,), model=Positions, net=lambda _: Positions())
    arrays = ArrayRecord(Positions().state_dict())
    with pytest.raises(StoppedError, match=re.escape("expected FedGradNorm(head=[..., 'scale'])")):
        own.start(1, arrays=arrays)
    own.start(
        1, arrays=arrays, strategy=FedGradNorm(head=["head", "scale"], min_nodes=1, node_timeout=0)
    )
    assert "scale" in own.stores["client-0"].load(1).head


class Tied(Net):
    """A parameter with two names."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(8, 6)
        self.decoder.weight = self.body.weight


@pytest.mark.parametrize("head", ["head", ["head", "decoder"], ["head", "body", "decoder"]])
def test_tied_parameters_of_the_encoder_are_named(head):
    own = Own(parts=(0,), head=head, norm_layer="norm", model=Tied, net=lambda _: Tied())
    strategy = FedGradNorm(head=head, min_nodes=1, node_timeout=0)
    if "body" in head:  # all of it stays with the client
        own.start(1, arrays=ArrayRecord(Tied().state_dict()), strategy=strategy)
        return
    with pytest.raises(
        StoppedError,
        match="array 'decoder.weight': it is tied to 'body.weight', and the server sends one of them or both",
    ):
        own.start(1, arrays=ArrayRecord(Tied().state_dict()), strategy=strategy)


def without_arrays(content):
    content.pop("arrays", None)


def without_a_parameter(content):
    content["arrays"].pop("body.bias")


def of_another_shape(content):
    content["arrays"]["body.bias"] = Array(torch.zeros(1).numpy())


def of_another_type(content):
    content["arrays"]["body.bias"] = Array(torch.zeros(6).double().numpy())


def without_loss(content):
    content["metrics"].pop("train_loss", None)
    content["metrics"].pop("eval_loss", None)


def without_accuracy(content):
    content["metrics"].pop("eval_acc", None)


def without_metrics(content):
    del content["metrics"]


TRAINING_ERRORS = {
    without_arrays: "the app's reply: expected the record 'arrays' with the 9 arrays that it was given, found 0",
    without_a_parameter: "the app's reply: expected the record 'arrays' with the 9 arrays that it was given, found 8",
    of_another_shape: "the app's reply: array 'body.bias': expected torch.float32 of (6,), found torch.float32 of (1,)",
    of_another_type: "the app's reply: array 'body.bias': expected torch.float32 of (6,), found torch.float64 of (6,)",
    without_loss: "the app's metrics: expected 'train_loss', found ['num-examples', 'secret']: FedGradNormMod(loss=...) names it",
    without_metrics: "the app's metrics: expected 'train_loss', found []: FedGradNormMod(loss=...) names it",
}
TEST_ERRORS = {
    without_loss: "the app's metrics: expected 'eval_loss', found ['eval_acc', 'num-examples']: FedGradNormMod(test_loss=...) names it",
    without_accuracy: "the app's metrics: expected 'eval_acc', found ['eval_loss', 'num-examples']: FedGradNormMod(metric=...) names it",
}


@pytest.mark.parametrize(("change", "message"), TRAINING_ERRORS.items())
def test_an_app_that_answers_otherwise_is_told_so(change, message):
    states = MemoryStates()
    assert error_of(app_with(change=change, states=lambda *_: states)) == message
    assert states.by_round == {}


@pytest.mark.parametrize(("change", "message"), TEST_ERRORS.items())
def test_an_app_that_tests_otherwise_is_told_so(change, message):
    assert error_of(in_memory(change=change), kind="evaluate") == message


def test_an_app_without_a_metric():
    result = Own(metric="", change=without_accuracy).start(1)
    assert set(result.evaluate_metrics_clientapp[1]) == {"test_loss"}


def test_a_message_for_another_client_is_refused():
    reply = direct(in_memory(), training(client="client-1"), context_of())
    refusal = refusal_in(reply)
    assert (refusal.code, refusal.client) == ("wrong-client", "client-1")
    assert "'client-0'" in refusal.words


def test_a_message_of_another_strategy_is_refused():
    message = error_of(in_memory(), RecordDict({"arrays": initial(), "config": ConfigRecord()}))
    assert (
        message
        == "expected a record 'fedgradnorm', found ['arrays', 'config']: both sides have to be FedGradNorm's"
    )


def test_a_node_needs_a_place_and_a_key(tmp_path):
    assert "node config: expected a 'state-dir'" in error_of(app_with())
    nobody = Context(1, 7, {}, RecordDict(), {})
    assert "node config: expected a 'client-key', found []" in error_of(app_with(), context=nobody)
    assert "node config: client-key: expected letters" in error_of(
        app_with(), context=context_of(**{"client-key": "../x"})
    )
    direct(app_with(), training(), context_of(**{"state-dir": str(tmp_path / "own")}))
    assert StateFiles(tmp_path / "own", "x", "client-0").load(1).round == 1
    direct(
        app_with(),
        training(),
        Context(1, 7, {"partition-id": 0}, RecordDict(), {"state-dir": str(tmp_path / "app")}),
    )
    assert StateFiles(tmp_path / "app", "x", "client-0").load(1).round == 1


def broken():
    return nn.Linear("six", 1)


def test_an_error_in_the_users_model_is_the_users_to_see():
    with pytest.raises(
        FedGradNormError, match="^TypeError: what it says is in the log of the node$"
    ) as error:
        direct(in_memory(model=broken), training(), context_of())
    assert "type must be tuple of ints,but got str" in str(
        error.value.__cause__
    )  # the node logs it with its traceback


@pytest.mark.parametrize(
    "model",
    [Net, partial(Net, classes=2), lambda: Net(2), net_of, lambda context, classes=2: Net(classes)],
)
def test_a_model_is_made_with_or_without_the_context(model):
    assert direct(in_memory(model=model), training(), context_of()).has_content()


def test_parts_of_the_mod_take_other_names():
    own = Own(task="t")
    seen = own.start(
        1, strategy=FedGradNorm(head="head", weighting=Equal(), min_nodes=3, node_timeout=0)
    )
    assert seen.train_metrics_clientapp[1]["loss"] > 0
    assert {
        one.content["fedgradnorm"].get("task")
        for one in own.wire.messages
        if one.metadata.reply_to_message_id
    } == {"t"}
