"""Estimated noise rates against simulated flips of labels from a known posterior."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cbmlc_jax import anchors, rates, rngs, thresholds
from cbmlc_jax.thresholds import Rates

ROWS, LABELS = 2000, 50


def simulate(r0, r1, *, refill=False, seed=0, rows=ROWS, kind="independent", error=0.5):
    """(scores, clean, noisy): a scorer that knows P(y = 1 | x) up to an error.

    About 2.5 positives a row and never none; labels differ in frequency by a factor of
    50.  `refill`: a row that lost all of its ones gets one of its positives back;
    kind "single": one positive of each row stays.
    """
    draw = rngs.generator(seed, "rates", rows)
    base = np.linspace(-14.0, -5.0, LABELS)
    logit = base + 5.0 * draw.standard_normal((rows, LABELS))
    clean = draw.random((rows, LABELS)) < 1 / (1 + np.exp(-logit))
    clean[np.arange(rows), logit.argmax(1)] = True
    coins = draw.random((rows, LABELS))
    noisy = np.where(clean, coins >= r1, coins < r0)
    priority = np.where(clean, draw.random((rows, LABELS)), -1.0)
    one = clean & (np.arange(LABELS) == priority.argmax(1)[:, None])
    if kind == "single":
        noisy = one
    if refill:
        noisy = np.where(noisy.any(1, keepdims=True), noisy, one)
    seen = logit + error * draw.standard_normal((rows, LABELS))
    return 1 / (1 + np.exp(-seen)), clean.astype(np.uint8), noisy.astype(np.uint8)


def realised(clean, noisy):
    """(r0, r1) as they came out."""
    return noisy[clean == 0].mean(), 1 - noisy[clean == 1].mean()


def assert_values(estimate, other, *, rel=1e-9):
    """All fields are the same but for rounding."""
    for field in dataclasses.fields(estimate):
        a, b = getattr(estimate, field.name), getattr(other, field.name)
        if isinstance(a, str | bool):
            assert a == b, field.name
        else:
            np.testing.assert_allclose(a, b, rel, 1e-12, err_msg=field.name)


KINDS = {
    "clean": (0.0, 0.0),
    "type 1, 1 %": (0.01, 0.01),
    "type 1, 5 %": (0.05, 0.05),
    "type 1, 20 %": (0.2, 0.2),
    "type 2, 10 %": (0.0, 0.1),
    "type 2, 50 %": (0.0, 0.5),
    "both": (0.03, 0.4),
}


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rates_of_independent_flips_are_found(kind, refill):
    r0, r1 = KINDS[kind]
    scores, clean, noisy = simulate(r0, r1, refill=refill)
    found = rates.estimate(scores, noisy)
    true0, true1 = realised(clean, noisy)
    assert found.reliable, found.reason
    assert found.reason == ""
    assert abs(found.positives / clean.sum() - 1) <= 0.15
    assert abs(found.r1 - true1) <= 0.08
    assert abs(found.r0 - true0) <= 0.001 + 3 * found.r0_spread
    # What these rates would make of so many positives is what was seen.
    expected = found.positives * (1 - found.r1)
    expected += found.r0 * (noisy.size - found.positives)
    if found.r1:
        assert expected == pytest.approx(noisy.sum())


def test_refilled_rows_are_told_from_rows_that_kept_a_label():
    """keep_one turns P(1->0) = .5 into far less, and that is what is reported."""
    scores, clean, noisy = simulate(0.0, 0.5, refill=True)
    raw = simulate(0.0, 0.5)[2]
    found = rates.estimate(scores, noisy)
    assert realised(clean, noisy)[1] < 0.45 < 0.48 < realised(clean, raw)[1]
    emptied = (raw.sum(1) == 0).sum()
    assert found.refilled == pytest.approx(emptied, rel=0.15)
    assert rates.estimate(scores, raw).refilled == 0


def test_anchors_in_refilled_rows_do_not_raise_the_rate():
    """An anchor that is off beside the one label that a row got back was not free."""
    errors = []
    for seed in range(8):
        scores, clean, noisy = simulate(0.0, 0.5, refill=True, seed=seed)
        errors.append(
            rates.estimate(scores, noisy).r1 - realised(clean, noisy)[1],
        )
    assert abs(np.mean(errors)) < 0.03


def test_the_spread_is_that_over_draws():
    runs = []
    for seed in range(10):
        scores, clean, noisy = simulate(0.05, 0.3, seed=seed, rows=1500)
        found = rates.estimate(scores, noisy)
        runs.append((found.r0, found.r1, found.positives / clean.sum()))
        spreads = (
            found.r0_spread,
            found.r1_spread,
            found.positives_spread / clean.sum(),
        )
    ratio = np.std(runs, axis=0) / spreads
    assert (ratio > 0.5).all() and (ratio < 2).all(), ratio


def test_the_order_of_rows_and_labels_does_not_matter_not_even_under_ties():
    scores, _, noisy = simulate(0.02, 0.3, refill=True)
    scores = np.round(scores, 2)  # most of the lowest are 0, many of the highest 1
    draw = rngs.generator(1, "order")
    rows, labels = draw.permutation(ROWS), draw.permutation(LABELS)
    found = rates.estimate(scores, noisy)
    moved = rates.estimate(scores[rows][:, labels], noisy[rows][:, labels])
    assert found.reliable
    back = {
        name: getattr(moved, name)[np.argsort(labels)]
        for name in ("r0_per_label", "r1_per_label", "positives_per_label")
    }
    assert_values(found, dataclasses.replace(moved, **back))


@pytest.mark.parametrize("transform", [np.exp, lambda s: 7 * s - 3, lambda s: s**3])
def test_only_the_order_of_the_scores_matters(transform):
    scores, _, noisy = simulate(0.02, 0.3)
    scores = np.round(scores, 4)
    assert_values(
        rates.estimate(scores, noisy), rates.estimate(transform(scores), noisy), rel=0
    )


def test_float32_scores():
    scores, _, noisy = simulate(0.02, 0.3)
    wide = scores.astype(np.float32).astype(np.float64)
    assert_values(
        rates.estimate(wide.astype(np.float32), noisy), rates.estimate(wide, noisy)
    )


def test_without_refilled_rows_the_estimate_is_the_definition():
    """By loops: the tenth that scores lowest, the K that score highest."""
    scores, _, noisy = simulate(0.02, 0.4, seed=3, rows=1000)
    found = rates.estimate(scores, noisy)
    pairs = zip(scores.ravel().tolist(), noisy.ravel().tolist(), strict=True)
    ranked = [y for _, y in sorted(pairs)]
    n = len(ranked)
    r0 = sum(ranked[: n // 10]) / (n // 10)
    r1 = 1 - sum(ranked[-found.anchors :]) / found.anchors
    assert 100 <= found.anchors <= 400
    assert found.refilled == 0
    assert found.r0 == pytest.approx(r0)
    assert found.r1 == pytest.approx(r1)
    assert found.positives == pytest.approx((sum(ranked) - r0 * n) / (1 - r0 - r1))


@pytest.mark.parametrize("lost", [0.05, 0.3, 0.5])
def test_emptied_rows_follow_from_the_sizes_of_the_others(lost):
    """Exact for expected sizes, whether the emptied rows are refilled or not."""
    rows = np.array([0, 500, 300, 150, 50])  # of 0..4 clean positives
    sizes = np.zeros(5)
    for k, n in enumerate(rows):
        once = np.array([1.0])
        for _ in range(k):
            once = np.convolve(once, [lost, 1 - lost])
        sizes[: k + 1] += n * once
    assert anchors.empty_rows(sizes, lost) == pytest.approx(sizes[0])
    refilled = sizes.copy()
    refilled[:2] = 0, sizes[0] + sizes[1]
    assert anchors.empty_rows(refilled, lost) == pytest.approx(sizes[0])


def prior_scores(noisy):
    """Each label's mean: scores that say nothing of the row."""
    return np.broadcast_to(noisy.mean(0), noisy.shape).copy()


