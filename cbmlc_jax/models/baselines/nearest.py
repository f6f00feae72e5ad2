"""The nearest of stored rows, all looked at; of equally near ones the first.

Rows of words are equally near to another more often than not.  scikit-learn's search
then takes any of them; here the choice is a rule, so that an exported model, which sums
in another order, makes it too: nearness is computed in float64 from float32 numbers and
rounded to float32, which leaves equals equal, and the first of the highest are taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from cbmlc_jax.models.baselines.estimator import Inputs

_AT_ONCE = 1 << 22  # pairs of rows in memory: 32 MB, and a few arrays like them


def centre(rows: Inputs) -> Float[np.ndarray, " features"]:
    """What is taken from rows before distances are: about their mean; 0 of sparse ones.

    Distances do not change by it, and numbers far from 0 keep their digits.  It is a
    multiple of a power of 2 next to the deviation: small whole numbers stay exact.
    """
    if scipy.sparse.issparse(rows):
        return np.zeros(rows.shape[1], np.float32)
    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    step = 2 ** np.ceil(np.log2(np.where(deviation > 0, deviation, 1)))
    return (np.rint(mean / step) * step).astype(np.float32)


def by_distance(
    rows: Inputs, k: int, queries: Inputs | None = None
) -> Iterator[Int[np.ndarray, "queries k"]]:
    """Numbers of the k rows of least Euclidean distance, ascending, for some queries.

    Args:
        rows: [N, F].
        k: at most N (N - 1 without queries).
        queries: [Q, F]; None: each row among the others.
    """
    middle = centre(rows)
    rows = _moved(rows, middle)
    asked = rows if queries is None else _moved(queries, middle)
    square = (rows * rows).sum(1)
    for start, product in _products(rows, asked):
        near = (2 * product - square).astype(np.float32)  # |query|^2 - distance^2
        if queries is None:
            own = np.arange(len(near))
            near[own, start + own] = -np.inf
        yield _highest(near, k)


def by_cosine(
    rows: Inputs, k: int, queries: Inputs
) -> Iterator[tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]]:
    """Cosines, and numbers, of the k rows of largest cosine; by number, ascending.

    Args:
        rows: [N, F] of length 1, or 0.
        k: at most N.
        queries: [Q, F], as the rows.
    """
    for _, product in _products(_moved(rows), _moved(queries)):
        near = product.astype(np.float32)
        chosen = _highest(near, k)
        yield np.take_along_axis(near, chosen, axis=1), chosen


def _moved(rows: Inputs, middle: Float[np.ndarray, " features"] | None = None):
    """Rows in float64, of float32 numbers; less `middle`, where they are dense."""
    if middle is not None and not scipy.sparse.issparse(rows):
        rows = rows - middle
    return rows.astype(np.float32).astype(np.float64)


def _products(rows: Inputs, queries: Inputs) -> Iterator[tuple[int, np.ndarray]]:
    """First number, and inner products [q, N], of some queries at a time."""
    size = max(1, _AT_ONCE // max(rows.shape[0], 1))
    for start in range(0, queries.shape[0], size):
        product = queries[start : start + size] @ rows.T
        yield start, product.toarray() if scipy.sparse.issparse(product) else product


def _highest(
    near: Float[np.ndarray, "queries rows"], k: int
) -> Int[np.ndarray, "queries k"]:
    """Columns of each row's k highest values, of equal ones the first; ascending."""
    lowest = near.shape[1] - k
    cut = np.partition(near, lowest, axis=1)[:, lowest : lowest + 1]
    chosen = near >= cut
    crowded = np.flatnonzero(np.count_nonzero(chosen, axis=1) > k)
    if len(crowded):
        above, tied = near[crowded] > cut[crowded], near[crowded] == cut[crowded]
        room = k - np.count_nonzero(above, axis=1)
        chosen[crowded] = above | (tied & (np.cumsum(tied, axis=1) <= room[:, None]))
    return np.nonzero(chosen)[1].reshape(len(near), k)
