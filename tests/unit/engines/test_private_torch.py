"""What torch may change without notice is loaded by the fast engine alone."""

import ast
import subprocess
import sys
from pathlib import Path

import fedgradnorm

ROOT = Path(fedgradnorm.__file__).parent
FAST = [path for path in (ROOT / "engines").glob("*.py") if path.stem != "reference"]

TRAINING = """
import builtins
import sys

import torch

REFUSED = {refused!r}
importing = builtins.__import__


def refusing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or dict()).get("__name__") or ""
    if importer.partition(".")[0] == "fedgradnorm" and name in REFUSED:
        raise ImportError(f"{{importer}} imports {{name}}")
    return importing(name, globals, locals, fromlist, level)


builtins.__import__ = refusing
import fedgradnorm
from fedgradnorm.federations import digits

result = fedgradnorm.train(digits.make(0), engine="reference", num_rounds=2)
assert len(result.rows) == 2 * len(result.federation.clients)
assert "fedgradnorm.engines.vectorized" not in sys.modules
try:
    import fedgradnorm.engines.vectorized
except ImportError:
    print("trained")
"""


def is_private(module: str) -> bool:
    packages = module.split(".")
    inner = any(part.startswith("_") for part in packages[1:])
    return packages[0] == "torch" and (inner or module == "torch.fx.experimental.proxy_tensor")


def modules_of(path: Path) -> set[str]:
    """The modules that a file imports when it is loaded."""
    imported = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            imported.add(node.module)
    return imported


def test_the_reference_engine_trains_without_the_modules_that_the_fast_one_imports():
    refused = {name for path in FAST for name in modules_of(path) if is_private(name)}
    assert refused
    result = subprocess.run(
        [sys.executable, "-c", TRAINING.format(refused=refused)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "trained\n", result.stderr


def test_no_other_file_imports_private_modules_when_it_is_loaded():
    for path in set(ROOT.rglob("*.py")) - set(FAST):
        assert not [name for name in modules_of(path) if is_private(name)], path
