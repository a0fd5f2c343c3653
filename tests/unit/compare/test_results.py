import csv
import io
import json
import re
import statistics
from dataclasses import replace

import pytest

from fedgradnorm import RunError
from fedgradnorm.api import train
from fedgradnorm.compare.cells import Ended
from fedgradnorm.compare.figure import write_figure
from fedgradnorm.compare.findings import (
    answers,
    answers_on,
    caveats,
    headline_target,
    verdict,
)
from fedgradnorm.compare.measures import diverged, measure, tuning_score
from fedgradnorm.compare.page import write_page
from fedgradnorm.compare.results import OVERALL
from fedgradnorm.compare.spec import Targets, Tuning
from fedgradnorm.compare.tables import write_tables
from fedgradnorm.compare.texts import difference_text, mean_text, speed_text
from fedgradnorm.compare.titles import speed_title, task_title
from fedgradnorm.federations import digits
from fedgradnorm.runs.reader import Run
from tests.unit.compare.studies import made_up, measured

LOST = Ended("diverged", "round 3: 0 sound reports")
FASTER = {
    "equal": [measured(r) for r in (30, 34, 31, 40, 36, 35)],
    "fast": [measured(r) for r in (20, 25, 19, 30, 21, 25)],
}
ALIKE = {"equal": FASTER["equal"], "other": [measured(r) for r in (33, 30, 35, 36, 40, 38)]}


def test_a_clear_difference_is_the_title():
    results = made_up(FASTER)
    assert re.fullmatch(
        r"fast needs 11 rounds fewer than equal on smile \(95 % interval 9(\.\d+)? to 1[34](\.\d+)? fewer\)\.",
        task_title(results, "", "smile"),
    )
    assert re.fullmatch(
        r"fast is faster than equal on smile \(by 11 rounds; 9.* to 13.*\)\.", *answers(results)
    )
    slower = made_up({"equal": FASTER["fast"], "slow": FASTER["equal"]})
    assert re.fullmatch(
        r"slow is slower than equal on smile \(by 11 rounds; 9.* to 13.*\)\.", *answers(slower)
    )
    assert task_title(slower, "", "smile").startswith(
        "slow needs 11 rounds more than equal on smile (95 % interval 9"
    )


def test_no_clear_difference_is_said_to_be_none():
    results = made_up(ALIKE)
    assert task_title(results, "", "smile").startswith(
        "No clear difference on smile: other needs 1 round more than equal (95 % interval "
    )
    assert answers(results) == ["No clear difference between equal and other on smile."]


def test_of_several_methods_it_is_told_how_many_are_faster():
    results = made_up({**FASTER, "same": FASTER["equal"], "slow": [measured(49)] * 6})
    title = task_title(results, "", "smile")
    assert answers(results)[-1] == "No clear difference between equal and same on smile."
    assert title.startswith(
        "Of 3 methods 1 is faster than equal on smile, 1 slower; first of all fast needs 11 rounds fewer than equal"
    )


def test_methods_of_which_nothing_is_clear_are_told_of_together():
    results = made_up(
        {
            "equal": FASTER["equal"],
            "one": FASTER["equal"],
            "two": FASTER["equal"],
            "fast": FASTER["fast"],
        }
    )
    first, second = answers(results)
    assert first.startswith("fast is faster than equal on smile (by 11 rounds; ")
    assert second == "No clear difference between equal and one and two on smile."


def test_the_edges_of_the_grid_are_told_of_together():
    study = {"axes": [{"keys": ["train.encoder_lr"], "values": [0.1, 0.4]}], "seeds": [100]}
    results = made_up(FASTER)
    tuned = [
        replace(
            one, scores={(0.1,): 1.0, (0.4,): 0.5}, chosen=(0.4,), edges=("train.encoder_lr = 0.4",)
        )
        for one in results.tuned
    ]
    results = replace(
        results,
        tuned=tuned,
        study=results.study.model_copy(update={"tuning": Tuning.model_validate(study)}),
    )
    notes = [text for text in caveats(results) if "edge" in text]
    assert notes == [
        "At the edge of the tuning grid, train.encoder_lr = 0.4: equal and fast; a better value may lie beyond."
    ]


