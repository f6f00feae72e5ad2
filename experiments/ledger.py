"""The rows that a sweep has: read, added and marked, each key once.

A results file is rewritten whole and renamed for every row, so that a kill leaves the
old or the new one.  One sweep at a time writes to a folder of results; the lock is the
kernel's (flock), which a dead process cannot keep.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from importlib import metadata

import cbmlc_jax
from cbmlc_jax import files, grids


class SweepError(ValueError):
    """A sweep that cannot start or go on; the message says what to do."""


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Holds the only right to write to a folder; it is made when needed.

    Raises:
        SweepError: another sweep holds it; the message names its process and host.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".sweep.lock")
    with open(path, "a+", encoding="utf8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SweepError(
                f"{folder} is in use by another sweep ({file.read(200).strip()}): wait "
                "for it or stop it, then start this command again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield  # the file stays: removing it would let two sweeps lock two files


class Ledger:
    """The result rows of a folder, by key, and the one file that this sweep adds to.

    Args:
        path: of that file; every *.jsonl beside it is read, too.
        version: of cbmlc_jax whose rows count; None: of any.

    Raises:
        SweepError: a file there holds something else than result rows.
    """

    def __init__(self, path: str, version: str | None = cbmlc_jax.__version__):
        self.path, self.version = path, version
        folder = os.path.dirname(os.path.abspath(path))
        self.rows: dict[str, dict] = {}
        self.of_other_versions = 0
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for name in names:
            if name.endswith(".jsonl"):
                self._read(os.path.join(folder, name))

    def _read(self, path: str) -> None:
        try:
            rows = files.read_jsonl(path)
            for row in rows:
                if "record" in row:  # details of a run may lie in the same folder
                    continue
                if self.version in (None, row["versions"]["cbmlc_jax"]):
                    self.rows.setdefault(self.key(row), row)
                else:
                    self.of_other_versions += 1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SweepError(
                f"{path} is no file of result rows ({type(error).__name__}: {error}): "
                "mend it or move it away"
            ) from error

    def key(self, row: dict) -> str:
        """The key of a row, the same as that of its grids.Point."""
        version = self.version and row["versions"]["cbmlc_jax"]
        return grids.row_key(row["config"], row["noise"]["rate"], version)

    def add(
        self, row: dict, seconds: float | None, cells: Sequence[grids.Cell]
    ) -> None:
        """Writes a new row to the file and marks the rows there anew.

        row["sweep"] has the `seconds` of its process, None where they were not
        measured, and what `marks` says.
        """
        own = files.read_jsonl(self.path)
        row = {**row, "sweep": {"seconds": seconds}}
        self.rows[self.key(row)] = row
        found = marks(cells, self.rows)
        own = [*own, row]
        for line in own:
            line["sweep"] = line.get("sweep", {}) | found.get(self.key(line), {})
        files.write_jsonl(self.path, own)

    def other_versions(self, keys: set[str]) -> list[str]:
        """Libraries that made some of these rows in another version than is here."""
        names = {"jax", "flax", "optax", "numpy"}
        here = {name: metadata.version(name) for name in names}
        return sorted(
            {
                f"{name} {version} (here {here[name]})"
                for key in keys & set(self.rows)
                for name, version in self.rows[key]["versions"].items()
                if name in names and version != here[name]
            }
        )


def marks(cells: Sequence[grids.Cell], rows: dict[str, dict]) -> dict[str, dict]:
    """What grids say of their rows, by key.

    "grid": its name; "candidates": how many there are of its cell; "chosen": whether
    this one was chosen, None while that is open; and, for a chosen one of several, the
    "score" that it was chosen by: row["selection"]["score"] of the first seed.
    """
    found = {}
    for cell in cells:
        chosen = cell.choose(rows)
        for number, runs in enumerate(cell.points):
            mark = {"grid": cell.grid, "candidates": len(cell.points)}
            mark["chosen"] = None if chosen is None else number == chosen
            if mark["chosen"] and len(cell.points) > 1:
                mark["score"] = rows[runs[0].key]["selection"]["score"]
            for point in runs:
                if not found.get(point.key, {}).get("chosen"):
                    found[point.key] = mark
    return found


def write_failures(path: str, failures: dict[str, dict]) -> None:
    """The runs that failed, as JSON lines; none left: no file."""
    if failures:
        files.write_jsonl(path, list(failures.values()))
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def read_row(path: str) -> dict | None:
    """The row of a run's results.jsonl; None where it is not finished."""
    try:
        rows = files.read_jsonl(path)
    except json.JSONDecodeError:
        raise SweepError(f"{path} is damaged: remove its folder") from None
    return rows[-1] if rows else None
