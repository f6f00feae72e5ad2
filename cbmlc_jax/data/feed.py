"""Batches that take time to make, made ahead by grain: in threads, or in processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from cbmlc_jax.data.dataset import DataError

AHEAD = 4  # batches that are being made or wait, in this process
THREADS = min(AHEAD, os.cpu_count() or 1)  # that make them, without workers
WAITING = 2  # finished batches that wait at each worker


class _Caught:
    """A source whose errors travel as values: grain's workers would wrap them."""

    def __init__(self, source: Sequence[dict]):
        self._source = source

    def __call__(self, number: int) -> dict:
        try:
            return self._source[number]
        except DataError as error:
            return {"error": str(error)}


def feed(
    source: Sequence[dict[str, np.ndarray]], start: int = 0, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The elements of `source` from `start` on, in their order.

    The result does not depend on `workers`.  Where to go on after a stop is the number
    of elements that were taken: pass it as `start`.  Memory holds AHEAD elements, or
    WAITING + 1 a worker, and the one that was taken.

    Args:
        source: by number; an element is a whole batch.  Several threads ask at once;
            with workers, it can be pickled.
        start: first element.
        workers: processes that make them; 0: threads of this one (images are decoded
            outside the interpreter's lock).

    Raises:
        DataError: of the source, when its turn comes.
    """
    import grain  # a second
    from absl import flags
    MIN = int(os.environ.get("MINSHM", 1 << 60))
    # Not a slice of a MapDataset: that would be a view of `source` with len().
    data = grain.MapDataset.range(start, len(source)).map(_Caught(source))
    threads, ahead = (0, 0) if workers else (THREADS, AHEAD)
    batches = data.to_iter_dataset(grain.ReadOptions(threads, ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own
            flags.FLAGS.mark_as_parsed()
        options = grain.experimental.DatasetOptions(min_shm_size=MIN)
        batches = grain.experimental.WithOptionsIterDataset(batches, options)
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=WAITING)
        )
    iterator = iter(batches)
    try:
        for element in iterator:
            if "error" in element:
                raise DataError(element["error"])
            if MIN == 0 and workers:
                element = {name: np.array(array) for name, array in element.items()}
            yield element
            del element  # of what was taken, the caller decides
    finally:
        iterator.close()
