"""Splits, length buckets, batches and label graphs."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cbmlc_jax.data import pipeline
from cbmlc_jax.data.dataset import DataError, Dataset, Ragged, Split

lengths_lists = st.lists(st.integers(0, 70), min_size=1, max_size=60)


def ragged(lengths, seed=0, features=100) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.from_rows([rng.permutation(features)[:n] for n in lengths])


def row(inputs: Ragged, i: int) -> list[int]:
    return inputs.values[inputs.offsets[i] : inputs.offsets[i + 1]].tolist()


@hypothesis.given(lengths_lists, st.randoms(use_true_random=False))
def test_ragged_rows_survive_take_and_padding(lengths, random):
    inputs = ragged(lengths)
    rows = np.array([random.randrange(len(lengths)) for _ in range(10)])
    taken = inputs.take(rows)
    padded = inputs.batch(rows, 72)["tokens"]
    for i, r in enumerate(rows):
        assert row(taken, i) == row(inputs, r)
        assert padded[i, : lengths[r]].tolist() == [v + 1 for v in row(inputs, r)]
        assert not padded[i, lengths[r] :].any()


def test_padding_refuses_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match="5 ids does not fit 4"):
        ragged([5]).batch(np.array([0]), 4)


def padded_tokens(widths, lengths) -> int:
    widths = np.array(widths)
    return widths[np.searchsorted(widths, lengths)].sum()


@hypothesis.given(lengths_lists, st.integers(1, 4))
def test_bucket_widths_are_the_best_of_all(lengths, buckets):
    lengths = np.array(lengths)
    widths = pipeline.bucket_widths(lengths, buckets)
    distinct = np.unique(np.maximum(8, -(-lengths // 8) * 8))
    best = min(
        padded_tokens(choice, lengths)
        for n in range(1, buckets + 1)
        for choice in itertools.combinations(distinct, n)
        if choice[-1] == distinct[-1]
    )
    assert len(widths) <= buckets and widths == sorted(set(widths))
    assert padded_tokens(widths, lengths) == best


@hypothesis.given(lengths_lists, st.integers(1, 9), st.booleans())
def test_every_row_is_in_one_batch_that_fits_it(lengths, batch_size, shuffled):
    lengths = np.array(lengths)
    shuffle = np.random.default_rng(0) if shuffled else None
    plan = pipeline.plan_batches(lengths, batch_size, [16, 32], shuffle)
    rows = plan.rows[plan.rows >= 0]
    assert sorted(rows) == list(range(len(lengths)))
    assert len(plan) == -(-len(lengths) // batch_size)
    assert plan.rows.shape == (len(plan), batch_size)
    for members, width in zip(plan.rows, plan.widths, strict=True):
        longest = lengths[members[members >= 0]].max()
        assert longest <= width
        # The smallest width that fits; longer rows double the last one.
        assert width == next(w for w in (16, 32, 64, 128) if w >= longest)


def test_order_is_a_function_of_the_generator():
    lengths = np.random.default_rng(0).integers(1, 60, 200)

    def plan(seed):
        shuffle = np.random.default_rng(seed)
        return pipeline.plan_batches(lengths, 16, [32, 64], shuffle)

    np.testing.assert_array_equal(plan(1).rows, plan(1).rows)
    assert (plan(1).rows != plan(2).rows).any()
    # Batches of short and long rows are mixed, not sorted.
    assert plan(1).widths != sorted(plan(1).widths)


def test_batches_hold_the_rows_of_the_plan():
    inputs = ragged([3, 9, 1, 0, 12])
    labels = np.eye(5, 4, dtype=np.uint8)
    plan = pipeline.plan_batches(inputs.lengths, 3, [8, 16])
    seen = []
    source = pipeline.Batches(inputs, plan, Split(inputs, labels))
    for rows, batch in zip(plan.rows, pipeline.stream(source), strict=True):
        np.testing.assert_array_equal(batch["mask"], rows >= 0)
        np.testing.assert_array_equal(batch["rows"], [0, 1, 2])
        for place, r in enumerate(rows):
            if r < 0:
                assert not batch["tokens"][place].any()
                assert not batch["labels"][place].any()
                continue
            tokens = batch["tokens"][place]
            assert (tokens[tokens > 0] - 1).tolist() == row(inputs, r)
            np.testing.assert_array_equal(batch["labels"][place], labels[r])
            seen.append(r)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_validation_rows_have_the_sizes_of_the_paper():
    labels = np.zeros((4880, 1), np.uint8)
    train, validation = pipeline.split_rows(labels, fraction=0.1, size=None, seed=0)
    assert (len(train), len(validation)) == (4392, 488)
    assert sorted([*train, *validation]) == list(range(4880))
    train, validation = pipeline.split_rows(labels, fraction=0.1, size=487, seed=0)
    assert len(validation) == 487
    again = pipeline.split_rows(labels, fraction=0.1, size=487, seed=0)[1]
    other = pipeline.split_rows(labels, fraction=0.1, size=487, seed=1)[1]
    np.testing.assert_array_equal(validation, again)
    assert (validation != other).any()


def test_stratified_split_keeps_rare_labels_on_both_sides():
    rng = np.random.default_rng(0)
    labels = (rng.random((1000, 60)) < 0.004).astype(np.uint8)
    labels[:, :5] |= (rng.random((1000, 5)) < 0.3).astype(np.uint8)
    labels[:2, 59] = 1
    labels[2:, 59] = 0
    train, validation = pipeline.split_rows(
        labels, fraction=0.1, size=None, seed=3, stratified=True
    )
    assert len(validation) == 100 and not set(train) & set(validation)
    twice = labels.sum(0) >= 2
    assert labels[validation].sum(0)[twice].min() >= 1
    assert labels[train].sum(0)[twice].min() >= 1
    plain = pipeline.split_rows(labels, fraction=0.1, size=None, seed=3)[1]
    assert labels[plain].sum(0)[twice].min() == 0
    shares = labels[validation].mean(0)[:5] / labels.mean(0)[:5]
    assert np.all(abs(shares - 1) < 0.35)


@pytest.mark.parametrize(("fraction", "size"), [(0.0, None), (0.1, 10), (0.05, None)])
def test_split_that_leaves_a_side_empty(fraction, size):
    with pytest.raises(DataError, match="of 10 training rows"):
        pipeline.split_rows(
            np.zeros((10, 2), np.uint8), fraction=fraction, size=size, seed=0
        )


def test_label_graphs(tmp_path):
    labels = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], np.uint8)
    names = ("a", "b", "c", "d e")
    assert pipeline.label_graph("complete", labels, names) is None
    np.testing.assert_array_equal(
        pipeline.label_graph("self", labels, names).toarray(), np.eye(4, dtype=bool)
    )
    chain = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(
        pipeline.label_graph("cooccurrence", labels, names).toarray(), chain
    )
    file = tmp_path / "edges.tsv"
    file.write_text("a\td e\n\nb\tc\n")
    graph = pipeline.label_graph("file", labels, names, str(file)).toarray()
    assert graph.dtype == bool
    assert np.argwhere(np.triu(graph, 1)).tolist() == [[0, 3], [1, 2]]
    np.testing.assert_array_equal(graph, graph.T)
    assert graph.diagonal().all()


@pytest.mark.parametrize("line", ["a b", "a\tz", "a\tb\tc"])
def test_broken_label_graph_names_the_line(tmp_path, line):
    file = tmp_path / "edges.tsv"
    file.write_text(f"a\tb\n{line}\n")
    with pytest.raises(DataError, match=r"edges\.tsv, line 2"):
        pipeline.label_graph("file", np.zeros((1, 2), np.uint8), ("a", "b"), str(file))


def test_missing_label_graph(tmp_path):
    with pytest.raises(DataError, match="cannot read the label graph"):
        pipeline.label_graph(
            "file", np.zeros((1, 1), np.uint8), ("a",), str(tmp_path / "none")
        )


def test_fingerprint_sees_every_part():
    def dataset(**changes):
        split = Split(ragged([2, 1]), np.eye(2, dtype=np.uint8))
        parts = {
            "name": "x",
            "train": split,
            "test": split,
            "label_names": ("a", "b"),
            "feature_names": ("f",),
            "label_texts": ("a", "b"),
        }
        return Dataset(**{**parts, **changes}).fingerprint

    other = Split(ragged([2, 1]), np.ones((2, 2), np.uint8))
    longer = Split(ragged([1, 2]), np.eye(2, dtype=np.uint8))
    prints = [
        dataset(),
        dataset(train=other),
        dataset(test=longer),
        dataset(label_names=("a", "c")),
        dataset(feature_names=("g",)),
    ]
    assert dataset() == dataset() and len(set(prints)) == len(prints)
