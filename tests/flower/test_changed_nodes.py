from fedgradnorm.client import ClientState
from fedgradnorm.config import TrainConfig
from fedgradnorm.flower import FlowerLocalEngine
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import flatten
from tests.helpers import small_federation

TRAINING = TrainConfig(head_steps=2, encoder_steps=2, batch_size=8)


def instructions(federation, round):
    encoder = flatten(federation.make_encoder(0))
    return [
        Instruction(round, client, encoder, {}, TRAINING, 0) for client in federation.client_ids
    ]


def test_a_node_that_is_restarted_as_another_client_is_asked_anew():
    federation = small_federation()
    engine = FlowerLocalEngine(federation, 0)
    assert len(engine.execute(instructions(federation, 1))) == 3
    nodes = engine.grid.nodes
    nodes[2], nodes[3] = (
        nodes[3],
        nodes[2],
    )  # an operator has corrected two nodes' client keys; their ids stay
    assert [report.client for report in engine.execute(instructions(federation, 2))] == ["c"]
    assert engine.failures.keys() == {"a", "b"}
    assert {failure.kind for failure in engine.failures.values()} == {"error"}
    assert [report.client for report in engine.execute(instructions(federation, 3))] == [
        "a",
        "b",
        "c",
    ]
    assert engine.failures == {}
    rounds = {client: state.round for client, state in engine.client_states.items()}
    assert rounds == {"a": 3, "b": 3, "c": 3}
    assert all(isinstance(state, ClientState) for state in engine.client_states.values())
