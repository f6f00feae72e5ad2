"""Multi-head attention, dense or block by block, with derivatives written out by hand.

The weights of all pairs are [B, H, N, S]: for 983 labels and 32 rows half a gigabyte a
layer.  Up to `DENSE_BYTES` they are computed at once and kept for the backward pass.
Above, a loop goes over blocks of queries, small enough to stay in a processor's caches:
a block sees all keys, so that its softmax is exact; only its row maxima and sums are
kept, and the backward pass computes its weights again.  Memory then grows with N + S.

Shapes, `dtype`: see `ops`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, UInt32

from cbmlc_jax.models import neighbours
from cbmlc_jax.models.neighbours import Neighbours
from cbmlc_jax.models.ops import (
    LANES,
    QUERY_STRIDE,
    computed_row_sum,
    keep_mask,
    pair_strides,
    product,
    rounded,
    row_max,
    row_sum,
    stored,
)

# A large negative logit instead of -inf: a row whose keys are all masked stays finite.
_MASKED = -1e9
# Of float32 weights: the most that are computed at once, and those of a block.
DENSE_BYTES = 2**26
BLOCK_BYTES = 2**23
_FEWEST = 4 * LANES  # queries of a block: products of fewer are slow


def attend(
    q: Float[Array, "batch queries heads head"],
    k: Float[Array, "batch keys heads head"],
    v: Float[Array, "batch keys heads head"],
    mask: Bool[Array, "..."] | Neighbours | None = None,
    *,
    words: UInt32[Array, " 2"] | None = None,
    rows: UInt32[Array, " batch"] | None = None,
    rate: float = 0.0,
    dtype: DTypeLike | None = None,
) -> Float[Array, "batch queries heads head"]:
    """dropout(softmax(Q K^T)) V for every head; Q is scaled already.

    Args:
        q: [B, N, H, K].
        k, v: [B, S, H, K].
        mask: broadcastable to [B, 1, N, S]; True where attention is allowed.  Or the
            neighbours of labels that attend to each other.
        words, rows: of `keep_mask`, for the dropout of the weights; None for none.
        rate: of the dropout.
        dtype: see `ops`.

    Returns:
        [B, N, H, K].
    """
    if rows is None or not rate:
        words = rows = None
        rate = 0.0
    if isinstance(mask, Neighbours):
        dropout = {"words": words, "rows": rows, "rate": rate}
        return neighbours.attend(q, k, v, mask, **dropout, dtype=dtype)
    queries, keys = q.shape[1], k.shape[1]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], keys))
    q, k, v = (_heads_first(x) for x in (q, k, v))
    static = (keys, rate, dtype)
    parts = _parts(q.shape[0])
    plan = _plan(q.shape[0], q[parts[0]].shape[0], (*q.shape[1:3], k.shape[2]))
    mixed = []
    for part in parts:
        ours = mask if mask is None or mask.shape[0] == 1 else mask[part]
        those = None if rows is None else rows[part]
        arrays = (q[part], k[part], v[part], ours, words, those)
        if plan is None:
            mixed.append(_attend(*arrays, static))
        else:
            mixed.append(_blockwise(*arrays, static, plan))
    return jnp.swapaxes(jnp.concatenate(mixed)[:, :, :queries], 1, 2)


def _parts(rows: int) -> list[slice]:
    """On a CPU two halves, whose many small products run beside each other; one part
    where the number of rows is a symbol, which jax.export has."""
    if jax.default_backend() != "cpu" or not isinstance(rows, int) or rows < 2:
        return [slice(None)]
    return [slice(0, rows // 2), slice(rows // 2, rows)]


def _plan(rows: int, part: int, sizes: tuple[int, int, int]) -> tuple[int, int] | None:
    """Rows and queries of a block; None for all at once, as where a size is a symbol.

    Args:
        rows: of the batch.
        part: of them, those that are computed in one loop.
        sizes: H, N, S.
    """
    heads, queries, keys = sizes
    if not all(isinstance(size, int) for size in (rows, *sizes)):
        return None
    one_query = 4 * heads * keys
    if rows * queries * one_query <= DENSE_BYTES:
        return None
    fitting = max(BLOCK_BYTES // one_query // LANES * LANES, _FEWEST)
    if fitting < queries:
        blocks = -(-queries // fitting)
        return 1, -(-queries // blocks // LANES) * LANES
    # All blocks of a loop have one shape: the rows must divide among them.
    wanted = max(BLOCK_BYTES // (queries * one_query), 1)
    return max(r for r in range(1, wanted + 1) if part % r == 0), queries


def _heads_first(x: Array) -> Array:
    """[B, N, H, K] -> [B, H, N + padding, K]."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, mask, words, rows, static):
    return _attend_forward(q, k, v, mask, words, rows, static)[0]


