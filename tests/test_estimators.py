"""The scikit-learn estimators: its own checks, main's scores, files, mistakes."""

from __future__ import annotations

import json
import pickle
import re
import runpy
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import running
import scipy.sparse
from sklearn.base import clone
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import (
    estimator_checks_generator,
    parametrize_with_checks,
)

from cbmlc_jax import (
    CbMLCClassifier,
    KernelRidgeClassifier,
    LinearKNNClassifier,
    StackClassifier,
    files,
    fit,
    predict,
)
from cbmlc_jax import config as config_lib
from cbmlc_jax.data import synthetic
from cbmlc_jax.data.dataset import Dense

# One shape to compile, a model of a few hundred parameters, one device.
TINY = {
    "data.length_buckets": 1,
    "model.encoder.layers": 0,
    "model.intermediate_weight": 0.0,
    "model.num_heads": 1,
    "train.num_devices": 1,
}


def linear(**changes) -> LinearKNNClassifier:
    """Fitted once: no folds, one C."""
    settings = {"cost": 1.0, "crossfit": 0, "noise_rates": None, "random_state": 0}
    return LinearKNNClassifier(**settings | changes)


def kernel(**changes) -> KernelRidgeClassifier:
    settings = {"penalty": 1.0, "crossfit": 0, "noise_rates": None, "random_state": 0}
    return KernelRidgeClassifier(**settings | changes)


def neural(**changes) -> CbMLCClassifier:
    settings = {
        "epochs": 2,
        "width": 8,
        "batch_size": 64,
        "learning_rate": 0.05,
        "noise_rates": None,
        "random_state": 0,
        "config_overrides": TINY,
    }
    return CbMLCClassifier(**settings | changes)


def stack(**changes) -> StackClassifier:
    settings = {"members": "lr_knn", "crossfit": 2, "random_state": 0}
    few = {"train.num_epochs": 1, "train.num_devices": 1, "model.width": 8}
    few |= {"model.num_heads": 1, "model.ffn_width": 8, "train.batch_size": 32}
    few |= {"logistic_regression.cost": 1.0}
    return StackClassifier(**settings | {"config_overrides": few} | changes)


ALL = pytest.mark.parametrize("make", [linear, kernel, neural])
BOTH = pytest.mark.parametrize("make", [linear, neural])


@pytest.fixture(scope="module")
def data():
    """(X, Y, X of test): 84 and 36 embedded documents, their six commonest labels."""
    whole = synthetic.load(num_examples=120)
    labels = np.argsort(-whole.train.labels.sum(0))[:6]
    x, test = (s.inputs.matrix(400) for s in (whole.train, whole.test))
    return x, whole.train.labels[:, labels], test


# scikit-learn's own checks.  Both decide at one half here: where `threshold` is chosen,
# `predict` is not the rounded probability, which check_classifiers_train and
# check_classifier_multioutput ask for; the others pass with chosen thresholds, too.
_WEIGHTS = (
    "a row of weight 2 is not two rows: it is one neighbour and one validation row, "
    "and features are scaled without weights"
)
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": _WEIGHTS,
    "check_sample_weight_equivalence_on_sparse_data": _WEIGHTS,
}
# For CbMLC, whose every fit compiles, those that see most of the code.
CHOSEN = (
    "check_classifier_multioutput",
    "check_estimators_pickle",
    "check_fit2d_1sample",
)


@pytest.mark.filterwarnings("ignore")  # the checks' own subject, at places
@parametrize_with_checks(
    [linear(threshold=0.5)], expected_failed_checks=lambda _: EXPECTED
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def _chosen():
    estimator = neural(threshold=0.5, dropout=0.0)
    for one, check in estimator_checks_generator(estimator):
        name = getattr(check, "func", check).__name__
        if name in CHOSEN and not getattr(check, "keywords", {}).get("readonly_memmap"):
            yield pytest.param(one, check, id=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), _chosen())
@pytest.mark.slow
def test_chosen_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_all_chosen_checks_exist():
    assert {p.id for p in _chosen()} == set(CHOSEN)


