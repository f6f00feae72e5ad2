"""What scikit-learn calls y -> labels uint8 [N, L] and their classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d

from cbmlc_jax.data.dataset import DataError


def refuse_names(y: object) -> None:
    """Refuses sets of label names, which scikit-learn's own checks name "ragged".

    Raises:
        DataError: y is a list of them.
    """
    rows = y if isinstance(y, list | tuple) else ()
    for row in rows:
        listed = isinstance(row, list | tuple) and any(isinstance(v, str) for v in row)
        if listed or isinstance(row, set | frozenset):
            raise DataError(
                "y holds the names of each row's labels: make a matrix of 0 and 1 of "
                "them with scikit-learn's MultiLabelBinarizer, and give its classes_ "
                "as label_names"
            )


def encoded(y: np.ndarray | scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Labels and classes.

    Args:
        y: [N, L] of 0 and 1, or [N] (or [N, 1]) of two classes, which are one label:
            the second class in sorted order is 1.

    Returns:
        uint8 [N, L]; and the numbers of the labels [L], or the two classes.

    Raises:
        DataError: other values, or rows that all have the same labels.
        ValueError: scikit-learn's, for a y of real numbers.
    """
    y = y.toarray() if scipy.sparse.issparse(y) else y
    if y.ndim == 2 and y.shape[1] != 1:
        labels, classes = _indicators(y), np.arange(y.shape[1])
    else:
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind != "binary":
            raise DataError(
                "Only binary classification is supported. The type of the target is "
                f"{kind}: give a matrix with a column of 0 and 1 for each label, which "
                "scikit-learn's LabelBinarizer makes"
            )
        classes, labels = np.unique(y, return_inverse=True)
        labels = labels.astype(np.uint8)[:, None]
    if (labels == labels[:1]).all():
        raise DataError(
            f"all {len(labels)} rows have the same labels, one class alone: there is "
            "nothing to learn"
        )
    return labels, classes


def _indicators(y: np.ndarray) -> np.ndarray:
    wrong = (y != 0) & (y != 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"y[{row}, {column}] is {y[row, column]}, but a label must be 0 or 1"
        )
    return y.astype(np.uint8)


def names(given: Sequence[object] | None, count: int) -> tuple[str, ...]:
    """Names of the labels, by default their numbers.

    Raises:
        DataError: not as many as labels, or one twice.
    """
    found = tuple(map(str, range(count) if given is None else given))
    if len(found) != count or len(set(found)) != count:
        raise DataError(
            f"label_names has {len(found)} names, {len(set(found))} of them different, "
            f"but y has {count} labels: give each column of y a name of its own"
        )
    return found
