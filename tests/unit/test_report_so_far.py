"""Reports on runs that have not ended: they are going on, were stopped or were killed."""

import json
import shutil
from functools import partial
from io import StringIO
from multiprocessing import get_context

import pytest
from rich.console import Console

from fedgradnorm import RunError, StoppedError, resume, train
from fedgradnorm.report import comparison_rows, comparison_table, write_report
from fedgradnorm.runs.lock import alone_in, being_written
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation

QUICK = {"head_steps": 2, "encoder_steps": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(small_federation(), run_dir=folder, num_rounds=5, **QUICK)
    return folder


@pytest.fixture
def cut(finished, tmp_path):
    """The run of five rounds as it was after so many of them, and with this behind its last whole line."""

    def cut(rounds, torn=b"", checkpoints=True):
        folder = shutil.copytree(finished, tmp_path / "run")
        (folder / "summary.json").unlink()
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_bytes(b"".join(lines[: 3 * rounds]) + torn)
        if not checkpoints:
            shutil.rmtree(folder / "checkpoints")
        return Run(folder)

    return cut


def page_of(run):
    return (
        write_report([run], run.folder / "page.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    )


def test_a_run_without_a_summary_is_reported_as_far_as_it_got(cut, finished):
    run = cut(3)
    page = page_of(run)
    assert (
        '<p class="findings">stopped after round 3 of 5. After 3 rounds the training loss' in page
    )
    assert "<td>3 of 5</td>" in page
    (row,) = comparison_rows([run])
    (whole,) = comparison_rows([Run(finished)])
    rows = [one for one in Run(finished).rows() if one["round"] == 3]
    assert (row.task, row.clients, row.metric, row.higher_is_better) == (
        whole.task,
        whole.clients,
        "accuracy",
        True,
    )
    assert row.first == whole.first
    assert row.loss_ratio == pytest.approx(sum(one["inverse_training_rate"] for one in rows) / 3)


def test_a_finished_run_says_nothing_of_the_kind(finished, tmp_path):
    page = write_report([Run(finished)], tmp_path / "page.html").read_text()
    assert '<p class="findings">After 5 rounds' in page
    assert "<td>5</td>" in page


@pytest.mark.parametrize("checkpoints", [True, False])
def test_where_no_checkpoint_says_what_is_measured_the_losses_are_there(cut, checkpoints):
    run = cut(2, checkpoints=checkpoints)
    (run.folder / "members.json").unlink()
    (row,) = comparison_rows([run])
    assert row.metric == ("accuracy" if checkpoints else None)
    assert row.loss_ratio is not None
    assert "stopped after round 2 of 5" in page_of(run)


def half(finished, number):
    line = (finished / "metrics.jsonl").read_bytes().splitlines()[number]
    return line[: len(line) // 2]


def test_a_round_of_which_not_all_is_written_does_not_count(cut, finished):
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for torn in (
        half(finished, 9),
        lines[9],
        lines[9] + half(finished, 10),
        lines[9] + lines[10] + b"\xff\x00",
    ):
        run = cut(3, torn)
        assert [row["round"] for row in run.whole_rounds()] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert "stopped after round 3 of 5" in page_of(run)
        shutil.rmtree(run.folder)
    run = cut(0, lines[0] + half(finished, 1))
    assert run.whole_rounds() == []


def test_the_last_round_is_found_from_the_end_of_a_long_file(cut, finished):
    lines = [
        json.loads(line) for line in (finished / "metrics.jsonl").read_bytes().splitlines()[:3]
    ]
    run = cut(0)
    rows = [{**line, "round": number} for number in range(1, 500) for line in lines]
    path = run.folder / "metrics.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert len(text) > 10 * 2**16
    path.write_text(text)
    assert run.last_round() == rows[-3:] == run.whole_rounds()[-3:]
    path.write_text(text[:-50])
    assert run.last_round() == rows[-6:-3] == run.whole_rounds()[-3:]
    path.write_text("")
    assert run.last_round() == []
    path.write_text(text[:-50].replace('"client": "b"', '"client": 7'))
    with pytest.raises(
        RunError, match=r"metrics\.jsonl line 2: client: Input should be a valid string, found 7$"
    ):
        run.last_round()


@pytest.mark.parametrize("content", [None, b"", b'{"round": 1, "cli'])
def test_without_a_round_there_is_an_error_that_says_so(cut, content, tmp_path):
    run = cut(0)
    if content is None:
        (run.folder / "metrics.jsonl").unlink()
    else:
        (run.folder / "metrics.jsonl").write_bytes(content)
    for report in (comparison_table, partial(write_report, output=tmp_path / "page.html")):
        with pytest.raises(
            RunError, match=r"run: no round of 5 is done yet: there is nothing to report on$"
        ):
            report([run])
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_goes_on_has_its_own_state_and_not_that_of_its_old_summary(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")

    def stop():
        return Run(folder).rows()[-1]["round"] == 7

    with pytest.raises(StoppedError, match="stopped after round 7 of 9"):
        resume(folder, small_federation(), num_rounds=9, should_stop=stop)
    assert Run(folder).summary()["rounds"] == 5
    page = page_of(Run(folder))
    assert "stopped after round 7 of 9. After 7 rounds" in page


def test_a_run_is_running_as_long_as_its_process_has_the_folder(cut):
    run = cut(3)
    assert being_written(run.folder) is None
    with alone_in(run.folder):
        assert being_written(run.folder) is True
        assert "running: round 3 of 5. After 3 rounds" in page_of(run)
        with get_context("spawn").Pool(1) as another:
            assert another.apply(being_written, (run.folder,)) is True
    assert being_written(run.folder) is False
    assert "stopped after round 3 of 5" in page_of(run)


def test_several_runs_say_which_one_has_not_ended(cut, finished):
    runs = [Run(finished), cut(3)]
    page = write_report(runs, runs[1].folder / "page.html").read_text()
    assert '<p class="findings">run: stopped after round 3 of 5. ' in page
    console = Console(width=200, file=StringIO())
    console.print(comparison_table(runs))
    assert "accuracy" in console.file.getvalue()


@pytest.mark.parametrize(
    ("file", "content"), [("summary.json", "{}"), ("members.json", "{}"), ("metrics.jsonl", "{}\n")]
)
def test_a_damaged_file_is_an_error_that_names_it(cut, file, content):
    run = cut(3)
    (run.folder / file).write_text(content)
    with pytest.raises(RunError, match=file.replace(".", r"\.")):
        comparison_rows([run])
