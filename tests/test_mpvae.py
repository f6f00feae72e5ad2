"""MPVAE: its integrals against quadrature, its objective against a direct rewriting."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from jax.test_util import check_grads

from cbmlc_jax import rngs
from cbmlc_jax.models.baselines import mpvae


def inverse_mills(x: np.ndarray) -> np.ndarray:
    """phi(x) / Phi(x) in float64, from the scaled complementary error function."""
    return np.sqrt(2 / np.pi) / scipy.special.erfcx(-np.asarray(x) / np.sqrt(2))


def test_log_normal_cdf_and_its_slope():
    x = np.concatenate([np.linspace(-40, 6, 461), [-1e15, -1e6, -1e4, -1e3, 1e4, 1e15]])
    both = jax.jit(jax.vmap(jax.value_and_grad(mpvae.log_normal_cdf)))
    value, slope = both(jnp.float32(x))
    exact = np.float64(np.float32(x))
    np.testing.assert_allclose(value, scipy.special.log_ndtr(exact), 1e-5, 1e-6)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(slope, inverse_mills(exact), 2e-5, 1e-8)
    with jax.enable_x64(True):
        at = jnp.array([-30.0, -10.0001, -9.9999, -1.0, 2.0])
        check_grads(mpvae.log_normal_cdf, (at,), 1, ["fwd", "rev"], rtol=1e-6)


MU = np.array([[0.7, -0.4], [-1.5, 0.2], [0.3, 2.0]])
LABELS = np.array([[1, 0], [1, 1], [0, 0]])
FACTOR = np.array([[0.9, -0.5], [0.4, 1.3]])


def probit_losses(*arrays):
    """In float32, compiled."""
    return jax.jit(mpvae.probit_losses)(*(np.float32(a) for a in arrays))


def quasi_samples(side: int) -> np.ndarray:
    """[side^2, 2]: quantiles of the normal, equally spaced in probability."""
    points = scipy.special.ndtri((np.arange(side) + 0.5) / side)
    return np.stack([a.ravel() for a in np.meshgrid(points, points)], 1)


def hermite(function, points: int = 60) -> np.ndarray:
    """E function(w), w ~ N(0, I_2), by a Gauss-Hermite rule in each dimension."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()
    return sum(
        a * b * function(np.array([u, v]))
        for u, a in zip(nodes, weights, strict=True)
        for v, b in zip(nodes, weights, strict=True)
    )


def test_nll_is_the_probit_integral():
    """By quadrature, and as the orthant of a bivariate normal, I + B B^T."""
    sign = 2 * LABELS - 1
    expected = -np.log(
        hermite(lambda w: scipy.special.ndtr(sign * (MU + FACTOR @ w)).prod(1))
    )
    covariance = np.eye(2) + FACTOR @ FACTOR.T
    orthants = [
        scipy.stats.multivariate_normal.cdf(s * m, cov=covariance * np.outer(s, s))
        for s, m in zip(sign, MU, strict=True)
    ]
    np.testing.assert_allclose(expected, -np.log(orthants), rtol=1e-4)
    nll, _ = probit_losses(MU, quasi_samples(300) @ FACTOR.T, LABELS)
    np.testing.assert_allclose(nll, expected, rtol=1e-3)


def test_marginals_are_the_probit_integral():
    expected = hermite(lambda w: scipy.special.ndtr(MU + FACTOR @ w))
    logits = mpvae.marginal_logits(jnp.float32(MU), jnp.float32(FACTOR))
    np.testing.assert_allclose(jax.nn.sigmoid(logits), expected, rtol=1e-5)


