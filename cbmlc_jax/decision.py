"""Which labels are said of a row, given its scores: numpy alone, for serving too.

`rules.choose` makes a Decision from validation scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A map of scores to probabilities that never falls; `calibration.fit` finds it.

        p = sigmoid(slope logit(score) + shift), or interpolated between knots

    Attributes:
        kind: "temperature" (shift 0), "platt" or "isotonic".
        slope: 1 / temperature, above 0.
        shift: of the logits.
        knots: [(score, probability)], both ascending; () for the other kinds.
    """

    kind: str
    slope: float = 1.0
    shift: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """float64 probabilities, of the scores' shape."""
        if self.knots:
            return np.interp(scores, *zip(*self.knots, strict=True))
        return 1 / (1 + np.exp(-self.slope * logit(scores) - self.shift))

    @classmethod
    def from_json(cls, fields: dict) -> Calibration:
        """From what dataclasses.asdict made of one.

        Raises:
            ValueError: it is none.
        """
        try:
            numbers = {key: float(fields[key]) for key in ("slope", "shift")}
            knots = tuple((float(x), float(y)) for x, y in fields["knots"])
            found = cls(**fields | numbers | {"knots": knots})
        except (TypeError, KeyError, ValueError):
            raise ValueError("its calibration is damaged") from None
        points = np.array(knots, np.float64).reshape(-1, 2)
        finite = np.isfinite([*points.flat, found.slope, found.shift]).all()
        if not (finite and (np.diff(points, axis=0) >= 0).all() and found.slope > 0):
            raise ValueError("its calibration does not rise")
        return found


def logit(scores: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) in float64, of p held in [1e-7, 1 - 1e-7]."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Labels with score >= threshold, at least and at most so many of each row.

    Attributes:
        threshold: of all labels, or float64 [L], one for each; None: each row's own,
            see `expected_per_row`, of `calibration`'s probabilities.
        min_labels: where fewer reach it, the best scores up to so many are added.
        max_labels: of those that reach it only so many best stay; None: all.
        calibration: of the scores that are written, or None.
        of_calibrated: the threshold is of these, not of the model's scores.
        chosen: how it was chosen, for the model card; JSON.
    """

    threshold: float | np.ndarray | None
    min_labels: int = 0
    max_labels: int | None = None
    calibration: Calibration | None = None
    of_calibrated: bool = False
    chosen: dict = dataclasses.field(default_factory=dict)

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """bool [N, L] of scores [N, L]; of equal scores the lower label is the better.

        In float64, as thresholds are stored: float32(.3) would not reach .3.
        """
        shown = self.probabilities(scores) if self.of_calibrated else scores
        if self.threshold is None:
            said = expected_per_row(scores, np.where(scores > 0, shown, 0))
        else:
            said = shown.astype(np.float64) >= self.threshold
        if not self.min_labels and self.max_labels is None:
            return said
        place = np.argsort(ranked(scores), axis=1)
        # Those that reach it first, then the others, each best first.
        among = np.argsort(np.where(said, place, place + scores.shape[1]), axis=1)
        place = np.argsort(among, axis=1)
        most = scores.shape[1] if self.max_labels is None else self.max_labels
        return (said & (place < most)) | (place < self.min_labels)

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """What is written of scores: calibrated, where there is a calibration."""
        return self.calibration.apply(scores) if self.calibration else scores

    def lines(
        self, names: Sequence[str], scores: np.ndarray, top_k: int | None = None
    ) -> Iterator[dict]:
        """What is written of each row: {"labels": [...], "scores": {label: score}}.

        Args:
            names: of the L labels.
            scores: [N, L].
            top_k: write only so many best scores.
        """
        said, shown = self.apply(scores), self.probabilities(scores)
        for score, mine, order in zip(shown, said, ranked(scores), strict=True):
            yield {
                "labels": [names[i] for i in order if mine[i]],
                "scores": {names[i]: round(float(score[i]), 6) for i in order[:top_k]},
            }

    def to_json(self) -> dict:
        """For `from_json`."""
        fields = dataclasses.asdict(self)
        if isinstance(self.threshold, np.ndarray):
            fields["threshold"] = self.threshold.tolist()
        return fields

    @classmethod
    def from_json(cls, fields: dict, num_labels: int) -> Decision:
        """The inverse of `to_json`.

        Raises:
            ValueError: fields are missing, unknown, or not of `num_labels` labels.
        """
        if not isinstance(fields, dict):
            raise ValueError("it is no object")
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise ValueError(f"its fields are not {', '.join(sorted(names))}")
        threshold = fields["threshold"]
        if isinstance(threshold, list):
            threshold = np.array(threshold, np.float64)
            if threshold.shape != (num_labels,):
                raise ValueError(f"its thresholds are not those of {num_labels} labels")
        elif type(threshold) not in (int, float, type(None)):
            raise ValueError("its threshold is no number")
        if threshold is None:
            if not fields["calibration"] or fields["of_calibrated"] is not True:
                raise ValueError("it has neither a threshold nor a calibration")
        elif not np.isfinite(threshold).all():
            raise ValueError("a threshold is not finite")
        if fields["calibration"] is not None:
            calibration = Calibration.from_json(fields["calibration"])
            fields = fields | {"calibration": calibration}
        least, most = fields["min_labels"], fields["max_labels"]
        if type(least) is not int or not (most is None or type(most) is int):
            raise ValueError("its numbers of labels are no whole numbers")
        return cls(**fields | {"threshold": threshold})


def expected_per_row(scores: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The labels of each row that have the best F1 that is to be expected.

    With p_(1), p_(2), ... the probabilities of a row's labels in falling order of their
    scores, its k best are said, k of the largest

        2 sum_{j <= k} p_(j) / (k + sum_l p_l)

    the smaller k of two; at least one.  (The expected F1 of a row whose labels do not
    depend on each other is a sum over their number; on bibtex it gave the same ebF1
    within .001.)

    Args:
        scores: [N, L].
        probabilities: [N, L] that each label holds, rising with its score.

    Returns:
        bool [N, L].

    References:
        Dembczynski et al. 2011, An exact algorithm for F-measure maximization.
    """
    order = ranked(scores)
    p = np.take_along_axis(probabilities, order, axis=1)
    said = np.arange(1, p.shape[1] + 1)
    best = np.argmax(p.cumsum(1) / (said + p.sum(1, keepdims=True)), axis=1)
    return np.argsort(order, axis=1) <= best[:, None]


def ranked(scores: np.ndarray) -> np.ndarray:
    """[N, L] labels of each row, best first; of equal scores the lower label first."""
    return np.argsort(-scores, axis=1, kind="stable")