def _attend_forward(q, k, v, mask, words, rows, static):
    q, k, v = (rounded(x, static[-1]) for x in (q, k, v))
    if mask is not None:
        mask = _padded(mask, (*q.shape[:3], k.shape[2]))
    drop = functools.partial(_drop, words, rows, static, None)
    mixed, raised, _, total = _mix(q, k, v, mask, drop, static)
    return mixed, (q, k, v, raised, total, mixed, mask, words, rows)


def _attend_backward(static, saved, g):
    q, k, v, raised, total, mixed, mask, words, rows = saved
    drop = functools.partial(_drop, words, rows, static, None)
    gradients = _pull(q, k, v, mask, drop, static, raised, total, mixed, g)
    return (*gradients, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(q, k, mask, static):
    keys, _, dtype = static
    logits = product(q, k, dtype, turn="y")
    if mask is not None:
        logits = jnp.where(mask, logits, _MASKED)
    inside = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, logits.shape[-1]), 3) < keys
    return jnp.where(inside, logits, -jnp.inf)


def _mix(q, k, v, mask, drop, static):
    """The mixed values; exp(logits - top), their maxima `top`, their sums."""
    _, rate, dtype = static
    logits = _logits(q, k, mask, static)
    top = row_max(logits)
    raised = stored(jnp.exp(logits - top))
    total = row_sum(raised) * (1 - rate)
    raised = rounded(raised, dtype)
    return product(drop(raised), v, dtype) / total, raised, top, total


def _pull(q, k, v, mask, drop, static, raised, total, mixed, g):
    """Gradients by q, k and v from that by the mixed values."""
    # With P = raised / total and dropout folded into total: dP = keep g V^T, and
    # dlogits = P (dP - sum_s P dP), the sum being that of g and the mixed values.
    _, rate, dtype = static
    g = stored(g / total)
    along = computed_row_sum(g * mixed) * (1 - rate)
    g = rounded(g, dtype)
    dv = _turned(product(g, drop(raised), dtype, turn="x"))
    dlogits = drop(product(g, v, dtype, turn="y")) - along
    dlogits = raised * dlogits
    if mask is not None:
        dlogits = jnp.where(mask, dlogits, 0)
    dlogits = stored(rounded(dlogits, dtype))
    dk = _turned(product(q, dlogits, dtype, turn="x"))
    return product(dlogits, k, dtype), dk, dv


