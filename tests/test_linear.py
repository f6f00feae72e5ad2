"""The estimators without tricks: label priors, logistic regression, with neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer

from cbmlc_jax import metrics
from cbmlc_jax.models.baselines import estimator, label_prior, lr_knn
from cbmlc_jax.models.baselines import logistic_regression as linear


def separable(rows: int = 120, seed: int = 0):
    """Feature l says label l; the other features are noise."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((rows, 4)) < 0.3).astype(np.uint8)
    noise = rng.random((rows, 8)) < 0.3
    inputs = np.concatenate([labels, noise, np.ones((rows, 1))], 1).astype(np.float32)
    return scipy.sparse.csr_array(inputs), labels


@pytest.mark.parametrize(
    "model", [linear.LogisticRegression(10.0), lr_knn.LRkNN(10.0, 5, 0.3)]
)
@pytest.mark.parametrize("dense", [False, True])
def test_a_separable_problem_is_learnt(model, dense):
    inputs, labels = separable()
    others, truth = separable(seed=1)
    if dense:
        inputs, others = inputs.toarray(), others.toarray()
    scores = model.scores(model.fit(inputs, labels), others)
    assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() <= 1
    assert metrics.ranking(scores, truth)["mAP"] > 0.95
    prior = label_prior.LabelPrior()
    nothing = prior.scores(prior.fit(inputs, labels), others)
    np.testing.assert_allclose(nothing[7], labels.mean(0), rtol=1e-6)
    assert metrics.ranking(nothing, truth)["mAP"] < 0.5


def test_the_weights_minimise_the_objective_of_the_docstring():
    inputs, labels = separable(40)
    params = linear.LogisticRegression(2.0).fit(inputs, labels)
    z = linear.rescale(params["scale"], inputs).toarray()
    sign = 2.0 * labels[:, 1] - 1

    def objective(w):
        margin = sign * (z @ w[:-1] + w[-1])
        return w @ w / 2 + 2.0 * np.logaddexp(0, -margin).sum()

    best = scipy.optimize.minimize(objective, np.zeros(z.shape[1] + 1), tol=1e-10)
    mine = np.append(params["weights"][:, 1], params["bias"][1])
    assert objective(mine) == pytest.approx(best.fun, rel=1e-4)
    np.testing.assert_allclose(mine, best.x, atol=0.02)


def test_rows_are_tf_idf_of_length_one():
    inputs, _ = separable()
    inputs.data[:5] = 3.0  # counts, too
    mine = linear.rescale(linear.fit_scale(inputs), inputs)
    theirs = TfidfTransformer(sublinear_tf=True).fit_transform(inputs)
    np.testing.assert_allclose(mine.toarray(), theirs.toarray(), rtol=1e-6)
    assert inputs.data[0] == 3.0, "the inputs stay as they are"


def test_a_constant_column_of_real_values_is_harmless():
    rows = np.array([[1.0, 5.0], [3.0, 5.0]])
    scaled = linear.rescale(linear.fit_scale(rows), rows)
    np.testing.assert_allclose(scaled, [[-1, 0], [1, 0]])


def test_labels_that_never_or_always_hold():
    inputs, labels = separable(60)
    labels[:, 0], labels[:, 1] = 0, 1
    model = linear.LogisticRegression()
    scores = model.scores(model.fit(inputs, labels), inputs)
    np.testing.assert_allclose(scores[:, 0], 0.5 / 61, rtol=1e-5)
    np.testing.assert_allclose(scores[:, 1], 60.5 / 61, rtol=1e-5)
    assert np.ptp(scores[:, 2]) > 0.2


def test_the_vote_by_hand():
    """Query (1, 0): cosines 1, .6, 0 with the rows; k = 2 takes the first two."""
    rows = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    labels = np.array([[1, 0], [0, 1], [1, 1]], np.uint8)
    query = np.array([[1.0, 0.0]])
    weight = 1 + 0.36
    vote = lr_knn.cosine_vote(rows, labels, query, 2)
    np.testing.assert_allclose(vote, [[1 / weight, 0.36 / weight]], rtol=1e-5)
    # More neighbours than rows: all of them; the third has weight 0.
    np.testing.assert_allclose(lr_knn.cosine_vote(rows, labels, query, 9), vote)
    empty = scipy.sparse.csr_array((1, 2))
    assert not lr_knn.cosine_vote(
        scipy.sparse.csr_array(rows), labels, empty, 2
    ).any(), "a query without features"


def test_matrices_survive_being_packed():
    sparse = scipy.sparse.random_array((5, 7), density=0.3, rng=0, format="csr")
    for matrix in (sparse, sparse.toarray()):
        again = estimator.unpack(estimator.pack(matrix))
        assert type(again) is type(matrix)
        assert (again != matrix).sum() == 0


def test_weights_are_left_as_they_are():
    """Counts become tf-idf; weights, which are tf-idf already, only unit rows."""
    weights = scipy.sparse.csr_array(np.array([[0.5, 0, 1], [0.25, 0.5, 0]]))
    scale = linear.fit_scale(weights)
    found = linear.rescale(scale, weights).toarray()
    expected = weights.toarray()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected)
    counts = scipy.sparse.csr_array(np.array([[1.0, 0, 1], [1, 2, 0]]))
    scale = linear.fit_scale(counts)
    idf = 1 + np.log([3 / 3, 3 / 2, 3 / 2])
    np.testing.assert_allclose(scale["sublinear_idf"], idf)
    found = linear.rescale(scale, counts).toarray()
    expected = np.array([[1, 0, 1], [1, 1 + np.log(2), 0]]) * idf
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected)


def test_a_model_of_before_takes_the_counts_themselves():
    """What 0.4.0 saved has "idf" where inputs were counts."""
    counts = scipy.sparse.csr_array(np.array([[1.0, 0, 1], [1, 2, 0]]))
    found = linear.rescale({"idf": np.array([1.0, 2, 3])}, counts).toarray()
    expected = np.array([[1.0, 0, 3], [1, 4, 0]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected)
