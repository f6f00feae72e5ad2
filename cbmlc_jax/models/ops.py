"""The costly operations of the layers, with derivatives written out by hand.

They compute what their equations say; each has a test against plain autodiff.  By hand
because that decides what is stored for the backward pass, how the operands of the
products lie in memory, and how often an array of the size of the activations is read.

Shapes: B rows, N queries, S keys, H heads, K width of a head, d model width.

`dtype` is that to which the operands of the matrix products are rounded: jnp.bfloat16,
which a CPU multiplies at twice the speed or more and sums in float32, or None, which
leaves them as they are.  Everything else is computed as it comes, in float32.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, DTypeLike, Float, UInt32

_GOLDEN = 0x9E3779B9
# Queries and keys of attention are padded to a multiple of this: products of 159 labels
# take XLA:CPU a third longer than of 160.
LANES = 16
# Of the counters of attention's dropout, see `pair_strides`.
QUERY_STRIDE = 2**15
# Of sums that are written as products: a GPU would round their factors to 10 bits.
_EXACT = jax.lax.Precision.HIGHEST


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
    words: UInt32[Array, " 2"],
    rows: UInt32[Array, " batch"],
    shape: tuple[int, ...],
    rate: float,
    strides: tuple[int, ...] | None = None,
    start: UInt32[Array, ""] | None = None,
) -> Bool[Array, "batch ..."]:
    """True with probability 1 - rate; entry [b, ...] depends on words and rows[b].

    Args:
        words: of a key.
        rows: [B] row numbers of the global batch.
        shape: of the mask, with B first.
        rate: probability of False, in [0, 1).
        strides: of the counters of the axes after B; default: those of `shape`, so
            that no two entries of a row share one.
        start: counter of the first entry, for a part of a larger mask; default 0.
    """
    if strides is None:
        strides = tuple(_prod(shape[i + 1 :]) for i in range(1, len(shape)))
    counter = jnp.zeros((1, *shape[1:]), jnp.uint32)
    if start is not None:
        counter += start
    for axis, stride in enumerate(strides, 1):
        position = jax.lax.broadcasted_iota(jnp.uint32, counter.shape, axis)
        counter = counter + position * jnp.uint32(stride % 2**32)
    return kept(words, rows, counter, rate)


def kept(
    words: UInt32[Array, " 2"],
    rows: UInt32[Array, " batch"],
    counter: UInt32[Array, "..."],
    rate: float,
    axis: int = 0,
) -> Bool[Array, "..."]:
    """As `keep_mask`, of given counters that are 1 long where the batch belongs."""
    row_word = _hash(rows.astype(jnp.uint32), words[0], words[1])
    row_word = jnp.expand_dims(row_word, [i for i in range(counter.ndim) if i != axis])
    bits = _hash(counter * jnp.uint32(_GOLDEN), row_word ^ words[1], words[0])
    return bits >= jnp.uint32(min(int(rate * 2**32), 2**32 - 1))


def _prod(sizes: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, sizes, 1)


def pair_strides(heads: int) -> tuple[int, int, int]:
    """Strides of `keep_mask` for attention weights [B, H, N, S].

    No length is in them: a pair's draw is the same however far its row is padded.  No
    two pairs of a row share a counter up to 2^15 keys and 2^17 / H queries.
    """
    return 2**32 // heads, QUERY_STRIDE, 1


_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """What is traced inside has no hint for this machine's compiler: jax.export refuses
    layout constraints, whose form in StableHLO may change."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def _laid_out(x: Array, dtype: DTypeLike | None) -> Array:
    """x, for a product in dtype with its last axis contiguous in memory.

    XLA:CPU has bfloat16 products for such operands alone, and would rather turn a
    transposition into a layout.
    """
    if dtype is None or jax.default_backend() != "cpu" or _PORTABLE.get():
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def product(x: Array, y: Array, dtype: DTypeLike | None, *, turn: str = "") -> Array:
    """x @ y over the last two axes; `turn` names operands to be transposed first."""
    x, y = rounded(x, dtype), rounded(y, dtype)
    x = jnp.swapaxes(x, -1, -2) if "x" in turn else x
    y = jnp.swapaxes(y, -1, -2) if "y" in turn else y
    batch = tuple(range(x.ndim - 2))
    product = jax.lax.dot_general(
        _laid_out(x, dtype),
        _laid_out(y, dtype),
        (((x.ndim - 1,), (y.ndim - 2,)), (batch, batch)),
        preferred_element_type=None if dtype is None else jnp.float32,
    )
    return _laid_out(product, dtype)


def rounded(x: Array, dtype: DTypeLike | None) -> Array:
    """x in the type of the products; None: as it is."""
    return x if dtype is None else x.astype(dtype)


# Where several operations read an array that is costly to compute: left alone, XLA:CPU
# fuses the whole computation into each of them.
stored = jax.lax.optimization_barrier


def _column_sum(x: Float[Array, "... width"]) -> Float[Array, " width"]:
    """Sums over all axes but the last, as a product: XLA:CPU reduces slowly."""
    x = x.reshape(-1, x.shape[-1])
    return jnp.matmul(jnp.ones((1, len(x)), x.dtype), x, precision=_EXACT)[0]


