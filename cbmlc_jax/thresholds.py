"""Thresholds on scores, by four protocols; one threshold for each F1.

    oracle         best on the test labels: what the paper reports, no honest score
    clean_val      best on clean validation labels
    noisy_val      best on the noisy validation labels: honest, collapses under noise
    corrected_val  best on the F1 that the noisy validation labels would show without
                   their noise, given its rates: honest, and the one to use

A label is predicted where score >= threshold.  `corrected_curves` estimates are used
to choose (threshold, epoch, hyper-parameters), never reported as a score.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from cbmlc_jax import metrics

PROTOCOLS = ("oracle", "clean_val", "noisy_val", "corrected_val")
GRID = np.round(np.concatenate([np.arange(1, 11) / 100, np.arange(3, 20) / 20]), 2)
# For the thousands of rows that cross-fitting scores; the paper's grid, the one of
# `oracle`, jumps from .10 to .15, where most of the honest thresholds lie.
FINE_GRID = np.round(np.arange(2, 80) / 100, 2)
# Below this share of surviving information the correction only amplifies noise.
LEAST_INFORMATION = 0.05
# A label whose best F1 is near 0 would be said of every row, if an F1 decided alone.
LEAST_PROBABILITY = 0.05


@dataclasses.dataclass(frozen=True)
class Rates:
    """Noise rates of the training labels.

    Attributes:
        r0: P(0->1), the share of negatives that were turned on.
        r1: P(1->0), the share of positives that were turned off.
        source: "known" (realised by the injector), "given" (by the user, in
            config.noise.r0 and r1) or "estimated".
        doubt: why an estimate is not to be used; "" where it is.
        partial: `doubt` is of r1 alone; the rates are used all the same, with an r1
            that is a guess, or 0: then labels that were added are corrected, and lost
            ones are not.
    """

    r0: float
    r1: float
    source: str = "known"
    doubt: str = ""
    partial: bool = False

    @property
    def information(self) -> float:
        """1 - r0 - r1: the slope of E[noisy label | clean label]."""
        return 1.0 - self.r0 - self.r1

    @property
    def usable(self) -> bool:
        """Whether labels can be corrected with these rates."""
        certain = self.partial or not self.doubt
        return certain and self.information >= LEAST_INFORMATION

    @property
    def reason(self) -> str:
        """Why labels cannot be corrected with them, or not in full, in words."""
        if self.partial:
            return (
                f"P(1->0) could not be estimated ({self.doubt}) and counts as "
                f"{self.r1:.3g}"
            )
        if self.doubt:
            return f"the noise rates could not be estimated ({self.doubt})"
        return (
            f"the noise rates r0={self.r0:.3f}, r1={self.r1:.3f} leave no information"
        )


def above(
    scores: Float[np.ndarray, "rows labels"],
    weights: Float[np.ndarray, "rows labels"] | None,
    axis: int,
    grid: np.ndarray,
) -> Float[np.ndarray, "thresholds n"]:
    """Sum of `weights` (1 by default) over `axis` where score >= t, for every t.

    One histogram over the grid instead of a pass over [N, L] per threshold.
    """
    passed = np.searchsorted(grid, scores.astype(np.float64), side="right")
    n, bins = scores.shape[1 - axis], len(grid) + 1
    cell = np.arange(n)
    cell = cell[None, :] if axis == 0 else cell[:, None]
    index = (cell * bins + passed).ravel()
    flat = None if weights is None else weights.ravel()
    histogram = np.bincount(index, flat, minlength=n * bins).reshape(n, bins)
    return histogram[:, ::-1].cumsum(1)[:, ::-1][:, 1:].T


def f1_curves(
    scores: Float[np.ndarray, "rows labels"],
    labels: Int[np.ndarray, "rows labels"],
    grid: np.ndarray = GRID,
) -> dict[str, Float[np.ndarray, " thresholds"]]:
    """ebF1, miF1 and maF1 at every threshold of the grid, each [T].

    Args:
        scores: [N, L].
        labels: [N, L], 0 or 1.
        grid: [T], ascending.
    """
    true = (labels != 0).astype(np.float64)
    predicted, hits = (above(scores, w, 0, grid) for w in (None, true))
    row_predicted, row_hits = (above(scores, w, 1, grid) for w in (None, true))
    positives, row_positives = true.sum(0), true.sum(1)
    curves: dict[str, list[float]] = {name: [] for name in metrics.F1_NAMES}
    for t in range(len(grid)):
        size = row_predicted[t] + row_positives
        defined = size > 0
        counts = metrics.Counts(
            tp=hits[t],
            fp=predicted[t] - hits[t],
            fn=positives - hits[t],
            example_f1=float(np.sum(2 * row_hits[t][defined] / size[defined])),
            undefined=int((~defined).sum()),
            exact=0,
            rows=len(labels),
        )
        for name, value in metrics.f1_scores(counts).items():
            curves[name].append(value)
    return {name: np.array(values) for name, values in curves.items()}


@dataclasses.dataclass(frozen=True)
class _Corrected:
    """Estimated clean counts at every threshold: see `corrected_curves`."""

    hits: np.ndarray  # [T, L], not clipped
    predicted: np.ndarray  # [T, L]
    positives: np.ndarray  # [L]
    row_hits: np.ndarray  # [T, N]
    row_predicted: np.ndarray  # [T, N]


def _corrected(scores, noisy, prior, rates, grid, sizes) -> _Corrected:
    if not rates.usable:
        raise ValueError(
            f"the noise rates r0={rates.r0:.3f}, r1={rates.r1:.3f} leave no "
            f"information (1 - r0 - r1 < {LEAST_INFORMATION})"
        )
    if sizes is None:
        clean = (noisy - rates.r0) / rates.information
    else:
        clean = (noisy != 0) * sizes[:, None]
    share = np.clip((prior - rates.r0) / rates.information, 0, 1)
    return _Corrected(
        hits=above(scores, clean, 0, grid),
        predicted=above(scores, None, 0, grid),
        positives=len(scores) * share,
        row_hits=above(scores, clean, 1, grid),
        row_predicted=above(scores, None, 1, grid),
    )


def corrected_curves(
    scores: Float[np.ndarray, "rows labels"],
    noisy: Int[np.ndarray, "rows labels"],
    prior: Float[np.ndarray, " labels"],
    rates: Rates,
    grid: np.ndarray = GRID,
    sizes: Float[np.ndarray, " rows"] | None = None,
) -> dict[str, Float[np.ndarray, " thresholds"]]:
    """Estimates of the F1 curves against the unseen clean labels, each [T].

    With c = (noisy - r0) / (1 - r0 - r1), unbiased for the clean label, and p the
    thresholded predictions:

        TP_l = sum_i p_il c_il,  P_l = N clip((prior_l - r0) / (1 - r0 - r1), 0, 1)
        miF1 = 2 sum_l TP_l / (sum_l pred_l + sum_l P_l)
        maF1 = mean_l 2 clip(TP_l, 0, pred_l) / (pred_l + P_l), in [0, 1], 0/0 -> 0
        ebF1 = mean_i 2 sum_l p_il c_il / (|p_i| + nbar), nbar = max(1, sum_l P_l / N)

    P comes from the training rows, not from these: an error of .001 in r0 would move
    a validation estimate by a tenth where positives are few.  |y_i| is replaced by
    its mean because sum_l c_il is correlated with the numerator.

    Where each row kept one of its m_i labels, c = m_i noisy: r1 is no property of the
    label there, a row's only label is never lost.

    Args:
        scores: [N, L] on validation rows.
        noisy: [N, L] their noisy labels.
        prior: [L] mean noisy label of the training rows.
        rates: noise rates of the training rows.
        grid: [T], ascending.
        sizes: [N] m_i, of `calibration.row_sizes`; None: other noise.

    Raises:
        ValueError: the rates leave no information.
    """
    c = _corrected(scores, noisy, prior, rates, grid, sizes)
    return {
        "ebF1": _corrected_example(c),
        "miF1": _ratio(c.hits.sum(1), c.predicted.sum(1) + c.positives.sum()),
        "maF1": _corrected_label(c).mean(1),
    }


def _ratio(hits: np.ndarray, size: np.ndarray) -> np.ndarray:
    """2 hits / size, 0 where the size is 0."""
    return np.where(size > 0, 2 * hits / np.where(size > 0, size, 1), 0.0)


def _corrected_example(c: _Corrected) -> np.ndarray:
    mean_size = max(1.0, c.positives.sum() / c.row_hits.shape[1])
    return _ratio(c.row_hits, c.row_predicted + mean_size).mean(1)


def _corrected_label(c: _Corrected) -> np.ndarray:
    hits = np.clip(c.hits, 0, c.predicted)
    return np.clip(_ratio(hits, c.predicted + c.positives), 0, 1)


def choose(
    curves: dict[str, Float[np.ndarray, " thresholds"]], grid: np.ndarray = GRID
) -> dict[str, float]:
    """The best threshold of each curve; ties go to the lower threshold."""
    return {name: float(grid[np.argmax(curve)]) for name, curve in curves.items()}


def expected_per_label(
    scores: Float[np.ndarray, "rows labels"],
    probabilities: Float[np.ndarray, "rows labels"],
) -> Float[np.ndarray, " labels"]:
    """A threshold for each label: that of the best F1 that is to be expected.

    With p_(1), p_(2), ... the probabilities of a label's rows in falling order of their
    scores, it lies half-way between the scores of rows k and k + 1, k of the largest

        2 sum_{j <= k} p_(j) / (k + sum_i p_i)

    of those with p_(k) >= LEAST_PROBABILITY; without any, k = 1.  Probabilities in the
    place of labels: a label with five positives among the validation rows, or whose
    positives were turned off, has a threshold as good as the model's probabilities.
    Ties go to the higher threshold, to say less; where all rows are to have the label,
    it is the least score.

    Args:
        scores: [N, L] on validation rows.
        probabilities: [N, L] that each label holds, rising with its score.

    Returns:
        float64 [L] thresholds.

    References:
        Lipton, Elkan and Narayanaswamy 2014, Optimal thresholding of classifiers to
        maximize F1 measure (the best threshold is half of the best F1).
    """
    chosen = np.empty(scores.shape[1])
    said = np.arange(1, len(scores) + 1)
    for label, (score, p) in enumerate(zip(scores.T, probabilities.T, strict=True)):
        order = np.argsort(-score, kind="stable")
        score, p = score[order].astype(np.float64), p[order]
        value = _ratio(p.cumsum(), said + p.sum())
        value[1:][p[1:] < LEAST_PROBABILITY] = -1
        value[:-1][score[:-1] == score[1:]] = -1  # rows of one score go together
        k = np.argmax(value)
        chosen[label] = score[k : k + 2].mean()
    return chosen


def apply(
    scores: Float[np.ndarray, "rows labels"],
    threshold: float | Float[np.ndarray, " labels"],
) -> np.ndarray:
    """[N, L] bool predictions: score >= threshold (one, or one per label)."""
    return scores.astype(np.float64) >= threshold
