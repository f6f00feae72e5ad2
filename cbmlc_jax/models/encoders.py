"""Encoders f: x -> memory Z [B, S, d] and the mask of its valid positions [B, S]."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from cbmlc_jax.models.layers import MessageBlock


class TokenEncoder(nn.Module):
    """A transformer over tokens, a set or a sequence; memory = all tokens.

    Attributes:
        num_tokens: F; ids are 1..F, 0 is padding, whose embedding is 0.
        width: d.
        num_blocks: post-LayerNorm blocks of self-attention and FFN.
        num_heads, ffn_width, dropout: as `MessageBlock`.
        self_attention: False reproduces LaMP's published encoder, FFNs alone.
        embedding_std: of the token embeddings at the start.
        positions: add sinusoidal positions: the tokens are a sequence.
    """

    num_tokens: int
    width: int
    num_blocks: int
    num_heads: int
    ffn_width: int
    dropout: float = 0.0
    self_attention: bool = True
    embedding_std: float = 1.0
    positions: bool = False

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
        if self.positions:
            z += sinusoids(tokens.shape[1], self.width)[None] * valid[..., None]
        for i in range(self.num_blocks):
            z = MessageBlock(
                self.num_heads,
                self.ffn_width,
                self.dropout,
                attention=self.self_attention,
                name=f"block_{i}",
            )(z, z, valid[:, None, None, :], rows)
        return z, valid


def sinusoids(length: int, width: int) -> Float[Array, "length width"]:
    """sin(s / 10000^(2j/d)) in column 2j, the cosine in column 2j + 1; s from 0.

    Vaswani et al. 2017, Attention is all you need.
    """
    column = jnp.arange(width)
    angle = jnp.arange(length)[:, None] / 10000.0 ** (
        (column - column % 2)[None] / width
    )
    return jnp.where((column % 2 == 1)[None], jnp.cos(angle), jnp.sin(angle))
