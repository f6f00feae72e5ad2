"""Losses: golden values, hand-worked cases, gradients, and finiteness everywhere."""

from __future__ import annotations

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from cbmlc_jax import losses

# Made with PyTorch in float64 by golden/make_cbmlc.py.
GOLDEN = pathlib.Path(__file__).parent / "golden" / "cbmlc.npz"

# (gamma_pos, gamma_neg, margin): the paper's grid, its corners, and a root.
PARAMETERS = [
    (0.0, 0.0, 0.0),
    (1.0, 2.0, 0.05),
    (1.0, 4.0, 0.1),
    (4.0, 1.0, 0.0),
    (0.5, 0.5, 0.05),
    (0.5, 0.5, 0.0),
    (0.0, 0.0, 0.1),
]


def asl_of(parameters, **options):
    """`losses.asl` with its parameters bound."""
    gamma_pos, gamma_neg, margin = parameters
    return functools.partial(
        losses.asl, gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin, **options
    )


@functools.lru_cache
def value_and_slope(parameters, **options):
    """Jitted (logits, labels) -> (losses, d losses / d logits), element by element."""
    loss = losses.bce if parameters is None else asl_of(parameters, **options)

    def both(logits, labels):
        value, pull = jax.vjp(lambda x: loss(x, labels), logits)
        return value, pull(jnp.ones_like(value))[0]

    return jax.jit(both)


def naive_asl(logit: float, y: float, gamma_pos, gamma_neg, margin) -> float:
    """The definition, in Python's doubles; for logits of a moderate size."""
    p = 1 / (1 + math.exp(-logit))
    shifted = max(p - margin, 0.0)
    positive = -y * (1 - p) ** gamma_pos * math.log(p)
    if shifted == 0.0:
        return positive
    return positive - (1 - y) * shifted**gamma_neg * math.log(1 - shifted)


LOGITS = np.linspace(-8, 8, 41)


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_asl_equals_its_definition(parameters, label):
    got = asl_of(parameters)(jnp.float32(LOGITS), jnp.full(41, label, jnp.float32))
    expected = [naive_asl(x, label, *parameters) for x in LOGITS]
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_bce_equals_its_definition(label):
    got = losses.bce(jnp.float32(LOGITS), jnp.full(41, label, jnp.float32))
    expected = [
        -label * math.log(1 / (1 + math.exp(-x)))
        - (1 - label) * math.log(1 / (1 + math.exp(x)))
        for x in LOGITS
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """The golden arrays of the losses, without the `losses/` before their names."""
    with np.load(GOLDEN) as arrays:
        return {
            name.removeprefix("losses/"): arrays[name]
            for name in arrays.files
            if name.startswith("losses/")
        }


def golden_case(golden, case):
    """Golden logits, labels, and the parameters of a case (None for bce)."""
    names = ("gamma_pos", "gamma_neg", "margin")
    parameters = (
        tuple(golden[f"{case}/{n}"].item() for n in names) if case != "bce" else None
    )
    return golden["logits"], golden["labels"], parameters


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("case", ["bce", "asl_0", "asl_1", "asl_2"])
def test_values_and_gradients_equal_pytorch(golden, case, double):
    logits, labels, parameters = golden_case(golden, case)
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        tolerance = {"rtol": 1e-12, "atol": 1e-14}
        if not double:
            tolerance = {"rtol": 2e-5, "atol": 1e-6}
        logits, labels = jnp.asarray(logits, dtype), jnp.asarray(labels, dtype)
        value, slope = value_and_slope(parameters)(logits, labels)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, golden[f"{case}/value"], **tolerance)
        np.testing.assert_allclose(slope, golden[f"{case}/grad"], **tolerance)


