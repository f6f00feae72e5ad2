"""Which column of a user's table is what, and the cells of a row read as such."""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from cbmlc_jax.data import arff, labelling, tables
from cbmlc_jax.data.dataset import DataError, Dense, Ragged
from cbmlc_jax.data.images import Images
from cbmlc_jax.data.words import tokens

# What a cell of config.data.split_column may say.
TRAIN, VALIDATION, TEST = range(3)
SIDES = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
}


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns of a table are.

    Attributes:
        kind: "text", "image" or "numbers".
        inputs: the column of texts or images, or those of numbers.
        vector: the one column of numbers holds lists of them.
        label: the column of lists of labels, or "".
        labels: the columns that are 1 where the label of that name holds.
        separator: between the labels of a list.
        split: the column that says which part a row is in, or "".
    """

    kind: str
    inputs: tuple[str, ...]
    vector: bool
    label: str
    labels: tuple[str, ...]
    separator: str
    split: str

    @classmethod
    def of(cls, settings, row: dict, path: str, names: Sequence[str] | None):
        """Looks the columns of config.data up in the first row of the training file.

        Args:
            settings: config.data.
            row: the first.
            path: of the file.
            names: labels that config.data.label_file lists, or None.

        Raises:
            DataError: a column is missing, or it is not said where the labels are.
        """
        columns = list(row)

        def one(key: str) -> str:
            name = settings[key]
            if name and name not in columns:
                raise DataError(
                    f"{path} has no column {name!r} (config.data.{key}): its columns "
                    f"are {tables.listed(columns)}"
                )
            return name

        text, image, label, split = map(
            one, ("text_column", "image_column", "label_column", "split_column")
        )
        labels: list[str] = []
        if not label:
            wanted = settings.label_columns
            if wanted:
                labels = tables.matching(wanted, columns, "label_columns", path)
            elif names is not None and set(names) <= set(columns):
                labels = list(names)
            else:
                raise DataError(
                    f"{path}: set config.data.label_column to the column of lists of "
                    "labels, or config.data.label_columns to those of 0 and 1; its "
                    f"columns are {tables.listed(columns)}"
                )
        if text or image:
            kind, inputs, vector = ("text" if text else "image"), [text or image], False
        else:
            others = [c for c in columns if c not in {label, split, *labels}]
            wanted = settings.feature_columns
            inputs = others
            if wanted:
                inputs = tables.matching(wanted, columns, "feature_columns", path)
            if not inputs:
                raise DataError(
                    f"{path} has no column left for the features: set "
                    "config.data.text_column, image_column or feature_columns; its "
                    f"columns are {tables.listed(columns)}"
                )
            kind = "numbers"
            vector = len(inputs) == 1 and isinstance(row[inputs[0]], list)
        if shared := {label, *labels, split} & set(inputs) - {""}:
            raise DataError(
                f"{path}: the column {min(shared)!r} is a feature and a label or the "
                "split: name it once in config.data"
            )
        return cls(
            kind,
            tuple(inputs),
            vector,
            label,
            tuple(labels),
            settings.separator,
            split,
        )

    def cell(self, row: dict, name: str, where: str):
        """A cell of a row.

        Raises:
            DataError: a JSON line lacks it.
        """
        if name not in row:
            raise DataError(
                f"{where}: the column {name!r} is missing; the line has "
                + tables.listed(list(row))
            )
        return row[name]

    def text(self, row: dict, where: str) -> str:
        """The text, or the path of the image, of a row."""
        value = self.cell(row, self.inputs[0], where)
        if not isinstance(value, str):
            raise DataError(
                f"{where}: the column {self.inputs[0]!r} must be a string, not "
                f"{str(value)[:40]}"
            )
        return value

    def numbers(self, row: dict, where: str) -> list[float]:
        """The numbers of a row."""
        name = self.inputs[0]
        if self.vector:
            values = self.cell(row, name, where)
            if not isinstance(values, list):
                raise DataError(f"{where}: the column {name!r} must be a list")
            return [
                tables.number(v, f"{where}: {name!r}[{i}]")
                for i, v in enumerate(values)
            ]
        return [
            tables.number(self.cell(row, n, where), f"{where}: the column {n!r}")
            for n in self.inputs
        ]

    def label_names(self, row: dict, where: str) -> list[str]:
        """The labels of a row."""
        if self.label:
            cell = self.cell(row, self.label, where)
            return labelling.listed(cell, self.separator, f"{where}: {self.label!r}")
        return [
            name
            for name in self.labels
            if labelling.binary(self.cell(row, name, where), f"{where}: {name!r}")
        ]

    def side(self, row: dict, where: str) -> int:
        """TRAIN, VALIDATION or TEST."""
        cell = str(self.cell(row, self.split, where)).strip()
        if cell.lower() not in SIDES:
            raise DataError(
                f"{where}: {cell[:40]!r} in the column {self.split!r} is none of "
                + ", ".join(SIDES)
            )
        return SIDES[cell.lower()]


class Texts:
    """Texts, as numbers of words in the order in which these were first met."""

    def __init__(self, words: dict[str, int]):
        self._words = words
        self._ids, self._counts = array.array("i"), array.array("q")

    def add(self, columns: Columns, row: dict, where: str) -> None:
        """The next row."""
        found = tokens(columns.text(row, where))
        words = self._words
        self._ids.extend([words.setdefault(word, len(words)) for word in found])
        self._counts.append(len(found))

    def inputs(self) -> tuple[Ragged, tuple[str, ...]]:
        """All rows; feature names are made of the words of training rows, later."""
        offsets = np.concatenate([[0], np.cumsum(np.array(self._counts, np.int64))])
        return Ragged(np.array(self._ids, np.int32), offsets), ()


class Pictures:
    """Paths of images, relative to the file that names them."""

    def __init__(self, folder: str, side: int):
        self._folder, self._side = folder, side
        self._paths: list[str] = []

    def add(self, columns: Columns, row: dict, where: str) -> None:
        """The next row."""
        path = os.path.join(self._folder, columns.text(row, where))
        if not os.path.isfile(path):
            raise DataError(
                f"{where}: there is no image {path}: put it there, or take out the row"
            )
        self._paths.append(path)

    def inputs(self) -> tuple[Images, tuple[str, ...]]:
        """All rows, and no feature names."""
        return Images(tuple(self._paths), self._side), ()


class Numbers:
    """Real numbers, as many in each row."""

    def __init__(self, path: str, columns: Columns):
        self._path, self._columns = path, columns
        self._values, self._width = array.array("f"), None

    def add(self, columns: Columns, row: dict, where: str) -> None:
        """The next row."""
        numbers = columns.numbers(row, where)
        self._width = len(numbers) if self._width is None else self._width
        if len(numbers) != self._width or not numbers:
            raise DataError(
                f"{where}: {len(numbers)} numbers, but {self._width} in the first row: "
                "give each row as many"
            )
        if 4 * (len(self._values) + len(numbers)) > arff.LARGEST_DENSE:
            raise DataError(
                f"{where}: more numbers than fit {arff.LARGEST_DENSE} bytes: leave "
                "columns out, or write sparse ones as svmlight text"
            )
        self._values.extend(numbers)

    def inputs(self) -> tuple[Dense, tuple[str, ...]]:
        """All rows, and the feature names."""
        values = np.array(self._values, np.float32).reshape(-1, self._width)
        names = self._columns.inputs
        if self._columns.vector:
            names = tuple(f"{names[0]}[{i}]" for i in range(self._width))
        return Dense(values), names
