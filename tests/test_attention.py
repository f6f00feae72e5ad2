"""Attention at once and by blocks against plain autodiff of its equation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import normal, same, values_and_gradients

from cbmlc_jax.models import attention, ops
from cbmlc_jax.models.attention import attend

WORDS = jnp.array([3, 5], jnp.uint32)


def plain_attend(q, k, v, mask, rows, rate):
    logits = jnp.einsum("bnhk,bshk->bhns", q, k)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e9)
    weights = jax.nn.softmax(logits, -1)
    if rows is not None:
        strides = ops.pair_strides(weights.shape[1])
        keep = ops.keep_mask(WORDS, rows, weights.shape, rate, strides)
        weights = jnp.where(keep, weights / (1 - rate), 0)
    return jnp.einsum("bhns,bshk->bnhk", weights, v)


def drawn(batch, queries, keys, heads=2, width=3):
    sizes = (queries, keys, keys)
    return tuple(normal(batch, n, heads, width, seed=i) for i, n in enumerate(sizes))


def drawn_mask(kind, batch, queries, keys):
    if kind == "keys":
        # The first row has none.
        return (normal(batch, 1, 1, keys) > 0.3).at[0].set(False)
    if kind == "pairs":
        return normal(1, 1, queries, keys) > 0
    return None


def in_blocks(monkeypatch, queries: int, block_bytes: int = 1):
    """Everything in blocks of so few queries, or of more if a block may be larger."""
    monkeypatch.setattr(attention, "DENSE_BYTES", 0)
    monkeypatch.setattr(attention, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(attention, "_FEWEST", queries)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", ["no", "keys", "pairs"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_attention(float64, batch, masked, rate):
    queries, keys = 5, 19
    mask = drawn_mask(masked, batch, queries, keys)
    rows = jnp.arange(10, 10 + batch, dtype=jnp.uint32) if rate else None
    same(
        lambda q, k, v: attend(q, k, v, mask, words=WORDS, rows=rows, rate=rate),
        lambda q, k, v: plain_attend(q, k, v, mask, rows, rate),
        drawn(batch, queries, keys),
    )


# Two blocks of 16 queries; two of 48 for 65, padded to 80; two rows at once.
@pytest.mark.parametrize(
    ("queries", "block_bytes", "plan", "masked", "rate"),
    [
        (30, 1, (1, 16), "no", 0.0),
        (30, 1, (1, 16), "keys", 0.0),
        (65, 1, (1, 48), "pairs", 0.4),
        (30, 4 * 2 * 32 * 48 * 2, (2, 32), "keys", 0.4),
        (30, 4 * 2 * 32 * 48 * 2, (2, 32), "pairs", 0.0),
    ],
)
def test_blocks(float64, monkeypatch, queries, block_bytes, plan, masked, rate):
    batch, keys = 4, 40
    in_blocks(monkeypatch, plan[1], block_bytes)
    padded = queries + -queries % 16
    assert attention._plan(batch, 2, (2, padded, 48)) == plan
    mask = drawn_mask(masked, batch, queries, keys)
    rows = jnp.arange(10, 10 + batch, dtype=jnp.uint32) if rate else None
    same(
        lambda q, k, v: attend(q, k, v, mask, words=WORDS, rows=rows, rate=rate),
        lambda q, k, v: plain_attend(q, k, v, mask, rows, rate),
        drawn(batch, queries, keys),
    )


@pytest.mark.parametrize("blocks", [False, True])
def test_dropout_does_not_depend_on_the_padding(float64, monkeypatch, blocks):
    """Rows padded from 19 to 37 tokens: the same outputs, draws of dropout included."""
    batch, length, longer = 2, 19, 37
    if blocks:
        in_blocks(monkeypatch, 16)
    rows, arguments = jnp.arange(batch, dtype=jnp.uint32), drawn(batch, length, length)

    def mixed(width):
        q, k, v = (
            jnp.pad(x, [(0, 0), (0, width - length), (0, 0), (0, 0)]) for x in arguments
        )
        mask = jnp.broadcast_to(jnp.arange(width) < length, (batch, 1, 1, width))
        return attend(q, k, v, mask, words=WORDS, rows=rows, rate=0.4)[:, :length]

    np.testing.assert_allclose(mixed(length), mixed(longer), rtol=1e-10, atol=1e-10)


def test_memory_grows_with_the_number_of_labels(monkeypatch):
    """Four times the labels: less than five times the memory, not sixteen."""
    monkeypatch.setattr(attention, "DENSE_BYTES", 0)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 2**18)

    def needed(labels):
        sizes = jax.ShapeDtypeStruct((2, labels, 2, 8), jnp.float32)

        def gradients(q, k, v):
            return jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))(q, k, v)

        compiled = jax.jit(gradients).lower(sizes, sizes, sizes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = needed(512), needed(2048)
    assert many < 5 * few
    assert many < 4 * 2 * 2 * 2048**2  # of the weights alone


def test_large_logits_stay_finite():
    q, k = 1e3 * normal(2, 3, 1, 4), 1e3 * normal(2, 5, 1, 4, seed=1)
    y, gradients = values_and_gradients(attend, (q, k, k))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, gradients)))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 7, 3, 2), (3, 40, 17, 8)])
def test_bfloat16_attention_is_near_float32(sizes, blocks, monkeypatch):
    batch, queries, keys, width = sizes
    arguments = drawn(batch, queries, keys, 2, width)
    rows = jnp.arange(batch, dtype=jnp.uint32)

    def attend_in(dtype):
        return lambda q, k, v: attend(
            q, k, v, words=WORDS, rows=rows, rate=0.2, dtype=dtype
        )

    exact = values_and_gradients(attend_in(None), arguments)
    if blocks:
        in_blocks(monkeypatch, 16)
    same(attend_in(jnp.bfloat16), exact, arguments, rtol=0.03)
