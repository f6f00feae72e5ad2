"""Wrong labels: the posterior by hand, planted flips against plain scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

import cbmlc_jax
from cbmlc_jax import issues, noise, rngs
from cbmlc_jax.issues import find_label_issues, precision


def simulated(seed: int = 0, rows: int = 1500, labels: int = 20):
    """Clean labels of rows with a topic each, and scores that see it through a haze.

    Labels 2 k and 2 k + 1 mostly go together, beyond what the scores say.
    """
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, labels // 2, rows)
    near = topic[:, None] == np.arange(labels // 2)
    held = rng.random(near.shape) < np.where(near, 0.9, 0.05)
    clean = np.repeat(held, 2, 1) & (rng.random((rows, labels)) < 0.9)
    haze = rng.normal(size=near.shape) * 1.5
    logits = np.repeat(np.where(near, 1.5, -3.0) + haze, 2, 1)
    return clean.astype(np.uint8), expit(logits).astype(np.float32)


def noisy(clean: np.ndarray, kind: str, rate: float) -> np.ndarray:
    return noise.inject(rngs.stream(1, "noise"), clean, kind, rate=rate)


def test_the_posterior_is_bayes_rule():
    clean = np.array([[0.3, 0.8]])
    r0, r1 = 0.1, 0.4
    # Joint probabilities of (clean, given), written out.
    one, zero = clean * (1 - r1), (1 - clean) * r0  # given 1
    found = issues._wrong(clean, np.array([[True, True]]), r0, r1)
    np.testing.assert_allclose(found, zero / (one + zero))
    one, zero = clean * r1, (1 - clean) * (1 - r0)  # given 0
    found = issues._wrong(clean, np.array([[False, False]]), r0, r1)
    np.testing.assert_allclose(found, one / (one + zero))


@pytest.mark.parametrize(("kind", "rate"), [("ncar", 0.05), ("nar", 0.4)])
def test_planted_flips_are_found_and_counted(kind, rate):
    clean, scores = simulated()
    labels = noisy(clean, kind, rate)
    wrong = labels != clean
    realised = noise.realised(clean, labels)
    found = find_label_issues(labels, scores, (realised.p01, realised.p10))
    plain = np.abs(labels - scores)
    ours, theirs = precision(found.wrong, wrong), precision(plain, wrong)
    assert found.related
    assert ours[0] > theirs[0] + 0.05 and ours[1] > theirs[1] + 0.05, (ours, theirs)
    # Related labels as evidence count some missing ones twice: 20 % too many for nar.
    bound = 0.2 if kind == "ncar" else 0.25
    assert abs(found.expected / wrong.sum() - 1) < bound
    assert wrong[found.doubtful].mean() > 0.6
    if kind == "nar":  # estimated rates are good enough to keep this
        blind = precision(find_label_issues(labels, scores).wrong, wrong)
        assert blind[1] > theirs[1] + 0.05


def test_the_other_labels_of_a_row_are_evidence(monkeypatch):
    clean, scores = simulated()
    labels = noisy(clean, "nar", 0.3)
    wrong = labels != clean
    with_others = find_label_issues(labels, scores, (0.0, 0.3)).wrong
    monkeypatch.setattr(issues, "FEWEST_PAIRS", 10)
    alone = find_label_issues(labels, scores, (0.0, 0.3))
    assert not alone.related
    assert precision(with_others, wrong)[1] > 1.2 * precision(alone.wrong, wrong)[1]


def test_labels_that_displace_each_other_are_no_evidence():
    """One label a row is left: the others' absence says nothing of a missing one."""
    clean, scores = simulated()
    labels = noisy(clean, "single_positive", 0.0)
    wrong = labels != clean
    found = find_label_issues(labels, scores)
    assert not found.related and found.rates.doubt
    assert precision(found.wrong, wrong)[1] > precision(abs(labels - scores), wrong)[1]


def test_a_doubtful_estimate_is_better_than_anchors_that_were_refilled():
    """Rows of one label keep it (keep_one), those of two lose one: most anchors are
    lone labels, which say that no label is ever lost."""
    clean, scores = simulated()
    rows, topic = np.arange(len(clean)), scores.argmax(1)
    lone = rows % 5 > 0
    clean[lone] = 0
    clean[rows, topic] = 1
    scores[rows, topic] = np.where(lone, 0.999, 0.99)
    labels = noisy(clean, "nar", 0.5)
    realised = noise.realised(clean, labels)
    found = issues.estimated(scores, labels != 0)
    off = abs(found.r1 - realised.p10)
    assert off < abs(issues.rates_lib.anchored(scores, labels)[1] - realised.p10)
    assert found.doubt


