import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import Client, Federation, Task
from fedgradnorm.client import ClientState, initial_state, local_update, loss_batches, mean_loss
from fedgradnorm.config import TrainConfig
from fedgradnorm.data import batch_order, num_passes, take
from fedgradnorm.evaluation import evaluate
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import buffers_of, flatten, norm_layer_slices, norm_over
from fedgradnorm.randomness import quick_generator
from tests.helpers import (
    batch_norm_encoder,
    dropout_encoder,
    small_client,
    small_encoder,
    small_federation,
)


def batches(data, batch_size, num_batches, *key):
    numbers = quick_generator(*key).random(
        (num_passes(len(data[0]), batch_size, num_batches), len(data[0]))
    )
    return [take(data, indices) for indices in batch_order(numbers, batch_size, num_batches)]


TRAINING = TrainConfig(
    head_steps=3, encoder_steps=4, head_lr=0.3, encoder_lr=0.2, batch_size=8, seed=5
)


def prepare(encoder=small_encoder, dtype=torch.float32, training=TRAINING, **options):
    federation = (
        small_federation(encoder=lambda: encoder().to(dtype), **options)
        if dtype == torch.float32
        else doubled(encoder)
    )
    client = federation.clients[1]
    module, head = federation.make_encoder(5), federation.make_head(client, 5).to(dtype)
    state = initial_state(federation, client, 5, buffers_of(module))
    state = ClientState(
        {name: value.to(dtype) for name, value in state.head.items()},
        encoder_buffers=state.encoder_buffers,
    )
    shared = buffers_of(module) if federation.buffers == "averaged" else {}
    instruction = Instruction(7, client.id, flatten(module), shared, training)
    return (
        client,
        module,
        head,
        norm_layer_slices(module, federation.norm_layer),
        state,
        instruction,
    )


def doubled(encoder):
    inputs = torch.tensor(np.random.default_rng(3).normal(size=(30, 6)))
    task = Task(
        "sign",
        lambda features: nn.Linear(features, 2, dtype=torch.float64),
        functional.cross_entropy,
    )
    clients = [Client(id, task, (inputs, (inputs[:, 0] > 0).long())) for id in "abc"]
    return Federation(clients, lambda: encoder().double())


def test_the_gradient_is_the_way_that_plain_sgd_went():
    client, encoder, head, norm_layer, state, instruction = prepare(dtype=torch.float64)
    report, _ = local_update(client, encoder, head, norm_layer, state, instruction)
    way = (instruction.encoder - flatten(encoder)) / (TRAINING.encoder_steps * TRAINING.encoder_lr)
    torch.testing.assert_close(report.gradient, way, rtol=1e-6, atol=1e-12)
    assert report.gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_that_of_a_hand_written_autograd_of_the_same_batches(dtype):
    """The encoder 6-8-4 and the head 4-2 as bare tensors; the same batches, drawn from the same generators."""
    client, encoder, head, norm_layer, state, instruction = prepare(dtype=dtype)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    w = [encoder.state_dict()[name].clone() for name in names]
    h = [state.head["weight"].clone(), state.head["bias"].clone()]

    def loss_of(w, h, inputs, targets):
        hidden = torch.relu(inputs @ w[0].T + w[1])
        outputs = torch.relu(hidden @ w[2].T + w[3]) @ h[0].T + h[1]
        return (outputs.logsumexp(1) - outputs[torch.arange(len(targets)), targets]).mean()

    for inputs, targets in batches(client.train_data, 8, 3, 5, 7, client.id, "head batches"):
        h = [value.requires_grad_() for value in h]
        gradients = torch.autograd.grad(loss_of(w, h, inputs, targets), h)
        h = [
            (value - 0.3 * gradient).detach() for value, gradient in zip(h, gradients, strict=True)
        ]
    total, losses = [torch.zeros_like(value) for value in w], []
    for inputs, targets in batches(client.train_data, 8, 4, 5, 7, client.id, "encoder batches"):
        w = [value.requires_grad_() for value in w]
        loss = loss_of(w, h, inputs, targets)
        gradients = torch.autograd.grad(loss, w)
        w = [
            (value - 0.2 * gradient).detach() for value, gradient in zip(w, gradients, strict=True)
        ]
        total = [sum_ + gradient for sum_, gradient in zip(total, gradients, strict=True)]
        losses.append(loss.item())

    report, after = local_update(client, encoder, head, norm_layer, state, instruction)
    expected = torch.cat([value.flatten() for value in total]) / 4
    torch.testing.assert_close(report.gradient, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after.head["weight"], h[0], rtol=1e-6, atol=1e-7)
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert report.grad_norm == pytest.approx(
        (expected[-(4 * 8 + 4) :] ** 2).sum().sqrt().item(), rel=1e-6
    )


def test_the_report_says_what_it_should():
    client, encoder, head, norm_layer, state, instruction = prepare()
    report, after = local_update(client, encoder, head, norm_layer, state, instruction)
    head.load_state_dict(dict(state.head))
    with torch.no_grad():
        (inputs, targets), encoder = client.train_data, small_federation().make_encoder(5)
        losses = [
            functional.cross_entropy(head(encoder(inputs[batch])), targets[batch])
            for batch in loss_batches(client, TRAINING)
        ]
        first = torch.stack(losses).mean().item()
    assert report.initial_loss == pytest.approx(first, rel=1e-5)
    assert after.initial_loss == report.initial_loss
    assert (report.client, report.task, report.num_examples) == (client.id, "sign", 25)
    assert report.inverse_training_rate == report.loss / report.initial_loss
    assert report.num_bytes == 4 * len(instruction.encoder) + 24


