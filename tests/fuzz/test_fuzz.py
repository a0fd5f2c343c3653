"""Everything that comes from outside, damaged: only a FedGradNormError may come out, in time, and no other file may change.

The inputs are shared out over the targets below; a normal run tries some 1,000. A long run, with 100,000:

    FEDGRADNORM_FUZZ_EXAMPLES=100000 pytest tests/fuzz/test_fuzz.py -q -n 2
"""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import stat
import string
import struct
import sys
import tomllib
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load, save

from fedgradnorm.aggregation.mean import Mean
from fedgradnorm.api import train
from fedgradnorm.build import resolve_config
from fedgradnorm.config import RunConfig, TrainConfig, load_config
from fedgradnorm.errors import FedGradNormError
from fedgradnorm.federations import mtfl
from fedgradnorm.federations.mtfl_annotations import read_faces
from fedgradnorm.federations.radcom_hdf5 import read_hdf5
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.report import comparison_table, write_report
from fedgradnorm.runs.checkpoint import load_checkpoint, load_newest
from fedgradnorm.runs.models import load_model
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.writer import RunWriter
from fedgradnorm.server import ServerState, advance, screen
from fedgradnorm.weighting.fedgradnorm import FedGradNorm
from tests.helpers import examples, small_federation

TOTAL = int(os.environ.get("FEDGRADNORM_FUZZ_EXAMPLES", examples(800)))
SHARES = {
    "config files": 14,
    "overrides": 12,
    "runs' figures": 12,
    "metrics.jsonl to go on with": 6,
    "checkpoints": 12,
    "models": 8,
    "annotations": 9,
    "zips": 5,
    "images": 4,
    "HDF5 keys": 9,
    "HDF5 bytes": 5,
    "reports": 14,
}
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
SECONDS, PATIENCE = 20, 600
"""The CPU time that no input takes, and the time after which one is taken for stuck."""

TARGETS: dict[str, str] = {}
"""The target of each test."""
TRIED: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()
FAILED: Counter[str] = Counter()


def inputs_for(target: str) -> int:
    return max(1, math.ceil(TOTAL * SHARES[target] / sum(SHARES.values())))