UNINFORMED = {
    "label prior": lambda s, y: prior_scores(y),
    "prior of 5 folds": lambda s, y: np.concatenate(
        [prior_scores(part) for part in np.array_split(y, 5)]
    ),
    "random": lambda s, y: rngs.generator(0, "random").random(y.shape),
    "constant": lambda s, y: np.full(y.shape, 0.3),
    "reversed": lambda s, y: 1 - s,
}


@pytest.mark.parametrize("kind", ["clean", "type 1, 5 %", "type 2, 50 %"])
@pytest.mark.parametrize("scorer", UNINFORMED)
def test_scores_that_do_not_know_the_row_are_rejected(scorer, kind):
    scores, _, noisy = simulate(*KINDS[kind])
    found = rates.estimate(UNINFORMED[scorer](scores, noisy), noisy)
    assert not found.reliable
    assert found.reason
    assert not found.rates.usable  # r0 is wrong, too


@pytest.mark.parametrize("kind", ["clean", "type 1, 5 %", "type 2, 50 %"])
def test_scores_without_certain_positives_are_rejected(kind):
    """Right .6 of the time at best, and half as often at ten times the rank."""
    (r0, r1), draw = KINDS[kind], rngs.generator(0, "plateau")
    rank = draw.permutation(ROWS * LABELS).reshape(ROWS, LABELS)
    clean = draw.random(rank.shape) < 0.6 * np.minimum(1, 100 / (rank + 1)) ** 0.3
    coins = draw.random(rank.shape)
    noisy = np.where(clean, coins >= r1, coins < r0)
    found = rates.estimate(-rank, noisy)
    assert not found.reliable
    assert "plateau" in found.reason
    # Its lowest scores are of positives, too: no r0 to correct with, not even by rows.
    few = np.where(np.arange(ROWS) % 2, 0.0, 2 * found.r0)
    assert rates.of_careful_rows(found, -rank, noisy, few) is found
    assert not found.rates.usable


