"""Screening, retries, and what becomes of the weights and the encoder whatever comes in."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgradnorm import Equal, FedGradNorm, StoppedError
from fedgradnorm.aggregation import ClippedMean, Mean, Median, TrimmedMean
from fedgradnorm.client import ClientState
from fedgradnorm.config import FaultsConfig, TrainConfig
from fedgradnorm.engine import Engine
from fedgradnorm.engine_wrappers import FaultyEngine
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.messages import Instruction
from fedgradnorm.server import initial_state, instruct, run_round, screen
from tests.helpers import batch_norm_encoder, examples, report, small_federation

TRAINING = TrainConfig(head_steps=1, encoder_steps=1, head_momentum=0.5, batch_size=8)
ROUND = 5


def asked(*clients, **fields):
    return [
        Instruction(ROUND, client, torch.zeros(3), fields.get("buffers", {}), TRAINING)
        for client in clients
    ]


def answer(client, length=1.0, **fields):
    fields = {"gradient": torch.tensor([0.0, length, 0.0]), "round": ROUND, **fields}
    return report(client, 1.0, **fields)


def names(sound):
    return [one.client for one in sound]


# ------------------------------------------------------------------------------------------------ who and when


@pytest.mark.parametrize("round", [ROUND - 1, ROUND + 1, 0, -1])
def test_a_report_of_another_round_counts_for_nothing(round):
    sound, dropped = screen([answer("a", round=round), answer("b")], asked("a", "b"), {})
    assert names(sound) == ["b"]
    assert dropped == {"a": "no report"}


def test_a_late_report_does_not_harm_the_one_that_is_due():
    due = answer("a", 2.0)
    assert screen([answer("a", round=ROUND - 1), due], asked("a"), {}) == ([due], {})
    assert screen([due, answer("a", round=ROUND - 1)], asked("a"), {}) == ([due], {})


@pytest.mark.parametrize("count", [2, 3])
def test_of_several_reports_of_one_client_none_is_believed(count):
    sound, dropped = screen(
        [answer("a", length) for length in range(count)] + [answer("b")], asked("a", "b"), {}
    )
    assert names(sound) == ["b"]
    assert dropped == {"a": f"{count} reports"}


def test_a_client_that_was_not_asked_is_not_heard():
    sound, dropped = screen(
        [answer("a"), answer("stranger"), answer("")], asked("a"), {}, max_update_ratio=3.0
    )
    assert names(sound) == ["a"]
    assert dropped == {}


def test_a_stranger_is_no_measure_for_what_is_usual():
    _, dropped = screen(
        [answer("a", 100.0), answer("b", 100.0), answer("stranger", 1.0)],
        asked("a", "b"),
        {},
        max_update_ratio=3.0,
    )
    assert dropped == {}


def test_without_any_report_everyone_is_dropped():
    assert screen([], asked("a", "b"), {}, 3.0) == ([], {"a": "no report", "b": "no report"})
    assert screen([answer("a")], [], {}, 3.0) == ([], {})


# ------------------------------------------------------------------------------------------------ what


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("ratio", [None, 3.0])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"gradient": torch.zeros(2)}, "gradient: expected"),
        ({"gradient": torch.zeros(0)}, "gradient: expected"),
        ({"gradient": torch.zeros(3, 1)}, "gradient: expected"),
        ({"gradient": torch.zeros(3, dtype=torch.float16)}, "gradient: expected"),
        ({"gradient": torch.zeros(3, dtype=torch.int64)}, "gradient: expected"),
        ({"gradient": torch.zeros(3, dtype=torch.complex64)}, "gradient: expected"),
        ({"gradient": torch.tensor([0.0, NAN, 0.0])}, "gradient: not finite"),
        ({"gradient": torch.tensor([0.0, -INF, 0.0])}, "gradient: not finite"),
        *(({"loss": value}, "loss") for value in (NAN, INF, -INF, 1e101, -1e101)),
        *(({"initial_loss": value}, "initial_loss") for value in (NAN, INF, -INF, 1e101)),
        *(({"loss_floor": value}, "loss_floor") for value in (NAN, INF, -1e101)),
        *(({"grad_norm": value}, "grad_norm") for value in (NAN, INF, -1.0, 1e101)),
        ({"loss": 1e90, "initial_loss": 1e-25}, "inverse_training_rate"),
        ({"buffers": {}}, "buffers"),
        ({"buffers": {"x": torch.zeros(2), "y": torch.zeros(2)}}, "buffers"),
        ({"buffers": {"x": torch.zeros(3)}}, "buffer x"),
        ({"buffers": {"x": torch.tensor([0.0, NAN])}}, "buffer x"),
        ({"buffers": {"x": torch.zeros(2, dtype=torch.float64)}}, "buffer x"),
    ],
)
def test_every_fault_is_dropped_with_its_reason_and_harms_nobody_else(fault, reason, ratio):
    buffers = {"x": torch.zeros(2)}
    unsound = replace(answer("a", buffers=buffers), **fault)
    others = [answer(client, buffers=buffers) for client in "bc"]
    sound, dropped = screen([unsound, *others], asked("a", "b", "c", buffers=buffers), {}, ratio)
    assert sound == others
    assert dropped.keys() == {"a"}
    assert dropped["a"].startswith(reason)


LIMITS = [
    ({"loss": 1e300}, "loss: expected a number from -1e+100 to 1e+100, found 1e+300"),
    (
        {"initial_loss": -1e300},
        "initial_loss: expected a number from -1e+100 to 1e+100, found -1e+300",
    ),
    ({"loss_floor": NAN}, "loss_floor: expected a number from -1e+100 to 1e+100, found nan"),
    ({"grad_norm": 1e300}, "grad_norm: expected a number from 0 to 1e+100, found 1e+300"),
    (
        {"loss": 1e90, "initial_loss": 1e-25},
        "inverse_training_rate: expected at most 1e+100, found loss 1e+90 with initial_loss 1e-25",
    ),
    (
        {"gradient": torch.tensor([0.0, 1e200, 0.0], dtype=torch.float64)},
        "gradient: expected a length of at most 1e+100, found a longer one",
    ),
    ({"gradient": torch.tensor([0.0, INF, 0.0]).double()}, "gradient: not finite"),
]


@pytest.mark.parametrize(("fault", "reason"), LIMITS)
def test_a_number_beyond_a_limit_is_told_the_limit(fault, reason):
    instructions = [
        replace(one, encoder=one.encoder.to(fault.get("gradient", one.encoder).dtype))
        for one in asked("a")
    ]
    assert screen([replace(answer("a"), **fault)], instructions, {})[1] == {"a": reason}


@pytest.mark.parametrize(
    "harmless",
    [
        *({"loss": value} for value in (0.0, 5e-324, 1e100, -1.0, -1e100)),
        *({"initial_loss": value} for value in (1e100, 0.0, -0.0, -1.0, 5e-324)),
        *({"grad_norm": value} for value in (0.0, 5e-324, 1e100)),
    ],
)
def test_extreme_but_possible_numbers_pass(harmless):
    one = replace(answer("a"), **harmless)
    assert screen([one], asked("a"), {}) == ([one], {})


# ------------------------------------------------------------------------------------------------ how long


def test_with_three_lengths_of_its_own_a_client_is_held_against_their_median():
    norms = {"a": (1.0, 100.0, 2.0), "b": (1000.0,) * 10}  # a's median is 2
    for length, passes in ((5.9, True), (6.1, False), (1000.0, False)):
        sound, dropped = screen(
            [answer("a", length), answer("b", 1000.0)], asked("a", "b"), norms, 3.0
        )
        assert ("a" in names(sound)) == passes
        assert ("a" in dropped) != passes
        assert "b" in names(sound)
    assert (
        dropped["a"]
        == "gradient: 500 times as long as usual, expected at most 3 times (train.max_update_ratio)"
    )


def test_with_fewer_it_is_held_against_all_last_ones_and_the_others_of_the_round():
    norms = {"a": (1.0, 1.0), "b": (10.0, 10.0, 10.0)}
    for length, passes in ((29.0, True), (31.0, False)):  # 1, 1, 10, 10, 10 and b's 10: 10
        sound, _ = screen([answer("a", length), answer("b", 10.0)], asked("a", "b"), norms, 3.0)
        assert ("a" in names(sound)) == passes


def test_in_the_first_round_it_is_held_against_the_others():
    sound, dropped = screen(
        [answer("a", 1000.0), answer("b", 1.0), answer("c", 2.0)], asked("a", "b", "c"), {}, 10.0
    )
    assert names(sound) == ["b", "c"]
    assert dropped.keys() == {"a"}
    sound, _ = screen([answer("a", 1000.0), answer("b", 1.0)], asked("a", "b"), {}, 10.0)
    assert names(sound) == ["b"]


@pytest.mark.parametrize("clients", [("a", "b"), ("a", "b", "c"), ("a", "b", "c", "d")])
def test_one_lie_in_the_first_round_or_of_a_client_in_its_first_is_dropped_and_nobody_else(clients):
    replies = [
        answer(client, 1e30 if client == "a" else 1.0 + place)
        for place, client in enumerate(clients)
    ]
    known = {client: (1.0 + place,) * 10 for place, client in enumerate(clients) if client != "a"}
    for norms in ({}, known):
        sound, dropped = screen(replies, asked(*clients), norms, 10.0)
        assert names(sound) == list(clients[1:])
        assert dropped.keys() == {"a"}
        assert dropped["a"].endswith(
            "times as long as usual for all clients, expected at most 10 times (train.max_update_ratio)"
        )
    assert screen(replies[:1], asked("a"), known, 10.0)[1].keys() == {
        "a"
    }  # alone in its first round


def test_a_client_alone_in_the_first_round_has_nothing_to_be_held_against():
    assert names(screen([answer("a", 1e9)], asked("a"), {}, 3.0)[0]) == ["a"]


def test_none_screens_no_length_and_a_short_gradient_is_never_refused():
    some = [answer("a", 1e9), answer("b", 1.0), answer("c", 0.0)]
    assert screen(some, asked("a", "b", "c"), {})[1] == {}
    assert "c" in names(screen(some, asked("a", "b", "c"), {"c": (1.0,) * 10}, 3.0)[0])


@pytest.mark.parametrize("norms", [{}, {"a": (0.0,) * 5, "b": (0.0,) * 5}])
def test_gradients_of_length_zero_are_no_trouble(norms):
    """A client may report a gradient of zeros and a norm above 0; and then nothing is usual."""
    sound, dropped = screen([answer("a", 0.0), answer("b", 0.0)], asked("a", "b"), norms, 3.0)
    assert names(sound) == ["a", "b"]
    sound, dropped = screen([answer("a", 0.0), answer("b", 1.0)], asked("a", "b"), norms, 3.0)
    assert {*names(sound), *dropped} == {"a", "b"}
    assert "a" in names(sound)


def test_a_dropped_length_is_not_remembered():
    federation = small_federation()
    engine = Scripted(
        federation,
        lambda one: replace(one, gradient=1000 * one.gradient) if one.client == "b" else one,
    )
    training = TRAINING.model_copy(update={"max_update_ratio": 20.0})
    state = initial_state(federation, Equal(), 0)
    for _ in range(12):
        state, record = run_round(state, federation, engine, Equal(), Mean(), training)
        assert record.dropped.keys() == {"b"}
    assert {client: len(lengths) for client, lengths in state.norms.items()} == {"a": 10, "c": 10}


# ------------------------------------------------------------------------------------------------ whatever comes in


class Scripted(ReferenceEngine):
    """An engine whose clients answer as ``spoil`` says: with one report, with a list of them, or with None."""

    def __init__(self, federation, spoil):
        super().__init__(federation, seed=0)
        self.spoil, self.calls = spoil, 0

    def execute(self, instructions):
        self.calls += 1
        answers = [self.spoil(one) for one in super().execute(instructions)]
        return [
            one
            for some in answers
            for one in (some if isinstance(some, list) else [some])
            if one is not None
        ]


NUMBERS = st.floats() | st.sampled_from(
    [0.0, -0.0, NAN, INF, 5e-324, 1e-300, 1e-45, 3e38, 1e39, 1e100, 1e308, 1.0, 1.0]
)
REPORT = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["x", "y"]))
HOSTILE = st.lists(
    st.lists(REPORT, min_size=3, max_size=3), min_size=1, max_size=4
)  # rounds, clients
METHODS = [
    FedGradNorm(solver=solver, group_by=group, normalize=normalize, gamma=gamma)
    for solver, group, normalize, gamma in (
        ("step", "client", "sum", 0.9),
        ("exact", "client", "sum", 0.9),
        ("step", "task", "norm", 10.0),
        ("exact", "task", "norm", 10.0),
        ("exact", "client", "norm", 0.0),
    )
]
FEDERATION = small_federation()


class Hostile(Engine):
    """An engine without clients that replies with given numbers."""

    client_states = dict.fromkeys("abc", ClientState({}))

    def __init__(self, rounds):
        self.rounds = iter(rounds)

    def restore(self, states):
        pass

    def evaluate(self, encoder, buffers, batch_size=1):
        return {}

    def execute(self, instructions):
        replies = []
        for instruction, (loss, initial, norm, first, second, task) in zip(
            instructions, next(self.rounds), strict=True
        ):
            gradient = torch.tensor([first, second], dtype=torch.float32).repeat(
                len(instruction.encoder) // 2
            )
            fields = {
                "loss": loss,
                "initial_loss": initial,
                "gradient": gradient,
                "round": instruction.round,
                "task": task,
            }
            replies.append(replace(report(instruction.client, norm), **fields))
        return replies


def play(rounds, method, aggregate, ratio):
    training = TrainConfig(min_clients=0, max_retries=0, max_update_ratio=ratio)
    state, engine = initial_state(FEDERATION, method, 0), Hostile(rounds)
    for _ in rounds:
        state, record = run_round(state, FEDERATION, engine, method, aggregate, training)
        assert record.dropped.keys() | {one.client for one in record.reports} == {"a", "b", "c"}
        yield state


@pytest.mark.parametrize(
    "method",
    METHODS,
    ids=lambda method: f"{method.solver}-{method.group_by}-{method.normalize}-{method.gamma:g}",
)
@settings(max_examples=examples(12))
@given(
    rounds=HOSTILE,
    ratio=st.sampled_from([None, 3.0]),
    aggregate=st.sampled_from([Mean(), ClippedMean(), Median(), TrimmedMean()]),
)
def test_weights_stay_finite_positive_and_sum_to_the_number_of_clients_whatever_comes_in(
    method, rounds, ratio, aggregate
):
    for state in play(rounds, method, aggregate, ratio):
        weights = state.weighting.weights
        assert all(math.isfinite(weight) and weight > 0 for weight in weights.values())
        assert sum(weights.values()) == pytest.approx(3)
        assert all(math.isfinite(length) for lengths in state.norms.values() for length in lengths)


@pytest.mark.parametrize(
    "aggregate",
    [Mean(), ClippedMean(), Median(), TrimmedMean()],
    ids=lambda one: type(one).__name__,
)
@settings(max_examples=examples(12))
@given(rounds=HOSTILE, ratio=st.sampled_from([None, 3.0]))
def test_the_encoder_stays_finite_whatever_comes_in(aggregate, rounds, ratio):
    """An encoder that is infinite once stays so for good: every later gradient is NaN."""
    for state in play(rounds, Equal(), aggregate, ratio):
        assert torch.isfinite(state.encoder).all()


def sound(loss=1.0, initial=1.0, norm=1.0, first=1.0, second=1.0, task="x"):
    return loss, initial, norm, first, second, task


@pytest.mark.parametrize(
    "method",
    METHODS,
    ids=lambda method: f"{method.solver}-{method.group_by}-{method.normalize}-{method.gamma:g}",
)
@pytest.mark.parametrize(
    "round",
    [
        pytest.param(
            [sound(loss=5e-324), sound(loss=0.0), sound(loss=0.0)], id="rates whose mean underflows"
        ),
        pytest.param([sound(norm=5e-324)] * 3, id="the smallest norms"),
        pytest.param([sound(norm=1e100), sound(norm=5e-324), sound()], id="norms far apart"),
        pytest.param([sound(loss=1e100), sound(loss=0.0), sound()], id="losses far apart"),
        pytest.param([sound(first=0.0, second=0.0)] * 3, id="gradients of zeros"),
        pytest.param([sound(first=3e38, second=3e38)] * 3, id="the largest gradients"),
    ],
)
def test_what_has_been_found_to_be_hard(method, round):
    for ratio in (None, 3.0):
        for state in play([round, [sound()] * 3, round], method, ClippedMean(), ratio):
            weights = state.weighting.weights
            assert all(math.isfinite(weight) and weight > 0 for weight in weights.values())
            assert sum(weights.values()) == pytest.approx(3)
            assert torch.isfinite(state.encoder).all()


# ------------------------------------------------------------------------------------------------ retries


def same(left, right):
    """Whether two states are equal to the bit, whatever is in them."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def same_clients(left, right):
    return left.keys() == right.keys() and all(
        same(vars(left[client]), vars(right[client])) for client in left
    )


