"""What rows are: weighted ids, real numbers; their batches, in any order and from any
step on; and entries that do not count."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import evaluate, models, optim, rngs, steps, systems, thresholds
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.data.dataset import Dense, Ragged, Split, filled


def weighted() -> Ragged:
    ids = Ragged.from_rows([[2, 0], [], [1, 3, 2]])
    return Ragged(ids.values, ids.offsets, np.float32([0.5, 0.1, 1, 2, 3]))


def test_weights_follow_their_ids():
    inputs = weighted()
    expected = np.array([[0.1, 0, 0.5, 0], [0, 0, 0, 0], [0, 1, 3, 2]], np.float32)
    np.testing.assert_array_equal(inputs.matrix(4).toarray(), expected)
    taken = inputs.take(np.array([2, 0]))
    np.testing.assert_array_equal(taken.matrix(4).toarray(), expected[[2, 0]])
    batch = inputs.batch(np.array([2, 1, -1]), 4)
    assert batch["tokens"].tolist() == [[2, 4, 3, 0], [0] * 4, [0] * 4]
    np.testing.assert_array_equal(batch["weights"], [[1, 2, 3, 0], [0] * 4, [0] * 4])
    assert batch["tokens"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    unweighted = Ragged(inputs.values, inputs.offsets)
    assert list(inputs.content())[: len(list(unweighted.content()))] == list(
        unweighted.content()
    )
    assert len(list(inputs.content())) > len(list(unweighted.content()))


def test_token_weights_act_by_their_proportions():
    """Weights of 1 are no weights, their scale is nothing, their proportions count."""
    vectors = np.eye(3, 4, dtype=np.float32)
    config = running.tiny_config()
    meta = running.meta(9, vectors)
    model = models.create_model(config, meta)
    params = running.init_params(model, 0, 3)
    tokens = np.array([[3, 7, 2, 0], [1, 0, 0, 0]])

    def logits(weights=None):
        inputs = {"tokens": tokens}
        if weights is not None:
            inputs["weights"] = jnp.asarray(weights, jnp.float32)
        return score(params, inputs)

    @jax.jit
    def score(params, inputs):
        return model.apply({"params": params}, inputs).logits

    plain = logits()
    ones = logits([[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(ones, plain, atol=1e-6)
    some = logits([[0.1, 0.2, 0.4, 0], [0.3, 0, 0, 0]])
    scaled = logits([[1, 2, 4, 0], [3, 0, 0, 0]])
    np.testing.assert_allclose(some, scaled, atol=1e-5)
    np.testing.assert_allclose(some[1], plain[1], atol=1e-5)
    assert np.abs(some[0] - plain[0]).max() > 1e-3
    assert np.isfinite(logits(np.zeros((2, 4)))).all()


def test_dense_batches_repeat_rows_to_fill_up():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    inputs = Dense(values)
    assert filled(np.array([3, 1, -1, -1, -1])).tolist() == [3, 1, 3, 1, 3]
    batch = inputs.batch(np.array([3, 1, -1]), 8)
    np.testing.assert_array_equal(batch["features"], values[[3, 1, 3]])
    np.testing.assert_array_equal(inputs.take(np.array([2])).matrix(3), values[[2]])
    assert inputs.lengths.tolist() == [1] * 4


def split(rows: int = 10) -> Split:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (rows, 3)).astype(np.uint8)
    ignored = rng.random((rows, 3)) < 0.5
    return Split(Dense(np.arange(rows, dtype=np.float32)[:, None]), labels, ignored)


def test_epochs_can_be_taken_up_at_any_step():
    whole = split()
    source = pipeline.Epochs(whole, 4, [8], seed=3, epochs=3)
    assert len(source) == 9
    expected = [batch["features"][:, 0].tolist() for batch in pipeline.stream(source)]
    fresh = pipeline.Epochs(whole, 4, [8], seed=3, epochs=3)
    rest = [b["features"][:, 0].tolist() for b in pipeline.stream(fresh, start=5)]
    assert rest == expected[5:]
    for epoch in range(3):  # each row once an epoch, in another order
        batches = [source[3 * epoch + i] for i in range(3)]
        rows = np.concatenate([b["features"][b["mask"], 0] for b in batches])
        assert sorted(rows) == list(range(10))
    assert expected[:3] != expected[3:6]
    other = pipeline.Epochs(whole, 4, [8], seed=4, epochs=1)
    assert [other[i]["features"][:, 0].tolist() for i in range(3)] != expected[:3]


def test_batches_carry_labels_and_ignored_entries():
    whole = split()
    plan = pipeline.plan_batches(whole.inputs.lengths, 4, [8])
    for rows, batch in zip(
        plan.rows,
        pipeline.stream(pipeline.Batches(whole.inputs, plan, whole)),
        strict=True,
    ):
        real = rows >= 0
        np.testing.assert_array_equal(batch["labels"][real], whole.labels[rows[real]])
        np.testing.assert_array_equal(batch["ignored"][real], whole.ignored[rows[real]])
        assert batch["ignored"].dtype == bool and batch["labels"].dtype == np.uint8
        assert not batch["labels"][~real].any()


def test_ignored_entries_move_no_score():
    rng = np.random.default_rng(1)
    scores = rng.random((50, 6)).astype(np.float32)
    labels = (rng.random((50, 6)) < 0.3).astype(np.uint8)
    ignored = rng.random((50, 6)) < 0.2
    labels[ignored] = 0
    whole = Split(Dense(scores), labels, ignored)
    hidden = run_lib.counted(scores, whole)
    curves = thresholds.f1_curves(hidden, labels)
    # By hand, without the entries.
    t = thresholds.GRID[10]
    predicted = (scores >= t) & ~ignored
    expected = 2 * (predicted & (labels == 1)).sum() / (predicted.sum() + labels.sum())
    assert curves["miF1"][10] == pytest.approx(expected)
    louder = np.where(ignored, 1, scores).astype(np.float32)
    for split_ in (whole, dataclasses.replace(whole, ignored=None)):
        same = np.array_equal(
            run_lib.counted(louder, split_), run_lib.counted(scores, split_)
        )
        assert same == (split_.ignored is not None)
    parts, _ = evaluate.protocols(
        evaluate.Validation(
            hidden, labels, labels, labels.mean(0), thresholds.Rates(0.0, 0.0)
        ),
        hidden,
        labels,
    )
    assert parts["metrics"]["oracle"]["miF1"] == pytest.approx(curves["miF1"].max())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ignored_entries_move_no_parameter(reduction):
    changes = {"loss.reduction": reduction, "model.encoder.name": "dense"}
    changes |= {"data.name": "emotions", "loss.cb_weight": 0.0, "model.dropout": 0.0}
    config = running.tiny_config(**changes)
    vectors = np.eye(3, 4, dtype=np.float32)
    meta = dataclasses.replace(
        running.meta(2, vectors),
        inputs={"features": ((2,), "float32")},
        feature_mean=np.zeros(2, np.float32),
        feature_scale=np.ones(2, np.float32),
    )
    model = models.create_model(config, meta)
    params = systems.init_variables(model, 0, meta)["params"]
    tx = optim.make_optimizer(name="sgd", learning_rate=0.1, weight_decay=0.0)
    step = jax.jit(steps.make_train_step(model, config, tx, None, steps_per_epoch=1))
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    rng = np.random.default_rng(0)
    batch = {
        "features": rng.normal(size=(4, 2)).astype(np.float32),
        "labels": rng.integers(0, 2, (4, 3)).astype(np.uint8),
        "ignored": np.array([[True, False, False]] * 4),
        "mask": np.ones(4, bool),
        "rows": np.arange(4, dtype=np.uint32),
    }
    none = thresholds.Rates(0.0, 0.0)
    constants = steps.step_constants(config, None, vectors, none)
    after = [
        step(state, batch | {"labels": batch["labels"] ^ np.array(change, np.uint8)}, c)
        for change in ([[0, 0, 0]], [[1, 0, 0]], [[0, 1, 0]])
        for c in (constants,)
    ]
    leaves = [jax.tree.leaves(s.params) for s, _ in after]
    same = [all(map(np.array_equal, leaves[0], other)) for other in leaves[1:]]
    assert same == [True, False]


def test_constants_and_frozen_modules_stay():
    tree = {
        "encoder": {
            "layer1": {"kernel": jnp.ones(2)},
            "layer2": {"kernel": jnp.ones(2)},
        },
        "feature_mean": jnp.ones(2),
        "readout": jnp.ones(2),
    }
    tx = optim.make_optimizer(
        name="sgd",
        learning_rate=1.0,
        weight_decay=0.1,
        frozen=("layer1", "feature_mean"),
        slow=("encoder", 0.5),
    )
    gradients = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    assert updates["encoder"]["layer1"]["kernel"].tolist() == [0, 0]
    assert updates["feature_mean"].tolist() == [0, 0]
    np.testing.assert_allclose(updates["readout"], -1.1)
    np.testing.assert_allclose(updates["encoder"]["layer2"]["kernel"], -0.55)


def test_order_of_a_seed_is_pinned():
    """A resumed run of an earlier version sees the same batches."""
    source = pipeline.Epochs(split(), 4, [8], seed=0, epochs=1)
    plan = pipeline.plan_batches(
        np.ones(10, int), 4, [8], rngs.generator(0, "order", 1)
    )
    seen = [source[i]["features"][:, 0].tolist() for i in range(3)]
    assert seen == [filled(rows).tolist() for rows in plan.rows]


@pytest.mark.parametrize(
    "key", [{"model.linear_path": True}, {"model.token_dropout": 0.3}]
)
def test_what_is_for_tokens_is_refused_elsewhere(key):
    [name] = key
    running.tiny_config(**key)
    with pytest.raises(config_lib.ConfigError, match=f"{name}=.* dense reads none"):
        running.tiny_config(
            **key, **{"data.name": "emotions", "model.encoder.name": "dense"}
        )
    with pytest.raises(config_lib.ConfigError, match=f"{name}=.* not for lr_knn"):
        running.tiny_config(**key, **{"model.name": "lr_knn"})
