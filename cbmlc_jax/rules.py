"""From a rule that the user states to a Decision, on validation scores alone."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
from jaxtyping import Float, Int

from cbmlc_jax import thresholds
from cbmlc_jax.decision import Decision
from cbmlc_jax.evaluate import Validation
from cbmlc_jax.thresholds import Rates

# One-sided 90 % of a normal distribution.
_DOUBT = 1.2816
PRECISION_GRID = np.round(np.arange(1, 200) / 200, 3)


class RuleError(ValueError):
    """A rule that cannot be followed; the message says what can."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How labels are chosen from scores.  One of `threshold`, `per_label`, `per_row`,
    `precision`, or none of them: the run's threshold for `metric`.

    Attributes:
        protocol: whose labels: auto, corrected_val, noisy_val; for the run's threshold
            also oracle and clean_val.
        metric: the F1 that the run's threshold is best for.
        threshold: a number.
        per_label: a threshold for each label, see `thresholds.expected_per_label`.
        per_row: those of the best expected F1, see `decision.expected_per_row`; the
            probabilities that it is expected by are written, too.
        precision: see `at_precision`.
        min_labels, max_labels: of a row, see `Decision`; both k: the k best.
        calibrate: none, or one of `calibration.KINDS`, for the scores that are written.
            The run's thresholds are of the model's own scores all the same;
            `threshold` is of those that are written.
    """

    protocol: str = "auto"
    metric: str = "miF1"
    threshold: float | None = None
    per_label: bool = False
    per_row: bool = False
    precision: float | None = None
    min_labels: int = 0
    max_labels: int | None = None
    calibrate: str = "none"

    @property
    def reads_validation(self) -> bool:
        """Whether the result row is not enough."""
        chosen = self.per_label or self.per_row or self.precision is not None
        return chosen or self.calibrate != "none"

    def check(self) -> None:
        """Raises RuleError where the fields contradict each other."""
        stated = [
            name
            for name in ("threshold", "per_label", "per_row", "precision")
            if getattr(self, name) not in (None, False)
        ]
        if len(stated) > 1:
            raise RuleError(
                f"--{stated[0]} and --{stated[1]} both say which threshold: give one"
            )
        if self.max_labels is not None and self.min_labels > self.max_labels:
            raise RuleError(
                f"--min_labels={self.min_labels} is more than "
                f"--max_labels={self.max_labels}"
            )
        if self.reads_validation and self.protocol in ("oracle", "clean_val"):
            names = [*stated, "calibrate"]
            raise RuleError(
                f"--{names[0]} is chosen on the validation labels as they are: give "
                "--protocol=corrected_val or noisy_val"
            )


RUNS = Rule()


def choose(rule: Rule, row: dict | None, validation: Validation | None) -> Decision:
    """The decision that a rule leads to.

    Args:
        rule: what the user wants.
        row: result row of the run; None is enough for a rule with a threshold.
        validation: of the run, where `rule.reads_validation`.

    Raises:
        RuleError: the rule contradicts itself or cannot be reached, or the run is not
            finished.
    """
    rule.check()
    limits = {"min_labels": rule.min_labels, "max_labels": rule.max_labels}
    calibrate = rule.calibrate != "none"
    if rule.threshold is not None and not calibrate:
        return Decision(rule.threshold, **limits, chosen={"rule": "given"})
    if row is None:
        raise RuleError(
            "the run is not finished, so nothing could be chosen: let it finish or "
            "give --threshold"
        )
    protocol = protocol_of(rule.protocol, row)
    if rule.per_row:
        kind = rule.calibrate if calibrate else "isotonic"
        threshold, chosen = None, {"rule": "per_row", "protocol": protocol}
    else:
        kind = rule.calibrate
        threshold, chosen = _threshold(rule, protocol, row, validation)
    found = None
    if kind != "none":
        found = validation.calibrate(kind, protocol)
        chosen |= {"calibration": kind, "calibrated_by": protocol}
    return Decision(
        threshold,
        **limits,
        calibration=found,
        of_calibrated=rule.per_row or (calibrate and rule.threshold is not None),
        chosen=chosen,
    )


def _threshold(rule: Rule, protocol: str, row: dict, validation: Validation | None):
    """The threshold, and how it was chosen."""
    if rule.threshold is not None:
        return rule.threshold, {"rule": "given"}
    if rule.per_label:
        chosen = {"rule": "per_label", "protocol": protocol}
        return validation.per_label(protocol), chosen
    if rule.precision is not None:
        threshold, found = at_precision(
            validation.scores,
            validation.labels,
            validation.rates_for(protocol),
            rule.precision,
        )
        return threshold, {"rule": "precision", "protocol": protocol} | found
    chosen = {"rule": "global", "protocol": protocol, "metric": rule.metric}
    return row["thresholds"][protocol][rule.metric], chosen


def protocol_of(protocol: str, row: dict) -> str:
    """A protocol that the rates of the run allow."""
    rates = Rates(**row["rates"])
    if rates.usable or protocol not in ("auto", "corrected_val"):
        return "corrected_val" if protocol == "auto" else protocol
    warnings.warn(
        f"{rates.reason}: the threshold is that of noisy_val, which is biased by the "
        "noise",
        stacklevel=3,
    )
    return "noisy_val"


def at_precision(
    scores: Float[np.ndarray, "rows labels"],
    noisy: Int[np.ndarray, "rows labels"],
    rates: Rates,
    target: float,
    grid: np.ndarray = PRECISION_GRID,
) -> tuple[float, dict]:
    """The lowest threshold from which on precision is at least `target`.

    Of the n entries with score >= t let q be the share of noisy positives.  Then

        precision = (q - r0) / (1 - r0 - r1),

    because r0 and r1 do not depend on the score given the clean label.  What has to
    reach the target is the same with the lower end of Wilson's interval of q, one-sided
    90 %, so that few entries do not promise much: n = 10 without an error stand for
    .86.  The entries of a row depend on each other, so that 90 % are nominal.

    Args:
        scores: [N, L] on validation rows.
        noisy: [N, L] their labels.
        rates: of the noise; 0 for labels that are taken as they are.
        target: in (0, 1].
        grid: [T] thresholds, ascending.

    Returns:
        The threshold, and {"target", "precision", "at_least", "entries"} there.

    Raises:
        RuleError: no threshold reaches it; the message has the best value.
    """
    entries = thresholds.above(scores, None, 0, grid).sum(1)
    positive = thresholds.above(scores, noisy.astype(np.float64), 0, grid).sum(1)
    share = positive / np.maximum(entries, 1)
    low = _wilson_low(share, np.maximum(entries, 1))
    precision, bound = (
        np.where(entries > 0, np.clip((q - rates.r0) / rates.information, 0, 1), 0)
        for q in (share, low)
    )
    reached = np.flatnonzero(bound >= target)
    if not len(reached):
        best = int(np.argmax(bound))
        raise RuleError(
            f"no threshold promises a precision of {target:g}: the best on "
            f"{len(scores)} validation rows is {bound[best]:.3f} (estimate "
            f"{precision[best]:.3f}, {int(entries[best])} entries) at "
            f"{grid[best]:g}: give --precision={np.floor(100 * bound[best]) / 100:g}"
        )
    first = reached[0]
    return float(grid[first]), {
        "target": target,
        "precision": round(float(precision[first]), 4),
        "at_least": round(float(bound[first]), 4),
        "entries": int(entries[first]),
    }


def _wilson_low(share: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Lower end of the score interval of a proportion (Wilson 1927)."""
    z2 = _DOUBT**2 / entries
    spread = _DOUBT * np.sqrt(share * (1 - share) / entries + z2 / (4 * entries))
    return (share + z2 / 2 - spread) / (1 + z2)
