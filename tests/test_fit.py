"""Estimators and cross-fitting through the one road to a result row."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
import running
import scipy.sparse

from cbmlc_jax import config as config_lib
from cbmlc_jax import (
    files,
    fit,
    limits,
    models,
    predict,
    results,
    rules,
    train,
    workdirs,
)
from cbmlc_jax import run as run_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.models import baselines
from cbmlc_jax.models.baselines.logistic_regression import LogisticRegression
from cbmlc_jax.models.baselines.lr_knn import LRkNN


def estimator_config(name: str, **changes):
    config = running.tiny_config(**{"model.name": name, "noise.kind": "ncar"})
    config.update_from_flattened_dict(changes)
    config_lib.validate(config)
    return config


def test_every_name_of_the_config_is_in_one_registry():
    names = set(config_lib.CHOICES["model.name"])
    assert names == set(models.MODELS) | set(baselines.ESTIMATORS) | {"mixture"}
    assert set(limits.FITTED) == set(baselines.ESTIMATORS)
    assert not set(models.MODELS) & set(baselines.ESTIMATORS)
    assert {key.partition("/")[0] for key in config_lib.PUBLISHED} <= names


def test_published_settings_stand_between_file_and_command_line():
    config = config_lib.base()
    config.model.name, config.optim.beta2 = "lamp", 0.5
    config_lib.apply_published(config, {"optim.beta2"})
    assert config.optim.beta2 == 0.5 and config.loss.name == "bce"
    done = running.main(
        "--config.model.name=lamp", "--mode=eval", "--workdir=no-such-run"
    )
    running.assert_one_sentence(done, "no-such-run holds no run")


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "linear"
    fit.train_and_evaluate(estimator_config("logistic_regression"), str(workdir), "")
    return workdir


def test_validation_chooses_the_cost(searched):
    history = files.read_jsonl(str(searched / "metrics.jsonl"))
    [row] = files.read_jsonl(str(searched / "results.jsonl"))
    assert [h["settings"]["cost"] for h in history] == list(baselines.COSTS)
    best = max(history, key=lambda h: h["selection"]["score"])
    assert row["selection"]["settings"] == best["settings"]
    assert row["selection"]["rule"] == "corrected_val"
    assert row["embeddings"] is None
    assert (
        f"cost {best['settings']['cost']:g}, chosen by"
        in (searched / "report.txt").read_text()
    )


def test_an_estimator_is_evaluated_again_and_predicts(searched, tmp_path):
    copy = pathlib.Path(shutil.copytree(searched, tmp_path / "copy"))
    [row] = files.read_jsonl(str(copy / "results.jsonl"))
    again = run_lib.evaluate_checkpoint(str(copy), None, "eval")
    for key in set(row) - set(results.PROVENANCE):
        assert row[key] == again[key], key
    run = run_lib.Run(config_lib.restore(workdirs.saved_config(str(copy))), str(copy))
    predictor = predict.Predictor(str(copy))
    some = run.task.test.inputs.take(np.arange(5))
    scores = predictor.scores(some)
    assert scores.shape == (5, 40) and np.ptp(scores) > 0.1
    # The same numbers as scikit-learn's, from the fit to the checkpoint and back.
    cost = row["selection"]["settings"]["cost"]
    model = LogisticRegression(cost)
    train_rows = run.system.inputs(run.task.train.inputs)
    fresh = model.fit(train_rows, run.task.train.labels)
    np.testing.assert_allclose(
        scores, model.scores(fresh, run.system.inputs(some)), rtol=1e-5
    )


def test_folds_cut_every_row_once():
    parts = fit.folds(23, 5, 0)
    assert sorted(np.concatenate(parts)) == list(range(23))
    assert {len(p) for p in parts} == {4, 5}
    assert any((a != b).any() for a, b in zip(parts, fit.folds(23, 5, 1), strict=True))


def test_a_fold_learns_nothing_from_its_rows():
    """Other labels on the held-out rows leave all that a fold learns from as it is."""
    config = estimator_config(
        "lamp",
        **{
            "train.crossfit": 5,
            "model.label_graph": "cooccurrence",
            "embeddings.source": "random",
        },
    )
    task = task_lib.build(config)
    held_out = fit.folds(len(task.noisy), 5, 0)[2]
    noisy = task.noisy.copy()
    noisy[held_out] = 1
    changed = dataclasses.replace(task, noisy=noisy)
    one, two = (task_lib.fold(config, t, held_out) for t in (task, changed))
    np.testing.assert_array_equal(one.train.labels, two.train.labels)
    np.testing.assert_array_equal(one.prior, two.prior)
    assert (one.graph != two.graph).nnz == 0
    np.testing.assert_array_equal(one.meta.label_counts, two.meta.label_counts)
    assert one.meta.max_labels == two.meta.max_labels
    assert (two.validation.labels == 1).all()
    assert len(one.train) + len(one.validation) == len(task.noisy)


def test_cross_fitting_an_estimator(tmp_path):
    config = estimator_config("lr_knn", **{"train.crossfit": 3})
    workdir = tmp_path / "run"
    row = fit.train_and_evaluate(config, str(workdir), "test")
    scores = np.load(workdir / "out_of_fold.npy", allow_pickle=False)
    task = task_lib.build(config)
    assert scores.shape == task.noisy.shape
    assert row["rows"]["train"] == row["rows"]["validation"] == len(task.noisy)
    # Fold 2, by hand: fit on the others with the setting that its validation chose.
    held_out = fit.folds(len(task.noisy), 3, config.data.split_seed)[1]
    others = np.setdiff1d(np.arange(len(task.noisy)), held_out)
    history = files.read_jsonl(str(workdir / "folds" / "2" / "metrics.jsonl"))
    best = max(history, key=lambda h: h["selection"]["score"])["settings"]["cost"]
    model = LRkNN(best, 25, 0.3)
    size = len(task.dataset.feature_names)
    params = model.fit(
        task.dataset.train.inputs.take(others).matrix(size), task.noisy[others]
    )
    mine = model.scores(params, task.dataset.train.inputs.take(held_out).matrix(size))
    np.testing.assert_allclose(scores[held_out], mine, atol=1e-6)
    # The setting of the last fit is the best on the mean over folds.
    curves = [
        [h["selection"]["score"] for h in files.read_jsonl(str(p))]
        for p in sorted((workdir / "folds").glob("*/metrics.jsonl"))
    ]
    number = int(np.argmax(np.mean(curves, 0))) + 1
    assert row["epoch"] == number
    assert row["selection"]["score"] == pytest.approx(np.mean(curves, 0)[number - 1])
    again = run_lib.evaluate_checkpoint(str(workdir), None, "eval")
    for key in set(row) - set(results.PROVENANCE):
        assert row[key] == again[key], key


def test_cross_fitting_a_neural_model_resumes(tmp_path, monkeypatch):
    """Stopped in the second fold, started again: the same row as without the stop."""
    changes = {"train.crossfit": 2, "train.num_epochs": 2}
    config = running.tiny_config(**changes, **running.HALF)
    straight = fit.train_and_evaluate(config, str(tmp_path / "straight"), "test")
    calls, real = [], train.fit

    def stops(runs, stores):
        calls.append(runs[0].workdir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(runs, stores)

    monkeypatch.setattr(train, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        fit.train_and_evaluate(config, str(tmp_path / "stopped"), "test")
    resumed = fit.train_and_evaluate(config, str(tmp_path / "stopped"), "test")
    assert straight["metrics"] == resumed["metrics"]
    assert straight["epoch"] == resumed["epoch"]
    histories = [
        files.read_jsonl(str(p))
        for p in sorted((tmp_path / "straight" / "folds").glob("*/metrics.jsonl"))
    ]
    curve = np.mean([[h["selection"]["score"] for h in x] for x in histories], 0)
    assert straight["epoch"] == int(np.argmax(curve)) + 1
    last = files.read_jsonl(str(tmp_path / "straight" / "metrics.jsonl"))
    assert len(last) == straight["epoch"]
    assert last[-1]["selection"]["score"] == pytest.approx(curve[len(last) - 1])


def test_one_fold_is_no_cross_fitting():
    with pytest.raises(config_lib.ConfigError, match="crossfit=1 leaves no row"):
        estimator_config("lr_knn", **{"train.crossfit": 1})


def test_initial_parameters_are_those_of_the_seed():
    config = running.tiny_config()
    meta = running.meta(11, np.eye(4, 8, dtype=np.float32))
    trees = [
        running.init_params(models.create_model(config, meta), seed, 4)
        for seed in (0, 0, 1)
    ]
    first, same, other = (t["encoder"]["embedding"] for t in trees)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


# Sizes that compile fast; the pinned number of parameters of each.
SMALL = {
    "cbmlc": {},
    "lamp": {"model.label_graph": "cooccurrence", "embeddings.source": "random"},
    "ml_gcn": {
        "model.label_graph": "correlation",
        "ml_gcn.hidden": 8,
        "ml_gcn.width": 12,
    },
    "mpvae": {"mpvae.latent_width": 4, "mpvae.samples": 3},
    "seq2seq": {
        "seq2seq.encoder_width": 8,
        "seq2seq.decoder_width": 8,
        "seq2seq.token_width": 8,
        "seq2seq.label_width": 8,
        "seq2seq.beam": 2,
    },
    "kernel_ridge": {"kernel_ridge.penalty": 1.0},
    "label_prior": {},
    "logistic_regression": {"logistic_regression.cost": 10.0},
    "lr_knn": {"logistic_regression.cost": 10.0},
    "mlknn": {},
    "sleec": {"sleec.dimension": 10},
}
PARAMS = {
    "cbmlc": 6_352,
    "lamp": 5_136,
    "ml_gcn": 5_360,
    "mpvae": 1_004_704,
    "seq2seq": 6_313,
    "kernel_ridge": 202_474,
    "label_prior": 40,
    "logistic_regression": 16_440,
    "lr_knn": 117_673,
    "mlknn": 102_153,
    "sleec": 68_660,
}


SLOW = ("cbmlc", "lamp", "mpvae", "seq2seq")


@pytest.mark.parametrize(
    "name",
    [
        # CbMLC is what test_train.py and test_predict.py train, LaMP is that with other
        # settings; the other two have test files of their own.
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in sorted(SMALL)
    ],
)
def test_every_model_goes_from_config_to_prediction(name, tmp_path):
    """One road: fit, checkpoint, row, predict from the workdir alone."""
    changes = {"model.name": name, "train.num_epochs": 1, "loss.cb_weight": 0.0}
    config = running.tiny_config(**changes | SMALL[name])
    workdir = str(tmp_path / "run")
    row = fit.train_and_evaluate(config, workdir, "test")
    assert row["model"] == name and row["params"] == PARAMS[name]
    assert row["metrics"]["oracle"]["miF1"] > 0
    assert ("decoded_metrics" in row) == (name in ("seq2seq", "mlknn"))
    run = run_lib.Run(config, workdir)
    params, _, _ = workdirs.chosen_params(workdir, run.system.like)
    some = run.task.test.inputs.take(np.arange(9))
    scores = predict.Predictor(workdir).scores(some)
    np.testing.assert_array_equal(scores, run.system.scores(params, some))
    assert np.isfinite(scores).all() and scores.shape == (9, 40)
    if name == "ml_gcn":  # constants, which predict has from the checkpoint
        np.testing.assert_array_equal(
            params["params"]["label_vectors"], run.task.meta.label_vectors
        )


@pytest.mark.parametrize("useless", [False, True])
def test_rates_can_be_estimated(useless, tmp_path, capsys, monkeypatch):
    """Nothing of the injector's rates is read; scores of no use are not trusted."""
    if useless:
        monkeypatch.setattr(
            run_lib,
            "held_out_scores",
            lambda rows, noisy, seed: np.full(noisy.shape, noisy.mean(0), np.float32),
        )
    changes = {"model.name": "logistic_regression", "noise.known": False}
    changes |= {"noise.kind": "ncar", "logistic_regression.cost": 1.0}
    config = running.tiny_config(**changes)
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    assert row["rates"]["source"] == "estimated"
    known = row["noise"]["realised"]
    report = capsys.readouterr().out
    if useless:
        assert row["rates"]["doubt"] and "could not be estimated" in report
        assert row["thresholds"]["corrected_val"] == row["thresholds"]["noisy_val"]
        with pytest.warns(UserWarning, match="could not be estimated"):
            predict.choose(str(tmp_path / "run"), rules.RUNS)
        forward = running.tiny_config(**{"loss.name": "forward", "noise.known": False})
        with pytest.raises(workdirs.RunError, match="not be estimated .* than forward"):
            fit.train_and_evaluate(forward, str(tmp_path / "forward"), "test")
    else:
        assert not row["rates"]["doubt"] and "estimated  " in report
        assert row["rates"]["r0"] == pytest.approx(known["p01"], abs=0.01)
        assert row["rates"]["r1"] == pytest.approx(known["p10"], abs=0.1)
        assert row["rates"]["r0"] != known["p01"]
        assert row["metrics"]["corrected_val"] != row["metrics"]["noisy_val"]
        run_lib.evaluate_checkpoint(str(tmp_path / "run"), None, "test")
        assert "exactly" in capsys.readouterr().out
        task = run_lib.Run(config, "").task
        fold = task_lib.fold(config, task, np.arange(100))
        assert fold.rates == task.rates


