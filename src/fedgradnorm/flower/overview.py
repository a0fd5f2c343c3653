"""The state of a deployment's run and certificates, read from its files alone."""

import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from rich.table import Table
from rich.text import Text

import fedgradnorm.flower.status as run_status
from fedgradnorm.errors import FedGradNormError, RunError, printable
from fedgradnorm.flower.status import ENDED, STATES, ClientStatus, RunStatus, beside
from fedgradnorm.runs.entries import STATUS
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import Row

GONE = "gone"
"""The state of a run whose process has ended without noting it."""
SHOWN_STATES = (*STATES, GONE)

CERTIFICATES, DAY = ("server.crt", "ca.crt"), 86400.0
WARN_DAYS = 30
"""Days before a certificate expires when a warning is shown."""
SERVER_FILES = ("superlink.env", "superlink.sh", "server.crt")
"""A folder with any of these files is the folder of a deployment's server."""
UNITS = ((2 * DAY, DAY, "d"), (7200.0, 3600.0, "h"), (120.0, 60.0, "min"))
ABSENT = "–"


@dataclass(frozen=True)
class Overview:
    """What is known of a deployment.

    Attributes:
        folder: the run's folder; None where there is no run.
        status: the run's status; None where it cannot be read.
        gone: in words, why the run's process counts as gone; None for a run that is over or goes
            on.
        rows: the lines of the last round.
        certificates: when the server's certificates expire, in unix seconds, by file name.
        faults: what could not be read, and why.
    """

    folder: Path | None
    status: RunStatus | None
    gone: str | None
    rows: Sequence[Row]
    certificates: dict[str, float]
    faults: Sequence[str]

    @property
    def state(self) -> str | None:
        """The run's state, or `GONE`; None where it is not known."""
        return None if self.status is None else GONE if self.gone else self.status.state


def look(folder: Path, run: str | None = None) -> Overview:
    """Read all there is. A file that cannot be read raises nothing: it is among the faults.

    Args:
        folder: a deployment's folder, its ``server/``, or a run's folder.
        run: for a deployment, the run's folder seen from ``server/``, or its name; None: the run
            that was written last.
    """
    faults: list[str] = []
    place, status, gone, rows = None, None, None, list[Row]()
    server = _server_of(folder)
    try:
        place = _run_of(folder, server, run)
        status = run_status.read_status(place)
        gone = run_status.why_gone(status, place)
        if _holds(place, status):
            rows = Run(place).last_round()
            last = rows[0]["round"] if rows else 0
            if last < status.done:
                lines = f"the lines of round {status.done}, the last are those of round {last}"
                faults.append(f"{place / 'metrics.jsonl'}: expected {lines}")
    except (FedGradNormError, OSError) as error:
        faults.append(str(error))
    certificates: dict[str, float] = {}
    for path in [] if server is None else [server / name for name in CERTIFICATES]:
        if not path.is_file():
            continue
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            certificates[path.name] = certificate.not_valid_after_utc.timestamp()
        except (OSError, ValueError) as error:
            faults.append(f"{path}: expected a certificate in PEM: {error}")
    return Overview(place, status, gone, rows, certificates, faults)


def _holds(folder: Path, status: RunStatus) -> bool:
    """Whether a folder holds the run of this status, and not one that the run will replace."""
    written = (folder / "config.toml").is_file()
    return written and Run(folder).config.run.experiment == status.experiment


def _server_of(folder: Path) -> Path | None:
    """The server's folder: in the given folder, this folder itself, or one of two above it."""
    real = folder.expanduser().absolute()
    for place in (real / "server", real, *list(real.parents)[:2]):
        if any((place / name).is_file() for name in SERVER_FILES):
            return place
    return None


def _run_of(folder: Path, server: Path | None, run: str | None) -> Path:
    """The run's folder. Raises RunError where there is none."""
    folder = folder.expanduser()
    if _has_run(folder):
        if run is not None:
            expected = "expected a deployment's folder, or no --run"
            raise RunError(f"--run: {folder} is a run's folder itself: {expected}")
        return folder
    if server is None:
        expected = "a deployment's folder, as `fedgradnorm flower init` writes it, its server/"
        raise RunError(f"{folder}: expected {expected}, or a run's folder")
    server = folder / "server" if (folder / "server").is_dir() else folder
    if run is not None:
        named = [place for place in (server / run, server / "runs" / run) if _has_run(place)]
        if not named:
            raise RunError(f"--run: there is no run {run!r} in {server}: {_those_in(server)}")
        return named[0]
    runs = list(_runs_in(server))
    if not runs:
        raise RunError(f"{server}: there is no run yet: server/run.sh starts one")
    return max(runs, key=_last_written)


def _runs_in(server: Path) -> Iterator[Path]:
    places = set(server.glob("runs/[!.]*"))
    files = server.glob(f"runs/.*.{STATUS}")
    places |= {path.with_name(path.name[1 : -len(STATUS) - 1]) for path in files}
    try:
        app = tomllib.loads((server.parent / "app" / "pyproject.toml").read_text(encoding="utf-8"))
        places.add(server / str(app["tool"]["flwr"]["app"]["config"]["run-dir"]))
    except (OSError, ValueError, KeyError, TypeError):  # the app may be elsewhere
        pass
    return (place for place in sorted(places) if _has_run(place))


