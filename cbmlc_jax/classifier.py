"""What the scikit-learn estimators have in common: fit as main does, then predict.

X and y become a Dataset in memory and the parameters a config; from there on `fit.py`
trains as it does for the command line, in a temporary folder.  What is fitted is the
run's files (`run_files.py`), kept as bytes.
"""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import tempfile
from collections.abc import Iterator
from typing import ClassVar

import ml_collections
import numpy as np
from absl import logging
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from cbmlc_jax import config as config_lib
from cbmlc_jax import fit, predict, rules, run_files, targets, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import memory
from cbmlc_jax.data.dataset import Dataset
from cbmlc_jax.decision import Decision

# The rules that `threshold=` may name; corrected_val falls back to noisy_val, with a
# warning, where the noise rates cannot be used.
_RULES = {
    "corrected_val": {},
    "noisy_val": {"protocol": "noisy_val"},
    "per_label": {"per_label": True},
    "per_row": {"per_row": True},
}
_METRICS = ("ebF1", "miF1", "maF1")
# What `save` writes of a fitted estimator, beside the run's files; the latter only for
# matrices and data frames.
_FITTED = (
    "classes_",
    "decision_",
    "kind_",
    "label_names_",
    "one_column_",
    "result_",
)
_OF_MATRICES = ("n_features_in_", "feature_names_in_")


