"""What is in messages, and what becomes of what should not be."""

import io
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from torch import nn

from fedgradnorm.config import TrainConfig
from fedgradnorm.errors import FedGradNormError, MessageError
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.flower import LocalGrid
from fedgradnorm.flower.layout import Layout, arrays_of, tensors_of
from fedgradnorm.flower.messages import (
    VERSIONS,
    Control,
    Greeting,
    control_of,
    greeting_of,
    greeting_reply,
    read_instruction,
    training_of,
)
from fedgradnorm.flower.reports import evaluation_reply, read_evaluation, read_report, report_reply
from fedgradnorm.messages import Report
from fedgradnorm.parameters import flatten, load_flat
from tests.flower.nodes import Site
from tests.helpers import batch_norm_encoder, small_encoder, small_federation

ENCODER = small_encoder()
LAYOUT = Layout.of(ENCODER)


def message(content, kind="train"):
    return LocalGrid({}).create_message(content, kind, 2, "1")


# ----------------------------------------------------------------------------------- there and back


def frozen():
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    encoder[0].weight.requires_grad_(False)
    return encoder


def double():
    return small_encoder().double()


def half():
    return small_encoder().half()


@pytest.mark.parametrize("make", [small_encoder, batch_norm_encoder, frozen, double, half])
def test_the_encoder_comes_back_as_it_was(make):
    encoder = make()
    layout, vector = Layout.of(encoder), flatten(encoder)
    again = layout.vector(layout.arrays(vector))
    assert again.dtype == vector.dtype
    assert torch.equal(again, vector)
    assert set(layout.arrays(vector)) == {
        name for name, value in encoder.named_parameters() if value.requires_grad
    }
    load_flat(encoder, again)


def test_buffers_of_any_type_come_back_as_they_were():
    buffers = {
        "a": torch.tensor(7),
        "b": torch.arange(6.0).view(2, 3).T,
        "c": torch.zeros(0),
        "d": torch.tensor([True, False]),
    }
    for name, value in tensors_of(arrays_of(buffers)).items():
        assert value.dtype == buffers[name].dtype
        assert torch.equal(value, buffers[name])


def test_a_report_comes_back_as_it_was():
    buffers = {"1.running_mean": torch.ones(3)}
    sent = Report(
        "a",
        "sign",
        torch.arange(92.0),
        0.5,
        1.5,
        0.25,
        20,
        buffers,
        seconds=2.0,
        round=3,
        head_seconds=1.0,
    )
    found = read_report(
        report_reply(sent, LAYOUT.arrays(sent.gradient), message(RecordDict())), LAYOUT, buffers
    )
    for field in fields(Report):
        if field.name not in ("gradient", "buffers"):
            assert getattr(found, field.name) == getattr(sent, field.name)
    assert torch.equal(found.gradient, sent.gradient)
    assert found.buffers.keys() == buffers.keys()


def test_a_reply_has_no_more_in_it_than_it_needs():
    """Whatever nobody reads may be of any size, and is refused before its numbers are looked at."""
    sent = Report(
        "a",
        "sign",
        torch.arange(92.0),
        0.5,
        1.5,
        0.25,
        20,
        {"1.running_mean": torch.ones(30_000)},
        round=3,
    )
    report = report_reply(sent, LAYOUT.arrays(sent.gradient), message(RecordDict()))
    with pytest.raises(
        MessageError,
        match=r"^buffer '1.running_mean': expected at most 4,108 bytes, found 120,128$",
    ):
        read_report(report, LAYOUT, {"1.running_mean": torch.ones(3)})
    evaluation = evaluation_reply("a", "sign", 3, Evaluation(0.5, {}, 20), message(RecordDict()))
    greeting = greeting_reply(Greeting(client="a", task="x", **VERSIONS), message(RecordDict()))
    for reply, read, known in (
        (evaluation, read_evaluation, "metrics, fedgradnorm"),
        (greeting, greeting_of, "fedgradnorm"),
    ):
        reply.content["stuff"] = ConfigRecord({"x": b"x" * 10**6})
        with pytest.raises(
            MessageError, match=f"^records: expected none but {known}, found 'stuff'$"
        ):
            read(reply)


