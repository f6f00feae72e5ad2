"""Stacks: the label graph over scores of other models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import evaluate, fit, losses, models, predict, systems, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.decision import logit
from cbmlc_jax.models.stack import scores_to_logits

STACK = {
    "model.name": "stack",
    "stack.members": "logistic_regression,mlknn",
    "logistic_regression.cost": 3.0,
    "loss.name": "forward",
    "noise.by_row": True,
    "train.num_epochs": 2,
    "train.crossfit": 2,
}


def told(rows: int = 6, labels: int = 5, members: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.random((rows, labels, members)).astype(np.float32)


def stack(vectors: np.ndarray, **changes):
    config = running.tiny_config(**{**STACK, **changes})
    return models.create_model(config, running.meta(9, vectors))


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)


def test_logits_of_scores_are_finite():
    scores = np.array([0, 0.25, 0.5, 1], np.float32)
    logits = np.asarray(scores_to_logits(scores))
    np.testing.assert_allclose(logits[1:3], [-np.log(3), 0], atol=1e-6)
    np.testing.assert_allclose(logits[[0, 3]], [-np.log(999), np.log(999)], rtol=1e-5)


def test_training_starts_at_the_mean_of_the_logits(vectors):
    model, scores = stack(vectors), told()
    params = model.init(jax.random.key(0), {"scores": scores})
    logits = model.apply(params, {"scores": scores}).logits
    expected = scores_to_logits(scores).mean(-1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def drawn(model, scores):
    """Parameters of which none is at its start."""
    params = model.init(jax.random.key(0), {"scores": scores})
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) / 3, params)


def test_a_label_hears_of_the_others_through_the_graph_alone(vectors):
    model, scores = stack(vectors), told()
    params = drawn(model, scores)
    changed = scores.copy()
    changed[:, 3] = 1 - changed[:, 3]
    graph = np.eye(5, dtype=bool)
    graph[1, 3] = True

    def difference(graph):
        one, two = (
            model.apply(params, {"scores": s}, graph).logits for s in (scores, changed)
        )
        return np.abs(one - two).max(0)

    moved = difference(graph)
    assert (moved[[0, 2, 4]] < 1e-6).all() and (moved[[1, 3]] > 1e-3).all()
    assert (difference(None) > 1e-3).all()


def test_labels_in_another_order_are_logits_in_that_order(vectors):
    model, scores = stack(vectors), told()
    params = drawn(model, scores)
    order = np.array([3, 0, 4, 1, 2])
    inner = params["params"]
    moved = inner | {
        "readout": inner["readout"][order],
        "decoder": inner["decoder"]
        | {"label_embeddings": inner["decoder"]["label_embeddings"][order]},
    }
    one = model.apply(params, {"scores": scores}).logits
    two = model.apply({"params": moved}, {"scores": scores[:, order]}).logits
    np.testing.assert_allclose(two, one[:, order], atol=1e-5)


def test_scores_near_0_and_1_have_finite_gradients(vectors):
    model, scores = stack(vectors), told()
    scores[0, 0], scores[1, 1] = 0, 1
    params = drawn(model, scores)

    def loss(params):
        logits = model.apply(params, {"scores": scores}).logits
        return losses.forward(logits, jnp.ones(logits.shape), 0.1, 0.3).sum()

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def test_rows_of_scores_are_inputs():
    inner = pipeline.Ragged.from_rows([[1], [0, 2], [2]])
    inputs = pipeline.Scored(inner, told(3))
    assert len(inputs) == 3 and (inputs.lengths == 1).all()
    batch = inputs.batch(np.array([2, 0, -1]), 8)["scores"]
    np.testing.assert_array_equal(batch, inputs.scores[[2, 0, 2]])
    taken = inputs.take(np.array([1, 1]))
    assert (taken.matrix(3).toarray() == [[1, 0, 1]] * 2).all()
    np.testing.assert_array_equal(taken.scores, inputs.scores[[1, 1]])
    other = pipeline.Scored(inner, inputs.scores + 1)
    assert list(inputs.content())[:-1] == list(other.content())[:-1]
    assert list(inputs.content()) != list(other.content())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"stack.members": ""}, "one or more different ones of kernel_ridge"),
        ({"stack.members": "lr_knn,cbmlc"}, "one or more different ones"),
        ({"stack.members": "sleec,sleec"}, "one or more different ones"),
        ({"train.crossfit": 0}, "set config.train.crossfit=5"),
        ({"loss.name": "asl"}, "by_row=True is for .* stack with asl"),
        ({"model.linear_path": True}, "linear_path=True is for cbmlc and lamp"),
    ],
)
def test_settings_of_a_stack(changes, words):
    with pytest.raises(config_lib.ConfigError, match=words):
        running.tiny_config(**{**STACK, **changes})


def test_a_stack_goes_from_config_to_prediction(tmp_path, capsys, monkeypatch):
    config = running.tiny_config(**STACK)
    workdir = str(tmp_path / "run")
    with monkeypatch.context() as patch:  # killed after the members
        patch.setattr(systems, "scored", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit.train_and_evaluate(config, workdir, "test")
    row = fit.train_and_evaluate(config, workdir, "test")
    # It has learnt: above the mean of the members' logits, out of fold and on test.
    names = config_lib.members(config)
    alone = [np.load(f"{workdir}/members/{name}/out_of_fold.npy") for name in names]
    mean = np.asarray(jax.nn.sigmoid(scores_to_logits(np.stack(alone, -1)).mean(-1)))
    run = run_lib.Run(config, workdir, None, run_lib.OutOfFold(mean, [], ""))
    before, _ = evaluate.selection_score(run.validation(None), "corrected_val")
    assert row["selection"]["score"] > before
    assert row["embeddings"]["source"] == "dataset"
    assert "label_embeddings" in row["details"]
    params, best, history = workdirs.chosen_params(workdir, None)
    assert best == row["epoch"] == 1
    assert [line["selection"] for line in history] == [
        {key: row["selection"][key] for key in ("rule", "score")}
    ]
    some = run.task.test.inputs.take(np.arange(9))
    scores = predict.Predictor(workdir).scores(some)
    members = []
    for name, member in run.system.members.items():
        slope, shift = params["calibration"][name]
        logits = logit(member.scores(params["members"][name], some))
        members.append(jax.nn.sigmoid(slope * logits + shift))
    model, inputs = models.create_model(config, run.task.meta), np.stack(members, -1)
    assert list(params["stack"]) == ["1", "2"]
    by_hand = [
        jax.nn.sigmoid(model.apply(top, {"scores": inputs}).logits)
        for top in params["stack"].values()
    ]
    assert np.abs(by_hand[0] - by_hand[1]).max() > 1e-3
    np.testing.assert_allclose(scores, np.mean(by_hand, 0), rtol=1e-4, atol=1e-6)
    before = {"members": params["members"], "stack": params["stack"]["1"]}
    with pytest.raises(systems.VariablesError, match="before 0.3.0: train it again"):
        run.system.scores(before, some)
    run_lib.evaluate_checkpoint(workdir, None, "test")
    assert "exactly" in capsys.readouterr().out
