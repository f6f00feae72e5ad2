"""Which of the given labels are wrong: a posterior for every entry (row, label).

Read are the noisy labels and out-of-fold scores of a model trained on them, nothing
else.  With noise rates r0 = P(0->1) and r1 = P(1->0) the given label g of an entry
comes from its clean label through a channel,

    q = P(g = 1 | z) = r0 + (1 - r0 - r1) c,      c = P(clean = 1 | z) = sigmoid(w . z)

and by Bayes' rule the given label is wrong with probability

    P(wrong | g = 1, z) = r0 (1 - c) / (r0 (1 - c) + (1 - r1) c)
    P(wrong | g = 0, z) = r1 c / (r1 c + (1 - r0) (1 - c)).

Where annotators differ (`row_noise.added` varies by more than the common rate), r0 is
that of the row: those of a careless one have most of the added labels.  w is fitted by
maximum likelihood on all entries together, so that no c is below 0 or above 1 and the
ranking has no ties there, as it has where (q - r0) / (1 - r0 - r1) is clipped.  z has

    1, the logit of the score, the logit of the label's share of clean positives, and
    the residual that the row's other labels foretell: with t the posterior mean of the
        clean label and e = (t - c) / s of a first fit, s its deviation, the mean of e_l
        in a Gaussian with the covariance of the e's of other rows, given the e's of
        the row's other labels (a label that a related label makes likely is a
        missing one).

Where rows have far fewer pairs of labels than the scores foretell, a row's labels
displace each other (one label given where several hold): what another label says of a
label is then of the noise, and the last part of z is left out.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.special import expit, logit

from cbmlc_jax import rates as rates_lib
from cbmlc_jax import row_noise
from cbmlc_jax.thresholds import Rates

# Chosen on bibtex and emotions with planted noise, seed 0; not on other data.
RIDGE = 0.5  # added to the covariance of the residuals, whose diagonal is about 1
FOLDS = 5  # a row does not count in the covariance that foretells it
FEWEST_PAIRS = 0.55  # of those foretold
# Rows with more labels than foretold for reasons of their own look noisy, too: then the
# mean of the rows' rates is not the common rate.
MEAN_OFF = 0.25
# At rates below these one kind of error would be next to impossible.  100 to 400
# anchors that are all on say no more of r1 than that it is below about .01.
LEAST_R0, LEAST_R1, MOST_R1 = 1e-5, 5e-3, 0.9
CLIP = 1e-4  # scores nearer to 0 or 1 than this are not told apart
FITTED = 2_000_000  # entries that the fit reads, about, at most
STEPS, ENOUGH = 40, 1e-5


@dataclasses.dataclass(frozen=True)
class Issues:
    """How likely each given label is wrong.

    Attributes:
        wrong: float32 [N, L], P(the given label is wrong); 0 where it is ignored.
        labels: uint8 [N, L], as given.
        rates: that were used.
        related: whether the row's other labels were read as evidence.
    """

    wrong: Float[np.ndarray, "rows labels"]
    labels: UInt8[np.ndarray, "rows labels"]
    rates: Rates
    related: bool

    @property
    def expected(self) -> float:
        """The expected number of wrong entries."""
        return float(self.wrong.sum(dtype=np.float64))

    @property
    def doubtful(self) -> Bool[np.ndarray, "rows labels"]:
        """Entries that are more likely wrong than right."""
        return self.wrong > 0.5

    def ranked(self, top: int | None = None) -> Int[np.ndarray, "n 2"]:
        """(row, label) of the `top` likeliest issues, the likeliest first.

        Ties go to the lower row, then to the lower label; None: all entries.
        """
        score = self.wrong.ravel()
        chosen = np.arange(score.size)
        if top == 0:
            chosen = chosen[:0]
        elif top is not None and top < score.size:
            cut = np.partition(score, score.size - top)[score.size - top]
            chosen = np.flatnonzero(score >= cut)
        chosen = chosen[np.argsort(-score[chosen], kind="stable")][:top]
        return np.stack(np.divmod(chosen, self.wrong.shape[1]), 1)

    def posterior(self) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L], P(clean label = 1)."""
        return np.where(self.labels, 1 - self.wrong, self.wrong)


