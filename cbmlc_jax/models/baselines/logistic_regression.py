"""One-vs-rest logistic regression: the anchor for every other model."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse
from jaxtyping import Float, UInt8
from scipy.special import expit
from sklearn.linear_model import LogisticRegression as _Regression
from sklearn.preprocessing import normalize

from cbmlc_jax.models.baselines.estimator import Inputs, Params


@dataclasses.dataclass(frozen=True)
class LogisticRegression:
    """score_l = sigmoid(w_l . z + b_l), each label fitted by itself (liblinear).

        min_{w, b}  (|w_l|^2 + b_l^2) / 2
                    + C sum_i log(1 + exp(-(2 y_il - 1) (w_l . z_i + b_l)))

    z are tf-idf rows of length 1 for sparse inputs, standardised columns for dense
    ones (of which b is not in the penalty, and the solver is L-BFGS).  A label that is
    the same on all rows has w = 0 and the log odds of (positives + 1/2) / (N + 1) as b.

    Attributes:
        cost: C.
    """

    cost: float = 1.0

    def fit(
        self,
        inputs: Inputs,
        labels: UInt8[np.ndarray, "rows labels"],
        weights: Float[np.ndarray, " rows"] | None = None,
    ) -> Params:
        """weights float32 [F, L], bias float32 [L], and the scale of the inputs.

        `weights` [N] are factors of the rows' terms in the sum over i; the scale does
        not read them.
        """
        scale = fit_scale(inputs)
        rows = rescale(scale, inputs)
        positives = labels.sum(0, dtype=np.int64)
        share = (positives + 0.5) / (len(labels) + 1)
        coefficients = np.zeros((inputs.shape[1], labels.shape[1]), np.float32)
        bias = np.log(share / (1 - share)).astype(np.float32)

        # liblinear would store dense rows as sparse ones, at many times the cost.
        solver = {"solver": "liblinear"}
        if not scipy.sparse.issparse(rows):
            solver = {"solver": "lbfgs", "max_iter": 1000}

        def one(label: int) -> None:
            model = _Regression(C=self.cost, **solver)
            model.fit(rows, labels[:, label], sample_weight=weights)
            coefficients[:, label], bias[label] = model.coef_[0], model.intercept_[0]

        varying = np.flatnonzero((positives > 0) & (positives < len(labels)))
        # The solvers work outside the interpreter's lock and draw no random numbers:
        # threads change the time, not the result.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(one, varying))
        return {"weights": coefficients, "bias": bias, "scale": scale}

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L] probabilities."""
        logits = rescale(params["scale"], inputs) @ np.asarray(params["weights"])
        return expit(logits + np.asarray(params["bias"])[None]).astype(np.float32)


def fit_scale(inputs: Inputs) -> Params:
    """What `rescale` needs: idf [F] of sparse inputs, mean and deviation of dense.

    idf_f = log((1 + N) / (1 + #{rows with f})) + 1 for counts; 1 where the inputs are
    weights already, i.e. not whole numbers.
    """
    if scipy.sparse.issparse(inputs):
        if (inputs.data % 1).any():
            return {"idf": np.ones(inputs.shape[1])}
        rows = np.bincount(inputs.indices, minlength=inputs.shape[1])
        return {"idf": np.log((1 + inputs.shape[0]) / (1 + rows)) + 1}
    deviation = inputs.std(0)
    return {"mean": inputs.mean(0), "deviation": np.where(deviation, deviation, 1)}


def rescale(scale: Params, inputs: Inputs) -> Inputs:
    """tf-idf rows of Euclidean length 1, or standardised columns, float64."""
    if "idf" in scale:
        rows = inputs.astype(np.float64)
        rows.data = rows.data * np.asarray(scale["idf"])[rows.indices]
        return normalize(rows, copy=False)
    mean, deviation = np.asarray(scale["mean"]), np.asarray(scale["deviation"])
    return (inputs - mean[None]) / deviation[None]