@pytest.mark.parametrize("spoilt", ["a", "abc"])
@pytest.mark.parametrize("buffers", ["local", "averaged"])
@pytest.mark.parametrize(
    "how",
    [lambda one: None, lambda one: replace(one, loss=NAN), lambda one: [one, one]],
    ids=["lost", "nan", "two"],
)
def test_a_round_that_fails_twice_gives_what_one_that_works_at_once_gives(how, buffers, spoilt):
    federation = small_federation(encoder=batch_norm_encoder, buffers=buffers)
    training = TRAINING.model_copy(update={"min_clients": 3, "max_retries": 2})
    ends = []
    for failing in (False, True):
        method = FedGradNorm()
        engine = Scripted(federation, lambda one: one)
        state, retries = initial_state(federation, method, 0), []
        for _ in range(3):
            engine.calls = 0
            if failing:
                engine.spoil = lambda one, engine=engine: (
                    how(one) if engine.calls <= 2 and one.client in spoilt else one
                )
            state, record = run_round(state, federation, engine, method, Mean(), training)
            retries.append(record.retries)
            assert record.dropped == {}
        assert retries == ([2, 2, 2] if failing else [0, 0, 0])
        ends.append((state, engine.client_states))
    assert same(vars(ends[0][0]), vars(ends[1][0]))
    assert same_clients(ends[0][1], ends[1][1])


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_after_the_last_retry_it_stops_with_the_reasons_and_everything_as_it_was(max_retries):
    federation, method = small_federation(), FedGradNorm()
    engine = Scripted(federation, lambda one: one)
    state, _ = run_round(
        initial_state(federation, method, 0), federation, engine, method, Mean(), TRAINING
    )
    before, clients = {**vars(state), "encoder": state.encoder.clone()}, engine.client_states
    engine.calls = 0
    engine.spoil = lambda one: {"a": one, "b": None, "c": replace(one, loss=NAN)}[one.client]
    training = TRAINING.model_copy(update={"min_clients": 2, "max_retries": max_retries})
    with pytest.raises(StoppedError) as caught:
        run_round(state, federation, engine, method, Mean(), training)
    assert engine.calls == 1 + max_retries
    assert "round 2" in str(caught.value)
    assert "1 sound reports, expected at least 2" in str(caught.value)
    assert "b: no report" in str(caught.value)
    assert "c: loss: expected a number from -1e+100 to 1e+100, found nan" in str(caught.value)
    assert same(vars(state), before)
    assert same_clients(engine.client_states, clients)


