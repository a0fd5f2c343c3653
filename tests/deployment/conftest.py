import contextlib

import pytest

from tests.deployment.forked_apps import started
from tests.deployment.processes import Deployment


@pytest.fixture
def deploy(tmp_path):
    """Writes deployments, and ends all their processes however the test ends."""
    with contextlib.ExitStack() as stack:

        def make(name, *settings):
            deployment = Deployment(tmp_path / name, *settings)
            stack.callback(deployment.close)
            return deployment

        yield make


@pytest.fixture(scope="session")
def forked_apps(tmp_path_factory):
    """A folder with programs of Flower's that start at once."""
    with started(tmp_path_factory.mktemp("apps") / "bin") as folder:
        yield folder
