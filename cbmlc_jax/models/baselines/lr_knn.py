"""Logistic regression with a vote of the nearest neighbours mixed in."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, UInt8
from sklearn.preprocessing import normalize

from cbmlc_jax.models.baselines import logistic_regression as linear
from cbmlc_jax.models.baselines import nearest
from cbmlc_jax.models.baselines.estimator import Inputs, Params, pack, unpack


@dataclasses.dataclass(frozen=True)
class LRkNN:
    """score = (1 - v) logistic regression + v sum_j s_j^2 y_j / sum_j s_j^2.

    j runs over the k training rows of the largest cosine s_j with the query, of equal
    ones the first, on the same tf-idf (or standardised) rows as the regression; a
    negative s_j counts 0.
    With rates of added labels see `cosine_vote`.
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
        labels: UInt8[np.ndarray, "rows labels"] | Float[np.ndarray, "rows labels"],
        added: Float[np.ndarray, " rows"] | None = None,
        weights: Float[np.ndarray, " rows"] | None = None,
        ignored: Bool[np.ndarray, "rows labels"] | None = None,
    ) -> Params:
        """The regression's parameters, the rows, their labels, rates and weights.

        `ignored` entries count neither in the regression nor in a vote.
        """
        regression = linear.LogisticRegression(self.cost)
        params = regression.fit(inputs, labels, added, weights, ignored)
        rows = pack(_unit_rows(params["scale"], inputs))
        stored = {"linear": params, "rows": rows, "labels": labels}
        given = {"added": added, "weights": weights, "ignored": ignored}
        return stored | {k: v for k, v in given.items() if v is not None}

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L]."""
        ours = linear.LogisticRegression(self.cost).scores(params["linear"], inputs)
        queries = _unit_rows(params["linear"]["scale"], inputs)
        theirs = cosine_vote(
            unpack(params["rows"]),
            np.asarray(params["labels"]),
            queries,
            self.neighbours,
            params.get("added"),
            params.get("weights"),
            params.get("ignored"),
        )
        return (1 - self.vote) * ours + self.vote * theirs


def _unit_rows(scale: Params, inputs: Inputs) -> Inputs:
    """The regression's rows at length 1, float32."""
    return normalize(linear.rescale(scale, inputs)).astype(np.float32)


def trust(
    added: Float[np.ndarray, " rows"], labels: UInt8[np.ndarray, "rows labels"]
) -> Float[np.ndarray, " rows"]:
    """1 / variance of (y - a) / (1 - a), over its largest value: float32 [N].

    The variance is (a (1 - a) + m) / (1 - a)^2, with m the mean of (y - a) over all
    entries.

    Args:
        added: [N] rates a of labels that were added to the rows.
        labels: [N, L].
    """
    mean = max(float(labels.mean() - added.mean()), 1e-6)
    found = (1 - added) ** 2 / (added * (1 - added) + mean)
    return found / found.max()


def cosine_vote(
    rows: Inputs,
    labels: UInt8[np.ndarray, "rows labels"],
    queries: Inputs,
    neighbours: int,
    added: Float[np.ndarray, " rows"] | None = None,
    weights: Float[np.ndarray, " rows"] | None = None,
    ignored: Bool[np.ndarray, "rows labels"] | None = None,
) -> Float[np.ndarray, "queries labels"]:
    """Mean label of the nearest rows, weighted by the squared cosine; 0 without any.

    With rates a_j of labels that were added to row j, its label counts as
    (y_j - a_j) / (1 - a_j), unbiased for a label that holds and was kept, and its
    weight is multiplied by `trust`; the mean is cut to [0, 1].

    Args:
        rows: [N, F] training rows, of length 1 (or 0).
        labels: [N, L].
        queries: [Q, F], as the rows.
        neighbours: k.
        added: [N], or None: nothing was.
        weights: [N] of the training rows; None: 1.
        ignored: [N, L] labels that are not known: their row has no vote on them.
    """
    k = min(neighbours, rows.shape[0])
    given, known, worth = voters(labels, added, weights, ignored)
    if added is None:
        given = scipy.sparse.csr_array(given.astype(np.float32))
    if known is not None:
        known = known.astype(np.float32)
    votes = np.zeros((queries.shape[0], labels.shape[1]), np.float32)
    start = 0
    for cosine, found in nearest.by_cosine(rows, k, queries):
        weight = np.clip(cosine, 0, 1) ** 2 * worth[found]
        ends = np.arange(0, weight.size + 1, k)
        chosen = scipy.sparse.csr_array(
            (weight.ravel(), found.ravel(), ends), shape=(len(weight), rows.shape[0])
        )
        vote = chosen @ given
        vote = vote if isinstance(vote, np.ndarray) else vote.toarray()
        total = weight.sum(1, keepdims=True) if known is None else chosen @ known
        part = slice(start, start + len(found))
        votes[part] = np.clip(vote / np.maximum(total, 1e-12), 0, 1)
        start += len(found)
    return votes


def voters(
    labels: UInt8[np.ndarray, "rows labels"],
    added: Float[np.ndarray, " rows"] | None,
    weights: Float[np.ndarray, " rows"] | None,
    ignored: Bool[np.ndarray, "rows labels"] | None,
) -> tuple[np.ndarray, np.ndarray | None, Float[np.ndarray, " rows"]]:
    """What the training rows say in a vote, all as in `cosine_vote`.

    Returns:
        Their labels [N, L], corrected for what was added, 0 where not known; bool
        [N, L] of those that are known, None where all are; and their weights [N].
    """
    worth = np.ones(len(labels), np.float32)
    given, known = np.asarray(labels), None
    if added is not None:
        a = np.asarray(added, np.float32)[:, None]
        worth = trust(a[:, 0], given)
        given = (given.astype(np.float32) - a) / (1 - a)
    if weights is not None:
        worth = worth * np.asarray(weights, np.float32)
    if ignored is not None:
        known = ~np.asarray(ignored)
        given = np.where(known, given, 0)
    return given, known, worth
