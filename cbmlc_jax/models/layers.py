"""Layers that the encoder and the decoder share.

Shapes: B rows of the batch, N queries, S keys, H heads, d model width, K = d / H.
Dropout is given `rows`, the row numbers of the global batch, or None for none: its
masks are a function of the step's key and of the row, so that they are the same on
one device and on eight.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, UInt32

from cbmlc_jax.models import ops
from cbmlc_jax.models.attention import attend
from cbmlc_jax.models.neighbours import Neighbours


class Dropout(nn.Module):
    """Sets entries to 0 with probability `rate` and scales the others up.

    Attributes:
        rate: in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, rows: UInt32[Array, " batch"] | None) -> Array:
        """x: [B, ...]; rows: [B], or None to leave x as it is."""
        if rows is None or not self.rate:
            return x
        words = jax.random.key_data(self.make_rng("dropout"))
        keep = ops.keep_mask(words, rows, x.shape, self.rate)
        return jnp.where(keep, x / (1 - self.rate), 0)


def _torch_linear(key, shape, dtype=jnp.float32):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as the published code's linear layers."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Attention(nn.Module):
    """Multi-head attention: concat_h softmax(Q_h K_h^T / sqrt(K)) V_h, then O.

    No biases.  Q, K, V ~ N(0, 2 / (d + K)) and O ~ N(0, 2 / (d + d)), as LaMP.

    Attributes:
        num_heads: H.
        dropout: rate on the attention weights.
        dtype: of the operands of matrix products or None, see `ops`.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "*batch queries width"],
        memory: Float[Array, "batch keys width"],
        mask: Bool[Array, "..."] | Neighbours | None,
        rows: UInt32[Array, " batch"] | None,
    ) -> Float[Array, "batch queries width"]:
        """Attends.

        Args:
            queries: [B, N, d], or [N, d] where they are the same for every row: they
                are then projected once.
            memory: [B, S, d].
            mask: as `attend`.
            rows: see the module's docstring.
        """
        width = memory.shape[-1]
        head = width // self.num_heads
        qkv_init = nn.initializers.normal((2 / (width + head)) ** 0.5)
        out_init = nn.initializers.normal((1 / width) ** 0.5)
        qkv_shape = (width, self.num_heads, head)
        wq = self.param("query", qkv_init, qkv_shape) * head**-0.5
        wk = self.param("key", qkv_init, qkv_shape)
        wv = self.param("value", qkv_init, qkv_shape)
        wo = self.param("out", out_init, (self.num_heads, head, width))

        q = self._project(queries, wq)
        k, v = self._project(memory, wk), self._project(memory, wv)
        if queries.ndim == 2:
            q = ops.repeat(q, memory.shape[0])
        words = None
        if rows is not None and self.dropout:
            words = jax.random.key_data(self.make_rng("dropout"))
        mixed = attend(
            q,
            k,
            v,
            mask,
            words=words,
            rows=rows,
            rate=self.dropout,
            dtype=self.dtype,
        )
        mixed = mixed.reshape(*mixed.shape[:2], width)
        return ops.linear(mixed, wo.reshape(width, width), self.dtype)

    def _project(self, x: Array, w: Float[Array, "width heads head"]) -> Array:
        """x W, [..., H, K]."""
        y = ops.linear(x, w.reshape(len(w), -1), self.dtype)
        return y.reshape(*x.shape[:-1], *w.shape[1:])


class FeedForward(nn.Module):
    """relu(x W1 + b1) W2 + b2.

    Attributes:
        width: of the hidden layer.
        dtype: of the operands of matrix products or None, see `ops`.
    """

    width: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """x: [..., d]."""
        d = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        w1 = self.param("w1", _torch_linear, (d, self.width))
        b1 = self.param("b1", zeros, (self.width,))
        w2 = self.param("w2", _torch_linear, (self.width, d))
        b2 = self.param("b2", zeros, (d,))
        hidden = jax.nn.relu(ops.add_bias(ops.linear(x, w1, self.dtype), b1))
        return ops.add_bias(ops.linear(hidden, w2, self.dtype), b2)


class LayerNorm(nn.Module):
    """`ops.layer_norm` with its parameters, 1 and 0 at the start."""

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """x: [..., d]."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        return ops.layer_norm(x, scale, bias)


class MessageBlock(nn.Module):
    """x <- LN(x + attention(x, memory)), then x <- LN(x + FFN(x)).

    After every sub-layer: dropout, residual, LayerNorm (eps 1e-5).

    Attributes:
        num_heads, ffn_width, dropout: sizes and rate.
        attention: False leaves only the FFN (LaMP's encoder as published).
        dtype: of the operands of matrix products or None, see `ops`.
    """

    num_heads: int
    ffn_width: int
    dropout: float = 0.0
    attention: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch nodes width"],
        memory: Float[Array, "batch keys width"],
        mask: Bool[Array, "..."] | Neighbours | None,
        rows: UInt32[Array, " batch"] | None,
    ) -> Float[Array, "batch nodes width"]:
        """x: [B, N, d] or [N, d]; the others as `Attention`."""
        if self.attention:
            messages = Attention(
                self.num_heads, self.dropout, self.dtype, name="attention"
            )(x, memory, mask, rows)
            messages = Dropout(self.dropout, name="attention_dropout")(messages, rows)
            if x.ndim == 2:
                x = ops.repeat(x, messages.shape[0])
            x = LayerNorm(name="attention_norm")(x + messages)
        update = FeedForward(self.ffn_width, self.dtype, name="ffn")(x)
        update = Dropout(self.dropout, name="ffn_dropout")(update, rows)
        return LayerNorm(name="ffn_norm")(x + update)
