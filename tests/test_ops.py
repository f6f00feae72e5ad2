"""Operations with derivatives by hand against plain autodiff of their equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbmlc_jax.models import ops

WORDS = jnp.array([3, 5], jnp.uint32)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def values_and_gradients(function, arguments):
    """Of a weighted sum of what the function returns, by all arguments."""

    def weighted(*arguments):
        y = function(*arguments)
        return jnp.sum(y * normal(*y.shape, seed=1)), y

    numbers = tuple(range(len(arguments)))
    run = jax.jit(jax.value_and_grad(weighted, numbers, has_aux=True))
    (_, y), gradients = run(*arguments)
    return y, gradients


def same(ours, theirs, arguments, rtol=1e-10):
    found = values_and_gradients(ours, arguments)
    expected = values_and_gradients(theirs, arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


def plain_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    wide = (1,) * (x.ndim - 1) + (-1,)
    return centred / jnp.sqrt(variance + 1e-5) * scale.reshape(wide) + bias.reshape(
        wide
    )


def plain_attend(q, k, v, mask, rows, rate):
    logits = jnp.einsum("bnhk,bshk->bhns", q, k)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e9)
    weights = jax.nn.softmax(logits, -1)
    if rows is not None:
        keep = ops.keep_mask(WORDS, rows, weights.shape, rate)
        weights = jnp.where(keep, weights / (1 - rate), 0)
    return jnp.einsum("bhns,bshk->bnhk", weights, v)


@pytest.mark.parametrize("sizes", [(6, 5), (5, 6)])
def test_linear(float64, sizes):
    d, out = sizes
    arguments = normal(3, 4, d), normal(d, out)
    same(lambda x, w: ops.linear(x, w, None), lambda x, w: x @ w, arguments)


def test_bias_and_repeat(float64):
    arguments = normal(3, 4, 5), normal(5)
    same(ops.add_bias, lambda x, b: x + b[None, None], arguments)
    same(
        lambda x: ops.repeat(x, 7),
        lambda x: jnp.broadcast_to(x[None], (7, 3, 4, 5)),
        arguments[:1],
    )


def test_layer_norm(float64):
    arguments = normal(3, 4, 5) + 10, normal(5, seed=2), normal(5, seed=3)
    same(ops.layer_norm, plain_norm, arguments)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", ["no", "keys", "pairs"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_attention(float64, batch, masked, rate):
    queries, keys, heads, width = 5, 19, 2, 3
    arguments = tuple(
        normal(batch, n, heads, width, seed=i)
        for i, n in enumerate((queries, keys, keys))
    )
    mask = None
    if masked == "keys":
        mask = (normal(batch, 1, 1, keys) > 0.3).at[0].set(False)  # a row of nothing
    elif masked == "pairs":
        mask = normal(1, 1, queries, keys) > 0
    rows = jnp.arange(10, 10 + batch, dtype=jnp.uint32) if rate else None
    same(
        lambda q, k, v: ops.attend(q, k, v, mask, words=WORDS, rows=rows, rate=rate),
        lambda q, k, v: plain_attend(q, k, v, mask, rows, rate),
        arguments,
    )


def test_large_logits_stay_finite():
    q, k = 1e3 * normal(2, 3, 1, 4), 1e3 * normal(2, 5, 1, 4, seed=1)
    y, gradients = values_and_gradients(ops.attend, (q, k, k))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, gradients)))


def test_bfloat16_rounds_factors_and_sums_in_float32():
    """A factor is off by 2^-9 at most, so a sum of 4,096 products hardly at all."""
    x, w = 1 + jnp.abs(normal(8, 4096)), 1 + jnp.abs(normal(4096, 16))
    compiled = jax.jit(lambda x, w: ops.linear(x, w, jnp.bfloat16))
    found = compiled(x, w)
    assert found.dtype == jnp.float32
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w)]
    np.testing.assert_allclose(found, rounded[0] @ rounded[1], rtol=2e-5)
    assert np.abs(np.asarray(found) / (np.asarray(x) @ np.asarray(w)) - 1).max() > 1e-6


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 7, 3, 2), (3, 40, 17, 8)])
def test_bfloat16_attention_is_near_float32(sizes):
    batch, queries, keys, width = sizes
    arguments = tuple(
        normal(batch, n, 2, width, seed=i) for i, n in enumerate((queries, keys, keys))
    )
    rows = jnp.arange(batch, dtype=jnp.uint32)

    def attend(dtype):
        return lambda q, k, v: ops.attend(
            q, k, v, words=WORDS, rows=rows, rate=0.2, dtype=dtype
        )

    same(attend(jnp.bfloat16), attend(None), arguments, rtol=0.03)
