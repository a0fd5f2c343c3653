"""A deployment in one process: a configuration file, and nodes that run the ready apps with it."""

from flwr.app import Context, RecordDict

from fedgradnorm.api import run
from fedgradnorm.build import build_federation
from fedgradnorm.config import load_config
from fedgradnorm.flower import client_app, server_app
from fedgradnorm.flower.states import StateFiles
from tests.flower.nodes import Wire

DIGITS = """
federation = { name = "digits" }
[train]
num_rounds = 3
head_steps = 2
encoder_steps = 2
batch_size = 16
head_momentum = 0.5
eval_every = 2
[run]
loss_targets = [0.9]
"""


class Place:
    """A folder with a configuration, and nodes that have it."""

    def __init__(self, folder, text=DIGITS, by="client-key"):
        self.folder, self.config = folder, folder / "federation.toml"
        self.config.write_text(text)
        self.wire, app = Wire(), client_app(self.config)
        self.clients = build_federation(load_config(self.config)).client_ids
        for place, client in enumerate(self.clients):
            who = {"client-key": client} if by == "client-key" else {"partition-id": place}
            self.wire.join(
                2 + place,
                app,
                **who,
                **{"state-dir": str(folder / "states" / str(place)), "threads": 1},
            )

    def simulated(self, *words):
        """The folder of the same run in one process."""
        folder = self.folder / f"simulated {words}"
        run(load_config(self.config, [*words, f"run.dir={folder}", "engine.name=reference"]))
        return folder

    def deployed(self, **run_config):
        """The folder of the run by the apps."""
        options = {"run-dir": str(self.folder / "run"), "node-timeout": 0, **run_config}
        server_app(self.config)(self.wire, Context(1, 1, {}, RecordDict(), options))
        return self.folder / "run"

    def head(self, place, client, round):
        (experiment,) = (self.folder / "states" / str(place)).iterdir()
        return StateFiles(experiment.parent, experiment.name, client).load(round).head
