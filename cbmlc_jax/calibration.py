"""Probabilities from scores, and how right they are, on labels with known noise.

With y the noisy label, r0 = P(0->1), r1 = P(1->0), p the probability of the clean one,

    P(y = 1) = r0 + (1 - r0 - r1) p,      E[(y - r0) / (1 - r0 - r1)] = p

the first for a likelihood (temperature, platt), the second for means (isotonic, the
reliability table).  Both need rates that do not depend on the score given the clean
label; rates of 0 take the labels as they are.

Where each row kept one of its m labels (type 3 noise), r1 depends on the row: a label
of a row of one is never lost, and those are the easy ones, with the highest scores.
`row_sizes` says what m was.

Entries with a score of exactly 0 are left out: those that the data say to ignore.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy  # its optimisers, a third of a second, are imported where they are used
from jaxtyping import Float, Int

from cbmlc_jax.decision import Calibration, logit
from cbmlc_jax.thresholds import Rates

KINDS = ("temperature", "platt", "isotonic")
# Scores of many labels lie near 0: bins are narrow there.
EDGES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
# Logits are counted in so many steps of 1/256 from -16 to 16: fits then take the same
# time for a thousand and for a hundred million entries.
_STEPS = 8192
_ROUNDS = 8  # of `row_sizes`


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Entries by score: attributes logit (mean), entries, positives (weighted); each
    [K]."""

    logit: np.ndarray
    entries: np.ndarray
    positives: np.ndarray


def _counted(
    scores: np.ndarray, noisy: np.ndarray, sizes: np.ndarray | None = None
) -> _Counted:
    used, on = scores > 0, noisy != 0
    z, y = logit(scores[used]), (on if sizes is None else on * sizes[:, None])[used]
    step = np.clip((z + 16) * (_STEPS / 32), 0, _STEPS - 1).astype(np.int64)
    entries = np.bincount(step, minlength=_STEPS)
    there = entries > 0
    total = np.bincount(step, z, minlength=_STEPS)
    positives = np.bincount(step, y, minlength=_STEPS)
    return _Counted(total[there] / entries[there], entries[there], positives[there])


def fit(
    kind: str,
    scores: Float[np.ndarray, "rows labels"],
    noisy: Int[np.ndarray, "rows labels"],
    rates: Rates,
    sizes: Float[np.ndarray, " rows"] | None = None,
) -> Calibration:
    """A calibration of all labels together.

    temperature: p = sigmoid(z / T), z the logit of the score, T by maximum likelihood
    of the noisy labels; platt: sigmoid(a z + b), likewise.  isotonic: the ascending
    step function nearest to (y - r0) / (1 - r0 - r1) in squares, held in [0, 1]; to
    m y where sizes m are given.

    Args:
        kind: one of KINDS.
        scores: [N, L] on validation rows.
        noisy: [N, L] their labels.
        rates: of the noise.
        sizes: [N] of `row_sizes`, for isotonic alone; None: other noise.

    References:
        Guo et al. 2017, On calibration of modern neural networks; Platt 1999; Zadrozny
        and Elkan 2002.  The likelihood of noisy labels: Patrini et al. 2017, forward.
    """
    if kind == "isotonic":
        known = rates if sizes is None else Rates(0.0, 0.0)
        return Calibration(kind, knots=_isotonic(_counted(scores, noisy, sizes), known))
    counted = _counted(scores, noisy)
    total = counted.entries.sum()

    def loss(at: np.ndarray) -> float:
        shift = at[1] if kind == "platt" else 0.0
        # Not the slope but its logarithm, so that it stays positive.
        p = 1 / (1 + np.exp(-np.exp(at[0]) * counted.logit - shift))
        q = np.clip(rates.r0 + rates.information * p, 1e-12, 1 - 1e-12)
        negatives = counted.entries - counted.positives
        gain = counted.positives * np.log(q) + negatives * np.log1p(-q)
        return -float(gain.sum() / total)

    start = np.zeros(2 if kind == "platt" else 1)
    bounds = [(-5.0, 5.0), (-20.0, 20.0)][: len(start)]
    found = scipy.optimize.minimize(
        loss, start, method="Nelder-Mead", bounds=bounds, options={"xatol": 1e-5}
    )
    shift = float(found.x[1]) if kind == "platt" else 0.0
    return Calibration(kind, slope=float(np.exp(found.x[0])), shift=shift)


