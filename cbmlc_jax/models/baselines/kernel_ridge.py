"""Kernel ridge regression: a second stage reads label scores, rounds undo the noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float, UInt8
from sklearn.isotonic import IsotonicRegression
from sklearn.preprocessing import normalize

from cbmlc_jax.models.baselines import logistic_regression as linear
from cbmlc_jax.models.baselines.estimator import Inputs, Params, pack, unpack
from cbmlc_jax.models.baselines.lr_knn import trust

MOST_ROWS = 20_000  # four matrices of N x N float32: 6.4 GB
_CHUNK = 1024  # query rows at once: a few matrices of 1024 x N float64
SQUARE = 2.0  # of the squared cosine in the kernel
_LATER = 2.0  # penalty of the second stage over that of the first
_LEAST = 1e-3  # no row's trust is less
_GROUP = 64  # entries of like score that calibration takes together
_LEAST_SHARE = 1e-4  # no label is more certain, by its score


class TooManyRowsError(ValueError):
    """Rows whose pairs do not fit into memory; the message says what to take."""


@dataclasses.dataclass(frozen=True)
class KernelRidge:
    """score = p + sum_i k(x, x_i) a_i, with a kernel of inputs and of label scores.

    A fit has two stages.  With c the cosine of tf-idf (or standardised) rows, Y the
    labels, p their mean and W a diagonal of trust in the rows, 1 unless something is
    known of them:

        k_1 = c + 2 c^2             a_1 = (K_1 + penalty W^-1)^-1 (Y - p)
        s_i = y_i - a_1i / ((K_1 + penalty W^-1)^-1)_ii      leave-one-out scores
        u   = max(s - m, 0) / |max(s - m, 0)|                m the median of all s_il
        k_2 = k_1 + scores_weight (u . u')^2   a_2 = (K_2 + 2 penalty W^-1)^-1 (Y - p)

    The second stage compares rows by the labels that they seem to have, which no label
    by itself can; the leave-one-out scores in the place of fitted ones keep it from
    reading a row's own labels.

    Where the labels are noisy at rates r0 = P(0->1) and r1 = P(1->0), this is done
    again `rounds` times, with P(label holds | given label, score) for Y:

        e = the isotonic regression of (y - r0) / (1 - r0 - r1) on leave-one-out scores
        q = (1 - r1) e / ((1 - r1) e + r0 (1 - e))   where y is 1
            r1 e / (r1 e + (1 - r0) (1 - e))         where y is 0

    a step of expectation maximisation whose scores have not seen the label that they
    judge.  As q is nearly free of noise, these fits have a penalty of 1 and W = 1.

    With rates a_i of labels that were added to row i, y_i stands for (y_i - a_i) /
    (1 - a_i) in the first fit, W is `lr_knn.trust` and r0 is a_i.  The numbers above
    were chosen by five folds of bibtex's training rows under the five noises.

    Attributes:
        penalty: of the fit to the labels as they are; above 0.
        scores_weight: of (u . u')^2; 0 leaves the second stage out.
        rounds: of fits to q.
    """

    penalty: float = 1.0
    scores_weight: float = 1.0
    rounds: int = 2

    def fit(
        self,
        inputs: Inputs,
        labels: UInt8[np.ndarray, "rows labels"] | Float[np.ndarray, "rows labels"],
        added: Float[np.ndarray, " rows"] | None = None,
        weights: Float[np.ndarray, " rows"] | None = None,
        rates: tuple[float, float] = (0.0, 0.0),
    ) -> Params:
        """Rows, a_1 and a_2 float32 [N, L], u float32 [N, L], m, p and the scale.

        Args:
            inputs: [N, F].
            labels: [N, L].
            added: [N], see above.
            weights: [N] factors of W.
            rates: r0 and r1 of the labels.

        Raises:
            TooManyRowsError: more than MOST_ROWS.
        """
        if len(labels) > MOST_ROWS:
            raise TooManyRowsError(
                f"kernel_ridge compares all pairs of rows: {len(labels)} are more than "
                f"{MOST_ROWS}: take lr_knn"
            )
        # Scores are computed from these alone, in float64; an exported model does, too.
        scale = {
            name: values.astype(np.float32)
            for name, values in linear.fit_scale(inputs).items()
        }
        rows = _unit(scale, inputs).astype(np.float32)
        kernel = _of_inputs(rows, rows)
        targets, worth = labels.astype(np.float32), np.ones(len(labels), np.float32)
        r0, r1 = np.float32(rates[0]), np.float32(rates[1])
        if added is not None:
            r0 = np.asarray(added, np.float32)[:, None]
            targets, worth = (targets - r0) / (1 - r0), trust(r0[:, 0], labels)
        given = 1 if weights is None else np.asarray(weights, np.float32)
        noisy = bool(self.rounds and (np.any(r0) or r1))
        fitted, seen = self._stages(kernel, targets, worth * given, self.penalty, noisy)
        for left in range(self.rounds if noisy else 0, 0, -1):
            holds = posterior(seen, labels, r0, r1)
            ones = np.ones_like(worth) * given
            fitted, seen = self._stages(kernel, holds, ones, 1.0, left > 1)
        return {"scale": scale, "rows": pack(rows)} | fitted

    def _stages(
        self,
        kernel: Float[np.ndarray, "n n"],
        targets: Float[np.ndarray, "n labels"],
        worth: Float[np.ndarray, " n"],
        penalty: float,
        again: bool,
    ) -> tuple[Params, Float[np.ndarray, "n labels"]]:
        """What `scores` reads; and, if asked for, the leave-one-out scores."""
        worth = np.maximum(worth, np.float32(_LEAST))
        mean = np.average(targets, axis=0, weights=worth).astype(np.float32)
        doubt = np.float32(penalty) / worth
        first, seen = leave_one_out(kernel, targets, mean, doubt)
        if not self.scores_weight:
            return {"mean": mean, "first": first}, seen
        level = np.median(seen)
        units = _direction(seen, level)
        both = units @ units.T
        both = kernel + np.float32(self.scores_weight) * np.square(both, out=both)
        doubt = np.float32(_LATER) * doubt
        if again:
            second, seen = leave_one_out(both, targets, mean, doubt)
        else:
            factor = _factor(both, doubt)
            second = scipy.linalg.cho_solve((factor, True), targets - mean)
        found = {"mean": mean, "first": first, "level": level, "units": units}
        return found | {"second": second}, seen

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L], cut to [0, 1].

        The terms of the sum over i are far larger than their sum: float64.
        """
        rows = unpack(params["rows"]).astype(np.float64)
        queries = _unit(params["scale"], inputs)
        names = ("mean", "first", "level", "units", "second")
        mean, first, level, units, second = (
            np.asarray(params[k], np.float64) if k in params else None for k in names
        )
        found = np.zeros((queries.shape[0], len(mean)), np.float32)
        for start in range(0, queries.shape[0], _CHUNK):
            kernel = _of_inputs(queries[start : start + _CHUNK], rows)
            part = mean + kernel @ first
            if self.scores_weight:
                near = np.square(_direction(part, level) @ units.T)
                kernel += self.scores_weight * near
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
    factor = _factor(kernel, doubt)
    coefficients = scipy.linalg.cho_solve((factor, True), targets - mean)
    invert = scipy.linalg.lapack.get_lapack_funcs("potri", (factor,))
    inverse, _ = invert(factor, lower=True, overwrite_c=True)
    return coefficients, targets - coefficients / np.diag(inverse)[:, None]


def posterior(
    scores: Float[np.ndarray, "n labels"],
    labels: Float[np.ndarray, "n labels"],
    r0: np.ndarray,
    r1: np.ndarray,
) -> Float[np.ndarray, "n labels"]:
    """P(label holds | given label, score), q of `KernelRidge`; float32.

    Args:
        scores: of models that did not see the row's labels; only their order counts.
        labels: given; between 0 and 1 the mean of both cases.
        r0, r1: P(0->1), P(1->0), of all entries or [n, 1].
    """
    share = np.broadcast_to((labels - r0) / (1 - r0 - r1), scores.shape)
    order = np.argsort(scores, axis=None, kind="stable")
    starts = np.arange(0, scores.size, _GROUP)
    size = np.diff(np.append(starts, scores.size))

    def grouped(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values.ravel()[order].astype(np.float64), starts) / size

    rule = IsotonicRegression(out_of_bounds="clip")
    rule.fit(grouped(scores), grouped(share), sample_weight=size)
    e = rule.predict(scores.ravel()).reshape(scores.shape)
    e = np.clip(e, _LEAST_SHARE, 1 - _LEAST_SHARE)
    on = (1 - r1) * e / ((1 - r1) * e + r0 * (1 - e))
    off = r1 * e / (r1 * e + (1 - r0) * (1 - e))
    return (labels * on + (1 - labels) * off).astype(np.float32)


def _unit(scale: Params, inputs: Inputs) -> Inputs:
    """Rescaled rows of length 1, float64."""
    return normalize(linear.rescale(scale, inputs).astype(np.float64))


def _of_inputs(rows: Inputs, others: Inputs) -> Float[np.ndarray, "rows others"]:
    """k_1, in the precision of the rows."""
    cosine = rows @ others.T
    cosine = cosine if isinstance(cosine, np.ndarray) else cosine.toarray()
    return cosine + SQUARE * np.square(cosine)


def _factor(
    kernel: Float[np.ndarray, "n n"], doubt: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n n"]:
    """Lower Cholesky factor of K + diag(doubt)."""
    matrix = kernel.copy(order="F")  # in the order of LAPACK: no further copy
    matrix[np.diag_indices(len(matrix))] += doubt
    return scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True)


def _direction(
    scores: Float[np.ndarray, "rows labels"], level: np.ndarray
) -> Float[np.ndarray, "rows labels"]:
    """u of rows of scores; 0 for a row with none above the level."""
    return normalize(np.maximum(scores - level, 0))
