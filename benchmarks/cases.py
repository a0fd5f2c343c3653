"""What the speed benchmark trains, as federations: the workloads, and two of the configurations at full size."""

import os
from pathlib import Path

from torch.nn import functional

from benchmarks.workloads import WORKLOADS
from fedgradnorm import Client, Federation, Task
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.config import TrainConfig, load_config

__all__ = ["CONFIGS", "case"]

ROOT = Path(__file__).parents[1]
CONFIGS = {"W3": "mtfl", "W4": "radcom"}
"""W3: configs/mtfl.toml. W4: configs/radcom.toml."""


def case(name: str, clients: int | None = None) -> tuple[Federation, TrainConfig]:
    """A federation and its settings.

    Args:
        name: W1 to W5.
        clients: how many, for the workloads that are alike clients.

    Raises:
        FileNotFoundError: W3 without MTFL.zip, which FEDGRADNORM_MTFL has to name.
    """
    if name in CONFIGS:
        overrides = []
        if name == "W3":
            path = Path(os.environ.get("FEDGRADNORM_MTFL", "MTFL.zip"))
            if not path.is_file():
                raise FileNotFoundError(f"{path}: set FEDGRADNORM_MTFL to the path of MTFL.zip")
            overrides = [f"federation.path={path}"]
        config = resolve_config(load_config(ROOT / "configs" / f"{CONFIGS[name]}.toml", overrides))
        return build_federation(config), config.train
    workload = WORKLOADS[name]
    task = Task(name, lambda _: workload.head(), functional.cross_entropy)
    members = [
        Client(f"client-{index:05d}", task, workload.data(index))
        for index in range(clients or workload.clients)
    ]
    training = TrainConfig(
        head_steps=workload.head_steps,
        encoder_steps=workload.encoder_steps,
        head_lr=workload.step_size,
        encoder_lr=workload.step_size,
        batch_size=workload.batch_size,
    )
    return Federation(members, workload.encoder), training
