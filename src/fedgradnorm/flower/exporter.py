"""Metrics of a deployment for Prometheus.

They are read from its files at each scrape, so they outlive runs and the SuperLink.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    from prometheus_client.core import (
        CollectorRegistry,
        CounterMetricFamily,
        GaugeMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import start_http_server
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        'prometheus-client is not installed: pip install "fedgradnorm[metrics]"'
    ) from error

from fedgradnorm.errors import ConfigError, require
from fedgradnorm.flower.overview import GONE, SHOWN_STATES, Overview, look
from fedgradnorm.flower.status import ENDED, KINDS

__all__ = ["DeploymentCollector", "registry_of", "serve"]


class DeploymentCollector(Collector):
    """Reads a deployment's files at each scrape, and gives their content as metrics.

    Args:
        folder: a deployment's folder, its ``server/``, or a run's folder.
        run: for a deployment, the run's folder seen from ``server/``, or its name; None: the run
            that was written last.
    """

    def __init__(self, folder: Path, run: str | None = None) -> None:
        self.folder, self.run = folder, run

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        overview = look(self.folder, self.run)
        up = float(overview.status is not None and not overview.faults)
        yield GaugeMetricFamily(
            "fedgradnorm_up",
            "Whether the deployment's files could be read: 1, or 0 if one is missing or damaged.",
            up,
        )
        yield _by_label(
            "fedgradnorm_certificate_expiry_timestamp_seconds",
            "When a certificate of the server expires, in unix seconds.",
            "file",
            overview.certificates,
        )
        if overview.status is not None:
            yield from _of_run(overview)
            yield from _of_clients(overview)
            yield from _of_last_round(overview)


def registry_of(folder: Path, run: str | None = None) -> CollectorRegistry:
    """A registry with only the metrics of a deployment."""
    registry = CollectorRegistry()
    registry.register(DeploymentCollector(folder, run))
    return registry


def serve(folder: Path, run: str | None, host: str, port: int) -> Callable[[], None]:
    """Answer scrapes at ``http://host:port/metrics``, in a thread.

    Returns:
        A function that ends it.

    Raises:
        ConfigError: there is no such folder, or the address cannot be listened on.
    """
    require(0 < port < 2**16, "--port", "a number from 1 to 65535", port)
    require(folder.expanduser().is_dir(), "DIR", "a folder", str(folder))
    try:
        server, thread = start_http_server(port, host, registry_of(folder, run))
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}"
        ) from error

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    return stop


def _of_run(overview: Overview) -> Iterator[Metric]:
    status = overview.status
    if status is None:
        return
    name = "" if overview.folder is None else overview.folder.resolve().name
    info = GaugeMetricFamily(
        "fedgradnorm_run_info",
        "Which run the other metrics are of: always 1.",
        labels=["run", "experiment"],
    )
    info.add_metric([name, status.experiment], 1)
    yield info
    states = {state: float(state == overview.state) for state in SHOWN_STATES}
    about = "Whether the run is in this state: 1 or 0; gone: its process has ended without a word."
    yield _by_label("fedgradnorm_run_state", about, "state", states)
    yield GaugeMetricFamily("fedgradnorm_round", "Rounds that are done.", status.done)
    yield GaugeMetricFamily(
        "fedgradnorm_rounds", "Rounds that the run is to have.", status.num_rounds
    )
    yield GaugeMetricFamily(
        "fedgradnorm_run_started_timestamp_seconds",
        "When the run was begun or last resumed, in unix seconds.",
        status.started,
    )
    if status.round_ended is not None:
        yield GaugeMetricFamily(
            "fedgradnorm_last_round_timestamp_seconds",
            "When the last round ended, in unix seconds.",
            status.round_ended,
        )
    yield GaugeMetricFamily(
        "fedgradnorm_last_round_age_seconds",
        "Seconds since the last round ended, or since the run was started where that is later.",
        max(0.0, time.time() - max(status.started, status.round_ended or 0.0)),
    )
    yield GaugeMetricFamily(
        "fedgradnorm_status_timestamp_seconds",
        "When the run wrote its status.json last, in unix seconds.",
        status.written,
    )


def _of_clients(overview: Overview) -> Iterator[Metric]:
    status = overview.status
    if status is None:
        return
    clients = status.clients
    goes_on = overview.state not in (*ENDED, GONE)
    connected = {id: float(client.connected and goes_on) for id, client in clients.items()}
    yield GaugeMetricFamily("fedgradnorm_clients", "Clients that are known.", len(clients))
    yield GaugeMetricFamily(
        "fedgradnorm_clients_connected",
        "Clients that are connected to the run.",
        sum(connected.values()),
    )
    yield GaugeMetricFamily(
        "fedgradnorm_nodes_refused",
        "Nodes that stay out, such as those that claim a key that is taken.",
        len(status.strangers),
    )
    yield _by_label(
        "fedgradnorm_client_connected",
        "Whether a client is connected to the run: 1 or 0; 0 when the run is over.",
        "client",
        connected,
    )
    yield _by_label(
        "fedgradnorm_client_last_seen_timestamp_seconds",
        "When a client answered last, in unix seconds.",
        "client",
        {id: client.last_seen for id, client in clients.items() if client.last_seen is not None},
    )
    drops = CounterMetricFamily(
        "fedgradnorm_drops",
        "How often a client had no report that counts, by kind of reason.",
        labels=["client", "reason"],
    )
    for id, client in clients.items():
        for kind in KINDS:
            drops.add_metric([id, kind], client.drops.get(kind, 0))
    yield drops


def _of_last_round(overview: Overview) -> Iterator[Metric]:
    loss = GaugeMetricFamily(
        "fedgradnorm_loss",
        "A client's training loss in the last round; absent without a report.",
        labels=["client", "task"],
    )
    rate = GaugeMetricFamily(
        "fedgradnorm_inverse_training_rate",
        "A client's training loss in the last round as a share of its initial loss; "
        "absent without a report.",
        labels=["client", "task"],
    )
    weight = GaugeMetricFamily(
        "fedgradnorm_weight",
        "A client's weight after the last round; 1 is equal.",
        labels=["client"],
    )
    for row in overview.rows:
        weight.add_metric([row["client"]], row["weight"])
        for family, value in ((loss, row["loss"]), (rate, row["inverse_training_rate"])):
            if value is not None:
                family.add_metric([row["client"], row["task"]], value)
    yield from (loss, rate, weight)


def _by_label(name: str, about: str, label: str, values: dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