def test_a_late_report_of_a_failed_attempt_does_not_spoil_the_next_one():
    federation = small_federation()
    engine = FaultyEngine(ReferenceEngine(federation, seed=0), FaultsConfig(delay=1.0))
    before, state = engine.client_states, initial_state(federation, Equal(), 0)
    assert engine.execute(instruct(state, federation, TRAINING)) == []
    engine.restore(before)
    engine.faults = FaultsConfig()
    instructions = instruct(state, federation, TRAINING, attempt=1)
    reports, dropped = screen(engine.execute(instructions), instructions, {})
    assert dropped == {}
    assert len(reports) == 3


def test_clients_with_the_same_reason_are_named_together():
    federation = replace(
        small_federation(),
        clients=[replace(small_federation().clients[0], id=f"client-{i}") for i in range(6)],
    )
    engine = Scripted(
        federation, lambda one: replace(one, loss=NAN) if one.client == "client-2" else None
    )
    with pytest.raises(StoppedError) as caught:
        run_round(
            initial_state(federation, Equal(), 0), federation, engine, Equal(), Mean(), TRAINING
        )
    reasons = "client-0, client-1, client-3 and 2 more: no report; client-2: loss: expected a number from -1e+100 to 1e+100, found nan"
    assert sorted(str(caught.value).partition("at least 1: ")[2].split("; ")) == sorted(
        reasons.split("; ")
    )
