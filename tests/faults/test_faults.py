"""Faults on purpose: that they are what they say, and what a federation makes of them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedgradnorm import Equal, FedGradNorm, StoppedError
from fedgradnorm.aggregation import ClippedMean, Mean, TrimmedMean
from fedgradnorm.config import FaultsConfig, TrainConfig
from fedgradnorm.engine import Engine
from fedgradnorm.engine_wrappers import FaultyEngine
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.federations import digits, radcom
from fedgradnorm.messages import Instruction
from fedgradnorm.server import initial_state, instruct, run_round, screen
from tests.helpers import report, small_federation

# ------------------------------------------------------------------------------------------------ the engine

LENGTH = 200


class Echo(Engine):
    """An engine whose clients reply at once, with a gradient of ones."""

    client_states = None

    def __init__(self):
        self.client_states = {}

    def restore(self, states):
        self.client_states = dict(states)

    def evaluate(self, encoder, buffers, batch_size):
        return {"a": (encoder, buffers, batch_size)}

    def execute(self, instructions):
        return [
            report(one.client, 1.0, round=one.round, gradient=torch.ones(LENGTH))
            for one in instructions
        ]


def asked(round, clients, seed=0, attempt=0):
    return [
        Instruction(round, client, torch.zeros(LENGTH), {}, TrainConfig(seed=seed), attempt)
        for client in clients
    ]


def kind(one):
    """What has happened to a report of ones."""
    if one.gradient.isnan().any():
        return "nan"
    if len(one.gradient) < LENGTH:
        return "cut"
    if one.loss == float("inf"):
        return "infinite loss"
    if torch.equal(one.gradient, torch.full((LENGTH,), 1000.0)):
        return "scaled"
    return "sound" if torch.equal(one.gradient, torch.ones(LENGTH)) else "noise"


def outcomes(faults, clients=100, rounds=40, **fields):
    """What happens to every (round, client): each report goes by the round that it was due in."""
    engine, found = FaultyEngine(Echo(), faults), {}
    ids = [f"c{index:03}" for index in range(clients)]
    for round in range(1, rounds + 2):
        for one in engine.execute(asked(round, ids, **fields)):
            found[one.round, one.client] = "late" if one.round < round else kind(one)
    return {
        (round, id): found.get((round, id), "lost") for round in range(1, rounds + 1) for id in ids
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_follow_the_probabilities(seed):
    faults = FaultsConfig(drop=0.3, delay=0.2, nan=0.1, corrupt=0.4)
    found = Counter(outcomes(faults, seed=seed).values())
    here = 0.7 * 0.8
    expected = {"lost": 0.3, "late": 0.7 * 0.2, "sound": here * 0.9 * 0.6}
    expected |= dict.fromkeys(("scaled", "infinite loss", "noise"), here * 0.9 * 0.4 / 4)
    total = found.total()
    for what, share in expected.items():
        assert found[what] / total == pytest.approx(
            share, abs=4 * (share * (1 - share) / total) ** 0.5
        ), what
    nan_or_cut = here * (0.1 + 0.9 * 0.4 / 4)  # a corrupted one can be both
    assert (found["nan"] + found["cut"]) / total == pytest.approx(nan_or_cut, abs=0.03)


@pytest.mark.parametrize(
    ("fault", "what"), [("drop", {"lost"}), ("delay", {"late"}), ("nan", {"nan"})]
)
def test_a_certain_fault_always_happens_and_an_impossible_one_never(fault, what):
    assert set(outcomes(FaultsConfig(**{fault: 1.0}), 10, 5).values()) == what
    assert set(outcomes(FaultsConfig(), 10, 5).values()) == {"sound"}


def test_every_kind_of_corruption_comes_up():
    assert set(outcomes(FaultsConfig(corrupt=1.0), 20, 10).values()) == {
        "scaled",
        "cut",
        "infinite loss",
        "noise",
    }


def test_faults_are_seeded_and_differ_by_seed_round_client_and_attempt():
    faults = FaultsConfig(drop=0.5)
    first = outcomes(faults, 20, 20)
    assert outcomes(faults, 20, 20) == first
    assert outcomes(faults, 20, 20, seed=1) != first
    assert outcomes(faults, 20, 20, attempt=1) != first
    assert (
        len({tuple(first[round, f"c{index:03}"] for index in range(20)) for round in range(1, 21)})
        == 20
    )
    assert (
        len({tuple(first[round, f"c{index:03}"] for round in range(1, 21)) for index in range(20)})
        == 20
    )


def test_faults_do_not_depend_on_the_order_or_the_number_of_clients():
    faults = FaultsConfig(drop=0.2, delay=0.2, nan=0.2, corrupt=0.5)
    ids = [f"c{index}" for index in range(12)]
    runs = []
    for clients in (ids, ids[::-1], ids[:6]):
        engine, found = FaultyEngine(Echo(), faults), {}
        for round in range(1, 8):
            found |= {
                (round, one.client, one.round): one.gradient
                for one in engine.execute(asked(round, clients))
            }
        runs.append(found)
    assert runs[0].keys() == runs[1].keys()
    assert {key for key in runs[0] if key[1] in ids[:6]} == runs[2].keys()
    for run in runs[1:]:
        assert all(
            torch.equal(run[key].nan_to_num(7.0), runs[0][key].nan_to_num(7.0)) for key in run
        )


def test_the_clients_own_report_is_left_as_it_was():
    kept = report("a", 1.0, round=1, gradient=torch.ones(LENGTH))
    inner = Echo()
    inner.execute = lambda instructions: [kept]
    for round in range(1, 20):
        FaultyEngine(inner, FaultsConfig(nan=0.5, corrupt=1.0)).execute(asked(round, "a"))
    assert torch.equal(kept.gradient, torch.ones(LENGTH))


def test_all_else_is_the_engines_own():
    inner = Echo()
    engine = FaultyEngine(inner, FaultsConfig(drop=1.0))
    engine.restore({"a": "state"})
    assert engine.client_states == inner.client_states == {"a": "state"}
    assert engine.evaluate("encoder", {}, 7) == {"a": ("encoder", {}, 7)}


def test_a_client_whose_report_is_lost_has_trained_all_the_same():
    federation = small_federation()
    engine = FaultyEngine(ReferenceEngine(federation, seed=0), FaultsConfig(drop=1.0))
    before = engine.client_states
    assert (
        engine.execute(
            instruct(
                initial_state(federation, Equal(), 0),
                federation,
                TrainConfig(head_steps=1, encoder_steps=1),
            )
        )
        == []
    )
    after = engine.client_states
    assert all(after[id].initial_loss is not None for id in "abc")
    assert not any(torch.equal(before[id].head["weight"], after[id].head["weight"]) for id in "abc")


@pytest.mark.parametrize("experienced", [False, True], ids=["in the first round", "later"])
def test_screening_catches_every_kind_of_damage(experienced):
    """Noise is about √P times as long as the gradient was."""
    norms = dict.fromkeys("abcd", (LENGTH**0.5,) * 3) if experienced else {}
    kinds = Counter()
    for faults in (
        FaultsConfig(corrupt=1.0),
        FaultsConfig(nan=1.0),
        FaultsConfig(nan=1.0, corrupt=1.0),
    ):
        for round in range(1, 30):
            damaged = FaultyEngine(Echo(), faults).execute(asked(round, "a"))
            sound = Echo().execute(asked(round, "bcd"))
            kinds.update(map(kind, damaged))
            reports, dropped = screen(
                [*damaged, *sound], asked(round, "abcd"), norms, max_update_ratio=10.0
            )
            assert [one.client for one in reports] == ["b", "c", "d"]
            assert dropped.keys() == {"a"}
    assert {"nan", "scaled", "cut", "infinite loss", "noise"} <= kinds.keys()


# ------------------------------------------------------------------------------------------------ what training makes of it

FEDERATIONS = {"digits": (digits.make, {}), "radcom": (radcom.make, {"snapshots": 10})}
SETTINGS = {
    "digits": {"num_rounds": 60, "head_lr": 0.05, "encoder_lr": 0.05},
    "radcom": {
        "num_rounds": 40,
        "head_lr": 0.05,
        "encoder_lr": 0.05,
        "head_steps": 5,
        "encoder_steps": 5,
    },
}
LAST = 10


def trained(federation, engine, weighting, aggregate, **settings):
    """Each client's inverse training rate, the mean over the last rounds; the last state; and every round's record."""
    training = TrainConfig(**settings)
    state, records = initial_state(federation, weighting, training.seed), []
    for _ in range(training.num_rounds):
        state, record = run_round(state, federation, engine, weighting, aggregate, training)
        records.append(record)
    rates = {id: [] for id in federation.client_ids}
    for record in records[-LAST:]:
        for one in record.reports:
            rates[one.client].append(one.inverse_training_rate)
    return {id: float(np.mean(values)) for id, values in rates.items() if values}, state, records


@pytest.mark.parametrize("name", FEDERATIONS)
def test_with_30_percent_dropped_and_5_percent_nan_training_gets_as_far(name):
    make, options = FEDERATIONS[name]
    federation = make(0, **options)
    clean, _, _ = trained(
        federation, ReferenceEngine(federation, seed=0), FedGradNorm(), Mean(), **SETTINGS[name]
    )
    engine = FaultyEngine(ReferenceEngine(federation, seed=0), FaultsConfig(drop=0.3, nan=0.05))
    faulty, state, records = trained(federation, engine, FedGradNorm(), Mean(), **SETTINGS[name])
    share = sum(len(record.dropped) for record in records) / sum(
        len(record.instructions) for record in records
    )
    assert share == pytest.approx(1 - 0.7 * 0.95, abs=0.1)
    assert np.mean(list(clean.values())) < 0.8  # it has learned
    assert np.mean(list(faulty.values())) < 1.1 * np.mean(list(clean.values()))
    assert sum(state.weighting.weights.values()) == pytest.approx(len(federation.clients))


class Loud(ReferenceEngine):
    """One client sends its update a thousandfold in every round."""

    def __init__(self, federation, client):
        super().__init__(federation, seed=0)
        self.loud = client

    def execute(self, instructions):
        return [
            replace(one, gradient=1000 * one.gradient, grad_norm=1000 * one.grad_norm)
            if one.client == self.loud
            else one
            for one in super().execute(instructions)
        ]


def others(rates, loud):
    return {id: rate for id, rate in rates.items() if id != loud}


RADCOM = {**SETTINGS["radcom"], "num_rounds": 30}


@pytest.mark.parametrize("weighting", [Equal(), FedGradNorm()], ids=["equal", "fedgradnorm"])
@pytest.mark.parametrize(
    "aggregate", [ClippedMean(), TrimmedMean()], ids=["clipped_mean", "trimmed_mean"]
)
def test_a_thousandfold_update_does_the_others_no_harm_under_a_robust_aggregation(
    aggregate, weighting
):
    """Held against the run in which that client is honest. Nobody is screened by length."""
    federation, loud = radcom.make(0, snapshots=10), "modulation"
    honest, _, _ = trained(
        federation, ReferenceEngine(federation, seed=0), weighting, aggregate, **RADCOM
    )
    attacked, _, records = trained(
        federation, Loud(federation, loud), weighting, aggregate, **RADCOM
    )
    assert not any(record.dropped for record in records)
    for id, rate in others(attacked, loud).items():
        assert rate < 1.1 * honest[id], id


@pytest.mark.parametrize("weighting", [Equal(), FedGradNorm()], ids=["equal", "fedgradnorm"])
def test_screening_catches_a_thousandfold_update_from_the_first_round_on(weighting):
    """What is left is, to the bit, the run without that client; and against the one with it honest the others lose nothing."""
    federation, loud = radcom.make(0, snapshots=10), "modulation"
    rest = replace(
        federation, clients=[client for client in federation.clients if client.id != loud]
    )
    settings = {**RADCOM, "max_update_ratio": 10.0}
    attacked, state, records = trained(
        federation, Loud(federation, loud), weighting, Mean(), **settings
    )
    assert {tuple(record.dropped) for record in records} == {(loud,)}
    assert all("times as long as usual" in record.dropped[loud] for record in records)
    without, expected, _ = trained(
        rest, ReferenceEngine(rest, seed=0), weighting, Mean(), **settings
    )
    assert attacked == without
    assert torch.equal(state.encoder, expected.encoder)
    assert state.weighting.weights == pytest.approx({**expected.weighting.weights, loud: 1.0})
    honest, _, records = trained(
        federation, ReferenceEngine(federation, seed=0), weighting, Mean(), **settings
    )
    assert not any(record.dropped for record in records)  # an honest run loses nothing to it
    for id, rate in others(attacked, loud).items():
        assert rate < 1.1 * honest[id], id


def test_the_mean_without_screening_is_ruined_by_a_thousandfold_update():
    federation, loud = radcom.make(0, snapshots=10), "modulation"
    state, training = initial_state(federation, Equal(), 0), TrainConfig(**RADCOM)
    engine, rates = Loud(federation, loud), []
    try:
        for _ in range(training.num_rounds):
            state, record = run_round(state, federation, engine, Equal(), Mean(), training)
            left = [one.inverse_training_rate for one in record.reports if one.client != loud]
            rates.append(
                max(left, default=float("inf"))
            )  # inf: the others' gradients are zero or not finite
    except StoppedError:  # the encoder is dead: nobody has a gradient any more
        rates.append(float("inf"))
    assert rates[-1] > 1.0
    assert max(rates) > 10


DIGITS = {
    "num_rounds": 60,
    "head_lr": 0.02,
    "encoder_lr": 0.02,
    "head_steps": 5,
    "encoder_steps": 5,
    "batch_size": 32,
}


def digits_with_a_large_loss():
    """The digits, with the whole squared error of the mass: one of the four has much the longest gradient."""
    made = digits.make(0)
    clients = [
        replace(one, task=replace(one.task, loss=nn.functional.mse_loss))
        if one.id == "mass"
        else one
        for one in made.clients
    ]
    return replace(made, clients=clients)


def worst_of_few(weighting, aggregate):
    """The worst other client's loss of four against the run in which the loud one is honest."""
    federation, loud = digits_with_a_large_loss(), "class"
    honest, _, _ = trained(
        federation, ReferenceEngine(federation, seed=0), weighting, aggregate, **DIGITS
    )
    attacked, _, _ = trained(federation, Loud(federation, loud), weighting, aggregate, **DIGITS)
    return max(rate / honest[id] for id, rate in others(attacked, loud).items())


@pytest.mark.parametrize("weighting", [Equal(), FedGradNorm()], ids=["equal", "fedgradnorm"])
def test_of_few_clients_the_trimmed_mean_hears_nothing_of_a_loud_one(weighting):
    assert worst_of_few(weighting, TrimmedMean()) < 1.1


def test_of_few_clients_one_that_is_let_through_thrice_as_long_as_usual_is_still_too_loud():
    """The limit of clipping: of four clients, three thirds of the rest are half of the mean. At ``clip=1`` nobody counts for more."""
    assert worst_of_few(Equal(), ClippedMean(clip=1.0)) < 1.1
    assert worst_of_few(Equal(), ClippedMean(clip=3.0)) > 1.1


def test_clipping_does_not_undo_what_a_false_norm_does_to_the_weights():
    """The other limit: a thousandfold norm raises every target, and so moves the others' weights. The harm is small but there."""
    assert 1.03 < worst_of_few(FedGradNorm(), ClippedMean()) < 1.25
