"""Threshold protocols against loops over thresholds, rows and labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbmlc_jax import metrics, rngs, thresholds
from cbmlc_jax.thresholds import Rates

# Spec section 5: .01-.10 by .01, then .15-.95 by .05.
GRID = [
    0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10,
    0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60,
    0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95,
]  # fmt: skip
CLEAN = Rates(0.0, 0.0)


def example(rows=30, labels=5, seed=0):
    """Scores, 0/1 labels (an empty row, an all-zero column), and priors."""
    draw = rngs.generator(seed, "thresholds", rows, labels)
    scores = draw.random((rows, labels)) ** 2
    scores[:3] = draw.choice(GRID, (3, labels))
    true = (draw.random((rows, labels)) < 0.1 + 0.6 * scores).astype(np.uint8)
    true[4], true[:, 1] = 0, 0
    return scores, true, draw.uniform(0.02, 0.4, labels)


def naive_f1s(scores, labels, t) -> dict[str, float]:
    """The three F1s at one threshold under the default 0/0 policies, by loops."""
    rows, columns = scores.shape
    tp, fp, fn = ([0] * columns for _ in range(3))
    per_row = []
    for i in range(rows):
        hit = size = 0
        for l in range(columns):
            p, y = bool(scores[i, l] >= t), bool(labels[i, l])
            tp[l] += p and y
            fp[l] += p and not y
            fn[l] += y and not p
            hit, size = hit + (p and y), size + p + y
        if size:
            per_row.append(2 * hit / size)
    sizes = [2 * a + b + c for a, b, c in zip(tp, fp, fn, strict=True)]
    return {
        "ebF1": sum(per_row) / len(per_row) if per_row else 0.0,
        "miF1": 2 * sum(tp) / sum(sizes) if sum(sizes) else 0.0,
        "maF1": sum(2 * a / s if s else 0.0 for a, s in zip(tp, sizes, strict=True))
        / columns,
    }


def naive_corrected(scores, noisy, prior, r0, r1, t) -> dict[str, float]:
    """The definitions of corrected_val in spec section 5, letter by letter."""
    n, columns = scores.shape
    c = [[(noisy[i, l] - r0) / (1 - r0 - r1) for l in range(columns)] for i in range(n)]
    p = [[1 if scores[i, l] >= t else 0 for l in range(columns)] for i in range(n)]

    def clip(x, low, high):
        return min(max(x, low), high)

    hits = [sum(p[i][l] * c[i][l] for i in range(n)) for l in range(columns)]
    pred = [sum(p[i][l] for i in range(n)) for l in range(columns)]
    positives = [
        n * clip((prior[l] - r0) / (1 - r0 - r1), 0, 1) for l in range(columns)
    ]
    size = sum(pred) + sum(positives)
    terms = []
    for l in range(columns):
        bottom = pred[l] + positives[l]
        term = 2 * clip(hits[l], 0, pred[l]) / bottom if bottom else 0.0
        terms.append(clip(term, 0, 1))
    nbar = max(1.0, sum(positives) / n)
    return {
        "miF1": 2 * sum(hits) / size if size else 0.0,
        "maF1": sum(terms) / columns,
        "ebF1": sum(
            2 * sum(p[i][l] * c[i][l] for l in range(columns)) / (sum(p[i]) + nbar)
            for i in range(n)
        )
        / n,
    }


def assert_curves(curves, naive):
    """Every curve equals the naive value at every threshold of the spec's grid."""
    assert set(curves) == {"ebF1", "miF1", "maF1"}
    for i, t in enumerate(GRID):
        for name, value in naive(t).items():
            assert curves[name][i] == pytest.approx(value, abs=1e-12), (name, t)


def test_grid_is_the_one_of_the_spec():
    assert thresholds.GRID.tolist() == GRID
    assert len(GRID) == 27


