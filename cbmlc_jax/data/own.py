"""A user's own data: from files of several formats to a Dataset (docs/formats.md).

Labels and features are what the training file has (labels: or config.data.label_file
names); the vocabulary of texts is learnt from training rows alone.  What is given as
test or validation rows stays that; a test part that is not given is drawn.
"""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from cbmlc_jax.data import (
    arff,
    columns,
    labelling,
    npz,
    pipeline,
    reuters,
    svmlight,
    tables,
)
from cbmlc_jax.data.columns import TEST, TRAIN, VALIDATION, Columns
from cbmlc_jax.data.dataset import (
    UNKNOWN,
    DataError,
    Dataset,
    Dense,
    Ragged,
    Split,
)
from cbmlc_jax.data.images import Images

FORMATS = {
    ".arff": "arff",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".libsvm": "svmlight",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".svm": "svmlight",
    ".svmlight": "svmlight",
    ".tsv": "tsv",
    ".txt": "svmlight",
}
TABLES = ("csv", "tsv", "jsonl")
CHUNK = 1 << 16  # rows at once


@dataclasses.dataclass(frozen=True)
class Part:
    """What one file holds.

    Attributes:
        split: inputs (texts as numbers of words in the order of their discovery) and
            labels.
        label_names, feature_names: as in a Dataset.
        sides: int8 [N], TRAIN, VALIDATION or TEST, from a column; else all TRAIN.
    """

    split: Split
    label_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    sides: np.ndarray


def load(settings, folder: str | None) -> Dataset:
    """Reads what config.data describes.

    Args:
        settings: config.data.
        folder: a data folder, where relative paths may lie.

    Raises:
        DataError: a file is missing, malformed or too large, or files disagree; names
            the file, the line where it has one, and what to do.
    """
    reader = Reader(settings, folder)
    first = reader.read(settings.path)
    parts, sides = [first], [first.sides]
    for side, key in ((VALIDATION, "validation_path"), (TEST, "test_path")):
        if settings[key]:
            if (first.sides == side).any():
                raise DataError(
                    f"config.data.{key} is set, but config.data.split_column has such "
                    "rows, too: unset one of them"
                )
            parts.append(reader.read(settings[key], first))
            sides.append(np.full(len(parts[-1].split), side, np.int8))
    whole = _joined([part.split for part in parts])
    sides = np.concatenate(sides)
    _check_labels(whole.labels[sides == TRAIN], settings.path)
    test_from = "given"
    if not (sides == TEST).any():
        rows = np.flatnonzero(sides == TRAIN)
        sides[rows[_drawn(whole.labels[rows], settings)]] = TEST
        test_from = (
            f"drawn (stratified, fraction {settings.test_fraction:g}, seed "
            f"{settings.split_seed})"
        )
    feature_names = first.feature_names
    if reader.words is not None:
        feature_names, place = _vocabulary(
            whole.inputs.take(np.flatnonzero(sides == TRAIN)), list(reader.words)
        )
        ids = Ragged(place[whole.inputs.values], whole.inputs.offsets)
        whole = Split(ids, whole.labels)
    train = np.flatnonzero(sides != TEST)
    validation = np.flatnonzero(sides[train] == VALIDATION)
    stem = os.path.splitext(os.path.basename(settings.path.split(",")[0]))[0]
    return Dataset(
        name=f"own:{stem}",
        train=whole.take(train),
        test=whole.take(np.flatnonzero(sides == TEST)),
        label_names=first.label_names,
        feature_names=feature_names,
        label_texts=reader.label_texts or first.label_names,
        validation=validation if len(validation) else None,
        test_from=test_from,
    )


def form_of(settings, path: str) -> str:
    """The format of a file: config.data.format, else by the ending of its name.

    Raises:
        DataError: the ending says nothing.
    """
    if settings.format:
        return settings.format
    ending = os.path.splitext(path)[1].lower()
    if ending not in FORMATS:
        raise DataError(
            f"the name of {path} does not say its format: set config.data.format to "
            f"one of {', '.join(sorted(set(FORMATS.values())))}"
        )
    return FORMATS[ending]


def find(path: str, folder: str | None) -> str:
    """The path as it is given, or in the data folder.

    Raises:
        DataError: there is no such file.
    """
    for candidate in (path, os.path.join(folder or "", path)):
        if os.path.isfile(candidate):
            return candidate
    raise DataError(
        f"there is no file {path}"
        + (f", nor is it in {folder}" if folder else "")
        + ": correct the path (in config.data, or of --input)"
    )


