"""Batches that are made ahead: the same ones, in their order, and nothing stays."""

from __future__ import annotations

import multiprocessing
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import running

from cbmlc_jax.data import feed as feed_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.data.dataset import DataError, Split
from cbmlc_jax.data.feed import feed


def epochs(pictures) -> pipeline.Epochs:
    """Two epochs of three batches, with crops."""
    split = Split(pictures, np.eye(7, 3, dtype=np.uint8))
    return pipeline.Epochs(split, 3, [8], seed=1, epochs=2, augment=True)


class Numbers:
    """A source that counts what was asked of it."""

    def __init__(self, length: int, seconds: float = 0.0):
        self.asked, self._length, self._seconds = [], length, seconds

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        self.asked.append(number)
        # The first takes longest: order must not be that of the threads.
        time.sleep(self._seconds / (number + 1))
        return {"images": np.full((2, 3), number, np.uint8)}


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (0, 4), (0, 6), (1, 2)])
def test_the_batches_do_not_depend_on_workers(pictures, workers, start):
    source = epochs(pictures)
    expected = [source[i] for i in range(6)]
    found = list(feed(source, start, workers))
    assert len(found) == 6 - start
    for a, b in zip(found, expected[start:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype
            assert type(a[name]) is np.ndarray  # and not a view of shared memory
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_its_file_when_its_turn_comes(pictures, workers):
    source = epochs(pictures)
    row = source._epoch(1)._plan.rows[1][0]  # of the second batch
    pathlib.Path(pictures.paths[row]).write_bytes(b"no image")
    batches = feed(source, 0, workers)
    assert next(batches)["images"].shape == (3, 32, 32, 3)
    message = f"^{pictures.paths[row]} is no image that can be read .*list$"
    with pytest.raises(DataError, match=message) as caught:
        next(batches)
    # Though the error's traceback still holds the iterator.
    assert not multiprocessing.active_children() and caught.tb


def test_other_errors_are_not_data_errors():
    class Broken(Numbers):
        def __getitem__(self, number):
            raise ZeroDivisionError("a mistake in the program")

    with pytest.raises(ZeroDivisionError, match="a mistake"):
        next(feed(Broken(3)))


def test_made_ahead_in_order_by_threads_within_bounds():
    source = Numbers(40, seconds=0.05)
    batches = feed(source)
    assert next(batches)["images"][0, 0] == 0
    deadline = time.monotonic() + 5
    while len(source.asked) < 1 + feed_lib.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(source.asked) == 1 + feed_lib.AHEAD
    rest = [int(b["images"][0, 0]) for b in batches]
    assert rest == list(range(1, 40))
    assert sorted(source.asked) == list(range(40))


def test_stops_early():
    threads = threading.active_count()
    batches = feed(Numbers(1000))
    next(batches)
    batches.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    feed(Numbers(3)).close()  # before anything was asked for


PROGRAM = """
import multiprocessing
import os
import numpy as np
from cbmlc_jax.data.feed import feed

class Source:
    def __len__(self):
        return 9
    def __getitem__(self, number):
        return {"images": np.full((100, 1000), number), "labels": np.arange(2)}

batches = feed(Source(), 1, 2)
"""
EXHAUST = """
found = [int(batch["images"][0, 0]) for batch in batches]
assert found == list(range(1, 9)), found
assert not multiprocessing.active_children()
"""
DIE = """
next(batches)
assert len(multiprocessing.active_children()) == 2
os.kill(os.getpid(), 9)
"""


def program(text: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + text],
        cwd=running.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_workers_leave_neither_processes_nor_shared_memory():
    """In a program of its own: what leaks is reported when Python ends."""
    run = program(EXHAUST)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_workers_end_when_their_parent_is_killed():
    # They have its standard output: while one of them is there, `run` does not return.
    assert program(DIE).returncode == -9