@pytest.mark.parametrize("field", ["task", "metric"])
def test_a_name_that_would_move_a_terminals_cursor_is_none(field):
    content = RecordDict(
        {"fedgradnorm": ConfigRecord({"client": "a", "task": "x", field: "x\x1b[2J"})}
    )
    with pytest.raises(
        MessageError,
        match=rf"^fedgradnorm.{field}: Value error, expected printable characters, found 'x\\x1b\[2J'$",
    ):
        greeting_of(message(content))


@pytest.mark.parametrize(
    "metrics", [{}, {"accuracy": 0.5}, {"accuracy": float("nan"), "ä": float("inf")}]
)
def test_an_evaluation_comes_back_as_it_was(metrics):
    client, found = read_evaluation(
        evaluation_reply("a", "sign", 3, Evaluation(0.5, metrics, 20), message(RecordDict()))
    )
    assert client == "a"
    assert (found.loss, found.num_examples, repr(dict(found.metrics))) == (0.5, 20, repr(metrics))


def test_control_and_greeting_come_back_as_they_were():
    control = Control(
        kind="train",
        experiment="x-1",
        client="a",
        round=3,
        attempt=1,
        base=2,
        keep=(0, 2),
        training=TrainConfig().model_dump_json(),
    )
    assert control_of(message(RecordDict({"fedgradnorm": control.record()}))) == control
    assert training_of(control) == TrainConfig()
    greeting = Greeting(
        client="a",
        task="sign",
        num_examples=3,
        tests=False,
        metric="error",
        higher_is_better=False,
        **VERSIONS,
    )
    assert greeting_of(greeting_reply(greeting, message(RecordDict()))) == greeting


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "a b", "x" * 101, "a\n"])
def test_a_client_key_is_a_name(name):
    with pytest.raises(MessageError, match="client"):
        greeting_of(
            message(RecordDict({"fedgradnorm": ConfigRecord({"client": name, "task": "x"})}))
        )


@pytest.mark.parametrize("name", ["..", "a/b", "", "x" * 65, "a\n", "a."])
def test_an_experiment_is_a_name_of_a_folder(name):
    with pytest.raises(MessageError, match="experiment"):
        control_of(
            message(
                RecordDict({"fedgradnorm": ConfigRecord({"kind": "hello", "experiment": name})})
            )
        )


def test_a_pickle_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    content = io.BytesIO()
    np.save(content, np.array([Bomb()], dtype=object), allow_pickle=True)
    record = ArrayRecord({"x": Array("object", (1,), "numpy.ndarray", content.getvalue())})
    with pytest.raises(MessageError, match="arrays: expected arrays of numbers"):
        tensors_of(record)
    assert not (tmp_path / "opened").exists()


# ---------------------------------------------------------------------------------- anything at all

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INTEGERS, FLOATS = st.integers(-(2**63), 2**63 - 1), st.floats()
SCALARS = [INTEGERS, FLOATS, TEXT, st.binary(max_size=20), st.booleans()]
CONFIG_VALUES = st.one_of(
    *SCALARS, *(st.lists(values, min_size=1, max_size=3) for values in SCALARS)
)
METRIC_VALUES = st.one_of(INTEGERS, FLOATS, st.lists(FLOATS, max_size=3))
NUMPY = nps.arrays(
    st.one_of(nps.scalar_dtypes(), nps.byte_string_dtypes()),
    nps.array_shapes(min_dims=0, max_side=4),
)
TAILS = st.binary(max_size=64)
BYTES = st.one_of(
    TAILS, TAILS.map(lambda tail: b"\x93NUMPY\x01\x00v\x00" + tail), st.just(b"PK\x03\x04junk")
)
HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
HEADERS = st.sampled_from(
    [HUGE, HUGE.replace("(1", "(1" + 30 * "0"), "{(", "[]", "{'descr': '<f4'}", "1" * 90]
)
FORGED = HEADERS.map(
    lambda text: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
)
SHAPES, KINDS = (
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "odd"]),
)
ARRAYS = st.one_of(
    NUMPY.map(Array), st.builds(Array, TEXT, SHAPES, KINDS, st.one_of(BYTES, FORGED))
)
RECORDS = st.one_of(
    st.dictionaries(TEXT, CONFIG_VALUES, max_size=4).map(ConfigRecord),
    st.dictionaries(TEXT, METRIC_VALUES, max_size=4).map(MetricRecord),
    st.dictionaries(TEXT, ARRAYS, max_size=4).map(ArrayRecord),
)
NAMES = st.one_of(st.sampled_from(["arrays", "buffers", "config", "metrics", "fedgradnorm"]), TEXT)


