"""scikit-learn estimators; `classifier.py` has their methods."""

from __future__ import annotations

from typing import ClassVar

from cbmlc_jax.classifier import Classifier


class CbMLCClassifier(Classifier):
    """CbMLC as a scikit-learn classifier; the defaults are those of configs/own.py.

    Args:
        epochs: passes over the rows; the best is kept.
        width: of the model (FFNs have twice it).
        num_blocks: T; a block updates every label node twice.
        learning_rate: of Adam.
        batch_size: rows of a step.
        dropout: also on the attention weights.
        linear_path, token_dropout, averaging: what helps with noisy labels and is not
            in the paper: True, .3 and .99 are the preset `robust` of configs/bibtex.py;
            the first two are for sparse rows and tokens alone.
        crossfit: K: thresholds and epoch from K-fold scores of all rows; 0: from
            validation rows that are set aside.
        validation_fraction: of the rows, stratified; at least one row.
        threshold: "corrected_val", "noisy_val", "per_label", "per_row"
            (docs/thresholds.md), or a number in [0, 1].
        metric: the F1 that the threshold is best for, by the first two: ebF1, miF1 or
            maF1.
        noise_rates: of y: (P(0->1), P(1->0)), "estimate", or None for labels without
            noise.
        label_names: L phrases whose word vectors the label nodes start at; None: random
            vectors.
        embeddings: where from, as config.embeddings.source.
        embeddings_path: of a GloVe text file.
        random_state: a number is config.seed; None draws one.
        verbose: True shows epochs.
        workdir: a new or empty folder for all files of the run; None: a temporary one.
        config_overrides: {key of cbmlc_jax/config.py: value}, for everything else.

    Attributes:
        classes_: int [L] numbers of the labels; or the two classes where y was one
            column.
        label_names_: L strings.
        decision_: which labels `predict` says, a `decision.Decision`.
        threshold_: of it: of all labels, one for each, or None (per_row).
        result_: the run's result row; its `thresholds` has those of all protocols, its
            `rates` the noise rates.
        kind_: of the rows: "numbers", "set", "weighted" or "sequence".
        one_column_: whether y was one column.
        n_features_in_, feature_names_in_: of matrices, data frames.
    """

    _model = "cbmlc"
    _KEYS: ClassVar = {
        "epochs": "train.num_epochs",
        "width": "model.width",
        "num_blocks": "model.num_blocks",
        "learning_rate": "optim.learning_rate",
        "batch_size": "train.batch_size",
        "dropout": "model.dropout",
        "linear_path": "model.linear_path",
        "token_dropout": "model.token_dropout",
        "averaging": "optim.averaging",
        "crossfit": "train.crossfit",
        "validation_fraction": "data.validation_fraction",
        "embeddings_path": "embeddings.path",
    }

    def __init__(
        self,
        *,
        epochs=10,
        width=128,
        num_blocks=1,
        learning_rate=1e-3,
        batch_size=32,
        dropout=0.2,
        linear_path=False,
        token_dropout=0.0,
        averaging=0.0,
        crossfit=0,
        validation_fraction=0.1,
        threshold="corrected_val",
        metric="miF1",
        noise_rates="estimate",
        label_names=None,
        embeddings="auto",
        embeddings_path=None,
        random_state=None,
        verbose=False,
        workdir=None,
        config_overrides=None,
    ):
        self._keep(locals())

    def _values(self) -> dict[str, object]:
        source = "random" if self.label_names is None else self.embeddings
        return {
            "embeddings.source": source,
            "model.encoder.embedding_std": 0.1,
            "model.encoder.layers": 1,
            "model.ffn_width": 2 * self.width,
            "model.num_heads": 2,
        }


class LinearKNNClassifier(Classifier):
    """Logistic regression with a vote of the nearest rows (lr_knn), in seconds.

    Args:
        cost: C of the regression; None: the best of five on validation.
        neighbours: k of the vote; None: 15.
        vote: its weight, in [0, 1]; 0 is logistic regression alone.
        crossfit: K: thresholds and C from K-fold scores of all rows; 0: from validation
            rows that are set aside.
        label_names: L strings, for what is saved.

    The other parameters, and the attributes, are those of `CbMLCClassifier`.
    """

    _model = "lr_knn"
    _KEYS: ClassVar = {
        "cost": "logistic_regression.cost",
        "neighbours": "lr_knn.neighbours",
        "vote": "lr_knn.vote",
        "crossfit": "train.crossfit",
        "validation_fraction": "data.validation_fraction",
    }

    def __init__(
        self,
        *,
        cost=None,
        neighbours=None,
        vote=0.3,
        crossfit=5,
        validation_fraction=0.1,
        threshold="corrected_val",
        metric="miF1",
        noise_rates="estimate",
        label_names=None,
        random_state=None,
        verbose=False,
        workdir=None,
        config_overrides=None,
    ):
        self._keep(locals())

    def _values(self) -> dict[str, object]:
        return {}


class KernelRidgeClassifier(Classifier):
    """Kernel ridge regression (kernel_ridge), for up to 20,000 rows, in minutes.

    It reads the noise rates: see `models.baselines.kernel_ridge.KernelRidge`.

    Args:
        penalty: of the fit to the labels as they are; None: the better of 1 and 4 on
            validation.
        scores_weight: of the kernel of label scores; 0 leaves that stage out.
        rounds: of fits to the probability that a label holds, where there is noise.
        crossfit: K: thresholds and penalty from K-fold scores of all rows; 0: from
            validation rows that are set aside.
        label_names: L strings, for what is saved.

    The other parameters, and the attributes, are those of `CbMLCClassifier`.
    """

    _model = "kernel_ridge"
    _KEYS: ClassVar = {
        "penalty": "kernel_ridge.penalty",
        "scores_weight": "kernel_ridge.scores_weight",
        "rounds": "kernel_ridge.rounds",
        "crossfit": "train.crossfit",
        "validation_fraction": "data.validation_fraction",
    }

    def __init__(
        self,
        *,
        penalty=None,
        scores_weight=1.0,
        rounds=2,
        crossfit=5,
        validation_fraction=0.1,
        threshold="corrected_val",
        metric="miF1",
        noise_rates="estimate",
        label_names=None,
        random_state=None,
        verbose=False,
        workdir=None,
        config_overrides=None,
    ):
        self._keep(locals())

    def _values(self) -> dict[str, object]:
        return {}


class StackClassifier(Classifier):
    """CbMLC's label graph over the scores of other models (stack), in minutes.

    Each row has a P(0->1) of its own (config.noise.by_row), unless `noise_rates` is
    None.

    Args:
        members: models whose scores it reads, with commas between them: of
            kernel_ridge, lr_knn, logistic_regression, mlknn, sleec, label_prior.
        crossfit: K >= 2: every model is fitted K + 1 times.

    The other parameters, and the attributes, are those of `CbMLCClassifier`.
    """

    _model = "stack"
    _KEYS: ClassVar = {
        "members": "stack.members",
        "crossfit": "train.crossfit",
        "embeddings_path": "embeddings.path",
    }

    def __init__(
        self,
        *,
        members="kernel_ridge,sleec,lr_knn",
        crossfit=5,
        threshold="corrected_val",
        metric="miF1",
        noise_rates="estimate",
        label_names=None,
        embeddings="auto",
        embeddings_path=None,
        random_state=None,
        verbose=False,
        workdir=None,
        config_overrides=None,
    ):
        self._keep(locals())

    def _values(self) -> dict[str, object]:
        source = "random" if self.label_names is None else self.embeddings
        return {
            "embeddings.source": source,
            "noise.by_row": self.noise_rates is not None,
        }