def test_the_initial_loss_is_measured_once():
    client, encoder, head, norm_layer, state, instruction = prepare()
    _, after = local_update(client, encoder, head, norm_layer, state, instruction)
    moved = Instruction(8, client.id, instruction.encoder + 1, {}, TRAINING)
    report, _ = local_update(client, encoder, head, norm_layer, after, moved)
    assert report.initial_loss == after.initial_loss


def test_a_state_and_an_instruction_are_not_changed_and_scratch_modules_do_not_matter():
    client, encoder, head, norm_layer, state, instruction = prepare(batch_norm_encoder)
    frozen_head, frozen_encoder = (
        {name: value.clone() for name, value in state.head.items()},
        instruction.encoder.clone(),
    )
    first, _ = local_update(client, encoder, head, norm_layer, state, instruction)
    again, _ = local_update(
        client, encoder, head, norm_layer, state, instruction
    )  # with what the first left in the modules
    assert torch.equal(first.gradient, again.gradient)
    assert first.loss == again.loss
    assert torch.equal(instruction.encoder, frozen_encoder)
    assert all(torch.equal(state.head[name], frozen_head[name]) for name in frozen_head)


def test_an_exact_loss_is_that_of_the_new_head_on_the_received_encoder():
    training = TRAINING.model_copy(update={"loss_estimate": "exact"})
    client, encoder, head, norm_layer, state, instruction = prepare(training=training)
    report, after = local_update(client, encoder, head, norm_layer, state, instruction)
    federation = small_federation()
    head.load_state_dict(dict(after.head))
    with torch.no_grad():
        (inputs, targets), received = client.train_data, federation.make_encoder(5)
        losses = [
            functional.cross_entropy(head(received(inputs[batch])), targets[batch])
            for batch in loss_batches(client, training)
        ]
        expected = torch.stack(losses).mean().item()
    assert report.loss == pytest.approx(expected, rel=1e-5)


def test_the_cap_on_examples_takes_the_same_ones_every_time():
    client, encoder, head, *_ = prepare()
    few = TRAINING.model_copy(update={"loss_examples": 4})
    one, other, all_of_them = (
        mean_loss(client, encoder, head, training) for training in (few, few, TRAINING)
    )
    assert one == other != all_of_them


def test_local_buffers_stay_and_averaged_ones_are_sent():
    client, encoder, head, norm_layer, state, instruction = prepare(batch_norm_encoder)
    report, after = local_update(client, encoder, head, norm_layer, state, instruction)
    assert report.buffers == {}
    assert (
        after.encoder_buffers["1.num_batches_tracked"]
        == TRAINING.head_steps + TRAINING.encoder_steps
    )
    assert not torch.equal(
        after.encoder_buffers["1.running_mean"], state.encoder_buffers["1.running_mean"]
    )

    client, encoder, head, norm_layer, state, instruction = prepare(
        batch_norm_encoder, buffers="averaged"
    )
    report, after = local_update(client, encoder, head, norm_layer, state, instruction)
    assert after.encoder_buffers == {}
    assert report.buffers.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_head_momentum_is_kept_from_round_to_round():
    """Two rounds of one head step are two steps of one optimiser, when the encoder stands still."""
    training = TrainConfig(
        head_steps=1,
        encoder_steps=1,
        head_lr=0.1,
        head_momentum=0.9,
        encoder_lr=0.1,
        batch_size=8,
        seed=5,
    )
    client, encoder, head, norm_layer, state, instruction = prepare(training=training)
    _, middle = local_update(client, encoder, head, norm_layer, state, instruction)
    _, last = local_update(
        client,
        encoder,
        head,
        norm_layer,
        middle,
        Instruction(8, client.id, instruction.encoder, {}, training),
    )

    encoder, head = small_federation().make_encoder(5), small_federation().make_head(client, 5)
    head.load_state_dict(dict(state.head))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for round in (7, 8):
        (inputs, targets), *_ = batches(
            client.train_data, 8, 1, 5, round, client.id, "head batches"
        )
        optimizer.zero_grad()
        functional.cross_entropy(head(encoder(inputs).detach()), targets).backward()
        optimizer.step()
    torch.testing.assert_close(last.head["weight"], head.weight.detach())


def test_dropout_is_drawn_from_seed_round_and_client():
    client, encoder, head, norm_layer, state, instruction = prepare(dropout_encoder)
    one, _ = local_update(client, encoder, head, norm_layer, state, instruction)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        same, _ = local_update(client, encoder, head, norm_layer, state, instruction)
    other_seed = TRAINING.model_copy(update={"seed": 6})
    other, _ = local_update(
        client,
        encoder,
        head,
        norm_layer,
        state,
        Instruction(7, client.id, instruction.encoder, {}, other_seed),
    )
    assert torch.equal(one.gradient, same.gradient)
    assert not torch.equal(one.gradient, other.gradient)


def test_the_norm_is_that_of_the_named_parts():
    assert norm_over(torch.tensor([3.0, 100.0, 4.0]), (slice(0, 1), slice(2, 3))) == 5.0


def test_evaluate_is_over_all_examples_whatever_the_batches():
    client = small_client("a", examples=1100)
    federation = small_federation()
    encoder, head = federation.make_encoder(0), federation.make_head(federation.clients[0], 0)
    evaluation = evaluate(client.task, encoder, head, client.train_data)
    with torch.no_grad():
        outputs = head(encoder(client.train_data[0]))
    assert evaluation.num_examples == 1100
    assert evaluation.loss == pytest.approx(
        functional.cross_entropy(outputs, client.train_data[1]).item(), rel=1e-5
    )
    assert evaluation.metrics["accuracy"] == pytest.approx(
        (outputs.argmax(1) == client.train_data[1]).float().mean().item()
    )
