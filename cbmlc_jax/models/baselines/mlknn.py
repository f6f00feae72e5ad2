"""MLkNN: the neighbours' label counts, turned into probabilities by Bayes' rule.

M.-L. Zhang and Z.-H. Zhou, "ML-kNN: A lazy learning approach to multi-label
learning", Pattern Recognition 40 (2007) 2038-2048.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int, UInt8

from cbmlc_jax.models.baselines import nearest
from cbmlc_jax.models.baselines.estimator import Inputs, Params, pack, unpack

_CHUNK = 2048  # rows at once: 2048 x L counts


@dataclasses.dataclass(frozen=True)
class MLkNN:
    """score_l = P(H_l = 1 | c_l), c_l of the k nearest training rows having label l.

        P(H_l = 1)       = (s + n_l) / (2 s + N)
        P(c | H_l = h)   = (s + m_hl[c]) / ((k + 1) s + sum_c' m_hl[c'])
        P(H_l = 1 | c_l) = P(H_l = 1) P(c_l | H_l = 1)
                           / sum_h P(H_l = h) P(c_l | H_l = h)

    n_l counts the training rows with label l; m_1l[c] (m_0l[c]) those with (without)
    label l that have c of their k neighbours with it.  A row is never among its own
    neighbours, also where others equal it.  Distances are Euclidean, on the inputs as
    they are; of equally distant rows the first are taken.

    The published rule predicts where the score is above 1/2.

    Attributes:
        neighbours: k; all other rows where there are fewer.
        smoothing: s > 0.
    """

    neighbours: int = 10
    smoothing: float = 1.0

    def __post_init__(self):
        if self.neighbours < 1:
            raise ValueError(f"neighbours is {self.neighbours}, must be at least 1")
        if not self.smoothing > 0:
            raise ValueError(f"smoothing is {self.smoothing}, must be above 0")

    def fit(self, inputs: Inputs, labels: UInt8[np.ndarray, "rows labels"]) -> Params:
        """The rows, their labels, and the probabilities above.

        Returns:
            rows: `pack`ed [N, F]; labels: uint8 [N, L]; prior: float64 [L];
            present, absent: float64 [L, k + 1], P(c | H_l = 1) and P(c | H_l = 0).

        Raises:
            ValueError: there are fewer than two rows.
        """
        if len(labels) < 2:
            raise ValueError(f"MLkNN has {len(labels)} training rows, needs 2 or more")
        k, s = min(self.neighbours, len(labels) - 1), self.smoothing
        found = np.concatenate(list(nearest.by_distance(inputs, k)))
        present, absent = _histograms(found, labels)
        return {
            "rows": pack(inputs),
            "labels": labels,
            "prior": (s + labels.sum(0, dtype=np.float64)) / (2 * s + len(labels)),
            "present": _smooth(present, s),
            "absent": _smooth(absent, s),
        }

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L] posterior probabilities."""
        labels, by_count = np.asarray(params["labels"]), posterior(params)
        k, rows = len(by_count) - 1, unpack(params["rows"])
        scores = np.empty((inputs.shape[0], labels.shape[1]), np.float32)
        start = 0
        for found in nearest.by_distance(rows, k, inputs):
            counts = neighbour_counts(found, labels)
            end = start + len(found)
            scores[start:end] = np.take_along_axis(by_count, counts, axis=0)
            start = end
        return scores


def posterior(params: Params) -> Float[np.ndarray, "bins labels"]:
    """P(H_l = 1 | c), float32 [k + 1, L]."""
    prior = np.asarray(params["prior"])[:, None]
    present = prior * np.asarray(params["present"])
    absent = (1 - prior) * np.asarray(params["absent"])
    return (present / (present + absent)).T.astype(np.float32)


def neighbour_counts(
    found: Int[np.ndarray, "rows k"], labels: UInt8[np.ndarray, "others labels"]
) -> Int[np.ndarray, "rows labels"]:
    """c[i, l] = sum_j labels[found[i, j], l], as a sparse product."""
    rows, k = found.shape
    chosen = scipy.sparse.csr_array(
        (np.ones(found.size, np.int64), found.ravel(), np.arange(rows + 1) * k),
        shape=(rows, len(labels)),
    )
    return (chosen @ scipy.sparse.csr_array(labels)).toarray()


def _histograms(
    found: Int[np.ndarray, "rows k"], labels: UInt8[np.ndarray, "rows labels"]
) -> tuple[Int[np.ndarray, "labels bins"], Int[np.ndarray, "labels bins"]]:
    """m_1 and m_0, each [L, k + 1]: rows by their neighbours' count of each label."""
    bins, number = found.shape[1] + 1, labels.shape[1]
    present, every = np.zeros((2, number * bins), np.int64)
    for start in range(0, len(labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        cell = neighbour_counts(found[part], labels) + np.arange(number)[None] * bins
        every += np.bincount(cell.ravel(), minlength=len(every))
        present += np.bincount(cell[labels[part] != 0], minlength=len(every))
    return present.reshape(-1, bins), (every - present).reshape(-1, bins)


def _smooth(
    histogram: Int[np.ndarray, "labels bins"], s: float
) -> Float[np.ndarray, "labels bins"]:
    """(s + m_l[c]) / ((k + 1) s + sum_c' m_l[c'])."""
    smoothed = s + histogram
    return smoothed / smoothed.sum(1, keepdims=True)
