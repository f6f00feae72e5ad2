"""MPVAE: a variational autoencoder over labels with a multivariate probit likelihood.

Bai, Kong and Gomes, "Disentangled Variational Autoencoder based Multi-label
Classification with Covariance-Aware Multivariate Probit Model", IJCAI 2020, with the
architecture of the authors' code (github.com/JunwenBai/MPVAE).

Two encoders share a latent space; what is decoded from each is scored against y:

    q(z | x, y) = N(m_y, s_y^2),  p(z | x) = N(m_x, s_x^2)
    mu_b = head_b(decoder(x, z_b)),  z_b = m_b + s_b eps,  b in {y, x}, one eps for both
    P(y | mu) = E_w prod_l Phi((2 y_l - 1) (mu_l + B_l . w)),  w ~ N(0, I)
    loss = a (nll_y + nll_x) + c (rank_y + rank_x) + beta KL(q || p)

Shapes: N rows of the batch, S tokens, F features, L labels, D latent width, Z factors
of the covariance I + B B^T, W samples of w.

Where this differs from the code: the W samples of w are shared by the rows of a batch
(theirs are drawn for each row, for L Z W multiplications more), Phi is not clipped to
[5e-7, 1 - 5e-7], the KL has no 1e-6 in its denominator, and in evaluation z is m_x (the
code draws one z) and the expectation over w is exact.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8, UInt32

from cbmlc_jax.models.layers import Dropout
from cbmlc_jax.models.outputs import Outputs

# Hidden widths, the same for every data set of the paper.
_FEATURE_ENCODER = (256, 512, 256)
_LABEL_ENCODER = (512, 256)
_DECODER = (256, 512)
# Steepness of the ranking loss.
_STEEPNESS = 5.0
# Below it the slope of log Phi is taken from the asymptotic series.
_TAIL = -10.0
_LOG_SQRT_2PI = 0.9189385332046727

_Layer = tuple[Array, Array]


@jax.custom_jvp
def log_normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log Phi(x), finite with a finite and correct slope for |x| <= 1e15.

    The slope is phi(x) / Phi(x).  Taken as exp(log phi - log Phi), as
    jax.scipy.special.log_ndtr does, it drowns in rounding where both are large (at
    x = -1e4 it is 2981 instead of 10000); there it is the series, with t = -x,
    t + 1/t - 2/t^3 + 10/t^5 - 74/t^7 (relative error below 1e-7 for t >= 10).
    """
    return jax.scipy.special.log_ndtr(x)


@log_normal_cdf.defjvp
def _log_normal_cdf_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    value = jax.scipy.special.log_ndtr(x)
    tail = x < _TAIL
    t = -jnp.minimum(x, _TAIL)
    u = 1 / t**2
    series = t * (1 + u * (1 - u * (2 - u * (10 - 74 * u))))
    centre = jnp.where(tail, 0, -x * x / 2 - _LOG_SQRT_2PI - value)
    return value, jnp.where(tail, series, jnp.exp(centre)) * dx


def row_normals(
    key: Key[Array, ""], rows: UInt32[Array, " batch"], width: int
) -> Float[Array, "batch width"]:
    """Standard normal draws; row n depends on key and rows[n] alone.

    Args:
        key: a typed threefry key.
        rows: [N] row numbers of the global batch.
        width: D.
    """

    def draw(row):
        return jax.random.normal(jax.random.fold_in(key, row), (width,))

    return jax.vmap(draw)(rows)


def gaussian_kl(
    mean_q: Float[Array, "batch latent"],
    log_var_q: Float[Array, "batch latent"],
    mean_p: Float[Array, "batch latent"],
    log_var_p: Float[Array, "batch latent"],
) -> Float[Array, " batch"]:
    """KL(q || p) of diagonal Gaussians, [N].

    sum_d (log v_p - log v_q - 1 + v_q / v_p + (m_p - m_q)^2 / v_p) / 2
    """
    ratio = log_var_q - log_var_p
    distance = (mean_p - mean_q) ** 2 * jnp.exp(-log_var_p)
    return 0.5 * jnp.sum(jnp.exp(ratio) - 1 - ratio + distance, axis=-1)


