"""Optax chains."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PyTree


def make_optimizer(
    *,
    learning_rate: float,
    weight_decay: float,
    decoupled: bool = False,
    frozen: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """Adam (betas .9, .999) with a constant learning rate.

    Args:
        learning_rate: constant, no warm-up.
        weight_decay: coupled, i.e. added to the gradient of all parameters before
            Adam (the paper's), or decoupled (AdamW).
        decoupled: which of the two.
        frozen: names of parameters (last part of the path) that stay as they are.
    """
    decay = optax.add_decayed_weights(weight_decay)
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    parts = (adam, decay) if decoupled else (decay, adam)
    chain = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
    if not frozen:
        return chain

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if path[-1].key in frozen else "trained", params
        )

    return optax.multi_transform(
        {"trained": chain, "frozen": optax.set_to_zero()}, labels
    )
