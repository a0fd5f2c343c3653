"""Run the app of `after` in this process, with three clients: no Ray, no SuperLink.

Its output goes to the current folder.
"""

import sys
import tomllib
from pathlib import Path

from flwr.app import Context, RecordDict

from fedgradnorm.flower import LocalGrid

APP, NODES = Path(__file__).parent / "after", 3


def main() -> None:
    """Three nodes, and the server."""
    sys.path.insert(0, str(APP))
    from quickstart import client_app, server_app

    run_config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    contexts = {}
    for place in range(NODES):
        node_config = {"partition-id": place, "num-partitions": NODES, "state-dir": "states"}
        contexts[place + 2] = Context(1, place + 2, node_config, RecordDict(), run_config)
    grid = LocalGrid(dict.fromkeys(contexts, client_app.app), contexts)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), run_config))


if __name__ == "__main__":
    main()