def fuzzing(target: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test as that of a target, and says how many inputs it tries."""
    limits = settings(
        max_examples=inputs_for(target), deadline=None, suppress_health_check=list(HealthCheck)
    )

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        TARGETS[test.__name__] = target
        return limits(test)

    return mark


@pytest.fixture(autouse=True)
def enough_inputs(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[None]:
    """After a test: how many inputs it tried, and that they were as many as they should be."""
    target = TARGETS.get(request.node.originalname)
    for counter in (TRIED, REFUSED, FAILED):
        counter.clear()
    yield
    if target is not None:
        tried = f"{TRIED[target]}, {REFUSED[target]} of them refused, {FAILED.total()} failures"
        record_property(f"fuzzed {target}", tried)
        # A known failure is all that Hypothesis tries again.
        assert FAILED or TRIED[target] >= inputs_for(target)


class TooLongError(BaseException):
    """No OSError, as TimeoutError is: nothing on the way may catch it."""


class Watch:
    """Notes what is opened to be written, made, moved or removed outside a folder, and what is started."""

    FILES: Mapping[str, tuple[int, ...]] = {
        "open": (0,),
        "os.mkdir": (0,),
        "os.remove": (0,),
        "os.rmdir": (0,),
        "os.rename": (0, 1),
        "os.link": (1,),
        "os.symlink": (1,),
        "os.truncate": (0,),
        "os.chmod": (0,),
        "os.utime": (0,),
    }
    STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in self.STARTED:
            self.seen.append(f"{event} {args}")
        if event not in self.FILES or (event == "open" and not args[2] & self.WRITING):
            return
        for path in (args[index] for index in self.FILES[event]):
            in_an_open_folder = event != "open" and args[-1] not in (
                -1,
                None,
            )  # shutil.rmtree's names: the folder itself was seen
            if isinstance(path, str | bytes | os.PathLike) and not in_an_open_folder:
                real = os.path.realpath(os.fsdecode(path))
                if (
                    not Path(real).is_relative_to(self.folder)
                    and "__pycache__" not in real
                    and real != os.devnull
                ):
                    self.seen.append(f"{event} {args}")


WATCH = Watch()
sys.addaudithook(WATCH)


class Sandbox:
    """A folder that an input may use, and beside it one that nothing may touch."""

    def __init__(self, path: Path) -> None:
        self.path, self.given, self.canary = (
            path.resolve(),
            path.resolve() / "given",
            path.resolve() / "canary",
        )
        self.canary.write_bytes(b"sing")

    def fresh(self, files: Mapping[str, bytes]) -> Path:
        if self.given.exists():
            shutil.rmtree(self.given)
        self.given.mkdir()
        for name, content in files.items():
            (self.given / name).parent.mkdir(parents=True, exist_ok=True)
            (self.given / name).write_bytes(content)
        return self.given

    @contextmanager
    def attempt(self, target: str) -> Iterator[None]:
        """Try one input: a FedGradNormError is an answer, anything else a failure."""
        TRIED[target] += 1
        WATCH.seen.clear()
        before = {number: signal.signal(number, _too_long) for number in TIMERS}
        for timer, seconds in TIMERS.values():
            signal.setitimer(timer, seconds)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FEDGRADNORM_CACHE", str(self.given / "cache"))
                WATCH.folder = str(self.given)
                yield
        except FedGradNormError as error:
            REFUSED[target] += 1
            repr(error)
        except BaseException as error:
            FAILED[f"{target}: {type(error).__name__}"] += 1
            error.add_note(f"the smallest such input is left in {self.given}")
            raise
        finally:
            WATCH.folder = None
            for number, (timer, _) in TIMERS.items():
                signal.setitimer(timer, 0)
                signal.signal(number, before[number])
        touched = WATCH.seen or [
            path.name for path in self.path.iterdir() if path.name not in ("given", "canary")
        ]
        if touched or self.canary.read_bytes() != b"sing":
            FAILED[f"{target}: something outside was touched"] += 1
            raise AssertionError(f"touched: {touched}")


TIMERS = {
    signal.SIGPROF: (signal.ITIMER_PROF, SECONDS),
    signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE),
}


def _too_long(number: int, _: object) -> None:
    raise TooLongError(f"longer than {TIMERS[signal.Signals(number)][1]} s")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


# Bytes

HERE = st.floats(0, 1)
CHANGES = st.one_of(
    st.tuples(st.just("flip"), HERE, st.integers(0, 7)),
    st.tuples(st.just("set"), HERE, st.sampled_from([0, 1, 10, 32, 34, 46, 47, 127, 128, 255])),
    st.tuples(st.just("cut"), HERE, st.integers(1, 100)),
    st.tuples(st.just("end"), HERE, st.just(0)),
    st.tuples(st.just("insert"), HERE, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("repeat"), HERE, st.integers(1, 200)),
    st.tuples(st.just("splice"), HERE, HERE),
    st.tuples(st.just("start"), st.integers(0, 100), st.integers(0, 255)),
)


def _at(content: bytes, place: float) -> int:
    return min(int(place * len(content)), max(len(content) - 1, 0))


def changed(content: bytes, changes: list[tuple[str, Any, Any]]) -> bytes:
    for what, place, more in changes:
        if what == "start":  # headers are where the meaning is
            content = content[:place] + bytes([more]) + content[place + 1 :]
            continue
        at = _at(content, place)
        match what:
            case "flip":
                content = (
                    content[:at]
                    + bytes(byte ^ 1 << more for byte in content[at : at + 1])
                    + content[at + 1 :]
                )
            case "set":
                content = content[:at] + bytes([more]) + content[at + 1 :]
            case "cut":
                content = content[:at] + content[at + more :]
            case "end":
                content = content[:at]
            case "insert":
                content = content[:at] + more + content[at:]
            case "repeat":
                content = content[: at + more] + content[at:]
            case "splice":
                other = _at(content, more)
                content = content[:at] + content[other : other + 64] + content[at + 64 :]
    return content


DAMAGE = st.lists(CHANGES, min_size=1, max_size=6)

# Values

DEEP, DIGITS, HEX = "@deep@", "@digits@", "@hex@"
ODD = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            -1,
            1,
            2,
            7,
            10**30,
            -(10**30),
            10**400,
            0.0,
            -0.5,
            1e-320,
            1e308,
            -1e308,
            math.inf,
            -math.inf,
            math.nan,
        ),
        *(
            "",
            "x",
            " ",
            "\0",
            "é中\u202e",
            "\ud800",
            "</script>[bold]",
            "1e999",
            "nan",
            "../../x",
            "/etc/passwd",
            "{}",
            "name",
            "a" * 5000,
        ),
        *(
            [],
            [[]],
            [None],
            [1, "a"],
            ["a", "b"],
            {},
            {"": {}},
            {"name": "equal"},
            {"a": [1]},
            DEEP,
            DIGITS,
            HEX,
        ),
    ]
)
VALUES = st.one_of(
    st.sampled_from([DEEP, DIGITS, HEX, 10**400, math.inf, math.nan, None, "\ud800"]),
    ODD,
    ODD,
    st.integers(-10, 300),
    st.floats(),
    st.text(max_size=8),
    st.recursive(
        ODD,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(
            ["value", "value", "value", "top", "top", "remove", "rename", "add", "copy"]
        ),
        HERE,
        VALUES,
        st.text(max_size=6),
    ),
    min_size=1,
    max_size=3,
)
DEPTHS = st.sampled_from(
    [50, 900, 3_000, 20_000]
)  # Hypothesis allows deeper recursion than Python does by itself


def edited(tree: Any, edits: list[tuple[str, float, Any, str]]) -> Any:
    """The same JSON or TOML values, with some of them replaced, removed, renamed, added or copied elsewhere."""
    tree = {"": copy.deepcopy(tree)}
    for what, place, value, key in edits:
        top = what == "top" and isinstance(tree.get(""), dict | list) and tree[""]
        spots = (
            [
                (tree[""], at)
                for at in (tree[""] if isinstance(tree[""], dict) else range(len(tree[""])))
            ]
            if top
            else list(_spots(tree))
        )
        table, at = spots[min(int(place * len(spots)), len(spots) - 1)]
        match what:
            case "value" | "top":
                table[at] = copy.deepcopy(value)
            case "copy":
                table[at] = copy.deepcopy(spots[len(spots) // (1 + len(key)) - 1][0])
            case "remove" if at != "":
                del table[at]
            case "rename" if isinstance(table, dict) and at != "":
                table[key] = table.pop(at)
            case "add" if isinstance(table[at], dict):
                table[at][key] = copy.deepcopy(value)
            case "add" if isinstance(table[at], list):
                table[at].append(copy.deepcopy(value))
    return tree.get("")


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    for at, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, at
        if isinstance(value, dict | list):
            yield from _spots(value)


def _filled_in(text: str, depth: int) -> bytes:
    for mark, filling in (
        (DEEP, "[" * depth + "]" * depth),
        (DIGITS, "9" * 5000),
        (HEX, "0x" + "f" * 5000),
    ):
        text = text.replace(f'"{mark}"', filling)
    return text.encode("utf-8", "surrogatepass")


def as_json(tree: Any, depth: int) -> bytes:
    return _filled_in(json.dumps(tree), depth)


def _toml_values(tree: Any) -> Any:
    """Without what TOML cannot say."""
    if isinstance(tree, Mapping):
        return {key: _toml_values(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list | tuple):
        return [_toml_values(value) for value in tree if value is not None]
    return tree


def as_toml(tree: Any, depth: int) -> bytes:
    values = _toml_values(tree)
    return _filled_in(
        tomli_w.dumps(
            values if isinstance(values, dict) else {"value": "" if values is None else values}
        ),
        depth,
    )


# Settings

CONFIGS = [
    path.read_bytes() for path in sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
]
DEFAULTS = RunConfig().model_dump(mode="json")
PARTS = ("federation", "model", "weighting", "aggregation", "engine")
NAMES = st.sampled_from(
    [
        *(
            "radcom",
            "mtfl",
            "digits",
            "mlp",
            "cnn",
            "fedgradnorm",
            "equal",
            "mean",
            "clipped_mean",
            "median",
            "trimmed_mean",
            "reference",
        ),
        *(
            "",
            ":",
            ":x",
            "x:",
            "os:path",
            "os:",
            "a.b:c",
            ".x:y",
            "..:y",
            "a..b:c",
            "math:pi",
            "math:sin",
            "builtins:dict",
            "builtins:int",
        ),
        *(
            "json:dumps",
            "json:dumps.x",
            "json:\0",
            "\0:x",
            "é:x",
            "\ud800:x",
            "fractions:Fraction",
            "collections:OrderedDict",
            "typing:Any",
        ),
        *(
            "logging:getLogger",
            "functools:partial",
            "dataclasses:dataclass",
            "operator:add",
            "json: dumps",
            "json:dumps:x",
            "json:__doc__",
        ),
        *(
            "fedgradnorm:Federation",
            "fedgradnorm.models:mlp",
            "fedgradnorm.nothing:x",
            "fedgradnorm.weighting.base:Weighting",
            "a" * 5000,
        ),
    ]
)
WITH_NAMES = st.builds(
    lambda tree, names: {
        **tree,
        **{part: {**tree[part], "name": name} for part, name in names.items()},
    },
    st.sampled_from([DEFAULTS, *(DEFAULTS | tomllib.loads(config.decode()) for config in CONFIGS)]),
    st.dictionaries(st.sampled_from(PARTS), NAMES, max_size=2),
)
CONFIG_FILES = st.one_of(
    st.builds(
        lambda tree, edits, depth: as_toml(edited(tree, edits), depth), WITH_NAMES, EDITS, DEPTHS
    ),
    st.builds(lambda tree, depth: as_toml(tree, depth), WITH_NAMES, DEPTHS),
    st.builds(changed, st.sampled_from(CONFIGS), DAMAGE),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
)
KEYS = sorted(f"{table}.{key}" for table, keys in DEFAULTS.items() for key in (*keys, "name"))
DOTTED = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(
        [
            "train",
            "federation",
            "weighting.gamma.x",
            "model.hidden",
            "a.b.c",
            "versions.x",
            "run.metric_targets.x",
            "model.self",
        ]
    ),
    st.builds("{}.{}".format, st.sampled_from(PARTS), st.text(string.printable, max_size=5)),
    st.text(max_size=12),
)
WORDS = st.one_of(
    st.builds(lambda key, value, depth: f"{key}={_word(value, depth)}", DOTTED, VALUES, DEPTHS),
    st.builds(lambda part, name: f"{part}.name={name}", st.sampled_from(PARTS), NAMES),
    st.text(max_size=20),
)


def _word(value: Any, depth: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and value not in (DEEP, DIGITS, HEX):
        return value
    return (
        as_toml({"value": value}, depth)
        .decode("utf-8", "surrogatepass")
        .removeprefix("value = ")
        .rstrip("\n")
    )


@fuzzing("config files")
@given(content=CONFIG_FILES)
def test_config_files(sandbox: Sandbox, content: bytes) -> None:
    path = sandbox.fresh({"run.toml": content}) / "run.toml"
    with sandbox.attempt("config files"):
        resolve_config(load_config(path))


@fuzzing("overrides")
@given(words=st.lists(WORDS, min_size=1, max_size=4), config=st.sampled_from([None, *CONFIGS]))
def test_overrides(sandbox: Sandbox, words: list[str], config: bytes | None) -> None:
    path = sandbox.fresh({"run.toml": config or b""}) / "run.toml"
    with sandbox.attempt("overrides"):
        resolve_config(load_config(None if config is None else path, words))


# A run's folder

FEDERATION = small_federation(("a", "b"))
FIGURES = ("config.toml", "metrics.jsonl", "summary.json")


class Files(dict[str, bytes]):
    """Files by name, which a failing test does not print."""

    def __repr__(self) -> str:
        return f"Files of {', '.join(self)}"


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A finished run's files."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    train(FEDERATION, run_dir=folder, num_rounds=3, head_steps=1, encoder_steps=1)
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Files(
        {
            name: content
            for name, content in files.items()
            if name in FIGURES or name.startswith(("models/", "checkpoints/"))
        }
    )


def _damaged_figures(files: Mapping[str, bytes], name: str, how: tuple[str, Any, int]) -> bytes:
    kind, what, depth = how
    content = files[name]
    if kind == "random":
        return what  # type: ignore[no-any-return]
    if kind == "bytes":
        return changed(content, what)
    if name == "config.toml":
        return as_toml(edited(tomllib.loads(content.decode()), what), depth)
    if name == "summary.json":
        return as_json(edited(json.loads(content), what), depth)
    rows = edited([json.loads(line) for line in content.splitlines()], what)
    return b"".join(
        as_json(row, depth) + b"\n" for row in (rows if isinstance(rows, list) else [rows])
    )


HOW = st.one_of(
    st.tuples(st.just("values"), EDITS, DEPTHS),
    st.tuples(st.just("values"), EDITS, DEPTHS),
    st.tuples(st.just("bytes"), DAMAGE, st.just(0)),
    st.tuples(st.just("random"), st.binary(max_size=40), st.just(0)),
)


@fuzzing("runs' figures")
@given(
    damage=st.dictionaries(st.sampled_from(FIGURES), HOW, min_size=1, max_size=2),
    beside=st.booleans(),
)
def test_a_runs_figures(
    sandbox: Sandbox, run_files: dict[str, bytes], damage: dict[str, Any], beside: bool
) -> None:
    sound = {name: run_files[name] for name in FIGURES}
    bad = sound | {name: _damaged_figures(run_files, name, how) for name, how in damage.items()}
    folders = {"bad": bad, "good": sound}
    folder = sandbox.fresh(
        {
            f"{run}/{name}": content
            for run, files in folders.items()
            for name, content in files.items()
        }
    )
    for action in (_read, _print, _write):
        with sandbox.attempt("runs' figures"):
            action([Run(folder / "bad"), *([Run(folder / "good")] if beside else [])], folder)


def _read(runs: list[Run], _: Path) -> None:
    rows = runs[0].rows()
    assert isinstance(runs[0].summary(), dict)
    assert all(isinstance(row, dict) for row in rows)


def _print(runs: list[Run], _: Path) -> None:
    Console(file=StringIO(), width=100).print(comparison_table(runs))


def _write(runs: list[Run], folder: Path) -> None:
    page = write_report(runs, folder / "new" / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page


@fuzzing("metrics.jsonl to go on with")
@given(how=HOW, round=st.integers(0, 4))
def test_metrics_to_go_on_with(
    sandbox: Sandbox,
    run_files: dict[str, bytes],
    how: tuple[str, Any, int],
    round: int,
) -> None:
    content = _damaged_figures(run_files, "metrics.jsonl", how)
    folder = sandbox.fresh({"config.toml": run_files["config.toml"], "metrics.jsonl": content})
    with sandbox.attempt("metrics.jsonl to go on with"):
        try:
            with RunWriter(folder, RunConfig(), round):
                pass
        except FedGradNormError:
            assert (folder / "metrics.jsonl").read_bytes() == content
            raise
        kept = (folder / "metrics.jsonl").read_bytes()
        assert content.startswith(kept)
        assert not kept or kept.endswith(b"\n")
        assert not any(json.loads(line)["round"] > round for line in kept.splitlines())


# Tensors

SHAPES = st.sampled_from([(), (0,), (1,), (3,), (8,), (4, 8), (8, 6), (2, 4), (2,), (1, 1, 1)])
DTYPES = st.sampled_from(
    [
        *(
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
        ),
        *(torch.complex64, torch.float8_e4m3fn),
    ]
)
FILLINGS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 3e38, math.nan, math.inf, -math.inf])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, filling = draw(DTYPES), draw(FILLINGS)
    if not (dtype.is_floating_point or dtype.is_complex):
        filling = 1.0
    return torch.full(draw(SHAPES), filling, dtype=torch.float32).to(dtype)


@st.composite
def header_edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What changes the JSON header of a safetensors file."""
    edits, depth, claim = (
        draw(EDITS),
        draw(DEPTHS),
        draw(st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1))),
    )

    def change(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = as_json(edited(json.loads(content[8 : 8 + length]), edits), depth)
        return (
            struct.pack("<Q", len(header) if claim is None else claim)
            + header
            + content[8 + length :]
        )

    return change


@st.composite
def tensor_edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What replaces, removes or adds tensors of a safetensors file."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["replace", "remove", "add"]), HERE, tensors(), st.text(max_size=8)
            ),
            max_size=4,
        )
    )

    def change(content: bytes) -> bytes:
        found = load(content)
        for what, place, tensor, name in edits:
            names = [*found, "x"]
            at = names[min(int(place * len(names)), len(names) - 1)]
            if what == "remove":
                found.pop(at, None)
            else:
                found[at if what == "replace" else name] = tensor
        return save(
            {
                name.encode("utf-8", "replace").decode(): tensor.clone()
                for name, tensor in found.items()
            },
            _metadata_of(content),
        )

    return change


