"""Kernel ridge regression: its algebra against refits, and what the stages are for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.kernel_ridge import KernelRidge as Reference
from sklearn.preprocessing import normalize

from cbmlc_jax import metrics, rngs
from cbmlc_jax.models.baselines import kernel_ridge, lr_knn
from cbmlc_jax.models.baselines.kernel_ridge import KernelRidge


def rows_and_labels(rows=200, labels=12, words=40, seed=0):
    """Rows of few topics; a topic has words and several labels that go together."""
    draw = rngs.generator(seed, "kernel ridge", rows)
    topics = 6
    topic = draw.random((rows, topics)) < 0.25
    often = np.repeat(np.eye(topics), -(-words // topics), axis=1)[:, :words]
    inputs = draw.random((rows, words)) < 0.05 + 0.35 * np.clip(topic @ often, 0, 1)
    says = draw.random((topics, labels)) < 0.3
    chosen = (topic.astype(int) @ says > 0) & (draw.random((rows, labels)) < 0.9)
    return inputs.astype(np.float32), chosen.astype(np.uint8)


def best(scores, truth):
    """Largest miF1 over thresholds."""
    return max(
        metrics.f1_scores(metrics.count(scores >= t, truth.astype(bool)))["miF1"]
        for t in np.linspace(0.05, 0.95, 19)
    )


def test_one_stage_is_ridge_regression_with_weights():
    inputs, labels = rows_and_labels()
    weights = rngs.generator(1, "weights").random(200).astype(np.float32) + 0.5
    # Whole numbers would be turned into tf-idf.
    inputs = normalize(inputs + 1e-3)
    cosine = inputs @ inputs.T
    mean = np.average(labels, axis=0, weights=weights)
    reference = Reference(kernel="precomputed", alpha=0.7)
    reference.fit(cosine + 2 * cosine**2, labels - mean, sample_weight=weights)
    sparse = scipy.sparse.csr_array(inputs)
    model = KernelRidge(penalty=0.7, scores_weight=0.0)
    params = model.fit(sparse, labels, weights=weights)
    queries = sparse[:9]
    wanted = mean + reference.predict((cosine + 2 * cosine**2)[:9])
    found = model.scores(params, queries)
    np.testing.assert_allclose(found, np.clip(wanted, 0, 1), atol=2e-4)


def test_leave_one_out_scores_are_those_of_refits():
    inputs, labels = rows_and_labels(rows=25)
    kernel = inputs.astype(np.float64) @ inputs.T
    mean, doubt = labels.mean(0), np.linspace(0.5, 3, 25)
    _, seen = kernel_ridge.leave_one_out(kernel, labels, mean, doubt)
    for i in range(25):
        others = np.delete(np.arange(25), i)
        a, _ = kernel_ridge.leave_one_out(
            kernel[np.ix_(others, others)], labels[others], mean, doubt[others]
        )
        np.testing.assert_allclose(seen[i], mean + kernel[i, others] @ a, atol=1e-9)


@pytest.mark.parametrize("dense", [False, True])
def test_the_second_stage_helps_where_labels_go_together(dense):
    inputs, labels = rows_and_labels(rows=900, labels=30)
    given = inputs if dense else scipy.sparse.csr_array(inputs)
    found = {}
    for weight in (0.0, 1.0):
        model = KernelRidge(scores_weight=weight)
        params = model.fit(given[:600], labels[:600])
        found[weight] = best(model.scores(params, given[600:]), labels[600:])
    assert found[1.0] > found[0.0] + 0.005, found
    assert found[0.0] > 0.5


def test_rows_with_added_labels_count_less():
    inputs, labels = rows_and_labels(rows=900)
    draw = rngs.generator(2, "added")
    added = np.where(np.arange(600) < 450, 0.4, 0.0).astype(np.float32)
    noisy = labels[:600] | (draw.random((600, 12)) < added[:, None])
    given, model = scipy.sparse.csr_array(inputs), KernelRidge()
    scores = [
        model.scores(model.fit(given[:600], noisy, rates), given[600:])
        for rates in (None, added)
    ]
    plain, corrected = (best(s, labels[600:]) for s in scores)
    assert corrected > plain + 0.01
    # What was added is taken away: the scores are those of labels that hold.
    assert abs(scores[1].mean() - labels.mean()) < 0.03 < scores[0].mean() - 0.2
    worth = lr_knn.trust(added, noisy)
    assert worth.max() == 1 and worth[0] < 0.6 and (worth[450:] == 1).all()


def test_the_order_of_rows_does_not_matter():
    inputs, labels = rows_and_labels()
    order = rngs.generator(3, "order").permutation(200)
    model, sparse = KernelRidge(), scipy.sparse.csr_array(inputs)
    first = model.scores(model.fit(sparse, labels), sparse)
    again = model.scores(model.fit(sparse[order], labels[order]), sparse)
    np.testing.assert_allclose(first, again, atol=1e-4)


def test_too_many_rows_are_refused(monkeypatch):
    inputs, labels = rows_and_labels()
    monkeypatch.setattr(kernel_ridge, "MOST_ROWS", 199)
    with pytest.raises(kernel_ridge.TooManyRowsError, match="200 .* 199: take lr_knn"):
        KernelRidge().fit(scipy.sparse.csr_array(inputs), labels)


def test_nothing_known_of_a_row_gives_finite_scores():
    inputs, labels = rows_and_labels()
    inputs[:3] = 0
    labels[:5] = 0
    model, sparse = KernelRidge(), scipy.sparse.csr_array(inputs)
    found = model.scores(model.fit(sparse, labels), sparse)
    assert np.isfinite(found).all() and found.shape == labels.shape
    assert model.scores(model.fit(sparse, labels * 0), sparse).max() < 1e-6


def noisy(labels, r0, r1, seed=4):
    draw = rngs.generator(seed, "noisy").random(labels.shape)
    return np.where(labels, draw >= r1, draw < r0).astype(np.uint8)


def test_the_posterior_is_the_share_of_labels_that_hold():
    """Entries of known probability e, made noisy: Bayes' rule, and its calibration."""
    draw = rngs.generator(5, "posterior")
    e = np.round(draw.random((4000, 20)) ** 4, 2)
    truth = (draw.random(e.shape) < e).astype(np.uint8)
    r0, r1 = 0.05, 0.3
    given = noisy(truth, r0, r1)
    # Any increasing function of e is as good a score.
    found = kernel_ridge.posterior(e**3 - 7, given, np.float32(r0), np.float32(r1))
    on = (1 - r1) * e / ((1 - r1) * e + r0 * (1 - e))
    off = r1 * e / (r1 * e + (1 - r0) * (1 - e))
    error = np.abs(found - np.where(given, on, off))
    assert error.mean() < 0.01 and error.max() < 0.12
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        within = (found >= low) & (found < low + 0.2)
        assert abs(truth[within].mean() - found[within].mean()) < 0.02


def test_without_noise_the_labels_are_their_posterior():
    labels = rows_and_labels()[1]
    scores = rngs.generator(6, "scores").random(labels.shape)
    zero = np.float32(0)
    np.testing.assert_array_equal(
        kernel_ridge.posterior(scores, labels, zero, zero), labels
    )


def test_rounds_help_where_labels_are_noisy():
    inputs, labels = rows_and_labels(rows=1200)
    given = scipy.sparse.csr_array(inputs)
    seen = noisy(labels[:800], 0.2, 0.3)
    found = []
    for rounds in (0, 1, 2):
        model = KernelRidge(penalty=4.0, rounds=rounds)
        scores = model.scores(
            model.fit(given[:800], seen, rates=(0.2, 0.3)), given[800:]
        )
        found.append(best(scores, labels[800:]))
    assert found[1] > found[0] + 0.003 and found[2] > found[0] + 0.003, found
    # They are probabilities of labels that hold, not of given ones.
    assert abs(scores.mean() - labels.mean()) < 0.05
    # Without rates there is nothing to repeat.
    plain, same = (
        KernelRidge(penalty=4.0, rounds=r).fit(given[:800], seen) for r in (0, 2)
    )
    np.testing.assert_array_equal(plain["second"], same["second"])
