"""Paired bootstrap over test rows: how sure is a difference of two F1s?

The test rows are drawn anew, with replacement, and both systems are scored on the same
draw; the spread of the differences is what the choice of test rows explains.  With
several seeds a system's score on a draw is the mean over its runs; the spread over
seeds is not in the interval (the tables give it as a standard deviation).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Float

from cbmlc_jax import metrics, rngs
from cbmlc_jax.details import Predictions

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # weights in memory


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours minus another's.

    Attributes:
        difference: on the test rows as they are.
        low, high: 2.5 and 97.5 % of the differences on the draws.
        p: two-sided, min(1, 2 min(#(d <= 0), #(d >= 0)) / B), with one draw added to
            both counts and to B (so that it is never 0).
    """

    difference: float
    low: float
    high: float
    p: float


def resampled(
    runs: list[Predictions], number: int = RESAMPLES, seed: int = 0
) -> dict[str, Float[np.ndarray, " draws"]]:
    """{F1: its mean over the runs on each draw [B]}.

    The draws depend on the seed and on the number of rows alone: two calls are paired.

    Args:
        runs: of one system, on the same test rows.
        number: B.
        seed: of the draws.
    """
    rows = len(runs[0].labels)
    generator = rngs.generator(seed, "bootstrap")
    sums = [{n: _Sums(run, n) for n in metrics.F1_NAMES} for run in runs]
    found = {name: [] for name in metrics.F1_NAMES}
    done = 0
    while done < number:
        size = min(max(1, _AT_ONCE // rows), number - done)
        weights = _weights(generator, size, rows)
        for name in metrics.F1_NAMES:
            found[name].append(np.mean([s[name].scores(weights) for s in sums], axis=0))
        done += size
    return {name: np.concatenate(parts) for name, parts in found.items()}


def compare(
    difference: float,
    ours: Float[np.ndarray, " draws"],
    other: Float[np.ndarray, " draws"],
) -> Comparison:
    """The comparison of two systems from their scores on the same draws.

    Args:
        difference: of their scores on the test rows as they are.
        ours, other: [B] of `resampled`.
    """
    d = ours - other
    low, high = np.quantile(d, [0.025, 0.975])
    tail = min(np.sum(d <= 0), np.sum(d >= 0)) + 1
    p = min(1.0, 2 * tail / (len(d) + 1))
    return Comparison(difference, float(low), float(high), float(p))


def _weights(
    generator: np.random.Generator, size: int, rows: int
) -> Float[np.ndarray, "draws rows"]:
    """How often each row is in each draw."""
    drawn = generator.integers(rows, size=(size, rows))
    drawn += np.arange(size)[:, None] * rows
    counts = np.bincount(drawn.ravel(), minlength=size * rows)
    return counts.reshape(size, rows).astype(np.float64)


class _Sums:
    """What one F1 of one run needs of each row, to be summed with weights."""

    def __init__(self, run: Predictions, name: str):
        self._name = name
        predicted, labels = run.predicted[name], run.labels
        if name == "maF1":
            # By label, transposed for (labels x rows) @ (rows x draws).
            self._hits = _sparse(predicted & labels)
            self._sizes = _sparse(predicted) + _sparse(labels)
            return
        hits = (predicted & labels).sum(1).astype(np.float64)
        sizes = predicted.sum(1) + labels.sum(1).astype(np.float64)
        if name == "ebF1":
            hits, sizes = hits / np.maximum(sizes, 1), (sizes > 0).astype(np.float64)
        self._hits, self._sizes = hits, sizes

    def scores(
        self, weights: Float[np.ndarray, "draws rows"]
    ) -> Float[np.ndarray, " draws"]:
        """2 sum hits / sum sizes; 0/0 is 0.  For maF1 the mean of it over labels."""
        if self._name == "maF1":
            hits, sizes = self._hits @ weights.T, self._sizes @ weights.T
            return np.mean(2 * hits / np.maximum(sizes, 1), axis=0)
        hits, sizes = weights @ self._hits, weights @ self._sizes
        return 2 * hits / np.maximum(sizes, 1)


def _sparse(entries: np.ndarray) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(entries.T, dtype=np.float64)