def test_gradient_with_held_focus_equals_pytorch(golden):
    logits, labels, parameters = golden_case(golden, "asl_1")
    with jax.enable_x64(True):
        slope = value_and_slope(parameters, stop_focal_gradient=True)(
            jnp.asarray(logits), jnp.asarray(labels, jnp.float64)
        )[1]
        np.testing.assert_allclose(
            slope, golden["asl_1/grad_stop_weight"], rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("norm", losses.CONTEXT_NORMS)
def test_context_penalty_equals_pytorch(golden, norm):
    embeddings, vectors = golden["cb/label_embeddings"], golden["cb/word_vectors"]
    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(losses.context_penalty)(
            jnp.asarray(embeddings), jnp.asarray(vectors), norm
        )
        np.testing.assert_allclose(value, golden[f"cb/{norm}/value"], rtol=1e-12)
        np.testing.assert_allclose(slope, golden[f"cb/{norm}/grad"], rtol=1e-12)


def test_asl_and_context_penalty_by_hand():
    """The arithmetic of the spec's section 3, once by hand.

    logit = log 1.5, so p = 1.5 / 2.5 = .6; gamma_pos = 1, gamma_neg = 2, m = .05.

    positive: (1 - .6)^1 * -log .6         = .4    * .5108256238 = .2043302495
    negative: p_shift = .6 - .05 = .55
              .55^2 * -log(1 - .55)        = .3025 * .7985076962 = .2415485781
    slope of the negative, dp/dlogit = .6 * .4 = .24:
              .24 (2 * .55 * .7985076962 + .3025 / .45)
            = .24 (.8783584658 + .6722222222)                    = .3721393651
    with the focusing weight .3025 held constant:
              .24 * .3025 / .45                                  = .1613333333
    slope of the positive:
              .24 (-.5108256238 - .4 / .6) ... with d(1 - p)/dp = -1:
              d/dp[-(1 - p) log p] = log p - (1 - p) / p
            = .24 (-.5108256238 - .6666666667)                   = -.2825981497
    """
    logits = jnp.full(2, math.log(1.5), jnp.float32)
    labels = jnp.array([1.0, 0.0])
    value, slope = value_and_slope((1.0, 2.0, 0.05))(logits, labels)
    np.testing.assert_allclose(value, [0.2043302495, 0.2415485781], rtol=2e-6)
    np.testing.assert_allclose(slope, [-0.2825981497, 0.3721393651], rtol=2e-6)
    held, slope = value_and_slope((1.0, 2.0, 0.05), stop_focal_gradient=True)(
        logits, labels
    )
    np.testing.assert_array_equal(held, value)
    # Positive: .24 * .4 * -1/.6 = -.16.
    np.testing.assert_allclose(slope, [-0.16, 0.1613333333], rtol=2e-6)

    # E - H = [[1, 2], [0, -2]]: 1 + 4 + 0 + 4 = 9, and its root.
    embeddings = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    vectors = jnp.array([[0.0, 0.0], [0.0, 3.0]])
    assert losses.context_penalty(embeddings, vectors) == 9.0
    assert losses.context_penalty(embeddings, vectors, "squared") == 9.0
    assert losses.context_penalty(embeddings, vectors, "frobenius") == 3.0

    # Total of the paper with lambda = .1: the sum over labels plus .1 * 9.
    asl = losses.total(value[None], jnp.array([True]))
    np.testing.assert_allclose(
        asl + 0.1 * losses.context_penalty(embeddings, vectors), 1.3458788276, rtol=1e-6
    )


def test_asl_without_focus_and_margin_is_bce():
    labels = jnp.float32(np.arange(41) % 3 / 2)
    logits = jnp.float32(LOGITS)
    plain, bce = value_and_slope((0.0, 0.0, 0.0)), value_and_slope(None)
    for got, expected in zip(plain(logits, labels), bce(logits, labels), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_asl_with_equal_gammas_is_the_focal_loss(gamma):
    labels = (np.arange(41) % 2).astype(np.float32)
    p = 1 / (1 + np.exp(-LOGITS))
    p_t = np.where(labels == 1, p, 1 - p)
    focal = -((1 - p_t) ** gamma) * np.log(p_t)
    got = asl_of((gamma, gamma, 0.0))(jnp.float32(LOGITS), labels)
    np.testing.assert_allclose(got, focal, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [0.05, 0.1, 0.5])
def test_easy_negatives_have_no_loss_and_no_gradient(margin, gamma):
    limit = math.log(margin / (1 - margin))
    step = 1e-3 * max(1.0, abs(limit))
    logits = jnp.float32([limit - step, limit - 1.0, -50.0, -1e4, limit + step])
    value, slope = value_and_slope((1.0, gamma, margin))(logits, jnp.zeros(5))
    np.testing.assert_array_equal(value[:4], 0.0)
    np.testing.assert_array_equal(slope[:4], 0.0)
    assert value[4] > 0 and slope[4] > 0


def test_exactly_at_the_margin_there_is_no_loss():
    """p = sigmoid(0) = .5 = m."""
    for gamma in (0.0, 0.5, 2.0):
        value, slope = value_and_slope((1.0, gamma, 0.5))(jnp.zeros(1), jnp.zeros(1))
        assert value[0] == 0 and slope[0] == 0


def test_margin_spares_positives():
    logits, ones = jnp.float32(LOGITS), jnp.ones(41)
    np.testing.assert_array_equal(
        asl_of((1.0, 2.0, 0.1))(logits, ones), asl_of((1.0, 2.0, 0.0))(logits, ones)
    )


def test_log_sigmoid_form_is_exact_in_the_tails():
    """1 - p underflows to 0 at 30; its logarithm must not."""
    logits, labels = jnp.float32([50.0, -50.0, -1e4, 1e4]), jnp.float32([1, 0, 1, 0])
    expected = [math.exp(-50), math.exp(-50), 1e4, 1e4]
    np.testing.assert_allclose(losses.bce(logits, labels), expected, rtol=1e-5)
    for gamma in (0.0, 1.0):
        got = asl_of((gamma, gamma, 0.0))(logits, labels)
        tails = [math.exp(-50 * (1 + gamma))] * 2
        np.testing.assert_allclose(got[:2], tails, rtol=1e-4, atol=1e-37)
        np.testing.assert_allclose(got[2:], expected[2:], rtol=1e-6)
    # With a margin a certain false positive costs (1 - m)^g- * -log m.
    got = asl_of((1.0, 2.0, 0.05))(logits, labels)[3]
    np.testing.assert_allclose(got, 0.95**2 * -math.log(0.05), rtol=1e-5)


@pytest.mark.parametrize(
    "parameters, held",
    [(None, False), *((p, h) for p in PARAMETERS for h in (False, True))],
)
def test_finite_at_extreme_logits(parameters, held):
    options = {"stop_focal_gradient": True} if held else {}
    largest = float(np.finfo(np.float32).max)
    sizes = [1e4, 1e-4, 1e-30, 0.0, 88.0, 104.0, largest, np.log(19.0), np.log(9.0)]
    logits = np.float32([s * x for x in sizes for s in (1, -1)])
    for label in (0.0, 1.0, 0.5):
        labels = jnp.full(len(logits), label, jnp.float32)
        value, slope = value_and_slope(parameters, **options)(logits, labels)
        assert np.isfinite(value).all(), (label, logits[~np.isfinite(value)])
        assert np.isfinite(slope).all(), (label, logits[~np.isfinite(slope)])
        assert (np.asarray(value) >= -1e-6).all()


@pytest.mark.parametrize("parameters", [None, *PARAMETERS])
@given(
    logits=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=8,
        max_size=8,
    ),
    label=st.sampled_from([0.0, 1.0, 0.25]),
)
def test_finite_for_any_finite_logit(parameters, logits, label):
    value, slope = value_and_slope(parameters)(
        np.float32(logits), np.full(8, label, np.float32)
    )
    assert np.isfinite(value).all() and np.isfinite(slope).all()


@pytest.mark.parametrize(
    "parameters", [(0.0, 0.0, 0.0), (1.0, 2.0, 0.05), (4.0, 1.0, 0.1), (0.5, 0.5, 0.0)]
)
def test_asl_gradient_equals_finite_differences(parameters):
    with jax.enable_x64(True):
        # Clear of the margin's kink at log(.05 / .95) = -2.94 and log(1 / 9) = -2.2.
        logits = jnp.array([-4.0, -2.6, -1.0, 0.3, 2.0, 5.0])
        assert logits.dtype == jnp.float64
        for labels in (jnp.zeros(6), jnp.ones(6), jnp.full(6, 0.3)):
            loss = functools.partial(asl_of(parameters), labels=labels)
            check_grads(loss, (logits,), order=1, modes=("fwd", "rev"))
            check_grads(lambda x, y=labels: losses.bce(x, y), (logits,), order=2)


@pytest.mark.parametrize("norm", losses.CONTEXT_NORMS)
def test_context_penalty_gradient_equals_finite_differences(norm):
    with jax.enable_x64(True):
        embeddings = jnp.array([[0.2, -1.0, 3.0], [1.5, 0.0, -0.7]])
        vectors = jnp.array([[0.0, 0.5, 1.0], [-1.0, 0.1, 0.4]])
        penalty = functools.partial(
            losses.context_penalty, word_vectors=vectors, norm=norm
        )
        check_grads(penalty, (embeddings,), order=2)


@pytest.mark.parametrize("parameters", [(1.0, 2.0, 0.05), (2.0, 4.0, 0.0)])
def test_held_focus_changes_the_gradient_and_not_the_value(parameters):
    logits = jnp.float32([-1.0, 0.5, 1.0, 2.0])
    for label in (0.0, 1.0):
        labels = jnp.full(4, label)
        value, slope = value_and_slope(parameters)(logits, labels)
        held, held_slope = value_and_slope(parameters, stop_focal_gradient=True)(
            logits, labels
        )
        np.testing.assert_array_equal(value, held)
        assert (np.abs(slope - held_slope) > 1e-3).all()
        # Held: weight times the slope of the logarithm.
        p = 1 / (1 + np.exp(-np.float64(logits)))
        gamma_pos, gamma_neg, m = parameters
        if label:
            expected = -((1 - p) ** gamma_pos) * (1 - p)
        else:
            expected = (p - m) ** gamma_neg * p * (1 - p) / (1 - p + m)
        np.testing.assert_allclose(held_slope, expected, rtol=1e-5)


@pytest.mark.parametrize("parameters", [None, (1.0, 2.0, 0.05)])
def test_losses_are_linear_in_soft_labels(parameters):
    loss = losses.bce if parameters is None else asl_of(parameters)
    logits = jnp.float32(LOGITS)
    off, on = loss(logits, jnp.zeros(41)), loss(logits, jnp.ones(41))
    np.testing.assert_allclose(
        loss(logits, jnp.full(41, 0.3)), 0.3 * on + 0.7 * off, rtol=1e-5
    )


@pytest.mark.parametrize("norm", losses.CONTEXT_NORMS)
def test_context_penalty_at_its_minimum(norm):
    vectors = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    value, slope = jax.value_and_grad(losses.context_penalty)(vectors, vectors, norm)
    assert value == 0.0
    np.testing.assert_array_equal(slope, np.zeros((2, 2)))


@pytest.mark.parametrize("norm", losses.CONTEXT_NORMS)
def test_word_vectors_are_constants(norm):
    embeddings, vectors = jnp.ones((2, 3)), jnp.zeros((2, 3))
    into_e, into_h = jax.grad(losses.context_penalty, argnums=(0, 1))(
        embeddings, vectors, norm
    )
    np.testing.assert_array_equal(into_h, np.zeros((2, 3)))
    # 2 (E - H), or (E - H) / ||E - H||.
    expected = 2.0 if norm == "squared" else 1 / math.sqrt(6)
    np.testing.assert_allclose(into_e, np.full((2, 3), expected), rtol=1e-6)


def test_context_penalty_names_an_unknown_norm():
    with pytest.raises(ValueError, match="'l1'.*squared"):
        losses.context_penalty(jnp.ones((1, 2)), jnp.ones((1, 2)), "l1")


def test_total_sums_the_rows_under_the_mask():
    values = jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    assert losses.total(values, jnp.array([True, False, True])) == 303.0
    assert losses.total(values, jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize("huge", [1e4, 3e38, np.inf, np.nan])
def test_masked_rows_give_neither_value_nor_gradient(huge):
    """Padded rows may hold anything: their losses are dropped, not multiplied by 0."""
    values = jnp.array([[0.5, 1.0], [huge, -huge]])
    mask = jnp.array([True, False])
    value, slope = jax.value_and_grad(losses.total)(values, mask)
    assert value == 1.5
    np.testing.assert_array_equal(slope, [[1, 1], [0, 0]])


@pytest.mark.parametrize("parameters", [None, (0.5, 0.5, 0.05), (1.0, 2.0, 0.0)])
def test_masked_rows_with_huge_logits_leave_the_gradient_finite(parameters):
    loss = losses.bce if parameters is None else asl_of(parameters)
    labels = jnp.array([[0.0, 1.0], [0.0, 1.0]])
    mask = jnp.array([True, False])

    def objective(logits):
        return losses.total(loss(logits, labels), mask)

    tame, slope = jax.value_and_grad(objective)(jnp.array([[0.5, 1.0], [0.0, 0.0]]))
    wild, wild_slope = jax.value_and_grad(objective)(
        jnp.array([[0.5, 1.0], [3e38, -3e38]])
    )
    assert tame == wild and np.isfinite(tame)
    np.testing.assert_array_equal(slope, wild_slope)
    np.testing.assert_array_equal(wild_slope[1], 0.0)
    assert (np.asarray(wild_slope[0]) != 0).all()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive_focal(p: float, gamma: float) -> float:
    return -((1 - p) ** gamma) * math.log(p)


def naive_hill(x, y, weight, margin, gamma) -> float:
    p = sigmoid(x)
    positive = naive_focal(sigmoid(x - margin), gamma)
    return y * positive + (1 - y) * (weight * p**2 - p**3)


def naive_splc(x, y, correct, tau, margin, gamma) -> float:
    p = sigmoid(x)
    negative = naive_focal(1 - p, gamma)
    if correct and p > tau:
        negative = naive_focal(p, gamma)
    return y * naive_focal(sigmoid(x - margin), gamma) + (1 - y) * negative


def naive_forward(x, y, r0, r1) -> float:
    q = r0 * (1 - sigmoid(x)) + (1 - r1) * sigmoid(x)
    return -(y * math.log(q) if y else 0) - ((1 - y) * math.log(1 - q) if y < 1 else 0)


ROWS = np.ones(1, bool)
# Name -> (logits, labels) -> losses, both [1, L], in the corners of the parameters.
ROBUST = {
    "hill": losses.hill,
    "hill, linear": functools.partial(losses.hill, weight=1.0, margin=0.0, gamma=0.5),
    "splc": functools.partial(losses.splc, epoch=2),
    "splc, at first": functools.partial(losses.splc, epoch=1, gamma=0.5),
    "large_loss": functools.partial(losses.large_loss, share=0.4, mask=ROWS),
    "forward": functools.partial(losses.forward, r0=0.1, r1=0.3),
    "forward, drops": functools.partial(losses.forward, r0=0.0, r1=0.5),
    "forward, adds": functools.partial(losses.forward, r0=0.5, r1=0.0),
    "forward, clean": functools.partial(losses.forward, r0=0.0, r1=0.0),
}


@functools.lru_cache
def robust_value_and_slope(name):
    """Jitted (logits, labels) -> (losses, slopes), as `value_and_slope`."""

    def both(logits, labels):
        value, pull = jax.vjp(lambda x: ROBUST[name](x, labels), logits)
        return value, pull(jnp.ones_like(value))[0]

    return jax.jit(both)


@pytest.mark.parametrize("name", ROBUST)
def test_robust_losses_are_finite_at_extreme_logits(name):
    largest = float(np.finfo(np.float32).max)
    sizes = [1e4, 1e-4, 1e-30, 0.0, 88.0, 104.0, largest, math.log(1.5)]
    logits = np.float32([[s * x for x in sizes for s in (1, -1)]])
    for label in (0.0, 1.0, 0.5):
        labels = np.full(logits.shape, label, np.float32)
        value, slope = robust_value_and_slope(name)(logits, labels)
        assert np.isfinite(value).all(), (label, logits[~np.isfinite(value)])
        assert np.isfinite(slope).all(), (label, logits[~np.isfinite(slope)])
        assert (np.asarray(value) >= -1e-6).all()


@pytest.mark.parametrize("name", ROBUST)
def test_robust_gradients_equal_finite_differences(name):
    with jax.enable_x64(True):
        # Clear of tau = .6, at a logit of log 1.5 = .405, and without ties.
        logits = jnp.array([[-4.0, -2.6, -1.0, 0.3, 2.0, 5.0] * 2])
        logits += jnp.linspace(-0.01, 0.01, 12)[None]
        labels = jnp.array([[0.0] * 6 + [1.0] * 6])
        loss = jax.jit(lambda x: ROBUST[name](x, labels))
        check_grads(loss, (logits,), order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", ROBUST)
def test_masked_rows_of_robust_losses_give_no_gradient(name):
    """A padded row may hold anything and must not move the valid row's losses."""
    loss, mask, options = ROBUST[name], jnp.array([True, False]), {}
    if name == "large_loss":
        options["mask"] = mask
    labels = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])

    @jax.jit
    @jax.value_and_grad
    def objective(logits):
        return losses.total(loss(logits, labels, **options), mask)

    valid = [0.5, 1.0, -1.0]
    tame, slope = objective(jnp.array([valid, [0.0, 0.0, 0.0]]))
    wild, wild_slope = objective(jnp.array([valid, [1e4, -1e4, 3e38]]))
    alone = robust_value_and_slope(name)(jnp.array([valid]), labels[:1])
    np.testing.assert_allclose([tame, wild], alone[0].sum(), rtol=1e-6)
    np.testing.assert_allclose(slope[:1], alone[1], rtol=1e-6)
    np.testing.assert_array_equal(slope, wild_slope)
    np.testing.assert_array_equal(wild_slope[1], 0.0)


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(
    "parameters", [(1.5, 1.0, 2.0), (1.5, 0.5, 1.0), (1.0, 0.0, 0.0)]
)
def test_hill_equals_its_definition(parameters, label):
    weight, margin, gamma = parameters
    got = losses.hill(
        jnp.float32(LOGITS),
        jnp.full(41, label, jnp.float32),
        weight=weight,
        margin=margin,
        gamma=gamma,
    )
    expected = [naive_hill(x, label, *parameters) for x in LOGITS]
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-7)


