"""What the docs say is run, and what is documented is held against the code."""

import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import fedgradnorm
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.cli import main
from fedgradnorm.compare.grid import final_cells, points_of
from fedgradnorm.compare.spec import load_study
from fedgradnorm.config import load_config
from tests.launcher import launcher

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    "fedgradnorm",
    *(module.name for module in pkgutil.walk_packages(fedgradnorm.__path__, "fedgradnorm.")),
]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S)


def commands(page):
    return [
        line.split()
        for block in blocks(page, "")
        for line in block.splitlines()
        if line.startswith("fedgradnorm ")
    ]


def call(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, words


def test_the_readmes_python_runs(tmp_path):
    (code,) = blocks("README.md", "python")[:1]
    assert len([line for line in code.splitlines() if line.strip()]) < 10
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_longer_python_runs(tmp_path, monkeypatch):
    _, code = blocks("README.md", "python")[:2]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    monkeypatch.chdir(tmp_path)
    status, _, error = launcher().call(tmp_path, code=code)
    assert status == 0, error


def test_the_commands_of_the_readme_and_the_docs_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    seen = []
    for page in (
        "README.md",
        "docs/data.md",
        "docs/configuration.md",
        "docs/faults.md",
        "docs/deploy.md",
        "docs/operate.md",
    ):
        for words in commands(page):
            if "RUN" in words[2:] or "MTFL.zip" in words[-1]:
                continue
            quick = ["train.num_rounds=2"] if words[1] == "run" else []
            call(monkeypatch, [*words, *quick])
            seen.append(words[1])
    assert set(seen) == {"run", "resume", "report", "evaluate", "list", "flower"}


def test_the_apps_of_the_page_on_deployment_are_apps(tmp_path):
    client, server = blocks("docs/deploy.md", "python")
    status, _, error = launcher().call(tmp_path, code=client + server)
    assert status == 0, error


def test_the_guides_weighting_and_federation_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("\n".join(blocks("CONTRIBUTING.md", "python")))
    call(
        monkeypatch,
        [
            "fedgradnorm",
            "run",
            "configs/digits.toml",
            "weighting.name=mine:InverseNorm",
            "train.num_rounds=2",
            "run.dir=a",
        ],
    )
    words = [
        "federation.name=mine:make",
        "federation.examples=500",
        "train.num_rounds=2",
        "run.dir=b",
    ]
    call(monkeypatch, ["fedgradnorm", "run", "configs/digits.toml", *words])
    call(monkeypatch, ["fedgradnorm", "evaluate", "b"])


def test_the_guides_method_and_the_commands_on_training_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_method.py").write_text("\n".join(blocks("docs/training.md", "python")))
    words = [
        "train.method.name=own_method:HeadsThenBoth",
        "train.method.warm=false",
        "train.num_rounds=2",
        "run.dir=a",
    ]
    call(monkeypatch, ["fedgradnorm", "run", "configs/digits.toml", *words])
    call(monkeypatch, ["fedgradnorm", "evaluate", "a"])
    for words in commands("docs/training.md"):
        call(monkeypatch, [*words, "train.num_rounds=2"])
    fedper, own = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("runs/fedper", "a"))
    assert re.findall('"loss": [^,]*', fedper) == re.findall(
        '"loss": [^,]*', own
    )  # not warm, it is FedPer


def test_the_page_on_the_configuration_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text() == generate.page(), "run `python docs/generate.py`"


@pytest.mark.parametrize("name", ["demo", "digits", "radcom", "mtfl"])
def test_every_config_is_sound(name):
    config = resolve_config(load_config(ROOT / "configs" / f"{name}.toml"))
    assert build_federation(config).num_features > 0
    assert "#" in (ROOT / "configs" / f"{name}.toml").read_text()


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "studies").glob("*.toml")) - {ROOT / "studies/methods.toml"}),
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize("full", [False, True])
def test_every_study_is_sound(path, full):
    study = load_study(path, full=full)
    assert len(study.seeds) >= 5
    assert path.name in (ROOT / "README.md").read_text()
    chosen = {
        (variant.name, method.name): points_of(study)[0]
        for variant in study.variants
        for method in study.methods
    }
    first = study.model_copy(update={"seeds": study.seeds[:1]})
    for cell in final_cells(first, chosen):
        assert build_federation(cell.config).num_features > 0


def test_the_documented_study_is_sound(tmp_path):
    (tmp_path / "studies").mkdir()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "studies" / "documented.toml").write_text(
        blocks("docs/configuration.md", "toml")[-1]
    )
    study = load_study(tmp_path / "studies" / "documented.toml")
    chosen = {
        (variant.name, method.name): (0.1,)
        for variant in study.variants
        for method in study.methods
    }
    cells = final_cells(study, chosen)
    assert (
        len(cells),
        cells[0].config.train.num_rounds,
        cells[0].config.federation.options["snapshots"],
    ) == (16, 100, 200)
    assert (
        load_study(tmp_path / "studies" / "documented.toml", full=True).base["train"]["num_rounds"]
        == 300
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_no_figure_is_missing(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    assert not re.search(r"^[A-Z]+_[A-Z_]+$", text, flags=re.M), "a placeholder"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_exports_what_it_has(name):
    module = import_module(name)
    assert module.__doc__
    if hasattr(module, "__all__"):
        assert len(set(module.__all__)) == len(module.__all__)
        for exported in module.__all__:
            assert hasattr(module, exported)


def test_the_package_and_a_run_import_no_optional_library():
    code = (
        "import sys, fedgradnorm, fedgradnorm.federations.digits as digits\n"
        "fedgradnorm.train(digits.make(0), num_rounds=1)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert not {"plotly", "tensorboard", "h5py", "PIL", "flwr", "typer"} & set(done.stdout.split())


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), flags=re.M):
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_constraints_pin_every_dependency_by_version_alone():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {
        re.split(r"[>\[]", requirement)[0].replace("-", "_").lower() for requirement in wanted
    } - {"fedgradnorm"}
    assert names <= {line.partition("==")[0].replace("-", "_").lower() for line in lines}


def test_the_lowest_versions_are_those_of_the_matrix():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = dict(
        re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["dependencies"]), flags=re.M)
    )
    text = (ROOT / "constraints-lowest.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)\.0$", text, flags=re.M))
    assert tested == {name: stated[name] for name in ("numpy", "pydantic", "torch")}