def direct_losses(mu, shifts, labels) -> tuple[np.ndarray, np.ndarray]:
    """The authors' formulae (their clipping left out), every pair by itself."""
    nll, rank = np.zeros(len(mu)), np.zeros(len(mu))
    for row, y in enumerate(labels):
        p = scipy.special.ndtr(mu[row] + shifts)
        likelihoods = np.where(y == 1, p, scipy.special.ndtr(-mu[row] - shifts))
        nll[row] = -np.log(likelihoods.prod(1).mean())
        positives, negatives = np.flatnonzero(y), np.flatnonzero(1 - y)
        for i in positives:
            for j in negatives:
                pair = np.exp(-5 * (p[:, i] - p[:, j])).mean()
                rank[row] += pair / (5 * len(positives) * len(negatives))
    return nll, rank


def test_losses_equal_the_explicit_loops():
    rng = np.random.default_rng(0)
    mu, shifts = 2 * rng.normal(size=(6, 5)), rng.normal(size=(7, 5))
    labels = (rng.random((6, 5)) < 0.5).astype(int)
    labels[0], labels[1] = 0, 1
    nll, rank = probit_losses(mu, shifts, labels)
    expected = direct_losses(mu, shifts, labels)
    np.testing.assert_allclose(nll, expected[0], rtol=1e-5)
    np.testing.assert_allclose(rank, expected[1], rtol=1e-5)
    assert not rank[:2].any() and (rank[2:] > 0.01).all()


@pytest.mark.parametrize("size", [1e4, 1e15])
def test_losses_and_logits_are_finite_at_any_mean(size):
    """On the wrong side the slope of -log Phi(x) is -x; on the right side it is 0."""
    labels = jnp.float32([[1, 0], [0, 1], [1, 1], [0, 0]])
    mu = jnp.full((4, 2), -size).at[:, 1].set(size)
    shifts = jnp.float32([[0.5, -0.5], [0.0, 1.0]])

    @jax.jit
    def values_and_slopes(mu):
        nll, rank = mpvae.probit_losses(mu, shifts, labels)
        logits = mpvae.marginal_logits(mu, jnp.float32(FACTOR))
        return (nll.sum(), rank.sum(), logits.sum()), logits

    slopes, logits = jax.jit(jax.jacrev(values_and_slopes, has_aux=True))(mu)
    values, _ = values_and_slopes(mu)
    assert np.isfinite(values).all() and np.isfinite(logits).all()
    assert np.isfinite(slopes).all()
    wrong = np.array([[-1, 1], [0, 0], [-1, 0], [0, 1]])
    np.testing.assert_allclose(slopes[0], size * wrong, rtol=1e-4)


def test_kl_by_hand_and_by_monte_carlo():
    """N(1, 1) from N(0, 4): (log 4 - 1 + 1/4 + 1/4) / 2."""
    hand = mpvae.gaussian_kl(
        jnp.ones((1, 1)),
        jnp.zeros((1, 1)),
        jnp.zeros((1, 1)),
        jnp.full((1, 1), np.log(4)),
    )
    assert float(hand[0]) == pytest.approx((np.log(4) - 0.5) / 2, rel=1e-6)
    rng = np.random.default_rng(0)
    m_q, v_q, m_p, v_p = rng.normal(size=(4, 1, 3))
    q = scipy.stats.norm(m_q, np.exp(v_q / 2))
    p = scipy.stats.norm(m_p, np.exp(v_p / 2))
    z = q.rvs((200_000, 3), random_state=rng)
    ratios = (q.logpdf(z) - p.logpdf(z)).sum(1)
    error = ratios.std() / len(ratios) ** 0.5
    got = mpvae.gaussian_kl(*(jnp.float32(a) for a in (m_q, v_q, m_p, v_p)))
    assert abs(float(got[0]) - ratios.mean()) < 4 * error < 0.02 * got[0]
    same = mpvae.gaussian_kl(*(jnp.float32(a) for a in (m_q, v_q, m_q, v_q)))
    assert float(same[0]) == pytest.approx(0, abs=1e-6)


