"""ML-GCN: its graph by hand and by definition, its symmetries, that it learns."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbmlc_jax import losses, rngs
from cbmlc_jax.models.baselines import ml_gcn
from cbmlc_jax.models.encoders import TokenEncoder


def test_adjacency_by_hand():
    """Rows {a, b} twice, {a} four times, {b, c}: counts a 6, b 3, c 1.

    P(a | b) = 2/3 and P(b | c) = 1 reach .4; P(b | a) = P(c | b) = 1/3 do not.  So
    A_ba = A_cb = 1/4 beside the identity; row sums 1, 5/4, 5/4.  The result at
    [a, b] is A_ba / sqrt(1 * 5/4), at [b, c] A_cb / (5/4): a receives from b, b from c.
    """
    labels = np.array([[1, 1, 0]] * 2 + [[1, 0, 0]] * 4 + [[0, 1, 1]], np.uint8)
    got = ml_gcn.correlation_adjacency(labels)
    expected = [[1, 0.25 / 1.25**0.5, 0], [0, 0.8, 0.2], [0, 0, 0.8]]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32


def published_adjacency(labels: np.ndarray, t: float, weight: float) -> np.ndarray:
    """gen_A and gen_adj of the authors' util.py, step by step."""
    nums = labels.sum(0).astype(float)[:, None]
    adj = (labels.T.astype(float) @ labels) * (1 - np.eye(labels.shape[1]))
    adj = adj / nums
    adj[adj < t] = 0
    adj[adj >= t] = 1
    adj = adj * weight / (adj.sum(0, keepdims=True) + 1e-6)
    a = adj + np.identity(labels.shape[1])
    d = np.diag(a.sum(1) ** -0.5)
    return (a @ d).T @ d


@pytest.mark.parametrize(("threshold", "weight"), [(0.4, 0.25), (0.2, 0.5), (0.7, 0.2)])
def test_adjacency_is_the_published_one(threshold, weight):
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 7)) < np.linspace(0.1, 0.7, 7)).astype(np.uint8)
    got = ml_gcn.correlation_adjacency(labels, threshold, weight)
    expected = published_adjacency(labels, threshold, weight)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.count_nonzero(got) > 9 and np.abs(got - got.T).max() > 0.02


@pytest.mark.parametrize("threshold", [0.4, 0.0])
def test_a_label_without_positives_is_alone(threshold):
    labels = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0]], np.uint8)
    got = ml_gcn.correlation_adjacency(labels, threshold)
    rest = ml_gcn.correlation_adjacency(labels[:, :2], threshold)
    np.testing.assert_allclose(got[:2, :2], rest, atol=1e-6)
    np.testing.assert_array_equal(got[2], [0, 0, 1])
    np.testing.assert_array_equal(got[:, 2], [0, 0, 1])
    empty = ml_gcn.correlation_adjacency(np.zeros((0, 3), np.uint8))
    np.testing.assert_array_equal(empty, np.eye(3))


def test_pooling_takes_the_valid_positions_alone():
    memory = jnp.array([[[1.0, -5], [3, -7], [90, 90]], [[4, 4], [5, 5], [6, 6]]])
    valid = jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_array_equal(ml_gcn.masked_max(memory, valid), [[3, -5], [0, 0]])
    slope = jax.grad(lambda m: ml_gcn.masked_max(m, valid).sum())(memory)
    np.testing.assert_array_equal(slope[0], [[0, 1], [1, 0], [0, 0]])
    assert not slope[1].any()


class Table(nn.Module):
    """A table of token vectors; the memory of padding is large, as a trap."""

    num_tokens: int
    width: int

    @nn.compact
    def __call__(self, inputs, rows=None):
        tokens = inputs["tokens"]
        table = self.param("table", nn.initializers.normal(1.0), (99, self.width))
        valid = tokens > 0
        return jnp.where(valid[..., None], table[tokens], 1e3), valid


def small(encoder=None, width=8, num_labels=5):
    """A small model and its parameters."""
    vectors = np.random.default_rng(0).normal(size=(num_labels, 6))
    model = ml_gcn.MLGCN(
        encoder or Table(20, 8), vectors.astype(np.float32), hidden=7, width=width
    )
    inputs = {"tokens": jnp.ones((1, 3), jnp.int32)}
    return model, jax.jit(model.init)(rngs.stream(0, "params"), inputs)["params"]