def test_few_seeds_claim_nothing():
    results = made_up({name: cells[:5] for name, cells in FASTER.items()})
    assert "too few seeds for an interval: 5 of 6" in task_title(results, "", "smile")
    assert answers(results) == ["fast cannot be compared with equal: too few runs."]


def test_a_target_that_is_not_reached_counts_with_all_rounds():
    results = made_up(
        {
            "equal": [measured(None)] * 2 + [measured(40)] * 3,
            "fast": [measured(None)] + [measured(20)] * 4,
        }
    )
    one = results.find("", "fast", "smile", "rounds", "loss ratio 0.6")
    assert (one.reached, one.difference.mean, one.censored) == (4, (0 - 30 - 20 - 20 - 20) / 5, 2)
    assert speed_text(one) == "≥ 26 (4 of 5)"
    assert (
        speed_text(results.find("", "equal", "smile", "rounds", "loss ratio 0.6"))
        == "≥ 44 (3 of 5)"
    )


def test_a_target_that_none_reached_has_no_difference():
    results = made_up({"equal": [measured(None)] * 5, "never": [measured(None)] * 5})
    one = results.find("", "never", "smile", "rounds", "loss ratio 0.6")
    assert (one.difference, one.reached, speed_text(one)) == (None, 0, "≥ 50 (0 of 5)")
    assert headline_target(results, "", "smile") is None
    assert (
        task_title(results, "", "smile")
        == "smile: no method brings the training loss down to a target."
    )


def test_a_diverged_run_is_no_run_left_out():
    results = made_up({"equal": FASTER["equal"], "shaky": [*FASTER["fast"][:5], LOST]})
    rounds = results.find("", "shaky", "smile", "rounds", "loss ratio 0.6")
    assert (rounds.values[5], rounds.reached, rounds.difference.pairs, rounds.lost) == (50, 5, 6, 0)
    assert "1 run of 12 diverged." in caveats(results)


def test_of_survivors_alone_there_is_no_verdict():
    """Seven runs of eight are far better, and the eighth diverged: the mean of seven is not the method's."""
    results = made_up(
        {"equal": [measured(30, last=0.7)] * 8, "shaky": [*[measured(20, last=0.9)] * 7, LOST]}
    )
    for task, name, target in (
        ("smile", "seconds", "loss ratio 0.6"),
        ("smile", "last metric", ""),
        ("smile", "final loss ratio", ""),
        (OVERALL, "worst task's skill", ""),
    ):
        one = results.find("", "shaky", task, name, target)
        assert (len(one.values), one.seeds, one.lost, verdict(one)) == (7, 8, 1, 0)
    assert mean_text(results.find("", "shaky", "smile", "last metric")) == "90 (7 of 8)"
    assert (
        speed_text(results.find("", "shaky", "smile", "seconds", "loss ratio 0.6"))
        == "2 s (7 of 8)"
    )
    assert (
        difference_text(results.find("", "shaky", "smile", "last metric"))
        == "+20 (+20 to +20), 7 of 8"
    )
    lost_baseline = made_up(
        {"equal": [*[measured(30)] * 7, LOST], "steady": [measured(30, last=0.9)] * 8}
    )
    assert verdict(lost_baseline.find("", "steady", "smile", "last metric")) == 0


