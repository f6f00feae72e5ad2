"""Rules that choose labels at predict time, and what a run keeps for them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import running

from cbmlc_jax import evaluate, fit, predict, rules, thresholds, validation, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax.decision import Calibration, Decision, expected_per_row
from cbmlc_jax.rules import Rule, RuleError
from cbmlc_jax.thresholds import Rates


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("rules") / "run")
    config = running.tiny_config(**{"train.num_epochs": 2, "noise.kind": "ncar"})
    return workdir, fit.train_and_evaluate(config, workdir, "test")


def noisy_scores(rates: Rates, rows=4000, seed=0):
    """Scores that are true probabilities, clean labels drawn by them, noisy labels."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(0.2, 1.5, (rows, 20)).astype(np.float32)
    clean = (rng.random(scores.shape) < scores).astype(np.uint8)
    flip = rng.random(scores.shape) < np.where(clean, rates.r1, rates.r0)
    return scores, clean, clean ^ flip


SAME = Calibration("platt")
SCORES = np.array([[0.9, 0.2, 0.6, 0.6], [0.1, 0.2, 0.3, 0.2]], np.float32)


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        (Decision(0.6), [[0, 2, 3], []]),  # float32(.6) reaches it, being above .6
        (Decision(0.5, min_labels=1), [[0, 2, 3], [2]]),
        (Decision(0.5, max_labels=2), [[0, 2], []]),
        (Decision(0.5, min_labels=2, max_labels=2), [[0, 2], [1, 2]]),
        (Decision(0.0, max_labels=1), [[0], [2]]),
        (Decision(np.array([1.0, 0.1, 0.1, 0.6])), [[1, 2, 3], [1, 2]]),
        # Those that reach their threshold stand before those that do not.
        (Decision(np.array([1.0, 0.1, 1.0, 0.6]), max_labels=1), [[3], [1]]),
        (Decision(np.array([1.0, 0.1, 1.0, 1.0]), min_labels=2), [[0, 1], [1, 2]]),
        # .9 / (1 + 2.3) < (.9 + .6) / (2 + 2.3) < (.9 + .6 + .6) / (3 + 2.3), which is
        # more than 2.3 / (4 + 2.3).
        (Decision(None, calibration=SAME, of_calibrated=True), [[0, 2, 3], [1, 2, 3]]),
        (
            Decision(None, max_labels=2, calibration=SAME, of_calibrated=True),
            [[0, 2], [1, 2]],
        ),
    ],
)
def test_a_decision_says(decision, said):
    found = [np.flatnonzero(row).tolist() for row in decision.apply(SCORES)]
    assert found == said
    again = Decision.from_json(json.loads(json.dumps(decision.to_json())), 4)
    np.testing.assert_array_equal(again.apply(SCORES), decision.apply(SCORES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": [0.1]}, "those of 4 labels"),
        ({"threshold": "0.1"}, "no number"),
        ({"threshold": True}, "no number"),
        ({"threshold": float("nan")}, "not finite"),
        ({"max_labels": 1.5}, "whole"),
        ({"other": 1}, "fields"),
        ({"threshold": None}, "neither a threshold nor"),
        ({"threshold": None, "of_calibrated": True}, "neither a threshold nor"),
    ],
)
def test_a_damaged_decision_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Decision.from_json(Decision(0.5).to_json() | change, 4)