def logits_of(model, params, tokens, graph=None):
    """As an evaluation has them: compiled, without rows."""
    return jax.jit(lambda p, t, g: model.apply({"params": p}, t, g).logits)(
        params, {"tokens": tokens}, graph
    )


def test_forward_pass_by_numpy():
    model, params = small(width=10)
    tokens = np.array([[3, 5, 0], [7, 0, 0], [0, 0, 0]])
    graph = np.random.default_rng(1).random((5, 5)).astype(np.float32)
    table = np.asarray(params["encoder"]["table"])
    pooled = np.stack([np.maximum(table[3], table[5]), table[7], np.zeros(8)])
    nodes = graph @ model.label_vectors @ params["convolution_0"]
    nodes = graph @ np.where(nodes > 0, nodes, 0.2 * nodes) @ params["convolution_1"]
    expected = pooled @ params["pooled_map"] @ nodes.T
    assert np.abs(expected[:2]).min() > 1e-4
    logits = logits_of(model, params, tokens, graph)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    alone = logits_of(model, params, tokens)
    same = logits_of(model, params, tokens, np.eye(5))
    np.testing.assert_allclose(alone, same, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing():
    encoder = TokenEncoder(20, 8, num_blocks=1, num_heads=2, ffn_width=8)
    model, params = small(encoder)
    tokens = np.array([[3, 7, 2, 9]])
    logits = logits_of(model, params, tokens)
    padded = logits_of(model, params, np.pad(tokens, ((0, 0), (1, 4))))
    np.testing.assert_allclose(padded, logits, atol=1e-5)
    fewer = logits_of(model, params, tokens[:, :3])
    assert np.abs(fewer - logits).max() > 1e-2


def test_permuted_labels_permute_the_logits():
    model, params = small()
    rng = np.random.default_rng(2)
    labels = (rng.random((40, 5)) < 0.4).astype(np.uint8)
    order = np.array([3, 1, 4, 0, 2])
    tokens = rng.integers(1, 21, (3, 4))
    graph = ml_gcn.correlation_adjacency(labels)
    permuted = ml_gcn.correlation_adjacency(labels[:, order])
    before = logits_of(model, params, tokens, graph)
    moved = params | {"label_vectors": params["label_vectors"][order]}
    after = logits_of(model, moved, tokens, permuted)
    np.testing.assert_allclose(after, before[:, order], atol=1e-5)
    assert np.ptp(before, axis=1).min() > 0.1


def test_parameters_and_their_start():
    """Kernels, and the label vectors, which get no gradient (train.py freezes them)."""
    vectors = np.zeros((20, 300), np.float32)
    model = ml_gcn.MLGCN(Table(20, 512), vectors)
    inputs = {"tokens": jnp.ones((1, 3), jnp.int32)}
    params = jax.jit(model.init)(rngs.stream(0, "params"), inputs)["params"]
    params.pop("encoder")
    np.testing.assert_array_equal(params.pop("label_vectors"), vectors)
    count = 300 * 1024 + 1024 * 2048 + 512 * 2048
    assert sum(x.size for x in jax.tree.leaves(params)) == count == 3_452_928
    for name, bound in (("convolution_0", 1024**-0.5), ("convolution_1", 2048**-0.5)):
        assert 0.99 * bound < np.abs(params[name]).max() <= bound
    _, same_width = small(width=8)
    assert "pooled_map" not in same_width


def test_learns_a_separable_problem():
    """Label l holds where token l + 1 is present; the other tokens are noise."""
    rng = np.random.default_rng(0)
    present = rng.random((256, 9)) < 0.35
    tokens = np.where(present, np.arange(1, 10), 0)
    labels = present[:, :4].astype(np.float32)
    graph = ml_gcn.correlation_adjacency(labels[:192], threshold=0.3)
    model, params = small(Table(9, 32), width=32, num_labels=4)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def objective(params):
            logits = model.apply(
                {"params": params}, {"tokens": tokens[:192]}, graph
            ).logits
            return losses.bce(logits, labels[:192]).mean()

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    logits = logits_of(model, params, tokens[192:], graph)
    loss = losses.bce(logits, labels[192:]).mean()
    prior = labels[:192].mean(0)[None]
    of_prior = losses.bce(jnp.log(prior / (1 - prior)), labels[192:]).mean()
    assert loss < 0.3 * of_prior
    assert np.mean((logits > 0) == (labels[192:] == 1)) > 0.97