def find_label_issues(
    labels: UInt8[np.ndarray, "rows labels"],
    scores: Float[np.ndarray, "rows labels"],
    rates: tuple[float, float] | None = None,
    *,
    ignored: Bool[np.ndarray, "rows labels"] | None = None,
) -> Issues:
    """Finds labels that are likely wrong; the module says how.

    Args:
        labels: [N, L] noisy labels, 0 or 1.
        scores: [N, L] in [0, 1], of models that did not see the row's labels.
        rates: (P(0->1), P(1->0)); None: they are estimated (`estimated`).
        ignored: [N, L] entries that are no issue whatever their label.

    Raises:
        ValueError: shapes that differ, labels that are not 0 or 1, scores outside
            [0, 1], or rates outside [0, 1] that leave no information.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    _check(labels, scores, rates)
    on = labels != 0
    if rates is None:
        used = estimated(scores, on)
    else:
        used = Rates(*map(float, rates), "known")
    r0 = min(max(used.r0, LEAST_R0), MOST_R1)
    r1 = min(max(used.r1, LEAST_R1), MOST_R1, 0.95 - r0)
    share = np.clip((on.mean(0) - r0) / (1 - r0 - r1), CLIP, 1 - CLIP)
    parts = [
        logit(np.clip(scores, CLIP, 1 - CLIP, dtype=np.float64)),
        np.broadcast_to(logit(share), scores.shape),
    ]
    given = r0 + (1 - r0 - r1) * _fitted(parts, on, r0, r1)
    of_rows = row_noise.added(given, on, r0)
    if of_rows.std() > r0 and abs(of_rows.mean() - r0) < MEAN_OFF * r0:
        r0 = np.clip(of_rows, LEAST_R0, 0.95 - r1)[:, None]
    clean = _fitted(parts, on, r0, r1)
    related = _pairs_share(given, on) >= FEWEST_PAIRS
    if related:
        parts.append(_foretold(clean, _wrong(clean, on, r0, r1), on))
        clean = _fitted(parts, on, r0, r1)
    wrong = _wrong(clean, on, r0, r1).astype(np.float32)
    if ignored is not None:
        wrong[ignored] = 0
    return Issues(wrong, on.astype(np.uint8), used, bool(related))


def estimated(
    scores: Float[np.ndarray, "rows labels"], on: Bool[np.ndarray, "rows labels"]
) -> Rates:
    """Rates by `rates.estimate`, also where it doubts them; else by `rates.anchored`.

    An order of issues needs less of the rates than a threshold does: a doubtful
    estimate says which of the two kinds of error is the commoner one.  Where there is
    one it is used, because it knows of rows that got their last label back, as
    `rates.anchored` does not.
    """
    found = rates_lib.estimate(scores, on)
    r0, r1 = found.r0, found.r1
    if not found.anchors:
        r0, r1 = rates_lib.anchored(scores, on)
    return Rates(r0, r1, "estimated", found.reason)


def _check(labels: np.ndarray, scores: np.ndarray, rates) -> None:
    if scores.shape != labels.shape or scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"labels {labels.shape} and scores {scores.shape} must both be "
            "[rows, labels] and not empty"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("the labels are not all 0 or 1")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("the scores are not all in [0, 1]")
    if rates is not None and not (min(rates) >= 0 and sum(rates) < 0.95):
        raise ValueError(f"rates {rates} must be at least 0 and sum to less than .95")


def _wrong(clean, on, r0, r1: float) -> np.ndarray:
    """[N, L] P(the given label is wrong), from P(clean label = 1)."""
    odds = np.where(
        on,
        r0 * (1 - clean) / ((1 - r1) * clean),
        r1 * clean / ((1 - r0) * (1 - clean)),
    )
    return odds / (1 + odds)


def _fitted(parts: list[np.ndarray], on: np.ndarray, r0, r1: float):
    """[N, L] c = sigmoid(w . z), by Fisher scoring of the channel's likelihood.

    Every k-th row is read where there are more than FITTED entries.
    """
    step = -(-on.size // FITTED)
    z = np.stack([np.ones(on[::step].size), *(p[::step].ravel() for p in parts)], 1)
    given, r0 = on[::step].ravel(), np.broadcast_to(r0, on.shape)[::step].ravel()
    information = 1 - r0 - r1

    def likelihood(w: np.ndarray) -> float:
        q = np.clip(r0 + information * expit(z @ w), 1e-12, 1 - 1e-12)
        return float(np.log(np.where(given, q, 1 - q)).sum())

    w = np.zeros(z.shape[1])
    w[1] = 1.0
    best = likelihood(w)
    for _ in range(STEPS):
        c = expit(z @ w)
        q, slope = r0 + information * c, information * c * (1 - c)
        weight = slope / (q * (1 - q))
        gradient = z.T @ ((given - q) * weight)
        curvature = (z * (slope * weight)[:, None]).T @ z
        # As if one entry in a million had a part of z of deviation 1.
        curvature += 1e-6 * len(z) * np.eye(len(w))
        change, before = np.linalg.solve(curvature, gradient), best
        for _ in range(20):  # half the step until it is uphill
            if (new := likelihood(w + change)) >= best:
                w, best = w + change, new
                break
            change = change / 2
        if best - before <= ENOUGH * abs(best):
            break
    everything = w[0] + sum(a * p for a, p in zip(w[1:], parts, strict=True))
    return expit(np.clip(everything, -30, 30))


def _pairs_share(scores: np.ndarray, on: np.ndarray) -> float:
    """Pairs of labels in a row, over those that the scores foretell, if independent."""
    size = on.sum(1, dtype=np.float64)
    scores = scores.astype(np.float64)
    foretold = (scores.sum(1) ** 2 - (scores**2).sum(1)).sum()
    return float((size * (size - 1)).sum() / max(foretold, 1e-9))


def _foretold(clean: np.ndarray, wrong: np.ndarray, on: np.ndarray) -> np.ndarray:
    """[N, L] e_l as the residuals of the row's other labels foretell it, times s.

    With the covariance S of e = (t - c) / s and P = (S + RIDGE I)^-1, the Gaussian
    mean of e_l given the others is -sum_{m != l} P_lm e_m / P_ll.
    """
    deviation = np.sqrt(np.maximum((clean * (1 - clean)).mean(0), 1e-6))
    residual = (np.where(on, 1 - wrong, wrong) - clean) / deviation
    found = np.empty_like(residual)
    fold = np.arange(len(on)) % min(FOLDS, len(on))
    for k in range(fold[-1] + 1 if len(on) < FOLDS else FOLDS):
        others, mine = residual[fold != k], residual[fold == k]
        covariance = others.T @ others / max(len(others), 1)
        precision = np.linalg.inv(covariance + RIDGE * np.eye(on.shape[1]))
        found[fold == k] = mine - (mine @ precision) / np.diag(precision)
    return found * deviation


def precision(
    score: Float[np.ndarray, "rows labels"], wrong: Bool[np.ndarray, "rows labels"]
) -> tuple[float, float]:
    """Precision at n and average precision of a ranking, n the number of wrong ones.

    Ties go to the lower row, then to the lower label; 0 where nothing is wrong.

    Args:
        score: [N, L], higher is likelier wrong.
        wrong: [N, L] which entries are.
    """
    hit = wrong.ravel()[np.argsort(-score.ravel(), kind="stable")]
    number = int(hit.sum())
    if not number:
        return 0.0, 0.0
    found = np.cumsum(hit)
    ranks = np.flatnonzero(hit)
    return float(found[number - 1] / number), float((found[ranks] / (ranks + 1)).mean())