def test_kernel_ridge_is_fitted_with_the_rates(tmp_path):
    """Half of the labels are lost; rounds bring the share that holds back."""
    found = {}
    for rounds in (0, 1):
        config = estimator_config(
            "kernel_ridge",
            **{
                "kernel_ridge.penalty": 1.0,
                "kernel_ridge.rounds": rounds,
                "noise.kind": "nar",
            },
        )
        workdir = str(tmp_path / str(rounds))
        fit.train_and_evaluate(config, workdir, "test")
        task = run_lib.Run(config, "").task
        found[rounds] = predict.Predictor(workdir).scores(task.test.inputs).mean()
    held, given = task.test.labels.mean(), task.train.labels.mean()
    assert given < 0.7 * held
    assert abs(found[0] - given) < 0.2 * held < found[1] - found[0]


def test_rates_that_are_given_stand_over_the_realised_ones(tmp_path, capsys):
    config = estimator_config(
        "logistic_regression",
        **{"logistic_regression.cost": 1.0, "noise.r0": 0.02, "noise.r1": 0.3},
    )
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    given = {"source": "given", "r0": 0.02, "r1": 0.3}
    assert row["rates"] == given | {"doubt": "", "partial": False}
    assert row["noise"]["realised"]["p01"] != 0.02
    assert "given                P(0->1) 0.0200   P(1->0) 0.3000" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise.r0": 0.1}, "belong together"),
        ({"noise.r0": 0.1, "noise.r1": 0.1, "noise.known": False}, "nothing to esti"),
        ({"noise.r0": 0.1, "noise.r1": 1.1}, r"noise.r1=1.1 must be in"),
    ],
)
def test_rates_that_make_no_sense(changes, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        estimator_config("logistic_regression", **changes)


def test_weights_of_rows():
    """In a regression a row of weight 2 is two rows; the vote weighs neighbours."""
    rng = np.random.default_rng(0)
    rows = scipy.sparse.csr_array(rng.random((30, 8)) * (rng.random((30, 8)) < 0.5))
    labels = (rng.random((30, 3)) < 0.4).astype(np.uint8)
    weights = rng.integers(1, 4, 30)
    twice = np.repeat(np.arange(30), weights)
    model = LogisticRegression()
    one = model.fit(rows, labels, weights=weights.astype(np.float32))
    other = model.fit(rows[twice], labels[twice])
    np.testing.assert_allclose(one["weights"], other["weights"], atol=1e-3)
    assert np.abs(model.fit(rows, labels)["weights"] - one["weights"]).max() > 0.05
    vote = LRkNN(1.0, 2, 1.0)
    heavy = np.where(np.arange(30) == 1, 1e6, 1.0)
    params = vote.fit(rows, labels, weights=heavy)
    np.testing.assert_allclose(vote.scores(params, rows[[1]])[0], labels[1], atol=1e-4)
    plain = vote.scores(vote.fit(rows, labels), rows[[1]])[0]
    assert np.abs(plain - labels[1]).max() > 0.05


def test_a_model_that_cannot_weigh_rows_says_so(tmp_path):
    config = estimator_config("mlknn")
    task = task_lib.build(config)
    ones = np.ones(len(task.train), np.float32)
    task = dataclasses.replace(
        task, train=dataclasses.replace(task.train, sample_weight=ones)
    )
    with pytest.raises(workdirs.RunError, match="mlknn cannot weigh rows"):
        fit.fit(run_lib.Run(config, str(tmp_path), task))
