"""SLEEC: its projection against a dense reference, and what it learns."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from cbmlc_jax import metrics, rngs
from cbmlc_jax.models.baselines.label_prior import LabelPrior
from cbmlc_jax.models.baselines.sleec import SLEEC, embed, similarity_graph

SMALL = SLEEC(svp_neighbours=20, dimension=8, neighbours=5)


def random_labels(rows=80, labels=12, seed=0):
    """Sets of labels; the first two rows have none."""
    draw = rngs.generator(seed, "sleec labels", rows, labels)
    chosen = (draw.random((rows, labels)) < 0.25).astype(np.uint8)
    chosen[:2] = 0
    return chosen


def topics(rows=120, number=6, seed=0):
    """Rows of one of several topics: its words among noise, and its two labels."""
    draw = rngs.generator(seed, "sleec topics", rows)
    topic = draw.integers(number, size=rows)
    words = np.arange(5 * number) // 5
    often = np.where(words[None] == topic[:, None], 0.7, 0.08)
    inputs = (draw.random(often.shape) < often).astype(np.float32)
    labels = np.zeros((rows, number + 2), np.uint8)
    labels[np.arange(rows), topic] = 1
    labels[np.arange(rows), number + topic % 2] = 1
    return inputs, labels


def cosines(labels):
    """u_i . u_j, by its definition; 0 for a row without labels."""
    lengths = np.sqrt(labels.sum(1, dtype=float))
    units = labels / np.where(lengths, lengths, 1)[:, None]
    return units @ units.T


def dense_svp(wanted, observed, rank, iterations):
    """M [n, n] after steps of: add the observed error, keep the largest eigenvalues."""
    found = np.zeros_like(wanted)
    for _ in range(iterations):
        found = np.where(observed, wanted, found)
        values, vectors = np.linalg.eigh(found)
        values, vectors = np.clip(values[-rank:], 0, None), vectors[:, -rank:]
        found = vectors @ np.diag(values) @ vectors.T
    return found


def dense(graph):
    """The values and the pattern of a sparse matrix with stored zeros."""
    pattern = graph.copy()
    pattern.data = np.ones_like(pattern.data)
    return graph.toarray(), pattern.toarray() > 0


@pytest.mark.parametrize("neighbours", [1, 5, 30, 200])
def test_graph_observes_the_most_similar_rows(neighbours):
    labels = random_labels()
    values, observed = dense(similarity_graph(labels, neighbours))
    wanted = cosines(labels)
    np.testing.assert_array_equal(observed, observed.T)
    np.testing.assert_allclose(values[observed], wanted[observed], atol=1e-12)
    k = min(neighbours, len(labels))
    kth = np.sort(wanted, axis=1)[:, -k][:, None] + 1e-9
    assert (observed.sum(1) >= k).all()
    assert observed[wanted > kth].all()
    below = observed & (wanted < kth - 2e-9) & (wanted.T < kth.T - 2e-9)
    assert not below.any()


# 4 x 3 < 80 goes through the sparse operator, 4 x 30 through the dense one.
@pytest.mark.parametrize("dimension", [3, 30])
@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_projection_equals_the_dense_reference(dimension, iterations):
    graph = similarity_graph(random_labels(), 15)
    factors = embed(graph, dimension, iterations, rngs.generator(0, "start"))
    found = dense_svp(*dense(graph), dimension, iterations)
    assert factors.shape == (80, dimension)
    np.testing.assert_allclose(factors @ factors.T, found, atol=1e-3)


@pytest.mark.parametrize("dimension", [3, 10, 30])
def test_the_error_on_observed_entries_falls(dimension):
    graph = similarity_graph(random_labels(), 15)
    values, observed = dense(graph)
    errors = [(values**2).sum()]
    for iterations in range(1, 8):
        factors = embed(graph, dimension, iterations, rngs.generator(0, "start"))
        errors.append(((values - factors @ factors.T)[observed] ** 2).sum())
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 0.5 * errors[1]


def test_a_matrix_of_low_rank_is_recovered_from_all_its_entries():
    labels = random_labels(labels=4)
    graph = similarity_graph(labels, 80)
    factors = embed(graph, 4, 1, rngs.generator(0, "start"))
    np.testing.assert_allclose(factors @ factors.T, cosines(labels), atol=1e-6)


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
@pytest.mark.parametrize("options", [{}, {"clusters": 3, "learners": 2}])
def test_it_learns_topics_that_the_prior_does_not_know(convert, options):
    inputs, labels = topics(240)
    queries, wanted = topics(100, seed=1)
    model = SLEEC(svp_neighbours=20, dimension=8, neighbours=5, **options)
    scores = model.scores(model.fit(convert(inputs), labels), convert(queries))
    assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() <= 1
    prior = LabelPrior().scores(LabelPrior().fit(inputs, labels), queries)
    assert metrics.ranking(scores, wanted)["P@1"] > 0.95
    assert metrics.ranking(scores, wanted)["mAP"] > 0.9
    assert metrics.ranking(prior, wanted)["P@1"] < 0.65


def test_scores_are_mean_labels_of_the_nearest_embeddings():
    """One learner, one cluster: by the definition, in two lines."""
    inputs, labels = topics()
    queries = topics(15, seed=1)[0]
    params = SMALL.fit(inputs, labels)
    learner = params["learner_0"]
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    points = queries / np.maximum(lengths, 1e-9) @ learner["weights"][0]
    gaps = np.linalg.norm(points[:, None] - learner["embeddings"][None], axis=2)
    nearest = np.argsort(gaps, axis=1)[:, :5]
    wanted = np.array([labels[i].mean(0) for i in nearest])
    np.testing.assert_allclose(SMALL.scores(params, queries), wanted, atol=1e-6)


def test_regression_is_ridge_on_rows_of_length_one():
    """V = (X'X + penalty)^-1 X'Z; the embeddings are X V."""
    inputs, labels = topics()
    learner = SMALL.fit(inputs, labels)["learner_0"]
    rows = inputs / np.maximum(np.linalg.norm(inputs, axis=1, keepdims=True), 1e-9)
    wanted = embed(similarity_graph(labels, 20), 8, 10, np.random.default_rng([0, 0]))
    gram = rows.T @ rows + 1.0 * np.eye(rows.shape[1])
    found = np.linalg.solve(gram, rows.T @ wanted)
    np.testing.assert_allclose(learner["weights"][0], found, atol=1e-4)
    np.testing.assert_allclose(learner["embeddings"], rows @ found, atol=1e-4)


def test_the_length_of_a_row_does_not_matter():
    inputs, labels = topics()
    params = SMALL.fit(inputs, labels)
    np.testing.assert_array_equal(
        SMALL.scores(params, inputs), SMALL.scores(params, inputs * 4)
    )


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
def test_one_seed_one_result(convert):
    inputs, labels = topics()
    first, second, other = (
        SLEEC(2, 3, 20, 8, 5, seed=s).fit(convert(inputs), labels) for s in (0, 0, 1)
    )
    for name, value in first["learner_0"].items():
        np.testing.assert_array_equal(value, second["learner_0"][name], err_msg=name)
    assert (first["learner_0"]["cluster"] != other["learner_0"]["cluster"]).any()
    assert (first["learner_0"]["cluster"] != first["learner_1"]["cluster"]).any()


def test_learners_are_averaged():
    inputs, labels = topics()
    two = SLEEC(2, 3, 20, 8, 5)
    params = two.fit(inputs, labels)
    one = SLEEC(1, 3, 20, 8, 5)
    alone = [
        one.scores({**params, "learner_0": params[f"learner_{i}"]}, inputs)
        for i in range(2)
    ]
    assert (alone[0] != alone[1]).any()
    np.testing.assert_allclose(
        two.scores(params, inputs), np.mean(alone, axis=0), atol=1e-6
    )


def test_a_cluster_smaller_than_every_number_of_neighbours():
    """Three rows far from the rest are a cluster: its score is their mean."""
    draw = rngs.generator(0, "two groups")
    inputs = np.zeros((43, 8))
    inputs[:40, :4], inputs[40:, 4:] = 1, 1
    inputs += 0.05 * draw.random(inputs.shape)
    labels = random_labels(43)
    labels[40:], labels[40:, 0] = 0, [1, 0, 1]
    model = SLEEC(1, 2, 20, 8, 5)
    params = model.fit(inputs, labels)
    cluster = params["learner_0"]["cluster"]
    assert np.flatnonzero(cluster == cluster[-1]).tolist() == [40, 41, 42]
    scores = model.scores(params, inputs)
    np.testing.assert_allclose(scores[40:, 0], 2 / 3, rtol=1e-6)
    np.testing.assert_array_equal(scores[40:, 1:], 0)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_fewer_rows_than_clusters_dimensions_and_neighbours(rows):
    inputs, labels = topics(6)
    for clusters in (1, 3):
        model = SLEEC(clusters=clusters)
        params = model.fit(inputs[:rows], labels[:rows])
        assert np.isfinite(model.scores(params, inputs)).all()


@pytest.mark.parametrize("value", [0, 1])
def test_labels_that_say_nothing(value):
    inputs, labels = topics()
    model = SLEEC(svp_neighbours=20, dimension=8, neighbours=5)
    scores = model.scores(model.fit(inputs, np.full_like(labels, value)), inputs)
    np.testing.assert_array_equal(scores, value)


def test_wide_indices_and_no_rows():
    inputs, labels = topics()
    sparse = scipy.sparse.csr_array(inputs)
    wide = scipy.sparse.csr_array(inputs)
    wide.indices, wide.indptr = (
        a.astype(np.int64) for a in (wide.indices, wide.indptr)
    )
    model = SLEEC(1, 3, 20, 8, 5)
    params = model.fit(wide, labels)
    np.testing.assert_array_equal(
        model.scores(params, wide), model.scores(model.fit(sparse, labels), sparse)
    )
    assert model.scores(params, sparse[:0]).shape == (0, labels.shape[1])
    assert wide.indices.dtype == np.int64  # the caller's rows stay as they are
    np.testing.assert_array_equal(wide.data, sparse.data)


def test_settings_and_data_without_sense():
    with pytest.raises(ValueError, match="dimension is 0"):
        SLEEC(dimension=0)
    with pytest.raises(ValueError, match="penalty is -1"):
        SLEEC(penalty=-1)
    with pytest.raises(ValueError, match="no training rows"):
        SLEEC().fit(np.zeros((0, 3)), np.zeros((0, 2), np.uint8))


def test_params_survive_a_file_without_pickle(tmp_path):
    inputs, labels = topics()
    model = SLEEC(2, 3, 20, 8, 5)
    params = model.fit(inputs, labels)
    flat = {"labels": params["labels"]}
    for learner in ("learner_0", "learner_1"):
        flat |= {f"{learner}/{k}": v for k, v in params[learner].items()}
    np.savez(tmp_path / "params.npz", **flat)
    back = {"learner_0": {}, "learner_1": {}}
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        back["labels"] = file["labels"]
        for name in set(file.files) - {"labels"}:
            learner, key = name.split("/")
            back[learner][key] = file[name]
    np.testing.assert_array_equal(
        model.scores(back, inputs), model.scores(params, inputs)
    )
