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
from jaxtyping import Array, Bool, Float, Key, UInt32

# A large negative logit instead of -inf: a row whose keys are all masked stays finite.
_MASKED = -1e9
_GOLDEN = 0x9E3779B9


def _hash(counter: Array, first: Array, second: Array) -> Array:
    """Mixes uint32 counters with a 64-bit key: a multiply-xorshift hash.

    Constants of Wellons' lowbias32.  Far cheaper than threefry on a CPU, where the
    masks of one step hold 10^7 elements; good enough for dropout, for nothing else.
    """
    x = counter ^ first
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x ^ second
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(
    key: Key[Array, ""], rows: UInt32[Array, " batch"], shape: tuple[int, ...], rate
) -> Bool[Array, "batch ..."]:
    """True with probability 1 - rate; entry [b, ...] depends on key and rows[b].

    Args:
        key: a typed threefry key.
        rows: [B] row numbers of the global batch.
        shape: of the mask, with B first.
        rate: probability of False, in [0, 1).
    """
    words = jax.random.key_data(key)
    row_word = _hash(rows.astype(jnp.uint32), words[0], words[1])
    row_word = row_word.reshape((-1,) + (1,) * (len(shape) - 1))
    counter = jnp.zeros((1, *shape[1:]), jnp.uint32)
    stride = 1
    for axis in range(len(shape) - 1, 0, -1):
        position = jax.lax.broadcasted_iota(jnp.uint32, counter.shape, axis)
        counter = counter + position * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _hash(counter * jnp.uint32(_GOLDEN), row_word ^ words[1], words[0])
    return bits >= jnp.uint32(min(int(rate * 2**32), 2**32 - 1))


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
        keep = keep_mask(self.make_rng("dropout"), rows, x.shape, self.rate)
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
    """

    num_heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "*batch queries width"],
        memory: Float[Array, "batch keys width"],
        mask: Bool[Array, "..."] | None,
        rows: UInt32[Array, " batch"] | None,
    ) -> Float[Array, "batch queries width"]:
        """Attends.

        Args:
            queries: [B, N, d], or [N, d] where they are the same for every row: they
                are then projected once.
            memory: [B, S, d].
            mask: broadcastable to [B, H, N, S]; True where attention is allowed.
            rows: see the module's docstring.
        """
        width = memory.shape[-1]
        head = width // self.num_heads
        qkv_init = nn.initializers.normal((2 / (width + head)) ** 0.5)
        out_init = nn.initializers.normal((1 / width) ** 0.5)
        qkv_shape = (width, self.num_heads, head)
        wq = self.param("query", qkv_init, qkv_shape)
        wk = self.param("key", qkv_init, qkv_shape)
        wv = self.param("value", qkv_init, qkv_shape)
        wo = self.param("out", out_init, (self.num_heads, head, width))

        b = "b" if queries.ndim == 3 else ""
        q = jnp.einsum(f"{b}nd,dhk->{b}hnk", queries, wq * head**-0.5)
        k = jnp.einsum("bsd,dhk->bhsk", memory, wk)
        v = jnp.einsum("bsd,dhk->bhsk", memory, wv)
        logits = jnp.einsum(f"{b}hnk,bhsk->bhns", q, k)
        if mask is not None:
            logits = jnp.where(mask, logits, _MASKED)
        weights = jax.nn.softmax(logits, axis=-1)
        weights = Dropout(self.dropout, name="weights_dropout")(weights, rows)
        mixed = jnp.einsum("bhns,bhsk->bhnk", weights, v)
        return jnp.einsum("bhnk,hkd->bnd", mixed, wo)


class FeedForward(nn.Module):
    """relu(x W1 + b1) W2 + b2.

    Attributes:
        width: of the hidden layer.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """x: [..., d]."""
        d = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        w1 = self.param("w1", _torch_linear, (d, self.width))
        b1 = self.param("b1", zeros, (self.width,))
        w2 = self.param("w2", _torch_linear, (self.width, d))
        b2 = self.param("b2", zeros, (d,))
        return jax.nn.relu(x @ w1 + b1.reshape((1,) * (x.ndim - 1) + (-1,))) @ w2 + (
            b2.reshape((1,) * (x.ndim - 1) + (-1,))
        )


class MessageBlock(nn.Module):
    """x <- LN(x + attention(x, memory)), then x <- LN(x + FFN(x)).

    After every sub-layer: dropout, residual, LayerNorm (eps 1e-5).

    Attributes:
        num_heads, ffn_width, dropout: sizes and rate.
        attention: False leaves only the FFN (LaMP's encoder as published).
    """

    num_heads: int
    ffn_width: int
    dropout: float = 0.0
    attention: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch nodes width"],
        memory: Float[Array, "batch keys width"],
        mask: Bool[Array, "..."] | None,
        rows: UInt32[Array, " batch"] | None,
    ) -> Float[Array, "batch nodes width"]:
        """x: [B, N, d] or [N, d]; the others as `Attention`."""
        if self.attention:
            messages = Attention(self.num_heads, self.dropout, name="attention")(
                x, memory, mask, rows
            )
            messages = Dropout(self.dropout, name="attention_dropout")(messages, rows)
            x = jnp.broadcast_to(x, messages.shape)
            x = nn.LayerNorm(epsilon=1e-5, name="attention_norm")(x + messages)
        update = FeedForward(self.ffn_width, name="ffn")(x)
        update = Dropout(self.dropout, name="ffn_dropout")(update, rows)
        return nn.LayerNorm(epsilon=1e-5, name="ffn_norm")(x + update)
