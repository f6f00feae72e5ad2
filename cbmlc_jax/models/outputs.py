"""What every neural model returns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class Outputs(NamedTuple):
    """What a neural model returns.

    Attributes:
        logits: [B, L]; sigmoid(logits) are the scores.
        intermediate: [U, B, L], further logits that are trained with the weight
            config.model.intermediate_weight; or None.
        loss: [B], a model's own objective per row, given the labels, where it is not
            one of config.loss on the logits; or None.
        decoded: [B, L], the labels that the model itself predicts, without a
            threshold; or None.
    """

    logits: Float[Array, "batch labels"]
    intermediate: Float[Array, "updates batch labels"] | None = None
    loss: Float[Array, " batch"] | None = None
    decoded: Bool[Array, "batch labels"] | None = None
