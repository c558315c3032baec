"""Who may import whom, and the house rules that a reader of any file may count on."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("loopwm", "envs", "agents", "benchmarks", "tests", "train", "evaluate")
SKIPPED = {"runs", "build", "dist"}
MOST_LINES = 60  # of a function
MOST_SCRIPT_LINES = 80  # of train.py and evaluate.py

# Package -> the only modules it may import beside the standard library (a name covers what is under it).
MAY_ONLY_IMPORT = {
    "loopwm.dynamics": ("torch", "loopwm.dynamics"),
    "loopwm.model": ("torch", "loopwm.dynamics", "loopwm.model"),
}
# Package -> modules it must not import.
MUST_NOT_IMPORT = {
    "loopwm": ("agents", "envs", "benchmarks", "tests", "train", "evaluate"),
    "loopwm.training": ("loopwm.model", "loopwm.dynamics", "loopwm.inspect"),
    "envs": ("loopwm", "agents", "benchmarks", "tests", "train", "evaluate"),
    "agents": ("envs", "benchmarks", "tests", "train", "evaluate"),
}
UNSAFE = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib")


def python_files(root: Path = ROOT) -> list[Path]:
    """Every .py file of the repository, without hidden folders, virtual environments and outputs."""
    files = sorted(root.glob("*.py"))
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        hidden = folder.name.startswith(".") or folder.name in SKIPPED or (folder / "pyvenv.cfg").exists()
        files += [] if hidden else sorted(folder.rglob("*.py"))
    return files


FILES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in python_files()}


def module_name(file: str) -> str:
    """loopwm/dynamics/__init__.py -> loopwm.dynamics"""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import, also relative, lazy, for typing, or by a literal name."""
    package = module_name(file).split(".")
    if not file.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            known = base in MODULES  # `from loopwm import model` imports loopwm.model
            names = [f"{base}.{name.name}" for name in node.names if known]
            yield from ((node.lineno, name if name in MODULES else base) for name in names or [base])
        elif isinstance(node, ast.Call) and _called(node) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            literal = node.args and isinstance(node.args[0], ast.Constant)
            yield node.lineno, str(node.args[0].value) if literal else ""


MODULES = {module_name(file) for file in FILES} | {"loopwm", "envs", "agents"}
MODULES |= {f"loopwm.{part}" for part in ("dynamics", "model", "training", "inspect")}


def import_faults(file: str, source: str) -> list[str]:
    """The imports that break the two tables above."""
    module, faults = module_name(file), []
    for line, name in imports(file, source):
        for package, allowed in MAY_ONLY_IMPORT.items():
            standard = name.split(".")[0] in sys.stdlib_module_names
            if _under(module, package) and not standard and not any(_under(name, good) for good in allowed):
                faults.append(f"{file}:{line} {package} may import only {', '.join(allowed)}: {name}")
        for package, banned in MUST_NOT_IMPORT.items():
            if _under(module, package) and any(_under(name, bad) for bad in banned):
                faults.append(f"{file}:{line} {package} must not import {name}")
    return faults


def meeting_faults(file: str, source: str) -> list[str]:
    """Agents and envs meet in train.py and evaluate.py, and in the benchmarks and tests around them."""
    if file in ("train.py", "evaluate.py") or file.startswith(("benchmarks/", "tests/")):
        return []
    tops = {name.split(".")[0] for _, name in imports(file, source)}
    return [f"{file} imports both agents and envs"] if {"agents", "envs"} <= tops else []


