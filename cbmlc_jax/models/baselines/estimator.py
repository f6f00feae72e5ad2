"""Models without gradients: `fit(inputs, labels)`, then `scores(params, inputs)`.

An estimator is a frozen dataclass of settings without state, as a linen module is:
`fit` returns a tree of arrays, which is checkpointed as any model's parameters are (no
pickle), and `scores` is a pure function of that tree.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import scipy.sparse
from jaxtyping import Float, UInt8

# [N, F]: sparse for sets of features, dense for real values.
Inputs = scipy.sparse.csr_array | np.ndarray
# Names to arrays, nested; what a checkpoint can hold.
Params = dict[str, "np.ndarray | Params"]


class Estimator(Protocol):
    """A model that is fitted in one call."""

    def fit(self, inputs: Inputs, labels: UInt8[np.ndarray, "rows labels"]) -> Params:
        """Learns from inputs [N, F] and labels [N, L]; labels may be all 0 or 1.

        Those that config.noise.by_row may ask also take `added` [N], see `Split`, and
        those of `baselines.TAKES_WEIGHTS` `weights` float32 [N]; not both at once.
        Those of `baselines.TAKES_RATES` take `rates`, r0 and r1 of the labels.
        """

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L] scores in [0, 1]."""


def pack(matrix: Inputs) -> Params:
    """A matrix as a tree of arrays; `unpack` is its inverse."""
    if not scipy.sparse.issparse(matrix):
        return {"dense": np.asarray(matrix)}
    return {
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "shape": np.array(matrix.shape),
    }


def unpack(tree: Params) -> Inputs:
    """The matrix that `pack` took apart."""
    if "dense" in tree:
        return np.asarray(tree["dense"])
    parts = (np.asarray(tree[k]) for k in ("data", "indices", "indptr"))
    return scipy.sparse.csr_array(tuple(parts), shape=tuple(np.asarray(tree["shape"])))