def test_hill_special_cases():
    logits, ones = jnp.float32(LOGITS), jnp.ones(41)
    plain = losses.hill(logits, ones, margin=0.0, gamma=0.0)
    np.testing.assert_allclose(plain, losses.bce(logits, ones), rtol=1e-6)
    # A negative pulls with 3 p^2 (1 - p)^2: most at p = 1/2, and as little at p as at
    # 1 - p.
    value, slope = robust_value_and_slope("hill")(logits[None], jnp.zeros((1, 41)))
    p = 1 / (1 + np.exp(-LOGITS))
    np.testing.assert_allclose(value[0], 1.5 * p**2 - p**3, rtol=1e-5)
    np.testing.assert_allclose(slope[0], 3 * (p * (1 - p)) ** 2, rtol=1e-3, atol=1e-7)
    # By hand, at p = .6: (1.5 - .6) .36 = .324, 3 .36 .16 = .1728.
    x = jnp.full((1, 1), math.log(1.5), jnp.float32)
    value, slope = robust_value_and_slope("hill")(x, jnp.zeros((1, 1)))
    np.testing.assert_allclose([value[0, 0], slope[0, 0]], [0.324, 0.1728], rtol=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_splc_equals_its_definition(epoch, label):
    """Corrected in the epochs after change_epoch = 2, counted from 1."""
    logits, tau, margin, gamma = LOGITS + 0.01, 0.7, 0.5, 1.0
    got = losses.splc(
        jnp.float32(logits),
        jnp.full(41, label, jnp.float32),
        epoch,
        tau=tau,
        margin=margin,
        gamma=gamma,
        change_epoch=2,
    )
    expected = [naive_splc(x, label, epoch > 2, tau, margin, gamma) for x in logits]
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-7)


