"""The speed of a round: against a bare loop, against other frameworks, and against what the machine can do.

Run it with ``python -m benchmarks.speed --peers``. Every variant is a process of its own, and they take turns of a second or a round, so
that all meet the same noise. Written to ``runs/speed``: the table (Markdown), all figures (JSON), and a plot (HTML). W3 needs
FEDGRADNORM_MTFL, the path of MTFL.zip.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from plotly import graph_objects
from plotly.subplots import make_subplots
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
CASES = ("W1 10", "W1 100", "W2 10", "W3", "W4", "W5 1000")
GROWTH = (10, 100, 1000, 10_000)
console = Console(width=140)


class Turn:
    """A variant that waits in its own process for its turn.

    Args:
        words: the arguments of ``benchmarks.turns``.
        source: the folder whose code runs.
    """

    def __init__(self, *words: str, source: Path = ROOT) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(source / "src"), str(ROOT)]),
        }
        command = [sys.executable, "-m", "benchmarks.turns", *words]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def take(self) -> dict[str, Any]:
        """One turn, or one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def turn(*words: str, source: Path = ROOT) -> Iterator[Turn]:
    """A variant, for as long as the block."""
    one = Turn(*words, source=source)
    try:
        yield one
    finally:
        one.end()


@dataclass
class Measured:
    """A variant on a case.

    Attributes:
        seconds: of a round, turn by turn after the warm-up.
        ratios: of the bare loop's seconds to these, turn by turn; empty where they took no turns with it.
        peak_rss_mb: the largest memory of its process, or processes.
    """

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_rss_mb: float = 0.0


def words_of(case: str) -> list[str]:
    """The arguments that name a case."""
    name, _, clients = case.partition(" ")
    return [name, *(["--clients", clients] if clients else [])]


def measure(
    case: str, variants: Sequence[str], rounds: int, warm_up: int = 2
) -> tuple[dict[str, Measured], float]:
    """Let the variants take turns on a case. Gives also the highest rate of floating-point operations that was seen meanwhile."""
    results = {variant: Measured() for variant in variants}
    with ExitStack() as stack:
        turns = {
            variant: stack.enter_context(turn(variant, *words_of(case))) for variant in variants
        }
        peak, best = stack.enter_context(turn("peak", "W1")), 0.0
        for number in range(warm_up + rounds):
            answers = {variant: one.take() for variant, one in turns.items()}
            best = max(best, peak.take()["flops"])
            if number >= warm_up:
                for variant, answer in answers.items():
                    results[variant].seconds.append(answer["seconds"])
                    results[variant].ratios.append(answers["bare"]["seconds"] / answer["seconds"])
                    results[variant].peak_rss_mb = answer["peak_rss_mb"]
    return results, best


def about(case: str) -> dict[str, Any]:
    """What a round of a case costs, whoever trains it."""
    command = [sys.executable, "-m", "benchmarks.turns", "about", *words_of(case)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    answer: dict[str, Any] = json.loads(
        subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout
    )
    return answer


def environment_of(peer: str) -> Path:
    """The Python of a peer's own environment, made on first use."""
    folder = PEERS / peer / ".venv"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "-q",
                "-r",
                str(PEERS / peer / "requirements.txt"),
            ],
            check=True,
        )
        (folder / "installed").touch()
    return python


def measure_peer(case: str, peer: str, rounds: int, words: Sequence[str] = ()) -> Measured:
    """A peer on a case, in its own environment."""
    command = [
        str(environment_of(peer)),
        str(PEERS / peer / "round.py"),
        "--workload",
        *words_of(case),
        "--rounds",
        str(rounds + 1),
        *words,
    ]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    answer = json.loads(
        [line for line in ended.stdout.splitlines() if line.startswith('{"peer"')][-1]
    )
    return Measured(answer["seconds"], [], answer["peak_rss_mb"])


def measured_growth(rounds: int) -> list[dict[str, float]]:
    """Seconds and memory of the vectorised engine as W5 grows, with 512 MiB to work with."""
    found = []
    with ExitStack() as stack:
        limit = ("--memory-limit", str(512 * 2**20))
        turns = {
            count: stack.enter_context(turn("vectorized", "W5", "--clients", str(count), *limit))
            for count in GROWTH
        }
        answers: dict[int, list[dict[str, float]]] = {count: [] for count in GROWTH}
        for _ in range(rounds + 2):
            for count, one in turns.items():
                answers[count].append(one.take())
    for count, taken in answers.items():
        seconds = median(answer["seconds"] for answer in taken[2:])
        found.append(
            {
                "clients": count,
                "seconds": seconds,
                "microseconds_a_client": 1e6 * seconds / count,
                "grown_mb": taken[-1]["grown_mb"],
            }
        )
    return found


