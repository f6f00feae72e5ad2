"""The structure: who imports whom."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
import running

PACKAGE = running.ROOT / "cbmlc_jax"
PURE = {"rngs": set(), "losses": set(), "metrics": set(), "limits": set()}
ALLOWED = PURE | {
    "config": {"limits"},
    "grids": {"config"},
    "noise": set(),
    "embeddings": {"rngs"},
    "thresholds": {"metrics"},
    "optim": set(),
    "parallel": set(),
    "checkpoints": set(),
    "processes": set(),
    "progress": {"files"},
    "errors": {"config"},
    "data": {"data", "rngs"},
    "models": {"models"},
    "task": {
        "backbones",
        "config",
        "data",
        "embeddings",
        "models",
        "noise",
        "repair",
        "rngs",
        "thresholds",
    },
    "anchors": set(),
    "rates": {"anchors", "thresholds"},
    "evaluate": {"calibration", "decision", "metrics", "thresholds"},
    "decision": set(),
    "validation": {"evaluate", "files", "thresholds"},
    "calibration": {"decision", "thresholds"},
    "rules": {"decision", "evaluate", "thresholds"},
    "details": {"metrics", "thresholds"},
    "files": set(),
    "weights": set(),
    "backbones": {"data", "files", "models", "parallel", "weights"},
    "mixture": set(),
    "row_noise": set(),
    "systems": {
        "backbones",
        "config",
        "data",
        "decision",
        "mixture",
        "models",
        "parallel",
        "rngs",
    },
    "results": {"config", "metrics", "task", "thresholds"},
    "reading": {"data"},
    "workdirs": {"checkpoints", "config", "files", "validation"},
    "run": {
        "config",
        "data",
        "details",
        "evaluate",
        "files",
        "metrics",
        "models",
        "rates",
        "results",
        "rngs",
        "row_noise",
        "systems",
        "task",
        "thresholds",
        "validation",
        "workdirs",
    },
    "fit": {
        "checkpoints",
        "config",
        "evaluate",
        "files",
        "mixture",
        "models",
        "processes",
        "rngs",
        "run",
        "systems",
        "task",
        "train",
        "workdirs",
    },
    "steps": {
        "losses",
        "models",
        "optim",
        "parallel",
        "rngs",
        "systems",
        "thresholds",
    },
    "train": {
        "checkpoints",
        "data",
        "parallel",
        "processes",
        "progress",
        "run",
        "steps",
        "workdirs",
    },
    "predict": {
        "calibration",
        "config",
        "data",
        "decision",
        "files",
        "models",
        "reading",
        "rules",
        "systems",
        "task",
        "validation",
        "workdirs",
    },
    "describe": {"config", "data", "embeddings", "files", "run", "task"},
    "issues": {"rates", "row_noise", "thresholds"},
    "repair": {"data", "files", "issues"},
    "page": {"data", "issues"},
    "audit": {
        "config",
        "data",
        "files",
        "fit",
        "issues",
        "page",
        "repair",
        "run",
        "task",
        "workdirs",
    },
    "run_files": {"files", "workdirs"},
    "targets": {"data"},
    "classifier": {
        "config",
        "data",
        "decision",
        "fit",
        "predict",
        "rules",
        "run",
        "run_files",
        "targets",
        "workdirs",
    },
    "estimators": {"classifier"},
    "artefact": {"data"},
    "serving": {"artefact", "data", "decision"},
    "programs": {"artefact", "models", "systems"},
    "export": {
        "artefact",
        "backbones",
        "decision",
        "files",
        "predict",
        "programs",
        "results",
        "rules",
        "task",
    },
    "main": {
        "audit",
        "config",
        "describe",
        "errors",
        "export",
        "fit",
        "parallel",
        "predict",
        "processes",
        "replicas",
        "run",
    },
    "replicas": {
        "checkpoints",
        "config",
        "fit",
        "grids",
        "processes",
        "run",
        "train",
        "workdirs",
    },
}


def imported(path: pathlib.Path) -> set[str]:
    """Modules of ours that a file imports, by the first part of their name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "cbmlc_jax":
                names = [f"cbmlc_jax.{a.name}" for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("cbmlc_jax.")}
    return found


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_follow_the_direction(name):
    path = PACKAGE / name
    files = sorted(path.glob("**/*.py")) if path.is_dir() else [PACKAGE / f"{name}.py"]
    assert files
    for file in files:
        assert imported(file) <= ALLOWED[name] | {name}, file


def test_every_module_is_listed():
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert modules | packages == set(ALLOWED)


def test_only_parallel_says_pmap():
    users = {p.name for p in PACKAGE.glob("**/*.py") if "jax.pmap" in p.read_text()}
    assert users == {"parallel.py"}


def test_nothing_names_a_machine():
    for path in running.ROOT.glob("**/*.py"):
        if ".venv" not in path.parts and path.name != "test_house.py":
            assert not re.search(r"[\"' ]/(work|root|home)/", path.read_text()), path