def test_splc_corrects_the_likely_negatives_after_the_first_epoch():
    # p = .5, .599, .601, .9; with the margin's shift all but the last were below .6.
    p = np.array([0.5, 0.599, 0.601, 0.9])
    logits, labels = jnp.float32(np.log(p / (1 - p))), jnp.zeros(4)
    loss = jax.jit(losses.splc)  # a traced epoch
    kept, corrected = -(p**2) * np.log(1 - p), -((1 - p) ** 2) * np.log(p)
    np.testing.assert_allclose(loss(logits, labels, 1), kept, rtol=1e-4)
    expected = np.where([False, False, True, True], corrected, kept)
    for epoch in (2, 50):
        np.testing.assert_allclose(loss(logits, labels, epoch), expected, rtol=1e-4)
    # p = tau exactly stays a negative, whose gradient pushes the logit down.
    pull = jax.grad(lambda x, tau: losses.splc(x, jnp.float32(0), 2, tau=tau))
    assert pull(0.0, 0.5) > 0 > pull(0.0, 0.499)
    # Corrected, it pulls the logit up, and the positives are not touched.
    slope = robust_value_and_slope("splc")(logits[None], labels[None])[1]
    np.testing.assert_array_equal(np.sign(slope[0]), [1, 1, -1, -1])
    np.testing.assert_array_equal(
        loss(logits, jnp.ones(4), 1), loss(logits, jnp.ones(4), 2)
    )


