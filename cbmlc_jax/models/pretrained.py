"""PyTorch's names and layouts -> those of the image networks here."""

from __future__ import annotations

import re

import jax
import numpy as np
from jaxtyping import PyTree

_OF_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
_CLASSIFIERS = ("fc", "_fc", "classifier")


def from_torch(state: dict[str, np.ndarray]) -> PyTree:
    """A network's variables from a state dict.

    Convolutions [out, in, h, w] become [h, w, in, out]; the classifier and counters are
    left out.

    Args:
        state: name -> array, e.g. "layer1.0.conv1.weight".

    Returns:
        {"params": tree, "batch_stats": tree}, float32.

    Raises:
        ValueError: an entry is neither of a convolution nor of a normalisation.
    """
    variables: dict = {"params": {}, "batch_stats": {}}
    for name, array in state.items():
        *path, last = re.sub(r"^_blocks\.", "_blocks_", name).split(".")
        if path[:1] and path[0] in _CLASSIFIERS or last == "num_batches_tracked":
            continue
        if array.ndim == 4 and last == "weight":
            kind, last, array = "params", "kernel", array.transpose(2, 3, 1, 0)
        elif array.ndim == 1 and last in _OF_NORM:
            kind, last = _OF_NORM[last]
        else:
            raise ValueError(f"{name} {array.shape} is of no layer that is known here")
        tree = variables[kind]
        for part in path:
            tree = tree.setdefault(part, {})
        tree[last] = np.ascontiguousarray(array, np.float32)
    return variables


def fit_into(variables: PyTree, loaded: PyTree) -> PyTree:
    """The loaded arrays in the place of `variables`, which may lack the first stages.

    Raises:
        ValueError: weights of another architecture; names what differs.
    """
    mine, theirs = _flat(variables), _flat(loaded)
    differing = [
        f"{name} is {theirs.get(name, 'absent')} there and {shape} here"
        for name, shape in mine.items()
        if theirs.get(name) != shape
    ]
    tops = {name.split("/")[1] for name in mine}
    more = [n for n in theirs if n not in mine and n.split("/")[1] in tops]
    differing += [f"{name} is {theirs[name]} there and absent here" for name in more]
    if differing:
        raise ValueError(
            f"weights of another architecture ({len(differing)} arrays differ): "
            + "; ".join(differing[:3])
        )
    return _taken(variables, loaded)


def _taken(variables: PyTree, loaded: PyTree) -> PyTree:
    if not isinstance(variables, dict):
        return loaded
    return {k: _taken(v, loaded[k]) for k, v in variables.items()}


def _flat(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): np.shape(leaf) for path, leaf in leaves}
