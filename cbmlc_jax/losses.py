"""Losses: pure, unreduced functions of logits, finite for every finite logit.

All element-wise losses take `logits` and `labels` of the same shape and return that
shape; `total` reduces them under a mask.  Symbols: p = sigmoid(logit), y = label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NAMES = ("asl", "bce")
REDUCTIONS = ("sum", "mean")
CONTEXT_NORMS = ("squared", "frobenius")


def bce(
    logits: Float[Array, "*shape"], labels: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Binary cross entropy, -y log p - (1 - y) log(1 - p).

    Args:
        logits: any shape.
        labels: same shape, in [0, 1].

    Returns:
        Element-wise loss, same shape.
    """
    return -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(
        -logits
    )


def asl(
    logits: Float[Array, "*shape"],
    labels: Float[Array, "*shape"],
    *,
    gamma_pos: float,
    gamma_neg: float,
    margin: float,
    stop_focal_gradient: bool = False,
) -> Float[Array, "*shape"]:
    """Asymmetric loss: -y (1-p)^g+ log p - (1-y) q^g- log(1-q), q = max(p - m, 0).

    The margin shifts the negatives only; where p <= m, a negative's loss and gradient
    are exactly 0.  At g+ = g- = m = 0 it is `bce`; at g+ = g- and m = 0 the focal
    loss.

    Args:
        logits: any shape.
        labels: same shape, in [0, 1].
        gamma_pos: focusing of positives, g+ >= 0.
        gamma_neg: focusing of negatives, g- >= 0.
        margin: m in [0, 1).
        stop_focal_gradient: hold the focusing weights constant in the gradient.

    Returns:
        Element-wise loss, same shape.

    References:
        Ben-Baruch et al. 2020, Asymmetric loss for multi-label classification;
        section 3 of the CbMLC paper.
    """
    # gamma * log p must not overflow: its gradient would be inf * 0.
    logits = jnp.clip(logits, -1e30, 1e30)
    log_p, log_1mp = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    hold = jax.lax.stop_gradient if stop_focal_gradient else (lambda x: x)
    positive = -hold(jnp.exp(gamma_pos * log_1mp)) * log_p
    if margin:
        shifted = jax.nn.sigmoid(logits) - margin
        kept = shifted > 0
        # The inner where keeps 0^g out of the branch that is not taken: its gradient
        # would be inf * 0 for g < 1.
        safe = jnp.where(kept, shifted, 0.5)
        log_rest = jnp.log(jax.nn.sigmoid(-logits) + margin)
        log_rest = jnp.where(kept, log_rest, 0.0)
        negative = jnp.where(kept, -hold(safe**gamma_neg) * log_rest, 0.0)
    else:
        negative = -hold(jnp.exp(gamma_neg * log_p)) * log_1mp
    return labels * positive + (1 - labels) * negative


def context_penalty(
    label_embeddings: Float[Array, "labels width"],
    word_vectors: Float[Array, "labels width"],
    norm: str = "squared",
) -> Float[Array, ""]:
    """Distance of the label embeddings E from their word vectors H.

    Args:
        label_embeddings: E, [L, P].
        word_vectors: H, [L, P]; a constant, no gradient flows into it.
        norm: "squared", sum_l ||e_l - h_l||^2 (paper eq. 9), or "frobenius",
            ||E - H||_F, whose gradient at E = H is defined as 0.

    Returns:
        A scalar.

    Raises:
        ValueError: unknown norm.
    """
    difference = label_embeddings - jax.lax.stop_gradient(word_vectors)
    squared = jnp.sum(jnp.square(difference))
    if norm == "squared":
        return squared
    if norm == "frobenius":
        apart = squared > 0
        return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
    raise ValueError(f"context norm {norm!r} is not one of {', '.join(CONTEXT_NORMS)}")


def total(
    losses: Float[Array, "batch labels"], mask: Bool[Array, " batch"]
) -> Float[Array, ""]:
    """Sum over the labels of the rows where `mask` holds; others give no gradient."""
    return jnp.sum(jnp.where(mask[:, None], losses, 0.0))
