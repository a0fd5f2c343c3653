"""The server: weights, aggregation, checkpoints, the run's folder."""

from pathlib import Path

from fedgradnorm.flower import server_app

app = server_app(Path(__file__).with_name("federation.toml"))
