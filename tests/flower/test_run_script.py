"""server/run.sh of a deployment's folder, with a script in the place of `flwr`."""

import json
import os
import signal
import subprocess
import sys

import pytest

from fedgradnorm.flower.init import write_deployment
from tests.deployment.processes import wait_until

FLWR = """#!{python} -SE
import json, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
words, here = sys.argv[1:], pathlib.Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(json.dumps(words) + "\\n")
path = here / ("one" if "--run-id" in words else words[0])
answers = json.loads(path.read_text())
answer = answers.pop(0)
if answers:
    path.write_text(json.dumps(answers))
if answer == "wait":
    print("its log", flush=True)
    time.sleep(1000)
print(answer if isinstance(answer, str) else json.dumps(answer))
sys.exit(words[0] == "log" and "broken" in answer)
"""
DOWN = {
    "success": False,
    "error-message": "Listing all runs...\n\nConnection to the SuperLink is unavailable.",
}
STARTED = {"success": True, "run-id": "12"}


def listed(*runs):
    return {
        "success": True,
        "runs": [
            {"run-id": id, "status": status, "status-details": details}
            for id, status, details in runs
        ],
    }


OLD = ("7", "finished:failed", "an earlier one")
NONE = listed(OLD)
RUNNING = listed(("12", "running", "N/A"), ("9", "pending", "N/A"), OLD)


def ended(status, details="N/A"):
    return listed(("12", status, details))


class Server:
    """A deployment's folder, and what Flower answers there."""

    def __init__(self, folder):
        write_deployment(folder / "here", None, ["federation.name=digits"])
        self.script, self.bin = folder / "here/server/run.sh", folder / "bin"
        self.bin.mkdir()
        (self.bin / "flwr").write_text(FLWR.format(python=sys.executable))
        (self.bin / "flwr").chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def answers(self, **answers):
        for command, values in answers.items():
            (self.bin / command).write_text(json.dumps(values))

    def run(self, *words):
        return subprocess.run(
            [self.script, *words],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
            timeout=60,
        )

    def calls(self):
        return [json.loads(line) for line in (self.bin / "calls").read_text().splitlines()]


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path)


@pytest.mark.parametrize(
    ("status", "details", "code", "message"),
    [
        ("finished:completed", "", 0, "run 12: completed\n"),
        (
            "finished:failed",
            "ServerApp failed with exception: no room",
            1,
            "run 12: failed: ServerApp failed with exception: no room\n",
        ),
        ("finished:stopped", "N/A", 1, "run 12: stopped\n"),
    ],
)
def test_it_ends_with_the_runs_outcome(server, status, details, code, message):
    server.answers(ls=[NONE], run=[STARTED], log=["round 1"], one=[ended(status, details)])
    done = server.run()
    assert (done.returncode, done.stdout) == (code, "round 1\n")
    assert done.stderr == f"run 12 is started\n{message}"
    app = str(server.script.parent.parent / "app")
    assert server.calls() == [
        ["ls", "--format", "json"],
        ["run", app, "--format", "json"],
        ["log", "12", "--stream"],
        ["ls", "--run-id", "12", "--format", "json"],
    ]


def test_settings_of_one_run_reach_flower(server):
    server.answers(ls=[NONE], run=[STARTED], log=[""], one=[ended("finished:completed")])
    words = 'run-dir="runs/other" settings="train.num_rounds=20"'
    assert server.run("--run-config", words, "-c", "round-timeout=5").returncode == 0
    assert server.calls()[1][2:6] == ["--run-config", words, "--run-config", "round-timeout=5"]


def test_a_run_that_is_going_on_is_shown_and_no_second_one_starts(server):
    server.answers(ls=[RUNNING], log=["its log"], one=[ended("finished:completed")])
    done = server.run()
    assert (done.returncode, done.stdout) == (0, "its log\n")
    assert done.stderr == "run 12 is going on: its log from the beginning\nrun 12: completed\n"
    assert [call[0] for call in server.calls()] == ["ls", "log", "ls"]


LOST = ended("finished:failed", "No heartbeat received from the task")


def test_a_run_that_was_lost_with_its_process_is_started_again(server):
    server.answers(ls=[NONE], run=[STARTED], log=["round 1"], one=[LOST])
    assert server.run().returncode == 1  # the one who saw it fail is told so
    new = listed(("13", "finished:completed", "N/A"))
    server.answers(
        ls=[RUNNING],
        log=["its log", "the new log"],
        one=[LOST, new],
        run=[STARTED | {"run-id": "13"}],
    )
    done = server.run()
    assert (done.returncode, done.stdout) == (0, "its log\nthe new log\n")
    said = [
        "run 12 was lost with its process, and is started again",
        "run 13 is started",
        "run 13: completed",
    ]
    assert done.stderr.splitlines()[1:] == said
    server.answers(ls=[RUNNING], log=["its log"], one=[ended("finished:failed", "no room")])
    assert server.run().returncode == 1  # any other failure is the outcome


