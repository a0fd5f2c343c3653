import dataclasses
import gzip
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from html import unescape
from pathlib import Path

import pytest

from fedgradnorm import Federation, Metric
from fedgradnorm.cli import main
from fedgradnorm.errors import StoppedError
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.federations import digits
from fedgradnorm.runs.reader import Run
from tests.launcher import launcher

QUICK = ["train.num_rounds=2", "train.head_steps=2", "train.encoder_steps=2", "train.batch_size=8"]
CONFIG = '[federation]\nname = "digits"\n[weighting]\nname = "fedgradnorm"\ngamma = 0.5\n'


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "my.toml"
    path.write_text(CONFIG)
    return path


def test_run_writes_a_whole_run_folder_and_says_where_the_report_is(config, call):
    code, out, _ = call("run", config, *QUICK)
    assert code == 0
    folder = Path("runs/my")
    assert "round 1/2" in out
    assert "round 2/2" in out
    assert f"report: {folder / 'report.html'}" in out
    for name in (
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "models/encoder.safetensors",
        "models/heads/class.safetensors",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").iterdir())
    assert Run(folder).config.weighting.options["gamma"] == 0.5


def test_the_terminal_shows_a_bar_and_no_terminal_plain_lines(config, call, monkeypatch):
    _, plain, _ = call("run", config, *QUICK)
    assert "\x1b[" not in plain
    monkeypatch.setattr(
        "fedgradnorm.cli.terminal.console",
        __import__("rich.console").console.Console(force_terminal=True, width=100),
    )
    _, live, _ = call("run", config, *QUICK, "--overwrite")
    assert "time left" in live
    assert "2/2" in live
    assert "parity" in live
    assert "round 1/2" not in live


def test_a_run_ends_with_where_its_time_went_and_what_was_sent(config, call):
    _, out, _ = call("run", config, *QUICK)
    line = next(line for line in out.splitlines() if line.startswith("time: "))
    shares = dict(
        re.findall(r"(head steps|encoder steps|evaluation|aggregation|writing|other) (\d+)%", line)
    )
    assert len(shares) == 6
    assert abs(sum(map(int, shares.values())) - 100) <= 3
    summary = Run(Path("runs/my")).summary()
    assert sum(summary["costs"].values()) <= summary["seconds"]
    assert min(summary["costs"].values()) > 0
    assert (
        f"sent a round: {summary['bytes_up'] / 2000:.1f} kB up, {summary['bytes_down'] / 2000:.1f} kB down"
        in line
    )


def test_verbose_says_which_way_clients_are_trained_and_why(config, call, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedgradnorm"), "handlers", [])
    _, quiet, _ = call("run", config, *QUICK)
    assert "clients like it" not in quiet
    _, out, _ = call("run", config, *QUICK, "--overwrite", "--verbose")
    text = re.sub(r"\s+", " ", out)
    assert (
        "class, and clients like it: stacked where 5 or more are alike, encoded once for all head steps: an encoder step takes"
        in text
    )


def test_profile_writes_a_trace_with_the_workers_in_it(config, call):
    call("run", config, "train.num_rounds=4", "train.eval_every=1", "--profile")
    (trace,) = Path("runs/my/profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"head steps", "encoder steps", "aggregation", "evaluation", "writing"} <= names
    code, _, _ = call("run", config, *QUICK, "--overwrite")  # a run with a trace is a run
    assert code == 0
    assert not Path("runs/my/profile").exists()


def test_evaluate_gives_the_figures_of_the_summary(config, call):
    call("run", config, *QUICK)
    code, out, _ = call("evaluate", "runs/my")
    assert code == 0
    for client, entry in Run(Path("runs/my")).summary()["clients"].items():
        assert client in out
        for name, value in entry["metrics"].items():
            assert f"{name} {value:.4f}" in re.sub(r"\s+", " ", out)


def test_report_overlays_runs_beside_them_or_where_told(config, call):
    for name in ("equal", "fedgradnorm"):
        call("run", config, *QUICK, f"weighting.name={name}", f"run.dir=runs/{name}")
    code, out, _ = call("report", "runs/equal", "runs/fedgradnorm")
    assert code == 0
    assert "report: runs/report.html" in out
    page = Path("runs/report.html").read_text()
    assert "equal" in page
    assert "fedgradnorm" in page
    call("report", "runs/equal", "--output", "elsewhere/page.html")
    assert Path("elsewhere/page.html").exists()


STUDY = """
title = "Two tasks"
seeds = [0]
base = {federation = {name = "digits", tasks = ["class", "parity"]}, train = {num_rounds = 2, head_steps = 2, encoder_steps = 2}}
methods = [{name = "equal", weighting = {name = "equal"}}, {name = "other", weighting = {name = "fedgradnorm"}}]
full = {train = {num_rounds = 3}}
"""


def test_report_says_how_far_a_run_got_that_has_not_finished(config, call):
    call("run", config, *QUICK)
    Path("runs/my/summary.json").unlink()
    code, out, error = call("report", "runs/my")
    assert (code, error) == (0, "")
    assert "stopped after round 2 of 2\n" in out
    Path("runs/my/metrics.jsonl").write_text("")
    assert call("report", "runs/my") == (
        2,
        "",
        "error: runs/my: no round of 2 is done yet: there is nothing to report on\n",
    )


def test_compare_trains_a_study_once_and_says_where_its_page_is(config, call):
    config.with_name("two.toml").write_text(STUDY)
    code, out, err = call("compare", "two.toml", "--jobs", "1")
    assert (code, err) == (0, "")
    assert "comparison 2/2" in out
    assert "other cannot be compared with equal: too few runs." in out
    folder = Path("runs/studies/two")
    assert f"page: {folder / 'index.html'}" in out
    for name in ("index.html", "results.csv", "results.json", "results.md", "results.svg"):
        assert (folder / name).stat().st_size > 0
    _, again, _ = call("compare", "two.toml", "--jobs", "1")
    assert "comparison" not in again
    call(
        "compare",
        "two.toml",
        "--jobs",
        "1",
        "--full",
        "--out",
        "large",
        "seeds=[4]",
        "train.batch_size=8",
    )
    runs = [Run(path.parent) for path in Path("large/cells").glob("*/summary.json")]
    settings = {
        (run.config.train.num_rounds, run.config.train.seed, run.config.train.batch_size)
        for run in runs
    }
    assert settings == {(3, 4, 8)}


def test_a_study_that_is_stopped_shows_what_there_is(config, call, monkeypatch):
    config.with_name("two.toml").write_text(STUDY)
    asked = []

    @contextmanager
    def stop_in_the_second_run():
        yield lambda: len(asked) > 3 or asked.append(0)

    monkeypatch.setattr("fedgradnorm.cli.terminal.stop_on_signals", stop_in_the_second_run)
    code, out, err = call("compare", "two.toml", "--jobs", "1")
    assert code == StoppedError.exit_code
    assert "stopped with 1 of 2 cells of the comparison to go; the same command goes on" in err
    assert "other: not trained yet." in out
    folder = Path("runs/studies/two")
    assert "other: not trained yet." in (folder / "results.md").read_text()
    assert "not trained yet" in (folder / "index.html").read_text()


def test_more_jobs_than_cores_would_only_wait_for_one_another(config, call, monkeypatch):
    config.with_name("two.toml").write_text(STUDY)
    monkeypatch.setattr("fedgradnorm.cli.terminal.available_cores", lambda: 1)
    code, out, _ = call("compare", "two.toml", "--jobs", "64")
    assert code == 0
    assert "--jobs 64: 1 at once, as many as there are cores" in out


def test_compare_can_be_told_which_methods(config, call):
    config.with_name("two.toml").write_text(STUDY)
    code, out, _ = call("compare", "two.toml", "--jobs", "1", "--methods", "equal")
    assert code == 0
    assert "comparison 1/1" in out
    code, _, err = call("compare", "two.toml", "--methods", "othr")
    assert code == 2
    assert "methods: there is no method 'othr'; did you mean 'other'" in err


def test_list_names_every_part_with_its_options(call):
    code, out, _ = call("list")
    assert code == 0
    for word in (
        "radcom",
        "mtfl",
        "digits",
        "equal",
        "fedgradnorm",
        "gamma = 0.9",
        "cnn",
        "mlp",
        "reference",
    ):
        assert word in out
    assert "Undefined" not in out


def test_a_users_own_weighting_is_found_in_the_current_folder(config, call):
    Path("own.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedgradnorm import Equal\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Equal):\n"
        '    """Equal weights, but mine."""\n'
        "    strength: float = 1.0\n"
    )
    code, _, err = call("run", config, *QUICK, "weighting.name=own:Mine", "weighting.strength=2")
    assert (code, err) == (0, "")
    assert Run(Path("runs/my")).config.weighting.options == {"strength": 2.0}
    code, _, err = call(
        "run", config, *QUICK, "weighting.name=own:Mine", "weighting.strenth=2", "--overwrite"
    )
    assert code == 2
    assert "unknown key 'weighting.strenth'; did you mean 'strength'?" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "absent.toml"], "config file absent.toml: expected a readable TOML file"),
        (
            ["run", "my.toml", "train.num_round=3"],
            "unknown key 'train.num_round'; did you mean 'num_rounds'? on the command line",
        ),
        (
            ["run", "my.toml", "train.num_rounds=0"],
            "train.num_rounds: expected a number of at least 1, found 0",
        ),
        (
            ["run", "my.toml", "weighting.gamma=-1"],
            "weighting.gamma: expected a number from 0 to 10, found -1",
        ),
        (
            ["run", "my.toml", "weighting.gama=1"],
            "unknown key 'weighting.gama'; did you mean 'gamma'?",
        ),
        (
            ["run", "my.toml", "federation.name=digit"],
            "federation.name: there is no federation 'digit'; did you mean 'digits'?",
        ),
        (
            ["run", "my.toml", "federation.name=mtfl", "federation.path=no.zip"],
            "no.zip: no such file or folder",
        ),
        (
            ["run", "my.toml", "federation.name=mtfl", "federation.path=my.toml"],
            "my.toml: expected MTFL.zip or its unpacked folder",
        ),
        (
            ["run", "my.toml", "federation.name=radcom", "federation.path=no.hdf5"],
            "there is no file 'no.hdf5'",
        ),
        (
            ["run", "my.toml", "federation.name=radcom", "federation.path=my.toml"],
            "my.toml: expected an HDF5 file",
        ),
        (["run", "my.toml", "model.norm_layer=fc"], "norm_layer 'fc' names no encoder parameter"),
        (
            ["run", "my.toml", "federation.tasks=['class', 'class']"],
            "federation.tasks: a task is named twice",
        ),
        (
            ["run", "my.toml", "federation.sizes.class=0"],
            "federation.sizes.class: expected at least 1 example, found 0",
        ),
        (["run", "my.toml", "run.dir=my.toml"], "run folder my.toml exists"),
        (["report", "absent"], "absent is no run"),
        (["compare", "absent.toml"], "config file absent.toml: expected a readable TOML file"),
        (["compare", "my.toml"], "unknown key 'federation'; known: base, baseline"),
        (["evaluate", "absent"], "absent is no run"),
    ],
)
def test_bad_input_is_one_error_with_exit_code_2_and_nothing_written(config, call, words, message):
    before = sorted(config.parent.rglob("*"))
    code, out, err = call(*words)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert err.startswith("error: ")
    assert err.count("\n") <= 2
    assert "Traceback" not in out + err
    assert sorted(config.parent.rglob("*")) == before


