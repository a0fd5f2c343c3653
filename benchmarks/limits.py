"""What holds a round back: the engine beside the bare loop and beside the round's matrix products alone, and a profile of it.

Run it with ``python -m benchmarks.limits``. "Products" are the very matrix products and convolutions of the engine's round, of the same
shapes, one kernel thread on each core, with nothing around them: no round that computes them so can take less. Variants take turns.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.speed import ROOT, measure, spread, turn, words_of

console = Console(width=140)


def main(
    cases: Annotated[
        str, typer.Option(help="Which, separated by commas.")
    ] = "W1 10,W1 100,W2 10,W5 1000",
    rounds: Annotated[int, typer.Option(min=3, help="Turns after two that warm up.")] = 7,
    output: Annotated[Path, typer.Option(help="Where to write.")] = ROOT / "runs" / "speed",
) -> None:
    """Measure, print, and write limits.md and limits.json."""
    lines = [
        "| case | bare loop / engine | bare loop / products | engine on one thread: products | other operations | Python and waiting |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = {}
    for case in cases.split(","):
        results, _ = measure(case, ("bare", "vectorized", "products"), rounds)
        with turn("profile", *words_of(case)) as one:
            shares = [one.take() for _ in range(3)]
        parts = {
            name: median(share[name] / share["seconds"] for share in shares)
            for name in ("products", "others", "around")
        }
        found[case] = {
            "ratios": {name: result.ratios for name, result in results.items()},
            "parts": parts,
        }
        ratios = f"{spread(results['vectorized'].ratios)} | {spread(results['products'].ratios)}"
        lines.append(
            f"| {case} | {ratios} | {parts['products']:.0%} | {parts['others']:.0%} | {parts['around']:.0%} |"
        )
    text = "\n".join(lines) + "\n"
    console.print(Markdown(text))
    output.mkdir(parents=True, exist_ok=True)
    (output / "limits.md").write_text(text)
    (output / "limits.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
