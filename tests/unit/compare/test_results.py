import csv
import io
import json
import re
from dataclasses import replace

import pytest

from fedgradnorm.compare.cells import Ended
from fedgradnorm.compare.findings import answers, caveats, headline_target, task_title
from fedgradnorm.compare.measures import measure, tuning_score
from fedgradnorm.compare.page import write_page
from fedgradnorm.compare.results import OVERALL
from fedgradnorm.compare.spec import Targets, Tuning
from fedgradnorm.compare.tables import speed_text, write_tables
from fedgradnorm.federations import digits
from fedgradnorm.history import Run
from fedgradnorm.run import train
from tests.unit.compare.studies import made_up, measured

LOST = Ended("diverged", "round 3: 0 sound reports")
FASTER = {"equal": [measured(rounds) for rounds in (30, 34, 31, 40, 36)], "fast": [measured(rounds) for rounds in (20, 25, 19, 30, 21)]}
ALIKE = {"equal": [measured(rounds) for rounds in (30, 34, 31, 40, 36)], "other": [measured(rounds) for rounds in (33, 30, 35, 36, 40)]}


def test_a_clear_difference_is_the_title():
    results = made_up(FASTER)
    assert re.fullmatch(
        r"fast needs 11.2 rounds fewer than equal on smile \(95 % interval 9(\.\d+)? to 1[34](\.\d+)? fewer\)\.",
        task_title(results, "", "smile"),
    )
    assert answers(results) == ["fast is faster than equal on smile (by 11.2 rounds)."]
    slower = made_up({"equal": FASTER["fast"], "slow": FASTER["equal"]})
    assert answers(slower) == ["slow is slower than equal on smile (by 11.2 rounds)."]
    assert task_title(slower, "", "smile").startswith("slow needs 11.2 rounds more than equal on smile (95 % interval 9")


def test_no_clear_difference_is_said_to_be_none():
    results = made_up(ALIKE)
    assert task_title(results, "", "smile").startswith(
        "No clear difference on smile: other needs 0.6 rounds more than equal (95 % interval "
    )
    assert answers(results) == ["No clear difference between equal and other on smile."]


def test_of_several_methods_it_is_told_how_many_are_faster():
    results = made_up({**FASTER, "same": FASTER["equal"], "slow": [measured(49)] * 5})
    title = task_title(results, "", "smile")
    assert answers(results)[-1] == "No clear difference between equal and same on smile."
    assert title.startswith("Of 3 methods 1 is faster than equal on smile, 1 slower; first of all fast needs 11.2 rounds fewer than equal")


def test_methods_of_which_nothing_is_clear_are_told_of_together():
    results = made_up({"equal": FASTER["equal"], "one": FASTER["equal"], "two": FASTER["equal"], "fast": FASTER["fast"]})
    assert answers(results) == [
        "fast is faster than equal on smile (by 11.2 rounds).",
        "No clear difference between equal and one and two on smile.",
    ]


def test_the_edges_of_the_grid_are_told_of_together():
    study = {"axes": [{"keys": ["train.encoder_lr"], "values": [0.1, 0.4]}], "seeds": [100]}
    results = made_up(FASTER)
    tuned = [replace(one, scores={(0.1,): 1.0, (0.4,): 0.5}, chosen=(0.4,), edges=("train.encoder_lr = 0.4",)) for one in results.tuned]
    results = replace(results, tuned=tuned, study=results.study.model_copy(update={"tuning": Tuning.model_validate(study)}))
    notes = [text for text in caveats(results) if "edge" in text]
    assert notes == ["At the edge of the tuning grid, train.encoder_lr = 0.4: equal and fast; a better value may lie beyond."]


def test_few_seeds_claim_nothing():
    results = made_up({name: cells[:3] for name, cells in FASTER.items()})
    assert "too few seeds for an interval: 3 of 5" in task_title(results, "", "smile")
    assert answers(results) == ["fast cannot be compared with equal: too few runs."]


def test_a_target_that_is_not_reached_counts_with_all_rounds():
    results = made_up({"equal": [measured(None)] * 2 + [measured(40)] * 3, "fast": [measured(None)] + [measured(20)] * 4})
    one = results.find("", "fast", "smile", "rounds", "loss ratio 0.6")
    assert (one.reached, one.difference.mean, one.censored) == (4, (0 - 30 - 20 - 20 - 20) / 5, 2)
    assert speed_text(one) == "≥ 26 (4 of 5)"
    assert speed_text(results.find("", "equal", "smile", "rounds", "loss ratio 0.6")) == "≥ 44 (3 of 5)"


def test_a_target_that_none_reached_has_no_difference():
    results = made_up({"equal": [measured(None)] * 5, "never": [measured(None)] * 5})
    one = results.find("", "never", "smile", "rounds", "loss ratio 0.6")
    assert (one.difference, one.reached, speed_text(one)) == (None, 0, "not in 50")
    assert headline_target(results, "", "smile") is None
    assert task_title(results, "", "smile") == "smile: no method brings the training loss down to a target."


def test_a_diverged_run_is_no_run_left_out():
    results = made_up({"equal": FASTER["equal"], "shaky": [*FASTER["fast"][:4], LOST]})
    rounds = results.find("", "shaky", "smile", "rounds", "loss ratio 0.6")
    assert (rounds.values[4], rounds.reached, rounds.difference.pairs) == (50, 4, 5)
    assert results.find("", "shaky", "smile", "seconds", "loss ratio 0.6").difference.pairs == 4
    assert "1 run of 10 diverged." in caveats(results)


