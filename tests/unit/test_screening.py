"""Which reports count, and why others do not."""

from dataclasses import replace

import pytest
import torch

from fedgradnorm.config import TrainConfig
from fedgradnorm.messages import Instruction
from fedgradnorm.server import screen
from tests.helpers import report

TRAINING = TrainConfig(head_steps=2, encoder_steps=3, encoder_lr=0.1, server_lr=0.5, batch_size=8)


SOUND = report("a", 0.5, 0.9, round=1)


INSTRUCTION = Instruction(1, "a", torch.zeros(3), {}, TRAINING)


@pytest.mark.parametrize(
    ("unsound", "reason"),
    [
        (replace(SOUND, gradient=torch.zeros(4)), "gradient: "),
        (replace(SOUND, gradient=torch.zeros(3, dtype=torch.float64)), "gradient: "),
        (replace(SOUND, gradient=torch.tensor([0.0, float("nan"), 0.0])), "gradient: "),
        (replace(SOUND, loss=float("nan")), "loss"),
        (replace(SOUND, loss=float("inf")), "loss"),
        (replace(SOUND, initial_loss=float("nan")), "initial_loss"),
        (replace(SOUND, loss_floor=float("-inf")), "loss_floor"),
        (replace(SOUND, grad_norm=-1.0), "grad_norm"),
        (replace(SOUND, grad_norm=float("inf")), "grad_norm"),
        (replace(SOUND, grad_norm=1e200), "grad_norm"),
        (replace(SOUND, initial_loss=1e-25, loss=1e90), "inverse_training_rate"),
        (replace(SOUND, buffers={"x": torch.zeros(1)}), "buffers"),
    ],
)
def test_an_unsound_report_is_dropped_with_its_reason(unsound, reason):
    sound, dropped = screen([unsound], [INSTRUCTION], {})
    assert sound == []
    assert reason in dropped["a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": -1.0},
        {"initial_loss": 0.0},
        {"initial_loss": -3.0},
        {"grad_norm": 0.0},
        {"loss": 0.0},
    ],
)
def test_nothing_left_to_learn_and_losses_of_any_sign_are_sound(changes):
    sound, dropped = screen([replace(SOUND, **changes)], [INSTRUCTION], {})
    assert (len(sound), dropped) == (1, {})


def test_a_missing_report_is_a_dropped_one_and_a_sound_one_passes():
    sound, dropped = screen([SOUND], [INSTRUCTION, replace(INSTRUCTION, client="b")], {})
    assert sound == [SOUND]
    assert dropped == {"b": "no report"}


def test_buffers_are_screened_too():
    instruction = replace(INSTRUCTION, buffers={"x": torch.zeros(2)})
    for bad in (torch.zeros(3), torch.tensor([0.0, float("inf")])):
        assert "buffer x" in screen([replace(SOUND, buffers={"x": bad})], [instruction], {})[1]["a"]
