"""Rates of each row: found where annotators differ, and what is fitted with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import running
import scipy.optimize
import scipy.sparse
from scipy.special import expit

from cbmlc_jax import config as config_lib
from cbmlc_jax import fit, losses, metrics, row_noise, steps, thresholds
from cbmlc_jax import run as run_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.models.baselines import logistic_regression as linear
from cbmlc_jax.models.baselines import lr_knn

ROWS, LABELS = 3000, 80


@pytest.fixture(scope="module")
def annotated():
    """Clean labels, their probabilities, and those of three annotators, in turn."""
    rng = np.random.default_rng(0)
    truth = rng.beta(0.2, 6.0, (ROWS, LABELS))
    clean = rng.random(truth.shape) < truth
    careless, lazy = np.arange(ROWS) % 3 == 0, np.arange(ROWS) % 3 == 1
    noisy = clean ^ (careless[:, None] & (rng.random(truth.shape) < 0.1))
    noisy &= ~(lazy[:, None] & (rng.random(truth.shape) < 0.5))
    real = (noisy & ~clean).sum(1) / (~clean).sum(1)
    return truth, clean, noisy.astype(np.uint8), careless, real


def test_rows_of_a_careless_annotator_are_found(annotated):
    truth, clean, noisy, careless, real = annotated
    p10 = (clean & (noisy == 0)).sum() / clean.sum()
    # What a model of the noisy labels would say of a row that it has not seen.
    mean = real.mean()
    scores = truth * (1 - p10) + (1 - truth) * mean
    found = row_noise.added(scores, noisy, mean)
    assert found.dtype == np.float32 and found.shape == (ROWS,)
    assert np.corrcoef(found, real)[0, 1] > 0.9
    assert found[careless].mean() == pytest.approx(0.1, abs=0.01)
    assert found[~careless].mean() < 0.005


def test_rows_that_are_alike_get_the_common_rate(annotated):
    truth, clean, _, _, _ = annotated
    rng = np.random.default_rng(1)
    for rate in (0.0, 0.05):
        noisy = (clean ^ (rng.random(clean.shape) < rate)).astype(np.uint8)
        scores = truth * (1 - rate) + (1 - truth) * rate
        found = row_noise.added(scores, noisy, rate)
        assert found.mean() == pytest.approx(rate, abs=0.005)
        assert found.std() < 0.02
    order = rng.permutation(ROWS)
    again = row_noise.added(scores[order], noisy[order], rate)
    np.testing.assert_allclose(again, found[order], atol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_the_fit_minimises_the_forward_loss(dense):
    rng = np.random.default_rng(0)
    inputs = scipy.sparse.csr_array((rng.random((300, 6)) < 0.5).astype(np.float32))
    inputs = inputs.toarray() if dense else inputs
    labels = (rng.random((300, 3)) < 0.4).astype(np.uint8)
    labels[:, 2] = 0
    added = np.where(np.arange(300) % 2, 0.3, 0.02).astype(np.float32)
    params = linear.LogisticRegression(2.0).fit(inputs, labels, added)
    z = linear.rescale(params["scale"], inputs)
    z = z if dense else z.toarray()

    def objective(w):
        penalty = (w[:-1] @ w[:-1] + (not dense) * w[-1] ** 2) / 4
        p = expit(z @ w[:-1] + w[-1])
        q = added + (1 - added) * p
        return penalty - np.log(np.where(labels[:, 1], q, 1 - q)).sum()

    mine = np.append(params["weights"][:, 1], params["bias"][1])
    best = scipy.optimize.minimize(objective, mine * 0.9, tol=1e-10)
    assert objective(mine) < best.fun * (1 + 1e-4)
    p = linear.LogisticRegression(2.0).scores(params, inputs)
    q = added + (1 - added) * p[:, 1]
    theirs = losses.forward(
        np.log(p[:, :2] / (1 - p[:, :2])), labels[:, :2] * 1.0, added[:, None], 0.0
    )
    entry = -np.log(np.where(labels[:, 1], q, 1 - q))
    np.testing.assert_allclose(theirs[:, 1], entry, rtol=2e-3)
    assert not params["weights"][:, 2].any(), "a label that is never on"


def test_rows_of_doubt_count_less_in_the_vote():
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6]])
    labels = np.array([[1, 0], [1, 1], [0, 1]], np.uint8)
    query, added = np.array([[1.0, 0.0]]), np.array([0.0, 0.4, 0.0], np.float32)
    vote = lr_knn.cosine_vote(rows, labels, query, 3, added)
    m = labels.mean() - added.mean()
    cosine = np.array([1, 1, 0.8])
    weight = cosine**2 * (1 - added) ** 2 / (added * (1 - added) + m)
    unbiased = (labels - added[:, None]) / (1 - added[:, None])
    expected = weight @ unbiased / weight.sum()
    np.testing.assert_allclose(vote[0], np.clip(expected, 0, 1), rtol=1e-5)
    plain = lr_knn.cosine_vote(rows, labels, query, 3)
    zeros = lr_knn.cosine_vote(rows, labels, query, 3, np.zeros(3, np.float32))
    np.testing.assert_allclose(zeros, plain, rtol=1e-6)


def test_the_rates_reach_the_loss_of_their_rows():
    c = config_lib.base().loss
    c.name = "forward"
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    labels = (rng.random((4, 3)) < 0.4).astype(np.float32)
    added, mask = np.array([0.0, 0.1, 0.2, 0.3], np.float32), np.ones(4, bool)
    rates = thresholds.Rates(0.05, 0.3)
    args = (c, logits, labels, mask, 1, rates, lambda x: x)
    expected = losses.forward(logits, labels, added[:, None], 0.0)
    np.testing.assert_allclose(steps.element_losses(*args, added), expected)
    c.lost_labels = True
    expected = losses.forward(logits, labels, added[:, None], 0.3)
    np.testing.assert_allclose(steps.element_losses(*args, added), expected)
    many = np.array([0.0, 0.1, 0.8, 0.97], np.float32)  # information is left: .05
    lost = np.array([0.3, 0.3, 0.15, 0.0], np.float32)
    expected = losses.forward(logits, labels, many[:, None], lost[:, None])
    np.testing.assert_allclose(steps.element_losses(*args, many), expected, rtol=1e-5)
    for doubt, r1 in (("", 0.3), ("too few", 0.0)):
        unsure = dataclasses.replace(rates, doubt=doubt)
        found = steps.step_constants(config_lib.base(), None, None, unsure)
        assert found["rates"][1] == r1

    split = running_split(added)
    plan = pipeline.plan_batches(split.inputs.lengths, 3, [8])
    source = pipeline.Batches(split.inputs, plan, split)
    for rows, batch in zip(plan.rows, source, strict=True):
        expected = np.where(rows >= 0, added[rows], 0)
        np.testing.assert_array_equal(batch["added"], expected)
    np.testing.assert_array_equal(split.take(np.array([2, 0])).added, added[[2, 0]])


def running_split(added) -> pipeline.Split:
    inputs = pipeline.Ragged.from_rows([[0], [1, 2], [3], [4]])
    return pipeline.Split(inputs, np.zeros((4, 3), np.uint8), added=added)


def test_only_what_fits_with_them_takes_the_rates():
    with pytest.raises(config_lib.ConfigError, match="by_row=True is for .* not for"):
        running.tiny_config(**{"noise.by_row": True})
    running.tiny_config(**{"noise.by_row": True, "loss.name": "forward"})


@pytest.mark.parametrize(
    "name", [pytest.param("cbmlc", marks=pytest.mark.slow), "lr_knn"]
)
def test_a_run_learns_them_from_its_noisy_labels(name, tmp_path):
    changes = {"model.name": name, "loss.name": "forward", "loss.cb_weight": 0.0}
    changes |= {"noise.by_row": True, "train.num_epochs": 1, "noise.known": False}
    config = running.tiny_config(**changes, **{"logistic_regression.cost": 3.0})
    run = run_lib.Run(config, str(tmp_path / "run"))
    added = run.training.added
    task = run.task
    clean = task.dataset.train.labels
    held = np.isin(np.arange(len(clean)), rows_of(task))
    real = ((task.noisy == 1) & (clean == 0)).sum(1) / (clean == 0).sum(1)
    assert np.corrcoef(added, real[held])[0, 1] > 0.8
    part = task_lib.fold(config, task, np.arange(100))
    within = run_lib.Run(config, "", part).training.added
    np.testing.assert_array_equal(within, task.added[100:])
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    assert row["config"]["noise.by_row"] is True
    assert row["metrics"]["corrected_val"]["miF1"] > 0


def rows_of(task) -> np.ndarray:
    """The numbers of the training rows among all."""
    config = running.tiny_config()
    rows, _ = pipeline.split_rows(
        task.noisy,
        fraction=config.data.validation_fraction,
        size=None,
        seed=config.data.split_seed,
        stratified=False,
    )
    return rows


def test_they_help_where_annotators_differ(annotated):
    """Neighbours of the synthetic rows: the vote finds more of the clean labels."""
    truth, clean, noisy, _, real = annotated
    rng = np.random.default_rng(2)
    rows = truth + 0.02 * rng.random(truth.shape)
    half = ROWS // 2
    args = rows[:half], noisy[:half], rows[half:], 25
    plain = lr_knn.cosine_vote(*args)
    found = lr_knn.cosine_vote(*args, real[:half].astype(np.float32))
    score = [metrics.mean_average_precision(s, clean[half:]) for s in (plain, found)]
    assert score[1] > 1.1 * score[0]
