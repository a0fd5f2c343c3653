"""Encoders and heads for the built-in federations. Users bring their own as any nn.Module."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from fedgradnorm.errors import ConfigError

__all__ = ["ConvEncoder", "cnn", "linear_head", "mlp"]


MOST_UNITS = 100_000


def mlp(
    input_shape: Sequence[int],
    hidden: Sequence[int] = (256, 512, 1024, 2048, 512, 256),
    he_init: bool = True,
) -> nn.Module:
    """A multi-layer perceptron with ReLU after every layer.

    Args:
        input_shape: the shape of one input, ``(256,)`` for RadCom; it is flattened.
        hidden: the sizes of the layers; the default is the size recalled for RadComDynamic.
        he_init: whether weights are initialised for ReLU (He et al., ICCV 2015) and biases with 0. Signals then keep their size,
            where torch's own default shrinks their variance sixfold a layer: six layers hardly train from that.
    """
    if not hidden or min(hidden) < 1 or max(hidden) > MOST_UNITS:
        raise ConfigError(f"hidden: expected sizes from 1 to {MOST_UNITS}, found {list(hidden)}")
    sizes = [prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    encoder = nn.Sequential(*layers)
    if he_init:
        for layer in encoder:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return encoder


class ConvEncoder(nn.Module):
    """Convolution blocks (3 x 3, optional BatchNorm, 2 x 2 max-pooling, ReLU), then one fully connected layer, ``fc``.

    Pooling comes before the ReLU, which gives the same numbers for a quarter of the work, and the tensors are
    kept in the channels-last layout, which is more than twice as fast on CPUs.
    """

    def __init__(
        self, input_shape: Sequence[int], channels: Sequence[int], features: int, batch_norm: bool
    ) -> None:
        super().__init__()
        depth, height, width = input_shape
        layers: list[nn.Module] = []
        for inputs, outputs in zip([depth, *channels[:-1]], channels, strict=True):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers += [nn.MaxPool2d(2), nn.ReLU()]
        self.blocks = nn.Sequential(*layers)
        shrink = 2 ** len(channels)
        self.fc = nn.Linear(channels[-1] * (height // shrink) * (width // shrink), features)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub knows no memory_format alone

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape ``(batch, channels, height, width)`` to features of shape ``(batch, features)``."""
        maps = self.blocks(images.contiguous(memory_format=torch.channels_last))
        return torch.relu(self.fc(maps.flatten(1)))


def cnn(
    input_shape: Sequence[int],
    channels: Sequence[int] = (16, 48, 64, 64),
    features: int = 100,
    batch_norm: bool = False,
) -> nn.Module:
    """A small convolutional network for face crops.

    Args:
        input_shape: ``(channels, height, width)`` of one image.
        channels: the output channels of each block; each block halves height and width.
        features: the size of the output.
        batch_norm: whether the blocks have BatchNorm.
    """
    if len(input_shape) != 3:
        raise ConfigError(
            f"name: cnn takes inputs of shape (channels, height, width), found {tuple(input_shape)}"
        )
    if not channels or not 1 <= min(*channels, features) <= max(*channels, features) <= MOST_UNITS:
        raise ConfigError(
            f"channels, features: expected sizes from 1 to {MOST_UNITS}, found {list(channels)} and {features}"
        )
    if min(input_shape[1:]) < 2 ** len(channels):
        size = 2 ** len(channels)
        raise ConfigError(
            f"channels: {len(channels)} blocks need images of {size} x {size} or more, found {tuple(input_shape[1:])}"
        )
    return ConvEncoder(input_shape, channels, features, batch_norm)


def linear_head(in_features: int, out_features: int) -> nn.Module:
    """One linear layer: the head of every built-in task."""
    return nn.Linear(in_features, out_features)
