"""Inputs -> scores -> four threshold protocols; the same for every model."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from cbmlc_jax import metrics, thresholds
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

    def curves(self, protocol: str) -> tuple[Curves, str]:
        """F1 curves over the grid by a protocol, and the protocol that it fell back to.

        corrected_val falls back to noisy_val where the rates leave no information.
        """
        if protocol == "clean_val":
            return thresholds.f1_curves(self.scores, self.clean, self.grid), protocol
        if protocol == "corrected_val" and not self.labels_are_clean:
            if self.rates.usable:
                curves = thresholds.corrected_curves(
                    self.scores, self.labels, self.prior, self.rates, self.grid
                )
                return curves, protocol
            protocol = "noisy_val"
        return thresholds.f1_curves(self.scores, self.labels, self.grid), protocol

    def per_label(self, protocol: str) -> np.ndarray:
        """A threshold for each label, by a validation protocol."""
        none = Rates(0.0, 0.0)
        correct = protocol == "corrected_val" and not self.labels_are_clean
        rates = self.rates if correct and self.rates.usable else none
        labels = self.clean if protocol == "clean_val" else self.labels
        prior = self.prior if rates is self.rates else labels.mean(0)
        return thresholds.choose_per_label(
            self.scores, labels, prior, rates, grid=self.grid
        )


def selection_score(validation: Validation, protocol: str) -> tuple[float, str]:
    """The best miF1 over the thresholds by `protocol`; what chooses an epoch."""
    curves, used = validation.curves(protocol)
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
    per_label: bool = False,
    decoded: Bool[np.ndarray, "rows labels"] | None = None,
) -> tuple[dict, list[str]]:
    """Scores on test under every protocol.

    Args:
        validation: what thresholds are chosen on.
        test_scores, test_labels: [N, L].
        per_label: also with a threshold for each label.
        decoded: [N, L] what the model itself predicts, where it does.

    Returns:
        The parts of a result row, and warnings for the user:
        {"metrics": {protocol: {F1: value}}, "thresholds": {...}, "ranking": {...}}.
    """
    honest, warnings = choose(validation)
    test = thresholds.f1_curves(test_scores, test_labels)
    chosen = {"oracle": thresholds.choose(test)} | honest
    scores = {
        protocol: {
            name: metrics.f1_scores(
                metrics.count(thresholds.apply(test_scores, t), test_labels)
            )[name]
            for name, t in chosen[protocol].items()
        }
        for protocol in thresholds.PROTOCOLS
    }
    parts = {
        "metrics": scores,
        "thresholds": chosen,
        "ranking": metrics.ranking(test_scores, test_labels),
    }
    if decoded is not None:
        parts["decoded_metrics"] = metrics.f1_scores(
            metrics.count(decoded, test_labels)
        )
    if per_label:
        parts["per_label_metrics"] = {
            protocol: metrics.f1_scores(
                metrics.count(
                    thresholds.apply(test_scores, validation.per_label(protocol)),
                    test_labels,
                )
            )
            for protocol in thresholds.PROTOCOLS[1:]
        }
    return parts, warnings