# Two rows of four; * marks the positives.  The losses of the negatives, which rise with
# the logit, are ranked 3 > 2 > 1 > 0 > -1, and row three is padding.
LL_LOGITS = jnp.float32([[3.0, -1.0, 4.0, 1.0], [0.0, -5.0, 2.0, 1.5], [9.0] * 4])
LL_LABELS = jnp.float32([[0, 0, 1, 0], [0, 1, 0, 1], [0] * 4])
LL_MASK = np.array([True, True, False])


@pytest.mark.parametrize(
    "share, rejected",
    [
        (0.0, []),
        # ceil(.125 * 8) = 1, ceil(.13 * 8) = ceil(.25 * 8) = 2, ...
        (0.01, [(0, 0)]),
        (0.125, [(0, 0)]),
        (0.13, [(0, 0), (1, 2)]),
        (0.25, [(0, 0), (1, 2)]),
        (0.375, [(0, 0), (1, 2), (0, 3)]),
        # As many as there are negatives, and more: no positive goes.
        (0.625, [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2)]),
        (0.75, [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2)]),
        (1.0, [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2)]),
    ],
)
def test_large_loss_rejects_by_hand(share, rejected):
    """Of 8 entries in the valid rows; the padding's losses are larger than any."""
    got = jax.jit(losses.large_loss)(
        LL_LOGITS, LL_LABELS, jnp.float32(share), jnp.asarray(LL_MASK)
    )
    expected = np.array(losses.bce(LL_LOGITS, LL_LABELS))
    for at in rejected:
        expected[at] = 0.0
    np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-6)
    assert np.count_nonzero(got[:2]) == 8 - len(rejected)


