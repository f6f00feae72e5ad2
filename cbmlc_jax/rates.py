"""Noise rates from noisy labels and held-out scores, by anchor entries.

Nothing but the noisy labels and out-of-fold scores of a model trained on them is read.
Two groups of entries (row, label) anchor the rates:

    negatives  the lowest-scored tenth of all entries: r0 = their share of ones
    positives  the K highest-scored entries:           1 - r1 = their share of ones

The assumption, without which scores cannot identify rates (any posterior below 1 may
be noise or doubt): the positive anchors are truly positive and lose their ones as
other positives do.  Where they are not all positive, r1 and the number of clean
positives come out too high, in proportion; where a model cannot tell which labels
are least likely, r0 comes out too high and the number of positives too low, and
nothing here notices.

Where a row never loses its last positive (`noise.keep_one`), an entry's survival
depends on the row: 1 if it is the row's only positive.  Such rows are recognised by
the empty rows that are missing, and then r1 is read from entries in whose row another
label is on, where the flip was free, and the restored ones are added afterwards.
Under type 3 (one positive stays) no row has two: see `_of_single_labels`.  A mixture of
kinds over rows is outside the assumption; its estimate is biased.  Where the kinds can
be told apart by what they added (`row_noise`), `of_careful_rows` reads r1 from the rows
to which next to nothing was added.  Such rows also confirm r0: where r1 is in doubt all
the same, the rates are partial (`thresholds.Rates`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from cbmlc_jax.anchors import Anchors, empty_rows, largest, lowest, survival
from cbmlc_jax.thresholds import LEAST_INFORMATION as LEAST_USABLE
from cbmlc_jax.thresholds import Rates

# All chosen on bibtex, noise seeds 0 and 1, and on simulated rows; not on other data.
SHARE = 0.1  # K / ones that have another one in their row
MOST, FEWEST = 400, 100  # bounds of K: deeper is less pure, shallower is less certain
MISSING = 0.5  # below this share of the expected empty rows, rows were refilled
# The rule for "unreliable".
LEAST_INFORMATION = 0.1  # 1 - r0 - r1, before rows are refilled
LEAST_LIFT = 2.0  # share of ones over that of the anchors' labels, both above r0
LEAST_NEXT = 0.7  # share of ones of the next 3 K entries over that of the anchors
MOST_SPREAD = 0.15  # standard error of the positives, over the positives
# Rows to which less than this times r0 was added are careful, where this share is, and
# where their own anchors of r0 are on less than the last times as often.
CAREFUL, FEWEST_CAREFUL, MOST_CAREFUL, CONFIRMED = 0.5, 0.25, 0.95, 0.25
# Each label by itself.
LABEL_SHARE, LABEL_FEWEST = 0.2, 30


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Rates of the rows that were given, as `noise.realised` would count them.

    Attributes:
        r0: P(0->1).
        r1: P(1->0), after the refilling of rows.
        positives: number of clean positives.
        r0_per_label, r1_per_label, positives_per_label: [L], each label by itself, from
            far less pure anchors than r1; NaN where it has too few.
        r0_spread, r1_spread, positives_spread: standard errors, by the delta method
            with rows as the independent units; they know of chance, not of anchors
            that are not positive.
        anchors: K.
        refilled: estimated number of rows that got their last positive back.
        reliable: whether the rule accepts the estimate; where not, use no value of it
            but where `partial`.
        reason: why not, in words; "" where it is reliable.
        partial: the doubt is of r1 alone, which is 0 or a guess: see `of_careful_rows`
            and `_of_single_labels`.
    """

    r0: float
    r1: float
    positives: float
    r0_per_label: Float[np.ndarray, " labels"]
    r1_per_label: Float[np.ndarray, " labels"]
    positives_per_label: Float[np.ndarray, " labels"]
    r0_spread: float
    r1_spread: float
    positives_spread: float
    anchors: int
    refilled: float
    reliable: bool
    reason: str
    partial: bool = False

    @property
    def rates(self) -> Rates:
        """For `thresholds.corrected_curves`; not usable where neither is reliable."""
        return Rates(self.r0, self.r1, "estimated", self.reason, self.partial)