def test_an_existing_run_is_refused_unless_told(config, call):
    call("run", config, *QUICK)
    before = Path("runs/my/metrics.jsonl").read_bytes()
    code, _, err = call("run", config, *QUICK, "train.seed=1")
    assert code == 2
    assert "run folder runs/my exists" in err
    assert Path("runs/my/metrics.jsonl").read_bytes() == before
    assert call("run", config, *QUICK, "train.seed=1", "--overwrite")[0] == 0
    assert Path("runs/my/metrics.jsonl").read_bytes() != before


def test_the_installed_command_works():
    command = shutil.which("fedgradnorm", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for name in ("run", "resume", "evaluate", "report", "compare", "list", "flower"):
        assert name in done.stdout


def test_flower_init_writes_a_deployment_and_says_what_comes_next(config, call):
    code, out, _ = call(
        "flower",
        "init",
        "there",
        "--config",
        config,
        "--host",
        "fed.example.org",
        "federation.tasks=['loop']",
        "--port",
        "81",
    )
    assert code == 0
    assert "there: a deployment of 1 clients: loop" in out
    assert "python there/local.py" in out
    assert "SUPERLINK=fed.example.org:81\n" in Path("there/nodes/loop/node.env").read_text()
    code, _, err = call("flower", "init", "there")
    assert code == 2
    assert err.startswith("error: ")
    assert "exists and is not empty" in err


@pytest.mark.usefixtures("config")
def test_without_flower_its_command_is_one_error_and_the_list_says_how_to_install_it(tmp_path):
    def without_flower(*words):
        return launcher().call(tmp_path, *words, missing=["flwr"])

    code, _, error = without_flower("flower", "init", "there")
    assert code == 2
    assert error == 'error: Flower is not installed: pip install "fedgradnorm[flower]"\n'
    assert not Path("there").exists()
    code, out, error = without_flower("list")
    assert code == 0, error
    assert 'Flower is not installed: pip install "fedgradnorm[flower]"' in re.sub(
        r"[\s│]+", " ", out
    )
    assert "vectorized" in out
    code, _, error = without_flower("run", "my.toml", "engine.name=flower-local")
    assert code == 2
    assert "engine.name: 'flower-local' cannot be imported: Flower is not installed" in error


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_nothing_that_is_printed_raises_whatever_the_output_can_hold(config, monkeypatch, encoding):
    study = 'title = "t"\nconfig = "my.toml"\nseeds = [0]\n[base.train]\nnum_rounds = 1\n'
    Path("study.toml").write_text(
        study
        + "".join(
            f'[[methods]]\nname = "{name}"\nweighting.name = "{name}"\n'
            for name in ("equal", "rlw")
        )
    )
    commands = [
        ["run", str(config), *QUICK, "run.dir=one"],
        ["report", "one"],
        ["evaluate", "one"],
        ["resume", "one"],
        ["list"],
        ["run", "--help"],
        ["compare", "study.toml", "--jobs", "1"],
        ["run", "nowhere-\N{GREEK SMALL LETTER OMEGA}.toml"],
    ]
    for words in commands:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["fedgradnorm", *words])
        monkeypatch.setattr(sys, "path", sys.path[:])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        for stream in streams:
            stream.flush()
        out, error = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        assert code == (2 if "nowhere" in words[-1] else 0), (words, error)
        assert (out + error).strip()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_configuration_may_begin_with_a_byte_order_mark(config, call, encoding):
    config.write_bytes(
        (CONFIG + "# \N{GREEK SMALL LETTER GAMMA}\n").replace("\n", "\r\n").encode(encoding)
    )
    code, _, error = call("run", config, *QUICK, "run.page=false", "run.tensorboard=false")
    assert (code, error) == (0, "")
    folder = Path("runs/my/config.toml")
    folder.write_bytes(folder.read_text().encode(encoding))
    assert call("resume", "runs/my", "--rounds", "3")[0] == 0