def test_delta_m_is_paired_with_single_task_training():
    cells = {"equal": [measured(30, last=0.72)] * 5, "local": [measured(30, last=0.8)] * 5}
    results = made_up(cells, single="local")
    assert list(results.find("", "equal", OVERALL, "delta-m, last metric").values.values()) == pytest.approx([-10] * 5)
    assert set(results.find("", "local", OVERALL, "delta-m, last metric").values.values()) == {0}
    assert results.find("", "local", OVERALL, "delta-m, last metric").difference.mean == pytest.approx(10)
    assert made_up(cells).find("", "equal", OVERALL, "delta-m, last metric").values == {}


def test_the_measures_of_a_run_are_those_of_its_files(tmp_path):
    train(digits.make(0), num_rounds=12, head_steps=3, encoder_steps=3, eval_every=3, run_dir=tmp_path / "run")
    found, run = measure(tmp_path / "run", Targets(loss_ratios=(0.9, 0.01), metrics={"parity": 0.6, "mass": 9.0})), Run(tmp_path / "run")
    rows, rates = run.rows(), {}
    for row in rows:
        rates.setdefault(row["task"], []).append(row["inverse_training_rate"])
    for task, figures in found.tasks.items():
        below = [number for number, rate in enumerate(rates[task], start=1) if rate <= 0.9]
        reached = figures.targets["loss ratio 0.9"]
        assert (reached.reached, reached.rounds) == (bool(below), below[0] if below else 12)
        assert figures.final_ratio == rates[task][-1], "a tenth of 12 rounds is one"
        assert not figures.targets["loss ratio 0.01"].reached
    accuracy = [row["metric"] for row in rows if row["task"] == "parity"]
    first = next((number for number, value in enumerate(accuracy, start=1) if value is not None and value >= 0.6), None)
    assert found.tasks["parity"].targets["accuracy 0.6"].reached == (first is not None)
    assert found.tasks["mass"].targets["mean absolute error 9"].rounds == 1
    by_round = list(zip(*rates.values(), strict=True))
    assert found.spread_end == pytest.approx(std_over_mean(by_round[-1]))
    assert found.spread_mean == pytest.approx(sum(map(std_over_mean, by_round)) / 12)
    assert found.bytes == sum(row["bytes_up"] + row["bytes_down"] for row in rows)
    assert tuning_score(found) == pytest.approx(sum(by_round[-1]) / 4)
    slowest = [max(row["seconds"] for row in rows if row["round"] == number) for number in range(1, 13)]
    total = found.tasks["class"].targets["loss ratio 0.01"].seconds
    assert sum(slowest) < total < sum(row["seconds"] for row in rows) + run.summary()["costs"]["aggregation"] + 1e-9 + sum(slowest)


def std_over_mean(values):
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean


def data_in(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_the_page_holds_the_findings_and_loads_nothing(tmp_path):
    results = made_up({**FASTER, "shaky": [*FASTER["fast"][:4], LOST]}, variant="half the data")
    page = write_page(results, tmp_path / "index.html").read_text()
    for text in (*answers(results), *caveats(results), task_title(results, "half the data", "smile"), "Who is faster?", LOST.reason):
        assert text in page.replace("&#x27;", "'"), text
    assert not [tag for tag in re.findall(r"<(?:script|link|img|style)\b[^>]*>", page) if re.search(r"\b(?:src|href)\s*=", tag)]
    assert "default-src 'none'" in page


def test_a_method_has_one_colour_everywhere_and_the_order_of_the_study(tmp_path):
    names = ["equal", *(f"method {number}" for number in range(9))]
    page = write_page(made_up(dict.fromkeys(names, FASTER["equal"])), tmp_path / "index.html").read_text()
    data = data_in(page)
    assert [look["name"] for look in data["looks"]] == names
    assert len({(look["colour"], look["dash"]) for look in data["looks"]}) == len(names)
    for look in data["looks"]:
        assert set(re.findall(rf'style="color:(#\w+)"[^>]*><i[^>]*></i><span>{look["name"]}</span>', page)) == {look["colour"]}
    for chart in data["charts"]:
        drawn = [line["method"] for line in chart.get("lines", chart.get("points"))]
        assert drawn == sorted(drawn), "charts name methods by their number, and have no colours of their own"
        assert "#" not in json.dumps(chart)


def test_hostile_names_stay_text(tmp_path):
    name = "</script><script>alert(1)</script>"
    page = write_page(made_up({"equal": FASTER["equal"], name: FASTER["fast"]}), tmp_path / "index.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == 3


def test_tables_hold_every_estimate(tmp_path):
    results = made_up({**FASTER, "shaky": [*FASTER["fast"][:4], LOST]})
    write_tables(results, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == len(results.estimates)
    (row,) = [row for row in rows if (row["method"], row["measure"], row["target"]) == ("fast", "rounds", "loss ratio 0.6")]
    assert (float(row["difference"]), row["pairs"], row["reached"], row["below"]) == (pytest.approx(-11.2), "5", "5", "5")
    value = json.loads((tmp_path / "results.json").read_text())
    assert value["findings"] == answers(results)
    assert [cell["state"] for cell in value["cells"]].count("diverged") == 1
    text = (tmp_path / "results.md").read_text()
    assert task_title(results, "", "smile") in text
    assert "| shaky | 4 | diverged | round 3: 0 sound reports |" in text