def test_a_method_that_diverges_on_all_seeds_is_told_of_everywhere(tmp_path):
    results = made_up(
        {**FASTER, "wild": [LOST] * 6, "broken": [Ended("failed", "out of memory")] * 5 + [LOST]}
    )
    assert answers(results)[-2:] == [
        "wild: diverged on all 6 seeds.",
        "broken: failed on 5 of 6 seeds, diverged on 1 of 6 seeds.",
    ]
    write_tables(results, tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert table.count("| wild | diverged on all 6 seeds |") == 2, (
        "the table of speeds, and that over all tasks"
    )
    page = write_page(results, tmp_path / "index.html").read_text()
    assert page.count('class="absent" colspan') == 2 * 3, "and the figures of the task"
    (forest,) = (chart for chart in data_in(page)["charts"] if chart["kind"] == "forest")
    assert [point.get("absence") for point in forest["points"]] == [
        None,
        "diverged on all 6 seeds",
        results.absence("", "broken"),
    ]


def test_fedgradnorm_comes_first(tmp_path):
    results = made_up({**FASTER, "ours": FASTER["fast"]}, weightings={"ours": "fedgradnorm"})
    assert results.methods == ("ours", "equal", "fast")
    assert [text.split(" ")[0] for text in answers(results)] == ["ours", "fast"]
    assert task_title(results, "", "smile").startswith(
        "smile, against equal: ours 11 rounds fewer (95 % interval 9"
    )
    assert task_title(results, "", "smile").endswith(
        "Of 1 other method 1 is faster than equal, none slower."
    )
    page = write_page(results, tmp_path / "index.html").read_text()
    assert [look["name"] for look in data_in(page)["looks"]] == ["ours", "equal", "fast"]
    assert (
        page.index("<li>ours is faster")
        < page.index("<summary>The 1 other method")
        < page.index("<li>fast is faster")
    )


def test_a_title_names_four_methods_and_counts_more():
    for names in ("abcd", "abcde"):
        results = made_up(
            {**FASTER, **dict.fromkeys(names, FASTER["fast"])},
            weightings=dict.fromkeys(names, "fedgradnorm"),
        )
        named = "; ".join(
            f"{name} faster than equal on 1 of 1 task, slower on none" for name in names
        )
        counted = "6 of 6 methods faster than equal on some task"
        assert (
            speed_title(results, "")
            == f"Rounds to a target: {named if len(names) == 4 else counted}"
        )


def test_delta_m_is_paired_with_single_task_training():
    cells = {"equal": [measured(30, last=0.72)] * 5, "local": [measured(30, last=0.8)] * 5}
    results = made_up(cells, single="local")
    assert list(
        results.find("", "equal", OVERALL, "delta-m, last metric").values.values()
    ) == pytest.approx([-10] * 5)
    assert set(results.find("", "local", OVERALL, "delta-m, last metric").values.values()) == {0}
    assert results.find(
        "", "local", OVERALL, "delta-m, last metric"
    ).difference.mean == pytest.approx(10)
    assert made_up(cells).find("", "equal", OVERALL, "delta-m, last metric").values == {}


def test_the_measures_of_a_run_are_those_of_its_files(tmp_path):
    train(
        digits.make(0),
        num_rounds=12,
        head_steps=3,
        encoder_steps=3,
        eval_every=3,
        run_dir=tmp_path / "run",
    )
    found, run = (
        measure(
            tmp_path / "run", Targets(loss_ratios=(0.9, 0.01), metrics={"parity": 0.6, "mass": 9.0})
        ),
        Run(tmp_path / "run"),
    )
    rows, rates = run.rows(), {}
    for row in rows:
        rates.setdefault(row["task"], []).append(row["inverse_training_rate"])
    for task, figures in found.tasks.items():
        below = [
            end
            for end in range(1, 13)
            if sum(rates[task][max(0, end - 5) : end]) / min(end, 5) <= 0.9
        ]
        reached = figures.targets["loss ratio 0.9"]
        assert (reached.reached, reached.rounds) == (bool(below), below[0] if below else 12)
        assert figures.final_ratio == rates[task][-1], "a tenth of 12 rounds is one"
        assert not figures.targets["loss ratio 0.01"].reached
    tests = {
        row["round"]: row["metric"]
        for row in rows
        if row["task"] == "parity" and row["metric"] is not None
    }
    means = [
        statistics.fmean(tests[k] for k in range(end - 4, end + 1) if k in tests) for end in tests
    ]
    assert found.tasks["parity"].targets["accuracy 0.6"].reached == (max(means) >= 0.6)
    assert found.tasks["mass"].targets["mean absolute error 9"].rounds == 1
    by_round = list(zip(*rates.values(), strict=True))
    assert found.spread_end == pytest.approx(std_over_mean(by_round[-1]))
    assert found.spread_mean == pytest.approx(sum(map(std_over_mean, by_round)) / 12)
    assert found.bytes == sum(row["bytes_up"] + row["bytes_down"] for row in rows)
    assert tuning_score(found) == pytest.approx(sum(by_round[-1]) / 4)
    slowest = [
        max(row["seconds"] for row in rows if row["round"] == number) for number in range(1, 13)
    ]
    total = found.tasks["class"].targets["loss ratio 0.01"].seconds
    assert (
        sum(slowest)
        < total
        < sum(row["seconds"] for row in rows)
        + run.summary()["costs"]["aggregation"]
        + 1e-9
        + sum(slowest)
    )


@pytest.mark.parametrize(
    ("lost", "reason"), [(1, ""), (4, ""), (5, "parity: none of its last reports was sound")]
)
def test_a_run_has_diverged_where_none_of_its_last_reports_is_sound(tmp_path, lost, reason):
    train(digits.make(0), num_rounds=12, head_steps=1, encoder_steps=1, run_dir=tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["client"] == "parity" and row["round"] > 12 - lost:
            row |= {
                "dropped": "no report",
                "loss": None,
                "initial_loss": None,
                "inverse_training_rate": None,
                "grad_norm": None,
            }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert diverged(measure(tmp_path / "run", Targets())) == reason


def std_over_mean(values):
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean


def data_in(page):
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
        ).group(1)
    )


