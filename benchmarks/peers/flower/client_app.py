"""The client of the Flower peer; a module of its own, so that Ray's workers import it once and keep what it caches."""

from functools import cache
from itertools import islice

import torch
from common import ENCODER, HEAD, batches, first_head
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn import functional
from workloads import WORKLOADS

app = ClientApp()


@cache
def networks(workload: str) -> tuple[nn.Module, nn.Module]:
    """An encoder and a head to load weights into: made once a worker, not once a message."""
    torch.set_num_threads(1)  # a worker has one CPU; Ray runs as many of them as there are
    return WORKLOADS[workload].encoder(), WORKLOADS[workload].head()


@cache
def data(workload: str, client: int) -> tuple[Tensor, Tensor]:
    """A client's data: made once a worker, not once a message."""
    return WORKLOADS[workload].data(client)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the head, which stays in the client's state, then the encoder, which goes back to the server."""
    name, round = (
        str(message.content["config"]["workload"]),
        int(message.content["config"]["server-round"]),
    )
    client, workload = int(context.node_config["partition-id"]), WORKLOADS[name]
    encoder, head = networks(name)
    encoder.load_state_dict(message.content["arrays"].to_torch_state_dict())
    state = (
        context.state["head"].to_torch_state_dict()
        if "head" in context.state
        else first_head(workload, client).state_dict()
    )
    head.load_state_dict(state)

    optimizer = torch.optim.SGD(head.parameters(), workload.step_size)
    for inputs, targets in islice(
        batches(data(name, client), workload, client, round, HEAD), workload.head_steps
    ):
        with torch.no_grad():
            features = encoder(inputs)
        optimizer.zero_grad()
        functional.cross_entropy(head(features), targets).backward()
        optimizer.step()

    losses = []
    head.requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), workload.step_size)
    for inputs, targets in islice(
        batches(data(name, client), workload, client, round, ENCODER), workload.encoder_steps
    ):
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(encoder(inputs)), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    head.requires_grad_(True)

    context.state["head"] = ArrayRecord(head.state_dict())
    metrics = MetricRecord(
        {"loss": float(torch.stack(losses).mean()), "num-examples": workload.examples}
    )
    return Message(
        RecordDict({"arrays": ArrayRecord(encoder.state_dict()), "metrics": metrics}),
        reply_to=message,
    )
