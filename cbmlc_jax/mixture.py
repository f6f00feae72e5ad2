"""How much each member of a mixture counts, chosen on validation scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

STEPS = (0.2, 0.1, 0.05)  # of a weight that moves from one member to another


def mixed(
    scores: Sequence[Float[np.ndarray, "rows labels"]], weights: Sequence[float]
) -> Float[np.ndarray, "rows labels"]:
    """float32 [N, L]: sum_m w_m scores_m."""
    total = sum(np.float32(w) * s for s, w in zip(scores, weights, strict=True) if w)
    return total.astype(np.float32)


def choose(
    scores: Sequence[Float[np.ndarray, "rows labels"]],
    value: Callable[[np.ndarray], float],
) -> tuple[list[float], float]:
    """Weights of the members, and the value of the mixture: hill climbing.

    From the best single member on, the move of a step of weight from one member to
    another that gains most is made while there is one that gains; then with the next
    smaller step.  Ties go to the move of the earlier members.

    Args:
        scores: of M members, each [N, L] on the validation rows.
        value: of mixed scores; the larger the better.

    Returns:
        [M] weights, not negative, of sum 1; and `value` there.
    """
    number = len(scores)
    singles = [value(s) for s in scores]
    best = max(singles)
    units = round(1 / STEPS[-1])  # weights are whole numbers of the smallest step
    weights = [units * (i == singles.index(best)) for i in range(number)]
    for step in STEPS:
        size = round(step * units)
        while True:
            moves = []
            for source, target in itertools.permutations(range(number), 2):
                if weights[source] < size:
                    continue
                moved = list(weights)
                moved[source] -= size
                moved[target] += size
                moves.append((value(mixed(scores, np.array(moved) / units)), moved))
            found = max(moves, key=lambda m: m[0], default=(best, weights))
            if found[0] <= best:
                break
            best, weights = found
    return [w / units for w in weights], best
