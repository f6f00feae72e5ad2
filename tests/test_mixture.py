"""Mixtures of models: their weights, and the road from config to prediction."""

from __future__ import annotations

import numpy as np
import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import evaluate, fit, mixture, predict, workdirs
from cbmlc_jax import run as run_lib

MIXTURE = {
    "model.name": "mixture",
    "mixture.members": "logistic_regression,cbmlc",
    "logistic_regression.cost": 3.0,
    "loss.name": "forward",
    "loss.cb_weight": 0.0,
    "noise.by_row": True,
    "train.num_epochs": 1,
    "train.crossfit": 2,
}


def test_weights_climb_to_the_best_mixture():
    rng = np.random.default_rng(0)
    truth = rng.random((50, 4)).astype(np.float32)
    errors = rng.normal(size=(3, 50, 4)).astype(np.float32)
    scores = [truth + s * e for s, e in zip((0.2, 0.1, 9.0), errors, strict=True)]

    def value(mixed):
        return -float(np.square(mixed - truth).sum())

    weights, best = mixture.choose(scores, value)
    assert weights == pytest.approx([0.2, 0.8, 0.0], abs=0.051)
    assert sum(weights) == pytest.approx(1) and best > max(map(value, scores))
    assert best == value(mixture.mixed(scores, weights))
    # Nothing to gain: the first of equal members.
    assert mixture.choose([scores[0]] * 2, lambda s: 1.0) == ([1.0, 0.0], 1.0)


@pytest.mark.parametrize(
    "members", ["", "cbmlc", "cbmlc,cbmlc", "cbmlc,mixture", "cbmlc,svm"]
)
def test_members_are_two_or_more_models(members):
    with pytest.raises(config_lib.ConfigError, match="two or more different ones of"):
        running.tiny_config(**{**MIXTURE, "mixture.members": members})


def test_members_keep_what_is_theirs():
    changes = {"mixture.members": "cbmlc,sleec", "model.linear_path": True}
    config = running.tiny_config(**{**MIXTURE, **changes})
    ours, theirs = (config_lib.member(config, n) for n in ("cbmlc", "sleec"))
    assert ours.model.linear_path and ours.noise.by_row
    assert not theirs.model.linear_path and not theirs.noise.by_row
    assert config.noise.by_row and config.model.name == "mixture"


def test_a_mixture_goes_from_config_to_prediction(tmp_path, capsys):
    names = "logistic_regression,mlknn"
    config = running.tiny_config(**{**MIXTURE, "mixture.members": names})
    workdir = str(tmp_path / "run")
    row = fit.train_and_evaluate(config, workdir, "test")
    weights = row["selection"]["settings"]
    assert ",".join(weights) == names
    assert sum(weights.values()) == pytest.approx(1)
    for name in weights:
        alone = np.load(f"{workdir}/members/{name}/out_of_fold.npy")
        run = run_lib.Run(config, workdir, None, run_lib.OutOfFold(alone, [], ""))
        score, _ = evaluate.selection_score(run.validation(None), "corrected_val")
        assert row["selection"]["score"] >= score
    params, _, _ = workdirs.chosen_params(workdir, None)
    some = run.task.test.inputs.take(np.arange(9))
    scores = predict.Predictor(workdir).scores(some)
    expected = sum(
        weights[name] * member.scores(params["members"][name], some)
        for name, member in run.system.members.items()
        if weights[name]
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    run_lib.evaluate_checkpoint(workdir, None, "test")
    assert "exactly" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mixture_without_folds_resumes(tmp_path, monkeypatch):
    changes = {**MIXTURE, "train.crossfit": 0}
    config = running.tiny_config(**changes)
    whole = fit.train_and_evaluate(config, str(tmp_path / "whole"), "")
    broken = str(tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "choose", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit.train_and_evaluate(config, broken, "")
    row = fit.train_and_evaluate(config, broken, "")
    for key in ("metrics", "thresholds", "selection"):
        assert row[key] == whole[key]
    run = run_lib.Run(config, broken)
    params, _, _ = workdirs.chosen_params(broken, None)
    params["weights"] = {"logistic_regression": 0.0, "cbmlc": 1.0}
    some = run.task.test.inputs.take(np.arange(9))
    alone = run.system.members["cbmlc"]
    np.testing.assert_array_equal(
        run.system.scores(params, some),
        alone.scores(params["members"]["cbmlc"], some),
    )
