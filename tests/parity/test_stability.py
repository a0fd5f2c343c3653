"""What ships is trained with step sizes at which a rounding error stays small, so that what the docs print can be seen elsewhere."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgradnorm import FedGradNorm, registry, train
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.config import load_config
from fedgradnorm.federations import digits

CONFIGS = Path(__file__).parents[2] / "configs"
MEAN_OF = 5  # rounds: a single round's loss is that of few batches


def by_defaults():
    return digits.make(seed=0), FedGradNorm(), {"num_rounds": 60}


def by_config(name):
    config = resolve_config(load_config(CONFIGS / f"{name}.toml", []))
    options = {key: value for key, value in config.train if key != "eval_every"}
    return build_federation(config), registry.build("weighting", config.weighting), options


def moved(make_encoder):
    """The same encoder with 1e-6 of normal noise on every parameter."""

    def encoder():
        made, noise = copy.deepcopy(make_encoder()), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=1e-6)
        return made

    return encoder


def curves(federation, weighting, options, engine="vectorized"):
    """The losses by client, one a round, as shares of the initial loss."""
    rows = train(federation, weighting, engine=engine, eval_every=1000, **options).rows
    return {
        id: np.array([row["inverse_training_rate"] for row in rows if row["client"] == id])
        for id in federation.client_ids
    }


@pytest.mark.parametrize("setting", ["defaults", "digits", "demo"])
def test_what_ships_is_trained_stably(setting):
    federation, weighting, options = by_defaults() if setting == "defaults" else by_config(setting)
    trained = curves(federation, weighting, options)
    first_rounds = {**options, "num_rounds": min(options["num_rounds"], 60)}  # it takes long
    reference = curves(federation, weighting, first_rounds, engine="reference")
    from_moved = curves(replace(federation, encoder=moved(federation.encoder)), weighting, options)
    for id, losses in trained.items():
        np.testing.assert_allclose(
            losses[: first_rounds["num_rounds"]],
            reference[id],
            rtol=1e-3,
            err_msg=f"{id}: the reference engine",
        )
        np.testing.assert_allclose(
            losses,
            from_moved[id],
            rtol=1e-2,
            err_msg=f"{id}: from an encoder that was moved by 1e-6",
        )
        smooth = np.convolve(losses, np.full(MEAN_OF, 1 / MEAN_OF), mode="valid")
        lowest = np.minimum.accumulate(smooth)
        assert (smooth <= 1.1 * lowest).all(), (
            f"{id}: its loss rises to {(smooth / lowest).max():.3g} times what it was"
        )
        assert smooth[-1] < 0.75, f"{id}: its loss is still {smooth[-1]:.3g} of the initial one"
