"""The scratch models of a worker, arranged for speed."""

import torch
from torch import Tensor, nn

from fedgradnorm.engines.failures import Attempt
from fedgradnorm.engines.watching import Watch
from fedgradnorm.federation import Client, Federation
from fedgradnorm.modules import follow
from fedgradnorm.parameters import norm_layer_slices, trainable
from fedgradnorm.randomness import seeded

SAME = {torch.float32: 1e-4, torch.float64: 1e-9}
"""The largest relative distance of equal results: far above rounding, far below a difference."""

ENCODED_AT_ONCE = 4096
"""Examples of all clients together in one pass through the encoder."""


class Workspace:
    """An encoder, and a head of each kind, as the scratch space of one worker.

    Args:
        federation: the models.
        seed: of their initialisation, whose values frozen parameters keep.
        device: where the models are.
        arranged: whether the encoder is arranged for speed, see `arrange`.
    """

    def __init__(
        self, federation: Federation, seed: int, device: torch.device, arranged: bool = False
    ) -> None:
        self.federation, self.seed, self.device = federation, seed, device
        self.encoder = federation.make_encoder(seed).to(device)
        self.norm_layer = norm_layer_slices(self.encoder, federation.norm_layer)
        if arranged:
            arrange(self.encoder)
        self._heads: dict[object, nn.Module] = {}

    def head(self, client: Client) -> nn.Module:
        """A head of this client's kind. Its parameters may have any values."""
        kind = self.federation.head_kind(client, self.seed)
        if kind in self._heads:
            return self._heads[kind]
        head = self.federation.make_head(client, self.seed).to(self.device)
        if not holds_more_than_its_state(head):
            self._heads[kind] = head
        return head

    def own_head(self, client: Client) -> nn.Module:
        """The head of this client alone, always the same one."""
        if client.id not in self._heads:
            self._heads[client.id] = self.federation.make_head(client, self.seed).to(self.device)
        return self._heads[client.id]

    def follow(self) -> None:
        """Repeat in the models what was set in the users' own objects since they were copied."""
        follow(self.encoder, *self._heads.values())


def holds_more_than_its_state(module: nn.Module) -> bool:
    """Whether a module has tensors that are not in its state dict, and may differ by client."""
    values = (value for part in module.modules() for value in vars(part).values())
    if any(isinstance(value, Tensor) for value in values):
        return True
    return bool(dict(module.named_buffers()).keys() - module.state_dict().keys())


def arrange(encoder: nn.Module) -> None:
    """Arrange an encoder for speed, in place: pooling before ReLU, convolutions channels-last."""
    pool_first(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = channels_last(module.weight.data)


def channels_last(weight: Tensor) -> Tensor:
    """A convolution's weights in the channels-last layout, by which torch lays out its output.

    ``contiguous`` does not change the weights of a single input channel, which lie the same in both
    layouts: then the output would not be in the channels-last layout.
    """
    _, inputs, height, width = weight.shape
    strides = inputs * height * width, 1, inputs * width, inputs
    return weight.new_empty_strided(weight.shape, strides).copy_(weight)


def can_be_arranged(
    federation: Federation, seed: int, device: torch.device, inputs: Tensor
) -> bool:
    """Whether arranging changes neither the features of this batch nor the gradients."""
    outcomes = []
    with Attempt("encoders are not arranged for speed"):
        for arranged in (False, True):
            encoder = Workspace(federation, seed, device, arranged).encoder
            watch = Watch([encoder], [])
            with seeded(0, 0, "", "arrange", device):
                outcomes.append(_features_and_gradients(encoder, inputs, watch))
        plain, other = outcomes
        return plain is not None and other is not None and all(map(same, plain, other))
    return False


def _features_and_gradients(
    encoder: nn.Module, inputs: Tensor, watch: Watch
) -> list[Tensor] | None:
    """The features in both modes and the gradients; None where the encoder changes in Python."""
    features = encoder.train()(inputs)
    if watch.changed() is not None:
        watch.put_back()
        return None
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(features.shape, generator=generator, dtype=torch.float64).to(features)
    total, parameters = (features * direction).sum(), [own for _, own in trainable(encoder)]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return [features.detach(), encoder.eval()(inputs).detach(), *gradients]


def encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    """The features of many clients' examples, some thousands in one pass."""
    return torch.cat([encoder(part) for part in inputs.split(ENCODED_AT_ONCE)])


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding."""
    first, second = first.to_dense(), second.to_dense()
    if first.shape != second.shape:
        return False
    apart, length = torch.linalg.vector_norm(first - second), torch.linalg.vector_norm(first)
    return bool(apart <= SAME.get(first.dtype, 1e-2) * length)


def views(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """The parameters as views into flat vectors of shape ``(P,)`` or ``(clients, P)``, by name."""
    parameters = trainable(module)
    parts = flat.split([parameter.numel() for _, parameter in parameters], dim=-1)
    return {
        name: part.view(*flat.shape[:-1], *parameter.shape)
        for (name, parameter), part in zip(parameters, parts, strict=True)
    }


def pool_first(module: nn.Module) -> None:
    """In every ``nn.Sequential``, exchange a ReLU with the max-pooling behind it.

    The numbers are the same, and the ReLU has a quarter of the work.
    """
    for sequence in module.modules():
        if type(sequence) is nn.Sequential:
            for place in range(len(sequence) - 1):
                activation, pool = sequence[place], sequence[place + 1]
                pools = type(pool) is nn.MaxPool2d and not pool.return_indices
                if pools and type(activation) is nn.ReLU:
                    sequence[place], sequence[place + 1] = pool, activation