def test_the_four_protocols():
    assert set(thresholds.PROTOCOLS) == {
        "oracle", "clean_val", "noisy_val", "corrected_val",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_curves_equal_naive_f1s(seed, dtype):
    scores, labels, _ = example(seed=seed)
    scores = scores.astype(dtype)
    wide = scores.astype(np.float64)  # what a float32 score is, exactly
    assert_curves(
        thresholds.f1_curves(scores, labels), lambda t: naive_f1s(wide, labels, t)
    )


def test_curves_equal_metrics_of_applied_thresholds():
    scores, labels, _ = example(60, 8)
    scores = scores.astype(np.float32)
    curves = thresholds.f1_curves(scores, labels)
    for i, t in enumerate(GRID):
        got = metrics.f1_scores(metrics.count(thresholds.apply(scores, t), labels))
        assert {k: c[i] for k, c in curves.items()} == pytest.approx(got)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0]), st.integers(0, 1)),
        min_size=4,
        max_size=12,
    )
)
def test_curves_of_any_rows_are_finite_and_naive(entries):
    scores, labels = (
        np.array(c[: len(c) // 2 * 2]).reshape(-1, 2)
        for c in zip(*entries, strict=True)
    )
    curves = thresholds.f1_curves(scores, labels)
    assert all(np.isfinite(c).all() for c in curves.values())
    assert_curves(curves, lambda t: naive_f1s(scores, labels, t))


def test_a_score_at_the_threshold_is_predicted():
    scores = np.array([[0.30, np.nextafter(0.30, 0)]])
    assert thresholds.apply(scores, 0.30).tolist() == [[True, False]]
    curves = thresholds.f1_curves(scores, np.array([[1, 0]], np.uint8))
    at = GRID.index(0.30)
    assert curves["miF1"][at] == 1.0
    assert curves["miF1"][at - 1] == pytest.approx(2 / 3)
    assert curves["miF1"][at + 1] == 0.0


def test_a_threshold_for_each_label():
    scores = np.array([[0.2, 0.2], [0.6, 0.6]], np.float32)
    got = thresholds.apply(scores, np.array([0.5, 0.1]))
    assert got.tolist() == [[False, True], [True, True]]


def test_curves_with_empty_rows_and_columns():
    """Nothing true, nothing predicted: 0, and no warning."""
    zeros = np.zeros((4, 3))
    for curve in thresholds.f1_curves(zeros, zeros.astype(np.uint8)).values():
        np.testing.assert_array_equal(curve, 0.0)
    curves = thresholds.corrected_curves(zeros, zeros, np.zeros(3), CLEAN)
    for curve in curves.values():
        np.testing.assert_array_equal(curve, 0.0)


@pytest.mark.parametrize(
    "r0, r1", [(0.0, 0.0), (0.05, 0.05), (0.0, 0.5), (0.02, 0.37), (0.4, 0.4)]
)
@pytest.mark.parametrize("seed", range(2))
def test_corrected_curves_equal_the_definitions(seed, r0, r1):
    scores, noisy, prior = example(seed=seed)
    prior[0], prior[3] = 0.001, 0.9  # clipped at 0 and at 1 under some of the rates
    curves = thresholds.corrected_curves(scores, noisy, prior, Rates(r0, r1))
    assert_curves(curves, lambda t: naive_corrected(scores, noisy, prior, r0, r1, t))


def test_corrected_curves_by_hand():
    """r0 = .1, r1 = .4: c = (y - .1) / .5, which is 1.8 for 1 and -.2 for 0.

    At t = .5: label 0 predicts rows 0 and 1, label 1 predicts row 0.
    TP = (1.8 - .2, 1.8) = (1.6, 1.8); clipped to pred = (2, 1): (1.6, 1).
    P = 2 clip(((.35, .2) - .1) / .5, 0, 1) = 2 (.5, .2) = (1, .4).
    miF1 = 2 (1.6 + 1.8) / (3 + 1.4) = 6.8 / 4.4.
    maF1 = (3.2 / 3 -> 1, 2 / 1.4 -> 1) / 2 = 1.
    nbar = max(1, 1.4 / 2) = 1; ebF1 = (2 * 3.6 / (2 + 1) + 2 * -.2 / (1 + 1)) / 2.
    """
    scores = np.array([[0.9, 0.6], [0.5, 0.3]])
    noisy = np.array([[1, 1], [0, 1]], np.uint8)
    curves = thresholds.corrected_curves(
        scores, noisy, np.array([0.35, 0.2]), Rates(0.1, 0.4)
    )
    at = GRID.index(0.5)
    assert curves["miF1"][at] == pytest.approx(6.8 / 4.4)
    assert curves["maF1"][at] == pytest.approx(1.0)
    assert curves["ebF1"][at] == pytest.approx((7.2 / 3 - 0.4 / 2) / 2)


def test_without_noise_and_with_the_true_prior_the_correction_does_nothing():
    scores, labels, _ = example()
    corrected = thresholds.corrected_curves(scores, labels, labels.mean(0), CLEAN)
    plain = thresholds.f1_curves(scores, labels)
    np.testing.assert_allclose(corrected["miF1"], plain["miF1"])
    np.testing.assert_allclose(corrected["maF1"], plain["maF1"])


def test_without_noise_ebf1_is_exact_where_rows_have_equally_many_labels():
    scores, _, _ = example()
    labels = (np.argsort(np.argsort(-scores, axis=1), axis=1) < 2).astype(np.uint8)
    labels[::3] = labels[::3, ::-1]
    corrected = thresholds.corrected_curves(scores, labels, labels.mean(0), CLEAN)
    plain = thresholds.f1_curves(scores, labels)
    np.testing.assert_allclose(corrected["ebF1"], plain["ebF1"])


def test_correction_is_unbiased_over_noise_draws():
    """Mean corrected miF1 over 300 draws is the clean one (the prior being exact)."""
    scores, labels, _ = example(80, 5)
    r0, r1 = 0.1, 0.3
    prior = labels.mean(0) * (1 - r1) + (1 - labels.mean(0)) * r0
    draw = rngs.generator(0, "flips")
    curves = []
    for _ in range(300):
        coins = draw.random(labels.shape)
        noisy = np.where(labels == 1, coins >= r1, coins < r0)
        curves.append(
            thresholds.corrected_curves(scores, noisy, prior, Rates(r0, r1))["miF1"]
        )
    error = np.mean(curves, 0) - thresholds.f1_curves(scores, labels)["miF1"]
    assert (np.abs(error) < 5 * np.std(curves, 0) / np.sqrt(300) + 1e-12).all()
    assert np.abs(error[:20]).max() < 0.02


def kept_one(clean, random) -> np.ndarray:
    """Of each row's labels one at random."""
    order = np.where(clean != 0, random.random(clean.shape), -1)
    return (clean != 0) & (order == order.max(1, keepdims=True))


def test_a_kept_label_stands_for_those_of_its_row():
    """Mean corrected miF1 of 300 draws of type 3 is the clean one; by r1 it is not."""
    scores, labels, _ = example(80, 5)
    labels[:, 0] |= labels.sum(1) == 0
    sizes, r1 = labels.sum(1).astype(float), 1 - len(labels) / labels.sum()
    prior, rates = labels.mean(0) * (1 - r1), Rates(0.0, r1)
    draw, curves = rngs.generator(0, "flips"), {"sizes": [], "r1": []}
    for _ in range(300):
        noisy = kept_one(labels, draw)
        for name, m in (("sizes", sizes), ("r1", None)):
            found = thresholds.corrected_curves(scores, noisy, prior, rates, sizes=m)
            curves[name].append(found["miF1"])
    clean = thresholds.f1_curves(scores, labels)["miF1"]
    error = {name: np.mean(c, 0) - clean for name, c in curves.items()}
    spread = np.std(curves["sizes"], 0) / np.sqrt(300)
    assert (np.abs(error["sizes"]) < 5 * spread + 1e-12).all()
    assert np.abs(error["r1"]).max() > 0.04 > 5 * np.abs(error["sizes"]).max()


# Type 1 at 5 % and type 2 at 50 %, the ends of the paper's text levels.
SIMULATED = {"type 1": (0.05, 0.05), "type 2": (0.0, 0.5)}


def simulate(kind: str, draw: int) -> dict[str, dict[str, float]]:
    """True test F1 at the thresholds of three protocols, for a calibrated scorer.

    150 labels of about 2.4 positives a row, as bibtex; the scorer has learnt
    P(noisy label | x) up to an error of its own.
    """
    r0, r1 = SIMULATED[kind]
    random = rngs.generator(draw, "simulate " + kind)
    base = random.normal(-9.0, 0.5, 150)

    def rows(n):
        logit = base + 3.5 * random.standard_normal((n, 150))
        clean = (random.random((n, 150)) < 1 / (1 + np.exp(-logit))).astype(np.uint8)
        coins = random.random((n, 150))
        noisy = np.where(clean == 1, coins >= r1, coins < r0).astype(np.uint8)
        seen = logit + random.standard_normal((n, 150))
        scores = r0 + (1 - r0 - r1) / (1 + np.exp(-seen))
        return scores, clean, noisy

    _, train_clean, train_noisy = rows(4400)
    known = Rates(
        train_noisy[train_clean == 0].mean(), 1 - train_noisy[train_clean == 1].mean()
    )
    scores, _, noisy = rows(488)
    test_scores, test, _ = rows(2500)
    true = thresholds.f1_curves(test_scores, test)
    chosen = {
        "oracle": thresholds.choose(true),
        "noisy_val": thresholds.choose(thresholds.f1_curves(scores, noisy)),
        "corrected_val": thresholds.choose(
            thresholds.corrected_curves(scores, noisy, train_noisy.mean(0), known)
        ),
    }
    return {
        protocol: {name: true[name][GRID.index(t)] for name, t in best.items()}
        for protocol, best in chosen.items()
    }


@pytest.mark.parametrize("kind", SIMULATED)
def test_corrected_thresholds_are_near_the_oracle_under_noise(kind):
    draws = [simulate(kind, d) for d in range(6)]
    for name in metrics.F1_NAMES:
        oracle, noisy, corrected = (
            np.mean([d[protocol][name] for d in draws])
            for protocol in ("oracle", "noisy_val", "corrected_val")
        )
        assert oracle - corrected < 0.015, name
        if kind == "type 1":
            assert corrected - noisy > 0.06, name
        elif name == "miF1":
            assert corrected > noisy


@pytest.mark.parametrize(
    "r0, r1, usable",
    [
        (0.5, 0.5, False),  # type 1 at 50 %
        (0.0, 0.96, False),
        (0.0, 0.94, True),
        (0.48, 0.48, False),
        (0.45, 0.45, True),
        (0.0, 0.0, True),
        (0.6, 0.6, False),
    ],
)
def test_rates_without_information(r0, r1, usable):
    rates = Rates(r0, r1)
    assert rates.usable == usable
    assert rates.information == pytest.approx(1 - r0 - r1)
    scores, noisy, prior = example()
    if usable:
        thresholds.corrected_curves(scores, noisy, prior, rates)
    else:
        with pytest.raises(ValueError, match=f"{r0:.3f}.*{r1:.3f}.*information"):
            thresholds.corrected_curves(scores, noisy, prior, rates)


def test_choose_takes_the_best_threshold_of_each_curve():
    first, second = np.zeros(27), np.full(27, -1.0)
    first[12], second[26] = 0.4, -0.5
    assert thresholds.choose({"ebF1": first, "maF1": second}) == {
        "ebF1": 0.25,
        "maF1": 0.95,
    }


def test_choose_breaks_ties_towards_the_lower_threshold():
    curve = np.zeros(27)
    curve[[7, 20, 26]] = 0.4
    assert thresholds.choose({"miF1": curve}) == {"miF1": 0.08}
    assert thresholds.choose({"miF1": np.zeros(27)}) == {"miF1": 0.01}


def naive_expected_per_label(scores, probabilities) -> list[float]:
    """The formula, one threshold after the other, the highest first."""
    chosen = []
    for s, p in zip(scores.T, probabilities.T, strict=True):
        best, values = -1.0, sorted({float(x) for x in s}, reverse=True)
        for t, after in zip(values, [*values[1:], values[-1]], strict=True):
            said = s >= t
            f1 = 2 * float(p[said].sum()) / (said.sum() + p.sum())
            if f1 > best + 1e-12 and (t == values[0] or p[said].min() >= 0.05):
                best, threshold = f1, (t + after) / 2
        chosen.append(threshold)
    return chosen


@pytest.mark.parametrize("power", [1, 3])
def test_expected_thresholds_equal_the_formula(power):
    scores, _, _ = example(60, 7)
    scores[:20, 3] = 0.4  # ties
    scores[:, 6] = 0.4
    p = scores**power
    got = thresholds.expected_per_label(scores, p)
    assert got.tolist() == pytest.approx(naive_expected_per_label(scores, p))
    assert got[6] == 0.4


@pytest.mark.parametrize("p", [0.0, 0.001, 0.04])
def test_a_label_without_probability_is_said_of_the_best_row_at_most(p):
    """Its expected F1 is the better the more rows are said: 2 p at best."""
    scores = rngs.generator(0, "scores").random((60, 1))
    [got] = thresholds.expected_per_label(scores, np.full((60, 1), p))
    assert (scores >= got).sum() == 1


def test_the_best_threshold_is_half_of_the_best_f1():
    """Lipton et al. 2014: said where p >= F1 / 2, and nowhere else."""
    p = rngs.generator(0, "p").beta(0.3, 2.0, (500, 8))
    scores = np.sqrt(p)
    got = thresholds.expected_per_label(scores, p)
    said = scores >= got
    f1 = 2 * (p * said).sum(0) / (said.sum(0) + p.sum(0))
    np.testing.assert_array_equal(said, p >= f1 / 2)


def test_with_labels_for_probabilities_each_label_gets_its_own_best_f1():
    scores, labels, _ = example(200, 6)
    got = thresholds.expected_per_label(scores, labels.astype(float))
    grid = np.unique(scores)
    for l in (0, 2, 3, 4, 5):
        own = thresholds.f1_curves(scores[:, [l]], labels[:, [l]], grid)["miF1"]
        reached = metrics.count(thresholds.apply(scores, got)[:, [l]], labels[:, [l]])
        assert metrics.f1_scores(reached)["miF1"] == pytest.approx(own.max())


def test_expected_thresholds_are_better_for_rare_labels_under_noise():
    """60 labels of 3 to 40 positives, half of which are turned off: on new rows
    above one threshold for all, and above thresholds from each label's own count."""
    r1, random = 0.5, np.random.default_rng(0)
    base = np.linspace(-6.5, -3.5, 60)

    def rows(n):
        logit = 1.5 * random.standard_normal((n, 60)) + base
        p = 1 / (1 + np.exp(-logit))
        clean = (random.random(p.shape) < p).astype(np.uint8)
        return p, clean, clean * (random.random(p.shape) >= r1).astype(np.uint8)

    p, _, noisy = rows(1500)
    test, labels, _ = rows(20000)
    rates = Rates(0.0, r1)
    curves = thresholds.corrected_curves(p, noisy, noisy.mean(0), rates)
    one = thresholds.choose(curves)["maF1"]
    counted = thresholds.expected_per_label(p, noisy / (1 - r1))
    expected = thresholds.expected_per_label(p, p)
    maf1 = {}
    for name, t in (("one", one), ("counted", counted), ("expected", expected)):
        counts = metrics.count(thresholds.apply(test, t), labels)
        maf1[name] = metrics.f1_scores(counts)["maF1"]
    assert maf1["expected"] > maf1["one"] + 0.008, maf1
    assert maf1["expected"] > maf1["counted"] + 0.02, maf1
