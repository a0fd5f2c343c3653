import pytest
import torch
from torch import nn

from fedgradnorm import ConfigError
from fedgradnorm.models import cnn, mlp
from fedgradnorm.parameters import flatten, load_flat
from fedgradnorm.randomness import seeded


def made(factory, *args, **options):
    with seeded(0, 0, "", "test"):
        return factory(*args, **options)


def test_the_default_mlp_has_the_large_size():
    encoder = made(mlp, (256,))
    sizes = [
        (layer.in_features, layer.out_features) for layer in encoder if isinstance(layer, nn.Linear)
    ]
    assert sizes == [(256, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 512), (512, 256)]


def test_he_initialisation_keeps_the_size_of_signals():
    inputs = made(torch.randn, 200, 256)
    with torch.no_grad():
        he, default = (
            made(mlp, (256,), he_init=he_init)(inputs).square().mean() for he_init in (True, False)
        )
    assert 0.3 < he < 3
    assert default < 0.05


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_cnn_is_what_its_layers_say_whatever_their_layout(batch_norm):
    """Channels-last and pooling before ReLU change the speed and not the numbers."""
    encoder = made(cnn, (3, 17, 20), channels=[4, 5], features=6, batch_norm=batch_norm).eval()
    images = made(torch.randn, 2, 3, 17, 20)
    maps = images
    for layer in encoder.blocks:
        if isinstance(layer, nn.Conv2d):
            bias = None if layer.bias is None else layer.bias.contiguous()
            maps = nn.functional.conv2d(maps, layer.weight.contiguous(), bias, padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            maps = (maps - layer.running_mean[:, None, None]) / (
                layer.running_var[:, None, None] + layer.eps
            ).sqrt()
        elif isinstance(layer, nn.ReLU):
            maps = nn.functional.max_pool2d(torch.relu(maps), 2)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(images), torch.relu(encoder.fc(maps.flatten(1))), rtol=1e-4, atol=1e-5
        )


def test_the_flat_vector_does_not_depend_on_the_layout_in_memory():
    encoder = made(cnn, (3, 16, 16), channels=[4, 5], features=6)
    plain = made(cnn, (3, 16, 16), channels=[4, 5], features=6).to(
        memory_format=torch.contiguous_format
    )
    assert torch.equal(flatten(encoder), flatten(plain))
    vector = torch.arange(float(len(flatten(plain))))
    load_flat(encoder, vector)
    assert torch.equal(flatten(encoder), vector)
    assert torch.equal(
        encoder.state_dict()["blocks.0.weight"].contiguous().flatten(), vector[: 4 * 3 * 9]
    )


@pytest.mark.parametrize(
    ("factory", "shape", "options", "message"),
    [
        (mlp, (4,), {"hidden": []}, "hidden: expected sizes from 1 to 100000"),
        (cnn, (4,), {}, "name: cnn takes inputs of shape"),
        (cnn, (1, 40, 40), {"channels": [0]}, "channels, features: expected sizes from 1"),
        (cnn, (1, 40, 40), {"features": 0}, "channels, features: expected sizes from 1"),
        (cnn, (1, 40, 7), {"channels": [1, 1, 1]}, "3 blocks need images of 8 x 8 or more"),
    ],
)
def test_sizes_that_do_not_work_are_refused(factory, shape, options, message):
    with pytest.raises(ConfigError, match=message):
        factory(shape, **options)
