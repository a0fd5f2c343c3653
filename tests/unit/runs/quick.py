"""Short runs of the digits federation."""

from typing import Any

from fedgradnorm import Result, run
from fedgradnorm.config import load_config

QUICK = {"num_rounds": 4, "head_steps": 2, "encoder_steps": 2, "batch_size": 8, "eval_every": 2}


def run_digits(folder: object, *words: str, **options: Any) -> Result:
    """A run of a few rounds in this folder."""
    quick = [f"train.{key}={value}" for key, value in QUICK.items()]
    config = load_config(None, ["federation.name=digits", f"run.dir={folder}", *quick, *words])
    return run(config, **options)
