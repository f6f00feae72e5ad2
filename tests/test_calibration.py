"""Calibration and reliability, from labels with known noise."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import running

from cbmlc_jax import calibration, evaluate, fit, noise, predict, thresholds
from cbmlc_jax.decision import Calibration, Decision, logit
from cbmlc_jax.rules import Rule, RuleError
from cbmlc_jax.thresholds import Rates
from experiments import calibration as experiment

RATES = Rates(0.05, 0.3)
NONE = Rates(0.0, 0.0)


@pytest.fixture(scope="module")
def data():
    """Scores, clean labels and noisy ones; true p = sigmoid(1.6 logit(score) - .7)."""
    rng = np.random.default_rng(0)
    scores = rng.beta(0.7, 2.0, (6000, 20)).astype(np.float32)
    p = 1 / (1 + np.exp(-1.6 * logit(scores) + 0.7))
    clean = (rng.random(scores.shape) < p).astype(np.uint8)
    flipped = rng.random(scores.shape) < np.where(clean, RATES.r1, RATES.r0)
    return scores, p, clean, clean ^ flipped


def test_the_truth_is_found_in_noisy_labels(data):
    scores, p, clean, noisy = data
    found = calibration.fit("platt", scores, noisy, RATES)
    assert (found.slope, found.shift) == pytest.approx((1.6, -0.7), abs=0.05)
    naive = calibration.fit("platt", scores, noisy, NONE)
    assert abs(naive.slope - 1.6) > 0.5, "the noise has to matter here"
    mean = calibration.fit("isotonic", scores, noisy, RATES).apply(scores)
    assert np.abs(mean - p).mean() < 0.01 < np.abs(scores - p).mean()
    steep = 1 / (1 + np.exp(-2 * logit(scores)))
    given = np.random.default_rng(1).random(scores.shape) < steep
    temperature = calibration.fit("temperature", scores, given.astype(np.uint8), NONE)
    assert temperature.slope == pytest.approx(2, abs=0.03) and temperature.shift == 0


def test_corrected_ece_is_that_of_the_clean_labels(data):
    scores, p, clean, noisy = data
    true = calibration.reliability(scores, clean, NONE)
    corrected = calibration.reliability(scores, noisy, RATES)
    naive = calibration.reliability(scores, noisy, NONE)
    assert abs(corrected["ece"] - true["ece"]) < 0.004
    assert abs(naive["ece"] - true["ece"]) > 0.01
    assert corrected["share"] == pytest.approx(clean.mean(), abs=0.005)
    assert calibration.reliability(p, noisy, RATES)["ece"] < 0.006 < true["ece"] / 5
    assert [b["entries"] for b in corrected["bins"]] == [
        b["entries"] for b in true["bins"]
    ]
    off = [
        abs(one["share"] - other["share"]) / one["spread"]
        for one, other in zip(corrected["bins"], true["bins"], strict=True)
    ]
    assert 0.3 < np.mean(np.square(off)) ** 0.5 < 2, "spreads that tell the truth"


def test_reliability_by_hand():
    p = np.array([0.0, 0.005, 0.15, 0.19, 0.95, 1.0])
    y = np.array([1, 0, 1, 0, 1, 1])
    found = calibration.reliability(p, y, NONE)
    assert found["entries"] == 5  # the score of 0 is left out
    assert [(b["low"], b["high"]) for b in found["bins"]] == [
        (0, 0.01),
        (0.1, 0.2),
        (0.9, 1),
    ]
    assert [b["share"] for b in found["bins"]] == [0, 0.5, 1]
    ece = (0.005 + 2 * abs(0.17 - 0.5) + 2 * abs(0.975 - 1)) / 5
    assert found["ece"] == pytest.approx(ece, abs=1e-6)


def test_a_calibration_is_judged_on_other_rows(data):
    scores, _, _, noisy = data
    few, labels = scores[:40, :3], noisy[:40, :3]
    inside = calibration.fit("isotonic", few, labels, NONE).apply(few)
    outside = calibration.cross_fitted("isotonic", few, labels, NONE)
    one, other = (calibration.reliability(x, labels, NONE) for x in (inside, outside))
    assert one["ece"] < other["ece"]
    found = calibration.table(scores, noisy, RATES, list("abcdefghijklmnopqrst"))
    assert found["platt"]["ece"] < 0.01 < found["none"]["ece"] / 5
    assert found["isotonic"]["ece"] < 0.01
    assert set(found["none"]["labels"]) == set("abcdefghijklmnopqrst")
    one = calibration.reliability(scores[:, 2], noisy[:, 2], RATES)
    assert found["none"]["labels"]["c"] == one
    assert "corrected" in calibration.report(found, RATES)


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_calibrations_rise_and_survive_json(data, kind):
    scores, _, _, noisy = data
    found = calibration.fit(kind, scores, noisy, RATES)
    grid = found.apply(np.linspace(0, 1, 999))
    assert (np.diff(grid) >= 0).all() and 0 <= grid[0] < 0.1 < 0.7 < grid[-1] <= 1
    decision = Decision(0.5, calibration=found, of_calibrated=True)
    again = Decision.from_json(json.loads(json.dumps(decision.to_json())), 20)
    np.testing.assert_array_equal(again.probabilities(scores), found.apply(scores))
    np.testing.assert_array_equal(again.apply(scores), found.apply(scores) >= 0.5)
    plain = dataclasses.replace(decision, of_calibrated=False)
    np.testing.assert_array_equal(plain.apply(scores), scores >= 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"slope": -1},
        {"slope": "x"},
        {"knots": [[0, 1], [1, 0]]},
        {"knots": 3},
        {"x": 1},
    ],
)
def test_a_damaged_calibration_is_refused(change):
    fields = dataclasses.asdict(Calibration("platt")) | change
    with pytest.raises(ValueError, match="calibration"):
        Calibration.from_json(fields)


def test_calibrated_scores_at_prediction(tmp_path):
    workdir = str(tmp_path / "run")
    config = running.tiny_config(
        **{
            "model.name": "logistic_regression",
            "logistic_regression.cost": 1.0,
            "noise.kind": "ncar",
        }
    )
    row = fit.train_and_evaluate(config, workdir, "test")
    plain = predict.choose(workdir, Rule())
    found = predict.choose(workdir, Rule(calibrate="platt"))
    assert found.threshold == plain.threshold and not found.of_calibrated
    given = predict.choose(workdir, Rule(threshold=0.5, calibrate="platt"))
    assert given.of_calibrated and given.calibration == found.calibration
    scores = np.random.default_rng(0).random((9, 40)).astype(np.float32)
    np.testing.assert_array_equal(found.apply(scores), plain.apply(scores))
    np.testing.assert_array_equal(
        given.apply(scores), given.calibration.apply(scores) >= 0.5
    )
    names = [f"label{i}" for i in range(40)]
    first = next(found.lines(names, scores))
    assert list(first["scores"].values()) == pytest.approx(
        sorted(found.calibration.apply(scores[0]), reverse=True), abs=1e-6
    )
    with pytest.raises(RuleError, match="--calibrate"):
        predict.choose(workdir, Rule(protocol="oracle", calibrate="platt"))
    target = tmp_path / "reliability.json"
    predict.reliability(workdir, "auto", str(target))
    content = json.loads(target.read_text())
    assert content["protocol"] == "corrected_val"
    assert content["reliability"]["none"]["entries"] == 40 * row["rows"]["validation"]


def test_the_experiment_holds_estimates_against_the_clean_labels(data):
    scores, _, clean, noisy = data
    kept = evaluate.Validation(scores, noisy, None, noisy.mean(0), RATES)
    lines = {line["calibration"]: line for line in experiment.compare(kept, clean)}
    assert set(lines) == {"none", *calibration.KINDS}
    for line in lines.values():
        assert abs(line["corrected"] - line["true"]) < 0.006
    assert lines["platt"]["true"] < lines["none"]["true"] / 5
    assert lines["platt"]["noisy"] > 3 * lines["platt"]["true"]


def test_a_reliability_plot_is_the_same_twice(data):
    pytest.importorskip("matplotlib", reason="plots need the package extra report")
    scores, _, clean, noisy = data
    kept = evaluate.Validation(scores, noisy, None, noisy.mean(0), RATES)
    lines = experiment.compare(kept, clean)[:2]
    first, second = (experiment.figure(lines, "run", "svg") for _ in range(2))
    assert first == second and b"<svg" in first
    assert experiment.figure(lines, "run", "png").startswith(b"\x89PNG")


def test_at_least_one_by_hand():
    """.5, 2 and 4 to a mean of 2: 1, 2 a and 4 a are 6 together, a = 5 / 6."""
    found = calibration.at_least_one(np.array([0.5, 2.0, 4.0]), 2.0)
    np.testing.assert_allclose(found, [1, 10 / 6, 20 / 6])


def test_which_labels_are_those_of_which_one_was_kept():
    one, rates = np.eye(4, dtype=np.uint8), Rates(0.0, 0.4)
    assert calibration.one_was_kept(one, rates)
    assert not calibration.one_was_kept(one, Rates(0.01, 0.4))  # labels were added
    assert not calibration.one_was_kept(one, NONE)  # rows have one label and no more
    two, empty = one.copy(), one.copy()
    two[0, 1], empty[0] = 1, 0
    assert not calibration.one_was_kept(two, rates)
    assert not calibration.one_was_kept(empty, rates)  # .25 >= .2: lost one by one
    assert not calibration.one_was_kept(one[:, :1], rates)
    assert not calibration.one_was_kept(0 * one, rates)
    sizes = calibration.row_sizes(np.zeros((4, 4)), one, rates)
    np.testing.assert_allclose(sizes, 1 / 0.6)  # nothing is known of the rows


@pytest.fixture(scope="module")
def kept():
    """Four rows in five have one label, which is easy, the others four, which are not;
    one of each is kept."""
    random = np.random.default_rng(0)
    hard = random.random(4000) < 0.2
    order = random.random((4000, 30)).argsort(1)
    clean = (order < np.where(hard, 4, 1)[:, None]).astype(np.uint8)
    logits = np.where(clean == 1, np.where(hard[:, None], 0.0, 4.0), -4.0)
    scores = 1 / (1 + np.exp(-logits - random.normal(size=clean.shape)))
    noisy = noise.inject(jax.random.key(0), clean, "single_positive")
    rates = Rates(0.0, 1 - noisy.sum() / clean.sum())
    return evaluate.Validation(
        scores, noisy, clean, noisy.mean(0), rates, grid=thresholds.FINE_GRID
    )


def test_sizes_of_rows_of_which_one_label_was_kept(kept):
    sizes = calibration.row_sizes(kept.scores, kept.labels, kept.rates)
    many = kept.clean.sum(1) == 4
    assert sizes.mean() == pytest.approx(1 / kept.rates.information)
    assert sizes[many].mean() > 3 and sizes[~many].mean() < 1.25


def test_rows_of_one_label_do_not_draw_the_threshold_up(kept):
    """Among the highest scores nothing was lost: by a common r1 their corrected share
    of positives is above 1, and the threshold that seems best takes them alone."""
    truth = thresholds.f1_curves(kept.scores, kept.clean, kept.grid)["miF1"]
    by_size = kept.curves("corrected_val")[0]["miF1"]
    by_r1 = thresholds.corrected_curves(
        kept.scores, kept.labels, kept.prior, kept.rates, kept.grid
    )["miF1"]
    score, _ = evaluate.selection_score(kept, "corrected_val")
    assert score == by_r1.max() != by_size.max()
    assert truth[by_size.argmax()] > truth.max() - 0.02
    assert truth[by_r1.argmax()] < truth.max() - 0.05


def test_probabilities_where_one_label_was_kept(kept):
    """Those of hard labels are nearer to the truth than by a common r1."""
    found = kept.calibrate("isotonic", "corrected_val").apply(kept.scores)
    by_r1 = calibration.fit("isotonic", kept.scores, kept.labels, kept.rates)
    middle = (kept.scores > 0.2) & (kept.scores < 0.8)
    share = kept.clean[middle].mean()
    assert found[middle].mean() > share - 0.2
    assert by_r1.apply(kept.scores)[middle].mean() < share - 0.4