@ALL
def test_an_estimator_is_what_main_trains(make, tmp_path):
    """The same scores and thresholds as a run of main on the same rows in files."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 5)).astype(np.float32)
    y = (x @ rng.normal(size=(5, 4)) > 0.5).astype(np.uint8)
    for name, rows in (("train", slice(0, 60)), ("test", slice(60, 90))):
        np.savez(tmp_path / f"{name}.npz", features=x[rows], labels=y[rows])
    rates = (0.02, 0.3)
    estimator = make(noise_rates=rates, random_state=3).fit(x[:60], y[:60])
    config = config_lib.base()
    config.update_from_flattened_dict(
        estimator._settings()
        | (estimator.config_overrides or {})
        | {
            "data.name": "own",
            "data.path": str(tmp_path / "train.npz"),
            "data.test_path": str(tmp_path / "test.npz"),
        }
    )
    config_lib.settle(config, set(estimator.config_overrides or {}))
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    scores = predict.Predictor(str(tmp_path / "run")).scores(Dense(x[60:]))
    np.testing.assert_array_equal(estimator.predict_proba(x[60:]), scores)
    assert scores.std() > 0.05
    assert estimator.threshold_ == row["thresholds"]["corrected_val"]["miF1"]
    found = row["thresholds"]
    assert estimator.result_["thresholds"] == {
        k: v for k, v in found.items() if k != "oracle"
    }
    assert row["rates"] == estimator.result_["rates"]
    assert (row["rates"]["r0"], row["rates"]["r1"]) == rates
    assert row["rates"]["source"] == "given"


def test_defaults_are_those_of_own_data():
    """What `configs/own.py` has and the estimator does not say otherwise."""
    path = running.ROOT / "configs" / "own.py"
    own = config_lib.flatten(runpy.run_path(str(path))["get_config"]())
    mine = CbMLCClassifier(random_state=0, label_names=["a"])._settings()
    different = {key for key, value in mine.items() if own[key] != value}
    assert different == {"data.name", "train.progress"}


def test_predictions_agree(data):
    x, y, test = data
    estimator = linear(threshold=0.3).fit(x, y)
    scores = estimator.predict_proba(test)
    assert scores.dtype == np.float64 and scores.shape == (36, 6)
    said = estimator.predict(test)
    np.testing.assert_array_equal(said, scores >= 0.3)
    np.testing.assert_array_equal(said, estimator.decision_function(test) >= 0)
    assert said.dtype.kind == "i" and 0 < said.mean() < 1
    truth = y[:36]
    assert estimator.score(test, truth) == (said == truth).all(1).mean()


@pytest.mark.parametrize("threshold", ["per_label", "per_row"])
def test_labels_by_the_expected_f1(threshold, data, tmp_path):
    x, y, test = data
    estimator = linear(threshold=threshold).fit(x, y)
    said = estimator.predict(test)
    np.testing.assert_array_equal(said, estimator.decision_function(test) >= 0)
    if threshold == "per_row":
        assert said.sum(1).min() >= 1 and estimator.threshold_ is None
    else:
        assert estimator.threshold_.shape == (6,)
    estimator.save(tmp_path / "saved")
    loaded = type(estimator).load(tmp_path / "saved")
    assert loaded.decision_.to_json() == estimator.decision_.to_json()
    np.testing.assert_array_equal(loaded.predict(test), said)


def test_a_folder_of_before_keeps_its_threshold(data, tmp_path):
    x, y, test = data
    estimator = linear(threshold=0.3).fit(x, y)
    estimator.save(tmp_path / "saved")
    path = tmp_path / "saved" / "estimator.json"
    content = json.loads(path.read_text())
    del content["fitted"]["decision_"]
    content["fitted"]["threshold_"] = 0.3  # as 0.2 wrote it
    path.write_text(json.dumps(content))
    loaded = type(estimator).load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict(test), estimator.predict(test))


def test_kinds_of_rows(data):
    x, y, test = data
    binary = linear().fit(x, y)
    assert binary.kind_ == "set"
    scores = binary.predict_proba(test)
    # A matrix of another form, and labels that are sparse, change nothing.
    np.testing.assert_array_equal(binary.predict_proba(test.toarray()), scores)
    again = linear().fit(x.tocoo(), scipy.sparse.csc_array(y))
    np.testing.assert_array_equal(again.predict_proba(test.tocsc()), scores)
    weighted = linear().fit(x * np.linspace(0.5, 2, 400)[None], y)
    assert weighted.kind_ == "weighted"
    assert np.abs(weighted.predict_proba(test) - scores).max() > 1e-3
    dense = linear().fit(x[:, :20].toarray(), y)
    assert dense.kind_ == "numbers"
    np.testing.assert_array_equal(
        dense.predict(test[:, :20]), dense.predict(test[:, :20].toarray())
    )


def words(matrix) -> list[list[str]]:
    return [[f"w{i}" for i in matrix.indices[a:b]] for a, b in _bounds(matrix)]


def _bounds(matrix):
    return zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)


@pytest.mark.slow
def test_lists_of_tokens_are_sequences(data):
    x, y, test = data
    documents, new = words(x), words(test)
    estimator = neural().fit(documents, y)
    assert estimator.kind_ == "sequence" and not hasattr(estimator, "n_features_in_")
    scores = estimator.predict_proba(new)
    turned = estimator.predict_proba([row[::-1] for row in new])
    assert np.abs(scores - turned).max() > 1e-4, "the order counts"
    as_set = clone(estimator).set_params(
        config_overrides=TINY | {"model.encoder.name": "set"}
    )
    as_set.fit(np.array([*documents, None], object)[:-1], y)
    np.testing.assert_allclose(
        as_set.predict_proba(new),
        as_set.predict_proba([row[::-1] for row in new]),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="lists of tokens, as it was in fit"):
        estimator.predict(test)


def test_pipeline_grid_search_and_cross_validation(data):
    x, y, test = data
    texts = [" ".join(row) for row in words(x)]
    pipeline = make_pipeline(CountVectorizer(), linear(vote=0.0))
    search = GridSearchCV(
        pipeline,
        {"linearknnclassifier__cost": [1e-4, 10.0]},
        scoring="f1_micro",
        cv=3,
        error_score="raise",
    )
    search.fit(texts, y)
    assert search.best_params_ == {"linearknnclassifier__cost": 10.0}
    assert search.predict([" ".join(row) for row in words(test)]).shape == (36, 6)
    scores = cross_val_predict(pipeline, texts, y, cv=3, method="predict_proba")
    held_out = slice(0, 28)  # KFold's first part
    alone = clone(pipeline).fit(texts[28:], y[28:])
    np.testing.assert_allclose(scores[held_out], alone.predict_proba(texts[held_out]))


@pytest.mark.parametrize(
    "make", [linear, kernel, pytest.param(neural, marks=pytest.mark.slow), stack]
)
def test_a_saved_estimator_predicts_the_same(make, data, tmp_path, monkeypatch):
    x, y, test = data
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    estimator = make(label_names=tuple("abcdef"), noise_rates=(0.0, 0.1))
    if hasattr(estimator, "embeddings"):
        estimator.set_params(embeddings="random")
    estimator.fit(x, y)
    scores, said = estimator.predict_proba(test), estimator.predict(test)
    path = tmp_path / "saved"
    estimator.save(path)
    loaded = type(estimator).load(path)
    for other in (loaded, pickle.loads(pickle.dumps(estimator))):
        np.testing.assert_array_equal(other.predict_proba(test), scores)
        np.testing.assert_array_equal(other.predict(test), said)
        assert other.label_names_ == list("abcdef")
        assert json.dumps(other.get_params()) == json.dumps(estimator.get_params())
    assert not list((tmp_path / "temporary").iterdir())
    assert not list(path.rglob("rest")), "what only training reads"
    # A folder that --mode=predict reads.
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [test.indices[a:b].tolist() for a, b in _bounds(test)]
    source.write_text("".join(json.dumps({"features": r}) + "\n" for r in rows))
    predict.predict_file(str(path), str(source), str(target))
    names = np.array(list("abcdef"))
    for line, mine in zip(files.read_jsonl(str(target)), said, strict=True):
        assert set(line["labels"]) == set(names[mine == 1])
    with pytest.raises(ValueError, match="exists already"):
        estimator.save(path)


def test_a_folder_that_is_no_estimator(data, tmp_path):
    x, y, _ = data
    with pytest.raises(ValueError, match="holds no finished run"):
        LinearKNNClassifier.load(tmp_path)
    workdir = tmp_path / "run"
    estimator = linear(workdir=str(workdir)).fit(x, y)
    assert (workdir / "report.txt").exists() and (workdir / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match=r"no LinearKNNClassifier that save\(\) wrote"):
        LinearKNNClassifier.load(workdir)
    with pytest.raises(ValueError, match="not empty: give another workdir"):
        clone(estimator).fit(x, y)
    estimator.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds a LinearKNNClassifier: load that"):
        CbMLCClassifier.load(tmp_path / "saved")
    (tmp_path / "saved" / "estimator.json").write_text('{"class": []')
    with pytest.raises(ValueError, match="no LinearKNNClassifier"):
        LinearKNNClassifier.load(tmp_path / "saved")
    (tmp_path / "saved" / "results.jsonl").write_text("[]")
    with pytest.raises(ValueError, match=r"results\.jsonl is damaged"):
        LinearKNNClassifier.load(tmp_path / "saved")
    done = running.main("--mode=eval", f"--workdir={workdir}")
    running.assert_one_sentence(done, "given to an estimator", "--mode=predict")


def test_the_seed_decides(data):
    x, y, test = data
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (
        linear(random_state=seed).fit(x, y).predict_proba(test) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-6
    state = np.random.RandomState(1)  # noqa: NPY002
    assert linear(random_state=state)._settings()["seed"] != 1
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("make", [linear, pytest.param(neural, marks=pytest.mark.slow)])
def test_weights_of_rows(make, data):
    """For a neural one in short: test_a_row_of_weight_three_is_three_rows_of_a_step."""
    x, y, test = data
    plain = make().fit(x, y).predict_proba(test)
    ones = make().fit(x, y, sample_weight=np.ones(84)).predict_proba(test)
    np.testing.assert_array_equal(ones, plain)
    weights = np.resize([1.0, 0.0, 3.0], 84)
    some = make().fit(x, y, sample_weight=weights).predict_proba(test)
    assert np.abs(some - plain).max() > 1e-3
    kept = weights > 0
    left_out = make().fit(x[kept], y[kept], sample_weight=weights[kept])
    np.testing.assert_array_equal(left_out.predict_proba(test), some)


def test_thresholds(data):
    x, y, _ = data
    known = linear(noise_rates=(0.1, 0.4), crossfit=3).fit(x, y)
    chosen = known.result_["thresholds"]
    assert known.threshold_ == chosen["corrected_val"]["miF1"]
    noisy = clone(known).set_params(threshold="noisy_val").fit(x, y)
    assert noisy.threshold_ == chosen["noisy_val"]["miF1"] != known.threshold_
    macro = clone(known).set_params(metric="maF1").fit(x, y)
    assert macro.threshold_ == chosen["corrected_val"]["maF1"] != known.threshold_
    assert "oracle" not in chosen
    with pytest.warns(UserWarning, match="leave no information"):
        nothing = linear(noise_rates=(0.5, 0.49)).fit(x, y)
    assert nothing.threshold_ == nothing.result_["thresholds"]["noisy_val"]["miF1"]
    with pytest.warns(UserWarning, match="could not be estimated"):
        few = linear(noise_rates="estimate").fit(x, y)
    assert few.result_["rates"]["source"] == "estimated"


def test_cross_fitting_sets_no_rows_aside(data):
    x, y, test = data
    estimator = linear(crossfit=3, cost=None).fit(x, y)
    assert estimator.result_["rows"] == {"train": 84, "validation": 84, "test": 0}
    assert "folds" not in "".join(estimator._files)
    chosen = estimator.result_["selection"]["settings"]["cost"]
    alone = linear(cost=chosen, crossfit=3).fit(x, y)
    np.testing.assert_array_equal(
        alone.predict_proba(test), estimator.predict_proba(test)
    )


X, Y = np.eye(12), np.eye(12, 3)


@pytest.mark.parametrize(
    ("estimator", "x", "y", "message"),
    [
        (linear(), X, 2 * Y, r"y\[0, 0\] is 2.0, but a label must be 0 or 1"),
        (linear(), X, np.where(Y, np.nan, 0), "contains NaN"),
        (linear(), np.where(X, np.inf, 0), Y, "contains infinity"),
        (linear(), X, Y[:5], "inconsistent numbers of samples"),
        (linear(), X, Y * 0, "have the same labels, one class alone"),
        (linear(), X, np.zeros((12, 0)), "0 feature"),
        (linear(), X, np.arange(12) % 3, "LabelBinarizer"),
        (linear(), X, [["a"], ["b", "c"]] * 6, "MultiLabelBinarizer"),
        (linear(), X, [{"a"}] * 12, "MultiLabelBinarizer"),
        (linear(), ["a text", "another"], Y[:2], "split each into a list of tokens"),
        (linear(), [["a"], ["b"]], Y[:2], "no token of X is in 2 rows"),
        (linear(), [["a"], ["a"], [1]], Y[:3], r"row 2 of X \(from 0\) is no list"),
        (linear(label_names=["a", "b"]), X, Y, "has 2 names.*y has 3 labels"),
        (linear(label_names=["a", "b", "a"]), X, Y, "2 of them different"),
        (linear(threshold="oracle"), X, Y, "threshold='oracle' must be corrected_val"),
        (linear(threshold=1.5), X, Y, "threshold=1.5 must be"),
        (linear(threshold="per_row"), X, Y[:, 0], "and y has one: give"),
        (linear(metric="f1"), X, Y, "metric='f1' is not one of ebF1, miF1, maF1"),
        (linear(noise_rates="guess"), X, Y, "noise_rates='guess' must be"),
        (linear(noise_rates=(0.1, 2)), X, Y, r"^noise_rates\[1\]=2.0 must be in"),
        (linear(cost=-1.0), X, Y, r"^cost=-1.0 must be in"),
        (linear(crossfit=1), X, Y, "^crossfit=1 leaves no row"),
        (neural(epochs=0), X, Y, "^epochs=0 must be at least 1"),
        (neural(epochs="many"), X, Y, "^epochs='many' is no such value"),
        (neural(linear_path=True), X, Y, "linear_path=True is for tokens"),
        (neural(config_overrides={"model.size": 1}), X, Y, "no key 'model.size'"),
        (
            neural(config_overrides={"model.width": 1}),
            X,
            Y,
            "'model.width': set width instead",
        ),
        (
            neural(config_overrides={"model.name": "lamp"}),
            X,
            Y,
            "which CbMLCClassifier says",
        ),
        (
            neural(label_names=list("abc"), embeddings_path="no.txt"),
            X,
            Y,
            "no.txt': no such file",
        ),
    ],
)
def test_a_mistake_is_one_sentence(estimator, x, y, message):
    with pytest.raises(ValueError, match=message) as caught:
        estimator.fit(x, y)
    assert "\n" not in str(caught.value)


def test_wrong_weights():
    with pytest.raises(ValueError, match="at least one non-zero"):
        linear().fit(X, Y, sample_weight=np.zeros(12))
    with pytest.raises(ValueError, match="Negative values"):
        linear().fit(X, Y, sample_weight=-np.ones(12))


def test_the_package_is_imported_without_them():
    code = (
        "import sys, cbmlc_jax; assert 'sklearn' not in sys.modules;"
        "assert 'jax' not in sys.modules; assert 'CbMLCClassifier' in dir(cbmlc_jax)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=running.ROOT)
    with pytest.raises(ImportError, match="Classifier"):
        from cbmlc_jax import Classifier  # noqa: F401


def test_the_example_of_the_page(capsys, tmp_path, monkeypatch):
    page = (running.ROOT / "docs" / "scikit_learn.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "scikit_learn.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == "[[1 0]]\n['hardware', 'billing']\n"