def row_sum(
    x: Float[Array, "... width"], weights: Float[Array, " width"] | None = None
) -> Float[Array, "... 1"]:
    """Sums over the last axis, weighted or not, as a product: XLA:CPU reduces the axis
    that is contiguous slowly."""
    if weights is None:
        weights = jnp.ones(x.shape[-1], x.dtype)
    return jnp.matmul(x, weights[:, None], precision=_EXACT)


def computed_row_sum(x: Float[Array, "... width"]) -> Float[Array, "... 1"]:
    """`row_sum` of an x that nothing else reads, which is then never stored whole."""
    return row_sum(stored(_folded(x, -1)))


def _folded(x: Array, axis: int) -> Array:
    """An axis shortened to the sum of its quarters (thirds, ...), where it has such."""
    size = x.shape[axis]
    parts = next((n for n in (4, 3, 5, 2) if size % n == 0), 1)
    return sum(jnp.split(x, parts, axis))


def row_max(x: Float[Array, "... width"]) -> Float[Array, "... 1"]:
    """The largest of the last axis, in two steps: XLA:CPU reduces by lanes quickly."""
    lanes = x.reshape(*x.shape[:-1], -1, LANES)
    return jnp.max(stored(jnp.max(lanes, -2)), -1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat(x: Float[Array, "..."], times: int) -> Float[Array, "times ..."]:
    """x, `times` times along a new first axis."""
    return jnp.broadcast_to(x[None], (times, *x.shape))


def _repeat_backward(times, _, g):
    return (_column_sum(g.reshape(times, -1)).reshape(g.shape[1:]),)


repeat.defvjp(lambda x, times: (repeat(x, times), None), _repeat_backward)


@jax.custom_vjp
def row_products(
    x: Float[Array, "batch nodes width"], w: Float[Array, "nodes width"]
) -> Float[Array, "batch nodes"]:
    """sum_k x_bnk w_nk."""
    return computed_row_sum(x * w[None])[..., 0]


def _row_products_backward(saved, g):
    x, w = saved
    terms = (g[..., None] * x).reshape(len(x), -1)
    dw = _column_sum(stored(_folded(terms, 0))).reshape(w.shape)
    return g[..., None] * w[None], dw


row_products.defvjp(lambda x, w: (row_products(x, w), (x, w)), _row_products_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "... width"], w: Float[Array, "width out"], dtype: DTypeLike | None
) -> Float[Array, "... out"]:
    """x W.

    Args:
        x: [..., d].
        w: [d, out].
        dtype: see the module.
    """
    return _linear_forward(x, w, dtype)[0]


def _linear_forward(x, w, dtype):
    flat = rounded(x.reshape(-1, x.shape[-1]), dtype)
    y = product(flat, w, dtype)
    return y.reshape(*x.shape[:-1], -1), (flat, w)


def _linear_backward(dtype, saved, g):
    x, w = saved
    flat = rounded(g.reshape(-1, g.shape[-1]), dtype)
    dx = product(flat, w, dtype, turn="y").reshape(*g.shape[:-1], -1)
    if w.shape[0] <= w.shape[1]:
        return dx, product(x, flat, dtype, turn="x")
    return dx, product(flat, x, dtype, turn="x").T  # turns the narrower of the two


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def add_bias(
    x: Float[Array, "... width"], b: Float[Array, " width"]
) -> Float[Array, "... width"]:
    """x + b; x is [..., d], b [d]."""
    return x + b.reshape((1,) * (x.ndim - 1) + (-1,))


add_bias.defvjp(lambda x, b: (add_bias(x, b), None), lambda _, g: (g, _column_sum(g)))


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "... width"],
    scale: Float[Array, " width"],
    bias: Float[Array, " width"],
) -> Float[Array, "... width"]:
    """(x - mean) / sqrt(var + 1e-5) * scale + bias over the last axis.

    Ba et al. 2016, Layer normalization; the variance is biased.
    """
    return _norm_forward(x, scale, bias)[0]


def _norm_forward(x, scale, bias):
    x = stored(x)
    wide = (1,) * (x.ndim - 1) + (-1,)
    mean = row_sum(x) / x.shape[-1]
    variance = computed_row_sum(jnp.square(x - mean)) / x.shape[-1]
    inverse = jax.lax.rsqrt(variance + 1e-5)
    y = (x - mean) * inverse * scale.reshape(wide) + bias.reshape(wide)
    return stored(y), (x, mean, inverse, scale)


def _norm_backward(saved, g):
    x, mean, inverse, scale = saved
    # With h = g scale: dx = inverse (h - mean(h) - unit mean(h unit)).  Both means are
    # products with scale: one array of the size of x is written besides dx, g unit.
    g = stored(g)
    unit = (x - mean) * inverse
    turned = stored(g * unit)
    along = row_sum(turned, scale) / x.shape[-1]
    level = row_sum(g, scale) / x.shape[-1]
    scaled = g * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    dx = inverse * (scaled - level - unit * along)
    return stored(dx), _column_sum(turned), _column_sum(g)


layer_norm.defvjp(_norm_forward, _norm_backward)