def test_a_lost_run_of_other_settings_is_not_taken_for_that_of_the_app(server):
    server.answers(ls=[RUNNING], log=["its log"], one=[LOST])
    done = server.run()
    assert done.returncode == 1
    assert done.stderr.endswith(
        "run 12 was lost with its process: start it again, with the words that it was started with\n"
    )
    words = 'run-dir="runs/other" start-round=1'
    server.answers(ls=[NONE], run=[STARTED], log=["round 1"], one=[LOST])
    server.run("--run-config", words)
    server.answers(ls=[RUNNING], log=["its log"], one=[LOST])
    done = server.run()
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"run 12 was lost with its process: start it again, with --run-config '{words}'\n"
    )
    assert [call[0] for call in server.calls()].count("run") == 1


def test_a_log_that_never_ends_does_not_hide_the_outcome(server):
    run = server.script.with_name("run.py")
    run.write_text(
        run.read_text().replace(
            "LOOK, LAST_LINES, PATIENCE = 60.0, 10.0, 300.0",
            "LOOK, LAST_LINES, PATIENCE = 0.2, 0.2, 300.0",
        )
    )
    server.answers(
        ls=[NONE], run=[STARTED], log=["wait"], one=[ended("running"), ended("finished:completed")]
    )
    done = server.run()
    assert (done.returncode, done.stdout) == (0, "its log\n")
    assert done.stderr == "run 12 is started\nrun 12: completed\n"


def test_settings_for_a_run_that_is_going_on_are_refused(server):
    server.answers(ls=[RUNNING])
    done = server.run("--run-config", "round-timeout=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "--run-config: run 12 is going on, and takes no other settings: expected no words, to show it; or end it"
    )
    assert done.stderr.endswith("server/flwr.sh stop 12\n")
    assert len(server.calls()) == 1


@pytest.mark.parametrize(
    "words", [["--stream"], ["--format", "json"], ["app"], ["--run-conf", "a=1"]]
)
def test_other_words_are_refused_before_anything_is_asked(server, words):
    done = server.run(*words)
    assert done.returncode == 2
    assert "run.sh: error: unrecognized arguments: " + " ".join(words) in done.stderr
    assert not (server.bin / "calls").exists()


def test_a_log_that_breaks_while_the_run_goes_on_is_shown_again(server):
    server.answers(
        ls=[NONE],
        run=[STARTED],
        log=["broken", "whole"],
        one=[RUNNING | {"runs": RUNNING["runs"][:1]}, ended("finished:completed")],
    )
    done = server.run()
    assert (done.returncode, done.stdout) == (0, "broken\nwhole\n")
    assert "run 12 is going on, but its log has ended: it is shown again\n" in done.stderr


@pytest.mark.parametrize("answer", [DOWN, "no JSON", "[]"])
def test_a_superlink_that_does_not_answer_is_named(server, answer):
    reason = (
        "Connection to the SuperLink is unavailable." if answer is DOWN else "no reason is given"
    )
    server.answers(ls=[answer])
    done = server.run()
    assert (done.returncode, done.stderr) == (1, f"the SuperLink does not answer: {reason}\n")
    server.answers(ls=[NONE], run=[STARTED], log=["broken"], one=[answer])
    done = server.run()
    assert (done.returncode, done.stderr) == (
        1,
        f"run 12 is started\nthe SuperLink does not answer: {reason}\n",
    )


def test_a_run_that_cannot_start_is_an_error(server):
    server.answers(
        ls=[NONE],
        run=[
            {
                "success": False,
                "error-message": "Using SuperLink\n[code: 15] Invalid run configuration.\n",
            }
        ],
    )
    done = server.run("--run-config", "nonsense=1")
    assert (done.returncode, done.stderr) == (
        1,
        "the run was not started: [code: 15] Invalid run configuration.\n",
    )


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "run 12 goes on; server/run.sh shows it again\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_ctrl_c_ends_the_showing_alone(server, tmp_path, number, code, message):
    server.answers(ls=[NONE], run=[STARTED], log=["wait"])
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [server.script],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env=server.environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # what runs in the background may ignore it
        )
        wait_until(lambda: "its log" in (tmp_path / "out").read_text(), "the log is shown", 60)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)  # which ends when nobody writes any more
    assert (process.returncode, errors) == (code, f"run 12 is started\n{message}")
    assert ["stop", "12"] not in server.calls()