def _turned(x: Array) -> Array:
    """[..., K, S] -> [..., S, K]: x^T P = (P^T x)^T turns no [N, S] array."""
    return jnp.swapaxes(x, -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blockwise(q, k, v, mask, words, rows, static, plan):
    return _blockwise_forward(q, k, v, mask, words, rows, static, plan)[0]


def _blockwise_forward(q, k, v, mask, words, rows, static, plan):
    q, k, v = (rounded(x, static[-1]) for x in (q, k, v))
    arrays = _whole_blocks((q,), mask, k.shape[2], plan)

    def group(first):
        k_, v_ = (_cut(x, 0, first, plan[0]) for x in (k, v))

        def block(start):
            at = first, start
            (q_,), mask_, drop = _block(*arrays, words, rows, static, plan, at)
            mixed, _, top, total = _mix(q_, k_, v_, mask_, drop, static)
            return mixed, top, total

        return jax.lax.map(block, jnp.arange(0, q.shape[2], plan[1]))

    of_blocks = jax.lax.map(group, jnp.arange(0, len(q), plan[0]))
    mixed, top, total = (_joined(x)[:, :, : q.shape[2]] for x in of_blocks)
    return mixed, (q, k, v, mask, words, rows, top, total, mixed)


def _blockwise_backward(static, plan, saved, g):
    q, k, v, mask, words, rows, top, total, mixed = saved
    # Queries that are padding have a gradient of 0; their total must not be 0 for that.
    total = jnp.pad(total, _up_to(total, plan), constant_values=1)
    arrays = _whole_blocks((q, top, total, mixed, g), mask, k.shape[2], plan)

    def group(first):
        k_, v_ = (_cut(x, 0, first, plan[0]) for x in (k, v))

        def block(sums, start):
            at = first, start
            some, mask_, drop = _block(*arrays, words, rows, static, plan, at)
            q_, top_, total_, mixed_, g_ = some
            raised = stored(jnp.exp(_logits(q_, k_, mask_, static) - top_))
            raised = rounded(raised, static[-1])
            dq, dk, dv = _pull(
                q_, k_, v_, mask_, drop, static, raised, total_, mixed_, g_
            )
            return (sums[0] + dk, sums[1] + dv), dq

        zeros = jnp.zeros(k_.shape, g.dtype)
        starts = jnp.arange(0, q.shape[2], plan[1])
        (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), starts)
        return dq, dk, dv

    dq, dk, dv = jax.lax.map(group, jnp.arange(0, len(q), plan[0]))
    dk, dv = (x.reshape(k.shape) for x in (dk, dv))
    return _joined(dq)[:, :, : q.shape[2]], dk, dv, None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _up_to(x: Array, plan: tuple[int, int]) -> list[tuple[int, int]]:
    """Padding of the queries, axis 2, to whole blocks."""
    return [(0, 0), (0, 0), (0, -x.shape[2] % plan[1]), *[(0, 0)] * (x.ndim - 3)]


def _whole_blocks(arrays, mask, keys: int, plan):
    """Arrays [B, H, N, ...] and the mask with queries for whole blocks."""
    arrays = [jnp.pad(x, _up_to(x, plan)) for x in arrays]
    if mask is not None:
        mask = _padded(mask, (*arrays[0].shape[:3], keys))
    return arrays, mask


def _block(arrays, mask, words, rows, static, plan, at):
    """A block of the arrays and of the mask, and its dropout.

    Args:
        arrays, mask: of whole blocks.
        at: the block's first row and first query.
    """
    first, start = at

    def part(x):
        return _cut(_cut(x, 0, first, plan[0]), 2, start, plan[1])

    mask = None if mask is None else part(mask)
    rows = None if rows is None else _cut(rows, 0, first, plan[0])
    counter = start.astype(jnp.uint32) * jnp.uint32(QUERY_STRIDE)
    drop = functools.partial(_drop, words, rows, static, counter)
    return [part(x) for x in arrays], mask, drop


def _cut(x: Array, axis: int, start: Array, size: int) -> Array:
    """`size` entries of an axis; an axis of 1 is one of a mask that goes for all."""
    if x.shape[axis] in (1, size):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _joined(x: Array) -> Array:
    """[groups, blocks, rows, H, queries, ...] -> [B, H, N, ...]."""
    x = jnp.moveaxis(x, 1, 3)
    groups, rows, heads, blocks, queries = x.shape[:5]
    return x.reshape(groups * rows, heads, blocks * queries, *x.shape[5:])


def _padded(mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask up to the padded queries and keys; what it adds is False."""
    sizes = zip(mask.shape, shape, strict=True)
    return jnp.pad(mask, [(0, 0 if size == 1 else full - size) for size, full in sizes])


def _drop(words, rows, static, start, x: Array) -> Array:
    """Zero where dropout says so; what stays is not scaled up here."""
    rate = static[1]
    if rows is None:
        return x
    strides = pair_strides(x.shape[1])
    return jnp.where(keep_mask(words, rows, x.shape, rate, strides, start), x, 0)
