"""Encoders f: x -> memory Z [B, S, d] and the mask of its valid positions [B, S]."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from cbmlc_jax.models.layers import MessageBlock


class SetEncoder(nn.Module):
    """A transformer over a set of tokens: no positions, memory = all tokens.

    Attributes:
        num_tokens: F; ids are 1..F, 0 is padding, whose embedding is 0.
        width: d.
        num_blocks: post-LayerNorm blocks of self-attention and FFN.
        num_heads, ffn_width, dropout: as `MessageBlock`.
        self_attention: False reproduces LaMP's published encoder, FFNs alone.
        embedding_std: of the token embeddings at the start.
    """

    num_tokens: int
    width: int
    num_blocks: int
    num_heads: int
    ffn_width: int
    dropout: float = 0.0
    self_attention: bool = True
    embedding_std: float = 1.0

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        rows: UInt32[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Bool[Array, "batch tokens"]]:
        """tokens: [B, S] ids, 0 is padding; rows: see `layers`."""
        table = self.param(
            "embedding",
            nn.initializers.normal(self.embedding_std),
            (self.num_tokens, self.width),
        )
        valid = tokens > 0
        z = jnp.where(valid[..., None], table[jnp.maximum(tokens - 1, 0)], 0)
        for i in range(self.num_blocks):
            z = MessageBlock(
                self.num_heads,
                self.ffn_width,
                self.dropout,
                attention=self.self_attention,
                name=f"block_{i}",
            )(z, z, valid[:, None, None, :], rows)
        return z, valid
