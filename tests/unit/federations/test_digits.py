import numpy as np
import pytest
import torch

from fedgradnorm import ConfigError, train
from fedgradnorm.federations import digits


def test_four_tasks_on_disjoint_training_images_and_one_whole_test_split():
    federation = digits.make(0)
    assert federation.client_ids == ["class", "parity", "loop", "mass"]
    images = [federation.client(id).train_data[0] for id in federation.client_ids]
    assert sum(len(part) for part in images) + 450 == 1797
    assert {len(client.test_data[0]) for client in federation.clients} == {450}
    tests = [client.test_data[0] for client in federation.clients]
    assert all(torch.equal(tests[0], other) for other in tests)
    assert torch.cat(images).std() == pytest.approx(1, abs=0.02)


def test_labels_follow_from_the_digit():
    tests = {client.id: client.test_data[1] for client in digits.make(0).clients}
    assert torch.equal(tests["parity"], tests["class"] % 2)
    assert set(tests["class"][tests["loop"] == 1].tolist()) == {0, 6, 8, 9}
    large = digits.make(0, tasks=["large"]).clients[0].test_data[1]
    assert set(tests["class"][large == 1].tolist()) == {5, 6, 7, 8, 9}
    pool = digits.make(0, tasks=["mass"], test_fraction=0.01).clients[0].train_data[1]
    np.testing.assert_allclose([pool.mean(), pool.std()], [0, 1], atol=0.02)


def test_the_order_of_tasks_changes_only_the_order_of_clients():
    one, other = digits.make(3), digits.make(3, tasks=["mass", "loop", "class", "parity"])
    for client in one.clients:
        assert torch.equal(client.train_data[0], other.client(client.id).train_data[0])


def test_ten_times_less_for_one_task():
    federation = digits.make(0, sizes={"loop": 33})
    assert [len(client.train_data[0]) for client in federation.clients] == [336, 336, 33, 336]


def test_a_test_fraction_out_of_range_is_refused():
    with pytest.raises(
        ConfigError, match=r"test_fraction: expected a number from 0.01 to 0.9, found 1"
    ):
        digits.make(0, test_fraction=1)


def test_a_loss_on_another_scale_has_as_many_times_the_gradient_and_the_same_ratio():
    plain, scaled = (
        {
            row["client"]: row
            for row in train(
                digits.make(0, loss_scale=scale),
                "equal",
                num_rounds=1,
                head_steps=1,
                encoder_steps=1,
                head_lr=1e-6,
            ).rows
        }
        for scale in ({}, {"loop": 100.0})
    )
    assert scaled["loop"]["loss"] == pytest.approx(100 * plain["loop"]["loss"], rel=1e-3)
    assert scaled["loop"]["initial_loss"] == pytest.approx(
        100 * plain["loop"]["initial_loss"], rel=1e-5
    )
    assert scaled["loop"]["grad_norm"] == pytest.approx(100 * plain["loop"]["grad_norm"], rel=1e-2)
    assert scaled["class"]["loss"] == plain["class"]["loss"]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"lop": 2.0}, "there is no task 'lop'; did you mean 'loop'"),
        ({"loop": 0.0}, "expected a finite number above 0"),
    ],
)
def test_bad_loss_scales_are_refused(scale, message):
    with pytest.raises(ConfigError, match=message):
        digits.make(0, loss_scale=scale)
