"""Batches that take time to make, made ahead by grain: in threads, or in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from cbmlc_jax.data.dataset import DataError

AHEAD = 8  # batches that are being made or wait, without workers
THREADS = min(AHEAD, os.cpu_count() or 1)  # that make them
WAITING = 2  # finished batches that wait at each worker


class _Elements:
    """A source as grain gets it: errors as values, and a number past the end is {}.

    grain's workers would wrap an exception in one of another class.
    """

    def __init__(self, source: Sequence[dict]):
        self._source = source

    def __call__(self, number: int) -> dict:
        if number >= len(self._source):
            return {}
        try:
            return self._source[number]
        except DataError as error:
            return {"error": str(error)}


def _obey_the_parent(worker: int, workers: int) -> None:
    """In a worker: Ctrl-C is for the parent alone, and without it there is no work.

    grain's workers would outlive a parent that was killed, and wait for ever.
    """
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def feed(
    source: Sequence[dict[str, np.ndarray]], start: int = 0, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The elements of `source` from `start` on, in their order.

    The result does not depend on `workers`.  Where to go on after a stop is the number
    of elements that were taken: pass it as `start`.  Memory holds AHEAD elements, or
    WAITING + 3 a worker, and the one that was taken.

    Args:
        source: by number; an element is a whole batch.  Several threads ask at once;
            with workers, it can be pickled.
        start: first element.
        workers: processes that make them; 0: threads of this one, which is as good for
            images, decoded outside the interpreter's lock, and starts at once.

    Raises:
        DataError: of the source, when its turn comes.
    """
    import grain  # half a second
    from absl import flags

    # Not a slice of a MapDataset: that would be a view of `source` with len().  Each
    # worker ends with a {}: what comes last stays in a cycle of grain's for a while,
    # and with it the memory that it shares with the worker.
    data = grain.MapDataset.range(start, len(source) + workers).map(_Elements(source))
    threads, ahead = (0, 0) if workers else (THREADS, AHEAD)
    batches = data.to_iter_dataset(grain.ReadOptions(threads, ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=WAITING),
            worker_init_fn=_obey_the_parent,
        )
    iterator = iter(batches)
    try:
        for element in iterator:
            if not element:
                break
            if "error" in element:
                raise DataError(str(element["error"]))
            if workers:  # out of the shared memory, whose end is grain's affair
                element = {name: np.array(array) for name, array in element.items()}
            yield element
            del element  # how long it lives, the caller decides
    finally:
        iterator.close()