def _isotonic(counted: _Counted, rates: Rates) -> tuple[tuple[float, float], ...]:
    from sklearn.isotonic import IsotonicRegression  # takes a second to import

    score = 1 / (1 + np.exp(-counted.logit))
    target = (counted.positives / counted.entries - rates.r0) / rates.information
    model = IsotonicRegression(y_min=0.0, y_max=1.0)
    model.fit(score, target, sample_weight=counted.entries)
    pairs = zip(model.X_thresholds_, model.y_thresholds_, strict=True)
    return tuple((float(x), float(y)) for x, y in pairs)


def one_was_kept(noisy: Int[np.ndarray, "rows labels"], rates: Rates) -> bool:
    """Whether these are labels of which each row kept one (type 3 noise).

    r0 = 0, no row has two, and fewer than r1 / 2 of the rows have none: where labels
    are lost one by one, a row's only one is, too.
    """
    count = (noisy != 0).sum(1)
    single = count.max(initial=0) == 1 < noisy.shape[1]
    return bool(single and rates.r0 == 0 and (count == 0).mean() < rates.r1 / 2)


def row_sizes(
    scores: Float[np.ndarray, "rows labels"],
    noisy: Int[np.ndarray, "rows labels"],
    rates: Rates,
) -> Float[np.ndarray, " rows"] | None:
    """How many labels each row had, before all but one were lost.

    The label of a row of m labels was kept with probability 1 / m, so that it stands
    for m of them (inverse probability weighting).  m is not seen, but its mean is
    1 / (1 - r1), and the rows' sums of probabilities say how it varies:

        m_i = max(1, a sum_l p_il),   a such that the mean over rows is 1 / (1 - r1)

    The probabilities are isotonic ones, of which each label counts m times; they and m
    are computed in turns, _ROUNDS times, from m = 1 / (1 - r1).

    Args:
        scores: [N, L] on validation rows.
        noisy: [N, L] their labels.
        rates: of the noise.

    Returns:
        float64 [N], at least 1; None unless `one_was_kept`.

    References:
        Horvitz and Thompson 1952, A generalization of sampling without replacement
        from a finite universe.
    """
    if not one_was_kept(noisy, rates):
        return None
    mean, used = 1 / rates.information, scores > 0
    sizes = np.full(len(noisy), mean)
    for _ in range(_ROUNDS if (noisy != 0)[used].any() else 0):
        found = fit("isotonic", scores, noisy, rates, sizes).apply(scores)
        sizes = at_least_one(np.where(used, found, 0).sum(1), mean)
    return sizes


def at_least_one(
    values: Float[np.ndarray, " n"], mean: float
) -> Float[np.ndarray, " n"]:
    """max(1, a values) with the a that gives it that mean, which is above 1."""

    def excess(factor: float) -> float:
        return np.maximum(1, factor * values).mean() - mean

    factor = scipy.optimize.brentq(excess, 0, 2 * mean / values.mean())
    return np.maximum(1, factor * values)