def test_without_a_page_nobody_is_told_to_install_what_makes_it(config, call):
    _, out, _ = call("run", config, *QUICK, "run.page=false")
    assert "pip install" not in out
    assert out.splitlines()[-1] == "run: runs/my"


def broken(*_):
    return float("nan")


def broken_later(*_):
    broken_later.calls += 1
    if broken_later.calls > 6:
        raise ValueError("Input contains NaN.")
    return 0.5


def with_metrics(seed: int) -> Federation:
    """A federation with a metric that raises after some calls, and one that is never a number."""
    broken_later.calls = 0
    made = digits.make(seed, tasks=("parity", "loop"))
    metrics = (Metric("later", broken_later, True), Metric("broken", broken, True))
    return dataclasses.replace(
        made,
        clients=[
            dataclasses.replace(one, task=dataclasses.replace(one.task, metrics=metrics))
            for one in made.clients
        ],
    )


def test_figures_that_are_missing_are_told_of_and_end_the_command_with_1(config, call):
    config.write_text(f'[federation]\nname = "{__name__}:with_metrics"\n')
    code, out, error = call(
        "run",
        config,
        *QUICK,
        "train.num_rounds=6",
        "train.eval_every=1",
        "run.page=false",
        "run.tensorboard=false",
    )
    assert code == 1
    assert "warning: client 'parity': metric 'later' is missing from round " in error
    last = error.splitlines()[-1]
    assert last.startswith(
        "error: the run has ended, and figures are missing: client 'parity': metric 'later': ValueError: Input contains NaN."
    )
    assert "Traceback" not in error
    assert Run(Path("runs/my")).summary()["rounds"] == 6
    assert "parity" in out


