"""The notebooks: stripped, alike, and every cell runs in the short form."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import types

import pytest
import running

from cbmlc_jax import files
from experiments import notebooks

FOUND = sorted(notebooks.FOLDER.glob("*.ipynb"))
SHARED = ("install-text", "install", "device")


def cells(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf8"))["cells"]


@pytest.mark.parametrize("path", FOUND, ids=lambda p: p.stem)
def test_outputs_are_stripped(path):
    for cell in cells(path):
        assert not cell.get("outputs"), f"{path}: strip the outputs of {cell['id']}"
        assert cell.get("execution_count") is None
    ids = [cell["id"] for cell in cells(path)]
    assert len(ids) == len(set(ids)) and all(
        len(cell["source"]) for cell in cells(path)
    )


@pytest.mark.parametrize("path", FOUND, ids=lambda p: p.stem)
def test_format_is_valid(path):
    nbformat = pytest.importorskip("nbformat", reason="the extra `test` has it")
    nbformat.validate(json.loads(path.read_text(encoding="utf8")))


def test_the_readme_links_them_all():
    text = (running.ROOT / "README.md").read_text(encoding="utf8")
    assert len(FOUND) == 3
    for path in FOUND:
        assert text.count(f"/blob/main/notebooks/{path.name}") == 1


def test_installing_is_the_same_everywhere():
    first, *others = ({c["id"]: c for c in cells(path)} for path in FOUND)
    for other in others:
        assert [other[name] for name in SHARED] == [first[name] for name in SHARED]


def test_parameters_must_exist(tmp_path):
    with pytest.raises(notebooks.NotebookError, match="no parameter QUICK.*'FAST'"):
        notebooks.read(FOUND[0], {"QUICK": True})
    content = {"cells": [{"cell_type": "code", "metadata": {}, "source": ["x = 1"]}]}
    files.write_atomic(str(tmp_path / "x.ipynb"), json.dumps(content))
    with pytest.raises(notebooks.NotebookError, match="has 0 cells tagged parameters"):
        notebooks.read(tmp_path / "x.ipynb", {})


class Shown:
    """Stands for IPython.display, which the tests do without."""

    def __init__(self, monkeypatch):
        self.tables, self.images = [], []
        ipython, module = map(types.ModuleType, ("IPython", "IPython.display"))
        ipython.version_info = (9, 0)  # which matplotlib asks for
        module.Markdown, module.Image = self.tables.append, self.image
        module.display = lambda shown: None
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def image(self, data: bytes, width: int, alt: str) -> None:
        assert data.startswith(b"\x89PNG") and alt
        self.images.append(data)


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Runs the cells of a notebook in one namespace: (its names, what it showed)."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("CBMLC_DATA_DIR", raising=False)
    monkeypatch.chdir(running.ROOT)

    def run(name: str) -> tuple[dict, Shown]:
        values = {"FAST": True, "RUNS": str(tmp_path), "DEVICES": 1}
        names, shown = {"__name__": "__main__"}, Shown(monkeypatch)
        for cell in notebooks.read(notebooks.FOLDER / name, values)["cells"]:
            if cell["cell_type"] == "code":
                place = f"{name}, cell {cell['id']}"
                exec(compile(cell["source"], place, "exec"), names)
        assert os.getcwd() == str(running.ROOT)
        return names, shown

    return run


def test_quick_start(execute):
    names, shown = execute("01_quick_start.ipynb")
    assert names["row"]["noise"]["kind"] == "combined" and len(shown.images) == 1
    [table] = shown.tables
    honest = names["row"]["metrics"]["corrected_val"]["miF1"]
    assert len(table.splitlines()) == 6 and f"| {honest:.3f} |" in table
    # The two rows to predict are of different topics.
    said = pathlib.Path(names["RUNS"], "said.jsonl").read_text().splitlines()
    assert len(said) == 2 and said[0] != said[1]


@pytest.mark.slow
def test_own_data(execute):
    """docs/own_data.md runs the same steps, in short."""
    names, shown = execute("02_own_data.ipynb")
    found, wrong = names["found"], names["wrong"]
    # What the text says: suspects are mostly planted, far more often than by chance.
    assert wrong[found.doubtful].mean() > 0.7 > 5 * wrong.mean()
    assert names["hit"][:20].mean() > 0.9
    rows = names["rows"]
    assert rows["linear-repaired"]["noise"]["repaired"]["how"] == "flip"
    assert names["said"].shape == (150, 8) and len(shown.tables) == 3
    best = rows["linear"]["metrics"]["corrected_val"]["miF1"]
    assert best > 0.7 and abs(names["score"]["miF1"] - best) < 0.1


@pytest.mark.slow  # the other one runs its cells in the same way
def test_noise_study(execute):
    names, shown = execute("03_noise_study.ipynb")
    rows = names["found"].rows
    assert {(r["model"], r["noise"]["kind"]) for r in rows} == {
        (model, kind)
        for model in ("cbmlc", "label_prior", "lr_knn")
        for kind in ("none", "nar")
    }
    assert len(shown.images) == 2 and len(shown.tables) == 3
    first, second, third = (table.splitlines() for table in shown.tables)
    assert len(first) == len(second) == 2 + 6 and len(third) == 2 + 3
    assert first[2].startswith("| none | cbmlc |") and "vs lr_knn" in third[2]
    assert "no bootstrap" not in shown.tables[2]
