"""Inputs -> scores -> four threshold protocols; the same for every model."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from cbmlc_jax import calibration, metrics, thresholds
from cbmlc_jax.decision import Calibration, Decision
from cbmlc_jax.thresholds import Rates

Curves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Validation:
    """Validation scores with all that the protocols may know of their rows.

    Attributes:
        scores: [N, L].
        labels: [N, L] as training sees them; noisy unless noise.validation=clean.
        clean: [N, L], for the clean_val protocol alone.
        prior: [L] mean noisy label of the training rows.
        rates: of the training rows.
        labels_are_clean: nothing to correct in `labels`.
        grid: thresholds to choose from, ascending.
    """

    scores: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    prior: np.ndarray
    rates: Rates
    labels_are_clean: bool = False
    grid: np.ndarray = dataclasses.field(default_factory=lambda: thresholds.GRID)

    def curves(self, protocol: str, by_size: bool = True) -> tuple[Curves, str]:
        """F1 curves over the grid by a protocol, and the protocol that it fell back to.

        corrected_val falls back to noisy_val where the rates leave no information.
        `by_size` False leaves `calibration.row_sizes` out.
        """
        if protocol == "clean_val":
            return thresholds.f1_curves(self.scores, self.clean, self.grid), protocol
        if protocol == "corrected_val" and not self.labels_are_clean:
            if self.rates.usable:
                sizes = None
                if by_size:
                    sizes = calibration.row_sizes(self.scores, self.labels, self.rates)
                curves = thresholds.corrected_curves(
                    self.scores, self.labels, self.prior, self.rates, self.grid, sizes
                )
                return curves, protocol
            protocol = "noisy_val"
        return thresholds.f1_curves(self.scores, self.labels, self.grid), protocol

    def rates_for(self, protocol: str) -> Rates:
        """Noise rates of `labels` by a validation protocol; 0: taken as they are."""
        correct = protocol == "corrected_val" and not self.labels_are_clean
        return self.rates if correct and self.rates.usable else Rates(0.0, 0.0)

    def calibrate(self, kind: str, protocol: str) -> Calibration:
        """Scores to probabilities, fitted on the labels as a protocol sees them."""
        labels = self.clean if protocol == "clean_val" else self.labels
        rates = self.rates_for(protocol)
        sizes = None
        if kind == "isotonic":
            sizes = calibration.row_sizes(self.scores, labels, rates)
        return calibration.fit(kind, self.scores, labels, rates, sizes)

    def per_label(self, protocol: str) -> np.ndarray:
        """A threshold for each label, by a validation protocol; see
        `thresholds.expected_per_label`, of isotonic probabilities."""
        found = self.calibrate("isotonic", protocol)
        p = np.where(self.scores > 0, found.apply(self.scores), 0)  # 0: ignored
        return thresholds.expected_per_label(self.scores, p)

    def per_row(self, protocol: str, kind: str = "isotonic") -> Decision:
        """The labels of each row by its expected F1; see `decision.expected_per_row`,
        of probabilities by a kind of calibration."""
        found = self.calibrate(kind, protocol)
        return Decision(None, calibration=found, of_calibrated=True)


def selection_score(validation: Validation, protocol: str) -> tuple[float, str]:
    """The best miF1 over the thresholds by `protocol`; what chooses an epoch.

    Rows' sizes come from the scores, and models that are compared must not each weigh
    the rows in its own way.
    """
    curves, used = validation.curves(protocol, by_size=False)
    return float(curves["miF1"].max()), used


def choose(validation: Validation) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Thresholds without a look at test rows.

    Returns:
        {protocol: {F1: threshold}} of every protocol but oracle, and a warning for each
        that fell back to another one.
    """
    chosen, warnings = {}, []
    for protocol in thresholds.PROTOCOLS[1:]:
        curves, used = validation.curves(protocol)
        if used != protocol:
            warnings.append(f"{validation.rates.reason}: {protocol} is {used}")
        elif protocol == "corrected_val" and validation.rates.partial:
            warnings.append(f"{validation.rates.reason} in {protocol}")
        chosen[protocol] = thresholds.choose(curves, validation.grid)
    return chosen, warnings


def protocols(
    validation: Validation,
    test_scores: Float[np.ndarray, "rows labels"],
    test_labels: np.ndarray,
    decoded: Bool[np.ndarray, "rows labels"] | None = None,
) -> tuple[dict, list[str]]:
    """Scores on test under every protocol.

    Args:
        validation: what thresholds are chosen on.
        test_scores, test_labels: [N, L].
        decoded: [N, L] what the model itself predicts, where it does.

    Returns:
        The parts of a result row, and warnings for the user:
        {"metrics": {protocol: {F1: value}}, "thresholds": {...}, "ranking": {...},
        "expected_f1_metrics": see `_expected`}.
    """
    honest, warnings = choose(validation)
    test = thresholds.f1_curves(test_scores, test_labels)
    chosen = {"oracle": thresholds.choose(test)} | honest
    parts = {
        "metrics": {
            protocol: {
                name: _f1s(thresholds.apply(test_scores, t), test_labels)[name]
                for name, t in chosen[protocol].items()
            }
            for protocol in thresholds.PROTOCOLS
        },
        "expected_f1_metrics": {
            protocol: _expected(validation, protocol, test_scores, test_labels)
            for protocol in thresholds.PROTOCOLS[1:]
        },
        "thresholds": chosen,
        "ranking": metrics.ranking(test_scores, test_labels),
    }
    if decoded is not None:
        parts["decoded_metrics"] = _f1s(decoded, test_labels)
    return parts, warnings


def _expected(validation: Validation, protocol: str, scores, labels) -> dict:
    """{"per_row": {F1: value}, "per_label": {F1: value}} on test: each row's labels by
    its expected F1, which is meant for ebF1; a threshold for each label, for maF1."""
    per_row = validation.per_row(protocol).apply(scores)
    per_label = thresholds.apply(scores, validation.per_label(protocol))
    return {"per_row": _f1s(per_row, labels), "per_label": _f1s(per_label, labels)}


def _f1s(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return metrics.f1_scores(metrics.count(predicted, labels))