def test_large_loss_gives_rejected_entries_no_gradient():
    def objective(logits, share):
        element = losses.large_loss(logits, LL_LABELS, share, LL_MASK)
        return losses.total(element, LL_MASK)

    slope = jax.jit(jax.grad(objective))(LL_LOGITS, 0.25)
    expected = np.array(jax.nn.sigmoid(LL_LOGITS) - LL_LABELS)
    expected[2] = expected[0, 0] = expected[1, 2] = 0
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_large_loss_rejects_ties_together():
    """k = 2 of 4, but three negatives share the second place."""
    logits = jnp.float32([[2.0, 1.0, 1.0, 1.0]])
    reject = jax.jit(losses.large_loss)
    got = reject(logits, jnp.zeros((1, 4)), 0.5, ROWS)
    np.testing.assert_array_equal(got, np.zeros((1, 4)))
    got = reject(logits, jnp.zeros((1, 4)), 0.25, ROWS)
    np.testing.assert_array_equal(np.asarray(got) == 0, [[True, False, False, False]])


def test_large_loss_counts_exactly():
    """A share that makes a whole number of entries rejects that many, not one more."""
    logits = jnp.linspace(-3, 3, 1000).reshape(1, 1000)
    reject = jax.jit(losses.large_loss)
    for tenths in range(11):
        got = reject(logits, jnp.zeros((1, 1000)), jnp.float32(tenths / 10), ROWS)
        assert np.sum(np.asarray(got) == 0) == 100 * tenths
    for epoch in (1, 2, 6, 50):  # .2 % more in every epoch
        share = losses.large_loss_share(epoch, 0.002)
        got = reject(logits, jnp.zeros((1, 1000)), share, ROWS)
        assert np.sum(np.asarray(got) == 0) == 2 * (epoch - 1)