def reliability(
    probabilities: Float[np.ndarray, "..."],
    noisy: Int[np.ndarray, "..."],
    rates: Rates,
) -> dict:
    """How often labels hold where a probability is said, by bins of `EDGES`.

    In a bin of n entries with a share q of noisy positives the share of clean ones is
    (q - r0) / (1 - r0 - r1), held in [0, 1], with a standard error of
    sqrt(q (1 - q) / n) / (1 - r0 - r1).

        ECE = sum_bins n / N |mean probability - share|

    which chance alone makes greater than 0.

    Args:
        probabilities: of any shape.
        noisy: labels of that shape.
        rates: of the noise.

    Returns:
        {"entries", "mean", "share", "ece", "bins": [{"low", "high", "entries", "mean",
        "share", "spread"}]}; empty bins are left out.
    """
    used = probabilities > 0
    p, y = probabilities[used].astype(np.float64), noisy[used] != 0
    which = np.clip(np.searchsorted(EDGES, p, side="right") - 1, 0, len(EDGES) - 2)
    entries, total, positives = (
        np.bincount(which, weights, minlength=len(EDGES) - 1)
        for weights in (None, p, y)
    )
    bins, ece = [], 0.0
    for i in np.flatnonzero(entries):
        n, mean, q = int(entries[i]), total[i] / entries[i], positives[i] / entries[i]
        share = _clean(q, rates)
        ece += n * abs(mean - share)
        spread = (q * (1 - q) / n) ** 0.5 / rates.information
        values = {"mean": mean, "share": share, "spread": spread}
        bins.append(
            {"low": EDGES[i], "high": EDGES[i + 1], "entries": n}
            | {name: round(float(value), 5) for name, value in values.items()}
        )
    count = max(len(p), 1)
    return {
        "entries": len(p),
        "mean": round(float(p.sum() / count), 6),
        "share": round(_clean(y.sum() / count, rates), 6),
        "ece": round(float(ece / count), 6),
        "bins": bins,
    }


def _clean(share: float, rates: Rates) -> float:
    return float(np.clip((share - rates.r0) / rates.information, 0, 1))


def cross_fitted(
    kind: str, scores: np.ndarray, noisy: np.ndarray, rates: Rates
) -> Float[np.ndarray, "rows labels"]:
    """Probabilities of each half of the rows by a calibration of the other half.

    Args: as `fit`; kind may be "none".
    """
    if kind == "none":
        return scores.astype(np.float64)
    found, half = np.zeros(scores.shape), np.arange(len(scores)) % 2 == 0
    for fitted, held_out in ((half, ~half), (~half, half)):
        calibration = fit(kind, scores[fitted], noisy[fitted], rates)
        found[held_out] = calibration.apply(scores[held_out])
    return np.where(scores > 0, found, 0)


def table(
    scores: np.ndarray, noisy: np.ndarray, rates: Rates, names: Sequence[str]
) -> dict:
    """Reliability without calibration and with each kind of it, and of each label.

    A calibration is judged on rows that it was not fitted on, see `cross_fitted`.

    Returns:
        {kind: `reliability` | {"labels": {name: `reliability`}}}.
    """
    found = {}
    for kind in ("none", *KINDS):
        p = cross_fitted(kind, scores, noisy, rates)
        found[kind] = reliability(p, noisy, rates) | {
            "labels": {
                name: reliability(p[:, i], noisy[:, i], rates)
                for i, name in enumerate(names)
            }
        }
    return found


def report(found: dict, rates: Rates, shown: int = 10) -> str:
    """A table for eyes: ECE by kind, the bins without calibration, the worst labels."""
    corrected = "" if rates == Rates(0.0, 0.0) else " (corrected for the noise)"
    lines = [f"{'calibration':<14}{'ECE':>9}   on {found['none']['entries']} entries"]
    for kind, whole in found.items():
        lines.append(f"  {kind:<12}{whole['ece']:>9.5f}")
    lines += ["", f"share of labels that hold{corrected}, by score"]
    lines.append(f"{'score':>13}{'entries':>9}{'mean':>8}{'share':>8} +-")
    for b in found["none"]["bins"]:
        lines.append(
            f"{b['low']:>7g}-{b['high']:<5g}{b['entries']:>9}{b['mean']:>8.4f}"
            f"{b['share']:>8.4f} {b['spread']:.4f}"
        )
    labels = found["none"]["labels"]
    worst = sorted(labels, key=lambda name: -labels[name]["ece"])[:shown]
    lines += ["", f"the {len(worst)} labels of the largest ECE, without calibration"]
    lines.append(f"{'ECE':>9}{'mean':>9}{'share':>9}  label")
    for name in worst:
        one = labels[name]
        lines.append(
            f"{one['ece']:>9.4f}{one['mean']:>9.4f}{one['share']:>9.4f}  {name}"
        )
    return "\n".join(lines) + "\n"