def estimate(
    scores: Float[np.ndarray, "rows labels"], labels: UInt8[np.ndarray, "rows labels"]
) -> Estimate:
    """Estimates the rates at which clean labels, unseen, became these labels.

    With K anchors of which h are on, n ones, m of them in rows with another one:

        r0 = mean label of the lowest-scored tenth
        K  = clip(SHARE (m - its share by r0), FEWEST, MOST)
        1 - r = h / K                            (refilled rows: see `survival`)
        P  = (n - refilled - r0 N L) / (1 - r0 - r)
        r1 = r - refilled / P

    Only the order of the scores is used.  Entries of equal score at a boundary count
    in part, so that the order of rows and labels does not matter.

    The estimate is unreliable (a rule that was fixed before it met other data) where

        there are no ones, no zeros, no row with two ones, or fewer than 4 K entries
            beside another positive;
        1 - r0 - r < LEAST_INFORMATION;
        the anchors are not on, by two standard errors, LEAST_LIFT times as often as
            their labels are on average: label priors, random scores;
        the next 3 K entries are on less than LEAST_NEXT times as often: no plateau,
            so that the anchors are not all positive either;
        positives_spread > MOST_SPREAD positives.

    It is a mild one, because a wrong P moves the best thresholds far less than labels
    that are not corrected: anchors of which a fifth is not positive can pass.

    Args:
        scores: [N, L], of models that did not see the row's labels; finite.
        labels: [N, L] noisy labels of these rows, 0 or 1.

    Raises:
        ValueError: shapes that differ, or scores that are not finite.
    """
    scores, on = np.asarray(scores), np.asarray(labels) != 0
    if scores.shape != on.shape or scores.ndim != 2:
        raise ValueError(
            f"scores {scores.shape} and labels {on.shape} must both be [rows, labels]"
        )
    if not np.isfinite(scores).all():
        raise ValueError("the scores are not all finite")
    ones = int(on.sum())
    if not 0 < ones < on.size:
        share = ones / max(on.size, 1)
        return _nothing(on, f"a share of {share:g} of the labels is on")
    r0, r0_spread = lowest(scores, on)
    size = on.sum(1)
    if size.max() == 1 < on.shape[1]:
        return _of_single_labels(scores, on)
    accompanied = size[:, None] - on >= 1
    wanted = SHARE * ((on & accompanied).sum() - r0 * accompanied.sum())
    k = int(np.clip(wanted, FEWEST, MOST))
    if accompanied.sum() < 4 * k:
        return _nothing(on, f"fewer than {4 * k} entries beside another positive")

    sizes = np.bincount(size, minlength=2)
    anchors = Anchors.take(scores, on, accompanied, k)
    lost, refilled = survival(anchors, sizes)
    if sizes[0] >= MISSING * empty_rows(sizes, lost):
        # No row was refilled: all entries will do, and the best of them are purer.
        anchors = Anchors.take(scores, on, np.ones_like(on), k)
        lost, refilled = 1 - anchors.share(), 0.0
    information = 1 - r0 - lost
    if information < LEAST_INFORMATION:
        return _nothing(
            on,
            f"1 - r0 - r1 = {information:.3f} beside other positives, less than "
            f"{LEAST_INFORMATION}",
        )
    positives = (ones - refilled - r0 * on.size) / information
    if not ones / on.size < positives <= on.size:
        return _nothing(on, f"{positives:.1f} positives of {on.size} entries")

    spread = anchors.spread()
    relative = np.hypot(spread, on.size * r0_spread / positives) / information
    found = Estimate(
        r0=r0,
        r1=float(max(0.0, lost - refilled / positives)),
        positives=float(positives),
        **_per_label(scores, on),
        r0_spread=r0_spread,
        r1_spread=spread,
        positives_spread=float(positives * relative),
        anchors=k,
        refilled=refilled,
        reliable=True,
        reason="",
    )
    reason = _doubt(found, anchors, on.mean(0))
    return dataclasses.replace(found, reliable=not reason, reason=reason)


