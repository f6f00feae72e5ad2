"""Executes the notebooks in a kernel; what they show stays in copies.

    python -m experiments.notebooks --output=FOLDER [--fast] [NOTEBOOK.ipynb ...]

Needs the package extra `notebooks`.  The notebooks themselves have no outputs.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import pathlib
from collections.abc import Mapping

from cbmlc_jax import errors, files

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"


class NotebookError(ValueError):
    """A notebook that cannot be executed; the message says what to do."""


def read(path: str | os.PathLike, parameters: Mapping[str, object]) -> dict:
    """A notebook whose cell tagged `parameters` ends with these values.

    Raises:
        NotebookError: no such cell, or one that does not set a given name.
    """
    with open(path, encoding="utf8") as file:
        notebook = json.load(file)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    tagged = [
        cell
        for cell in notebook["cells"]
        if "parameters" in cell["metadata"].get("tags", ())
    ]
    if len(tagged) != 1:
        raise NotebookError(f"{path} has {len(tagged)} cells tagged parameters, not 1")
    known = {
        name.id
        for line in ast.parse(tagged[0]["source"]).body
        if isinstance(line, ast.Assign)
        for name in line.targets
    }
    for name, value in parameters.items():
        if name not in known:
            raise NotebookError(f"{path} has no parameter {name}, but {sorted(known)}")
        tagged[0]["source"] += f"\n{name} = {value!r}"
    return notebook


def execute(path: pathlib.Path, folder: str, parameters: Mapping[str, object]) -> str:
    """Executes one notebook; returns the path of the copy, which a failure leaves, too.

    Raises:
        NotebookError: nbclient is not installed.
    """
    try:
        import nbclient
        import nbformat
    except ImportError:
        raise NotebookError(
            "notebooks need nbclient: pip install -e '.[notebooks]'"
        ) from None
    notebook = nbformat.from_dict(read(path, parameters))
    target = os.path.join(folder, path.name)
    where = {"metadata": {"path": str(path.resolve().parent)}}
    try:
        nbclient.NotebookClient(notebook, timeout=None, resources=where).execute()
    finally:
        os.makedirs(folder, exist_ok=True)
        files.write_atomic(target, nbformat.writes(notebook) + "\n")
    return target


def main() -> None:
    """Executes the named notebooks, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.notebooks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK.ipynb")
    parser.add_argument("--output", required=True, help="folder of the executed copies")
    parser.add_argument("--fast", action="store_true", help="the short form")
    arguments = parser.parse_args()
    parameters = {"FAST": True} if arguments.fast else {}
    with errors.explained():
        for path in arguments.notebooks or sorted(FOLDER.glob("*.ipynb")):
            print(execute(pathlib.Path(path), arguments.output, parameters), flush=True)


if __name__ == "__main__":
    main()
