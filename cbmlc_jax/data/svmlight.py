"""svmlight and extreme-classification text: `label,label index:value ...`, sparse rows.

scikit-learn parses the features; the labels and the header `rows features labels` of
the extreme-classification repository are read here.  Nothing becomes dense.

References:
    http://manikvarma.org/downloads/XC/XMLRepository.html (format)
"""

from __future__ import annotations

import array
import re
from collections.abc import Iterator

import numpy as np

from cbmlc_jax.data import tables
from cbmlc_jax.data.dataset import DataError, Ragged

LARGEST_INDEX = (1 << 31) - 2  # of a label
MOST_FEATURES = 1 << 24
_HEADER = re.compile(rb"\s*(\d{1,10})\s+(\d{1,10})\s+(\d{1,10})\s*")


class _Lines:
    """The rows of a file as scikit-learn reads them, each with the label 0.

    Attributes:
        path: of the file.
        header: (rows, features, labels), or None.
        numbers: line of each row, from 1.
        number: of the line that was read last.
    """

    def __init__(self, path: str, labels):
        self.path, self._labels = path, labels
        self.header: tuple[int, ...] | None = None
        self.numbers = array.array("q")
        self.number = 0

    def read(self) -> bytes:
        """Its presence makes scikit-learn take this for a file, and iterate."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[bytes]:
        for number, line in tables.byte_lines(self.path):
            self.number = number
            if self.number == 1 and (found := _HEADER.fullmatch(line)):
                self.header = tuple(map(int, found.groups()))
                continue
            line = line.partition(b"#")[0].strip()
            # With a header, a blank line is a row with neither labels nor features.
            if not line and self.header is None:
                continue
            first, _, rest = line.partition(b" ")
            if b"\t" in first:
                first, _, rest = line.partition(b"\t")
            if b":" in first:
                first, rest = b"", line
            self._labels.add(self._ids(first), f"{self.path}, line {self.number}")
            self.numbers.append(self.number)
            yield b"0 " + rest

    def _ids(self, cell: bytes) -> list[int]:
        try:
            return [_whole(part) for part in cell.split(b",") if part]
        except ValueError:
            raise DataError(
                f"{self.path}, line {self.number}: the labels {_short(cell)} are not "
                "numbers from 0 on with commas between them; leave them out where a "
                "row has none"
            ) from None


def read(
    path: str, labels, feature_names: tuple[str, ...] | None = None
) -> tuple[Ragged, tuple[str, ...], int | None]:
    """Reads one file.

    Args:
        path: of the file.
        labels: has `add(ids, where)`, called for each row in turn.
        feature_names: of the training file, of which this one has to be; None: this
            is the training file.

    Returns:
        Weighted rows; F feature names, which are the numbers in the file, from 0 where
        there is a header or a feature 0, else from 1; and the header's number of
        labels, if there is a header.

    Raises:
        DataError: a line is malformed, a number is not finite or out of range, or the
            header says other counts.
    """
    from sklearn.datasets import load_svmlight_file

    source = _Lines(path, labels)
    try:
        matrix, _ = load_svmlight_file(source, dtype=np.float32, zero_based=True)
    except DataError:
        raise
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path}, line {source.number}: {error}; expected `label,label index:value "
            "...` with ascending indices"
        ) from None
    if not len(source.numbers):
        raise DataError(f"{path} has no rows: is it the right file, and complete?")
    header, indices = source.header, matrix.indices
    if header and header[0] != len(source.numbers):
        raise DataError(
            f"{path} has {len(source.numbers)} rows, but {header[0]} by its first "
            "line: fetch it again, or correct that line"
        )
    if feature_names is None:
        first = 0 if header or indices.min(initial=1) == 0 else 1
        size = header[1] if header else int(indices.max(initial=0)) + 1 - first
        if not 0 < size <= MOST_FEATURES:
            raise DataError(
                f"{path} has {size} features, but 1 to {MOST_FEATURES} are possible: "
                "number them without gaps, or hash them to fewer"
            )
        feature_names = tuple(map(str, range(first, first + size)))
    first = int(feature_names[0])
    _check(matrix, first, first + len(feature_names), source)
    values = indices.astype(np.int32, copy=False)
    if first:
        values = values - np.int32(first)
    rows = Ragged(values, matrix.indptr.astype(np.int64), matrix.data)
    return rows, feature_names, header[2] if header else None


def _check(matrix, first: int, end: int, source: _Lines) -> None:
    """Refuses features outside of first .. end - 1, and values that are not finite.

    Raises:
        DataError: names the line of the first of them.
    """
    indices = matrix.indices
    for wrong, problem in (
        (
            (indices < first) | (indices >= end),
            f"is out of range, {first} to {end - 1}: leave it out, or train on a file "
            "that has it",
        ),
        (~np.isfinite(matrix.data), "is {}, not a finite number: leave it out"),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            row = int(np.searchsorted(matrix.indptr, place, side="right")) - 1
            raise DataError(
                f"{source.path}, line {source.numbers[row]}: feature {indices[place]} "
                + problem.format(matrix.data[place])
            )


def _whole(cell: bytes) -> int:
    value = float(cell)
    if not value.is_integer() or not 0 <= value <= LARGEST_INDEX:
        raise ValueError(cell)
    return int(value)


def _short(cell: bytes) -> str:
    return repr(cell[:40].decode("utf8", "replace"))