def test_the_page_holds_the_findings_and_loads_nothing(tmp_path):
    results = made_up({**FASTER, "shaky": [*FASTER["fast"][:5], LOST]}, variant="half the data")
    page = write_page(results, tmp_path / "index.html").read_text()
    for text in (
        *answers_on(results, "half the data")[1],
        *caveats(results),
        task_title(results, "half the data", "smile"),
        "Who is faster?",
        LOST.reason,
    ):
        assert text in page.replace("&#39;", "'"), text
    assert not [
        tag
        for tag in re.findall(r"<(?:script|link|img|style)\b[^>]*>", page)
        if re.search(r"\b(?:src|href)\s*=", tag)
    ]
    assert "default-src 'none'" in page


def test_a_method_has_one_colour_everywhere_and_the_order_of_the_study(tmp_path):
    names = ["equal", *(f"method {number}" for number in range(9))]
    page = write_page(
        made_up(dict.fromkeys(names, FASTER["equal"])), tmp_path / "index.html"
    ).read_text()
    data = data_in(page)
    assert [look["name"] for look in data["looks"]] == names
    assert len({(look["colour"], look["dash"]) for look in data["looks"]}) == len(names)
    for look in data["looks"]:
        legend = re.findall(
            rf'stroke="(#\w+)"[^>]*></path><path [^>]*></path></svg><span>{look["name"]}</span>',
            page,
        )
        assert len(legend) > 3
        assert set(legend) == {look["colour"]}
    for chart in data["charts"]:
        drawn = [line["method"] for line in chart.get("lines", chart.get("points"))]
        assert drawn == sorted(drawn), (
            "charts name methods by their number, and have no colours of their own"
        )
        assert "#" not in json.dumps(chart)


def test_hostile_names_stay_text(tmp_path):
    name = "</script><script>alert(1)</script>"
    page = write_page(
        made_up({"equal": FASTER["equal"], name: FASTER["fast"]}), tmp_path / "index.html"
    ).read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == 3


def test_tables_hold_every_estimate(tmp_path):
    results = made_up({**FASTER, "shaky": [*FASTER["fast"][:5], LOST]})
    write_tables(results, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == len(results.estimates)
    (row,) = [
        row
        for row in rows
        if (row["method"], row["measure"], row["target"]) == ("fast", "rounds", "loss ratio 0.6")
    ]
    assert (float(row["difference"]), row["pairs"], row["reached"], row["below"]) == (
        pytest.approx(-11),
        "6",
        "6",
        "6",
    )
    value = json.loads((tmp_path / "results.json").read_text())
    assert value["findings"] == answers(results)
    assert [cell["state"] for cell in value["cells"]].count("diverged") == 1
    text = (tmp_path / "results.md").read_text()
    assert task_title(results, "", "smile") in text
    assert "| shaky | 5 | diverged | round 3: 0 sound reports |" in text


def test_the_figure_is_the_same_file_for_the_same_figures(tmp_path):
    results = made_up({**FASTER, "wild $\\frac{$": [LOST] * 6}, variant="half the data")
    first, again = (
        write_figure(results, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg")
    )
    assert first == again
    assert b"<svg" in first
    with pytest.raises(RunError, match="nothing to draw"):
        write_figure(made_up({"equal": [LOST]}), tmp_path / "none.svg")
