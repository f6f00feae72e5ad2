"""Named random streams: every random number comes from (seed, name, counters).

`stream(seed, "dropout", step)` and `stream(seed, "noise")` are independent of each
other, and of the order in which they are asked for, so that a resumed run continues
bit for bit and a new consumer of randomness does not shift the others.
"""

from __future__ import annotations

import hashlib

import jax
import numpy as np


def _words(seed: int, name: str, counters: tuple[int, ...]) -> list[int]:
    """256 bits of sha256 over the stream's identity, as 32-bit words."""
    # "/" doubled within the name, so that no name and counters spell another's.
    parts = [int(seed), name.replace("/", "//"), *(int(c) for c in counters)]
    identity = "/".join(str(part) for part in parts)
    digest = hashlib.sha256(identity.encode()).digest()
    return list(np.frombuffer(digest, "<u4").astype(int))


def stream(seed: int, name: str, *counters: int) -> jax.Array:
    """A typed threefry key [] for the stream `name` at the given counters."""
    return wrapped(words(seed, name, *counters))


def words(seed: int, name: str, *counters: int) -> np.ndarray:
    """The key of `stream` as uint32 [2], which can be stacked; see `wrapped`."""
    return np.array(_words(seed, name, counters)[:2], np.uint32)


def wrapped(words: jax.Array) -> jax.Array:
    """The key of uint32 [2] `words`."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def generator(seed: int, name: str, *counters: int) -> np.random.Generator:
    """The host's counterpart of `stream`: a numpy Generator of its own (Philox)."""
    sequence = np.random.SeedSequence(_words(seed, name, counters))
    return np.random.Generator(np.random.Philox(sequence))
