"""One-vs-rest logistic regression: the anchor for every other model."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, UInt8
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression as _Regression
from sklearn.preprocessing import normalize

from cbmlc_jax.models.baselines.estimator import Inputs, Params

# Of the fit with rates of added labels.
_BLOCK = 16  # labels at once
_ITERATIONS, _TOLERANCE = 60, 1e-6  # of L-BFGS, and its relative decrease at the end
_LEAST = 1e-7  # no probability is less


@dataclasses.dataclass(frozen=True)
class LogisticRegression:
    """score_l = sigmoid(w_l . z + b_l), each label fitted by itself (liblinear).

        min_{w, b}  (|w_l|^2 + b_l^2) / 2
                    + C sum_i log(1 + exp(-(2 y_il - 1) (w_l . z_i + b_l)))

    z are tf-idf rows of length 1 for sparse inputs, standardised columns for dense
    ones (of which b is not in the penalty, and the solver is L-BFGS).  A label that is
    the same on all rows has w = 0 and the log odds of (positives + 1/2) / (N + 1) as b.

    With rates a_i of labels that were added to row i, the loss of an entry is that of
    its label given the rate (`losses.forward` with r0 = a_i and r1 = 0), and the score
    the probability of a label that holds and was kept.  That is not convex: L-BFGS
    starts at w = 0.

    Attributes:
        cost: C.
    """

    cost: float = 1.0

    def fit(
        self,
        inputs: Inputs,
        labels: UInt8[np.ndarray, "rows labels"] | Float[np.ndarray, "rows labels"],
        added: Float[np.ndarray, " rows"] | None = None,
        weights: Float[np.ndarray, " rows"] | None = None,
        ignored: Bool[np.ndarray, "rows labels"] | None = None,
    ) -> Params:
        """weights float32 [F, L], bias float32 [L], and the scale of the inputs.

        Args:
            inputs: [N, F].
            labels: [N, L]; between 0 and 1 it counts as y ones and 1 - y zeros.
            added: [N], see above; with it the labels are 0 or 1.
            weights: [N] factors of the rows' terms in the sum over i; the scale does
                not read them, and neither does a fit with `added`.
            ignored: [N, L] entries that do not count.
        """
        scale = fit_scale(inputs)
        rows = rescale(scale, inputs)
        counted = np.full(labels.shape[1], len(labels))
        if ignored is not None:
            counted = (~ignored).sum(0)
            labels = np.where(ignored, 0, labels)
        positives = labels.sum(0, dtype=np.float64)
        share = (positives + 0.5) / (counted + 1)
        coefficients = np.zeros((inputs.shape[1], labels.shape[1]), np.float32)
        bias = np.log(share / (1 - share)).astype(np.float32)

        varying = np.flatnonzero((positives > 0) & (positives < len(labels)))
        if added is not None:
            found = coefficients, bias
            _fit_added(rows, labels, added, ignored, self.cost, varying, found)
            return {"weights": coefficients, "bias": bias, "scale": scale}

        # liblinear would store dense rows as sparse ones, at many times the cost.
        solver = {"solver": "liblinear"}
        if not scipy.sparse.issparse(rows):
            solver = {"solver": "lbfgs", "max_iter": 1000}

        def one(label: int) -> None:
            model = _Regression(C=self.cost, **solver)
            left_out = None if ignored is None else ignored[:, label]
            model.fit(*_examples(rows, labels[:, label], left_out, weights))
            coefficients[:, label], bias[label] = model.coef_[0], model.intercept_[0]

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


def _examples(
    rows: Inputs,
    labels: np.ndarray,
    ignored: np.ndarray | None,
    weights: np.ndarray | None,
) -> tuple:
    """Rows, labels 0 or 1, and weights (None: all 1) of one label's fit.

    A row whose label y lies between stands there twice, with weights y and 1 - y.
    """
    if ignored is None and labels.dtype == np.uint8:
        return rows, labels, weights
    kept = np.arange(len(labels)) if ignored is None else np.flatnonzero(~ignored)
    between = kept[(labels[kept] > 0) & (labels[kept] < 1)]
    on = np.concatenate([labels[kept] >= 0.5, labels[between] < 0.5])
    chosen = np.concatenate([kept, between])
    weight = np.where(on, labels[chosen], 1 - labels[chosen])
    if weights is not None:
        weight = weight * weights[chosen]
    return rows[chosen], on.astype(np.uint8), weight


def _fit_added(rows, labels, added, ignored, cost, varying, found) -> None:
    """Fills in coefficients and bias of the labels `varying`, in blocks of like size.

    Both are penalised, as by liblinear; of dense rows b is not.
    """
    rows = rows.astype(np.float32)
    across = rows.T.tocsr() if scipy.sparse.issparse(rows) else rows.T
    a = added.astype(np.float32)[:, None]
    penalised = np.ones((rows.shape[1] + 1, 1), np.float32)
    penalised[-1] = scipy.sparse.issparse(rows)

    def block(some: np.ndarray) -> None:
        on = labels[:, some] != 0
        sign = np.where(on, np.float32(1), np.float32(-1)) * (1 - a)
        counts = np.float32(1)
        if ignored is not None:
            counts = (~ignored[:, some]).astype(np.float32)
        floor = np.maximum(np.where(on, a, 1 - a), np.float32(_LEAST))
        start = np.zeros((rows.shape[1] + 1, len(some)), np.float32)
        share = np.clip((on.mean(0) - a.mean()) / (1 - a.mean()), _LEAST, 1 - _LEAST)
        start[-1] = np.log(share / (1 - share))

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = flat.reshape(start.shape).astype(np.float32)
            p = expit(rows @ w[:-1] + w[-1:])
            given = np.maximum(floor + sign * p, np.float32(_LEAST))
            slope = -counts * sign / given * p * (1 - p)
            gradient = np.empty_like(w)
            gradient[:-1], gradient[-1] = across @ slope, slope.sum(0)
            shrunk = penalised * w / cost
            loss = -(counts * np.log(given)).sum(dtype=np.float64)
            loss += 0.5 * float((shrunk.astype(np.float64) * w).sum())
            return loss, (gradient + shrunk).ravel().astype(np.float64)

        best = minimize(
            objective,
            start.ravel().astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _ITERATIONS, "ftol": _TOLERANCE},
        )
        w = best.x.reshape(start.shape)
        found[0][:, some], found[1][some] = w[:-1], w[-1]

    order = varying[np.argsort(-labels[:, varying].sum(0, dtype=np.int64))]
    blocks = [order[i : i + _BLOCK] for i in range(0, len(order), _BLOCK)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(block, blocks))


def fit_scale(inputs: Inputs) -> Params:
    """What `rescale` needs: idf [F] of sparse inputs, mean and deviation of dense.

    idf_f = log((1 + N) / (1 + #{rows with f})) + 1 for counts, under the name
    "sublinear_idf"; 1, as "idf", where the inputs are weights already, i.e. not whole
    numbers.
    """
    if scipy.sparse.issparse(inputs):
        if (inputs.data % 1).any():
            return {"idf": np.ones(inputs.shape[1])}
        rows = np.bincount(inputs.indices, minlength=inputs.shape[1])
        return {"sublinear_idf": np.log((1 + inputs.shape[0]) / (1 + rows)) + 1}
    deviation = inputs.std(0)
    return {"mean": inputs.mean(0), "deviation": np.where(deviation, deviation, 1)}


def rescale(scale: Params, inputs: Inputs) -> Inputs:
    """tf-idf rows of Euclidean length 1, or standardised columns, float64.

    tf = 1 + log(count): a word that stands ten times in a text says little more than
    one that stands there twice.  Models fitted before 0.5.0 have "idf" for counts, too,
    and take the count itself.
    """
    if "mean" in scale:
        mean, deviation = np.asarray(scale["mean"]), np.asarray(scale["deviation"])
        return (inputs - mean[None]) / deviation[None]
    rows = inputs.astype(np.float64)
    if "sublinear_idf" in scale:
        rows.data = (
            sublinear(rows.data) * np.asarray(scale["sublinear_idf"])[rows.indices]
        )
    else:
        rows.data = rows.data * np.asarray(scale["idf"])[rows.indices]
    return normalize(rows, copy=False)


def sublinear(count: np.ndarray) -> np.ndarray:
    """1 + log(count) above 1, the count itself below."""
    return np.where(count > 1, 1 + np.log(np.maximum(count, 1)), count)