def annotators(seed=0):
    """(scores, clean, noisy, added): a third of the rows has a tenth of the negatives
    turned on and keeps its positives, the others lose half of theirs."""
    scores, clean, lossy = simulate(0.0, 0.5, seed=seed)
    generous = simulate(0.1, 0.0, seed=seed)[2]
    careless = rngs.generator(seed, "annotators").random(ROWS) < 1 / 3
    noisy = np.where(careless[:, None], generous, lossy)
    return scores, clean, noisy, np.where(careless, 0.1, 0.001)


@pytest.mark.parametrize("seed", range(3))
def test_careful_rows_tell_what_all_rows_lost(seed):
    scores, clean, noisy, added = annotators(seed)
    whole = rates.estimate(scores, noisy)
    found = rates.of_careful_rows(whole, scores, noisy, added)
    assert found.reliable and found.r0 == whole.r0 and found != whole
    assert abs(found.positives / clean.sum() - 1) <= 0.1
    assert abs(found.r1 - realised(clean, noisy)[1]) <= 0.05
    total = found.positives * (1 - found.r1 - found.r0) + found.r0 * noisy.size
    assert total == pytest.approx(noisy.sum())
    doubted = dataclasses.replace(whole, reliable=False, reason="some")
    again = rates.of_careful_rows(doubted, scores, noisy, added)
    assert again.rates == Rates(found.r0, found.r1, "estimated")


