"""`fedgradnorm flower status` and the exporter of metrics: what a deployment's files tell."""

import json
import re
import shutil
import socket
import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from fedgradnorm import StoppedError
from fedgradnorm.errors import ConfigError, printable
from fedgradnorm.flower import exporter, overview
from fedgradnorm.flower.exporter import registry_of
from fedgradnorm.flower.init import write_deployment
from fedgradnorm.flower.overview import look
from fedgradnorm.flower.status import KINDS, STATES, beside, read_status
from fedgradnorm.runs.lock import alone_in
from fedgradnorm.runs.reader import Run
from tests.flower.nodes import Site, in_round, lost, raising
from tests.helpers import small_federation
from tests.launcher import launcher

TEMPLATES = Path(overview.__file__).parent / "templates"
DAY = 86400


@pytest.fixture
def deployment(tmp_path):
    write_deployment(tmp_path / "there", None, ["federation.name=digits"])
    for name, days in (("server.crt", 700), ("ca.crt", 3650)):
        certificate(tmp_path / "there/server" / name, days)
    return tmp_path / "there"


@pytest.fixture
def site():
    return Site(small_federation())


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr("fedgradnorm.cli.terminal.console", Console(width=400))


def certificate(path, days):
    """A certificate that expires in so many days from now."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
    )
    builder = builder.not_valid_before(now - timedelta(days=9999)).not_valid_after(
        now + timedelta(days=days, minutes=5)
    )
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def trained(site, folder, rounds=2, **training):
    site.train(folder, num_rounds=rounds, **training)
    return folder


def stopped(site, folder):
    with pytest.raises(StoppedError):
        site.train(folder, num_rounds=5, should_stop=lambda: True)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cells(line):
    return [cell.strip() for cell in re.split("[│┃|]", line)][1:-1]


# -------------------------------------------------------------------------------------- the command


def test_the_status_of_a_run_is_a_line_a_table_and_the_certificates(deployment, site, call):
    site.wire.twists[3] = in_round(2, lost)
    run = trained(site, deployment / "server/runs/digits")
    code, out, err = call("flower", "status", deployment)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first.startswith(f"{run}: completed, round 2 of 2; the last round ended ")
    table = {row[0]: row for row in map(cells, lines) if row}
    assert set(table) == {"client", "a", "b", "c"}
    (row,) = [row for row in Run(run).rows() if (row["round"], row["client"]) == (2, "a")]
    assert table["a"][:3] == ["a", "sign", "at its end"]
    assert re.fullmatch(r"\d+ s ago", table["a"][3])
    assert table["a"][4:] == [f"{row['loss']:.4g}", f"{row['weight']:.3f}", ""]
    assert (table["b"][4], table["b"][6]) == ("–", "late 1")
    (said,) = [line for line in lines if line.startswith("b: ")]
    assert re.fullmatch(r"b: dropped in round 2, \d+ s ago: no answer within 3600 s", said)
    expires = datetime.now(UTC) + timedelta(days=700, minutes=5)
    assert f"server.crt: good until {expires:%Y-%m-%d}" in lines
    assert any(line.startswith("ca.crt: good until ") for line in lines)


def test_json_has_all_of_it_and_nothing_else_is_printed(deployment, site, call):
    run = trained(site, deployment / "server/runs/digits")
    code, out, err = call("flower", "status", deployment, "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert (values["run"], values["state"], values["gone"], values["warnings"]) == (
        str(run),
        "completed",
        None,
        [],
    )
    assert values["status"] == read_status(run).model_dump()
    assert values["last_round"] == Run(run).rows()[-3:]
    assert {name: one["days"] for name, one in values["certificates"].items()} == {
        "server.crt": 700,
        "ca.crt": 3650,
    }


def test_a_run_that_was_stopped_or_is_gone_ends_the_command_with_1(deployment, site, call):
    run = deployment / "server/runs/digits"
    stopped(site, run)
    code, out, err = call("flower", "status", deployment)
    assert (code, err) == (1, "")
    assert (
        f"{run}: stopped after round 1 of 5: stopped after round 1 of 5; to resume: start its Flower app again; the last"
        in out
    )
    edit(run / "status.json", state="training", reason=None)
    code, out, err = call("flower", "status", deployment)
    assert code == 1
    assert f"{run}: training, round 1 of 5; " in out
    assert re.fullmatch(
        r"warning: its process \(pid \d+ on .*\) has ended without a word: start the run again, .*; it resumes from its checkpoint\n",
        err,
    )
    with alone_in(run):
        assert call("flower", "status", deployment)[0::2] == (0, "")


def test_a_run_that_waits_for_its_first_clients_is_shown_without_a_folder(deployment, site, call):
    site.wire.join(8, site.wire.nodes[2])
    with pytest.raises(StoppedError):
        site.train(deployment / "server/runs/digits", num_rounds=5, limits={"min_nodes": 3})
    path = beside(deployment / "server/runs/digits")
    edit(path, state="waiting", reason=None)
    with alone_in(deployment / "server/runs/digits"):
        code, out, err = call("flower", "status", deployment)
    assert code == 0
    assert (
        "server/runs/digits: waiting for clients before round 1 of 5; no round has ended; started "
        in out
    )
    assert err.splitlines() == [
        f"warning: node {node} stays out: client key 'a' is claimed by 2 nodes" for node in (2, 8)
    ]


def test_the_figures_of_a_run_that_is_to_be_replaced_are_not_those_of_the_new_one(site, tmp_path):
    run = trained(site, tmp_path / "run")
    for number in (2, 3, 4):
        site.wire.twists[number] = raising
    with pytest.raises(StoppedError):
        site.train(run, num_rounds=2, start_round=1)
    found = look(run)
    assert (found.state, found.rows) == ("stopped", [])


@pytest.mark.parametrize(
    ("days", "code", "said"),
    [(29, 0, r"expires in 29 d, on \d{4}-\d\d-\d\d"), (-2, 1, r"expired on \d{4}-\d\d-\d\d")],
)
def test_a_certificate_that_runs_out_is_warned_of(deployment, site, call, days, code, said):
    trained(site, deployment / "server/runs/digits")
    certificate(deployment / "server/server.crt", days)
    found, _, err = call("flower", "status", deployment)
    assert found == code
    assert re.fullmatch(
        rf"warning: server\.crt {said} \d\d:\d\d UTC: docs/deploy\.md of fedgradnorm says how to renew it\n",
        err,
    )


def test_nothing_of_someone_else_reaches_the_terminal_as_more_than_text(deployment, site, call):
    run = trained(site, deployment / "server/runs/digits")
    evil = "\x1b]0;x\x07\x1b[2J[red]:warning:\u202e\r\n"
    values = json.loads((run / "status.json").read_text())
    client = values["clients"]["a"]
    client |= {
        "task": evil,
        "notes": [evil],
        "drops": {"late": 1},
        "last_drop": {"round": 1, "time": 1, "kind": "late", "reason": evil},
    }
    edit(
        run / "status.json",
        state="stopped",
        reason=evil,
        clients=values["clients"] | {evil: client},
        strangers={evil: evil},
    )
    code, out, err = call("flower", "status", run)
    assert code == 1
    shown = out + err
    assert not [letter for letter in shown if not letter.isprintable() and letter != "\n"]
    assert printable(evil) == r"\x1b]0;x\x07\x1b[2J[red]:warning:\u202e\r\n"
    assert shown.count(printable(evil)) == 12
    _, out, _ = call("flower", "status", run, "--json")
    assert json.loads(out)["status"]["reason"] == evil
    assert out.isascii()
    assert not [letter for letter in out if not letter.isprintable() and letter != "\n"]


def test_the_run_may_be_named_and_is_else_the_last_one_that_was_written(
    deployment, site, call, monkeypatch
):
    server = deployment / "server"
    first = trained(site, server / "runs/digits")
    other = trained(site, server / "elsewhere/other", rounds=1)
    third = trained(site, server / "runs/third", rounds=1)
    assert look(deployment).folder == look(server).folder == third
    assert look(deployment, "digits").folder == look(server, "runs/digits").folder == first
    assert look(server, "elsewhere/other").folder == other
    assert look(first).folder == first
    assert look(first).certificates.keys() == {"server.crt", "ca.crt"}
    monkeypatch.chdir(first)
    assert look(Path()).status == read_status(first)
    app = deployment / "app/pyproject.toml"
    app.write_text(
        app.read_text().replace('run-dir = "runs/digits"', 'run-dir = "elsewhere/other"')
    )
    trained(site, other, rounds=1, start_round=1)
    assert look(deployment).folder == other
    assert call("flower", "status", first, "--run", "x") == (
        2,
        "",
        f"error: --run: {first} is a run's folder itself: expected a deployment's folder, or no --run\n",
    )
    assert call("flower", "status", deployment, "--run", "x") == (
        2,
        "",
        f"error: --run: there is no run 'x' in {server}: there are elsewhere/other, runs/digits, runs/third\n",
    )


def test_without_a_run_or_a_sound_status_it_is_one_error(deployment, site, call, tmp_path):
    assert call("flower", "status", deployment) == (
        2,
        "",
        f"error: {deployment}/server: there is no run yet: server/run.sh starts one\n",
    )
    code, _, err = call("flower", "status", tmp_path)
    assert code == 2
    assert err.startswith(
        f"error: {tmp_path}: expected a deployment's folder, as `fedgradnorm flower init` writes it, its server/, or a run"
    )
    run = trained(site, deployment / "server/runs/digits")
    (run / "status.json").write_text("{")
    code, out, err = call("flower", "status", deployment)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {run}/status.json: damaged: expected JSON; ")
    (run / "status.json").unlink()
    assert "status.json: there is no such file" in call("flower", "status", run)[2]


def test_what_cannot_be_read_beside_the_status_is_warned_of(deployment, site, call):
    run = trained(site, deployment / "server/runs/digits")
    (run / "metrics.jsonl").write_text("{}\n")
    (deployment / "server/ca.crt").write_text("x")
    code, out, err = call("flower", "status", deployment)
    assert code == 0
    assert "completed, round 2 of 2" in out
    assert re.search(r"^warning: .*/metrics\.jsonl line 1: round: Field required$", err, flags=re.M)
    assert re.search(r"^warning: .*/ca\.crt: expected a certificate in PEM: ", err, flags=re.M)


# ------------------------------------------------------------------------------------------ metrics


def scraped(folder):
    """Every sample of an exporter, by name and labels."""
    text = generate_latest(registry_of(folder)).decode()
    return {
        (
            sample.name,
            *(f"{key}={value}" for key, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_metrics_are_those_of_the_files(deployment, site):
    site.wire.twists[3] = in_round(2, lost)
    run = deployment / "server/runs/digits"
    seen = []
    site.train(run, num_rounds=3, on_round=lambda rows: seen.append(scraped(deployment)))
    found, status = seen[1], read_status(run)
    assert found["fedgradnorm_up",] == 1
    assert (found["fedgradnorm_round",], found["fedgradnorm_rounds",]) == (2, 3)
    assert {
        state: found["fedgradnorm_run_state", f"state={state}"] for state in (*STATES, "gone")
    } == {
        **dict.fromkeys((*STATES, "gone"), 0),
        "training": 1,
    }
    rows = {row["client"]: row for row in Run(run).rows() if row["round"] == 2}
    assert found["fedgradnorm_loss", "client=a", "task=sign"] == rows["a"]["loss"]
    assert (
        found["fedgradnorm_inverse_training_rate", "client=a", "task=sign"]
        == rows["a"]["inverse_training_rate"]
    )
    assert found["fedgradnorm_weight", "client=b"] == rows["b"]["weight"]
    assert ("fedgradnorm_loss", "client=b", "task=sign") not in found
    assert found["fedgradnorm_client_connected", "client=b"] == 1
    assert (
        found["fedgradnorm_clients",],
        found["fedgradnorm_clients_connected",],
        found["fedgradnorm_nodes_refused",],
    ) == (3, 3, 0)
    drops = {
        (client, kind): found["fedgradnorm_drops_total", f"client={client}", f"reason={kind}"]
        for client in "abc"
        for kind in KINDS
    }
    assert {key: count for key, count in drops.items() if count} == {("b", "late"): 1}
    assert found["fedgradnorm_run_info", f"experiment={status.experiment}", "run=digits"] == 1
    last = scraped(deployment)
    assert last["fedgradnorm_last_round_timestamp_seconds",] == status.round_ended
    assert (
        last["fedgradnorm_client_last_seen_timestamp_seconds", "client=a"]
        == status.clients["a"].last_seen
    )
    assert 0 <= last["fedgradnorm_last_round_age_seconds",] <= time.time() - status.round_ended
    assert last["fedgradnorm_run_state", "state=completed"] == 1
    assert (
        last["fedgradnorm_clients_connected",]
        == last["fedgradnorm_client_connected", "client=a"]
        == 0
    )
    expires = last["fedgradnorm_certificate_expiry_timestamp_seconds", "file=server.crt"]
    assert expires - time.time() == pytest.approx(700 * DAY, abs=DAY)


def test_a_process_that_is_gone_is_a_state(deployment, site):
    run = deployment / "server/runs/digits"
    stopped(site, run)
    edit(run / "status.json", state="training")
    found = scraped(deployment)
    assert (
        found["fedgradnorm_run_state", "state=gone"],
        found["fedgradnorm_run_state", "state=training"],
    ) == (1, 0)
    assert found["fedgradnorm_clients_connected",] == 0


@pytest.mark.parametrize("damaged", ["status.json", "metrics.jsonl", "config.toml", "../../ca.crt"])
def test_a_damaged_file_is_a_metric_and_what_can_be_read_is_there(deployment, site, damaged):
    run = trained(site, deployment / "server/runs/digits")
    (run / damaged).write_bytes(b"\x00")
    found = scraped(deployment)
    assert found["fedgradnorm_up",] == 0
    assert ("fedgradnorm_round",) in found or damaged == "status.json"
    assert ("fedgradnorm_certificate_expiry_timestamp_seconds", "file=server.crt") in found


def test_before_a_run_and_after_the_folder_was_removed_there_is_no_crash(deployment):
    assert scraped(deployment)["fedgradnorm_up",] == 0
    shutil.rmtree(deployment)
    assert scraped(deployment) == {("fedgradnorm_up",): 0}


def families(deployment):
    return list(text_string_to_metric_families(generate_latest(registry_of(deployment)).decode()))


def test_metrics_are_named_and_explained_as_prometheus_asks(deployment, site):
    trained(site, deployment / "server/runs/digits")
    for family in families(deployment):
        assert re.fullmatch(r"fedgradnorm_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert ("seconds" in family.name) == ("econds" in family.documentation)
        assert (family.type == "counter") == any(
            sample.name.endswith("_total") for sample in family.samples
        )


def test_every_metric_of_the_alerts_is_one_that_the_exporter_gives(deployment, site):
    yaml = pytest.importorskip("yaml")
    trained(site, deployment / "server/runs/digits")
    given = {
        sample.name: set(sample.labels)
        for family in families(deployment)
        for sample in family.samples
    }
    (group,) = yaml.safe_load((deployment / "server/alerts.yml").read_text())["groups"]
    rules = group["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 10
    named = set()
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        names = set(re.findall(r"\bfedgradnorm_\w+", rule["expr"]))
        assert names <= given.keys(), rule["alert"]
        named |= names
        for name, label in re.findall(r"(fedgradnorm_\w+)\{(\w+)", rule["expr"]):
            assert label in given[name]
        for state in re.findall(r"state=~\"([^\"]+)", rule["expr"]):
            assert set(state.split("|")) <= {*STATES, "gone"}
        for reason in re.findall(r"reason=~?\"([^\"]+)", rule["expr"]):
            assert set(reason.split("|")) <= set(KINDS)
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert label == "instance" or any(label in given[name] for name in names), (
                rule["alert"],
                label,
            )
    watched = (
        "up",
        "run_state",
        "last_round_age_seconds",
        "clients_connected",
        "client_connected",
        "drops_total",
        "nodes_refused",
        "loss",
    )
    assert {
        f"fedgradnorm_{name}"
        for name in (*watched, "weight", "certificate_expiry_timestamp_seconds")
    } <= named


def test_the_alerts_and_the_service_are_written_as_they_are_in_the_templates(deployment):
    for path in ("server/alerts.yml", "systemd/metrics.service"):
        assert (deployment / path).read_text() == (TEMPLATES / path).read_text()
    assert (
        "fedgradnorm flower metrics /opt/fedgradnorm/server "
        in (deployment / "systemd/metrics.service").read_text()
    )


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_command_serves_the_metrics_until_it_is_told_to_stop(
    deployment, site, call, port, monkeypatch
):
    trained(site, deployment / "server/runs/digits")
    answers = []

    def scrape():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            answers.append(answer.read().decode())
        return True

    monkeypatch.setattr("fedgradnorm.cli.terminal.stop_on_signals", lambda: StopAfter(scrape))
    code, out, err = call("flower", "metrics", deployment, "--port", port)
    assert (code, out, err) == (
        0,
        f"metrics of {deployment}: http://127.0.0.1:{port}/metrics\n",
        "",
    )
    assert "\nfedgradnorm_round 2.0\n" in answers[0]
    assert not [thread for thread in threading.enumerate() if "serve_forever" in thread.name]


class StopAfter:
    """In the place of signals: stop after something is done."""

    def __init__(self, act):
        self.act = act

    def __enter__(self):
        return self.act

    def __exit__(self, *_):
        pass


def test_an_address_that_cannot_be_listened_on_is_one_error(deployment, call, port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert call("flower", "metrics", deployment, "--port", port) == (
            2,
            "",
            f"error: --host 127.0.0.1 --port {port}: cannot be listened on: Address already in use\n",
        )
    assert (
        call("flower", "metrics", deployment, "--port", 0)[2]
        == "error: --port: expected a number from 1 to 65535, found 0\n"
    )
    assert call("flower", "metrics", deployment / "nowhere")[0] == 2
    with pytest.raises(ConfigError, match=r"DIR: expected a folder, found '.*nowhere'$"):
        exporter.serve(deployment / "nowhere", None, "127.0.0.1", port)


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("metrics", "prometheus_client", "metrics"), ("status", "flwr", "flower")],
)
def test_without_an_extra_it_is_one_error_that_says_how_to_install_it(
    tmp_path, command, module, extra
):
    code, _, error = launcher().call(tmp_path, "flower", command, tmp_path, missing=[module])
    assert code == 2
    name = {"flwr": "Flower", "prometheus_client": "prometheus-client"}[module]
    assert error == f'error: {name} is not installed: pip install "fedgradnorm[{extra}]"\n'
