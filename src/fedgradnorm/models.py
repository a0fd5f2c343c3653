"""Encoders and heads of the built-in federations. Users may bring any nn.Module."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from fedgradnorm.errors import ConfigError

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
        he_init: whether weights are initialised for ReLU (He et al., ICCV 2015) and biases with 0.
            Signals then keep their size. torch's default shrinks their variance sixfold per layer,
            and six layers hardly train from that.

    Raises:
        ConfigError: a size is out of range.
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
    """Convolution blocks, then one fully connected layer, ``fc``.

    A block is a 3 x 3 convolution, optional BatchNorm, 2 x 2 max-pooling and a ReLU. Pooling before
    the ReLU gives the same numbers for a quarter of the work. The channels-last layout is more than
    twice as fast on CPUs.
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
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stub

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(batch, features)`` of images ``(batch, channels, height, width)``."""
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

    Raises:
        ConfigError: a size is out of range, or the images are too small.
    """
    shape, blocks = tuple(input_shape), len(channels)
    if len(shape) != 3:
        raise ConfigError(
            f"name: cnn takes inputs of shape (channels, height, width), found {shape}"
        )
    if not channels or not 1 <= min(*channels, features) <= max(*channels, features) <= MOST_UNITS:
        found = f"expected sizes from 1 to {MOST_UNITS}, found {list(channels)} and {features}"
        raise ConfigError(f"channels, features: {found}")
    if min(shape[1:]) < (size := 2**blocks):
        needed = f"{blocks} blocks need images of {size} x {size} or more"
        raise ConfigError(f"channels: {needed}, found {shape[1:]}")
    return ConvEncoder(input_shape, channels, features, batch_norm)


def linear_head(in_features: int, out_features: int) -> nn.Module:
    """One linear layer, the head of every built-in task."""
    return nn.Linear(in_features, out_features)
