"""Metrics of multi-label predictions: counts that merge, then scores from counts.

Notation: p predicted, y true, both 0/1 of [N, L]; tp, fp, fn as usual.
A ratio 0/0 is a policy: "nan" leaves the term out of the mean, "zero" counts it as 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

F1_NAMES = ("ebF1", "miF1", "maF1")
UNDEFINED = ("nan", "zero")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sufficient statistics of a set of rows; `a + b` is that of both sets.

    Attributes:
        tp, fp, fn: int64 [L].
        example_f1: sum over rows of 2 tp / (|y| + |p|), rows with 0/0 left out.
        undefined: number of rows with 0/0 (nothing true, nothing predicted).
        exact: number of rows predicted without an error.
        rows: number of rows.
    """

    tp: Int[np.ndarray, " labels"]
    fp: Int[np.ndarray, " labels"]
    fn: Int[np.ndarray, " labels"]
    example_f1: float
    undefined: int
    exact: int
    rows: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(
                getattr(self, f.name) + getattr(other, f.name)
                for f in dataclasses.fields(self)
            )
        )


def count(
    predicted: Bool[np.ndarray, "rows labels"], labels: Int[np.ndarray, "rows labels"]
) -> Counts:
    """Counts of 0/1 predictions against 0/1 labels, both [N, L]."""
    predicted, labels = predicted != 0, labels != 0
    hit = predicted & labels
    per_row = predicted.sum(1) + labels.sum(1)
    defined = per_row > 0
    return Counts(
        tp=hit.sum(0),
        fp=(predicted & ~labels).sum(0),
        fn=(labels & ~predicted).sum(0),
        example_f1=float(np.sum(2 * hit.sum(1)[defined] / per_row[defined])),
        undefined=int((~defined).sum()),
        exact=int((predicted == labels).all(1).sum()),
        rows=len(labels),
    )


def _check_policy(undefined: str) -> None:
    if undefined not in UNDEFINED:
        raise ValueError(f"0/0 policy {undefined!r} is not one of {UNDEFINED}")


def example_f1(counts: Counts, undefined: str = "nan") -> float:
    """ebF1: mean over rows of 2 tp / (|y| + |p|); LaMP's 0/0 policy by default."""
    _check_policy(undefined)
    n = counts.rows - (counts.undefined if undefined == "nan" else 0)
    return counts.example_f1 / n if n else 0.0


def micro_f1(counts: Counts) -> float:
    """miF1: 2 tp / (2 tp + fp + fn), pooled over labels; 0/0 is 0."""
    tp, errors = counts.tp.sum(), (counts.fp + counts.fn).sum()
    return float(2 * tp / (2 * tp + errors)) if tp + errors else 0.0


def label_f1(counts: Counts) -> Float[np.ndarray, " labels"]:
    """[L] F1 of each label; 0/0 is 0."""
    return 2 * counts.tp / np.maximum(2 * counts.tp + counts.fp + counts.fn, 1)


def macro_f1(counts: Counts, undefined: str = "zero") -> float:
    """maF1: mean over labels of their F1; MPVAE's 0/0 policy by default."""
    _check_policy(undefined)
    defined = (counts.tp + counts.fp + counts.fn) > 0
    n = defined.sum() if undefined == "nan" else len(defined)
    return float(label_f1(counts).sum() / n) if n else 0.0


def f1_scores(counts: Counts) -> dict[str, float]:
    """The three F1s under the default policies."""
    return {
        "ebF1": example_f1(counts),
        "miF1": micro_f1(counts),
        "maF1": macro_f1(counts),
    }


def subset_accuracy(counts: Counts) -> float:
    """Share of rows predicted without an error."""
    return counts.exact / counts.rows if counts.rows else 0.0


def hamming_loss(counts: Counts) -> float:
    """Share of wrong entries."""
    entries = counts.rows * len(counts.tp)
    return float((counts.fp + counts.fn).sum() / entries) if entries else 0.0


def per_label(counts: Counts) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and support of each label, each [L]; 0/0 is 0."""
    return {
        "precision": counts.tp / np.maximum(counts.tp + counts.fp, 1),
        "recall": counts.tp / np.maximum(counts.tp + counts.fn, 1),
        "f1": label_f1(counts),
        "support": counts.tp + counts.fn,
    }


def average_precision(
    scores: Float[np.ndarray, "rows labels"], labels: Int[np.ndarray, "rows labels"]
) -> Float[np.ndarray, " labels"]:
    """[L] area under each label's precision-recall steps; nan without positives.

    AP_l = mean over the positives of label l of the precision at their rank.  Tied
    scores share the precision at the end of their tie, so that AP does not depend on
    the order of the rows.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(labels != 0, order, axis=0)
    sorted_scores = np.take_along_axis(scores, order, axis=0)
    hits = np.cumsum(ranked, axis=0)
    rank = np.arange(1, len(scores) + 1)[:, None]
    # End of the tie: the next place where the score changes, looked up backwards.
    last = np.ones_like(ranked)
    last[:-1] = sorted_scores[1:] != sorted_scores[:-1]
    end = np.where(last, rank, len(scores) + 1)
    end = np.minimum.accumulate(end[::-1], axis=0)[::-1]
    precision = np.take_along_axis(hits, end - 1, axis=0) / end
    positives = ranked.sum(0)
    total = (precision * ranked).sum(0)
    return np.where(positives > 0, total / np.maximum(positives, 1), np.nan)


def mean_average_precision(
    scores: Float[np.ndarray, "rows labels"], labels: Int[np.ndarray, "rows labels"]
) -> float:
    """mAP: mean average precision over the labels that have a positive."""
    values = average_precision(scores, labels)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else 0.0


def precision_at_k(
    scores: Float[np.ndarray, "rows labels"],
    labels: Int[np.ndarray, "rows labels"],
    k: int,
) -> float:
    """P@k: mean share of true labels among the k best; ties go to the lower index."""
    k = min(k, scores.shape[1])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    hit = np.take_along_axis(labels != 0, best, axis=1)
    return float(hit.mean()) if hit.size else 0.0


def ranking(
    scores: Float[np.ndarray, "rows labels"], labels: Int[np.ndarray, "rows labels"]
) -> dict[str, float]:
    """mAP and P@1/3/5, for a result row."""
    return {
        "mAP": mean_average_precision(scores, labels),
        **{f"P@{k}": precision_at_k(scores, labels, k) for k in (1, 3, 5)},
    }
