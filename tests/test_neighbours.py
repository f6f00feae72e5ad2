"""Attention over lists of neighbours against dense attention with the same mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from gradients import normal, same

from cbmlc_jax.models import neighbours
from cbmlc_jax.models.attention import attend
from cbmlc_jax.models.decoder import LabelGraphDecoder
from cbmlc_jax.models.neighbours import Neighbours

WORDS = jnp.array([3, 5], jnp.uint32)


def hub_graph(labels: int, symmetric: bool) -> np.ndarray:
    """Loops, some edges, a label that reads all others, and one that is alone."""
    rng = np.random.default_rng(labels)
    graph = np.eye(labels, dtype=bool) | (rng.random((labels, labels)) < 0.1)
    graph[3] = True
    if symmetric:
        graph |= graph.T
    graph[5], graph[:, 5] = False, False
    graph[5, 5] = True
    return graph


def drawn(batch, labels):
    return tuple(normal(batch, labels, 2, 3, seed=i) for i in range(3))


# The second size is of blocks of two labels and less.
@pytest.mark.parametrize(
    ("symmetric", "rate", "block"),
    [(False, 0.0, 2**21), (False, 0.4, 2 * 16 * 3 * 3 * 2), (True, 0.4, 2**21)],
)
def test_neighbours(float64, monkeypatch, symmetric, rate, block):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    batch, labels = 3, 30
    graph = hub_graph(labels, symmetric)
    lists = Neighbours.of(scipy.sparse.csr_array(graph))
    assert len(lists.reads) == 2  # short lists, and that of the hub
    rows = jnp.arange(10, 10 + batch, dtype=jnp.uint32) if rate else None

    def masked(mask):
        return lambda q, k, v: attend(q, k, v, mask, words=WORDS, rows=rows, rate=rate)

    same(masked(lists), masked(jnp.asarray(graph)[None, None]), drawn(batch, labels))


def test_dense_where_edges_are_many():
    """A ring of 200 labels is lists, a full graph and a weighted one are arrays."""
    ring = np.eye(200, dtype=bool)
    ring |= np.roll(ring, 1, 1)
    for graph, kind in (
        (ring, Neighbours),
        (np.ones((200, 200), bool), np.ndarray),
        (ring.astype(np.float32), np.ndarray),
    ):
        found = neighbours.as_argument(scipy.sparse.csr_array(graph))
        assert type(found) is kind
        if kind is np.ndarray:
            np.testing.assert_array_equal(found, graph)
    assert neighbours.as_argument(None) is None


def test_a_hub_does_not_lengthen_all_lists():
    """A star of 1,000 labels has 2,998 edges with its loops, and lists not longer."""
    star = np.eye(1000, dtype=bool)
    star[0] = star[:, 0] = True
    lists = Neighbours.of(scipy.sparse.csr_array(star))
    assert lists.padded == star.sum() == 2998


@pytest.mark.slow
def test_a_decoder_on_lists_is_that_on_the_mask():
    """Nodes and gradients in training, dropout included, in float32."""
    labels, batch, width = 30, 2, 8
    graph = hub_graph(labels, False)
    decoder = LabelGraphDecoder(labels, width, width, 1, 2, width, dropout=0.3)
    memory, valid = normal(batch, 5, width), jnp.ones((batch, 5), bool)
    params = jax.jit(decoder.init)(jax.random.key(0), memory, valid)
    rows = jnp.arange(batch, dtype=jnp.uint32)

    def nodes(graph):
        rngs = {"dropout": jax.random.key(1)}
        return lambda params, memory: decoder.apply(
            params, memory, valid, graph, rows, rngs=rngs
        )[1][-1]

    lists = Neighbours.of(scipy.sparse.csr_array(graph))
    same(nodes(lists), nodes(jnp.asarray(graph)), (params, memory), rtol=1e-5)


def test_bfloat16_is_near_float32():
    graph = Neighbours.of(scipy.sparse.csr_array(hub_graph(30, False)))

    def attend_in(dtype):
        return lambda q, k, v: attend(q, k, v, graph, dtype=dtype)

    same(attend_in(jnp.bfloat16), attend_in(None), drawn(2, 30), rtol=0.03)
