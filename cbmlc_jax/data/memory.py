"""Rows that are in memory already: what estimators are given, as a Dataset.

| rows | kind |
| --- | --- |
| lists of tokens (strings) | "sequence": ids in their order; the vocabulary is that of the training rows, at least `MIN_DOCUMENTS` of which have a word; others are `<unk>` |
| sparse matrix [N, F], every entry 1 | "set" |
| any other sparse matrix | "weighted" |
| array [N, F] | "numbers" |
"""  # noqa: E501

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from cbmlc_jax.data.dataset import (
    UNKNOWN,
    DataError,
    Dataset,
    Dense,
    Inputs,
    Ragged,
    Split,
)
from cbmlc_jax.data.reuters import MIN_DOCUMENTS
from cbmlc_jax.data.words import MAX_TOKENS

Rows = Sequence[Sequence[str]] | scipy.sparse.csr_array | np.ndarray


def kind_of(rows: Rows) -> str:
    """`Dataset.kind` of rows that are checked: see the table above."""
    if isinstance(rows, list):
        return "sequence"
    if not scipy.sparse.issparse(rows):
        return "numbers"
    return "set" if (rows.data == 1).all() else "weighted"


def tokens(rows: object) -> list[list[str]] | None:
    """Rows as lists of tokens; None where they are something else (numbers).

    Raises:
        DataError: some rows are lists of strings and others are not, or rows are texts.
    """
    one_column = getattr(rows, "ndim", 1) == 1 and hasattr(rows, "tolist")
    rows = rows.tolist() if one_column else rows
    if not isinstance(rows, list | tuple):
        return None
    if rows and isinstance(rows[0], str):
        raise DataError(
            "X holds texts: split each into a list of tokens, or make a matrix of them "
            "with scikit-learn's TfidfVectorizer"
        )
    first = next((r for r in rows if isinstance(r, list | tuple) and len(r)), None)
    if first is None or not isinstance(first[0], str):
        return None
    for number, row in enumerate(rows):
        if not isinstance(row, list | tuple) or not all(
            isinstance(token, str) for token in row
        ):
            raise DataError(
                f"row {number} of X (from 0) is no list of strings, as the others are: "
                f"{str(row)[:40]}"
            )
    return [list(row) for row in rows]


def feature_names(rows: Rows, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the columns, by default their numbers; of tokens, the vocabulary.

    Raises:
        DataError: no token is in `MIN_DOCUMENTS` rows.
    """
    if not isinstance(rows, list):
        return tuple(map(str, range(rows.shape[1]) if given is None else given))
    found_in = collections.Counter(token for row in rows for token in set(row))
    known = sorted(t for t, n in found_in.items() if n >= MIN_DOCUMENTS)
    if not known:
        raise DataError(
            f"no token of X is in {MIN_DOCUMENTS} rows: there is nothing to learn from"
        )
    return (UNKNOWN, *(t for t in known if t != UNKNOWN))


def inputs(rows: Rows, kind: str, names: Sequence[str]) -> Inputs:
    """Rows as a model reads them.

    Args:
        rows: tokens, or [N, F] finite numbers, sparse or not.
        kind: that of the training rows; sparse and dense are made into each other.
        names: of the features.

    Raises:
        DataError: tokens where the training rows were numbers, or the other way round.
    """
    if isinstance(rows, list) != (kind == "sequence"):
        wanted = "lists of tokens" if kind == "sequence" else "a matrix of numbers"
        raise DataError(f"X must be {wanted}, as it was in fit")
    if kind == "sequence":
        place = {name: i for i, name in enumerate(names)}
        return Ragged.from_rows(
            [[place.get(token, 0) for token in row[:MAX_TOKENS]] for row in rows]
        )
    if kind == "numbers":
        dense = rows.toarray() if scipy.sparse.issparse(rows) else rows
        return Dense(np.ascontiguousarray(dense, np.float32))
    matrix = scipy.sparse.csr_array(rows, dtype=np.float32, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    ids = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int64)
    return Ragged(*ids, None if kind == "set" else matrix.data)


def dataset(
    rows: Rows,
    labels: np.ndarray,
    *,
    label_names: Sequence[str],
    features: Sequence[str] | None = None,
    sample_weight: np.ndarray | None = None,
) -> Dataset:
    """A data set of training rows alone: its test part is empty.

    Args:
        rows: N of them, as `inputs` takes them.
        labels: uint8 [N, L].
        label_names: L phrases; word vectors are looked up for them.
        features: F names, or None.
        sample_weight: float32 [N], > 0, or None.

    Raises:
        DataError: see `feature_names`.
    """
    names = feature_names(rows, features)
    train = Split(
        inputs(rows, kind_of(rows), names), labels, sample_weight=sample_weight
    )
    return Dataset(
        name="memory",
        train=train,
        test=train.take(np.arange(0)),
        label_names=tuple(label_names),
        feature_names=names,
        label_texts=tuple(label_names),
        test_from="none",
    )