def _metadata_of(content: bytes) -> dict[str, str] | None:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]).get("__metadata__")  # type: ignore[no-any-return]


@st.composite
def byte_edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    changes = draw(DAMAGE)
    return lambda content: changed(content, changes)


@st.composite
def state_edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What changes the numbers in a checkpoint's metadata."""
    edits, depth, kind = draw(EDITS), draw(DEPTHS), draw(st.integers(0, 9))
    odd = draw(st.text(max_size=10)).encode("utf-8", "replace").decode()

    def change(content: bytes) -> bytes:
        metadata = _metadata_of(content) or {}
        text = as_json(edited(json.loads(metadata["state"]), edits), depth).decode()
        metadata = {
            0: None,
            1: {},
            2: {**metadata, "format": odd},
            3: {**metadata, "state": odd},
        }.get(kind, {**metadata, "state": text})
        return save(load(content), metadata)

    return change


RANDOM = st.binary(max_size=40).map(lambda content: lambda _: content)


@fuzzing("checkpoints")
@given(
    change=st.one_of(
        byte_edits(), header_edits(), tensor_edits(), state_edits(), state_edits(), RANDOM
    ),
    right_checksum=st.sampled_from([True, True, True, False]),
    round=st.sampled_from([3, 3, 4, 99_999_999]),
    other=st.sampled_from(
        [
            "",
            "checkpoints/round-x.safetensors",
            "checkpoints/round-00000009-0123456789abcdef.safetensors/x",
        ]
    ),
)
def test_checkpoints(
    sandbox: Sandbox,
    run_files: dict[str, bytes],
    change: Callable[[bytes], bytes],
    right_checksum: bool,
    round: int,
    other: str,
) -> None:
    name, content = next(
        (name, content) for name, content in run_files.items() if name.startswith("checkpoints/")
    )
    content = change(content)
    if right_checksum:
        name = (
            f"checkpoints/round-{round:08}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        )
    path = sandbox.fresh({name: content} | ({other: b""} if other else {})) / name
    with sandbox.attempt("checkpoints"):
        load_newest(path.parent)
    with sandbox.attempt("checkpoints"):
        checkpoint = load_checkpoint(path)
        assert isinstance(checkpoint.server.round, int)
        assert isinstance(checkpoint.server.encoder, torch.Tensor)


@fuzzing("models")
@given(
    file=st.sampled_from(["encoder", "heads/a"]),
    change=st.one_of(byte_edits(), header_edits(), tensor_edits(), tensor_edits(), RANDOM),
    client=st.one_of(
        st.sampled_from(["a"] * 8 + ["b", "", "..", "../encoder", "a/../b", "\0"]),
        st.text(max_size=5),
    ),
)
def test_models(
    sandbox: Sandbox,
    run_files: dict[str, bytes],
    file: str,
    change: Callable[[bytes], bytes],
    client: str,
) -> None:
    name = f"models/{file}.safetensors"
    folder = sandbox.fresh({**run_files, name: change(run_files[name])})
    with sandbox.attempt("models"):
        model = load_model(folder, client, FEDERATION)
        assert model(torch.zeros(1, 6)).shape == (1, 2)


# MTFL

SHAPE = ((20, 20), (44, 20), (32, 34), (23, 46), (41, 46))
LINE = " ".join(
    ["a.jpg", *(str(point[axis]) for axis in (0, 1) for point in SHAPE), "1", "2", "1", "3"]
)
LINES = f"{LINE}\n{LINE.replace('a.jpg', 'b.png')}\n{LINE.replace('a.jpg', 'c/d.jpg')}\n".encode()
FIELDS = st.one_of(
    st.sampled_from(
        [
            "nan",
            "inf",
            "-1",
            "1e999",
            "0",
            "6",
            "1_0",
            "٣",
            "0x10",
            "1.5",
            "1e5",
            "999999",
            "-999999",
            "9" * 5000,
            "x",
            "é",
            "\0",
        ]
    ),
    st.sampled_from(
        [
            "../../canary",
            "/etc/passwd",
            "C:\\x",
            "c\\d.jpg",
            "a.jpg/..",
            "..",
            ".",
            "/",
            "training.txt",
            "\u2028",
            "a" * 5000,
        ]
    ),
    st.floats().map(str),
    st.text(max_size=5),
)


@st.composite
def annotations(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return changed(LINES, draw(DAMAGE))
    rows = [line.split() for line in LINES.decode().splitlines()]
    for row, column, field in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15), FIELDS), max_size=4)
    ):
        rows[row][column:] = [field, *rows[row][column + 1 :]]
    text = draw(st.sampled_from(["\n", "\n", "\r", "\x85", "\n\n"])).join(map(" ".join, rows))
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])), "replace")