def _those_in(server: Path) -> str:
    names = [os.path.relpath(place, server) for place in _runs_in(server)]
    return f"there are {', '.join(names)}" if names else "there is none"


def _files_of(run: Path) -> list[Path]:
    files = (run / STATUS, beside(run), run / "config.toml", run / "metrics.jsonl")
    return [path for path in files if path.is_file()]


def _has_run(folder: Path) -> bool:
    return any(path.name != "metrics.jsonl" for path in _files_of(folder))


def _last_written(run: Path) -> float:
    return max(path.stat().st_mtime for path in _files_of(run))


def state_line(status: RunStatus, now: float) -> str:
    """A run's state, its rounds and their ages, as a line to read."""
    rounds, next_round = status.num_rounds, min(status.done + 1, status.num_rounds)
    if status.state == "waiting":
        text = f"waiting for clients before round {next_round} of {rounds}"
    elif status.state == "stopped":
        why = printable(status.reason or "no reason is known")
        text = f"stopped after round {status.done} of {rounds}: {why}"
    else:
        text = f"{status.state}, round {status.round} of {rounds}"
    last = "no round has ended"
    if status.round_ended is not None:
        last = f"the last round ended {ago(status.round_ended, now)}"
    return f"{text}; {last}; started {ago(status.started, now)} ({_utc(status.started)})"


def clients_table(overview: Overview, now: float) -> Table:
    """A table of the clients: connection, last answer, last figures, drops by kind of reason."""
    table = Table("client", "task", "connected", "last seen", "loss", "weight", "drops")
    rows = {row["client"]: row for row in overview.rows}
    for id, client in _clients(overview).items():
        row = rows.get(id)
        loss = ABSENT if row is None or row["loss"] is None else f"{row['loss']:.4g}"
        weight = ABSENT if row is None else f"{row['weight']:.3f}"
        seen = "never" if client.last_seen is None else ago(client.last_seen, now)
        connected = _connected(client, now, over=overview.state in (*ENDED, GONE))
        drops = ", ".join(f"{kind} {count}" for kind, count in client.drops.items())
        cells = (id, client.task, connected, seen, loss, weight, drops)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def remarks(overview: Overview, now: float) -> list[str]:
    """Remarks on clients, one a line: their last drops, their rests, and the notes on them."""
    lines = []
    for id, client in _clients(overview).items():
        if (drop := client.last_drop) is not None:
            when = f"in round {drop.round}, {ago(drop.time, now)}"
            lines.append(f"{id}: dropped {when}: {drop.reason}")
        if client.resting_until is not None:
            lines.append(f"{id}: rests until round {client.resting_until}")
        lines += [f"{id}: {note}" for note in client.notes]
    return [printable(line) for line in lines]


def _clients(overview: Overview) -> dict[str, ClientStatus]:
    return {} if overview.status is None else overview.status.clients


def warnings_on(overview: Overview, now: float) -> list[str]:
    """What somebody has to look after, one warning a line."""
    lines = list(overview.faults)
    if overview.gone:
        again = "start the run again, with server/run.sh or its Flower app"
        lines.append(f"{overview.gone}: {again}; it resumes from its checkpoint")
    strangers = {} if overview.status is None else overview.status.strangers
    lines += [f"node {node} stays out: {why}" for node, why in strangers.items()]
    renew = "docs/deploy.md of fedgradnorm says how to renew it"
    for name, expires in overview.certificates.items():
        if expires <= now:
            lines.append(f"{name} expired on {_utc(expires)}: {renew}")
        elif expires < now + WARN_DAYS * DAY:
            left = duration(expires - now)
            lines.append(f"{name} expires in {left}, on {_utc(expires)}: {renew}")
    return [printable(line) for line in lines]


def facts(overview: Overview, now: float) -> dict[str, Any]:
    """All of it as values for JSON."""
    return {
        "run": None if overview.folder is None else str(overview.folder),
        "state": overview.state,
        "gone": overview.gone,
        "status": None if overview.status is None else overview.status.model_dump(),
        "last_round": list(overview.rows),
        "certificates": {
            name: {"expires": expires, "days": int((expires - now) // DAY)}
            for name, expires in overview.certificates.items()
        },
        "warnings": warnings_on(overview, now),
    }


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(45.2), duration(600), duration(86400), duration(9e6)
    ('45 s', '10 min', '24 h', '104 d')
    """
    for least, unit, name in UNITS:
        if seconds >= least:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def ago(then: float, now: float) -> str:
    """How long ago that was."""
    return f"{duration(now - then)} ago"


def _connected(client: ClientStatus, now: float, *, over: bool) -> str:
    if client.since is None:
        return "never"
    if over and client.connected:
        return "at its end"
    return f"{'yes' if client.connected else 'no'}, for {duration(now - client.since)}"


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
