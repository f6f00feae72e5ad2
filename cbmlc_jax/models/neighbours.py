"""Attention over the neighbours in a graph: time and memory grow with its edges.

Every label reads the keys and values of its own neighbours, gathered by padded lists.
The gradient by keys and values is gathered too, over the lists of who reads a label:
a scatter would be slow.  Labels of like degree share lists of one length, so that a
label that all others know does not make everyone's list as long as its own.

Shapes: B rows, L labels, H heads, K width of a head, n labels of a block, S the length
of their lists.  Here arrays lie as [L, K, B H]: a neighbour is one piece of memory, and
what is computed for a pair of labels is the same for all rows and heads beside it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, DTypeLike, Float, Int32, UInt32

from cbmlc_jax.models import ops

# An edge costs as much as so many pairs of labels of dense attention; measured, see
# experiments/README.md.
EDGE_COST = 36
_BLOCK = 2**21  # values gathered for a block
_STEP = 4  # lengths of the lists grow by this


class Lists(NamedTuple):
    """Labels of like degree with their neighbours.

    Attributes:
        labels: [n].
        others: [n, S], -1 behind the last.
    """

    labels: Int32[np.ndarray, " labels"]
    others: Int32[np.ndarray, "labels neighbours"]


@flax.struct.dataclass
class Neighbours:
    """A graph as lists; every label has one neighbour at least.

    Attributes:
        reads: of each label, those that it listens to.
        read_by: of each label, those that listen to it.
    """

    reads: tuple[Lists, ...]
    read_by: tuple[Lists, ...]

    @classmethod
    def of(cls, graph: scipy.sparse.csr_array) -> Neighbours:
        """Of edges [L, L]; row i listens to its columns."""
        return cls(_lists(graph), _lists(scipy.sparse.csr_array(graph.T)))

    @property
    def padded(self) -> int:
        """Edges with padding, in both directions the most."""
        return max(
            sum(x.others.size for x in lists) for lists in (self.reads, self.read_by)
        )


def as_argument(
    graph: scipy.sparse.csr_array | None,
) -> Neighbours | np.ndarray | None:
    """A label graph as a model computes it fastest.

    Args:
        graph: bool [L, L] edges, self loops included; or float32 [L, L] weights.

    Returns:
        None (complete), lists, or an array [L, L] where edges are many or weighted.
    """
    if graph is None:
        return None
    if graph.dtype == bool:
        lists = Neighbours.of(graph)
        if lists.padded * EDGE_COST < graph.shape[0] ** 2:
            return lists
    return graph.toarray()


def _lists(graph: scipy.sparse.csr_array) -> tuple[Lists, ...]:
    degree = np.diff(graph.indptr)
    if not degree.all():
        raise ValueError("a label without neighbours; self loops are missing")
    found, shorter, longer = [], 0, 16
    while shorter < degree.max():
        labels = np.flatnonzero((degree > shorter) & (degree <= longer))
        if len(labels):
            size = degree[labels]
            others = np.full((len(labels), size.max()), -1, np.int32)
            filled = np.arange(others.shape[1]) < size[:, None]
            others[filled] = graph[labels].indices
            found.append(Lists(labels.astype(np.int32), others))
        shorter, longer = longer, longer * _STEP
    return tuple(found)


def attend(
    q: Float[Array, "batch labels heads head"],
    k: Float[Array, "batch labels heads head"],
    v: Float[Array, "batch labels heads head"],
    graph: Neighbours,
    *,
    words: UInt32[Array, " 2"] | None,
    rows: UInt32[Array, " batch"] | None,
    rate: float,
    dtype: DTypeLike | None,
) -> Float[Array, "batch labels heads head"]:
    """As `attention.attend` with the graph as its mask, the same dropout included."""
    batch, labels, heads, head = q.shape
    q, k, v = (x.transpose(1, 3, 0, 2).reshape(labels, head, -1) for x in (q, k, v))
    static = (rate, dtype, batch)
    mixed = _attend(q, k, v, graph, words, rows, static)
    return mixed.reshape(labels, head, batch, heads).transpose(2, 0, 3, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, graph, words, rows, static):
    return _forward(q, k, v, graph, words, rows, static)[0]


def _forward(q, k, v, graph, words, rows, static):
    q, k, v = (ops.rounded(x, static[1]) for x in (q, k, v))

    def block(labels, others):
        inside = others >= 0
        logits = jnp.where(inside[..., None], _dot(q, labels, k, others), -jnp.inf)
        logits = ops.stored(logits)
        top = jnp.max(logits, 1, keepdims=True)
        raised = jnp.exp(logits - top)
        total = jnp.sum(raised, 1, keepdims=True)
        weights = _drop(raised / total, labels[:, None], others, words, rows, static)
        mixed = _sum(ops.stored(weights), v, others)
        return mixed, (top + jnp.log(total))[:, 0]

    mixed, norm = _by_blocks(block, graph.reads, q)
    return mixed, (q, k, v, graph, words, rows, mixed, norm)


def _backward(static, saved, g):
    q, k, v, graph, words, rows, mixed, norm = saved
    along = jnp.sum(g * mixed, 1)
    g_ = ops.rounded(g, static[1])

    def slopes(weights, products, along, readers, keys):
        """By the logits, from the weights and g V^T."""
        dropped = _drop(products, readers, keys, words, rows, static)
        return ops.stored(weights * (dropped - along))

    def by_queries(labels, others):
        inside = (others >= 0)[..., None]
        logits = _dot(q, labels, k, others)
        weights = jnp.where(inside, jnp.exp(logits - norm[labels][:, None]), 0)
        products = _dot(g_, labels, v, others)
        pulled = slopes(
            weights, products, along[labels][:, None], labels[:, None], others
        )
        return (_sum(pulled, k, others),)

    def by_keys(labels, others):
        inside, at = (others >= 0)[..., None], jnp.maximum(others, 0)
        logits = _dot(k, labels, q, others)
        weights = jnp.where(inside, jnp.exp(logits - norm[at]), 0)
        products = _dot(v, labels, g_, others)
        pulled = slopes(weights, products, along[at], others, labels[:, None])
        kept = _drop(weights, others, labels[:, None], words, rows, static)
        return _sum(pulled, q, others), _sum(ops.stored(kept), g_, others)

    (dq,) = _by_blocks(by_queries, graph.reads, q)
    dk, dv = _by_blocks(by_keys, graph.read_by, q)
    return dq, dk, dv, None, None, None


_attend.defvjp(_forward, _backward)


def _by_blocks(block, lists: tuple[Lists, ...], like: Array):
    """Arrays [L, ...] of what block(labels [n], others [n, S]) returns for those n."""
    found = []
    for labels, others in lists:
        count, length = others.shape
        size = min(max(_BLOCK // (length * like[0].size), 1), count)
        fill = -count % size
        labels = jnp.pad(labels, (0, fill)).reshape(-1, size)
        others = jnp.pad(others, ((0, fill), (0, 0))).reshape(-1, size, length)
        some = jax.lax.map(lambda x: block(*x), (labels, others))
        found.append([x.reshape(-1, *x.shape[2:])[:count] for x in some])
    back = jnp.argsort(jnp.concatenate([x.labels for x in lists]))
    return tuple(jnp.concatenate(x)[back] for x in zip(*found, strict=True))


def _dot(x, labels, y, others):
    """x_l . y_s for every neighbour s of l: [n, S, B H], in float32 or more."""
    x, y = _wide(x[labels]), _wide(y[jnp.maximum(others, 0)])
    return jnp.sum(x[:, None] * y, 2)


def _sum(weights, x, others):
    """sum_s w_ls x_s: [n, K, B H], in float32 or more."""
    return jnp.sum(weights[:, :, None] * _wide(x[jnp.maximum(others, 0)]), 1)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _drop(x, readers, keys, words, rows, static):
    """x / (1 - rate) where dense attention would keep the pair, else 0.

    Args:
        x: [n, S, B H].
        readers, keys: labels, [n, S] or broadcastable to it.
    """
    rate, _, batch = static
    if rows is None:
        return x
    heads = jnp.arange(x.shape[2] // batch, dtype=jnp.uint32)
    strides = ops.pair_strides(len(heads))
    head, reader = (jnp.uint32(stride % 2**32) for stride in strides[:2])
    pairs = reader * readers.astype(jnp.uint32) + keys.astype(jnp.uint32)
    counter = pairs[..., None, None] + (head * heads)[None, None, None]
    keep = ops.kept(words, rows, counter, rate, axis=2)
    return jnp.where(keep.reshape(x.shape), x / (1 - rate), 0)
