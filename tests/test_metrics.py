"""Metrics against loops over entries that follow the definitions word by word."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbmlc_jax import metrics, rngs


def f1(tp: int, fp: int, fn: int) -> float | None:
    """2tp / (2tp + fp + fn), None for 0/0."""
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


def mean(terms: list[float | None], undefined: str) -> float:
    """Mean of terms under a 0/0 policy; of nothing, 0."""
    if undefined == "nan":
        terms = [t for t in terms if t is not None]
    return sum(t or 0.0 for t in terms) / len(terms) if terms else 0.0


def confusion(predicted, true) -> tuple[int, int, int]:
    """tp, fp, fn of two sequences of 0 and 1."""
    pairs = [(bool(p), bool(y)) for p, y in zip(predicted, true, strict=True)]
    return tuple(pairs.count(c) for c in [(True, True), (True, False), (False, True)])


def naive_scores(predicted, labels, ebf1_policy="nan", maf1_policy="zero") -> dict:
    """The metrics of spec section 5 by loops."""
    rows = [confusion(p, y) for p, y in zip(predicted, labels, strict=True)]
    columns = [confusion(p, y) for p, y in zip(predicted.T, labels.T, strict=True)]
    pooled = [sum(c) for c in zip(*columns, strict=True)] or [0, 0, 0]
    return {
        "ebF1": mean([f1(*r) for r in rows], ebf1_policy),
        "miF1": f1(*pooled) or 0.0,
        "maF1": mean([f1(*c) for c in columns], maf1_policy),
        "subset": mean([float(fp == fn == 0) for _, fp, fn in rows], "zero"),
        "hamming": (pooled[1] + pooled[2]) / labels.size if labels.size else 0.0,
    }


def assert_equals_naive(predicted, labels):
    counts = metrics.count(predicted, labels)
    expected = naive_scores(predicted, labels)
    got = metrics.f1_scores(counts)
    assert list(got) == list(metrics.F1_NAMES)
    for name, value in got.items():
        assert value == pytest.approx(expected[name], abs=1e-12), name
    assert metrics.subset_accuracy(counts) == pytest.approx(expected["subset"])
    assert metrics.hamming_loss(counts) == pytest.approx(expected["hamming"])
    for e, m in itertools.product(metrics.UNDEFINED, repeat=2):
        expected = naive_scores(predicted, labels, e, m)
        assert metrics.example_f1(counts, e) == pytest.approx(expected["ebF1"])
        assert metrics.macro_f1(counts, m) == pytest.approx(expected["maF1"])


binary = st.tuples(st.integers(0, 6), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(bool, shape),
        hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)),
    )
)


def example(seed: int = 0, rows: int = 40, labels: int = 6):
    """Random scores and labels with an empty row and an all-zero column."""
    draw = rngs.generator(seed, "metrics")
    scores = draw.random((rows, labels))
    true = (draw.random((rows, labels)) < 0.3).astype(np.uint8)
    true[3], true[:, 2] = 0, 0
    return scores, true


@given(binary)
def test_f1s_equal_naive_ones(pair):
    assert_equals_naive(*pair)


def test_f1s_by_hand():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], np.uint8)
    predicted = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]], bool)
    counts = metrics.count(predicted, labels)
    assert counts.tp.tolist() == [1, 1, 0]
    assert counts.fp.tolist() == [0, 0, 1]
    assert counts.fn.tolist() == [1, 1, 0]
    # Rows: 2/3, 2/3, 0/0, 0.  Labels: 2/3, 2/3, 0.  Pooled: 2*2 / (4 + 1 + 2).
    assert metrics.f1_scores(counts) == pytest.approx(
        {"ebF1": 4 / 9, "miF1": 4 / 7, "maF1": 4 / 9}
    )
    assert metrics.example_f1(counts, "zero") == pytest.approx(1 / 3)
    assert metrics.subset_accuracy(counts) == 1 / 4
    assert metrics.hamming_loss(counts) == 3 / 12


def test_undefined_ratios_follow_the_policy():
    """Label 2 and row 2 are 0/0: left out under nan, 0 under zero."""
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], np.uint8)
    counts = metrics.count(labels, labels)
    assert metrics.example_f1(counts) == metrics.example_f1(counts, "nan") == 1.0
    assert metrics.example_f1(counts, "zero") == pytest.approx(2 / 3)
    assert metrics.macro_f1(counts, "nan") == 1.0
    assert metrics.macro_f1(counts) == pytest.approx(2 / 3)
    assert metrics.macro_f1(counts) == metrics.macro_f1(counts, "zero")
    assert metrics.micro_f1(counts) == 1.0


@pytest.mark.parametrize("score", [metrics.example_f1, metrics.macro_f1])
def test_unknown_policy_is_an_error(score):
    counts = metrics.count(np.ones((1, 1), bool), np.ones((1, 1), np.uint8))
    with pytest.raises(ValueError, match="'one'"):
        score(counts, "one")


@given(binary, st.data())
def test_merged_counts_equal_counts_of_the_whole(pair, data):
    predicted, labels = pair
    cut = data.draw(st.integers(0, len(labels)))
    merged = metrics.count(predicted[:cut], labels[:cut]) + metrics.count(
        predicted[cut:], labels[cut:]
    )
    whole = metrics.count(predicted, labels)
    for field in dataclasses.fields(metrics.Counts):
        np.testing.assert_allclose(
            getattr(merged, field.name), getattr(whole, field.name), err_msg=field.name
        )
    assert metrics.f1_scores(merged) == pytest.approx(metrics.f1_scores(whole))


def test_merging_is_not_averaging():
    """A perfect batch of one row and a bad one of three."""
    labels = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.uint8)
    predicted = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], bool)
    parts = [metrics.count(predicted[s], labels[s]) for s in ([0], [1, 2, 3])]
    assert metrics.micro_f1(parts[0] + parts[1]) == 1 / 2
    assert [metrics.micro_f1(p) for p in parts] == pytest.approx([1.0, 1 / 3])


@given(binary, st.randoms(use_true_random=False))
def test_order_of_labels_and_rows_does_not_matter(pair, random):
    predicted, labels = pair
    before = metrics.f1_scores(metrics.count(predicted, labels))
    columns = random.sample(range(labels.shape[1]), labels.shape[1])
    rows = random.sample(range(len(labels)), len(labels))
    after = metrics.count(predicted[rows][:, columns], labels[rows][:, columns])
    assert metrics.f1_scores(after) == pytest.approx(before, abs=1e-12)


@given(binary)
def test_f1s_are_finite_and_between_0_and_1(pair):
    counts = metrics.count(*pair)
    for value in metrics.f1_scores(counts).values():
        assert 0.0 <= value <= 1.0
    for values in metrics.per_label(counts).values():
        assert np.isfinite(values).all()


def test_per_label_equals_naive():
    scores, labels = example()
    predicted = scores > 0.6
    got = metrics.per_label(metrics.count(predicted, labels))
    for l in range(labels.shape[1]):
        tp, fp, fn = confusion(predicted[:, l], labels[:, l])
        assert got["precision"][l] == (tp / (tp + fp) if tp + fp else 0.0)
        assert got["recall"][l] == (tp / (tp + fn) if tp + fn else 0.0)
        assert got["f1"][l] == (f1(tp, fp, fn) or 0.0)
        assert got["support"][l] == labels[:, l].sum()


def test_a_silent_label_has_precision_and_recall_0():
    counts = metrics.count(np.zeros((3, 1), bool), np.zeros((3, 1), np.uint8))
    for name, values in metrics.per_label(counts).items():
        assert values.tolist() == [0.0], name


def naive_average_precision(scores, labels) -> float:
    """Mean over positives of the precision at their rank; scores must differ."""
    assert len(set(scores)) == len(scores)
    ranked = sorted(zip(scores, labels, strict=True), reverse=True)
    hits, terms = 0, []
    for rank, (_, y) in enumerate(ranked, start=1):
        if y:
            hits += 1
            terms.append(hits / rank)
    return sum(terms) / len(terms) if terms else float("nan")


def tied_average_precision(scores, labels) -> float:
    """Mean over positives of the precision among all rows with at least their score."""
    terms = []
    for s, y in zip(scores, labels, strict=True):
        if y:
            above = [yy for ss, yy in zip(scores, labels, strict=True) if ss >= s]
            terms.append(sum(above) / len(above))
    return sum(terms) / len(terms) if terms else float("nan")


def test_average_precision_by_hand():
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    labels = np.array([[1], [0], [1], [0], [1]], np.uint8)
    got = metrics.average_precision(scores, labels)
    np.testing.assert_allclose(got, [(1 / 1 + 2 / 3 + 3 / 5) / 3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_equals_the_naive_one_without_ties(dtype):
    scores, labels = example()
    scores = scores.astype(dtype)
    got = metrics.average_precision(scores, labels)
    expected = [naive_average_precision(scores[:, l], labels[:, l]) for l in range(6)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert np.isnan(got[2]) and np.isnan(got).sum() == 1
    assert metrics.mean_average_precision(scores, labels) == pytest.approx(
        np.mean([e for e in expected if e == e])
    )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
)
def test_tied_scores_share_their_precision_in_any_order_of_rows(rows, random):
    scores, labels = (np.array(c)[:, None] for c in zip(*rows, strict=True))
    got = metrics.average_precision(scores.astype(np.float32), labels)
    np.testing.assert_allclose(
        got, [tied_average_precision(scores[:, 0], labels[:, 0])]
    )
    order = random.sample(range(len(rows)), len(rows))
    shuffled = metrics.average_precision(
        scores[order].astype(np.float32), labels[order]
    )
    np.testing.assert_allclose(got, shuffled)


def test_all_scores_equal_give_the_share_of_positives():
    labels = np.array([[1, 0], [0, 0], [0, 1], [0, 1]], np.uint8)
    got = metrics.average_precision(np.full((4, 2), 0.5), labels)
    np.testing.assert_allclose(got, [1 / 4, 2 / 4])


def test_ranking_without_any_positive_is_0():
    scores, labels = example()
    values = metrics.ranking(scores, np.zeros_like(labels))
    assert values == {"mAP": 0.0, "P@1": 0.0, "P@3": 0.0, "P@5": 0.0}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_at_k_equals_naive(k):
    scores, labels = example()
    terms = []
    for s, y in zip(scores, labels, strict=True):
        best = sorted(range(len(s)), key=lambda l: -s[l])[:k]
        terms.append(sum(int(y[l]) for l in best) / k)
    expected = sum(terms) / len(terms)
    assert metrics.precision_at_k(scores, labels, k) == pytest.approx(expected)
    assert metrics.ranking(scores, labels)[f"P@{k}"] == pytest.approx(expected)


def test_precision_at_k_by_hand():
    scores = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
    labels = np.array([[0, 1, 1, 0], [0, 0, 1, 1]], np.uint8)
    assert metrics.precision_at_k(scores, labels, 1) == (0 + 1) / 2
    assert metrics.precision_at_k(scores, labels, 3) == pytest.approx(
        (1 / 3 + 2 / 3) / 2
    )
    # Ties go to the lower index.
    ties = np.zeros((2, 4))
    assert metrics.precision_at_k(ties, labels, 1) == 0.0
    assert metrics.precision_at_k(ties, labels, 2) == 1 / 4


def test_ranking_orders_labels_and_rows_alike():
    scores, labels = example()
    draw = rngs.generator(1, "order")
    rows, columns = draw.permutation(40), draw.permutation(6)
    before = metrics.ranking(scores, labels)
    after = metrics.ranking(scores[rows][:, columns], labels[rows][:, columns])
    assert after == pytest.approx(before)
    assert before["mAP"] != before["P@1"]
