"""A linear classifier on an encoder's pooled output: the usual image baseline.

logits = max over positions (encoder(x)) W + b
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, UInt8, UInt32

from cbmlc_jax.models.baselines.ml_gcn import masked_max
from cbmlc_jax.models.outputs import Outputs


class PooledLinear(nn.Module):
    """See the module's docstring.

    Attributes:
        encoder: (inputs, rows) -> memory [B, S, d], valid [B, S].
        num_labels: L.
    """

    encoder: nn.Module
    num_labels: int

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        graph: Array | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        labels: UInt8[Array, "batch labels"] | None = None,
    ) -> Outputs:
        """Scores the labels of a batch; graph and labels are not read.

        Args:
            inputs: what the encoder reads, see `encoders`.
            graph: not read.
            rows: [B] row numbers of the global batch; None for evaluation.
            labels: not read; the loss is that of config.loss.
        """
        pooled = masked_max(*self.encoder(inputs, rows))
        return Outputs(nn.Dense(self.num_labels, name="readout")(pooled))