def test_careful_rows_confirm_what_was_added():
    """No score is certain, so that r1 is in doubt; what the careless added is not."""
    draw = rngs.generator(0, "careful")
    rank = draw.permutation(ROWS * LABELS).reshape(ROWS, LABELS)
    clean = draw.random(rank.shape) < 0.6 * np.minimum(1, 100 / (rank + 1))
    careless = np.arange(ROWS) % 3 == 0
    noisy = clean | (draw.random(rank.shape) < 0.1 * careless[:, None])
    whole = rates.estimate(-rank, noisy)
    assert not whole.reliable and not whole.rates.usable
    added = np.where(careless, 0.1, 0.001)
    found = rates.of_careful_rows(whole, -rank, noisy, added)
    assert "plateau" in found.reason and not found.reliable
    assert found.rates == Rates(whole.r0, 0.0, "estimated", found.reason, True)
    assert found.rates.usable and "P(1->0) could not be" in found.rates.reason
    assert abs(found.r0 - noisy[clean == 0].mean()) < 0.003
    # A reliable estimate of all rows stands where that of the careful ones does not.
    sure = dataclasses.replace(whole, reliable=True, reason="")
    again = rates.of_careful_rows(sure, -rank, noisy, added)
    assert again.reliable and not again.partial and again.r1 == whole.r1


def test_rows_that_are_alike_are_not_told_apart():
    scores, _, noisy, added = annotators()
    whole = rates.estimate(scores, noisy)
    for same in (np.full(ROWS, whole.r0), np.zeros(ROWS)):
        assert rates.of_careful_rows(whole, scores, noisy, same) is whole
    few = np.where(np.arange(ROWS) < ROWS / 5, 0.0, 0.1)
    assert rates.of_careful_rows(whole, scores, noisy, few) is whole
    # Rows that are called careful, and are not.
    mixed = np.where(np.arange(ROWS) % 2, 0.0, 0.1)
    assert rates.of_careful_rows(whole, scores, noisy, mixed) is whole


def test_one_positive_of_each_row_is_a_guess():
    """Type 3: no entry survives beside another one."""
    scores, clean, noisy = simulate(0, 0, kind="single")
    found = rates.estimate(scores, noisy)
    _, lost = realised(clean, noisy)
    highest = noisy[np.arange(len(noisy)), scores.argmax(1)]
    assert found.r1 == pytest.approx(1 - highest.mean())
    assert abs(found.r1 - lost) < 0.15
    assert found.positives == pytest.approx(noisy.sum() / highest.mean())
    assert not found.reliable and found.partial and found.rates.usable
    assert "no row has two labels" in found.reason
    assert f"{1 / (1 - found.r1):.2f} is a guess" in found.reason
    assert f"counts as {found.r1:.3g}" in found.rates.reason
    # Of a few rows that have, none of which tells: it looks like r1 = 1.
    noisy[:3, :2] = 1
    found = rates.estimate(scores, noisy)
    assert "1 - r0 - r1" in found.reason
    assert not found.rates.usable
    assert found.reason in found.rates.reason


def test_single_labels_of_which_nothing_can_be_guessed():
    scores, _, noisy = simulate(0, 0, kind="single")
    priors = np.broadcast_to(noisy.mean(0), scores.shape)
    shuffled = rngs.generator(0, "shuffled").permutation(scores)
    for some, given, why in (
        (priors, noisy, "most likely label is its label"),
        (shuffled, noisy, "most likely label is its label"),
        (scores[:99], noisy[:99], "99 rows"),
    ):
        found = rates.estimate(some, given)
        assert not found.partial and not found.rates.usable and why in found.reason


