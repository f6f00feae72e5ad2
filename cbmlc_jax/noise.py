"""Label noise: four kinds, each a pure function of (key, labels, parameters).

The coins of a row depend on the key and the row's number alone, so that the same key
gives the same flips on every backend and however the rows are cut into batches.
Source: section 5 of the paper; keep_one and the mixture as resolved in docs/noise.md.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

KINDS = ("none", "ncar", "nar", "single_positive", "combined")
RATES = ("fixed", "uniform")
COMBINED_RATES = {"ncar": 0.1, "nar": 0.5}


def _ncar(key: Key[Array, ""], row: Bool[Array, " labels"], rate) -> Bool[Array, " l"]:
    """Type 1: every label is flipped with probability `rate`."""
    return row ^ (jax.random.uniform(key, row.shape) < rate)


def _nar(key: Key[Array, ""], row: Bool[Array, " labels"], rate) -> Bool[Array, " l"]:
    """Type 2: every positive is dropped with probability `rate`."""
    return row & (jax.random.uniform(key, row.shape) >= rate)


def _one_positive(
    key: Key[Array, ""], row: Bool[Array, " labels"]
) -> Bool[Array, " labels"]:
    """Type 3: one positive, chosen uniformly, stays; a row without any stays empty."""
    priority = jnp.where(row, jax.random.uniform(key, row.shape), -1.0)
    return row & (jnp.arange(row.shape[0]) == jnp.argmax(priority))


def _combined(
    key: Key[Array, ""], row: Bool[Array, " labels"], rates: str
) -> Bool[Array, " labels"]:
    """One of the three kinds, with probability 1/3 each."""
    which, level, k1, k2, k3 = jax.random.split(key, 5)
    scale = jax.random.uniform(level) if rates == "uniform" else 1.0
    return jax.lax.switch(
        jax.random.randint(which, (), 0, 3),
        [
            lambda: _ncar(k1, row, COMBINED_RATES["ncar"] * scale),
            lambda: _nar(k2, row, COMBINED_RATES["nar"] * scale),
            lambda: _one_positive(k3, row),
        ],
    )


@functools.partial(jax.jit, static_argnames=("kind", "rates", "keep_one"))
def _inject(key, labels, rows, rate, *, kind, rates, keep_one):
    flip = {
        "ncar": lambda k, y: _ncar(k, y, rate),
        "nar": lambda k, y: _nar(k, y, rate),
        "single_positive": _one_positive,
        "combined": lambda k, y: _combined(k, y, rates),
    }[kind]

    def one_row(row_number, clean):
        row_key = jax.random.fold_in(key, row_number)
        flip_key, restore_key = jax.random.split(row_key)
        noisy = flip(flip_key, clean)
        if keep_one:
            restored = _one_positive(restore_key, clean)
            noisy = jnp.where(noisy.any(), noisy, restored)
        return noisy

    return jax.vmap(one_row)(rows, labels != 0).astype(jnp.uint8)


def inject(
    key: Key[Array, ""],
    labels: UInt8[np.ndarray, "rows labels"],
    kind: str,
    *,
    rate: float = 0.0,
    rates: str = "fixed",
    keep_one: bool = True,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> UInt8[np.ndarray, "rows labels"]:
    """Returns noisy copies of 0/1 labels.

    Args:
        key: a typed PRNG key; noise has a seed of its own.
        labels: [N, L] clean labels, 0 or 1.
        kind: "none", "ncar" (each label flipped with probability `rate`), "nar"
            (each positive dropped with probability `rate`), "single_positive" (one
            positive, chosen uniformly, stays) or "combined" (each row gets one of
            the three, with probability 1/3).
        rate: probability in [0, 1]; used by ncar and nar only.
        rates: for combined: "fixed" (.1 for ncar, .5 for nar) or "uniform" (per row
            from U(0, .1) and U(0, .5)).
        keep_one: a noisy row without any positive gets one of its original ones
            back, chosen uniformly with a key of its own.
        rows: [N] numbers that name the rows' coins; default 0..N-1.

    Returns:
        [N, L] uint8.

    Raises:
        ValueError: unknown kind or rates, or a rate outside [0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"noise kind {kind!r} is not one of {', '.join(KINDS)}")
    if rates not in RATES:
        raise ValueError(f"noise rates {rates!r} is not one of {', '.join(RATES)}")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"the noise rate must lie in [0, 1], not {rate}")
    labels = np.asarray(labels, np.uint8)
    if kind == "none" or not labels.size:
        return labels.copy()
    rows = np.arange(len(labels)) if rows is None else rows
    flipped = _inject(
        key,
        labels,
        jnp.asarray(rows, jnp.uint32),
        jnp.float32(rate),
        kind=kind,
        rates=rates,
        keep_one=keep_one,
    )
    return np.asarray(flipped)


@dataclasses.dataclass(frozen=True)
class Realised:
    """What the noise did to a set of rows; probabilities are relative frequencies.

    Attributes:
        p01: changed negatives / negatives, P(0->1); 0 where there are none.
        p10: changed positives / positives, P(1->0); 0 where there are none.
        p01_per_label, p10_per_label: [L], the same for each label.
        entries: changed entries / all entries.
        instances: rows with a change / all rows.
        changed: number of changed entries.
    """

    p01: float
    p10: float
    p01_per_label: Float[np.ndarray, " labels"]
    p10_per_label: Float[np.ndarray, " labels"]
    entries: float
    instances: float
    changed: int

    def summary(self) -> dict[str, float]:
        """The scalars, for a result row."""
        return {
            "p01": self.p01,
            "p10": self.p10,
            "entries": self.entries,
            "instances": self.instances,
        }


def realised(
    clean: UInt8[np.ndarray, "rows labels"], noisy: UInt8[np.ndarray, "rows labels"]
) -> Realised:
    """Counts what changed between two label matrices [N, L] of 0 and 1."""
    clean, noisy = clean != 0, noisy != 0
    changed = clean ^ noisy
    positives, negatives = clean.sum(0), (~clean).sum(0)
    dropped, added = (changed & clean).sum(0), (changed & ~clean).sum(0)
    return Realised(
        p01=float(added.sum() / max(negatives.sum(), 1)),
        p10=float(dropped.sum() / max(positives.sum(), 1)),
        p01_per_label=added / np.maximum(negatives, 1),
        p10_per_label=dropped / np.maximum(positives, 1),
        entries=float(changed.sum() / max(changed.size, 1)),
        instances=float(changed.any(1).sum() / max(len(changed), 1)),
        changed=int(changed.sum()),
    )
