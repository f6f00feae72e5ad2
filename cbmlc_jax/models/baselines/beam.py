"""Beam search over sets of labels written as sequences, and scores from its beam.

Pure functions of a step function: they know no network.

Shapes: B rows, L labels, C = L + 1 classes (class L is EOS), T steps, K hypotheses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Beams, LogProbs = Int[Array, "batch beam steps"], Float[Array, "batch beam"]

# The part of a score that is left to the labels that no hypothesis contains.
_TAIL = 1e-4


def contained(
    sequences: Int[Array, "*batch steps"], num_labels: int
) -> Bool[Array, "*batch labels"]:
    """Whether the label stands in the sequence: [..., T] -> [..., L]."""
    labels = jnp.arange(num_labels).reshape((1,) * sequences.ndim + (-1,))
    return (sequences[..., None] == labels).any(-2)


def lengths(sequences: Int[Array, "*batch steps"], eos: int) -> Int[Array, "*batch"]:
    """Classes up to and with the first EOS."""
    return (sequences != eos).sum(-1) + 1


def beam_search(
    step_fn: Callable[[Any, Array], tuple[Array, Any]],
    state: Any,
    batch: int,
    num_labels: int,
    width: int,
    max_steps: int,
) -> tuple[Beams, LogProbs]:
    """Searches for the most probable sequences without a repeated label.

    A step extends the live hypotheses by every class and keeps the best K - f
    extensions by log probability, where f hypotheses have ended with EOS and keep
    their places (as the authors' code, which allows repetitions).  The last step
    offers EOS alone.  What is not allowed is left out without renormalising the rest.

    Args:
        step_fn: (state, last class [B, K]) -> log probabilities [B, K, C], next state.
            Before the first step, the last class is EOS.
        state: a tree of arrays [B, K, ...]; at the start the same for all K.
        batch, num_labels, width, max_steps: B, L, K, T.

    Returns:
        sequences [B, K, T], EOS to the end, and log probabilities [B, K], -inf where
        there are fewer than K sequences; in no particular order.
    """
    eos = num_labels
    is_eos = jnp.arange(num_labels + 1).reshape(1, 1, -1) == eos
    pick = jax.vmap(lambda leaf, index: leaf[index])

    def alive(carry):
        step, _, log_probs, ended, _ = carry
        return (step < max_steps) & (~ended & (log_probs > -jnp.inf)).any()

    def extend(carry):
        step, sequences, log_probs, ended, state = carry
        # In the first step this reads a place not yet written: EOS.
        extensions, state = step_fn(state, sequences[:, :, jnp.maximum(step - 1, 0)])
        ended = ended[..., None]
        taken = jnp.pad(contained(sequences, num_labels), ((0, 0), (0, 0), (0, 1)))
        allowed = is_eos | (~taken & ~ended & (step < max_steps - 1))
        totals = log_probs[..., None] + jnp.where(ended, 0.0, extensions)
        totals = jnp.where(allowed, totals, -jnp.inf)
        # +inf: what has ended is never displaced.
        priority = jnp.where(ended & is_eos, jnp.inf, totals).reshape(batch, -1)
        chosen = jax.lax.top_k(priority, width)[1]
        parent, last = chosen // (num_labels + 1), chosen % (num_labels + 1)
        sequences = pick(sequences, parent).at[:, :, step].set(last)
        log_probs = pick(totals.reshape(batch, -1), chosen)
        state = jax.tree.map(lambda leaf: pick(leaf, parent), state)
        # A place that holds no sequence must not be kept as one that has ended.
        ended = (last == eos) & (log_probs > -jnp.inf)
        return step + 1, sequences, log_probs, ended, state

    sequences = jnp.full((batch, width, max_steps), eos, jnp.int32)
    # The hypotheses start the same: only the first one counts.
    log_probs = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)[None]
    log_probs = jnp.broadcast_to(log_probs, (batch, width))
    ended = jnp.zeros((batch, width), bool)
    start = (jnp.int32(0), sequences, log_probs, ended, state)
    _, sequences, log_probs, _, _ = jax.lax.while_loop(alive, extend, start)
    return jnp.where(log_probs[..., None] > -jnp.inf, sequences, eos), log_probs


def best_sequence(sequences: Beams, log_probs: LogProbs, eos: int) -> Array:
    """argmax of log probability / length, in which EOS counts; [B, T]."""
    best = (log_probs / lengths(sequences, eos)).argmax(1)
    return jnp.take_along_axis(sequences, best[:, None, None], axis=1)[:, 0]


def beam_scores(sequences: Beams, log_probs: LogProbs, tail: Array) -> Array:
    """The labels' marginals, as if the K sequences were all there are; [B, L].

        q_k = softmax_k(log P_k),    m_l = sum_k q_k [l in k]
        score_l = delta tail_l + [l in any k] (delta + (1 - 2 delta) m_l)

    with delta = 1e-4 and tail [B, L] in [0, 1]: labels outside of the beam stay below
    those within, in the order of `tail`, which also breaks ties within.  Without it
    nearly all scores would be 0, and a ranking metric an accident of their order.
    """
    inside = contained(sequences, tail.shape[1])
    marginals = (jax.nn.softmax(log_probs)[..., None] * inside).sum(1)
    offset = _TAIL + (1 - 2 * _TAIL) * marginals
    return _TAIL * tail + jnp.where(inside.any(1), offset, 0)