class Reader:
    """Reads files of one data set.

    Args:
        settings: config.data.
        folder: a data folder, or None.

    Attributes:
        words: word -> its number, of all texts read so far; None for other inputs.
        label_texts: phrases of the labels, where config.data.label_file has them.
    """

    def __init__(self, settings, folder: str | None):
        self._settings, self._folder = settings, folder
        self._columns: Columns | None = None
        self.words: dict[str, int] | None = None
        self._names, self.label_texts = None, None
        if settings.label_file:
            path = find(settings.label_file, folder)
            names, texts = labelling.read_names(path)
            self._names, self.label_texts = tuple(names), tuple(texts)

    def read(self, path: str, first: Part | None = None) -> Part:
        """One file.

        Args:
            path: of the file.
            first: the training file, whose labels and features it has to have.

        Raises:
            DataError: see `load`.
        """
        form = form_of(self._settings, path)
        if form == "npz":
            return self._npz(path, first)
        path = find(path, self._folder)
        if form == "svmlight":
            return self._svmlight(path, first)
        if form == "arff":
            return self._arff(path, first)
        return self._table(path, form, first)

    def _files(self, paths: str) -> list[str]:
        """The one or two files of npz."""
        return [find(path, self._folder) for path in paths.split(",", 1)]

    def _svmlight(self, path: str, first: Part | None) -> Part:
        # Without a file of names, a label is what its number says.
        numbers = None
        if self._names is not None:
            numbers = range(len(self._names))
        elif first is not None:
            numbers = list(map(int, first.label_names))
        labels = labelling.Labels(numbers)
        features = None if first is None else first.feature_names
        rows, features, size = svmlight.read(path, labels, features)
        in_header = numbers is None and size is not None
        matrix, found = labels.matrix(path, range(size) if in_header else None)
        names = self._names or tuple(map(str, found))
        return _part(Split(rows, matrix), names, features)

    def _arff(self, path: str, first: Part | None) -> Part:
        names = self._names
        if names is None:
            header = list(arff.read_header(path))
            if not self._settings.label_columns:
                raise DataError(
                    f"{path}: set config.data.label_file to the XML file of its "
                    "labels, or config.data.label_columns to their attributes"
                )
            wanted = self._settings.label_columns
            names = tuple(tables.matching(wanted, header, "label_columns", path))
        dense = None if first is None else isinstance(first.split.inputs, Dense)
        features, split = arff.read_rows(path, names, dense=dense)
        labelling.size(path, *split.labels.shape)
        if first is not None:
            same(path, features, first.feature_names, "feature")
        return _part(split, names, features)

    def _npz(self, path: str, first: Part | None) -> Part:
        inputs, features, arrays = npz.inputs(self._files(path))
        labels = arrays.get("labels")
        if labels is None:
            raise DataError(
                f"{path} has no array `labels`: add it, or give the files of both as "
                "config.data.path=features.npz,labels.npz"
            )
        if labels.ndim != 2 or labels.shape[0] != len(inputs):
            raise DataError(
                f"{path}: the labels {labels.shape} must be a matrix of "
                f"{len(inputs)} rows, as the features"
            )
        labelling.size(path, *labels.shape)
        if scipy.sparse.issparse(labels):
            labels = labels.toarray()
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(
                f"{path}, row {row} (from 0): label {column} is "
                f"{labels[row, column]}, but a label must be 0 or 1"
            )
        names = self._names or npz.names(arrays, "label_names", labels.shape[1], path)
        if len(names) != labels.shape[1]:
            raise DataError(
                f"{path} has {labels.shape[1]} labels, but config.data.label_file "
                f"names {len(names)}"
            )
        if first is not None:
            same(path, features, first.feature_names, "feature")
            same(path, names, first.label_names, "label")
        return _part(Split(inputs, labels.astype(np.uint8)), names, features)

    def _table(self, path: str, form: str, first: Part | None) -> Part:
        rows = tables.rows(path, form)
        labels, sides, cells = None, array.array("b"), None
        for number, row in rows:
            where = f"{path}, line {number}"
            if cells is None:
                if self._columns is None:
                    self._columns = Columns.of(self._settings, row, path, self._names)
                names = self._names or self._columns.labels or None
                names = names if first is None else first.label_names
                labels = labelling.Labels(names)
                cells = self._cells(path)
            cells.add(self._columns, row, where)
            labels.add(self._columns.label_names(row, where), where)
            in_column = self._columns.split and first is None
            sides.append(self._columns.side(row, where) if in_column else TRAIN)
        matrix, names = labels.matrix(path)
        inputs, features = cells.inputs()
        if first is not None:
            same(path, features, first.feature_names, "feature")
        return Part(
            Split(inputs, matrix), tuple(names), features, np.array(sides, np.int8)
        )

    def _cells(self, path: str):
        if self._columns.kind == "text":
            self.words = {} if self.words is None else self.words
            return columns.Texts(self.words)
        if self._columns.kind == "image":
            return columns.Pictures(os.path.dirname(path), self._settings.side)
        return columns.Numbers(path, self._columns)


