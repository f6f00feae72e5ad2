"""Comparing an operation and its gradients with those of its plain equation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


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
    """`theirs`: a function, or what `values_and_gradients` found of it."""
    found = values_and_gradients(ours, arguments)
    expected = values_and_gradients(theirs, arguments) if callable(theirs) else theirs
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)
