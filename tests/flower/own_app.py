"""A user's own Flower app, as its documentation shows one, with another task at every client."""

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedgradnorm.flower import FedGradNorm, FedGradNormMod, LocalGrid
from fedgradnorm.flower.states import MemoryStates
from tests.flower.nodes import Wire

STEPS, LR = 3, 0.1
SHARED = ["body.weight", "body.bias", "norm.weight", "norm.bias"]


class Net(nn.Module):
    """A body that is shared, with BatchNorm, and a head."""

    def __init__(self, classes=2):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, classes)

    def forward(self, inputs):
        return self.head(torch.relu(self.norm(self.body(inputs))))


def net_of(context):
    return Net(classes_of(context.node_config["partition-id"]))


def classes_of(part):
    return 3 if part == 2 else 2


def data_of(part):
    inputs = torch.randn(40, 8, generator=torch.Generator().manual_seed(part))
    return inputs, (inputs[:, part] > 0).long() + (inputs[:, part] > 1).long() * (part == 2)


def trained(model, part, steps=STEPS, lr=LR):
    """Train with the whole of a client's data. Gives the mean loss."""
    inputs, targets = data_of(part)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs.to(model.head.weight.dtype)), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / steps


def app_with(model=net_of, head="head", net=net_of, change=lambda content: None, **options):
    """The app with a mod; ``change`` is what it does to the contents of its replies."""
    app = ClientApp(mods=[FedGradNormMod(model, head, **options)])

    def model_in(message, context):
        model = net(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return model

    @app.train()
    def train(message, context):
        model, part = model_in(message, context), context.node_config["partition-id"]
        loss = trained(model, part, lr=message.content["config"].get("lr", LR))
        metrics = MetricRecord({"train_loss": loss, "num-examples": 40, "secret": 1.0})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        change(content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        model = model_in(message, context).eval()
        inputs, targets = data_of(context.node_config["partition-id"])
        outputs = model(inputs.to(model.head.weight.dtype))
        accuracy = (outputs.argmax(1) == targets).double().mean().item()
        metrics = {
            "eval_loss": nn.functional.cross_entropy(outputs, targets).item(),
            "eval_acc": accuracy,
            "num-examples": 40,
        }
        content = RecordDict({"metrics": MetricRecord(metrics)})
        change(content)
        return Message(content, reply_to=message)

    return app


def initial(seed=0, **options):
    torch.manual_seed(seed)
    return ArrayRecord(Net(**options).state_dict())


def direct(app, content, context, kind="train"):
    """What an app answers to one message."""
    return app(LocalGrid({}).create_message(content, kind, context.node_id, "1"), context)


class Own:
    """Clients with a user's own app on a wire, their states in memory."""

    def __init__(self, parts=(0, 1, 2), **options):
        self.wire, self.stores = Wire(), {f"client-{part}": MemoryStates() for part in parts}
        for part in parts:
            app = app_with(
                states=lambda _context, _experiment, client: self.stores[client], **options
            )
            self.wire.join(10 + part, app, **{"partition-id": part})

    def start(self, num_rounds=3, arrays=None, strategy=None, **options):
        strategy = strategy or FedGradNorm(
            head="head", node_timeout=0, **{"min_nodes": len(self.stores), **options}
        )
        return strategy.start(self.wire, arrays or initial(), num_rounds=num_rounds)

    def heads(self, round):
        return {
            client: {name: value.tolist() for name, value in store.load(round).head.items()}
            for client, store in self.stores.items()
        }


def values(arrays):
    return {name: array.numpy().tolist() for name, array in arrays.items()}


def spoil(content):
    if "arrays" in content:
        content["arrays"]["body.bias"] = Array(
            content["arrays"]["body.bias"].numpy() * float("nan")
        )
