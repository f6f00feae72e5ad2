"""Losses: pure, unreduced functions of logits, finite for every finite logit.

All element-wise losses take `logits` and `labels` of the same shape and return that
shape; `total` reduces them under a mask.  Symbols: p = sigmoid(logit), y = label.
Epochs count from 1.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NAMES = ("asl", "bce", "hill", "splc", "large_loss", "forward")
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


def _focal(
    logits: Float[Array, "*shape"],
    gamma: float,
    hold: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "*shape"]:
    """-(1 - p)^g log p, the focal loss of a positive; of a negative with -logits."""
    # gamma * log p must not overflow: its gradient would be inf * 0.
    logits = jnp.clip(logits, -1e30, 1e30)
    weight = jnp.exp(gamma * jax.nn.log_sigmoid(-logits))
    return -hold(weight) * jax.nn.log_sigmoid(logits)


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
    hold = jax.lax.stop_gradient if stop_focal_gradient else (lambda x: x)
    positive = _focal(logits, gamma_pos, hold)
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
        negative = _focal(-logits, gamma_neg, hold)
    return labels * positive + (1 - labels) * negative


def hill(
    logits: Float[Array, "*shape"],
    labels: Float[Array, "*shape"],
    *,
    weight: float = 1.5,
    margin: float = 1.0,
    gamma: float = 2.0,
) -> Float[Array, "*shape"]:
    """Hill loss: -y (1 - p_m)^g log p_m + (1 - y) (w - p) p^2.

    Here p_m = sigmoid(logit - m): the margin moves the weight to semi-hard positives.
    A negative's slope in the logit, (2 w - 3 p) p^2 (1 - p), is a hill: at w = 1.5 it
    is 3 p^2 (1 - p)^2, so that a likely false negative (p near 1) hardly counts.  The
    gradient flows through the focusing weight.

    Args:
        logits: any shape.
        labels: same shape, in [0, 1].
        weight: w, the paper's lambda; from 1.5 on, the negatives' loss rises with p.
        margin: m, subtracted from the logits of the positives only.
        gamma: focusing g >= 0 of the positives.

    Returns:
        Element-wise loss, same shape.

    References:
        Zhang et al. 2021, Simple and robust loss design for multi-label learning with
        missing labels.
    """
    p = jax.nn.sigmoid(logits)
    positive = _focal(logits - margin, gamma)
    return labels * positive + (1 - labels) * (weight - p) * p * p


def splc(
    logits: Float[Array, "*shape"],
    labels: Float[Array, "*shape"],
    epoch: int | Int[Array, ""],
    *,
    tau: float = 0.6,
    margin: float = 1.0,
    gamma: float = 2.0,
    change_epoch: int = 1,
) -> Float[Array, "*shape"]:
    """Self-paced loss correction: a negative with p > tau counts as a positive.

        y = 1:             -(1 - p_m)^g log p_m,  p_m = sigmoid(logit - m)
        y = 0, p <= tau:   -p^g log(1 - p)
        y = 0, p > tau:    -(1 - p)^g log p, where epoch > change_epoch

    As in the published code, neither the decision nor the loss of a corrected negative
    is shifted by the margin (in the paper's equation the margin is part of either
    positive loss).  The decision carries no gradient.

    Args:
        logits: any shape.
        labels: same shape, in [0, 1].
        epoch: the current epoch, from 1 on; may be traced.
        tau: threshold in [0, 1].
        margin: m, subtracted from the logits of the given positives.
        gamma: focusing g >= 0, of positives and negatives.
        change_epoch: so many epochs go by before the first correction.

    Returns:
        Element-wise loss, same shape.

    References:
        Zhang et al. 2021, Simple and robust loss design for multi-label learning with
        missing labels.
    """
    corrected = (jax.nn.sigmoid(logits) > tau) & (jnp.asarray(epoch) > change_epoch)
    negative = jnp.where(corrected, _focal(logits, gamma), _focal(-logits, gamma))
    return labels * _focal(logits - margin, gamma) + (1 - labels) * negative


def large_loss_share(epoch: int | Int[Array, ""], per_epoch: float) -> Float[Array, ""]:
    """`share` of `large_loss` in an epoch: per_epoch (epoch - 1), cut to [0, 1].

    The published delta_rel is in percent: delta_rel = 0.2 is per_epoch = 0.002.
    """
    return jnp.clip(per_epoch * (jnp.asarray(epoch) - 1), 0.0, 1.0)


def large_loss(
    logits: Float[Array, "batch labels"],
    labels: Float[Array, "batch labels"],
    share: float | Float[Array, ""],
    mask: Bool[Array, " batch"],
    gather: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "batch labels"]:
    """Large-loss rejection (LL-R): `bce` without the negatives of the largest losses.

    Of the N entries (positive or not) in the valid rows of the global batch,
    k = ceil(share N) negatives are rejected: those whose loss is at least the k-th
    largest among the negatives.  Ties with the k-th are all rejected, whatever their
    order; with fewer than k negatives, all are.  The threshold carries no gradient.

    Args:
        logits: [B, L], of this device.
        labels: [B, L], in [0, 1]; a negative is an entry of exactly 0.
        share: in [0, 1]; may be traced.  `large_loss_share` is the published schedule.
        mask: [B], valid rows.  The others are not counted, and their losses mean
            nothing: reduce with `total`.
        gather: from this device's [B, L] to the values of all devices in any shape;
            over a mapped axis `lambda x: jax.lax.all_gather(x, axis)`.

    Returns:
        Element-wise loss, [B, L]; exactly 0 where rejected.

    References:
        Kim et al. 2022, Large loss matters in weakly supervised multi-label
        classification; the k of its published code.
    """
    losses, negative = bce(logits, labels), labels == 0
    # Below every loss: first the entries that count but stay, then those that do not.
    entries = jnp.where(negative, losses, -1.0)
    entries = jnp.where(mask[:, None], entries, -jnp.inf)
    ranked = gather(jax.lax.stop_gradient(entries)).ravel()
    ranked = jnp.sort(ranked, descending=True)
    count = jnp.sum(ranked > -jnp.inf)
    # A hair less, lest the rounding of .3 * 10 makes it 4.
    k = jnp.ceil(jnp.clip(share, 0.0, 1.0) * count * (1 - 1e-6)).astype(int)
    threshold = jnp.where(k > 0, ranked[jnp.maximum(k - 1, 0)], jnp.inf)
    return jnp.where(negative & (losses >= threshold), 0.0, losses)


def forward(
    logits: Float[Array, "*shape"],
    labels: Float[Array, "*shape"],
    r0: float | Float[Array, "*#shape"],
    r1: float | Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """Forward correction: `bce` of the noisy label's probability under the model.

        -y log q - (1 - y) log(1 - q),   q = r0 (1 - p) + (1 - r1) p

    Its expectation over the noise is least where p is the probability of the clean
    label.  At r0 = r1 = 0 it is `bce`.  The rates are constants: no gradient flows
    into them.

    Args:
        logits: any shape.
        labels: same shape, in [0, 1]; noisy.
        r0: P(0 -> 1), a scalar, or an array that broadcasts (per label: [1, L]).
        r1: P(1 -> 0), likewise.

    Returns:
        Element-wise loss, same shape.

    Raises:
        ValueError: rates given as numbers that are not in [0, 1], or 1 - r0 - r1 <= 0
            (at 0 the labels say nothing, below it they say the opposite).  Arrays are
            not checked.

    References:
        Patrini et al. 2017, Making deep neural networks robust to label noise: a loss
        correction approach; here one 2 x 2 matrix per label.
    """
    known = [r for r in (r0, r1) if isinstance(r, numbers.Real)]
    if not all(0 <= r <= 1 for r in known) or sum(known) >= 1:
        raise ValueError(
            f"noise rates r0={r0}, r1={r1} must lie in [0, 1], with 1 - r0 - r1 > 0"
        )
    r0, r1 = (jax.lax.stop_gradient(jnp.asarray(r, logits.dtype)) for r in (r0, r1))
    log_p, log_1mp = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    # A rate of 0 gives log 0 = -inf, which logaddexp takes, gradient included.
    log_q = jnp.logaddexp(jnp.log1p(-r1) + log_p, jnp.log(r0) + log_1mp)
    log_1mq = jnp.logaddexp(jnp.log(r1) + log_p, jnp.log1p(-r0) + log_1mp)
    return -labels * log_q - (1 - labels) * log_1mq


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