def test_a_guess_leaves_as_much_as_a_correction_can_bear():
    """Rows of a hundred labels: the highest-scored one is hardly ever that which is
    left."""
    draw = rngs.generator(0, "many")
    topic = draw.integers(0, 10, 2000)
    scores = draw.random((2000, 1000)) + (np.arange(1000) // 100 == topic[:, None])
    noisy = np.zeros(scores.shape, np.uint8)
    noisy[np.arange(2000), 100 * topic + draw.integers(0, 100, 2000)] = 1
    found = rates.estimate(scores, noisy)
    assert found.r1 == pytest.approx(0.95) and found.rates.usable
    # Unscored: the highest of equals is none of them.
    assert not rates.estimate(np.zeros_like(scores), noisy).partial


def test_an_estimate_that_chance_could_move_far_is_rejected():
    """Few positives among many false ones: an error of r0 moves all of them."""
    scores, clean, noisy = simulate(0.2, 0.2, rows=400)
    found = rates.estimate(scores, noisy)
    assert not found.reliable
    assert "standard error" in found.reason
    assert found.positives_spread > 0.15 * found.positives


@pytest.mark.parametrize("r0, r1", [(0.5, 0.5), (0.3, 0.68), (0.0, 0.97), (0.5, 0.47)])
def test_rates_that_leave_no_information_are_rejected(r0, r1):
    scores, _, noisy = simulate(r0, r1)
    found = rates.estimate(scores, noisy)
    assert not found.reliable
    assert np.isfinite([found.r0, found.r1, found.positives]).all()


def degenerate():
    """Name -> (scores, labels)."""
    draw = rngs.generator(0, "degenerate")
    some = draw.random((40, 5))
    label = (some > 0.7).astype(np.uint8)
    many = draw.random((500, 40))
    return {
        "no ones": (many, np.zeros(many.shape, np.uint8)),
        "all ones": (many, np.ones(many.shape, np.uint8)),
        "a single one": (many, (many == many.max()).astype(np.uint8)),
        "constant": (np.zeros_like(many), (many > 0.9).astype(np.uint8)),
        "few rows": (some, label),
        "one row": (some[:1], label[:1]),
        "one label": (many.reshape(-1, 1), (many.reshape(-1, 1) > 0.9).astype(int)),
        "no rows": (some[:0], label[:0]),
        "no labels": (some[:, :0], label[:, :0]),
    }


@pytest.mark.parametrize("case", degenerate())
def test_degenerate_input_is_finite_and_rejected(case):
    scores, labels = degenerate()[case]
    found = rates.estimate(scores, labels)
    assert not found.reliable
    assert found.reason
    assert np.isfinite([found.r0, found.r1, found.positives]).all()
    assert found.r0_per_label.shape == (labels.shape[1],)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_must_be_finite(value):
    with pytest.raises(ValueError, match="finite"):
        rates.estimate(np.array([[0.1, value]]), np.array([[0, 1]], np.uint8))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        rates.estimate(np.zeros((2, 3)), np.zeros((3, 2), np.uint8))


def test_labels_by_themselves():
    """Those with few ones have no r1; the others' anchors are impure: r1 too high."""
    scores, clean, noisy = simulate(0.02, 0.3)
    found = rates.estimate(scores, noisy)
    known = ~np.isnan(found.r1_per_label)
    frequent = clean.sum(0) > 250
    assert frequent.sum() > 3
    assert known[frequent].all() and not known[clean.sum(0) < 80].any()
    np.testing.assert_array_equal(known, ~np.isnan(found.positives_per_label))
    true = 1 - (noisy * clean).sum(0) / clean.sum(0)
    error = found.r1_per_label[frequent] - true[frequent]
    assert -0.06 < error.mean() < 0.12
    ratio = found.positives_per_label[frequent] / clean.sum(0)[frequent]
    assert 0.9 < ratio.mean() < 1.15
    assert np.abs(found.r0_per_label - 0.02).max() < 0.02


def test_thresholds_by_estimated_rates_are_as_good_as_by_known_ones():
    scores, clean, noisy = simulate(0.05, 0.05)
    scores = 0.05 + 0.9 * scores
    true = thresholds.f1_curves(scores, clean, thresholds.FINE_GRID)["miF1"]

    def reached(given):
        curve = thresholds.corrected_curves(
            scores, noisy, noisy.mean(0), given, thresholds.FINE_GRID
        )["miF1"]
        return true[curve.argmax()]

    found = rates.estimate(scores, noisy)
    assert found.rates == Rates(found.r0, found.r1, "estimated")
    noisy_best = true[
        thresholds.f1_curves(scores, noisy, thresholds.FINE_GRID)["miF1"].argmax()
    ]
    assert reached(found.rates) > reached(Rates(*realised(clean, noisy))) - 0.01
    assert reached(found.rates) > noisy_best + 0.01