def test_draws_follow_the_key_and_the_row():
    key, rows = rngs.stream(0, "sample", 1), jnp.arange(400, dtype=jnp.uint32)
    row_normals = jax.jit(mpvae.row_normals, static_argnums=2)
    draws = np.asarray(row_normals(key, rows, 50))
    picked = np.array([7, 399, 0])
    np.testing.assert_array_equal(row_normals(key, rows[picked], 50), draws[picked])
    other = np.asarray(row_normals(rngs.stream(0, "sample", 2), rows, 50))
    assert abs(np.mean(draws * other)) < 5 / draws.size**0.5
    assert abs(np.mean(draws[1:] * draws[:-1])) < 5 / draws.size**0.5
    assert abs(np.mean(draws)) < 5 / draws.size**0.5
    assert np.var(draws) == pytest.approx(1, abs=0.05)


FEATURES, NUM_LABELS = 9, 4


@functools.cache
def small(**changes):
    """A small model, its parameters (biases moved from 0), its jitted apply."""
    settings = {"latent_width": 3, "num_samples": 6, "num_factors": 2, "dropout": 0.2}
    settings |= changes
    model = mpvae.MPVAE(FEATURES, NUM_LABELS, **settings)
    inputs = {"tokens": jnp.ones((1, 2), jnp.int32)}
    params = jax.jit(model.init)(rngs.stream(0, "params"), inputs)["params"]
    params = jax.tree.map(lambda x: x + 0.01 * (x.ndim == 1), params)

    @jax.jit
    def apply(params, tokens, rows, labels, key):
        return model.apply(
            {"params": params},
            {"tokens": tokens},
            None,
            rows,
            labels,
            rngs={"sample": key, "dropout": key},
        )

    return model, params, apply


def small_batch(size: int = 4):
    rng = np.random.default_rng(3)
    tokens = np.array([rng.permutation(FEATURES)[:5] + 1 for _ in range(size)])
    tokens[1, 2:] = 0
    labels = (rng.random((size, NUM_LABELS)) < 0.5).astype(np.uint8)
    return tokens, np.arange(10, 10 + size, dtype=np.uint32), labels


def test_objective_is_that_of_the_authors_code():
    """Rewritten in numpy with dense inputs and concatenations, same draws."""
    model, params, apply = small(dropout=0.0)
    tokens, rows, labels = small_batch()
    key = rngs.stream(0, "sample")
    out = apply(params, tokens, rows, labels, key)
    bound = model.bind({"params": params}, rngs={"sample": key})
    eps = np.asarray(mpvae.row_normals(bound.make_rng("sample"), rows, 3))
    w = np.asarray(jax.random.normal(bound.make_rng("sample"), (6, 2)))

    params = {k: np.float64(v) for k, v in params.items()}
    x = np.zeros((4, FEATURES))
    for row, ids in enumerate(tokens):
        x[row, ids[ids > 0] - 1] = 1

    def affine(h, name):
        return h @ params[f"{name}_kernel"] + params[f"{name}_bias"]

    def hidden(h, name, layers):
        for i in range(layers):
            h = np.maximum(affine(h, f"{name}_{i}"), 0)
        return h

    h_x = hidden(x, "feature", 3)
    m_x, v_x = affine(h_x, "feature_mean"), affine(h_x, "feature_log_var")
    h_y = hidden(np.concatenate([x, labels], 1), "label", 2)
    m_y, v_y = affine(h_y, "label_mean"), affine(h_y, "label_log_var")

    def mu(z, head):
        return affine(hidden(np.concatenate([x, z], 1), "decoder", 2), head)

    mu_x = mu(m_x + np.exp(v_x / 2) * eps, "feature_head")
    mu_y = mu(m_y + np.exp(v_y / 2) * eps, "label_head")
    shifts = w @ params["factor"].T
    nll_x, rank_x = direct_losses(mu_x, shifts, labels)
    nll_y, rank_y = direct_losses(mu_y, shifts, labels)
    kl = 0.5 * np.sum(
        v_x - v_y - 1 + np.exp(v_y - v_x) + (m_x - m_y) ** 2 / np.exp(v_x), axis=1
    )
    assert (kl > 0.01).all()
    expected = 10 * (nll_y + nll_x) + 0.1 * (rank_y + rank_x) + 1.1 * kl
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)

    spread = np.sqrt(1 + (params["factor"] ** 2).sum(1))
    for got, z in (
        (out.logits, m_x + np.exp(v_x / 2) * eps),
        (apply(params, tokens, None, None, key).logits, m_x),
    ):
        p = scipy.special.ndtr(mu(z, "feature_head") / spread)
        np.testing.assert_allclose(jax.nn.sigmoid(got), p, rtol=1e-5)