def size_faults(file: str, source: str) -> list[str]:
    """Functions of more than 60 lines that do not say why, and scripts of more than 80."""
    lines = source.splitlines()
    faults = []
    if file in ("train.py", "evaluate.py") and len(lines) > MOST_SCRIPT_LINES:
        faults.append(f"{file} has {len(lines)} lines, at most {MOST_SCRIPT_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno]
            excused = any("long because" in line.partition("#")[2] for line in body)
            if len(body) > MOST_LINES and not excused:
                faults.append(f"{file}:{node.lineno} {node.name} has {len(body)} lines, at most {MOST_LINES}")
    return faults


def except_faults(file: str, source: str) -> list[str]:
    """`except:` without a class."""
    handlers = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    return [f"{file}:{node.lineno} bare except" for node in handlers if node.type is None]


def unsafe_faults(file: str, source: str) -> list[str]:
    """What runs code from data: eval, exec, pickle, and torch.load without weights_only=True."""
    if file.startswith("tests/"):
        return []
    faults = [
        f"{file}:{line} imports {name}"
        for line, name in imports(file, source)
        if any(_under(name, bad) for bad in UNSAFE)
    ]
    for node in ast.walk(ast.parse(source)):
        # Another name for torch or torch.load would hide the call from the check below.
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            faults += [f"{file}:{node.lineno} write torch.load" for name in node.names if name.name == "load"]
        if isinstance(node, ast.Import) and any(name.name == "torch" and name.asname for name in node.names):
            faults.append(f"{file}:{node.lineno} write torch by its name")
        if not isinstance(node, ast.Call):
            continue
        keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        called = _called(node)
        if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
            faults.append(f"{file}:{node.lineno} calls {called}")
        if called in ("torch.load", "torch.serialization.load") and keywords.get("weights_only") is not True:
            faults.append(f"{file}:{node.lineno} torch.load without weights_only=True")
        if keywords.get("allow_pickle") is True:
            faults.append(f"{file}:{node.lineno} allow_pickle=True")
    return faults


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def _under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


CHECKS = [import_faults, meeting_faults, size_faults, except_faults, unsafe_faults]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_rules_hold(check) -> None:
    faults = [fault for file, source in FILES.items() for fault in check(file, source)]
    assert not faults, "\n".join(faults)


def test_the_files_were_found() -> None:
    assert "loopwm/config.py" in FILES and "tests/test_layering.py" in FILES


LONG = "def f():\n" + "    x = 1\n" * 60  # 61 lines

BROKEN = [
    (import_faults, "loopwm/dynamics/cell.py", "import numpy"),
    (import_faults, "loopwm/dynamics/cell.py", "from loopwm.config import Config"),
    (import_faults, "loopwm/dynamics/cell.py", "from loopwm import model"),
    (import_faults, "loopwm/dynamics/cell.py", "from .. import model"),
    (import_faults, "loopwm/dynamics/__init__.py", "from ..model import heads"),
    (import_faults, "loopwm/dynamics/cell.py", "def f():\n    import tqdm"),
    (import_faults, "loopwm/model/heads.py", "import gymnasium"),
    (import_faults, "loopwm/model/heads.py", "from loopwm.training import replay"),
    (import_faults, "loopwm/model/heads.py", "from loopwm import config"),
    (import_faults, "loopwm/training/trainer.py", "from loopwm.model import WorldModel"),
    (import_faults, "loopwm/training/trainer.py", "from loopwm import dynamics"),
    (import_faults, "loopwm/training/trainer.py", "from ..dynamics.looped import LoopedDynamics"),
    (import_faults, "loopwm/training/trainer.py", "from agents.planner import Planner"),
    (import_faults, "loopwm/training/trainer.py", "import envs"),
    (import_faults, "loopwm/training/trainer.py", "import importlib\nimportlib.import_module('envs.dmc')"),
    (import_faults, "loopwm/inspect/report.py", "import envs"),
    (import_faults, "envs/dmc.py", "from loopwm.config import Config"),
    (import_faults, "envs/dmc.py", "import agents"),
    (import_faults, "agents/planner.py", "from envs import make_env"),
    (meeting_faults, "tools.py", "import agents.planner\nimport envs"),
    (size_faults, "train.py", "x = 1\n" * 81),
    (size_faults, "evaluate.py", "x = 1\n" * 81),
    (size_faults, "envs/dmc.py", LONG),
    (except_faults, "envs/dmc.py", "try:\n    x = 1\nexcept:\n    pass"),
    (unsafe_faults, "envs/dmc.py", "eval('1')"),
    (unsafe_faults, "envs/dmc.py", "import pickle"),
    (unsafe_faults, "envs/dmc.py", "from pickle import loads"),
    (unsafe_faults, "envs/dmc.py", "numpy.load('x', allow_pickle=True)"),
    (unsafe_faults, "envs/dmc.py", "torch.load('x')"),
    (unsafe_faults, "envs/dmc.py", "torch.load('x', weights_only=False)"),
    (unsafe_faults, "envs/dmc.py", "from torch import load"),
    (unsafe_faults, "envs/dmc.py", "import torch as t"),
]

FINE = [
    (
        import_faults,
        "loopwm/dynamics/cell.py",
        "import math\nimport torch.nn\nfrom . import depth\nfrom .blocks import x",
    ),
    (
        import_faults,
        "loopwm/model/heads.py",
        "import torch\nfrom loopwm.dynamics import base\nfrom ..dynamics import base",
    ),
    (
        import_faults,
        "loopwm/training/trainer.py",
        "import numpy\nfrom loopwm.config import Config\nfrom . import replay",
    ),
    (
        import_faults,
        "agents/planner.py",
        "from loopwm.model import WorldModel\nfrom loopwm.training import replay",
    ),
    (import_faults, "agents/planner.py", "from agents_of_others import envs"),
    (meeting_faults, "train.py", "import agents\nimport envs"),
    (size_faults, "envs/dmc.py", LONG.replace(":", ":  # long because the table has 60 rows", 1)),
    (size_faults, "train.py", "x = 1\n" * 80),
    (unsafe_faults, "envs/dmc.py", "model.eval()\ntorch.load('x', weights_only=True)"),
]


@pytest.mark.parametrize(("check", "file", "source"), BROKEN)
def test_a_broken_rule_is_seen(check, file: str, source: str) -> None:
    assert check(file, source)


@pytest.mark.parametrize(("check", "file", "source"), FINE)
def test_what_is_allowed_passes(check, file: str, source: str) -> None:
    assert not check(file, source)
