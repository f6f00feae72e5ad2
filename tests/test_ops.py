"""Operations with derivatives by hand against plain autodiff of their equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import normal, same

from cbmlc_jax.models import ops


def plain_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    wide = (1,) * (x.ndim - 1) + (-1,)
    return centred / jnp.sqrt(variance + 1e-5) * scale.reshape(wide) + bias.reshape(
        wide
    )


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


@pytest.mark.parametrize("width", [5, 7, 8, 9])
def test_layer_norm(float64, width):
    """Widths that are summed in fifths, at once, in quarters, in thirds."""
    arguments = normal(3, 4, width) + 10, normal(width, seed=2), normal(width, seed=3)
    same(ops.layer_norm, plain_norm, arguments)


@pytest.mark.parametrize("rows, width", [(8, 12), (7, 11)])
def test_row_products(float64, rows, width):
    same(
        ops.row_products,
        lambda x, w: jnp.einsum("bnk,nk->bn", x, w),
        (normal(rows, 4, width), normal(4, width, seed=2)),
    )


def test_bfloat16_rounds_factors_and_sums_in_float32():
    """A factor is off by 2^-9 at most, so a sum of 4,096 products hardly at all."""
    x, w = 1 + jnp.abs(normal(8, 4096)), 1 + jnp.abs(normal(4096, 16))
    compiled = jax.jit(lambda x, w: ops.linear(x, w, jnp.bfloat16))
    found = compiled(x, w)
    assert found.dtype == jnp.float32
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w)]
    np.testing.assert_allclose(found, rounded[0] @ rounded[1], rtol=2e-5)
    assert np.abs(np.asarray(found) / (np.asarray(x) @ np.asarray(w)) - 1).max() > 1e-6
