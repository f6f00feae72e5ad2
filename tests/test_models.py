"""The model against an independent PyTorch one, and against arithmetic by hand."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import losses, models, optim, rngs, steps, thresholds
from cbmlc_jax.models import encoders, layers, ops
from cbmlc_jax.models.decoder import LabelGraphDecoder

GOLDEN = pathlib.Path(__file__).parent / "golden" / "cbmlc.npz"
CASES = ("full", "square", "tied")


def golden_case(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        prefix = name + "/"
        return {
            k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)
        }


def tree(case: dict[str, np.ndarray], kind: str) -> dict:
    flat = {
        tuple(k.split("/")[1:]): jnp.asarray(v)
        for k, v in case.items()
        if k.startswith(kind + "/")
    }
    return flax.traverse_util.unflatten_dict(flat)


def model_of(case: dict[str, np.ndarray]):
    labels, width_in = case["param/decoder/label_embeddings"].shape
    features, width = case["param/encoder/embedding"].shape
    settings = SimpleNamespace(
        name="cbmlc",
        width=width,
        num_blocks=int(case["decoder_blocks"]),
        num_heads=int(case["num_heads"]),
        ffn_width=case["param/encoder/block_0/ffn/w1"].shape[1],
        dropout=0.0,
        readout_tying=bool(case["tied"]),
        linear_path=False,
        token_dropout=0.0,
        intermediate_weight=float(case["intermediate_weight"]),
        encoder=SimpleNamespace(
            name="set",
            layers=int(case["encoder_blocks"]),
            self_attention=bool(case["self_attention"]),
            embedding_std=1.0,
        ),
    )
    vectors = np.zeros((labels, width_in))
    train = SimpleNamespace(matmul_precision="float32")
    config = SimpleNamespace(model=settings, train=train)
    return models.create_model(config, running.meta(features, vectors))


def graph_of(case: dict[str, np.ndarray]):
    return jnp.asarray(case["graph"]) if "graph" in case else None


@pytest.mark.parametrize("name", CASES)
def test_forward_pass_is_that_of_the_reference(float64, name):
    case = golden_case(name)
    out = model_of(case).apply(
        {"params": tree(case, "param")}, {"tokens": case["tokens"]}, graph_of(case)
    )
    np.testing.assert_allclose(out.logits, case["logits"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        out.intermediate, case["intermediate"], rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("name", CASES)
def test_initial_parameters_have_the_reference_names_and_shapes(name):
    case = golden_case(name)
    shapes = running.param_shapes(model_of(case))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
        jnp.shape, tree(case, "param")
    )


class _Gradients:
    """An optimizer that hands the gradient back as the update, to look at it."""

    @staticmethod
    def transformation():
        import optax

        return optax.GradientTransformation(
            lambda params: (), lambda grads, state, params=None: (grads, state)
        )


@pytest.mark.parametrize("name", CASES)
def test_training_step_has_the_loss_and_gradient_of_the_reference(float64, name):
    case = golden_case(name)
    model, params = model_of(case), tree(case, "param")
    config = config_lib.base()
    config.model.intermediate_weight = float(case["intermediate_weight"])
    config.loss.cb_weight = float(case["lambda"])
    config.loss.cb_norm = str(case["regulariser"])
    if "gamma_pos" in case:
        config.loss.gamma_pos = float(case["gamma_pos"])
        config.loss.gamma_neg = float(case["gamma_neg"])
        config.loss.margin = float(case["margin"])
    else:
        config.loss.name, config.loss.reduction = "bce", "mean"
    tx = _Gradients.transformation()
    step = steps.make_train_step(
        model,
        config,
        tx,
        axis=None,
        steps_per_epoch=1,
    )
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    batch = {
        "tokens": case["tokens"],
        "labels": case["labels"],
        "mask": case["mask"],
        "rows": np.arange(len(case["tokens"]), dtype=np.uint32),
    }
    none = thresholds.Rates(0.0, 0.0)
    constants = steps.step_constants(config, graph_of(case), case["word_vectors"], none)
    after, metrics = jax.jit(step)(state, batch, constants)
    np.testing.assert_allclose(metrics["loss"], case["loss"], rtol=1e-10)
    gradients = jax.tree.map(lambda a, b: a - b, after.params, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9),
        gradients,
        tree(case, "grad"),
    )


def test_two_labels_by_hand(float64):
    """L = 2, width 2, one head, one input token, all matrices chosen by hand.

    z = (1, 0); e_1 = (1, 0), e_2 = (0, 1); Q = K = V = O = identity; scale 1/sqrt(2).
    The FFN is zero, so that its sub-layer is a LayerNorm alone.

    Cross-attention over one token has weight 1: e_l + z = (2, 0) and (1, 1).
    LN((2, 0)): mean 1, variance 1 -> (1, -1) / sqrt(1 + 1e-5) =: (a, -a).
    LN((1, 1)): variance 0 -> (0, 0).  The FFN's LN: (a, -a) has variance a^2, so
    (b, -b) with b = a / sqrt(a^2 + 1e-5); (0, 0) stays.
    Self-attention, label 1: q.k = (2 b^2, 0) / sqrt(2) -> weights (w, 1 - w) with
    w = 1 / (1 + exp(-sqrt(2) b^2)); label 2: q = 0 -> weights (1/2, 1/2).
    Messages: w (b, -b) and (b, -b) / 2.
    Label 1: LN of (b + w b, -(b + w b)) -> c / sqrt(c^2 + 1e-5), c = b (1 + w), with
    both signs; label 2: d / sqrt(d^2 + 1e-5), d = b / 2.  The FFN's LN again.
    """
    eps = 1e-5

    def ln(x):
        return x / np.sqrt(x * x + eps)

    b = ln(ln(1.0))
    w = 1 / (1 + np.exp(-np.sqrt(2) * b * b))
    node_1, node_2 = ln(ln(b * (1 + w))), ln(ln(b / 2))

    identity = jnp.eye(2, dtype=jnp.float64)
    attention = {
        "query": identity[:, None],
        "key": identity[:, None],
        "value": identity[:, None],
        "out": identity[None],
    }
    norm = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    ffn = {
        "w1": jnp.zeros((2, 3)),
        "b1": jnp.zeros(3),
        "w2": jnp.zeros((3, 2)),
        "b2": jnp.zeros(2),
    }
    block = {
        "attention": attention,
        "attention_norm": norm,
        "ffn": ffn,
        "ffn_norm": norm,
    }
    decoder = LabelGraphDecoder(2, 2, 2, num_blocks=1, num_heads=1, ffn_width=3)
    params = {"label_embeddings": identity, "block_0": {"cross": block, "self": block}}
    memory = jnp.array([[[1.0, 0.0]]], jnp.float64)
    initial, states = decoder.apply(
        {"params": params}, memory, jnp.ones((1, 1), bool), None, None
    )
    np.testing.assert_allclose(initial, np.eye(2))
    np.testing.assert_allclose(states[0][0], [[b, -b], [0, 0]], atol=1e-12)
    np.testing.assert_allclose(
        states[1][0], [[node_1, -node_1], [node_2, -node_2]], atol=1e-12
    )
    # The numbers themselves, so that a slip in the formulae above shows too.
    assert (round(w, 3), round(node_1, 4), round(node_2, 4)) == (0.804, 1.0, 1.0)


def small_model(num_labels: int, vectors: np.ndarray, **changes):
    config = config_lib.base()
    config.model.width, config.model.ffn_width = 8, 16
    config.model.num_blocks = config.model.encoder.layers = 1
    config.model.update(changes)
    return models.create_model(config, running.meta(11, vectors))


def permute_labels(params: dict, order: np.ndarray) -> dict:
    flat = flax.traverse_util.flatten_dict(params)
    for path in flat:
        if path[-1] in ("label_embeddings", "readout"):
            flat[path] = flat[path][order]
    return flax.traverse_util.unflatten_dict(flat)


def test_permuted_labels_permute_the_logits():
    rng = np.random.default_rng(0)
    model = small_model(5, rng.normal(size=(5, 6)).astype(np.float32))
    tokens = rng.integers(1, 12, (3, 4))
    params = running.init_params(model, 0)
    graph = rng.random((5, 5)) < 0.5
    graph |= np.eye(5, dtype=bool)
    order = np.array([3, 1, 4, 0, 2])
    apply = jax.jit(model.apply)  # compiled faster than its operations one by one
    before = apply({"params": params}, {"tokens": tokens}, graph).logits
    after = apply(
        {"params": permute_labels(params, order)},
        {"tokens": tokens},
        graph[order][:, order],
    ).logits
    np.testing.assert_allclose(after, before[:, order], atol=1e-5)
    assert np.ptp(before) > 0.1


def test_set_encoder_ignores_order_and_padding():
    rng = np.random.default_rng(1)
    model = small_model(4, rng.normal(size=(4, 8)).astype(np.float32))
    params = running.init_params(model, 0)
    tokens = np.array([[3, 7, 2, 9]])
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, {"tokens": tokens}).logits
    for same in ([[9, 3, 2, 7]], [[3, 7, 2, 9, 0, 0, 0]]):
        other = apply({"params": params}, {"tokens": np.array(same)}).logits
        np.testing.assert_allclose(other, logits, atol=1e-5)
    fewer = apply({"params": params}, {"tokens": np.array([[3, 7, 2]])}).logits
    assert np.abs(fewer - logits).max() > 1e-2


def test_a_row_without_features_is_scored_the_same_at_any_padding():
    model = small_model(4, np.eye(4, 8, dtype=np.float32))
    params = running.init_params(model, 0)
    apply = jax.jit(model.apply)
    short = apply({"params": params}, {"tokens": np.zeros((1, 3), int)}).logits
    long = apply({"params": params}, {"tokens": np.zeros((1, 9), int)}).logits
    assert np.isfinite(short).all()
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_label_nodes_start_at_the_word_vectors():
    vectors = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    params = running.init_params(small_model(4, vectors), 0)
    np.testing.assert_array_equal(params["decoder"]["label_embeddings"], vectors)
    assert params["decoder"]["input_map"].shape == (6, 8)


def test_initial_distributions():
    vectors = np.zeros((50, 64), np.float32)
    config = config_lib.base()
    config.model.width = 64
    model = models.create_model(config, running.meta(2000, vectors))
    params = running.init_params(model, 0)
    attention = params["decoder"]["block_0"]["cross"]["attention"]
    for name in ("query", "key", "value"):
        assert np.std(attention[name]) == pytest.approx((2 / (64 + 16)) ** 0.5, rel=0.1)
    assert np.std(attention["out"]) == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    assert np.std(params["encoder"]["embedding"]) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        # embedding 11*8; encoder 2*(4*64 + FFN 8*16+16+16*8+8 + 2 norms 32) = 2*568;
        # decoder e 5*6, map 6*8, 4 * 568; readout 5*8.
        ({}, 11 * 8 + 2 * 568 + 5 * 6 + 6 * 8 + 4 * 568 + 5 * 8),
        ({"readout_tying": True}, 11 * 8 + 2 * 568 + 5 * 6 + 6 * 8 + 4 * 568),
        (
            {"linear_path": True},
            11 * 8 + 2 * 568 + 5 * 6 + 6 * 8 + 4 * 568 + 5 * 8 + 11 * 5 + 5,
        ),
        ({"num_blocks": 1}, 11 * 8 + 2 * 568 + 5 * 6 + 6 * 8 + 2 * 568 + 5 * 8),
        # without self-attention an encoder block is FFN and one norm: 568 - 256 - 16.
        (
            {"encoder": {"self_attention": False}},
            11 * 8 + 2 * 296 + 5 * 6 + 6 * 8 + 4 * 568 + 5 * 8,
        ),
    ],
)
def test_parameter_counts(changes, count):
    changes = {"num_blocks": 2, **changes}
    changes["encoder"] = {"layers": 2, **changes.get("encoder", {})}
    model = small_model(5, np.zeros((5, 6), np.float32), **changes)
    shapes = running.param_shapes(model)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_full_size_parameter_count_on_bibtex():
    """1,836 features and 159 labels with 300-d vectors, as in the paper."""
    config = config_lib.base()
    meta = running.meta(1836, np.zeros((159, 300), np.float32))
    model = models.create_model(config, meta)
    shapes = running.param_shapes(model)
    block = 4 * 300 * 300 + (300 * 600 + 600 + 600 * 300 + 300) + 4 * 300
    expected = 1836 * 300 + 2 * block + 4 * block + 2 * 159 * 300
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected == 4_978_800


def keep_mask(key, rows, shape, rate):
    return ops.keep_mask(jax.random.key_data(key), rows, shape, rate)


def test_dropout_masks_follow_the_key_and_the_row():
    key = rngs.stream(0, "dropout", 1)
    rows = jnp.arange(8, dtype=jnp.uint32)
    mask = keep_mask(key, rows, (8, 50, 40), 0.3)
    part = keep_mask(key, rows[4:], (4, 50, 40), 0.3)
    np.testing.assert_array_equal(mask[4:], part)
    other = keep_mask(rngs.stream(0, "dropout", 2), rows, (8, 50, 40), 0.3)
    assert 0.5 < np.mean(mask == other) < 0.66  # .58 where independent
    assert 0.5 < np.mean(mask[0] == mask[1]) < 0.66


@pytest.mark.parametrize("strides", [None, ops.pair_strides(4)])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
def test_dropout_rate_and_independence(rate, strides):
    rows, words = jnp.arange(64, dtype=jnp.uint32), rngs.stream(1, "dropout")
    words = jax.random.key_data(words)
    mask = np.asarray(ops.keep_mask(words, rows, (64, 4, 32, 32), rate, strides))
    n = mask.size
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - (1 - rate)) < 5 * sigma / n**0.5
    centred = (mask - (1 - rate)) / sigma
    for axis in range(4):
        for lag in (1, 2, 3):
            if lag >= mask.shape[axis]:
                continue
            a = np.take(centred, range(mask.shape[axis] - lag), axis)
            b = np.take(centred, range(lag, mask.shape[axis]), axis)
            assert abs((a * b).mean()) < 5 / a.size**0.5
    # Row sums are binomial: their variance shows correlations of any kind.
    sums = centred.reshape(64, -1).sum(1) / (n / 64) ** 0.5
    assert 0.55 < sums.var() < 1.6


def test_dropout_keeps_the_mean_and_is_off_without_rows():
    layer = layers.Dropout(0.4)
    x = jnp.ones((16, 1000))
    rows = jnp.arange(16, dtype=jnp.uint32)
    out = layer.apply({}, x, rows, rngs={"dropout": rngs.stream(0, "d")})
    assert set(np.unique(np.asarray(out).round(5))) == {0.0, np.float32(1.66667)}
    assert np.mean(out) == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(layer.apply({}, x, None), x)


def test_fixed_label_embeddings_stay():
    params = {"decoder": {"label_embeddings": jnp.ones((3, 2)), "w": jnp.ones(2)}}
    tx = optim.make_optimizer(
        learning_rate=0.1, weight_decay=0.1, frozen=("label_embeddings",)
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not np.any(updates["decoder"]["label_embeddings"])
    assert np.all(updates["decoder"]["w"] < -0.09)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_with_coupled_or_decoupled_decay_by_hand(decoupled):
    """Two steps of Adam written out; lr .1, decay .5, gradient 1 then -2, w = 2."""
    tx = optim.make_optimizer(learning_rate=0.1, weight_decay=0.5, decoupled=decoupled)
    w, state = jnp.float32(2.0), None
    state = tx.init(w)
    mine, m, v = 2.0, 0.0, 0.0
    for t, raw in enumerate((1.0, -2.0), 1):
        g = raw if decoupled else raw + 0.5 * mine
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
        mine -= 0.1 * (step + (0.5 * mine if decoupled else 0))
        updates, state = tx.update(jnp.float32(raw), state, w)
        w = w + updates
    assert float(w) == pytest.approx(mine, rel=1e-5)


def test_intermediate_losses_leave_the_readout_alone():
    """Only the final logits move W; with the final loss removed its gradient is 0."""
    model = small_model(4, np.eye(4, 8, dtype=np.float32))
    params = running.init_params(model, 0)
    tokens = np.array([[1, 2, 3]])

    def intermediate_loss(params):
        out = model.apply({"params": params}, {"tokens": tokens})
        return jnp.sum(
            jax.vmap(lambda x: losses.bce(x, jnp.ones_like(x)))(out.intermediate)
        )

    grads = jax.grad(intermediate_loss)(params)
    assert not np.any(grads["readout"])
    assert np.any(grads["decoder"]["label_embeddings"])


def test_positions_are_the_published_sinusoids():
    table = np.asarray(encoders.sinusoids(7, 4))
    for s in range(7):
        expected = [np.sin(s), np.cos(s), np.sin(s / 100), np.cos(s / 100)]
        np.testing.assert_allclose(table[s], expected, atol=1e-6)


def test_sequence_encoder_reads_the_order_and_ignores_padding():
    vectors = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    model = small_model(4, vectors, encoder={"name": "sequence"})
    params = running.init_params(model, 0)
    logits = [
        model.apply({"params": params}, {"tokens": np.array([tokens])}).logits
        for tokens in ([3, 7, 2, 9], [3, 7, 2, 9, 0, 0, 0], [9, 7, 2, 3])
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert np.abs(logits[0] - logits[2]).max() > 1e-2


def test_linear_path_is_a_linear_map_of_the_bag():
    """From zero it changes nothing; then it adds b + (w / |w|) A, by hand."""
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    model = small_model(3, vectors, linear_path=True)
    params = running.init_params(model, 0)
    rest = {k: v for k, v in params.items() if k != "linear_path"}
    tokens = jnp.array([[1, 3, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    weights = jnp.array([[3.0, 4.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 0]])
    plain = small_model(3, vectors)
    for inputs in ({"tokens": tokens}, {"tokens": tokens, "weights": weights}):
        before = plain.apply({"params": rest}, inputs).logits
        np.testing.assert_array_equal(
            model.apply({"params": params}, inputs).logits, before
        )
        table = np.arange(33, dtype=np.float32).reshape(11, 3)
        bias = np.array([10.0, 20.0, 30.0], np.float32)
        trained = {"tokens": jnp.asarray(table), "bias": jnp.asarray(bias)}
        after = model.apply({"params": rest | {"linear_path": trained}}, inputs).logits
        w = [0.6, 0.8] if "weights" in inputs else [0.5**0.5] * 2
        expected = [w[0] * table[0] + w[1] * table[2] + bias, table[1] + bias, bias]
        np.testing.assert_allclose(after - before, expected, atol=2e-5)


def test_averaged_weights_by_hand():
    average, want = {"w": jnp.zeros(2)}, 0.0
    for t in range(40):
        p = float(t * t)
        average = steps.averaged(average, {"w": jnp.full(2, p)}, jnp.array(t), 0.7)
        keep = min(0.7, (1 + t) / (10 + t))
        want = keep * want + (1 - keep) * p
    np.testing.assert_allclose(average["w"], want, rtol=1e-5)


@pytest.mark.slow
def test_token_dropout_leaves_tokens_out_in_training_alone():
    vectors = np.eye(3, 8, dtype=np.float32)
    model = small_model(3, vectors, linear_path=True, dropout=0.0)
    params = running.init_params(model, 0)
    counting = {"tokens": jnp.ones((11, 3)), "bias": jnp.zeros(3)}
    thinned = model.clone(token_dropout=0.4)
    tokens = jnp.tile(jnp.arange(1, 11)[None], (600, 1))
    rows, key = jnp.arange(600, dtype=jnp.uint32), {"dropout": jax.random.key(3)}

    def logits(model, path, tokens, rows):
        variables = {"params": params | {"linear_path": path}}
        return model.apply(variables, {"tokens": tokens}, None, rows, rngs=key).logits

    np.testing.assert_array_equal(
        logits(thinned, counting, tokens, None), logits(model, counting, tokens, None)
    )
    zero = jax.tree.map(jnp.zeros_like, counting)
    trained = logits(thinned, zero, tokens, rows)
    # n tokens of weight n^-.5 each.
    kept = (logits(thinned, counting, tokens, rows) - trained)[:, 0] ** 2
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert np.mean(kept) / 10 == pytest.approx(0.6, abs=4 * (0.24 / 6000) ** 0.5)
    assert len(np.unique(np.round(kept))) > 4
    # What a row loses follows from its number, wherever and how padded it stands.
    padded = jnp.pad(tokens[7:9], ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        logits(thinned, zero, padded, rows[7:9]), trained[7:9], atol=1e-5
    )
