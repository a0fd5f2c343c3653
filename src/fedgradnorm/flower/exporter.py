"""Metrics of a deployment for Prometheus, read from its files: they outlive its processes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.exposition import start_http_server
    from prometheus_client.registry import Collector, CollectorRegistry
except ImportError as error:
    missing = 'prometheus-client is not installed: pip install "fedgradnorm[metrics]"'
    raise ImportError(missing) from error

from fedgradnorm.errors import ConfigError, require
from fedgradnorm.flower.overview import GONE, SHOWN_STATES, Overview, look
from fedgradnorm.flower.status import ENDED, KINDS, RunStatus
from fedgradnorm.runs.records import Row

ABOUT = {
    "up": "Whether the deployment's files could be read: 1, or 0 if one is missing or damaged.",
    "certificate_expiry_timestamp_seconds": "When a server certificate expires, in unix seconds.",
    "run_info": "Which run the other metrics are of: always 1.",
    "run_state": "Whether the run is in this state: 1 or 0; gone: its process ended unnoticed.",
    "round": "Rounds that are done.",
    "rounds": "Rounds that the run has.",
    "run_started_timestamp_seconds": "When the run was last begun or resumed, in unix seconds.",
    "last_round_timestamp_seconds": "When the last round ended, in unix seconds.",
    "last_round_age_seconds": "Seconds since the last round ended or the run was started.",
    "status_timestamp_seconds": "When the run last wrote its status.json, in unix seconds.",
    "clients": "Clients that are known.",
    "clients_connected": "Clients that are connected to the run.",
    "nodes_refused": "Nodes that stay out, such as those that claim a key that is taken.",
    "client_connected": "Whether a client is connected to the run: 1 or 0; 0 when the run is over.",
    "client_last_seen_timestamp_seconds": "When a client last answered, in unix seconds.",
    "loss": "A client's training loss F_i(k) in the last round; absent without a report.",
    "inverse_training_rate": "F_i(k) / F_i(0) of the last round; absent without a report.",
    "weight": "A client's weight after the last round; 1 is equal.",
}
"""The metrics, without their prefix ``fedgradnorm_``."""


class DeploymentCollector(Collector):
    """Reads a deployment's files at each scrape, and gives their content as metrics.

    The arguments are those of `look`.
    """

    def __init__(self, folder: Path, run: str | None = None) -> None:
        self.folder, self.run = folder, run

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        overview = look(self.folder, self.run)
        yield _single("up", float(overview.status is not None and not overview.faults))
        expiry = {(file,): seconds for file, seconds in overview.certificates.items()}
        yield _labelled("certificate_expiry_timestamp_seconds", ("file",), expiry)
        if overview.status is not None:
            yield from _of_run(overview, overview.status)
            yield from _of_clients(overview, overview.status)
            yield from _of_last_round(overview.rows)


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
        where, why = f"--host {host} --port {port}", error.strerror or error
        raise ConfigError(f"{where}: cannot be listened on: {why}") from error

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    return stop


def _of_run(overview: Overview, status: RunStatus) -> Iterator[Metric]:
    name = "" if overview.folder is None else overview.folder.resolve().name
    yield _labelled("run_info", ("run", "experiment"), {(name, status.experiment): 1})
    states = {(state,): float(state == overview.state) for state in SHOWN_STATES}
    yield _labelled("run_state", ("state",), states)
    yield _single("round", status.done)
    yield _single("rounds", status.num_rounds)
    yield _single("run_started_timestamp_seconds", status.started)
    if status.round_ended is not None:
        yield _single("last_round_timestamp_seconds", status.round_ended)
    last = max(status.started, status.round_ended or 0.0)
    yield _single("last_round_age_seconds", max(0.0, time.time() - last))
    yield _single("status_timestamp_seconds", status.written)


def _of_clients(overview: Overview, status: RunStatus) -> Iterator[Metric]:
    clients, over = status.clients.items(), overview.state in (*ENDED, GONE)
    connected = {(id,): float(client.connected and not over) for id, client in clients}
    yield _single("clients", len(clients))
    yield _single("clients_connected", sum(connected.values()))
    yield _single("nodes_refused", len(status.strangers))
    yield _labelled("client_connected", ("client",), connected)
    seen = {(id,): client.last_seen for id, client in clients}
    yield _labelled("client_last_seen_timestamp_seconds", ("client",), seen)
    about = "How often a client had no report that counts, by kind of reason."
    drops = CounterMetricFamily("fedgradnorm_drops", about, labels=["client", "reason"])
    for id, client in clients:
        for kind in KINDS:
            drops.add_metric([id, kind], client.drops.get(kind, 0))
    yield drops


def _of_last_round(rows: Sequence[Row]) -> Iterator[Metric]:
    labels, clients = ("client", "task"), {(row["client"], row["task"]): row for row in rows}
    yield _labelled("loss", labels, {key: row["loss"] for key, row in clients.items()})
    rates = {key: row["inverse_training_rate"] for key, row in clients.items()}
    yield _labelled("inverse_training_rate", labels, rates)
    yield _labelled("weight", ("client",), {(row["client"],): row["weight"] for row in rows})


def _single(name: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fedgradnorm_{name}", ABOUT[name], value)


def _labelled(name: str, labels: tuple[str, ...], values: Mapping[Any, float | None]) -> Metric:
    """A metric with values by the tuple of their labels; None is left out."""
    family = GaugeMetricFamily(f"fedgradnorm_{name}", ABOUT[name], labels=labels)
    for key, value in values.items():
        if value is not None:
            family.add_metric(key, value)
    return family
