"""CbMLC's label graph over the scores of other models."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from cbmlc_jax.models import decoder
from cbmlc_jax.models.neighbours import Neighbours
from cbmlc_jax.models.outputs import Outputs

LEAST = 1e-3  # no score is nearer to 0 or 1


class Stack(nn.Module):
    """A label node starts at its word vector and what M models say of its label.

    With s_blm the score of label l by model m for row b, z = log(s / (1 - s)), and
    a_bl = [z_bl1, s_bl1, z_bl2, ...]:

        v^0_bl  = LN(e_l P + a_bl A)                      then the decoder's messages
        logit_bl = sum_m g_m z_blm + W_l . v_bl

    between the labels alone: the models have read the input.  At the start g_m = 1 / M
    and W = 0, so that training begins with the mean of the models' logits.

    Attributes:
        decoder: a `LabelGraphDecoder`.
    """

    decoder: decoder.LabelGraphDecoder

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
            inputs: `scores` [B, L, M] of models that did not see the rows' labels.
            graph: see `LabelGraphDecoder`.
            rows: [B] row numbers of the global batch for dropout; None for none.
            labels: not read.
        """
        logits = scores_to_logits(inputs["scores"])
        width, models = self.decoder.width, logits.shape[-1]
        normal = nn.initializers.normal(0.3)
        read = self.param("read", normal, (2 * models, width))
        said = jnp.concatenate([logits, jax.nn.sigmoid(logits)], axis=-1)
        _, states = self.decoder(None, None, graph, rows, told=said @ read)
        shape = (self.decoder.num_labels, width)
        weights = self.param("readout", nn.initializers.zeros, shape)
        share = self.param("share", nn.initializers.constant(1 / models), (models,))
        return Outputs(logits @ share + decoder.readout(states[-1], weights))


def scores_to_logits(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(s / (1 - s)) with s cut to [LEAST, 1 - LEAST]."""
    s = jnp.clip(scores, LEAST, 1 - LEAST)
    return jnp.log(s) - jnp.log1p(-s)
