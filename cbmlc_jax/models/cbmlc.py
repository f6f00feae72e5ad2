"""CbMLC: an encoder, the label-graph decoder and the readout (paper section 4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8, UInt32

from cbmlc_jax.models import decoder
from cbmlc_jax.models.outputs import Outputs


class CbMLC(nn.Module):
    """Composition of encoder and decoder.

    Attributes:
        encoder: (inputs, rows) -> memory, valid.
        decoder: a `LabelGraphDecoder`.
        tied: the readout weights are the initial label nodes instead of their own.
        intermediate: also return the intermediate predictions.
    """

    encoder: nn.Module
    decoder: decoder.LabelGraphDecoder
    tied: bool = False
    intermediate: bool = True

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        graph: Bool[Array, "labels labels"] | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        labels: UInt8[Array, "batch labels"] | None = None,
    ) -> Outputs:
        """Scores the labels of a batch.

        Args:
            inputs: what the encoder reads, see `encoders`.
            graph: [L, L] label graph, None is complete.
            rows: [B] row numbers of the global batch for dropout; None for none.
            labels: not read; models with an objective of their own take them here.
        """
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
        return Outputs(decoder.readout(states[-1], weights), intermediate)