class Classifier(ClassifierMixin, BaseEstimator):
    """What the estimators have in common.

    A subclass names its `_model` (config.model.name), the config keys of its
    parameters (`_KEYS`), and what else it sets (`_values`).
    """

    _model: ClassVar[str]
    _KEYS: ClassVar[dict[str, str]]

    def _keep(self, parameters: dict[str, object]) -> None:
        """Attributes of the arguments of `__init__`, which scikit-learn wants named."""
        for name in self._get_param_names():
            setattr(self, name, parameters[name])

    def fit(self, X, y, sample_weight=None):  # noqa: N803
        """Trains.

        Args:
            X: [N, F] array (read as real numbers), sparse matrix [N, F] (a set of
                features; weighted where an entry is not 1), or N lists of tokens (a
                sequence, the first 300); data frames, too.
            y: [N, L] of 0 and 1, sparse or not; or [N] with two classes.
            sample_weight: [N], >= 0; factors of the rows' losses.  A row of weight 0 is
                left out.  They count in nothing else: neither in the scaling of
                features nor in thresholds, noise rates and the choice of an epoch.

        Returns:
            self.

        Raises:
            ValueError: X, y or a parameter is not what it must be; says what to do.
        """
        self._check_parameters()
        dataset = self._dataset(X, y, sample_weight)
        if self.one_column_ and self.threshold == "per_row":
            raise config_lib.ConfigError(
                "threshold='per_row' chooses among the labels of a row, and y has one: "
                "give threshold='per_label'"
            )
        config = self._config(dataset)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
            workdir = self.workdir
            if workdir is None:
                workdir = stack.enter_context(tempfile.TemporaryDirectory("-cbmlc"))
            elif os.path.isdir(workdir) and os.listdir(workdir):
                raise workdirs.RunError(
                    f"{workdir} is not empty: give another workdir, or None"
                )
            task = run_lib.built(config, dataset)
            workdirs.claim(config, workdir)
            run = run_lib.Run(config, workdir, task)
            self.result_, _ = fit.complete(run, f"{type(self).__name__}.fit")
            self.decision_ = self._decision(workdir)
            self.kind_, self.label_names_ = dataset.kind, list(dataset.label_names)
            self._files = run_files.read(workdir)
            self._predictor = predict.Predictor(workdir)
        return self

    @property
    def threshold_(self) -> float | np.ndarray | None:
        """Of all labels, one for each [L], or None: each row has its own."""
        return self.decision_.threshold

    def predict_proba(self, X):  # noqa: N803
        """float64 [N, L] scores in [0, 1]; [N, 2] where y was one column."""
        scores = self._scores(X)
        return np.hstack([1 - scores, scores]) if self.one_column_ else scores

    def decision_function(self, X):  # noqa: N803
        """float64 [N, L] (or [N]): score - threshold, >= 0 where `predict` says 1."""
        scores, threshold = self._scores(X), self.threshold_
        if threshold is None:
            said = np.where(self.decision_.apply(scores), scores, np.inf)
            threshold = said.min(axis=1, keepdims=True)
        margin = scores - threshold
        return margin[:, 0] if self.one_column_ else margin

    def predict(self, X):  # noqa: N803
        """int64 [N, L] of 0 and 1; [N] classes where y was one column."""
        scores = self._scores(X)
        said = self.decision_.apply(scores)
        return self.classes_[said[:, 0].astype(int)] if self.one_column_ else said * 1

    def save(self, path: str) -> None:
        """Writes a new folder, which `load` and --mode=predict read; no pickle.

        Raises:
            RunError: the folder exists already.
        """
        check_is_fitted(self)
        params = self.get_params(deep=False)
        if not isinstance(params["random_state"], numbers.Integral | None):
            params["random_state"] = self.result_["seed"]
        names = [*_FITTED, *(n for n in _OF_MATRICES if hasattr(self, n))]
        fitted = {name: getattr(self, name) for name in names}
        fitted["decision_"] = self.decision_.to_json()
        content = {"class": type(self).__name__, "params": params, "fitted": fitted}
        text = json.dumps(content, default=_plain, indent=2) + "\n"
        run_files.write(self._files | {run_files.ESTIMATOR: text.encode()}, path)

    @classmethod
    def load(cls, path: str):
        """What `save` wrote.

        Raises:
            RunError, CheckpointError: it holds no such estimator, or is damaged.
        """
        found = run_files.read(path)
        try:
            content = json.loads(found.pop(run_files.ESTIMATOR))
            if content["class"] != cls.__name__:
                raise workdirs.RunError(f"{path} holds a {content['class']}: load that")
            self = cls(**content["params"])
            fitted = content["fitted"]
            if "threshold_" in fitted:  # before 0.3.0
                fitted["decision_"] = Decision(fitted["threshold_"]).to_json()
            for name in (*_FITTED, *(n for n in _OF_MATRICES if n in fitted)):
                setattr(self, name, fitted[name])
            self.classes_ = np.array(self.classes_)
            labels = len(self.label_names_)
            self.decision_ = Decision.from_json(self.decision_, labels)
            if "feature_names_in_" in fitted:
                self.feature_names_in_ = np.array(self.feature_names_in_, object)
        except workdirs.RunError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise workdirs.RunError(
                f"{path} holds no {cls.__name__} that save() wrote ({error!r})"
            ) from error
        self._files = found
        with _quiet():
            self._predictor = predict.Predictor(path)
        return self

    def __getstate__(self) -> dict:
        return {k: v for k, v in super().__getstate__().items() if k != "_predictor"}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags

    def _scores(self, X) -> np.ndarray:  # noqa: N803
        """float64 [N, L]."""
        check_is_fitted(self)
        rows = memory.tokens(X)
        if rows is None and self.kind_ != "sequence":
            rows = validate_data(
                self, X, accept_sparse="csr", dtype=np.float32, reset=False
            )
        if not hasattr(self, "_predictor"):  # after unpickling
            with _quiet(), tempfile.TemporaryDirectory("-cbmlc") as folder:
                workdir = os.path.join(folder, "run")
                run_files.write(self._files, workdir)
                self._predictor = predict.Predictor(workdir)
        inputs = memory.inputs(rows, self.kind_, self._predictor.feature_names)
        return self._predictor.scores(inputs).astype(np.float64)

    def _dataset(self, X, y, sample_weight) -> Dataset:  # noqa: N803
        """The rows of positive weight."""
        targets.refuse_names(y)
        rows, columns = memory.tokens(X), getattr(y, "columns", None)
        if rows is None:
            rows, y = validate_data(
                self,
                X,
                y,
                accept_sparse="csr",
                dtype=np.float32,
                multi_output=True,
                ensure_min_samples=2,
            )
        else:
            for name in _OF_MATRICES:  # of another fit
                vars(self).pop(name, None)
            y = check_array(
                y, accept_sparse="csr", dtype=None, ensure_2d=False, input_name="y"
            )
            check_consistent_length(rows, y)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, rows, dtype=np.float32, ensure_non_negative=True
            )
            kept = np.flatnonzero(sample_weight)
            y, sample_weight = y[kept], sample_weight[kept]
            rows = [rows[i] for i in kept] if isinstance(rows, list) else rows[kept]
        labels, self.classes_ = targets.encoded(y)
        self.one_column_ = labels.shape[1] == 1
        given = columns if self.label_names is None else self.label_names
        if self.one_column_ and given is None:
            given = [self.classes_[1]]
        return memory.dataset(
            rows,
            labels,
            label_names=targets.names(given, labels.shape[1]),
            features=getattr(self, "feature_names_in_", None),
            sample_weight=sample_weight,
        )

    def _config(self, dataset: Dataset) -> ml_collections.ConfigDict:
        """The config of a run on this data set.

        Raises:
            ConfigError: a parameter is not what it must be.
        """
        overrides = dict(self.config_overrides or {})
        self._check_overrides(overrides)
        config = config_lib.base()
        try:
            for key, value in (self._settings() | overrides).items():
                _set(config, key, value)
            config_lib.settle(config, set(overrides))
            config = config_lib.settled(config, dataset.kind)
        except config_lib.ConfigError as error:
            text = str(error)
            rates = {f"noise_rates[{i}]": f"noise.r{i}" for i in (0, 1)}
            for name, key in (self._KEYS | rates).items():
                text = text.replace(f"config.{key}=", f"{name}=")
            raise config_lib.ConfigError(text) from None
        # Few rows are no mistake here.
        count = len(dataset.train)
        config.train.crossfit = min(config.train.crossfit, count)
        if config.data.validation_size is None:
            wanted = int(config.data.validation_fraction * count)
            config.data.validation_size = max(1, wanted)
        return config

    def _settings(self) -> dict[str, object]:
        """The keys that differ from the base config, without the overrides."""
        seed = self.random_state
        if not isinstance(seed, numbers.Integral):
            seed = check_random_state(seed).randint(2**31)
        return {
            "seed": seed,
            "data.name": "memory",
            "data.split_seed": seed,
            "data.stratified": True,
            "model.name": self._model,
            "model.encoder.name": "auto",
            "train.progress": bool(self.verbose),
            **self._rates(),
            **self._values(),
            **{key: getattr(self, name) for name, key in self._KEYS.items()},
        }

    def _check_overrides(self, overrides: dict[str, object]) -> None:
        """Refuses keys that parameters stand for, or that are this class's own."""
        parameters = {key: name for name, key in self._KEYS.items()}
        for key in overrides:
            if key in parameters:
                raise config_lib.ConfigError(
                    f"config_overrides has {key!r}: set {parameters[key]} instead"
                )
            if key in ("data.name", "model.name"):
                raise config_lib.ConfigError(
                    f"config_overrides has {key!r}, which {type(self).__name__} says"
                )

    def _rates(self) -> dict[str, object]:
        """Keys of `noise_rates`."""
        given = self.noise_rates
        if given is None or (isinstance(given, str) and given == "estimate"):
            return {"noise.known": given is None}
        try:
            r0, r1 = (float(rate) for rate in given)
        except (TypeError, ValueError):
            raise config_lib.ConfigError(
                f"noise_rates={given!r} must be (P(0->1), P(1->0)), 'estimate' or None"
            ) from None
        return {"noise.r0": r0, "noise.r1": r1}

    def _check_parameters(self) -> None:
        """Those that stand in no config."""
        if self.metric not in _METRICS:
            raise config_lib.ConfigError(
                f"metric={self.metric!r} is not one of {', '.join(_METRICS)}"
            )
        threshold = self.threshold
        if isinstance(threshold, str):
            known = threshold in _RULES
        else:
            known = isinstance(threshold, numbers.Real) and 0 <= threshold <= 1
        if not known:
            raise config_lib.ConfigError(
                f"threshold={threshold!r} must be {', '.join(_RULES)} or a number in "
                "[0, 1] (an estimator has neither test nor clean labels)"
            )

    def _decision(self, workdir: str) -> Decision:
        """By the rule that `threshold` names, or the number that was given."""
        if not isinstance(self.threshold, str):
            return Decision(float(self.threshold))
        rule = rules.Rule(metric=self.metric, **_RULES[self.threshold])
        return predict.choose(workdir, rule)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log lines, as in main; what matters is raised."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _set(config: ml_collections.ConfigDict, key: str, value: object) -> None:
    """Sets one key; numpy's numbers become Python's.

    Raises:
        ConfigError: there is no such key, or it is of another type.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if key not in config_lib.flatten(config):
        raise config_lib.ConfigError(f"config_overrides: there is no key {key!r}")
    try:
        config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError):
        raise config_lib.ConfigError(
            f"config.{key}={value!r} is no such value"
        ) from None


def _plain(value: object) -> object:
    """numpy's arrays and numbers, and tuples' like, as JSON has them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} cannot be saved as JSON")