def _encoded(format: str, colour: bool) -> bytes:
    pixels = np.random.default_rng(0).integers(
        0, 256, size=(64, 64, 3) if colour else (64, 64), dtype=np.uint8
    )
    content = BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


JPEG, PNG = _encoded("JPEG", colour=True), _encoded("PNG", colour=False)
FACES = {"a.jpg": JPEG, "b.png": PNG, "c/d.jpg": JPEG, "training.txt": LINES, "testing.txt": LINES}

Entry = tuple[str, bytes, Callable[[zipfile.ZipInfo], None]]


def _as_it_is(_: zipfile.ZipInfo) -> None:
    pass


def _as_link(info: zipfile.ZipInfo) -> None:
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16


METHODS = st.sampled_from(
    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
ENTRY_NAMES = st.one_of(
    st.sampled_from(
        [
            "../canary",
            "../../canary",
            "/canary",
            "\\canary",
            "C:/x",
            "c/../../x",
            "x/",
            "./a.jpg",
            "a.jpg",
            "training.txt",
        ]
    ),
    st.sampled_from(
        [
            "",
            ".",
            "/",
            "MTFL/training.txt",
            "x/testing.txt",
            "CON",
            "a" * 5000,
            "é\u202e",
            "training.txt/",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
CONTENTS = st.one_of(
    st.sampled_from(
        [
            b"",
            b"../../canary",
            b"/etc/passwd",
            LINES,
            JPEG,
            PNG,
            b"\n" * 2_000_000,
            b"a \n" * 300_000,
            bytes(3_000_000),
        ]
    ),
    st.binary(max_size=20),
)


def zipped(
    files: Mapping[str, bytes],
    method: int = zipfile.ZIP_STORED,
    more: list[tuple[str, bytes, bool]] | None = None,
) -> bytes:
    content = BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # entries of one name
        for name, data in files.items():
            archive.writestr(name, data)
        for name, data, link in more or []:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            (_as_link if link else _as_it_is)(info)
            archive.writestr(info, data)
    return content.getvalue()


@st.composite
def zips(draw: st.DrawFn) -> bytes:
    """Zips with odd entries, with sizes and methods that do not hold, or with damaged bytes."""
    top, method = draw(st.sampled_from(["", "", "MTFL/", "x/y/"])), draw(METHODS)
    files = {top + name: content for name, content in FACES.items()}
    for name in draw(st.lists(st.sampled_from(sorted(files)), max_size=1)):
        files[name] = draw(CONTENTS)
    more = draw(st.lists(st.tuples(ENTRY_NAMES, CONTENTS, st.booleans()), max_size=2))
    content = zipped(files, method, more)
    for place, field, value in draw(
        st.lists(
            st.tuples(
                HERE, st.sampled_from([4, 6, 8, 10, 16, 20, 24, 28, 42]), st.integers(0, 65535)
            ),
            max_size=2,
        )
    ):
        entries = _central_entries(content)
        at = entries[min(int(place * len(entries)), len(entries) - 1)] + field
        content = content[:at] + struct.pack("<H", value) + content[at + 2 :]
    return changed(content, draw(st.lists(CHANGES, max_size=2)))


def _central_entries(content: bytes) -> list[int]:
    """Where the entries of a zip's directory begin."""
    starts, at = [], content.find(b"PK\1\2")
    while at >= 0:
        starts.append(at)
        at = content.find(b"PK\1\2", at + 46)
    return starts or [0]


@fuzzing("annotations")
@given(
    training=annotations(), testing=st.one_of(st.just(LINES), annotations()), unpacked=st.booleans()
)
def test_annotations(sandbox: Sandbox, training: bytes, testing: bytes, unpacked: bool) -> None:
    files = {"training.txt": training, "testing.txt": testing}
    folder = sandbox.fresh(
        {f"MTFL/{name}": content for name, content in files.items()}
        if unpacked
        else {"MTFL": zipped(files)}
    )
    with sandbox.attempt("annotations"):
        faces = read_faces(folder / "MTFL")
        for face in (*faces["train"], *faces["test"]):
            assert ".." not in face.image.split("/")
            assert not face.image.startswith("/")
            assert np.isfinite(face.landmarks).all()


def _check_faces(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # Pillow warns of what it can mend
        mtfl.make(0, str(path), tasks=("landmarks", "pose"), image_size=16).check_data()


@fuzzing("zips")
@given(content=st.one_of(zips(), zips(), zips(), st.binary(max_size=60)))
def test_zips(sandbox: Sandbox, content: bytes) -> None:
    path = sandbox.fresh({"MTFL.zip": content}) / "MTFL.zip"
    with sandbox.attempt("zips"):
        _check_faces(path)


@fuzzing("images")
@given(
    image=st.one_of(
        st.builds(changed, st.sampled_from([JPEG, PNG]), DAMAGE), st.binary(max_size=60)
    ),
    training=st.one_of(st.just(LINES), annotations()),
    links=st.lists(
        st.tuples(
            st.sampled_from(["e", "b.png"]),
            st.sampled_from(["../canary", "..", ".", "a.jpg", "b.png"]),
        ),
        max_size=1,
    ),
    unpacked=st.booleans(),
)
def test_images(
    sandbox: Sandbox, image: bytes, training: bytes, links: list[tuple[str, str]], unpacked: bool
) -> None:
    files = {**FACES, "a.jpg": image, "training.txt": training}
    folder = sandbox.fresh(
        {f"MTFL/{name}": content for name, content in files.items()}
        if unpacked
        else {"MTFL": zipped(files)}
    )
    for name, leads_to in links if unpacked else []:
        (folder / "MTFL" / name).unlink(missing_ok=True)
        (folder / "MTFL" / name).symlink_to(leads_to)
    with sandbox.attempt("images"):
        _check_faces(folder / "MTFL")


# RadCom

LITERALS = st.one_of(
    st.sampled_from(
        [
            "'bpsk'",
            "'Satcom'",
            "'Satcom '",
            "'radar'",
            "10",
            "0",
            "-10",
            "1e9",
            "True",
            "None",
            "0xff",
            "1_0",
            "[]",
            "b''",
            "()",
        ]
    ),
    st.sampled_from(
        [
            "9" * 150,
            "-" * 150 + "1",
            "(" * 90,
            "'\\ud800'",
            "'\\d'",
            "1j",
            "*x",
            "__import__('os')",
            "f'{1}'",
            "{1: 2}",
            "''",
        ]
    ),
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=6),
)
HDF5_KEYS = st.one_of(
    st.tuples(
        st.just("'bpsk'"),
        st.just("'Satcom'"),
        st.integers(-210, 210).map(str),
        st.integers(-1, 3).map(str),
    ).map(list),
    st.tuples(st.just("'bpsk'"), LITERALS, LITERALS, LITERALS).map(list),
    st.lists(LITERALS, max_size=6),
).map(lambda fields: f"({', '.join(fields)})")
PLAIN_KEY = "('bpsk', 'Satcom', 10, 0)"
HDF5_VALUES = st.one_of(
    st.just(("sound",)),
    st.just(("sound",)),
    st.tuples(
        st.just("numbers"),
        st.sampled_from([(256, 1), (256, 1), (256,), (1, 256), (255, 1), (0, 1), (), (256, 1, 1)]),
        st.sampled_from([0.0, 1.0, 1e300, math.nan, math.inf]),
        st.sampled_from(["f4", "f8", "f2", "g", "c8", "i8", "?", "S3"]),
    ),
    st.sampled_from(
        [
            "group",
            "soft",
            "external",
            "dangling",
            "virtual",
            "storage",
            "zipped",
            "empty",
            "strings",
            "big",
            "type",
        ]
    ).map(lambda kind: (kind,)),
)


@fuzzing("HDF5 keys")
@given(
    items=st.dictionaries(
        st.one_of(st.just(PLAIN_KEY), HDF5_KEYS, HDF5_KEYS), HDF5_VALUES, max_size=3
    )
)
def test_hdf5_keys(sandbox: Sandbox, items: dict[str, Any]) -> None:
    path = sandbox.fresh({}) / "radcom.hdf5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _write_items(path, items)
    with sandbox.attempt("HDF5 keys"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the keys, which Python reads
        snapshots = read_hdf5(path)
        assert snapshots.data.shape == (len(items), 256)
        assert np.isfinite(snapshots.data).all()


def _write_items(path: Path, items: Mapping[str, tuple[Any, ...]]) -> None:
    with h5py.File(path, "w") as file:
        for number, (key, value) in enumerate(items.items()):
            try:
                _write_item(file, key.encode("utf-8", "replace").decode(), value, number)
            except (
                ValueError,
                RuntimeError,
                TypeError,
                KeyError,
                OSError,
            ):  # what HDF5 itself refuses to write
                file.create_dataset(f"refused {number}", data=0.0)


def _write_item(file: h5py.File, key: str, value: tuple[Any, ...], number: int) -> None:
    shape = (256, 1)
    match value[0]:
        case "sound":
            file.create_dataset(key, data=np.ones(shape, dtype=np.float32))
        case "numbers":
            file.create_dataset(key, data=np.full(*value[1:]))
        case "group":
            file.create_group(key)
        case "soft":
            file[f"target {number}"] = np.ones(shape, dtype=np.float32)
            file[key] = h5py.SoftLink(f"/target {number}")
        case "external":
            file[key] = h5py.ExternalLink("/etc/passwd", "/x")
        case "dangling":
            file[key] = h5py.SoftLink("/nothing")
        case "virtual":
            layout = h5py.VirtualLayout(shape, dtype=np.float32)
            layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=shape)
            file.create_virtual_dataset(key, layout)
        case "storage":
            file.create_dataset(key, shape, np.float32, external=[("/etc/passwd", 0, 1024)])
        case "zipped":
            file.create_dataset(
                key,
                data=np.ones(shape, dtype=np.float32),
                compression="gzip",
                shuffle=True,
                fletcher32=True,
            )
        case "empty":
            file.create_dataset(key, data=h5py.Empty("f4"))
        case "strings":
            file.create_dataset(key, shape, h5py.string_dtype())
        case "big":
            file.create_dataset(key, (2**40, 1), np.float32, chunks=(256, 1))
        case "type":
            file[key] = np.dtype("f4")


@pytest.fixture(scope="module")
def hdf5_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "radcom.hdf5"
    _write_items(path, {PLAIN_KEY: ("sound",), PLAIN_KEY.replace("10", "-4"): ("zipped",)})
    return path.read_bytes()


@fuzzing("HDF5 bytes")
@given(changes=DAMAGE)
def test_hdf5_bytes(
    sandbox: Sandbox, hdf5_content: bytes, changes: list[tuple[str, Any, Any]]
) -> None:
    path = sandbox.fresh({"radcom.hdf5": changed(hdf5_content, changes)}) / "radcom.hdf5"
    with sandbox.attempt("HDF5 bytes"):
        assert np.isfinite(read_hdf5(path).data).all()


# Reports

NUMBERS = st.one_of(
    st.sampled_from(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            5e-324,
            1e-300,
            1e100,
            1e101,
            1e308,
            math.inf,
            -math.inf,
            math.nan,
            0,
            1,
            True,
            10**400,
        ]
    ),
    st.floats(),
)
CLIENTS = ("a", "b", "c")
ENCODER = torch.zeros(3)
SENT = {"mean": torch.zeros(2), "count": torch.tensor(1)}
OWN = st.sampled_from([1.0, 0.0, -2.0, 1e-30, 3e38]).map(lambda number: torch.full((3,), number))
BUFFERS = st.one_of(
    st.just(SENT),
    st.just({}),
    st.fixed_dictionaries({"mean": tensors(), "count": tensors()}),
    st.dictionaries(st.sampled_from(["mean", "count", "x", ""]), tensors()),
)
ODD_FIELDS = st.one_of(
    st.tuples(st.just("gradient"), tensors()),
    st.tuples(st.sampled_from(["loss", "initial_loss", "grad_norm", "seconds"]), NUMBERS),
    st.tuples(st.just("num_examples"), st.integers(-1, 10**6)),
    st.tuples(st.just("buffers"), BUFFERS),
    st.tuples(st.just("round"), st.sampled_from([0, 2, -1])),
    st.tuples(st.just("client"), st.sampled_from(["d", ""])),
)
REPLIES = st.lists(
    st.tuples(
        st.sampled_from(CLIENTS),
        OWN,
        st.one_of(st.just({}), st.lists(ODD_FIELDS, min_size=1, max_size=2).map(dict)),
    ),
    max_size=5,
    unique_by=lambda reply: (reply[0], len(reply[2]) == 0),
)
USUAL = st.dictionaries(
    st.sampled_from([*CLIENTS, "d"]),
    st.lists(st.sampled_from([0.0, 1e-300, 1.0, 2.0, 1e38]), max_size=5),
)


@fuzzing("reports")
@given(
    replies=REPLIES,
    norms=USUAL,
    ratio=st.one_of(st.none(), st.sampled_from([1.5, 10.0, 1e300])),
    averaged=st.sampled_from([False, True]),
)
def test_reports(
    sandbox: Sandbox,
    replies: list[tuple[str, torch.Tensor, dict[str, Any]]],
    norms: dict[str, list[float]],
    ratio: float | None,
    averaged: bool,
) -> None:
    sent = SENT if averaged else {}
    training = TrainConfig()
    instructions = [Instruction(1, client, ENCODER, sent, training) for client in CLIENTS]
    usual = {
        "task": "t",
        "loss": 1.0,
        "initial_loss": 1.0,
        "grad_norm": 1.0,
        "num_examples": 1,
        "round": 1,
        "buffers": sent,
    }
    reports = [
        Report(**{"client": client, "gradient": gradient, **usual, **odd})
        for client, gradient, odd in replies
    ]
    with sandbox.attempt("reports"):
        sound, dropped = screen(reports, instructions, norms, ratio)
        assert sorted([*(report.client for report in sound), *dropped]) == sorted(CLIENTS)
        if sound:
            _go_on(sound, sent, training)


def _go_on(sound: list[Report], sent: Mapping[str, torch.Tensor], training: TrainConfig) -> None:
    """What the server does with sound reports goes well, and changes no shape and no dtype."""
    weighting = FedGradNorm()
    weights, memory = weighting.update(weighting.init(CLIENTS), sound)
    assert all(math.isfinite(value) for value in weights.values.values())
    before = ServerState(0, ENCODER, sent, memory)
    after = advance(before, sound, Mean()(sound, weights), memory, training)
    assert (after.encoder.shape, after.encoder.dtype) == (ENCODER.shape, ENCODER.dtype)
    for name, buffer in after.buffers.items():
        assert (buffer.shape, buffer.dtype) == (sent[name].shape, sent[name].dtype)


def test_every_target_has_a_test() -> None:
    assert sorted(TARGETS.values()) == sorted(SHARES)
