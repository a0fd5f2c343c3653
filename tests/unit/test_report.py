import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.resources import files
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from fedgradnorm import Client, FedGradNorm, FedGradNormWarning, RunError, Task, train
from fedgradnorm.federations import digits
from fedgradnorm.registry import BUILT_INS
from fedgradnorm.report import comparison_rows, comparison_table, write_report
from fedgradnorm.report.charts import MOST_LINES
from fedgradnorm.report.looks import looks_for
from fedgradnorm.runs.reader import Run

HOSTILE = "</script><script>alert(1)</script>[bold]&"

TRAINED = ("class", "parity", "loop", "mass")
"""What digits trains unless it is told otherwise."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on digits: equal, fedgradnorm, and one with absent clients and a client whose reports are all dropped."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "num_rounds": 3,
        "head_steps": 2,
        "encoder_steps": 2,
        "head_lr": 0.2,
        "encoder_lr": 0.2,
    }
    for name, weighting in {
        "equal": "equal",
        "fedgradnorm": FedGradNorm(gamma=2.0, weight_lr=0.5),
    }.items():
        train(digits.make(0), weighting, run_dir=folder / name, **settings)
    several = digits.make(0, tasks=("class", "mass"), clients_per_task=2)
    silent = Client(
        "silent", Task(HOSTILE, partial(nn.Linear, out_features=1), nn.functional.mse_loss), Holes()
    )
    federation = replace(several, clients=[*several.clients, silent])
    rounds = (("class-0", "silent"), tuple(client.id for client in federation.clients))
    with pytest.warns(
        FedGradNormWarning, match="client 'silent' never counted: 3 of 3 reports were dropped"
    ):
        train(federation, run_dir=folder / "gaps", participants=rounds, **settings)
    return folder


class Holes:
    """Data that are not finite where no check before training looks."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.full((64,), index / 100 if index < 64 else torch.nan), torch.tensor(
            [float(index)]
        )


def runs_in(folder, *names):
    return [Run(folder / name) for name in names]


def page_of(runs, tmp_path):
    return write_report(runs, tmp_path / "new" / "report.html").read_text(encoding="utf-8")


def charts_in(page):
    return json.loads(
        re.search(
            r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL
        ).group(1)
    )


def lines_of(page, title, kind):
    return [
        line
        for chart in charts_in(page)
        if chart["title"] == title
        for line in chart["lines"]
        if line["kind"] == kind
    ]


def printed(runs, width):
    console = Console(width=width, record=True, file=StringIO())
    console.print(comparison_table(runs))
    return console.export_text(styles=False)


def test_the_page_loads_nothing(folder, tmp_path):
    page = page_of(runs_in(folder, "equal"), tmp_path)
    tags = re.findall(r"<(?:script|link|img|iframe|style)\b[^>]*>", page)
    assert tags
    assert not [tag for tag in tags if re.search(r"\b(?:src|href)\s*=", tag)]
    assert "default-src 'none'" in page
    assert "@import" not in page.split("</style>")[0]


@pytest.mark.parametrize(
    "names", [("fedgradnorm",), ("equal", "fedgradnorm"), ("equal", "gaps", "fedgradnorm")]
)
def test_every_run_and_task_has_its_charts(folder, tmp_path, names):
    page = page_of(runs_in(folder, *names), tmp_path)
    for name in names:
        assert f"<span>{name}</span>" in page
    for task in TRAINED:
        assert f"<h3>{task}</h3>" in page
    charts = charts_in(page)
    assert len(charts) == 4 * page.count("<h3>")
    for number, chart in enumerate(charts):
        assert (f'id="chart-{number}"' in page) == bool(chart["lines"])


def test_a_run_has_one_colour_everywhere(folder, tmp_path):
    page = page_of(runs_in(folder, "equal", "fedgradnorm"), tmp_path)
    colours = {
        line["name"].split(",")[0]: line["colour"]
        for chart in charts_in(page)
        for line in chart["lines"]
    }
    for chart in charts_in(page):
        assert all(line["colour"] == colours[line["name"].split(",")[0]] for line in chart["lines"])
    for name in ("equal", "fedgradnorm"):
        assert f'style="color:{colours[name]}"><i></i><span>{name}</span>' in page


