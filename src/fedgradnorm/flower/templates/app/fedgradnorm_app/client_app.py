"""One client: it trains on its own data, and its head stays with it."""

from pathlib import Path

from fedgradnorm.flower import client_app

app = client_app(Path(__file__).with_name("federation.toml"))
