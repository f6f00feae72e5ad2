"""Entries that anchor noise rates, and what rows that were refilled do to them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

LOWEST = 0.1  # share of the entries that anchor r0
STEPS = 100  # of the iteration for refilled rows, at most


def largest(values: Float[np.ndarray, " n"], k: int) -> Float[np.ndarray, " n"]:
    """[n] 1 for the k largest, 0 for the rest; ties at the boundary share their part.

    The sum is k.
    """
    cut = np.partition(values, len(values) - k)[len(values) - k]
    above, tied = values > cut, values == cut
    return above + tied * ((k - above.sum()) / tied.sum())


def spread(weight: np.ndarray, on: np.ndarray, rows: np.ndarray) -> float:
    """Standard error of the weighted mean of `on`, all [n], over independent rows."""
    residual = weight * (on - np.average(on, weights=weight))
    return float(np.sqrt(np.square(np.bincount(rows, residual)).sum()) / weight.sum())


def lowest(scores: np.ndarray, on: np.ndarray) -> tuple[float, float]:
    """r0 and its standard error, from the lowest-scored entries of [N, L]."""
    weight = largest(-scores.ravel(), max(1, int(LOWEST * on.size)))
    chosen = np.flatnonzero(weight)
    weight, ones = weight[chosen], on.ravel()[chosen]
    rows = chosen // on.shape[1]
    return float(np.average(ones, weights=weight)), spread(weight, ones, rows)


@dataclasses.dataclass(frozen=True)
class Anchors:
    """The highest-scored of some entries, n >= K of them where scores are tied.

    Attributes:
        rows, columns: int [n].
        weight: [n], sum K.
        on: bool [n].
        lone: bool [n], off, in a row of exactly one positive.
        following: mean label of the next 3 K entries.
    """

    rows: np.ndarray
    columns: np.ndarray
    weight: np.ndarray
    on: np.ndarray
    lone: np.ndarray
    following: float

    @classmethod
    def take(cls, scores, on, allowed, k: int) -> Anchors:
        """The k highest scores of [N, L] where `allowed`."""
        entries = np.flatnonzero(allowed.ravel())
        values = scores.ravel()[entries]
        first = largest(values, k)
        after = largest(values, 4 * k) - first
        following = np.average(on.ravel()[entries], weights=after)
        chosen = np.flatnonzero(first)
        rows, columns = np.divmod(entries[chosen], on.shape[1])
        lit = on[rows, columns]
        lone = ~lit & (on.sum(1)[rows] == 1)
        return cls(rows, columns, first[chosen], lit, lone, float(following))

    @functools.cached_property
    def _sums(self) -> tuple[float, float, float]:
        """Weight of all, of those that are on and of the `lone`."""
        weight = self.weight
        return weight.sum(), weight[self.on].sum(), weight[self.lone].sum()

    def share(self, refilled: float = 0.0) -> float:
        """Share of ones, where `refilled` of the `lone` anchors do not count."""
        everything, on, lone = self._sums
        counted = everything - refilled * lone
        return float(on / counted) if counted > 0 else 0.0

    def spread(self) -> float:
        """Standard error of `share`."""
        return spread(self.weight, self.on, self.rows)


def empty_rows(sizes: np.ndarray, lost: float) -> float:
    """Rows of clean positives that noise emptied, from the sizes of all others.

    A row of k >= 1 positives that each survive with probability 1 - r (and of any
    false ones) has a size with generating function G(z), G(-r / (1 - r)) = 0.  Rows
    that were empty have size 0, or 1 if they were refilled; n_0 is solved for.
    Above r = 1/2 the series would amplify the noise of the largest sizes.
    """
    z = -min(lost, 0.5) / (1 - min(lost, 0.5))
    powers = z ** np.arange(len(sizes))
    rest = (sizes[0] + sizes[1]) * z + sizes[2:] @ powers[2:]
    return float(np.clip(-rest / (1 - z), 0, sizes[0] + sizes[1]))


def survival(anchors: Anchors, sizes: np.ndarray) -> tuple[float, float]:
    """P(1->0) before rows are refilled, and the number of refilled rows.

    An anchor that is off beside a single positive may owe this to the refilling of a
    row that had lost all of its ones: of rows of two positives a share r / (2 - r),
    and of all rows of size 1 a share refilled / sizes[1].  The smaller share of such
    anchors does not count; as it depends on r, both are found by iteration.
    """
    lost, refilled = 1 - anchors.share(), 0.0
    for _ in range(STEPS):
        before = lost
        refilled = max(0.0, empty_rows(sizes, lost) - sizes[0])
        ignored = min(lost / (2 - lost), refilled / max(sizes[1], 1))
        # Halfway: the more was lost, the more is ignored, so that full steps may swing.
        lost = (lost + 1 - anchors.share(ignored)) / 2
        if abs(lost - before) < 1e-9:
            break
    return lost, refilled
