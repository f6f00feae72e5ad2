"""The predictor that does not look at the input: what every model has to beat."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from cbmlc_jax.models.baselines.estimator import Inputs, Params


@dataclasses.dataclass(frozen=True)
class LabelPrior:
    """score_l = the share of training rows that have label l."""

    def fit(self, inputs: Inputs, labels: UInt8[np.ndarray, "rows labels"]) -> Params:
        """prior float32 [L]."""
        return {"prior": labels.mean(0, dtype=np.float64).astype(np.float32)}

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L], the same row N times."""
        prior = np.asarray(params["prior"])
        return np.tile(prior[None], (inputs.shape[0], 1))