def test_the_labels_of_a_row_have_the_best_expected_f1():
    """Against all sets of labels; ties in p go together with the better score."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.4, 1.0, (40, 7)).round(2)
    p[0] = 0
    found = expected_per_row(p, p)
    assert found[0].tolist() == [True] + 6 * [False]

    def value(row, said):
        return 2 * row[said].sum() / (said.sum() + row.sum())

    sets = [np.array(s, bool) for s in itertools.product([0, 1], repeat=7) if any(s)]
    for row, said in zip(p[1:], found[1:], strict=True):
        assert value(row, said) == pytest.approx(max(value(row, s) for s in sets))


def test_ignored_entries_are_not_said():
    scores = np.array([[0.9, 0.0, 0.0]], np.float32)
    likely = Calibration("isotonic", knots=((0.0, 0.8), (1.0, 1.0)))
    found = Decision(None, calibration=likely, of_calibrated=True).apply(scores)
    assert found.tolist() == [[True, False, False]]


def test_expected_f1_beats_one_threshold_at_its_own_metric():
    """Scores that are true probabilities, raised to a power: calibration finds them."""
    rates = Rates(0.02, 0.3)
    p, clean, noisy = noisy_scores(rates)
    test, labels, _ = noisy_scores(rates, seed=1)
    found = evaluate.Validation(np.sqrt(p), noisy, clean, noisy.mean(0), rates)
    parts, warnings = evaluate.protocols(found, np.sqrt(test), labels)
    one = parts["metrics"]["corrected_val"]
    expected = parts["expected_f1_metrics"]["corrected_val"]
    assert not warnings
    assert expected["per_row"]["ebF1"] > one["ebF1"] + 0.005
    assert expected["per_label"]["miF1"] > one["miF1"] - 0.01
    corrected = found.calibrate("isotonic", "corrected_val").apply(np.sqrt(test))
    assert np.abs(corrected - test).mean() < 0.01
    taken = found.calibrate("isotonic", "noisy_val").apply(np.sqrt(test))
    assert np.abs(taken - test).mean() > 0.03


def test_the_run_keeps_what_its_thresholds_were_chosen_on(trained):
    workdir, row = trained
    kept = validation.read(workdir)
    for protocol in ("noisy_val", "corrected_val"):
        curves, used = kept.curves(protocol)
        assert used == protocol
        assert thresholds.choose(curves, kept.grid) == row["thresholds"][protocol]
    run = run_lib.Run(workdirs.trained_config(workdir), workdir)
    params, _, _ = workdirs.chosen_params(workdir, run.system.like)
    fresh = run.validation(params)
    np.testing.assert_array_equal(kept.scores, fresh.scores)
    np.testing.assert_array_equal(kept.labels, fresh.labels)
    per_label = predict.choose(workdir, Rule(per_label=True))
    np.testing.assert_array_equal(per_label.threshold, fresh.per_label("corrected_val"))
    assert len(set(per_label.threshold)) > 1
    per_row = predict.choose(workdir, Rule(per_row=True))
    assert per_row.calibration == fresh.calibrate("isotonic", "corrected_val")
    assert per_row.apply(fresh.scores).sum(1).min() == 1
    platt = predict.choose(workdir, Rule(per_row=True, calibrate="platt"))
    assert platt.calibration.kind == "platt" and platt.threshold is None


def test_cross_fitted_scores_are_kept_once(tmp_path):
    config = running.tiny_config(
        **{
            "model.name": "logistic_regression",
            "logistic_regression.cost": 1.0,
            "train.crossfit": 2,
        }
    )
    row = fit.train_and_evaluate(config, str(tmp_path), "test")
    with np.load(tmp_path / validation.NAME) as kept:
        assert "scores" not in kept.files
    found = validation.read(str(tmp_path))
    curves, _ = found.curves("noisy_val")
    assert thresholds.choose(curves, found.grid) == row["thresholds"]["noisy_val"]


def test_ignored_entries_stay_out_of_cross_fitted_scores(tmp_path):
    scores = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    ignored = scores > 0.5
    np.save(tmp_path / validation.OUT_OF_FOLD, scores)
    found = evaluate.Validation(
        scores, np.eye(5, 3, dtype=np.uint8), None, np.ones(3) / 2, Rates(0.1, 0.2)
    )
    validation.write(str(tmp_path), found, ignored)
    read = validation.read(str(tmp_path))
    np.testing.assert_array_equal(read.scores, np.where(ignored, 0, scores))
    np.testing.assert_array_equal(read.labels, found.labels)
    assert read.rates == found.rates


def test_precision_is_that_of_the_clean_labels():
    rates = Rates(0.05, 0.2)
    scores, clean, noisy = noisy_scores(rates)
    threshold, found = rules.at_precision(scores, noisy, rates, 0.8)
    true = clean[scores >= threshold].mean()
    assert abs(found["precision"] - true) < 0.02
    assert 0.8 <= found["at_least"] < found["precision"]
    assert true >= 0.8
    below = [t for t in rules.PRECISION_GRID if t < threshold]
    # Lower ones do not reach it, so that no label was given away.
    assert clean[scores >= below[-10]].mean() < 0.82
    taken = rules.at_precision(scores, noisy, Rates(0.0, 0.0), 0.6)[0]
    corrected = rules.at_precision(scores, noisy, rates, 0.6)[0]
    assert taken > corrected + 0.1, "noisy labels look like a lower precision"


def test_few_entries_promise_little():
    scores = np.full((500, 1), 0.1, np.float32)
    labels = np.zeros((500, 1), np.uint8)
    scores[:5], labels[:5] = 0.9, 1
    with pytest.raises(RuleError, match=r"0\.753 \(estimate 1\.000, 5 entries\)"):
        rules.at_precision(scores, labels, Rates(0.0, 0.0), 0.8)
    threshold, found = rules.at_precision(scores, labels, Rates(0.0, 0.0), 0.75)
    assert threshold == 0.105 and found["entries"] == 5
    with pytest.raises(RuleError, match="--precision=0$"):
        rules.at_precision(0 * scores, labels, Rates(0.0, 0.0), 0.5)


def test_rules_that_contradict_themselves(trained):
    workdir, _ = trained
    for rule, message in (
        (Rule(threshold=0.1, per_label=True), "--threshold and --per_label"),
        (Rule(per_label=True, precision=0.1), "--per_label and --precision"),
        (Rule(per_label=True, per_row=True), "--per_label and --per_row"),
        (Rule(per_row=True, protocol="clean_val"), "--per_row is chosen on"),
        (Rule(min_labels=3, max_labels=2), "--min_labels=3"),
        (Rule(precision=0.1, protocol="oracle"), "--protocol=corrected_val"),
    ):
        with pytest.raises(RuleError, match=message):
            predict.choose(workdir, rule)


def test_an_unusable_estimate_is_not_used_for_precision(trained):
    workdir, row = trained
    doubtful = row | {"rates": row["rates"] | {"doubt": "too few"}}
    kept = validation.read(workdir)
    kept = dataclasses.replace(
        kept, rates=dataclasses.replace(kept.rates, doubt="too few")
    )
    with pytest.warns(UserWarning, match="noisy_val"):
        found = rules.choose(Rule(precision=0.01), doubtful, kept)
    assert found.chosen["protocol"] == "noisy_val"
    expected = rules.at_precision(kept.scores, kept.labels, Rates(0.0, 0.0), 0.01)
    assert found.threshold == expected[0]


def test_partial_rates_are_kept_and_used(trained, tmp_path):
    workdir, row = trained
    rates = Rates(0.01, 0.0, "estimated", "few anchors", partial=True)
    kept = dataclasses.replace(validation.read(workdir), rates=rates)
    validation.write(str(tmp_path), kept, None)
    assert validation.read(str(tmp_path)).rates == rates
    row = row | {"rates": dataclasses.asdict(rates)}
    assert rules.protocol_of("auto", row) == "corrected_val"
    _, warnings = evaluate.choose(dataclasses.replace(kept, clean=kept.labels))
    assert len(warnings) == 1
    assert "(few anchors) and counts as 0 in corrected_val" in warnings[0]


def test_a_workdir_without_validation_scores(trained, tmp_path):
    workdir, _ = trained
    for name in ("results.jsonl", "config.json"):
        (tmp_path / name).write_bytes(
            open(f"{workdir}/{name}", "rb").read()  # noqa: SIM115
        )
    for content in (
        None,
        b"no zip",
        open(f"{workdir}/validation.npz", "rb").read()[:-9],
    ):
        if content is not None:
            (tmp_path / validation.NAME).write_bytes(content)
        with pytest.raises(validation.ValidationError, match="--mode=eval"):
            predict.choose(str(tmp_path), Rule(per_label=True))


def test_the_command_line_states_a_rule(trained, tmp_path):
    workdir, _ = trained
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"features": [1, 5]}\n{"features": [7]}\n')
    words = ["--mode=predict", f"--workdir={workdir}", f"--input={source}"]
    done = running.main(
        *words, f"--output={target}", "--min_labels=2", "--max_labels=2"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    for row in rows:
        assert row["labels"] == list(row["scores"])[:2]
    done = running.main(*words, "--precision=1")
    running.assert_one_sentence(done, "no threshold promises a precision of 1", "best")
