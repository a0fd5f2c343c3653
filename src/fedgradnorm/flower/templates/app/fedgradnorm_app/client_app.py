"""One client: it trains on its own data, and keeps its head to itself."""

from pathlib import Path

from fedgradnorm.flower import client_app

app = client_app(Path(__file__).with_name("federation.toml"))
