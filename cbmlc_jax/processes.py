"""Several processes that train one model: the first one speaks for all.

Every process reads the data and computes its share of each step (`parallel.Devices`).
The first alone scores, chooses, writes and prints, and sends the others what it found.
In a run of one process everything here is the identity, or nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import multihost

T = TypeVar("T")
# As long as a wait may take: that a process has died, the others learn otherwise.
_WAIT = 7 * 24 * 3600  # seconds
_PIECE = 4096  # what is sent is padded to a multiple: few shapes to compile
_WAITS = itertools.count()


class ProcessError(ValueError):
    """Processes that cannot train together; the message says what to do."""


def join(coordinator: str, number: int | None, index: int | None) -> None:
    """Makes this process one of several; before jax is used.

    Args:
        coordinator: host:port where the first process listens; "auto" where jax finds
            everything out by itself (SLURM, Open MPI, Kubernetes, TPU).
        number: of processes; None with "auto".
        index: of this process, from 0; None with "auto".

    Raises:
        ProcessError: something is missing, or the processes do not find each other.
    """
    given = {}
    if coordinator != "auto":
        if number is None or index is None or not 0 <= index < number:
            raise ProcessError(
                f"--coordinator={coordinator} needs --num_processes=N and "
                "--process_id=0 ... N - 1, another one for each process"
            )
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ProcessError(
                f"--coordinator={coordinator} is not host:port, nor `auto`"
            )
        given = {
            "coordinator_address": coordinator,
            "num_processes": number,
            "process_id": index,
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"--coordinator={coordinator}: the processes have not found each other "
            f"({str(error).splitlines()[0]})"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def wait() -> None:
    """Until all processes have come to the same call."""
    everyone = set(range(jax.process_count()))
    name = f"cbmlc_jax/{next(_WAITS)}"
    multihost.sync_global_processes(name, timeout=_WAIT, processes=everyone)


def tree_of_first(tree: PyTree) -> PyTree:
    """The arrays that the first process has; the others give some of their shapes."""
    if jax.process_count() == 1:
        return tree
    wait()
    return multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def of_first(function: Callable[[], T]) -> T:
    """What `function()` returns in the first process, where alone it is called.

    It must be what JSON can hold.
    """
    if jax.process_count() == 1:
        return function()
    content = np.zeros(0, np.uint8)
    if is_first():
        content = np.frombuffer(json.dumps(function()).encode(), np.uint8)
    size = int(tree_of_first(np.int32(len(content))))
    padded = np.zeros(-(-size // _PIECE) * _PIECE, np.uint8)
    padded[: len(content)] = content
    return json.loads(tree_of_first(padded)[:size].tobytes())


def first_then_others(function: Callable[[], T]) -> T:
    """function(), in the first process before the others: it may fill a cache."""
    if not is_first():
        wait()
    result = function()
    if is_first():
        wait()
    return result


def check_equal(what: str, mine: object) -> None:
    """Compares something that JSON can hold with what the first process has.

    Raises:
        ProcessError: it differs.
    """
    mine = json.loads(json.dumps(mine))
    if of_first(lambda: mine) != mine:
        raise ProcessError(
            f"process {jax.process_index()} has another {what} than process 0: start "
            "all with the same flags but for --process_id, on the same data"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Says in a sentence that another process has gone.

    Raises:
        ProcessError: in the place of what jax raises then.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        theirs = type(error) in (jax.errors.JaxRuntimeError, ValueError)
        lost = r"gloo|nccl|barrier|heartbeat|coordination"
        if not theirs or not re.search(lost, str(error), re.IGNORECASE):
            raise
        raise ProcessError(
            "another process of this run has ended, see what it printed; the same "
            "commands, all of them, resume"
        ) from error
