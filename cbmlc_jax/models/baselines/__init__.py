"""The systems that CbMLC is compared with, one file each.

This registry is of those that are fitted in one call; the neural ones are in
`models.MODELS`.  Each is imported where it is asked for: scikit-learn and SciPy's
optimisers take a quarter of the time that every other command needs to import.
"""

from __future__ import annotations

from cbmlc_jax.models.baselines.estimator import Estimator

# C of logistic regression, one of which validation chooses.
COSTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Of kernel ridge regression: the more noise, the larger the best one.
PENALTIES = (1.0, 4.0)
# Whose `fit` takes weights of rows.
TAKES_WEIGHTS = ("kernel_ridge", "logistic_regression", "lr_knn")
# Whose `fit` takes the noise rates (r0, r1) of the labels.
TAKES_RATES = ("kernel_ridge",)
# Settings and the estimator that has them.
Candidates = list[tuple[dict[str, float], Estimator]]
# Published with a rule of their own: a label holds where its score is above one half.
DECIDES_AT_HALF = ("mlknn",)
# Their `fit` also takes `ignored`, bool [N, L], and labels between 0 and 1.
READS_IGNORED = ("logistic_regression", "lr_knn")


def _costs(config) -> tuple[float, ...]:
    cost = config.logistic_regression.cost
    return COSTS if cost is None else (cost,)


def _kernel_ridge(config) -> Candidates:
    from cbmlc_jax.models.baselines.kernel_ridge import KernelRidge

    given = config.kernel_ridge
    penalties = PENALTIES if given.penalty is None else (given.penalty,)
    return [
        ({"penalty": penalty}, KernelRidge(penalty, given.scores_weight, given.rounds))
        for penalty in penalties
    ]


def _label_prior(config) -> Candidates:
    from cbmlc_jax.models.baselines.label_prior import LabelPrior

    return [({}, LabelPrior())]


def _logistic_regression(config) -> Candidates:
    from cbmlc_jax.models.baselines.logistic_regression import LogisticRegression

    return [({"cost": c}, LogisticRegression(c)) for c in _costs(config)]


def _lr_knn(config) -> Candidates:
    from cbmlc_jax.models.baselines.lr_knn import LRkNN

    settings = config.lr_knn
    neighbours = settings.neighbours
    if neighbours is None:
        neighbours = 15 if config.noise.kind == "none" else 25
    return [({"cost": c}, LRkNN(c, neighbours, settings.vote)) for c in _costs(config)]


def _mlknn(config) -> Candidates:
    from cbmlc_jax.models.baselines.mlknn import MLkNN

    return [({}, MLkNN(config.mlknn.neighbours, config.mlknn.smoothing))]


def _sleec(config) -> Candidates:
    from cbmlc_jax.models.baselines.sleec import SLEEC

    return [({}, SLEEC(**config.sleec, seed=config.seed))]


ESTIMATORS = {
    "kernel_ridge": _kernel_ridge,
    "label_prior": _label_prior,
    "logistic_regression": _logistic_regression,
    "lr_knn": _lr_knn,
    "mlknn": _mlknn,
    "sleec": _sleec,
}


def candidates(config) -> Candidates:
    """The estimators that config.model.name stands for; validation chooses one."""
    return ESTIMATORS[config.model.name](config)