def test_loss_of_a_row_is_the_same_wherever_it_stands():
    """Latent draws and dropout by row number: as on one device, so on four."""
    _, params, apply = small()
    tokens, rows, labels = small_batch()
    key = rngs.stream(0, "sample")
    loss = apply(params, tokens, rows, labels, key).loss
    order = np.array([2, 0, 3, 1])
    moved = apply(params, tokens[order], rows[order], labels[order], key).loss
    np.testing.assert_allclose(moved, loss[order], rtol=1e-5)
    renumbered = apply(params, tokens, rows + 1, labels, key).loss
    assert (np.abs(renumbered - loss) > 1e-3).all()


def test_evaluation_is_deterministic_and_ignores_padding():
    model, params, apply = small(dropout=0.0)
    tokens, rows, labels = small_batch()
    key = rngs.stream(0, "sample")
    out = apply(params, tokens, None, None, key)
    assert out.loss is None and np.ptp(out.logits, axis=0).min() > 1e-2
    padded = apply(params, np.pad(tokens, ((0, 0), (2, 3))), None, None, key)
    np.testing.assert_allclose(padded.logits, out.logits, rtol=1e-5)
    with pytest.raises(ValueError, match="labels need rows"):
        model.apply({"params": params}, {"tokens": tokens}, labels=labels)


def test_parameter_count_on_bibtex():
    """1,836 features, 159 labels, as many factors; latent width 50."""
    model = mpvae.MPVAE(1836, 159)
    shapes = jax.eval_shape(
        model.init, rngs.stream(0, "p"), {"tokens": jnp.ones((1, 2), int)}
    )
    feature = 1837 * 256 + 257 * 512 + 513 * 256 + 2 * 257 * 50
    label = (1836 + 159 + 1) * 512 + 513 * 256 + 2 * 257 * 50
    decoder = (1836 + 50 + 1) * 256 + 257 * 512 + 2 * 513 * 159
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == feature + label + decoder + 159 * 159 == 2_740_935


def test_learns_a_separable_problem():
    """Label l holds where token l + 1 is present; the rest of the tokens are noise."""
    rng = np.random.default_rng(0)
    present = rng.random((256, FEATURES)) < 0.35
    tokens = np.where(present, np.arange(1, FEATURES + 1), 0)
    labels = present[:, :NUM_LABELS].astype(np.uint8)
    model, params, apply = small()
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(rngs.stream(1, "sample"), number)
        chosen = jax.random.randint(key, (32,), 0, 192)
        rows = jnp.arange(32, dtype=jnp.uint32)

        def objective(params):
            return model.apply(
                {"params": params},
                {"tokens": jnp.asarray(tokens)[chosen]},
                None,
                rows,
                jnp.asarray(labels)[chosen],
                rngs={"sample": key, "dropout": key},
            ).loss.mean()

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(80):
        params, state = step(params, state, number)
    held, truth = tokens[192:], labels[192:]
    logits = np.asarray(apply(params, held, None, None, rngs.stream(0, "")).logits)
    loss = np.mean(np.logaddexp(0, np.where(truth == 1, -logits, logits)))
    prior = labels[:192].mean(0)
    of_prior = -np.mean(np.where(truth == 1, np.log(prior), np.log(1 - prior)))
    assert loss < 0.3 * of_prior
    assert np.mean((logits > 0) == truth) > 0.97