def probit_losses(
    mu: Float[Array, "batch labels"],
    shifts: Float[Array, "samples labels"],
    labels: Float[Array, "batch labels"],
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Negative log likelihood and ranking loss of each row.

        nll  = -log mean_w prod_l Phi((2 y_l - 1) (mu_l + shift_wl))
        rank = mean_w sum_{i: y_i = 1, j: y_j = 0} exp(-5 (p_wi - p_wj)) / (5 n+ n-)

    with p_wl = Phi(mu_l + shift_wl).  The double sum is a product of two sums.  rank
    is 0 in rows with no or with all positives.

    Args:
        mu: [N, L].
        shifts: [W, L], B w for samples w.
        labels: [N, L] of 0 and 1.
    """
    sign = 2 * labels - 1
    log_right = log_normal_cdf(sign[None] * (mu[None] + shifts[:, None]))  # [W, N, L]
    num_samples, num_labels = shifts.shape
    joint = jax.nn.logsumexp(log_right.sum(-1), axis=0)
    nll = jnp.log(jnp.float32(num_samples)) - joint
    # Of the true side: p for a positive, 1 - p for a negative, so that one exp serves
    # both and exp(5 p_j) = e^5 exp(-5 (1 - p_j)).
    penalty = jnp.exp(-_STEEPNESS * jnp.exp(log_right))
    positive = jnp.einsum("wnl,nl->wn", penalty, labels)
    negative = jnp.einsum("wnl,nl->wn", penalty, 1 - labels)
    count = labels.sum(-1)
    pairs = jnp.maximum(count * (num_labels - count), 1)
    scale = jnp.exp(_STEEPNESS) / (_STEEPNESS * pairs)
    return nll, scale * jnp.mean(positive * negative, axis=0)


def marginal_logits(
    mu: Float[Array, "batch labels"], factor: Float[Array, "labels factors"]
) -> Float[Array, "batch labels"]:
    """log p - log(1 - p) of p_l = E_w Phi(mu_l + B_l . w), exactly.

    A standard normal u and B_l . w add up to a normal of variance 1 + |B_l|^2, so
    p_l = P(u <= mu_l + B_l . w) = Phi(mu_l / sqrt(1 + |B_l|^2)): the limit of
    infinitely many of the samples that the authors' code averages.

    Args:
        mu: [N, L].
        factor: [L, Z], B.
    """
    x = mu / jnp.sqrt(1 + jnp.sum(factor**2, axis=-1))[None]
    return log_normal_cdf(x) - log_normal_cdf(-x)


def _sum_rows(
    inputs: dict[str, Array], table: Float[Array, "features width"]
) -> Float[Array, "batch width"]:
    """x @ table; of tokens without the [N, F] matrix of their counts or weights."""
    if "features" in inputs:
        return inputs["features"] @ table
    tokens = inputs["tokens"]
    chosen = table[jnp.maximum(tokens - 1, 0)]
    if "weights" in inputs:
        chosen *= inputs["weights"][..., None]
    return jnp.sum(jnp.where((tokens > 0)[..., None], chosen, 0), axis=1)


def _affine(x: Float[Array, "batch in"], layer: _Layer) -> Float[Array, "batch out"]:
    kernel, bias = layer
    return x @ kernel + bias[None]


class MPVAE(nn.Module):
    """See the module's docstring.

    Kernels and B start as Glorot uniform, biases at 0.  Dropout stands behind the
    hidden layers of the encoders; the decoder has none.  Its hidden layers are shared
    by the branches, its last layer is not (in the code; the paper draws one decoder).

    Attributes:
        num_features: F; ids are 1..F, 0 is padding.  Of sets, as in the paper; an id
            that repeats counts each time.
        num_labels: L.
        latent_width: D.
        num_factors: Z; None is L, as in the authors' scripts.
        num_samples: W in training (theirs: 100; 5 on delicious).
        dropout: rate.
        nll_weight, rank_weight, kl_weight: a, c and beta of the loss.
    """

    num_features: int
    num_labels: int
    latent_width: int = 50
    num_factors: int | None = None
    num_samples: int = 100
    dropout: float = 0.5
    nll_weight: float = 10.0
    rank_weight: float = 0.1
    kl_weight: float = 1.1

    def setup(self):
        # Here, not where they are used: evaluation alone does not touch the label
        # branch, and `init` has no labels.
        features, labels, latent = self.num_features, self.num_labels, self.latent_width
        self.feature_encoder = self._stack("feature", features, *_FEATURE_ENCODER)
        self.feature_mean = self._layer("feature_mean", _FEATURE_ENCODER[-1], latent)
        self.feature_log_var = self._layer(
            "feature_log_var", _FEATURE_ENCODER[-1], latent
        )
        self.label_encoder = self._stack("label", features + labels, *_LABEL_ENCODER)
        self.label_mean = self._layer("label_mean", _LABEL_ENCODER[-1], latent)
        self.label_log_var = self._layer("label_log_var", _LABEL_ENCODER[-1], latent)
        self.decoder = self._stack("decoder", features + latent, *_DECODER)
        self.feature_head = self._layer("feature_head", _DECODER[-1], labels)
        self.label_head = self._layer("label_head", _DECODER[-1], labels)
        factors = labels if self.num_factors is None else self.num_factors
        glorot = nn.initializers.glorot_uniform()
        self.factor = self.param("factor", glorot, (labels, factors))
        self.feature_dropout = [Dropout(self.dropout) for _ in _FEATURE_ENCODER]
        self.label_dropout = [Dropout(self.dropout) for _ in _LABEL_ENCODER]

    def _layer(self, name: str, width_in: int, width_out: int) -> _Layer:
        glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros_init()
        return (
            self.param(f"{name}_kernel", glorot, (width_in, width_out)),
            self.param(f"{name}_bias", zeros, (width_out,)),
        )

    def _stack(self, name: str, *widths: int) -> list[_Layer]:
        pairs = zip(widths[:-1], widths[1:], strict=True)
        return [self._layer(f"{name}_{i}", a, b) for i, (a, b) in enumerate(pairs)]

    def _encode_features(
        self, inputs: dict[str, Array], rows: UInt32[Array, " batch"] | None
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        """m_x and log s_x^2."""
        (kernel, bias), *rest = self.feature_encoder
        hidden = _sum_rows(inputs, kernel) + bias[None]
        hidden = self.feature_dropout[0](jax.nn.relu(hidden), rows)
        for layer, dropout in zip(rest, self.feature_dropout[1:], strict=True):
            hidden = dropout(jax.nn.relu(_affine(hidden, layer)), rows)
        return _affine(hidden, self.feature_mean), _affine(hidden, self.feature_log_var)

    def _encode_labels(
        self,
        inputs: dict[str, Array],
        labels: Float[Array, "batch labels"],
        rows: UInt32[Array, " batch"],
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        """m_y and log s_y^2 from x and y."""
        (kernel, bias), *rest = self.label_encoder
        of_features, of_labels = (
            kernel[: self.num_features],
            kernel[self.num_features :],
        )
        hidden = _sum_rows(inputs, of_features) + labels @ of_labels + bias[None]
        hidden = self.label_dropout[0](jax.nn.relu(hidden), rows)
        for layer, dropout in zip(rest, self.label_dropout[1:], strict=True):
            hidden = dropout(jax.nn.relu(_affine(hidden, layer)), rows)
        return _affine(hidden, self.label_mean), _affine(hidden, self.label_log_var)

    def _decode(
        self,
        of_tokens: Float[Array, "batch hidden"],
        z: Float[Array, "batch latent"],
        head: _Layer,
    ) -> Float[Array, "batch labels"]:
        """mu from z and the tokens' share of the first layer, the same in both."""
        (kernel, bias), *rest = self.decoder
        hidden = of_tokens + z @ kernel[self.num_features :] + bias[None]
        for layer in rest:
            hidden = _affine(jax.nn.relu(hidden), layer)
        return _affine(jax.nn.relu(hidden), head)

    def __call__(
        self,
        inputs: dict[str, Array],
        graph: Array | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        labels: UInt8[Array, "batch labels"] | None = None,
    ) -> Outputs:
        """Scores the labels by the feature branch; with labels, also the loss.

        Random draws come from the stream "sample" (and "dropout"), keyed by the row
        number where they differ between rows.

        Args:
            inputs: `tokens` int32 [N, S] and perhaps `weights`, or `features` [N, F].
            graph: not read.
            rows: [N] row numbers of the global batch; None for evaluation.
            labels: [N, L]; with them z is drawn, without them it is m_x.

        Raises:
            ValueError: labels without rows.
        """
        mean, log_var = self._encode_features(inputs, rows)
        of_tokens = _sum_rows(inputs, self.decoder[0][0][: self.num_features])
        if labels is None:
            mu = self._decode(of_tokens, mean, self.feature_head)
            return Outputs(marginal_logits(mu, self.factor))
        if rows is None:
            raise ValueError("MPVAE draws samples by row: labels need rows")
        labels = labels.astype(mean.dtype)
        label_mean, label_log_var = self._encode_labels(inputs, labels, rows)
        noise = row_normals(self.make_rng("sample"), rows, self.latent_width)
        noise = noise.astype(mean.dtype)

        def decode(mean, log_var, head):
            return self._decode(of_tokens, mean + jnp.exp(log_var / 2) * noise, head)

        mu = decode(mean, log_var, self.feature_head)
        label_mu = decode(label_mean, label_log_var, self.label_head)
        shape = (self.num_samples, self.factor.shape[1])
        samples = jax.random.normal(self.make_rng("sample"), shape, mean.dtype)
        shifts = samples @ self.factor.T
        nll, rank = probit_losses(mu, shifts, labels)
        label_nll, label_rank = probit_losses(label_mu, shifts, labels)
        kl = gaussian_kl(label_mean, label_log_var, mean, log_var)
        loss = self.nll_weight * (label_nll + nll) + self.kl_weight * kl
        loss = loss + self.rank_weight * (label_rank + rank)
        return Outputs(marginal_logits(mu, self.factor), loss=loss)
