"""MLkNN against posteriors computed by hand and by loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from cbmlc_jax import rngs
from cbmlc_jax.models.baselines import nearest
from cbmlc_jax.models.baselines.mlknn import MLkNN


def example(rows=60, features=12, labels=5, seed=0):
    """Sets of features, and labels that are some of them with errors."""
    draw = rngs.generator(seed, "mlknn", rows, features)
    inputs = (draw.random((rows, features)) < 0.4).astype(np.float32)
    flips = draw.random((rows, labels)) < 0.1
    return inputs, (inputs[:, :labels].astype(bool) ^ flips).astype(np.uint8)


def naive_fit(inputs, labels, k, s):
    """prior [L], P(c|H=1), P(c|H=0) [L, k + 1], by loops, for distinct distances."""
    n, columns = labels.shape
    present, absent = np.zeros((2, columns, k + 1))
    for i in range(n):
        others = [j for j in range(n) if j != i]
        others.sort(key=lambda j: float(((inputs[i] - inputs[j]) ** 2).sum()))
        for l in range(columns):
            count = sum(int(labels[j, l]) for j in others[:k])
            (present if labels[i, l] else absent)[l, count] += 1
    tables = []
    for table in (present, absent):
        for l in range(columns):
            table[l] = (s + table[l]) / ((k + 1) * s + sum(table[l]))
        tables.append(table)
    return (s + labels.sum(0)) / (2 * s + n), *tables


# Two pairs and one row far from both; distances on the line are all distinct.
LINE = np.array([[0.0], [1.0], [10.0], [11.5], [30.0]])
ONE_LABEL = np.array([[1], [1], [0], [0], [1]], np.uint8)


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
def test_posteriors_by_hand(convert):
    """k = 1, s = 1, the rows at 0, 1, 10, 11.5, 30 with labels 1, 1, 0, 0, 1.

    Nearest others: 0 -> 1, 1 -> 0, 10 -> 11.5, 11.5 -> 10, 30 -> 11.5; their labels
    are c = 1, 1, 0, 0, 0.
    Prior: (1 + 3) / (2 + 5) = 4/7.
    With the label, rows 0, 1, 30: one has c = 0, two have c = 1:
        P(c | 1) = (1 + 1, 1 + 2) / (2 + 3) = (2/5, 3/5).
    Without it, rows 10 and 11.5: both have c = 0:
        P(c | 0) = (1 + 2, 1 + 0) / (2 + 2) = (3/4, 1/4).
    A query at .2 is next to 0, c = 1:
        4/7 3/5 / (4/7 3/5 + 3/7 1/4) = (12/35) / (12/35 + 3/28) = 48 / (48 + 15).
    A query at 12 is next to 11.5, c = 0:
        4/7 2/5 / (4/7 2/5 + 3/7 3/4) = (8/35) / (8/35 + 9/28) = 32 / (32 + 45).
    """
    model = MLkNN(neighbours=1, smoothing=1.0)
    params = model.fit(convert(LINE), ONE_LABEL)
    np.testing.assert_allclose(params["prior"], [4 / 7])
    np.testing.assert_allclose(params["present"], [[2 / 5, 3 / 5]])
    np.testing.assert_allclose(params["absent"], [[3 / 4, 1 / 4]])
    scores = model.scores(params, convert(np.array([[0.2], [12.0]])))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[48 / 63], [32 / 77]], rtol=1e-6)


def test_smoothing_by_hand():
    """The case above at s = 3: prior 6/11, (4, 5)/9 and (5, 3)/8."""
    params = MLkNN(neighbours=1, smoothing=3.0).fit(LINE, ONE_LABEL)
    np.testing.assert_allclose(params["prior"], [6 / 11])
    np.testing.assert_allclose(params["present"], [[4 / 9, 5 / 9]])
    np.testing.assert_allclose(params["absent"], [[5 / 8, 3 / 8]])


@pytest.mark.parametrize("k, s", [(1, 1.0), (4, 0.5), (9, 2.0)])
def test_tables_equal_loops(k, s):
    draw = rngs.generator(k, "mlknn")
    inputs = draw.standard_normal((40, 3))
    labels = (draw.random((40, 4)) < 0.3).astype(np.uint8)
    params = MLkNN(k, s).fit(inputs, labels)
    for name, naive in zip(
        ("prior", "present", "absent"), naive_fit(inputs, labels, k, s), strict=True
    ):
        np.testing.assert_allclose(params[name], naive, err_msg=name)


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
@pytest.mark.parametrize("copies", [2, 5])
def test_a_row_is_not_its_own_neighbour(convert, copies):
    """Each label is on one row of a group of equal rows, and k = copies - 1.

    The neighbours are the other copies, so that the row with the label has c = 0 and
    all others of its group c = 1.  Counting itself would give the row c = 1.
    """
    inputs = np.repeat(np.eye(4) * 3, copies, axis=0)
    labels = np.zeros((4 * copies, 4), np.uint8)
    labels[np.arange(4) * copies, np.arange(4)] = 1
    params = MLkNN(neighbours=copies - 1).fit(convert(inputs), labels)
    bins, n = copies, 4 * copies
    present, absent = np.ones((2, bins))
    present[0] += 1
    absent[:2] += [n - copies, copies - 1]
    np.testing.assert_allclose(params["present"], np.tile(present / (bins + 1), (4, 1)))
    np.testing.assert_allclose(
        params["absent"], np.tile(absent / (bins + n - 1), (4, 1))
    )


def test_a_lone_row_looks_at_the_others():
    """The only row with the label is far away: its neighbours do not have it."""
    labels = np.array([[0], [0], [0], [0], [1]], np.uint8)
    params = MLkNN(neighbours=2).fit(LINE, labels)
    np.testing.assert_allclose(params["present"], [[2 / 4, 1 / 4, 1 / 4]])
    np.testing.assert_allclose(params["absent"], [[5 / 7, 1 / 7, 1 / 7]])


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
def test_of_equally_distant_rows_the_first_are_taken(convert):
    """All rows are equal; of the first four, two have the label: c = 2.  A training row
    has the first four others: one of rows 0 and 2 less where it is one of the four."""
    inputs, labels = np.ones((20, 3)), np.zeros((20, 1), np.uint8)
    labels[[0, 2, 4, 5, 6]] = 1
    params = MLkNN(neighbours=4).fit(convert(inputs), labels)
    # Rows 0, 2 leave one of {0, 2} and row 4: c = 2; rows 1, 3 leave 0, 2 and 4: 3.
    present = np.array([1, 1, 1 + 5, 1, 1]) / (5 + 5)
    absent = np.array([1, 1, 1 + 13, 1 + 2, 1]) / (5 + 15)
    np.testing.assert_allclose(params["present"][0], present)
    np.testing.assert_allclose(params["absent"][0], absent)
    prior = (1 + 5) / (2 + 20)
    yes, no = prior * present[2], (1 - prior) * absent[2]
    scores = MLkNN(neighbours=4).scores(params, convert(np.ones((7, 3))))
    np.testing.assert_allclose(scores, yes / (yes + no), rtol=1e-6)


def test_some_rows_at_a_time_are_all_rows(monkeypatch):
    inputs, labels = example(90)
    whole = MLkNN().fit(inputs, labels)
    scores = MLkNN().scores(whole, inputs)
    monkeypatch.setattr(nearest, "_AT_ONCE", 7 * 90)
    parts = MLkNN().fit(inputs, labels)
    np.testing.assert_array_equal(parts["present"], whole["present"])
    np.testing.assert_array_equal(MLkNN().scores(parts, inputs), scores)


def test_scores_do_not_depend_on_the_batch():
    inputs, labels = example(200)
    model = MLkNN()
    params = model.fit(scipy.sparse.csr_array(inputs), labels)
    queries = scipy.sparse.csr_array(example(50, seed=1)[0])
    whole = model.scores(params, queries)
    parts = [model.scores(params, queries[i : i + 7]) for i in range(0, 50, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_dense_and_sparse_inputs_agree():
    draw = rngs.generator(0, "sparse")
    inputs = draw.standard_normal((60, 8)) * (draw.random((60, 8)) < 0.5)
    inputs, labels = inputs + np.eye(60, 8), example()[1]
    model = MLkNN(neighbours=5)
    dense = model.scores(model.fit(inputs[:40], labels[:40]), inputs[40:])
    sparse = scipy.sparse.csr_array(inputs)
    params = model.fit(sparse[:40], labels[:40])
    np.testing.assert_array_equal(model.scores(params, sparse[40:]), dense)


@pytest.mark.parametrize("value, wanted", [(0, 1 / 62), (1, 61 / 62)])
def test_a_constant_label_is_finite_and_keeps_to_its_side(value, wanted):
    inputs, labels = example()
    labels[:, 2] = value
    model = MLkNN()
    params = model.fit(inputs, labels)
    scores = model.scores(params, inputs)
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()
    assert params["prior"][2] == pytest.approx(wanted)
    assert ((scores[:, 2] > 0.5) == bool(value)).all()


def test_a_permutation_of_labels_permutes_the_scores():
    inputs, labels = example()
    order = rngs.generator(0, "order").permutation(labels.shape[1])
    model = MLkNN()
    plain = model.scores(model.fit(inputs, labels), inputs)
    permuted = model.scores(model.fit(inputs, labels[:, order]), inputs)
    np.testing.assert_array_equal(permuted, plain[:, order])


def test_it_learns_what_the_prior_does_not_know():
    inputs, labels = example(300)
    queries, wanted = example(100, seed=1)
    model = MLkNN()
    scores = model.scores(model.fit(inputs[:, :5], labels), queries[:, :5])
    prior = labels.mean(0) > 0.5
    assert ((scores > 0.5) == wanted).mean() > 0.85
    assert (prior[None] == wanted).mean() < 0.7


def test_more_neighbours_than_rows_are_all_other_rows():
    model = MLkNN(neighbours=50)
    params = model.fit(LINE, ONE_LABEL)
    assert params["present"].shape == (1, 5)
    for name, naive in zip(
        ("prior", "present", "absent"), naive_fit(LINE, ONE_LABEL, 4, 1.0), strict=True
    ):
        np.testing.assert_allclose(params[name], naive, err_msg=name)
    assert np.isfinite(model.scores(params, LINE)).all()


def test_settings_and_data_without_sense():
    with pytest.raises(ValueError, match="1 training rows"):
        MLkNN().fit(LINE[:1], ONE_LABEL[:1])
    with pytest.raises(ValueError, match="neighbours is 0"):
        MLkNN(neighbours=0)
    with pytest.raises(ValueError, match="smoothing is 0"):
        MLkNN(smoothing=0.0)


def test_no_rows_give_no_scores():
    inputs, labels = example()
    model = MLkNN()
    assert model.scores(model.fit(inputs, labels), inputs[:0]).shape == (0, 5)


@pytest.mark.parametrize("convert", [np.asarray, scipy.sparse.csr_array])
def test_params_survive_a_file_without_pickle(convert, tmp_path):
    inputs, labels = example()
    model = MLkNN()
    params = model.fit(convert(inputs), labels)
    flat = {k: v for k, v in params.items() if k != "rows"}
    flat |= {f"rows/{k}": v for k, v in params["rows"].items()}
    np.savez(tmp_path / "params.npz", **flat)
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        back = {k: file[k] for k in file.files if "/" not in k}
        back["rows"] = {k[5:]: file[k] for k in file.files if "/" in k}
    np.testing.assert_array_equal(
        model.scores(back, convert(inputs)), model.scores(params, convert(inputs))
    )