def test_labels_may_come_in_any_order():
    clean, scores = simulated(rows=300)
    labels = noisy(clean, "ncar", 0.05)
    order = np.random.default_rng(3).permutation(labels.shape[1])
    found = find_label_issues(labels, scores).wrong[:, order]
    other = find_label_issues(labels[:, order], scores[:, order]).wrong
    np.testing.assert_allclose(found, other, atol=1e-4)


def test_what_is_ranked():
    wrong = np.float32([[0.1, 0.9], [0.9, 0.4]])
    rates = issues.Rates(0.1, 0.1)
    found = issues.Issues(wrong, np.uint8([[1, 0], [0, 1]]), rates, True)
    assert found.ranked().tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert found.ranked(1).tolist() == [[0, 1]] and not found.ranked(0).size
    assert found.ranked(9).tolist() == found.ranked().tolist()
    assert found.doubtful.sum() == 2 and abs(found.expected - 2.3) < 1e-6
    np.testing.assert_allclose(found.posterior(), [[0.9, 0.9], [0.9, 0.6]], rtol=1e-6)
    hits = np.array([[True, False], [True, False]])
    # In order: miss, hit | miss, hit.
    assert precision(wrong, hits) == (0.5, (1 / 2 + 2 / 4) / 2)
    assert precision(wrong, ~hits | hits)[0] == 1 and precision(wrong, hits & False)


def test_few_or_constant_labels_stay_finite():
    rng = np.random.default_rng(0)
    scores = rng.random((7, 3))
    labels = np.zeros((7, 3), np.uint8)
    labels[:, 1] = 1
    for given in (labels, 1 - labels, labels * 0, labels * 0 + 1):
        found = find_label_issues(given, scores)
        assert np.isfinite(found.wrong).all() and 0 <= found.wrong.min()
    assert np.isfinite(find_label_issues(labels[:1], scores[:1] * 0).wrong).all()
    ignored = labels != 0
    assert not find_label_issues(labels, scores, ignored=ignored).wrong[ignored].any()


def test_mistakes_are_named():
    labels, scores = np.eye(3, dtype=np.uint8), np.full((3, 3), 0.5)
    for arguments, part in (
        ((labels, scores[:2]), "must both be"),
        ((labels * 2, scores), "not all 0 or 1"),
        ((labels, scores + 1), r"in \[0, 1\]"),
        ((labels, scores * np.nan), r"in \[0, 1\]"),
        ((labels, scores, (0.5, 0.6)), "sum to less"),
        ((labels, scores, (-0.1, 0.6)), "at least 0"),
    ):
        with pytest.raises(ValueError, match=part):
            find_label_issues(*arguments)


def test_it_is_at_hand_in_the_package():
    assert cbmlc_jax.find_label_issues is find_label_issues
    with pytest.raises(AttributeError, match="no attribute 'find_labels'"):
        _ = cbmlc_jax.find_labels


def test_rows_of_a_careless_annotator_stand_first():
    """A third of the rows has a tenth of the labels wrong, the others none."""
    rng = np.random.default_rng(0)
    truth = rng.beta(0.2, 6.0, (1500, 60))
    clean = rng.random(truth.shape) < truth
    careless = np.arange(1500) % 3 == 0
    wrong = careless[:, None] & (rng.random(truth.shape) < 0.1)
    labels = (clean ^ wrong).astype(np.uint8)
    realised = noise.realised(clean.astype(np.uint8), labels)
    rates = realised.p01, realised.p10
    scores = (truth + (1 - 2 * truth) * wrong.mean()).astype(np.float32)
    found = find_label_issues(labels, scores, rates)
    at_n, average = precision(found.wrong, wrong)
    plain = precision(np.abs(labels - scores), wrong)
    assert at_n > plain[0] + 0.05 and average > plain[1] + 0.03, (at_n, average, plain)
    assert wrong[found.doubtful].mean() > 0.8
