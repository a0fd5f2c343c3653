"""Which checkpoints are kept."""

from dataclasses import replace

import pytest
import torch

from fedgradnorm.runs.checkpoint import (
    Checkpoint,
    later_than,
    load_newest,
    save_checkpoint,
    set_aside,
    sound_rounds,
)
from fedgradnorm.server import ServerState
from fedgradnorm.weighting.base import WeightingState

MEMBERS = {
    "encoder": [],
    "fixed": {},
    "clients": {},
    "buffers": "local",
    "norm_layer": None,
    "modules": None,
}


def checkpoint(round, seconds=0.0):
    server = ServerState(round, torch.zeros(3), {}, WeightingState({"a": 1.0}))
    return Checkpoint(server, {}, {}, MEMBERS, seconds)


def save(folder, keep, *rounds):
    for place, round in enumerate(rounds):
        path = save_checkpoint(folder, checkpoint(round, float(place)), keep)
        assert path.exists()
    return path


def kept(folder):
    return sorted(int(path.name[6:14]) for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_a_round_that_is_saved_again_with_other_content_counts_once(tmp_path, keep, left):
    save(tmp_path, keep, 1, 2, 3, 4, 5)
    for seconds in range(10, 20):
        save_checkpoint(tmp_path, checkpoint(5, float(seconds)), keep)
        assert kept(tmp_path) == left
        assert load_newest(tmp_path)[0].seconds == seconds


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_two_files_of_one_earlier_round_count_once(tmp_path, keep):
    """A process may be killed after it wrote a round again, before it removed the first file."""
    save(tmp_path, 9, 1, 2, 3)
    twin = save_checkpoint(tmp_path / "other", checkpoint(3, 77.0), 1)
    twin.rename(tmp_path / twin.name)
    save(tmp_path, keep, 4)
    assert sorted(set(kept(tmp_path))) == [1, 2, 3, 4][-keep:]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_damaged_checkpoint_that_was_set_aside_does_not_count_and_may_be_saved_again(
    tmp_path, keep
):
    save(tmp_path, keep, 1, 2, 3)
    path = load_newest(tmp_path)[1]
    content = path.read_bytes()
    path.write_bytes(b"")
    set_aside(path)
    again = save_checkpoint(tmp_path, checkpoint(3, 2.0), keep)
    assert (again, again.read_bytes()) == (path, content)
    assert kept(tmp_path) == [1, 2, 3][-keep:]
    assert path.with_name(f"{path.name}.damaged").exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_those_of_later_rounds_push_out_none(tmp_path, keep):
    save(tmp_path, 9, 1, 2, 3, 7, 8, 9)
    save(tmp_path, keep, 4)
    assert kept(tmp_path) == [*[1, 2, 3, 4][-keep:], 7, 8, 9]
    assert load_newest(tmp_path, 5)[0].server.round == 4


def test_which_are_later_and_which_are_sound(tmp_path):
    save(tmp_path, 9, 1, 2, 3, 4)
    newest = load_newest(tmp_path)[1]
    newest.write_bytes(b"")
    assert sound_rounds(tmp_path) == [1, 2, 3]
    set_aside(newest)
    assert [path.name[6:14] for path in later_than(tmp_path, 2)] == ["00000004", "00000003"]
    assert sound_rounds(tmp_path / "nowhere") == later_than(tmp_path / "nowhere", 0) == []
    with_other_rounds = replace(checkpoint(2), seconds=5.0)
    assert save_checkpoint(tmp_path, with_other_rounds, 9).exists()
    assert sound_rounds(tmp_path) == [1, 2, 3]