def of_careful_rows(
    whole: Estimate,
    scores: Float[np.ndarray, "rows labels"],
    labels: UInt8[np.ndarray, "rows labels"],
    added: Float[np.ndarray, " rows"],
) -> Estimate:
    """The rates, where annotators differ, by way of the rows of the careful ones.

    Noise that takes no notice of a row's content strikes a random part of the rows.  So
    the others, to which less than CAREFUL r0 was added, have their share of the clean
    positives; and their anchors are purer, because r0 is next to nothing there:

        P  = N / n P(careful)           n careful rows of N
        r1 = 1 - r0 - (ones - r0 N L) / P

    Where that is in doubt, and `whole` is, too, r0 alone counts: rows without it show
    that it is no trait of the scores.

    Args:
        whole: `estimate` of the same scores and labels.
        scores, labels: [N, L].
        added: [N], r0 of each row (`row_noise.added`).

    Returns:
        `whole`, where fewer than FEWEST_CAREFUL or more than MOST_CAREFUL of the rows
        are careful, or their lowest scores are not on less than CONFIRMED r0.
    """
    careful = added < CAREFUL * whole.r0
    if not FEWEST_CAREFUL <= careful.mean() <= MOST_CAREFUL:
        return whole
    part = estimate(scores[careful], labels[careful])
    if not part.anchors or part.r0 > CONFIRMED * whole.r0:
        return whole
    size, factor = labels.size, len(careful) / careful.sum()
    positives = part.positives * factor
    r1 = 1 - whole.r0 - ((labels != 0).sum() - whole.r0 * size) / positives
    if not part.reliable or not 0 <= r1 <= 1 - whole.r0 - LEAST_INFORMATION:
        if whole.reliable:
            return whole
        return dataclasses.replace(whole, r1=0.0, partial=True)
    return dataclasses.replace(
        whole,
        r1=float(r1),
        positives=float(positives),
        r1_spread=part.r1_spread,
        positives_spread=part.positives_spread * factor,
        anchors=part.anchors,
        refilled=part.refilled,
        reliable=True,
        reason="",
    )


def anchored(
    scores: Float[np.ndarray, "rows labels"], labels: UInt8[np.ndarray, "rows labels"]
) -> tuple[float, float]:
    """(r0, r1) from the anchors alone, whatever `estimate` thinks of them.

    For uses that need to know which of the two is the larger, not their values.

    Args:
        scores, labels: [N, L], as in `estimate`.
    """
    scores, on = np.asarray(scores), np.asarray(labels) != 0
    k = int(np.clip(SHARE * on.sum(), FEWEST, MOST))
    highest = largest(scores.ravel(), min(k, on.size))
    return lowest(scores, on)[0], 1 - float(np.average(on.ravel(), weights=highest))


