"""The server's side of a Federation on Flower: a ServerApp for a configuration file."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgradnorm import registry
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.config import load_config
from fedgradnorm.errors import ConfigError
from fedgradnorm.flower.client import SHARED, table_of
from fedgradnorm.flower.engine import GridEngine
from fedgradnorm.flower.layout import Layout
from fedgradnorm.flower.limits import Limits
from fedgradnorm.flower.roster import roster_of
from fedgradnorm.flower.training import train_on_grid

log = logging.getLogger(__name__)


def server_app(config: str | Path) -> ServerApp:
    """A ServerApp that trains a configuration file's federation, and writes the run's folder.

    When the app is started again, it resumes an unfinished run from its checkpoint. The app's run
    configuration (``[tool.flwr.app.config]``, or ``flwr run --run-config``) may have:

    - ``run-dir``: the run's folder, in place of the file's ``run.dir``.
    - ``settings``: settings like ``train.num_rounds=5``, separated by spaces, that take precedence
      over the file. The server sends those on training, the federation and the model to the
      clients.
    - ``min-nodes``: clients to wait for before a round. By default, and for 0, it is all clients at
      the start, and one from then on.
    - ``node-timeout``, ``round-timeout``: seconds to wait for clients to connect, and for a round's
      replies.
    - ``min-replies``: a share of the clients, 1 by default. When this share has answered, the
      others get the same time again.
    - ``max-rest``: maximum number of rounds for which a client that is late again and again rests;
      16 by default, 0 for none.
    - ``start-round``: 1 begins anew. One more than the round of a checkpoint goes back to it. By
      default, and for 0, the run is resumed from its newest checkpoint.

    Args:
        config: the file, such as ``Path(__file__).with_name("federation.toml")``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        options = context.run_config
        words = str(options.get("settings", "")).split()
        settings = resolve_config(load_config(Path(config), words))
        if "run-dir" in options:
            run = settings.run.model_copy(update={"dir": str(options["run-dir"])})
            settings = settings.model_copy(update={"run": run})
        if settings.run.dir is None:
            where = "set it in the file, or run-dir in the app's configuration"
            raise ConfigError(f"run.dir: expected a folder for the run: {where}")
        roster = roster_of(build_federation(settings))
        limits = Limits(
            min_nodes=_number(context, "min-nodes", 0) or 1,
            node_timeout=_number(context, "node-timeout", 600),
            round_timeout=_number(context, "round-timeout", 3600),
            min_replies=_share(context, "min-replies"),
            max_rest=_number(context, "max-rest", Limits.max_rest),
        )
        shared = " ".join(word for word in words if table_of(word) in SHARED)
        layout = Layout.of(roster.make_encoder(settings.train.seed))
        engine = GridEngine(grid, roster, layout, limits, settings.run.keep, settings=shared)
        weighting = registry.build("weighting", settings.weighting)
        start_round = _number(context, "start-round", 0) or None
        first = _number(context, "min-nodes", 0) or len(roster.clients)
        train_on_grid(settings, engine, weighting, start_round, min_nodes=first)
        log.info("run: %s", settings.run.dir)

    return app


def _number(context: Context, name: str, default: int) -> int:
    value = context.run_config.get(name, default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"run config: {name}: expected a whole number from 0, found {value!r}")
    return value


def _share(context: Context, name: str) -> float:
    value = context.run_config.get(name, 1.0)
    if isinstance(value, bool | str | bytes) or not 0 < value <= 1:
        expected = "expected a share, more than 0 and at most 1"
        raise ConfigError(f"run config: {name}: {expected}, found {value!r}")
    return float(value)
