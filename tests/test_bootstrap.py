"""The bootstrap against every draw that there is, and against the metrics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cbmlc_jax import metrics, rngs
from cbmlc_jax.details import Predictions
from experiments import bootstrap


def predictions(seed: int, rows: int, labels: int = 4) -> Predictions:
    """Other predictions for each seed, of the same rows."""
    truth = np.random.default_rng(99).random((rows, labels)) < 0.4
    truth[0] = False
    rng = np.random.default_rng(seed)
    predicted = {n: rng.random((rows, labels)) < 0.4 for n in metrics.F1_NAMES}
    predicted["ebF1"][0] = False  # 0/0, to be left out of the mean
    return Predictions(truth, predicted)


def scored(run: Predictions, drawn: np.ndarray) -> dict[str, float]:
    """The F1s of the drawn rows, by the metrics themselves."""
    return {
        name: metrics.f1_scores(metrics.count(p[drawn], run.labels[drawn]))[name]
        for name, p in run.predicted.items()
    }


def test_each_draw_is_scored_as_the_metrics_score_it():
    runs = [predictions(0, 30), predictions(1, 30)]
    found = bootstrap.resampled(runs, 20, seed=3)
    drawn = rngs.generator(3, "bootstrap").integers(30, size=(20, 30))
    for name in metrics.F1_NAMES:
        wanted = [np.mean([scored(run, d)[name] for run in runs]) for d in drawn]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12)


@pytest.mark.parametrize("name", metrics.F1_NAMES)
def test_the_distribution_is_that_of_all_draws(name):
    """Of 4 rows there are 256 draws: their differences, each as often as it comes."""
    ours, other = predictions(0, 4), predictions(1, 4)
    every = np.array(
        [
            scored(ours, np.array(d))[name] - scored(other, np.array(d))[name]
            for d in itertools.product(range(4), repeat=4)
        ]
    )
    number = 20_000
    a, b = (bootstrap.resampled([run], number)[name] for run in (ours, other))
    c = bootstrap.compare(0.0, a, b)
    values, counts = np.unique(np.round(every, 9), return_counts=True)
    for value, count in zip(values, counts, strict=True):
        share = count / len(every)
        got = np.isclose(a - b, value, atol=1e-8).mean()
        assert abs(got - share) < 4.5 * np.sqrt(share * (1 - share) / number)
    # "inverted_cdf" has no interpolation: the interval ends at values that occur.
    low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    assert (c.low, c.high) == pytest.approx((low, high), abs=1e-9)
    tail = min((every <= 0).mean(), (every >= 0).mean())
    assert c.p == pytest.approx(min(1, 2 * tail), abs=0.02)


def test_a_system_is_no_better_than_itself_and_a_perfect_one_is():
    run = predictions(0, 50)
    drawn = bootstrap.resampled([run], 500)
    same = bootstrap.compare(0.0, drawn["miF1"], drawn["miF1"])
    assert (same.low, same.high, same.p) == (0, 0, 1)
    perfect = Predictions(run.labels, dict.fromkeys(metrics.F1_NAMES, run.labels))
    best = bootstrap.resampled([perfect], 500)["miF1"]
    c = bootstrap.compare(1 - scored(run, np.arange(50))["miF1"], best, drawn["miF1"])
    assert 0 < c.low < c.difference < c.high and c.p == pytest.approx(2 / 501)


def test_draws_are_the_seeds_and_not_the_chunks(monkeypatch):
    run = predictions(0, 40)
    whole = bootstrap.resampled([run], 100)
    assert (whole["maF1"] == bootstrap.resampled([run], 100)["maF1"]).all()
    assert (whole["maF1"] != bootstrap.resampled([run], 100, seed=1)["maF1"]).any()
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 7 * 40)
    for name, values in bootstrap.resampled([run], 100).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)