def _of_single_labels(scores: np.ndarray, on: np.ndarray) -> Estimate:
    """A guess, where no row has two labels: one was kept of several, k of them.

    Each row has an anchor, its highest-scored label, which is kept once in k times:

        1 - r1 = share of the rows with a label whose highest-scored label it is

    and r0 counts as 0.  How many labels the rows had cannot be seen.  Anchors that are
    not positive make k too large, and rows of few labels weigh more, which makes it too
    small: 3.4 for 2.4 on bibtex, 1.25 for 1.23 on reuters, 2.4 for 2.9 on subsets of
    RCV1.  The estimate is therefore never called reliable; it is `partial`, because a
    wrong k costs less than none: on bibtex, F1s that are chosen with .6 to 2 times k
    are 0 to .02 below those with k, and with k = 1 .01 to .05.  r1 is at most what
    `Rates.usable` can bear.
    """
    labelled = on.any(1)
    rows = int(labelled.sum())
    if rows < FEWEST:
        return _nothing(on, f"{rows} rows have a label, each a single one")
    values, lit = scores[labelled], on[labelled]
    highest = values == values.max(1, keepdims=True)
    weight = highest / highest.sum(1, keepdims=True)
    kept = (weight * lit).sum(1)
    share, usual = float(kept.mean()), float((weight * lit.mean(0)).sum(1).mean())
    spread = float(kept.std() / np.sqrt(rows))
    if share - 2 * spread < LEAST_LIFT * usual:
        return _nothing(
            on,
            f"no row has two labels, and a row's most likely label is its label "
            f"{share:.3f} of the time, little more than {usual:.3f} of other rows",
        )
    left = max(share, LEAST_USABLE)
    positives = float(min(on.sum() / left, on.size))
    return dataclasses.replace(
        _nothing(
            on,
            f"no row has two labels; that they would have {1 / left:.2f} is a guess: "
            "if it is k on average, give config.noise.r0=0 and config.noise.r1=1-1/k",
        ),
        r1=1 - left,
        positives=positives,
        r1_spread=spread,
        positives_spread=positives * spread / left,
        anchors=rows,
        partial=True,
    )


def _nothing(on: np.ndarray, reason: str) -> Estimate:
    """No estimate at all: labels as they are."""
    unknown = np.full(on.shape[1], np.nan)
    nan = float("nan")
    return Estimate(
        r0=0.0,
        r1=0.0,
        positives=float(on.sum()),
        r0_per_label=unknown,
        r1_per_label=unknown.copy(),
        positives_per_label=unknown.copy(),
        r0_spread=nan,
        r1_spread=nan,
        positives_spread=nan,
        anchors=0,
        refilled=0.0,
        reliable=False,
        reason=reason,
    )


def _doubt(found: Estimate, anchors: Anchors, prior: np.ndarray) -> str:
    """The part of the rule that looks at the anchors; "" where it accepts them."""
    share = anchors.share()
    lift = share - found.r0 - 2 * anchors.spread()
    usual = np.average(prior[anchors.columns], weights=anchors.weight) - found.r0
    if lift < LEAST_LIFT * usual:
        return (
            f"the {found.anchors} highest scores are right {share:.3f} of the time, "
            f"their labels {usual + found.r0:.3f}: the scores tell labels, not rows"
        )
    if anchors.following - found.r0 < LEAST_NEXT * (share - found.r0):
        return (
            f"the {found.anchors} highest scores are right {share:.3f} of the time, "
            f"the next {anchors.following:.3f}: no plateau of certain positives"
        )
    if found.positives_spread > MOST_SPREAD * found.positives:
        return (
            f"{found.positives:.0f} positives with a standard error of "
            f"{found.positives_spread:.0f}"
        )
    return ""


def _per_label(scores: np.ndarray, on: np.ndarray) -> dict[str, np.ndarray]:
    """r0, r1 and positives of each label by itself, from all of its entries.

    r0_l is the mean of the label's lower half, 1 - r1_l that of its K_l highest,
    K_l = LABEL_SHARE (n_l - r0_l N) >= LABEL_FEWEST; no refilled rows are looked for.
    """
    rows, columns = on.shape
    r0, r1, positives = (np.full(columns, np.nan) for _ in range(3))
    for l in range(columns):
        if rows < 2 * FEWEST:
            break
        values, lit = scores[:, l], on[:, l]
        low = np.average(lit, weights=largest(-values, rows // 2))
        r0[l] = low
        excess = lit.sum() - low * rows
        k = int(LABEL_SHARE * excess)
        if k < LABEL_FEWEST:
            continue
        high = np.average(lit, weights=largest(values, k))
        if high - low >= LEAST_INFORMATION:
            r1[l] = 1 - high
            positives[l] = min(excess / (high - low), rows)
    return {
        "r0_per_label": r0,
        "r1_per_label": r1,
        "positives_per_label": positives,
    }