@st.composite
def spoilt(draw, make):
    """A sound content, some of whose records and entries are others, more or fewer."""
    content = make()
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([*content, "buffers", "odd"]))
        record = content.get(name)
        if record is None or draw(st.booleans()):
            if draw(st.booleans()) and record is not None:
                del content[name]
            else:
                content[name] = draw(RECORDS)
            continue
        key = draw(st.sampled_from([*record, "odd"]))
        values = (
            ARRAYS
            if isinstance(record, ArrayRecord)
            else METRIC_VALUES
            if isinstance(record, MetricRecord)
            else CONFIG_VALUES
        )
        if draw(st.booleans()) or key not in record:
            record[key] = draw(values)
        else:
            del record[key]
    return content


def report_content():
    report = Report("a", "sign", flatten(ENCODER), 0.5, 1.5, 0.25, 20, round=3)
    return report_reply(report, LAYOUT.arrays(report.gradient), message(RecordDict())).content


def evaluation_content():
    return evaluation_reply(
        "a", "sign", 3, Evaluation(0.5, {"accuracy": 0.5}, 20), message(RecordDict())
    ).content


def instruction_content(kind="train"):
    training = TrainConfig(head_steps=1, encoder_steps=1, batch_size=4).model_dump_json()
    control = Control(kind=kind, experiment="x", client="a", round=1, training=training)
    arrays, config = LAYOUT.arrays(flatten(ENCODER)), ConfigRecord({"server-round": 1})
    return RecordDict({"arrays": arrays, "fedgradnorm": control.record(), "config": config})


def greeting_content():
    return greeting_reply(
        Greeting(client="a", task="sign", **VERSIONS), message(RecordDict())
    ).content


ANYTHING = st.dictionaries(NAMES, RECORDS, max_size=4).map(RecordDict)
MAKE = {
    "report": report_content,
    "evaluation": evaluation_content,
    "instruction": instruction_content,
    "greeting": greeting_content,
}


def instruction_of(one):
    return read_instruction(one, control_of(one), LAYOUT)


def report_of(one):
    return read_report(one, LAYOUT)


READ = {
    "report": report_of,
    "evaluation": read_evaluation,
    "instruction": instruction_of,
    "greeting": greeting_of,
}


@pytest.mark.filterwarnings("ignore")  # NumPy warns of odd headers
@pytest.mark.parametrize("kind", READ)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_odd_records_are_a_message_error_and_nothing_else(kind, data):
    content = data.draw(st.one_of(ANYTHING, spoilt(MAKE[kind])))
    with suppress(MessageError):
        READ[kind](message(content))


NODE = Site(small_federation()).node("a")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.one_of(
        ANYTHING, spoilt(instruction_content), spoilt(lambda: instruction_content("evaluate"))
    )
)
def test_a_client_answers_odd_messages_with_an_error_of_ours(content):
    try:
        reply = NODE.answer(message(content))
    except FedGradNormError:
        return
    assert isinstance(reply, Message)
