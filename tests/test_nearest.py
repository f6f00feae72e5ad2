"""The k nearest rows: the naive ones, of equals the first, in any order of summing."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from cbmlc_jax import rngs
from cbmlc_jax.models.baselines import nearest

CONVERT = [np.asarray, scipy.sparse.csr_array]


def words(rows: int, seed: int = 0) -> np.ndarray:
    """Few words of which all weigh the same: most pairs are as near as another."""
    draw = rngs.generator(seed, "nearest words", rows)
    return (draw.random((rows, 12)) < 0.3).astype(np.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def first(distance: np.ndarray, k: int) -> np.ndarray:
    """By a stable sort; numbers ascending."""
    return np.sort(np.argsort(distance, axis=1, kind="stable")[:, :k], axis=1)


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize("k", [1, 7, 90])
def test_of_rows_of_words_the_first_of_equals_are_taken(convert, k):
    rows, queries = words(90), words(40, seed=1)
    distance = ((queries[:, None] - rows[None]) ** 2).sum(2)  # whole numbers
    found = np.concatenate(
        list(nearest.by_distance(convert(rows), k, convert(queries)))
    )
    np.testing.assert_array_equal(found, first(distance, k))


@pytest.mark.parametrize("convert", CONVERT)
def test_each_row_among_the_others(convert):
    rows = words(60)
    distance = ((rows[:, None] - rows[None]) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    found = np.concatenate(list(nearest.by_distance(convert(rows), 5)))
    np.testing.assert_array_equal(found, first(distance, 5))


@pytest.mark.parametrize("convert", CONVERT)
def test_cosines_beside_their_rows(convert):
    rows, queries = unit(words(90)), unit(words(40, seed=1))
    parts = list(nearest.by_cosine(convert(rows), 6, convert(queries)))
    cosine, found = (np.concatenate(p) for p in zip(*parts, strict=True))
    every = queries @ rows.T
    np.testing.assert_allclose(cosine, np.take_along_axis(every, found, 1), atol=1e-6)
    # To 6 digits, so that what is equal on paper is equal here, too.
    np.testing.assert_array_equal(found, first(-np.round(every, 6), 6))


def test_copies_of_a_row_are_equally_near_wherever_they_stand():
    """Products of matrices sum in blocks: copies may differ in the last digit."""
    draw = rngs.generator(0, "copies")
    few, queries = draw.standard_normal((7, 100)), draw.standard_normal((33, 100))
    rows = np.tile(few, (29, 1))
    found = np.concatenate(list(nearest.by_distance(rows, 3, queries)))
    closest = ((queries[:, None] - few[None]) ** 2).sum(2).argmin(1)
    expected = closest[:, None] + 7 * np.arange(3)
    np.testing.assert_array_equal(found, expected)


def test_numbers_far_from_zero_keep_their_distances():
    draw = rngs.generator(0, "far")
    rows, queries = draw.standard_normal((2, 50, 4))
    distance = ((queries[:, None] - rows[None]) ** 2).sum(2)
    far = 2.0**20  # squares of it have no digits left for the differences in float32
    found = np.concatenate(list(nearest.by_distance(rows + far, 5, queries + far)))
    np.testing.assert_array_equal(found, first(distance, 5))


def test_some_queries_at_a_time_are_all(monkeypatch):
    rows, queries = words(90), words(40, seed=1)
    whole = np.concatenate(list(nearest.by_distance(rows, 4, queries)))
    monkeypatch.setattr(nearest, "_AT_ONCE", 7 * 90)
    parts = list(nearest.by_distance(rows, 4, queries))
    assert [len(p) for p in parts] == [7, 7, 7, 7, 7, 5]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
