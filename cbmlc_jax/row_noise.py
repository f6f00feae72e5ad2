"""How many labels were added to each row, from noisy labels and held-out scores alone.

Annotators differ: one tags with care, another ticks a tenth of all boxes.  One rate for
all rows then describes none of them, and the rows of the careless one, where almost
every label is wrong, count as much as the others.  The number of labels that a row has
beyond what its scores announce tells them apart.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

# Rates of the mixture: labels added, and labels lost beyond what the scores know of.
ADDED = (0.0, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4)
LOST = (0.0, 0.2, 0.4, 0.6, 0.8)
STEPS = 200  # of the mixture's weights
LEAST = 1e-4  # no probability is nearer to 0 or 1


def added(
    scores: Float[np.ndarray, "rows labels"],
    labels: UInt8[np.ndarray, "rows labels"],
    mean: float,
) -> Float[np.ndarray, " rows"]:
    """P(0->1) of each row: posterior means under a mixture over rows.

    With c_il = (score_il - mean) / (1 - mean), the probability that label l belongs to
    row i and was kept, a row of rates (a, b) has y_il = 1 with probability
    (1 - b) c_il + a (1 - c_il), independently over labels.  The share of the rows that
    each pair of ADDED x LOST has is that of the largest likelihood (a nonparametric
    mixture, by EM); a row's rate is the mean of a over the pairs, given its labels.

    What a row lost cannot be told from what it never had: only a is returned.

    Args:
        scores: [N, L] probabilities of the noisy labels, of models that did not see
            the row's.
        labels: [N, L], 0 or 1.
        mean: P(0->1) over all rows, of `rates.estimate` or known; in [0, 1).

    Returns:
        float32 [N].
    """
    kept = np.clip((scores - mean) / (1 - mean), LEAST, 1 - LEAST)
    on = labels != 0
    pairs = np.array([(a, b) for a in ADDED for b in LOST])
    fit = np.empty((len(labels), len(pairs)))
    for k, (a, b) in enumerate(pairs):
        p = np.clip((1 - b) * kept + a * (1 - kept), LEAST**2, 1 - LEAST**2)
        fit[:, k] = np.log(np.where(on, p, 1 - p)).sum(1)
    fit = np.exp(fit - fit.max(1, keepdims=True))
    share = np.full(len(pairs), 1 / len(pairs))
    for _ in range(STEPS):
        posterior = fit * share
        posterior /= posterior.sum(1, keepdims=True)
        share = posterior.mean(0)
    return (posterior @ pairs[:, 0]).astype(np.float32)
