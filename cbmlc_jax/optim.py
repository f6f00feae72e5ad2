"""Optax chains."""

from __future__ import annotations

import functools

import jax
import optax
from jaxtyping import PyTree


def decayed(rate: float, *, factor: float, times: int, steps: int):
    """rate * factor^i in the i-th (from 0) of `times` + 1 equal parts of `steps`."""
    if not times:
        return rate
    moments = {steps * i // (times + 1): factor for i in range(1, times + 1)}
    return optax.piecewise_constant_schedule(rate, moments)


def make_optimizer(
    *,
    learning_rate: float | optax.Schedule,
    weight_decay: float,
    name: str = "adam",
    beta2: float = 0.999,
    clip_norm: float = 0.0,
    decoupled: bool = False,
    frozen: tuple[str, ...] = (),
    slow: tuple[str, float] | None = None,
) -> optax.GradientTransformation:
    """Adam (beta1 .9), or SGD with momentum .9.

    Args:
        learning_rate: a constant or a schedule of the step; no warm-up.
        weight_decay: coupled, i.e. added to the gradient of all parameters before
            the rest (the paper's), or decoupled (AdamW).
        name: "adam" or "sgd".
        beta2: of Adam.
        clip_norm: the gradient is scaled down to this norm; 0 leaves it.
        decoupled: which kind of weight decay.
        frozen: parameters or modules that stay as they are: a name, or the end of a
            path ("backbone/conv1").
        slow: such a module and the factor on its learning rate.
    """
    decay = optax.add_decayed_weights(weight_decay)
    rule = (
        optax.scale_by_adam(b1=0.9, b2=beta2, eps=1e-8)
        if name == "adam"
        else optax.trace(decay=0.9)
    )
    parts = (rule, decay) if decoupled else (decay, rule)
    if clip_norm:
        parts = (optax.clip_by_global_norm(clip_norm), *parts)
    chain = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
    if slow is not None:
        of_module = functools.partial(_inside, names=slow[:1])
        chain = optax.chain(chain, optax.masked(optax.scale(slow[1]), of_module))
    if not frozen:
        return chain

    def labels(params: PyTree) -> PyTree:
        inside = _inside(params, frozen)
        return jax.tree.map(lambda x: "frozen" if x else "trained", inside)

    return optax.multi_transform(
        {"trained": chain, "frozen": optax.set_to_zero()}, labels
    )


def _inside(params: PyTree, names: tuple[str, ...]) -> PyTree:
    """Of each parameter, whether one of `names` stands in its path."""

    def inside(path, _) -> bool:
        whole = "/".join(["", *(part.key for part in path), ""])
        return any(f"/{name}/" in whole for name in names)

    return jax.tree_util.tree_map_with_path(inside, params)