def _part(split: Split, label_names: Sequence[str], features: Sequence[str]) -> Part:
    sides = np.full(len(split), TRAIN, np.int8)
    return Part(split, tuple(label_names), tuple(features), sides)


def same(path: str, found: Sequence[str], wanted: Sequence[str], what: str) -> None:
    """Refuses other features or labels than those of the training file.

    Raises:
        DataError: names the first that differs.
    """
    if len(found) != len(wanted):
        raise DataError(
            f"{path} has {len(found)} {what}s, but {len(wanted)} are in the training "
            "file: both need the same ones, in the same order"
        )
    for here, there in zip(found, wanted, strict=True):
        if here != there:
            raise DataError(
                f"{path}: the {what} {here!r} stands where {there!r} is in the "
                "training file: both need the same ones, in the same order"
            )


def _joined(splits: list[Split]) -> Split:
    """The rows of several files, one file after the other."""
    if len(splits) == 1:
        return splits[0]
    labels = np.concatenate([split.labels for split in splits])
    inputs = [split.inputs for split in splits]
    if isinstance(inputs[0], Images):
        paths = tuple(path for some in inputs for path in some.paths)
        return Split(dataclasses.replace(inputs[0], paths=paths), labels)
    values = np.concatenate([some.values for some in inputs])
    if isinstance(inputs[0], Dense):
        return Split(Dense(values), labels)
    lengths = np.concatenate([some.lengths for some in inputs])
    weights = None
    if inputs[0].weights is not None:
        weights = np.concatenate([some.weights for some in inputs])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Split(Ragged(values, offsets, weights), labels)


def _drawn(labels: np.ndarray, settings) -> np.ndarray:
    """Rows of a test part, stratified."""
    size = int(settings.test_fraction * len(labels))
    if not 0 < size < len(labels):
        raise DataError(
            f"{settings.path}: {size} test rows of {len(labels)} rows: set "
            "config.data.test_fraction so that both sides get some, or "
            "config.data.test_path"
        )
    return pipeline.split_rows(
        labels,
        fraction=0.0,
        size=size,
        seed=settings.split_seed,
        stratified=True,
        stream="test split",
    )[1]


def _check_labels(labels: np.ndarray, path: str) -> None:
    """Refuses training rows that all have the same labels."""
    if len(labels) == 0:
        raise DataError(f"{path} has no training rows: check config.data.split_column")
    if (labels == labels[:1]).all():
        raise DataError(
            f"all {len(labels)} training rows of {path} have the same "
            f"{labels[0].sum()} of {labels.shape[1]} labels, so that there is nothing "
            "to learn: check config.data.label_column (label_columns, separator)"
        )


def _vocabulary(texts: Ragged, words: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The words of at least MIN_DOCUMENTS training rows, sorted, after `<unk>`; and
    the id of each of `words`, 0 for the others."""
    found_in = np.zeros(len(words), np.int64)
    for start in range(0, len(texts), CHUNK):
        some = texts.take(np.arange(start, min(start + CHUNK, len(texts))))
        row = np.repeat(np.arange(len(some)), some.lengths)
        distinct = np.unique(row * len(words) + some.values)
        found_in += np.bincount(distinct % len(words), minlength=len(words))
    known = sorted(
        words[i] for i in np.flatnonzero(found_in >= reuters.MIN_DOCUMENTS).tolist()
    )
    if not known:
        raise DataError(
            f"no word is in {reuters.MIN_DOCUMENTS} training texts: is "
            "config.data.text_column right?"
        )
    index = {word: i for i, word in enumerate(known, 1)}
    place = np.array([index.get(word, 0) for word in words], np.int32)
    return (UNKNOWN, *known), place
