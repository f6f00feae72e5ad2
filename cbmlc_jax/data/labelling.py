"""Labels of a user's rows: their names, phrases, and the matrix of 0 and 1."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8

from cbmlc_jax.data import arff, tables
from cbmlc_jax.data.dataset import DataError

LARGEST_LABELS = 1 << 30  # entries [N, L], a byte each
_BINARY = {"0": False, "0.0": False, "false": False}
_BINARY |= {"1": True, "1.0": True, "true": True}


class Labels:
    """Collects the labels of rows that are read one after another.

    Args:
        names: L names, in the order of the columns; None: those that occur, sorted.
    """

    def __init__(self, names: Sequence | None = None):
        self._names = names
        self._index = {name: i for i, name in enumerate(names or ())}
        self._ids, self._counts = array.array("i"), array.array("q")

    def add(self, found: Iterable, where: str) -> None:
        """The labels of the next row.

        Raises:
            DataError: one is not among the names.
        """
        before = len(self._ids)
        for name in found:
            if self._names is not None and name not in self._index:
                raise DataError(
                    f"{where}: the label {str(name)[:80]!r} is none of the "
                    f"{len(self._index)} labels of the training file or of "
                    "config.data.label_file: correct it, or list it in that file"
                )
            self._ids.append(self._index.setdefault(name, len(self._index)))
        self._counts.append(len(self._ids) - before)

    def matrix(
        self, path: str, names: Sequence | None = None
    ) -> tuple[UInt8[np.ndarray, "rows labels"], list]:
        """The labels [N, L] of all rows, and the L names.

        Args:
            path: of the file, for messages.
            names: L names, where they became known while the rows were read.

        Raises:
            DataError: there is no label; one is not among the names; or they are more
                than LARGEST_LABELS entries.
        """
        found = list(self._index)
        if names is None:
            names = sorted(found) if self._names is None else self._names
        if not len(names):
            raise DataError(
                f"{path} has no label in any row: is config.data.label_column right?"
            )
        size(path, len(self._counts), len(names))
        column = {name: i for i, name in enumerate(names)}
        if lacking := [name for name in found if name not in column]:
            raise DataError(
                f"{path}: its first line says {len(names)} labels, numbers from 0 on, "
                f"but a row has {lacking[0]}: correct that line"
            )
        place = np.array([column[name] for name in found], np.int64)
        matrix = np.zeros((len(self._counts), len(names)), np.uint8)
        rows = np.repeat(np.arange(len(self._counts)), self._counts)
        matrix[rows, place[np.array(self._ids, np.int64)]] = 1
        return matrix, list(names)


def size(path: str, rows: int, labels: int) -> None:
    """Refuses a matrix of labels that is too large.

    Raises:
        DataError: it has more than LARGEST_LABELS entries.
    """
    if rows * labels > LARGEST_LABELS:
        raise DataError(
            f"{path}: {rows} rows x {labels} labels are more than the {LARGEST_LABELS} "
            "entries that fit: keep the frequent labels, or fewer rows"
        )


def listed(cell, separator: str, where: str) -> list[str]:
    """The labels in a cell: text with separators, or a JSON list of texts or numbers.

    Raises:
        DataError: it is neither.
    """
    if isinstance(cell, str):
        cell = cell.split(separator)
    if not isinstance(cell, list) or any(
        isinstance(item, (dict, list, bool)) or item is None for item in cell
    ):
        raise DataError(
            f"{where} must be a list of labels, or text with {separator!r} between "
            "them (config.data.separator)"
        )
    return [name for item in cell if (name := str(item).strip())]


def binary(cell, where: str) -> bool:
    """A cell of a label's own column.

    Raises:
        DataError: it is neither 0 nor 1.
    """
    text = str(cell).strip().lower()
    if text not in _BINARY:
        raise DataError(f"{where} is {text[:40]!r}, but a label must be 0 or 1")
    return _BINARY[text]


def read_names(path: str) -> tuple[list[str], list[str]]:
    """Label names and the phrases that say what they mean, from config.data.label_file.

    Lines of `name` or `name<TAB>phrase`, or Mulan's XML.

    Returns:
        L names and L phrases; where there is no phrase, the name.

    Raises:
        DataError: the file cannot be read, or names nothing, or a name twice.
    """
    if path.lower().endswith(".xml"):
        names = arff.read_label_names(path)
        return names, [name.removeprefix("TAG_") for name in names]
    phrases: dict[str, str] = {}
    for number, line in tables.lines(path):
        name, _, phrase = (part.strip() for part in line.strip().partition("\t"))
        if name in phrases:
            raise DataError(
                f"{path}, line {number}: the label {name!r} is there twice: remove one"
            )
        if name:
            phrases[name] = phrase or name
    if not phrases:
        raise DataError(f"{path} names no label: write one a line, `name<TAB>phrase`")
    return list(phrases), list(phrases.values())