def test_the_rows_are_those_of_the_summaries(folder):
    runs = runs_in(folder, "equal", "fedgradnorm")
    rows = comparison_rows(runs)
    assert [(row.task, row.run) for row in rows] == [
        (task, run.folder.name) for task in TRAINED for run in runs
    ]
    for row in rows:
        task = Run(folder / row.run).summary()["tasks"][row.task]
        metric = task["metric"]
        assert (row.metric, row.percent, row.higher_is_better) == (
            metric["name"],
            metric["percent"],
            metric["higher_is_better"],
        )
        for key in ("guess", "first", "best", "best_round", "last"):
            assert getattr(row, key) == metric[key]
        assert (row.loss_ratio, row.rounds_to, row.weight) == (
            task["loss_ratio"],
            task["rounds_to"],
            task["weight"],
        )


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("names", [("fedgradnorm",), ("equal", "fedgradnorm")])
def test_page_and_terminal_show_the_figures(folder, tmp_path, names, width):
    runs = runs_in(folder, *names)
    page, text = page_of(runs, tmp_path), printed(runs, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "accuracy\N{NO-BREAK SPACE}↑" in page
    assert "error\N{NO-BREAK SPACE}↓" in page
    for row in comparison_rows(runs):
        for value in (row.guess, row.first, row.last):
            shown = f"{100 * value:.1f} %" if row.percent else f"{value:.3f}"
            assert shown in text
            assert f">{shown}</td>" in page
        assert f"({row.best_round})" in text
        assert f">{row.weight:.2f}</td>" in page


def test_only_several_runs_have_a_best(folder, tmp_path):
    assert 'class="best"' not in page_of(runs_in(folder, "equal"), tmp_path)
    assert 'class="best"' not in page_of(runs_in(folder, "equal", "equal"), tmp_path)
    assert 'class="best"' in page_of(runs_in(folder, "equal", "fedgradnorm"), tmp_path)


def test_the_findings_say_who_was_first(folder, tmp_path):
    runs = []
    for name, rounds, last in (("slow", 9, 0.5), ("fast", 7, 0.75)):
        shutil.copytree(folder / "equal", tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        for task in summary["tasks"].values():
            task["rounds_to"] = {
                "loss ratio 0.8": 3,
                "loss ratio 0.6": rounds,
                "loss ratio 0.4": None,
            }
        summary["tasks"]["class"]["metric"]["last"] = last
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        runs.append(Run(tmp_path / name))
    page = page_of(runs, tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    assert "First to 60 % of the initial training loss: fast in 4 of 4 tasks." in page
    assert "Best last test metric: a tie in 3 of 4 tasks, fast in 1." in page


def test_hostile_names_stay_text(folder, tmp_path):
    hostile = tmp_path / "<script>alert(2)[red]"
    shutil.copytree(folder / "gaps", hostile)
    runs = [Run(hostile), Run(folder / "equal")]
    page = page_of(runs, tmp_path)
    assert "<script>alert" not in page
    assert page.count("<script") == 3
    assert "&lt;script&gt;alert(2)[red]" in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    text = printed(runs, 200)
    assert HOSTILE in text
    assert hostile.name in text


def test_only_the_source_of_plotly_is_written_unescaped():
    rooms = (files(f"fedgradnorm.{room}") / "templates" for room in ("report", "compare"))
    templates = [
        path.read_text() for room in rooms for path in room.iterdir() if ".j2" in path.name
    ]
    assert len(templates) == 3
    assert re.findall(r".*(?:\|\s*safe|autoescape|Markup).*", "".join(templates)) == [
        "<script>{{ plotly|safe }}</script>"
    ]


def test_absent_clients_are_gaps_and_dropped_reports_are_counted(folder, tmp_path):
    run = Run(folder / "gaps")
    page = page_of([run], tmp_path)
    silent = next(row for row in comparison_rows([run]) if row.task == HOSTILE)
    assert (silent.metric, silent.last, silent.loss_ratio) == (None, None, None)
    dropped = run.summary()["dropped"]
    assert dropped == 3
    assert f"<td>{dropped}</td>" in page
    assert "gaps: 3 reports of silent dropped:" in page
    assert '<p class="empty">no figures</p>' in page
    losses = {line["name"]: line["y"] for line in lines_of(page, "Training loss", "client")}
    assert [value is None for value in losses["gaps, class-1"]] == [True, False, False]
    assert None not in losses["gaps, class-0"]


def test_many_clients_become_a_band(folder, tmp_path):
    shutil.copytree(folder / "fedgradnorm", tmp_path / "many")
    run = Run(tmp_path / "many")
    rows = [
        row | {"client": f"{row['client']}-{number}", "weight": number}
        for row in run.rows()
        for number in range(MOST_LINES + 1)
    ]
    (tmp_path / "many" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    summary = run.summary()
    for task in summary["tasks"].values():
        task["clients"] = MOST_LINES + 1
    (tmp_path / "many" / "summary.json").write_text(json.dumps(summary))
    page = page_of([run], tmp_path)
    assert not lines_of(page, "Weight", "client")
    for band in lines_of(page, "Weight", "band"):
        assert (set(band["low"]), set(band["y"])) == ({0}, {MOST_LINES})
    assert all(set(line["y"]) == {MOST_LINES / 2} for line in lines_of(page, "Weight", "mean"))


def test_the_settings_that_differ_come_first(folder, tmp_path):
    page = page_of(runs_in(folder, "equal", "fedgradnorm"), tmp_path)
    settings = page.split("<h2>Settings</h2>")[1].split("<script>")[0]
    differing, *details = settings.split("<details>")
    assert "weighting.gamma" in differing
    assert "train.num_rounds" not in differing
    assert len(details) == 2
    assert all("num_rounds = 3" in text for text in details)
    assert str(folder) not in page


def test_runs_of_one_name_are_told_apart(folder, tmp_path):
    shutil.copytree(folder / "equal", tmp_path / "other" / "equal")
    names = {
        row.run
        for row in comparison_rows([Run(folder / "equal"), Run(tmp_path / "other" / "equal")])
    }
    assert names == {f"{folder.name}/equal", "other/equal"}
    assert {row.run for row in comparison_rows(runs_in(folder, "equal", "equal"))} == {
        "equal (1)",
        "equal (2)",
    }


@pytest.mark.parametrize(
    ("file", "text"), [("summary.json", "{}"), ("metrics.jsonl", None), ("metrics.jsonl", "")]
)
def test_a_damaged_run_is_an_error(folder, tmp_path, file, text):
    shutil.copytree(folder / "equal", tmp_path / "equal")
    (tmp_path / "equal" / file).unlink() if text is None else (
        tmp_path / "equal" / file
    ).write_text(text)
    with pytest.raises(RunError, match=re.escape(file)):
        write_report([Run(tmp_path / "equal")], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "key", ["round", "client", "task", "dropped", "weight", "target", "metric"]
)
def test_a_line_that_lacks_a_key_is_an_error(folder, tmp_path, key):
    shutil.copytree(folder / "equal", tmp_path / "equal")
    first, second, *rows = Run(folder / "equal").rows()
    del second[key]
    (tmp_path / "equal" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (first, second, *rows))
    )
    with pytest.raises(RunError, match=rf"equal/metrics\.jsonl line 2: {key}: Field required$"):
        write_report([Run(tmp_path / "equal")], tmp_path / "report.html")


def test_no_run_and_no_place_are_errors(folder, tmp_path):
    with pytest.raises(RunError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(runs_in(folder, "equal"), tmp_path / "file" / "report.html")


def test_without_plotly_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(RunError, match=re.escape('pip install "fedgradnorm[report]"')):
        write_report(runs_in(folder, "equal"), tmp_path / "report.html")
    assert comparison_table(runs_in(folder, "equal")).row_count == len(TRAINED)


def test_a_method_has_the_colour_that_it_has_in_a_study(folder, tmp_path):
    for names in (("equal", "fedgradnorm"), ("fedgradnorm",), ("fedgradnorm", "equal")):
        colours = {
            look.name: look.colour for look in looks_for(["fedgradnorm step", "equal", "my own"])
        }
        page = page_of(runs_in(folder, *names), tmp_path)
        for label, method in (("equal", "equal"), ("fedgradnorm", "fedgradnorm step")):
            if label in names:
                assert f'style="color:{colours[method]}"><i></i><span>{label}</span>' in page


def test_looks_tell_all_methods_apart_and_are_the_same_in_every_company():
    known = [name for name in BUILT_INS["weighting"] if name != "fedgradnorm"] + [
        "fedper",
        "fedprox",
        "local",
        "centralized",
    ]
    looks = looks_for(
        [
            "own",
            *known,
            "fedgradnorm step",
            "fedgradnorm exact",
            *(f"method {number}" for number in range(40)),
        ]
    )
    assert len({(look.colour, look.dash, look.marker) for look in looks}) == len(looks)
    alone = {name: looks_for([name])[0] for name in known}
    assert all(look == alone[look.name] for look in looks if look.name in alone)
    colours = [look.colour for look in looks_for(known[:7], colours_only=True)]
    assert len(set(colours)) == 7
