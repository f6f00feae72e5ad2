"""A finished run without its training: the files that predict needs, as bytes.

An estimator keeps them in memory; in a folder they are a workdir that --mode=predict
reads.  Nothing of it is a pickle.
"""

from __future__ import annotations

import os
import tempfile

from cbmlc_jax import files
from cbmlc_jax.workdirs import RunError

# Name relative to the folder, with "/", -> content.
RunFiles = dict[str, bytes]

LARGEST = 8 << 30  # bytes, of all files together
ESTIMATOR = "estimator.json"  # what an estimator writes beside a run's own files
_KEPT = (
    "config.json",
    "inputs.json",
    "results.jsonl",
    "validation.npz",
    "out_of_fold.npy",
    ESTIMATOR,
)
_CHECKPOINTS = "checkpoints"
_OPTIMIZER = "rest"  # item of a checkpoint that only training reads


def read(folder: str) -> RunFiles:
    """The files of a finished run: of its checkpoints only the chosen one.

    Raises:
        RunError: there is no finished run, or it is larger than `LARGEST`.
    """
    path = os.path.join(folder, "results.jsonl")
    try:
        rows = files.read_jsonl(path)
        epoch = int(rows[-1]["epoch"]) if rows else None
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error!r}") from error
    if epoch is None:
        raise RunError(f"{folder} holds no finished run (no results.jsonl there)")
    paths = [name for name in _KEPT if os.path.isfile(os.path.join(folder, name))]
    chosen = os.path.join(folder, _CHECKPOINTS, str(epoch))
    for here, folders, names in os.walk(chosen):
        if here == chosen and _OPTIMIZER in folders:
            folders.remove(_OPTIMIZER)
        paths += [os.path.relpath(os.path.join(here, n), folder) for n in names]
    if sum(os.path.getsize(os.path.join(folder, path)) for path in paths) > LARGEST:
        raise RunError(f"{folder} has more than {LARGEST >> 30} GB of files to read")
    found = {}
    for path in paths:
        with open(os.path.join(folder, path), "rb") as file:
            found[path.replace(os.sep, "/")] = file.read()
    return found


def write(found: RunFiles, folder: str) -> None:
    """Writes them to a new folder, which appears when it is complete.

    Raises:
        RunError: there is something already.
    """
    folder = os.path.abspath(folder)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
    if os.path.exists(folder):
        raise RunError(f"{folder} exists already: give another one, or delete it")
    parent = os.path.dirname(folder)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".writing-") as beside:
        whole = os.path.join(beside, "run")
        for name, content in found.items():
            path = os.path.join(whole, *name.split("/"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
        os.rename(whole, folder)