def spread(values: Sequence[float]) -> str:
    """The median, and the middle half."""
    if len(values) < 3:
        return f"{median(values):.2f}"
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.2f} ({low:.2f}-{high:.2f})"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The cases as a Markdown table."""
    lines = [
        "| case | variant | seconds a round | bare loop / this | share of the machine's peak | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, result in results.items():
        for variant, one in result["variants"].items():
            seconds = median(one.seconds)
            ratios = one.ratios or [
                median(result["variants"]["bare"].seconds) / second for second in one.seconds
            ]
            share = result["about"]["flops"] / seconds / result["peak_flops"]
            lines.append(
                f"| {case} | {variant} | {spread(one.seconds)} | {spread(ratios)} | {share:.0%} | {one.peak_rss_mb:.0f} MB |"
            )
    return "\n".join(lines)


def tables(
    results: dict[str, dict[str, Any]], growth: Sequence[dict[str, float]], absent: Sequence[str]
) -> str:
    """All that was measured, as Markdown."""
    parts = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        table(results),
    ]
    own = [
        "| case | round | norms | weights | records | share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, result in results.items():
        costs, seconds = result["about"]["own"], median(result["variants"]["vectorized"].seconds)
        share = sum(costs.values()) / 1000 / seconds
        own.append(
            f"| {case} | {1000 * seconds:.0f} ms | "
            + " | ".join(f"{value:.2f} ms" for value in costs.values())
            + f" | {share:.2%} |"
        )
    parts.append("\n".join(own))
    if growth:
        rows = [
            "| clients | seconds a round | microseconds a client | memory beyond the start |",
            "| --- | --- | --- | --- |",
        ]
        rows += [
            f"| {one['clients']:,} | {one['seconds']:.3f} | {one['microseconds_a_client']:.0f} | {one['grown_mb']:.0f} MB |"
            for one in growth
        ]
        parts.append("\n".join(rows))
    parts += [f"{name}: skipped" for name in absent]
    return "\n\n".join(parts) + "\n"


def plot(
    results: dict[str, dict[str, Any]], growth: Sequence[dict[str, float]], path: Path
) -> None:
    """The ratios as bars, and the growth as a line."""
    figure = make_subplots(
        1,
        2,
        subplot_titles=(
            "How many rounds of each fit into one of the bare loop",
            "W5: time for each client as their number grows",
        ),
    )
    variants = list(
        dict.fromkeys(variant for result in results.values() for variant in result["variants"])
    )
    for variant in variants:
        cases = [case for case, result in results.items() if variant in result["variants"]]
        bare = {case: median(results[case]["variants"]["bare"].seconds) for case in cases}
        values = [bare[case] / median(results[case]["variants"][variant].seconds) for case in cases]
        figure.add_trace(graph_objects.Bar(name=variant, x=cases, y=values), 1, 1)
    if growth:
        x, y = [one["clients"] for one in growth], [one["microseconds_a_client"] for one in growth]
        figure.add_trace(graph_objects.Scatter(name="vectorized, W5", x=x, y=y), 1, 2)
    figure.update_yaxes(title="ratio to the bare loop", type="log", row=1, col=1)
    figure.update_xaxes(title="clients", type="log", row=1, col=2)
    figure.update_yaxes(title="microseconds a client and round", rangemode="tozero", row=1, col=2)
    figure.write_html(path)


def main(
    cases: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(CASES),
    rounds: Annotated[int, typer.Option(min=3, help="Turns after two that warm up.")] = 7,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Other frameworks too; each gets its own environment, about 1 GB."
        ),
    ] = False,
    growth: Annotated[bool, typer.Option(help="Measure W5 with 10 to 10,000 clients.")] = True,
    output: Annotated[Path, typer.Option(help="Where to write.")] = ROOT / "runs" / "speed",
) -> None:
    """Measure, print, and write."""
    results: dict[str, dict[str, Any]] = {}
    absent = []
    for case in cases.split(","):
        if case == "W3" and not Path(os.environ.get("FEDGRADNORM_MTFL", "MTFL.zip")).is_file():
            absent.append("W3 (set FEDGRADNORM_MTFL to the path of MTFL.zip)")
            continue
        console.print(case)
        variants, peak = measure(case, ("bare", "reference", "vectorized"), rounds)
        for peer in ("flower", "pfl") if peers and case not in ("W3", "W4") else ():
            modes = (
                {peer: ()}
                if peer == "flower"
                else {"pfl": (), "pfl, 2 processes": ("--processes", "2")}
            )
            for name, words in modes.items():
                try:
                    variants[name] = measure_peer(
                        case, peer, rounds if "W5" not in case else 3, words
                    )
                except subprocess.CalledProcessError as error:
                    absent.append(
                        f"{name} on {case} ({error.stderr.strip().splitlines()[-1] if error.stderr else error})"
                    )
        results[case] = {"variants": variants, "peak_flops": peak, "about": about(case)}
        console.print(Markdown(table({case: results[case]})))
    grown = measured_growth(rounds) if growth else []
    text = tables(results, grown, absent)
    console.print(Markdown(text))
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.md").write_text(text)
    found = {
        case: {
            **result,
            "variants": {name: asdict(one) for name, one in result["variants"].items()},
        }
        for case, result in results.items()
    }
    (output / "speed.json").write_text(
        json.dumps({"cases": found, "growth": grown, "skipped": absent}, indent=2) + "\n"
    )
    plot(results, grown, output / "speed.html")
    console.print(f"written: {output}/speed.md, speed.json, speed.html")


if __name__ == "__main__":
    typer.run(main)
