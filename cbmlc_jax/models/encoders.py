"""Encoders f: x -> memory Z [B, S, d] and the mask of its valid positions [B, S].

x is a batch's dict of input arrays: `tokens` (with or without `weights`), `features`
or `images`; an encoder reads the one that it is for.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, UInt32

from cbmlc_jax.models.layers import Dropout, MessageBlock


class TokenEncoder(nn.Module):
    """A transformer over tokens, a set or a sequence; memory = all tokens.

    A token of weight w starts at its embedding times w / rms(w), the root mean square
    over the row: weights of any scale (tf-idf) act by their proportions, and without
    weights each token counts 1.

    Attributes:
        num_tokens: F; ids are 1..F, 0 is padding, whose embedding is 0.
        width: d.
        num_blocks: post-LayerNorm blocks of self-attention and FFN.
        num_heads, ffn_width, dropout: as `MessageBlock`.
        self_attention: False reproduces LaMP's published encoder, FFNs alone.
        embedding_std: of the token embeddings at the start.
        positions: add sinusoidal positions: the tokens are a sequence.
        dtype: of the operands of matrix products or None, see `ops`.
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
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        rows: UInt32[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Bool[Array, "batch tokens"]]:
        """Encodes.

        Args:
            inputs: `tokens` int32 [B, S] ids, 0 is padding; may hold `weights` [B, S].
            rows: see `layers`.
        """
        tokens = inputs["tokens"]
        table = self.param(
            "embedding",
            nn.initializers.normal(self.embedding_std),
            (self.num_tokens, self.width),
        )
        valid = tokens > 0
        z = jnp.where(valid[..., None], table[jnp.maximum(tokens - 1, 0)], 0)
        if "weights" in inputs:
            z *= relative(inputs["weights"], valid)[..., None]
        if self.positions:
            z += sinusoids(tokens.shape[1], self.width)[None] * valid[..., None]
        for i in range(self.num_blocks):
            z = MessageBlock(
                self.num_heads,
                self.ffn_width,
                self.dropout,
                attention=self.self_attention,
                dtype=self.dtype,
                name=f"block_{i}",
            )(z, z, valid[:, None, None, :], rows)
        return z, valid


class DenseEncoder(nn.Module):
    """An MLP over real-valued features; memory = its output, one vector a row.

    z = (x - mean) / scale, num_layers times z <- dropout(relu(z W + b)), then z W + b.

    Attributes:
        width: d, of every layer.
        num_layers: hidden layers; 0 leaves the linear map.
        mean, scale: float32 [F] of the training rows, scale > 0.  Constants, but among
            the parameters, so that a checkpoint holds them; see `models.CONSTANT`.
        dropout: rate after each hidden layer.
    """

    width: int
    num_layers: int
    mean: np.ndarray
    scale: np.ndarray
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        rows: UInt32[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch 1 width"], Bool[Array, "batch 1"]]:
        """Encodes.

        Args:
            inputs: `features` float32 [B, F].
            rows: see `layers`.
        """
        z = inputs["features"]
        mean = self.param("feature_mean", lambda _: jnp.asarray(self.mean))
        scale = self.param("feature_scale", lambda _: jnp.asarray(self.scale))
        mean, scale = jax.lax.stop_gradient((mean, scale))
        z = (z - mean.astype(z.dtype)[None]) / scale.astype(z.dtype)[None]
        for i in range(self.num_layers):
            z = nn.relu(nn.Dense(self.width, name=f"layer_{i}")(z))
            z = Dropout(self.dropout, name=f"dropout_{i}")(z, rows)
        z = nn.Dense(self.width, name="map")(z)
        return z[:, None], jnp.ones((z.shape[0], 1), bool)


class ImageEncoder(nn.Module):
    """An image network; memory = its pooled output, one vector a row.

    Attributes:
        backbone: a `ResNet` or `EfficientNetLite`, from the first layer on or from the
            cut at which its features were computed beforehand.
        width: d of a linear map after it, with a bias; None leaves the output as it is.
    """

    backbone: nn.Module
    width: int | None

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        rows: UInt32[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch 1 width"], Bool[Array, "batch 1"]]:
        """Encodes.

        Args:
            inputs: `images` uint8 [B, height, width, 3], or the `features` at the cut.
            rows: [B] in training, None in evaluation: batch normalisation then uses its
                running averages.
        """
        x = inputs["images"] if "images" in inputs else inputs["features"]
        z = self.backbone(x, train=rows is not None)
        if self.width is not None:
            z = nn.Dense(self.width, name="map")(z)
        return z[:, None], jnp.ones((z.shape[0], 1), bool)


def relative(
    weights: Float[Array, "batch tokens"], valid: Bool[Array, "batch tokens"]
) -> Float[Array, "batch tokens"]:
    """Weights over their root mean square in the row; 0 in a row of zeros."""
    count = jnp.maximum(valid.sum(1, keepdims=True), 1)
    square = jnp.sum(jnp.where(valid, weights, 0) ** 2, 1, keepdims=True) / count
    return weights * jnp.where(square > 0, jnp.where(square > 0, square, 1) ** -0.5, 0)


def sinusoids(length: int, width: int) -> Float[Array, "length width"]:
    """sin(s / 10000^(2j/d)) in column 2j, the cosine in column 2j + 1; s from 0.

    Vaswani et al. 2017, Attention is all you need.
    """
    column = jnp.arange(width)
    angle = jnp.arange(length)[:, None] / 10000.0 ** (
        (column - column % 2)[None] / width
    )
    return jnp.where((column % 2 == 1)[None], jnp.cos(angle), jnp.sin(angle))