def test_who_never_counted_is_said_by_the_command_the_table_and_the_page(config, call):
    words = [
        "train.max_update_ratio=1.000001",
        "train.min_clients=0",
        "train.num_rounds=8",
        "faults.drop=0.9",
    ]
    code, _, error = call("run", config, *QUICK, *words)
    assert code == 0
    said = [line for line in error.splitlines() if line.startswith("warning: client ")]
    assert said
    assert all("never counted" in line or "seldom counted" in line for line in said)
    _, _, error = call("report", "runs/my")
    assert [line for line in error.splitlines() if line.startswith("warning: client ")] == said
    page = unescape(Path("runs/my/report.html").read_text())
    for line in said:
        assert line.removeprefix("warning: ") in page


def test_evaluate_tells_of_missing_figures_and_ends_with_1(config, call, monkeypatch):
    call("run", config, *QUICK)
    evaluation = Evaluation(
        0.5, {"accuracy": float("nan")}, 9, {"accuracy": "ValueError: only one class"}
    )
    monkeypatch.setattr("fedgradnorm.runs.models.evaluate_client", lambda *_: evaluation)
    code, out, error = call("evaluate", "runs/my")
    assert code == 1
    assert "parity" in out
    assert (
        "error: the models are tested, and figures are missing: client 'class': metric 'accuracy': ValueError: only one class"
        in error
    )


def test_resume_takes_the_current_folder(config, call, monkeypatch):
    call("run", config, *QUICK)
    monkeypatch.chdir("runs/my")
    code, out, error = call("resume", ".", "--rounds", "3")
    assert (code, error) == (0, "")
    assert "round 3/3" in out
