"""Kernel ridge regression in two stages, the second of which reads the label scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float, UInt8
from sklearn.preprocessing import normalize

from cbmlc_jax.models.baselines import logistic_regression as linear
from cbmlc_jax.models.baselines.estimator import Inputs, Params, pack, unpack
from cbmlc_jax.models.baselines.lr_knn import trust

MOST_ROWS = 20_000  # three matrices of N x N float32: 4.8 GB
_CHUNK = 4096  # query rows at once
_SQUARE = 2.0  # of the squared cosine in the kernel
_LATER = 2.0  # penalty of the second stage over that of the first
_LEAST = 1e-3  # no row's trust is less


class TooManyRowsError(ValueError):
    """Rows whose pairs do not fit into memory; the message says what to take."""


@dataclasses.dataclass(frozen=True)
class KernelRidge:
    """score = p + sum_i k(x, x_i) a_i, with a kernel of inputs and of label scores.

    With c the cosine of tf-idf (or standardised) rows, Y the labels, p their mean and W
    a diagonal of trust in the rows, 1 unless something is known of them:

        k_1 = c + 2 c^2             a_1 = (K_1 + penalty W^-1)^-1 (Y - p)
        s_i = y_i - a_1i / ((K_1 + penalty W^-1)^-1)_ii      leave-one-out scores
        u   = max(s - m, 0) / |max(s - m, 0)|                m the median of all s_il
        k_2 = k_1 + scores (u . u')^2   a_2 = (K_2 + 2 penalty W^-1)^-1 (Y - p)

    The second stage compares rows by the labels that they seem to have, which no label
    by itself can; the leave-one-out scores in the place of fitted ones keep it from
    reading a row's own labels.  The square loss is what noise leaves in place: labels
    flipped at rates that are the same everywhere change the regression by a factor and
    a constant alone.

    With rates a_i of labels that were added to row i, y_i stands for (y_i - a_i) /
    (1 - a_i), and W is `lr_knn.trust`, as in the vote of `LRkNN`.  The numbers above
    were chosen by five folds of bibtex's training rows under the five noises.

    Attributes:
        penalty: above 0.
        scores_weight: of (u . u')^2; 0 leaves the second stage out.
    """

    penalty: float = 1.0
    scores_weight: float = 1.0

    def fit(
        self,
        inputs: Inputs,
        labels: UInt8[np.ndarray, "rows labels"] | Float[np.ndarray, "rows labels"],
        added: Float[np.ndarray, " rows"] | None = None,
        weights: Float[np.ndarray, " rows"] | None = None,
    ) -> Params:
        """Rows, a_1 and a_2 float32 [N, L], u float32 [N, L], m, p and the scale.

        Args:
            inputs: [N, F].
            labels: [N, L].
            added: [N], see above.
            weights: [N] factors of W.

        Raises:
            TooManyRowsError: more than MOST_ROWS.
        """
        if len(labels) > MOST_ROWS:
            raise TooManyRowsError(
                f"kernel_ridge compares all pairs of rows: {len(labels)} are more than "
                f"{MOST_ROWS}: take lr_knn"
            )
        scale = linear.fit_scale(inputs)
        rows = _unit(scale, inputs)
        targets, worth = labels.astype(np.float32), np.ones(len(labels), np.float32)
        if added is not None:
            a = np.asarray(added, np.float32)[:, None]
            targets, worth = (targets - a) / (1 - a), trust(a[:, 0], labels)
        if weights is not None:
            worth = worth * np.asarray(weights, np.float32)
        worth = np.maximum(worth, np.float32(_LEAST))
        mean = np.average(targets, axis=0, weights=worth).astype(np.float32)
        doubt = np.float32(self.penalty) / worth
        kernel = _of_inputs(rows, rows)
        first, seen = leave_one_out(kernel, targets, mean, doubt)
        params = {"scale": scale, "rows": pack(rows), "mean": mean, "first": first}
        if not self.scores_weight:
            return params
        level = np.median(seen)
        units = _direction(seen, level)
        kernel += np.float32(self.scores_weight) * np.square(units @ units.T)
        second = scipy.linalg.solve(
            _penalised(kernel, np.float32(_LATER) * doubt),
            targets - mean,
            assume_a="pos",
            overwrite_a=True,
        )
        return params | {"level": level, "units": units, "second": second}

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L], cut to [0, 1]."""
        rows, queries = unpack(params["rows"]), _unit(params["scale"], inputs)
        names = ("mean", "first", "level", "units", "second")
        mean, first, level, units, second = (
            np.asarray(params[k]) if k in params else None for k in names
        )
        found = np.zeros((queries.shape[0], len(mean)), np.float32)
        for start in range(0, queries.shape[0], _CHUNK):
            kernel = _of_inputs(queries[start : start + _CHUNK], rows)
            part = mean + kernel @ first
            if self.scores_weight:
                near = np.square(_direction(part, level) @ units.T)
                kernel += np.float32(self.scores_weight) * near
                part = mean + kernel @ second
            found[start : start + _CHUNK] = part
        return np.clip(found, 0, 1)


def leave_one_out(
    kernel: Float[np.ndarray, "n n"],
    targets: Float[np.ndarray, "n labels"],
    mean: Float[np.ndarray, " labels"],
    doubt: Float[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "n labels"], Float[np.ndarray, "n labels"]]:
    """Coefficients of ridge regression, and each row's score by all others'.

        A = (K + diag(doubt))^-1,  a = A (Y - mean),  s_i = y_i - a_i / A_ii

    s_i is exactly what the regression on the other rows gives, with this mean.
    """
    inverse = np.linalg.inv(_penalised(kernel, doubt))
    coefficients = inverse @ (targets - mean)
    return coefficients, targets - coefficients / np.diag(inverse)[:, None]


def _unit(scale: Params, inputs: Inputs) -> Inputs:
    return normalize(linear.rescale(scale, inputs)).astype(np.float32)


def _of_inputs(rows: Inputs, others: Inputs) -> Float[np.ndarray, "rows others"]:
    """k_1, float32."""
    cosine = rows @ others.T
    cosine = cosine if isinstance(cosine, np.ndarray) else cosine.toarray()
    return cosine + np.float32(_SQUARE) * np.square(cosine)


def _penalised(
    kernel: Float[np.ndarray, "n n"], doubt: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n n"]:
    matrix = kernel.copy()
    matrix[np.diag_indices(len(matrix))] += doubt
    return matrix


def _direction(
    scores: Float[np.ndarray, "rows labels"], level: np.ndarray
) -> Float[np.ndarray, "rows labels"]:
    """u of rows of scores; 0 for a row with none above the level."""
    return normalize(np.maximum(scores - level, 0)).astype(np.float32)