def test_large_loss_schedule():
    """Nothing in the first epoch; delta_rel per cent more in each after it."""
    share = jax.jit(lambda epoch: losses.large_loss_share(epoch, 0.2))
    got = [share(epoch) for epoch in (1, 2, 3, 6, 7, 100)]
    np.testing.assert_allclose(got, [0, 0.2, 0.4, 1, 1, 1], rtol=1e-6)


@functools.lru_cache
def large_loss_of_stack(devices):
    """`losses.large_loss` of predictions [2, B, L], or [2, devices, B, L]."""

    def loss(logits, labels, mask, share):
        def gather(x):
            return jax.lax.all_gather(x, "devices") if devices > 1 else x

        return jax.vmap(lambda x: losses.large_loss(x, labels, share, mask, gather))(
            logits
        )

    if devices > 1:
        loss = jax.vmap(loss, (1, 0, 0, None), out_axes=1, axis_name="devices")
    return jax.jit(loss)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_large_loss_over_devices_equals_one_device(share):
    """Halves of a batch, and a stack of two predictions for it as in training."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 6, 5)) * 3, jnp.float32)
    # One half holds most of the large losses, and all of the padding.
    logits = logits.at[:, :3].add(2.0)
    labels = jnp.asarray(rng.random((6, 5)) < 0.3, jnp.float32)
    mask = jnp.array([True, True, False, True, True, True])

    whole = large_loss_of_stack(1)(logits, labels, mask, share)
    halves = large_loss_of_stack(2)(
        logits.reshape(2, 2, 3, 5), labels.reshape(2, 3, 5), mask.reshape(2, 3), share
    )
    valid = np.asarray(mask)
    np.testing.assert_array_equal(halves.reshape(2, 6, 5)[:, valid], whole[:, valid])
    rejected = np.sum(np.asarray(whole)[:, valid] == 0, (1, 2))
    negatives = int(np.sum(np.asarray(labels)[valid] == 0))
    assert (rejected == min(math.ceil(round(share * 25, 6)), negatives)).all()


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("rates", [(0.1, 0.3), (0.0, 0.5), (0.5, 0.0), (0.4, 0.5)])
def test_forward_equals_its_definition(rates, label):
    got = losses.forward(jnp.float32(LOGITS), jnp.full(41, label, jnp.float32), *rates)
    expected = [naive_forward(x, label, *rates) for x in LOGITS]
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-6)


def test_forward_without_noise_is_bce():
    logits = jnp.float32([[*LOGITS, 50.0, -50.0, 1e4, -1e4]])
    labels = jnp.float32(np.arange(45) % 3 / 2)[None]
    got = robust_value_and_slope("forward, clean")(logits, labels)
    expected = value_and_slope(None)(logits, labels)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-6)


@pytest.mark.parametrize("rates", [(0.1, 0.4), (0.0, 0.5), (0.3, 0.0)])
def test_forward_is_least_at_the_clean_probability(rates):
    """The expected loss over clean label and flip, on a grid of logits."""
    r0, r1 = rates
    grid = jnp.linspace(-4, 4, 1601)  # steps of .005
    on = losses.forward(grid, jnp.ones(1601), r0, r1)
    off = losses.forward(grid, jnp.zeros(1601), r0, r1)
    for clean in (0.2, 0.5, 0.75):
        expected = clean * ((1 - r1) * on + r1 * off)
        expected += (1 - clean) * (r0 * on + (1 - r0) * off)
        best = float(grid[jnp.argmin(expected)])
        assert sigmoid(best) == pytest.approx(clean, abs=0.004)


def test_forward_saturates_where_the_noise_explains_the_label():
    """A sure positive seen as negative costs -log r1, a sure negative -log r0."""
    logits, labels = jnp.float32([[1e4, -1e4]]), jnp.float32([[0.0, 1.0]])
    value, slope = robust_value_and_slope("forward")(logits, labels)
    np.testing.assert_allclose(value, [[-math.log(0.3), -math.log(0.1)]], rtol=1e-6)
    np.testing.assert_array_equal(slope, [[0.0, 0.0]])
    # Without drops there is nothing that explains it.
    value, slope = robust_value_and_slope("forward, adds")(logits, labels)
    np.testing.assert_allclose(value, [[1e4, math.log(2)]], rtol=1e-4)
    np.testing.assert_array_equal(slope, [[1.0, 0.0]])


def test_forward_takes_traced_rates_and_rates_per_label():
    logits, labels = jnp.float32(LOGITS[:6].reshape(3, 2)), jnp.ones((3, 2))
    rates = (jnp.array([[0.0, 0.2]]), jnp.array([[0.4, 0.0]]))
    got = jax.jit(losses.forward)(logits, labels, *rates)
    slopes = jax.grad(lambda *r: jnp.sum(losses.forward(logits, labels, *r)), (0, 1))
    for label, (r0, r1) in enumerate([(0.0, 0.4), (0.2, 0.0)]):
        expected = losses.forward(logits[:, label], labels[:, label], r0, r1)
        np.testing.assert_allclose(got[:, label], expected, rtol=1e-6)
    for slope in slopes(*rates):
        np.testing.assert_array_equal(slope, np.zeros((1, 2)))


@pytest.mark.parametrize(
    "r0, r1", [(0.6, 0.5), (0.5, 0.5), (0, 1), (-0.1, 0.2), (np.float32(1.5), 0.0)]
)
def test_forward_names_impossible_rates(r0, r1):
    with pytest.raises(ValueError, match=f"r0={r0}, r1={r1}"):
        losses.forward(jnp.zeros(1), jnp.zeros(1), r0, r1)


@pytest.mark.parametrize("name", sorted(set(ROBUST) - {"large_loss"}))
def test_robust_losses_are_linear_in_soft_labels(name):
    loss = robust_value_and_slope(name)
    logits = jnp.float32(LOGITS)[None]
    off, on = (loss(logits, jnp.full((1, 41), y))[0] for y in (0.0, 1.0))
    np.testing.assert_allclose(
        loss(logits, jnp.full((1, 41), 0.3))[0], 0.3 * on + 0.7 * off, rtol=1e-5
    )
