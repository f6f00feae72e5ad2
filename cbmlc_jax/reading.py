"""Rows to predict, from a file: JSON lines, ARFF, or a folder of images.

Each kind of data set has its own parser of a row (`data.parsers`); what they have in
common is that a mistake names the file and the line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from cbmlc_jax.data import arff, labelling, npz, own, svmlight, tables
from cbmlc_jax.data.columns import Columns
from cbmlc_jax.data.dataset import DataError, Inputs
from cbmlc_jax.data.parsers import KINDS, Pictures

CHUNK = 4096  # rows at once: memory does not grow with the file
IMAGES = (".jpg", ".jpeg", ".png")


def read(
    path: str,
    kind: str,
    feature_names: Sequence[str],
    label_names: Sequence[str],
    settings,
) -> Iterator[Inputs]:
    """Inputs in chunks of `CHUNK` rows, from an ARFF file of the header of the training
    data, a folder of images, JSON lines, or a file of the user's own format.

    Args:
        path: of the file or folder.
        kind: "images" or one of `parsers.KINDS`, which say what a JSON line holds.
        feature_names: F names that the model was trained on.
        label_names: attributes of an ARFF file that are no features.
        settings: config.data of the training.

    Raises:
        DataError: names the file and the line.
    """
    if kind == "images":
        parser = Pictures(os.path.dirname(path), settings.side)
        if os.path.isdir(path):
            names = sorted(n for n in os.listdir(path) if n.lower().endswith(IMAGES))
            if not names:
                raise DataError(f"{path} has no {', '.join(IMAGES)} files")
            rows = [os.path.join(path, name) for name in names]
            for start in range(0, len(rows), CHUNK):
                yield parser.join(rows[start : start + CHUNK])
            return
    else:
        parser = KINDS[kind](feature_names)
        whole = None
        if path.lower().endswith(".arff"):
            numbers = kind == "numbers"
            whole = arff.read_inputs(path, feature_names, label_names, dense=numbers)
        elif settings.name == "own":
            whole = _whole(path, settings, feature_names, label_names)
        if whole is not None:
            for start in range(0, len(whole), CHUNK):
                yield whole.take(np.arange(start, min(start + CHUNK, len(whole))))
            return
    if settings.name == "own" and _is_table(settings):
        source = _table_rows(path, settings, feature_names, label_names)
    else:
        source = (
            (f"{path}, line {number}", row)
            for number, row in tables.rows(path, "jsonl")
        )
    rows = []
    for where, row in source:
        rows.append(parser.row(row, where))
        if len(rows) == CHUNK:
            yield parser.join(rows)
            rows = []
    if rows:
        yield parser.join(rows)
    parser.close()


def _is_table(settings) -> bool:
    """Whether the rows to predict are those of a table, as the training rows were."""
    return own.form_of(settings, settings.path) in own.TABLES


def _table_rows(
    path: str, settings, feature_names: Sequence[str], label_names: Sequence[str]
) -> Iterator[tuple[str, dict]]:
    """Where a row of a table to predict is, and the row in the form of JSON
    lines that the parsers know: {"text": ...}, {"image": ...} or {"features": ...}.

    Labels may be there; they are only compared with those of the model.

    Raises:
        DataError: names the file and the line.
    """
    label, labels = settings.label_column, labelling.Labels(label_names)
    column = settings.text_column or settings.image_column
    vector = (feature_names or [""])[0].removesuffix("[0]")
    wanted = (column,) if column else tuple(feature_names)
    mine = Columns("", wanted, False, label, (), settings.separator, "")
    for number, row in tables.rows(path, own.form_of(settings, path)):
        where = f"{path}, line {number}"
        if label in row:
            labels.add(mine.label_names(row, where), where)
        if column:
            kind = "text" if settings.text_column else "image"
            yield where, {kind: mine.text(row, where)}
        elif isinstance(row.get(vector), list):
            yield where, {"features": row[vector]}
        else:
            yield where, {"features": mine.numbers(row, where)}


def _whole(
    path: str, settings, feature_names: Sequence[str], label_names: Sequence[str]
) -> Inputs | None:
    """All rows of an svmlight or npz file; None for a file of another format."""
    form = own.form_of(settings, path)
    if form == "npz":
        inputs, names, _ = npz.inputs([path])
        own.same(path, names, feature_names, "feature")
        return inputs
    if form != "svmlight":
        return None
    numbers = range(len(label_names))
    if not settings.label_file:
        numbers = list(map(int, label_names))
    labels = labelling.Labels(numbers)
    return svmlight.read(path, labels, tuple(feature_names))[0]
