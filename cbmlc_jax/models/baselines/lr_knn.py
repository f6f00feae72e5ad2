"""Logistic regression with a vote of the nearest neighbours mixed in."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Float, UInt8
from sklearn.neighbors import NearestNeighbors

from cbmlc_jax.models.baselines import logistic_regression as linear
from cbmlc_jax.models.baselines.estimator import Inputs, Params, pack, unpack

_CHUNK = 2048  # query rows at once: 2048 x N distances


@dataclasses.dataclass(frozen=True)
class LRkNN:
    """score = (1 - v) logistic regression + v sum_j s_j^2 y_j / sum_j s_j^2.

    j runs over the k training rows of the largest cosine s_j with the query, on the
    same tf-idf (or standardised) rows as the regression; a negative s_j counts 0.
    Where rows have weights w, w_j s_j^2 stands for s_j^2: a row of weight 2 is one
    neighbour, not two.

    Attributes:
        cost: C of the regression.
        neighbours: k; all rows where there are fewer.
        vote: v in [0, 1].
    """

    cost: float = 1.0
    neighbours: int = 15
    vote: float = 0.3

    def fit(
        self,
        inputs: Inputs,
        labels: UInt8[np.ndarray, "rows labels"],
        weights: Float[np.ndarray, " rows"] | None = None,
    ) -> Params:
        """The regression's parameters, the rows, their labels and weights."""
        params = linear.LogisticRegression(self.cost).fit(inputs, labels, weights)
        rows = linear.rescale(params["scale"], inputs).astype(np.float32)
        found = {"linear": params, "rows": pack(rows), "labels": labels}
        return found if weights is None else found | {"weights": weights}

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L]."""
        ours = linear.LogisticRegression(self.cost).scores(params["linear"], inputs)
        queries = linear.rescale(params["linear"]["scale"], inputs).astype(np.float32)
        theirs = cosine_vote(
            unpack(params["rows"]),
            np.asarray(params["labels"]),
            queries,
            self.neighbours,
            np.asarray(params["weights"]) if "weights" in params else None,
        )
        return (1 - self.vote) * ours + self.vote * theirs


def cosine_vote(
    rows: Inputs,
    labels: UInt8[np.ndarray, "rows labels"],
    queries: Inputs,
    neighbours: int,
    weights: Float[np.ndarray, " rows"] | None = None,
) -> Float[np.ndarray, "queries labels"]:
    """Mean label of the nearest rows, weighted by the squared cosine; 0 without any.

    Args:
        rows: [N, F] training rows.
        labels: [N, L].
        queries: [Q, F].
        neighbours: k.
        weights: [N] of the training rows; None: 1.
    """
    k = min(neighbours, rows.shape[0])
    index = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
    index.fit(rows)
    given = scipy.sparse.csr_array(labels.astype(np.float32))
    votes = np.zeros((queries.shape[0], labels.shape[1]), np.float32)
    for start in range(0, queries.shape[0], _CHUNK):
        distance, nearest = index.kneighbors(queries[start : start + _CHUNK])
        weight = np.clip(1 - distance, 0, 1).astype(np.float32) ** 2
        if weights is not None:
            weight *= weights[nearest]
        ends = np.arange(0, weight.size + 1, k)
        chosen = scipy.sparse.csr_array(
            (weight.ravel(), nearest.ravel(), ends),
            shape=(len(weight), rows.shape[0]),
        )
        total = np.maximum(weight.sum(1, keepdims=True), 1e-12)
        votes[start : start + _CHUNK] = (chosen @ given).toarray() / total
    return votes
