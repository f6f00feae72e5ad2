"""CbMLC: an encoder, the label-graph decoder and the readout (paper section 4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from cbmlc_jax.models import decoder, ops
from cbmlc_jax.models.encoders import relative
from cbmlc_jax.models.neighbours import Neighbours
from cbmlc_jax.models.outputs import Outputs


class CbMLC(nn.Module):
    """Composition of encoder and decoder.

    Attributes:
        encoder: (inputs, rows) -> memory, valid.
        decoder: a `LabelGraphDecoder`.
        tied: the readout weights are the initial label nodes instead of their own.
        token_dropout: share of a row's tokens that training leaves out, at random.
        linear: F, to add a `LinearPath` to the last logits; None for the paper's model.
        intermediate: also return the intermediate predictions.
    """

    encoder: nn.Module
    decoder: decoder.LabelGraphDecoder
    tied: bool = False
    token_dropout: float = 0.0
    linear: int | None = None
    intermediate: bool = True

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        graph: Bool[Array, "labels labels"] | Neighbours | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        labels: UInt8[Array, "batch labels"] | None = None,
    ) -> Outputs:
        """Scores the labels of a batch.

        Args:
            inputs: what the encoder reads, see `encoders`.
            graph: see `LabelGraphDecoder`.
            rows: [B] row numbers of the global batch for dropout; None for none.
            labels: not read; models with an objective of their own take them here.
        """
        rate = self.token_dropout if rows is not None else 0.0
        if rate:
            words = jax.random.key_data(self.make_rng("dropout"))
            keep = ops.keep_mask(words, rows, inputs["tokens"].shape, rate)
            inputs = inputs | {"tokens": jnp.where(keep, inputs["tokens"], 0)}
        memory, valid = self.encoder(inputs, rows)
        initial, states = self.decoder(memory, valid, graph, rows)
        if self.tied:
            weights = initial
        else:
            xavier = nn.initializers.xavier_normal()
            shape = (self.decoder.num_labels, self.decoder.width)
            weights = self.param("readout", xavier, shape)
        intermediate = None
        if self.intermediate:
            held = jax.lax.stop_gradient(weights)
            intermediate = jnp.stack([decoder.readout(v, held) for v in states[:-1]])
        logits = decoder.readout(states[-1], weights)
        if self.linear is not None:
            path = LinearPath(self.linear, self.decoder.num_labels, name="linear_path")
            logits += path(inputs)
        return Outputs(logits, intermediate)


class LinearPath(nn.Module):
    """A linear classifier of the bag of tokens: b_l + sum_s w_s A[token_s, l].

    w_s is the token's weight, 1 without weights, over the row's Euclidean norm, so that
    long rows do not speak louder.  A and b start at 0, where the model is the one
    without this path.

    Attributes:
        num_tokens: F; ids are 1..F, 0 is padding.
        num_labels: L.
    """

    num_tokens: int
    num_labels: int

    @nn.compact
    def __call__(self, inputs: dict[str, Array]) -> Float[Array, "batch labels"]:
        """Maps `tokens` int32 [B, S], with `weights` [B, S] or without, to [B, L]."""
        tokens, zeros = inputs["tokens"], nn.initializers.zeros
        table = self.param("tokens", zeros, (self.num_tokens, self.num_labels))
        bias = self.param("bias", zeros, (self.num_labels,))
        valid = tokens > 0
        given = inputs.get("weights", jnp.ones(tokens.shape, table.dtype))
        count = jnp.maximum(valid.sum(1, keepdims=True), 1)
        weights = valid * relative(given, valid) * count**-0.5
        rows = table[jnp.maximum(tokens - 1, 0)]
        return jnp.einsum("bs,bsl->bl", weights, rows) + bias[None]
