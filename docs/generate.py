"""Write docs/configuration.md from the code: `python docs/generate.py`. A test compares them."""

import inspect
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedgradnorm.compare.spec import Axis, Study, Targets, Tuning
from fedgradnorm.config import (
    AggregationConfig,
    Component,
    EngineConfig,
    FaultsConfig,
    FederationConfig,
    MethodConfig,
    ModelConfig,
    RunSettings,
    TrainConfig,
    WeightingConfig,
)
from fedgradnorm.registry import BUILT_INS, describe, resolve

STUDY = """## A study

`fedgradnorm compare STUDY.toml` first tunes the step sizes of every method on the same grid, with
other seeds. Then it trains every method with every seed of the study.

```toml
title = "Three radio tasks"
config = "../configs/demo.toml"       # relative to the study's file
seeds = [0, 1, 2, 3, 4, 5, 6, 7]      # fewer than six give no interval
base.train.num_rounds = 100           # overrides that file, in every run

[tuning]
seeds = [100]
num_rounds = 60
axes = [{ keys = ["train.encoder_lr", "train.head_lr"], values = [0.05, 0.1, 0.2] }]

[[methods]]
name = "equal"
weighting.name = "equal"

[[methods]]
name = "FedGradNorm, γ = 0.5"         # a method is any settings of a run
weighting.name = "fedgradnorm"
weighting.gamma = 0.5

[[variants]]                          # optional: all methods again, under other settings
name = "signal has a tenth of the data"
federation.sizes.signal = 0.1

[full]                                # changes by --full: keys of the study or settings of its base
train.num_rounds = 300
```

Several studies can share their methods. `methods_file = "methods.toml"` names a file of
`[[methods]]`, and `methods` may then contain their names, such as `methods = ["equal",
"nash_mtl"]`. Without `methods`, the study has all methods of the file.

Command-line arguments take precedence: `seeds=[0,1]` for the study, `train.num_rounds=5` for its
base. A cell is a run's folder in the study's folder, named by its settings. The same command
trains only the cells that are missing; a changed setting makes another cell. `--jobs` cells are
trained at a time, each in one thread, and at most as many as there are cores. A study that is
stopped (Ctrl-C) writes the tables and the page of its results so far.
"""

PAGE = Path(__file__).parent / "configuration.md"

INTRODUCTION = """# Configuration

`python docs/generate.py` writes this page.

A run has a TOML file and command-line arguments. The arguments take precedence over the file, and
the file over the defaults here:

```
fedgradnorm run configs/digits.toml train.num_rounds=5 weighting.gamma=0.5 run.dir=runs/first
```

An argument's value is read as TOML, or as plain text if it is not TOML. An argument that names
another part, such as `weighting.name=equal`, drops the options of the file's part. An unknown key
or a value out of range is an error before anything is read or written. `federation`, `model`,
`weighting`, `aggregation`, `engine` and `train.method` take the name of a built-in part, or the
`module:attribute` of your own part, which is installed or in the current folder. The other keys of
the table are its options.
"""


def text_of(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, Component):
        value = value.name
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, BaseModel) for item in items):
        return "see below"
    if value is None:
        return "none"
    return f"`{value!r}`".replace("'", '"').replace("True", "true").replace("False", "false")


def table(rows: list[tuple[str, Any, str]]) -> str:
    lines = [
        f"| `{key}` | {text_of(default)} | {' '.join(text.split())} |"
        for key, default, text in rows
    ]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *lines])


def fields_of(model: type[BaseModel]) -> list[tuple[str, Any, str]]:
    return [
        (name, field.get_default(call_default_factory=True), field.description or "")
        for name, field in model.model_fields.items()
    ]


def argument_docs(made_by: Any) -> dict[str, str]:
    """By argument, its text in the section "Args" of a docstring."""
    _, _, section = (inspect.getdoc(made_by) or "").partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    return dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section, flags=re.M))


def part(kind: str, name: str, table_of_kind: str = "") -> str:
    summary, options = describe(kind, name)
    documented = argument_docs(resolve(kind, name))
    rows = [(key, default, documented[key].replace("``", "`")) for key, default in options.items()]
    heading = f'### `{table_of_kind or kind}.name = "{name}"`'
    return f"{heading}\n\n{summary}\n\n{table(rows) if rows else 'No options.'}"


def page() -> str:
    sections = [INTRODUCTION]
    parts: tuple[type[BaseModel], ...] = (
        FederationConfig,
        ModelConfig,
        WeightingConfig,
        AggregationConfig,
        EngineConfig,
    )
    for kind, model in zip(
        ("federation", "model", "weighting", "aggregation", "engine"), parts, strict=True
    ):
        sections.append(f"## `[{kind}]`\n\n{table(fields_of(model))}\n")
        sections += [part(kind, name) + "\n" for name in sorted(BUILT_INS[kind])]
    for kind, settings in (("train", TrainConfig), ("faults", FaultsConfig), ("run", RunSettings)):
        sections.append(f"## `[{kind}]`\n\n{table(fields_of(settings))}\n")
        if kind == "train":
            sections.append(f"## `[train.method]`\n\n{table(fields_of(MethodConfig))}\n")
            sections += [
                part("method", name, "train.method") + "\n" for name in sorted(BUILT_INS["method"])
            ]
    sections.append(STUDY)
    tables: dict[str, type[BaseModel]] = {
        "": Study,
        "[tuning]": Tuning,
        "[[tuning.axes]]": Axis,
        "[targets]": Targets,
    }
    for title, model in tables.items():
        sections.append((f"### `{title}`\n\n" if title else "") + table(fields_of(model)) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
