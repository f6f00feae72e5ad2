"""Batches that take time to make, made ahead by grain: in threads, or in processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cbmlc_jax.data.dataset import DataError

AHEAD = 4  # batches that wait at most, for each worker
THREADS = 2  # of this process, where there are no workers


class _Caught:
    """A source whose errors travel as values: grain's workers would wrap them."""

    def __init__(self, source: Sequence[dict]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number):
        try:
            return self._source[number]
        except DataError as error:
            return {"error": str(error)}


def feed(
    source: Sequence[dict[str, np.ndarray]], start: int = 0, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The elements of `source` from `start` on, in their order.

    The result does not depend on `workers`.  Where to go on after a stop is the number
    of elements that were taken: pass it as `start`.  Memory holds at most AHEAD
    elements a worker, or AHEAD + THREADS.

    Args:
        source: by number; an element is a whole batch.
        start: first element.
        workers: processes that make them; 0: threads of this one (images are decoded
            outside the interpreter's lock).

    Raises:
        DataError: of the source, when its turn comes.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads flags of its own
        flags.FLAGS.mark_as_parsed()
    # Not a slice of the MapDataset: that would be a view of `source` with len().
    data = grain.MapDataset.range(start, len(source)).map(_Caught(source).__getitem__)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    if workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    iterable = data.to_iter_dataset(options)
    if workers:
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    iterator = iter(iterable)
    try:
        for element in iterator:
            if "error" in element:
                raise DataError(str(element["error"]))
            if workers:  # out of the memory that is shared with them
                element = {name: np.array(array) for name, array in element.items()}
            yield element
            del element
    finally:
        iterator.close()
