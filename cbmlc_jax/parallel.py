"""One device by jit, several by pmap: the only file that says pmap.

A step function is written once, for its share of the global batch, and sums over the
axis `axis` where there is one.  Its arguments are (carried, batch, constants): carried
is replicated, every array of the batch is cut along its first axis, constants are the
same everywhere.  Of several processes, each gives its own devices' part of a batch and
sees its own devices' part of what comes out.

Several trainings side by side are one step by vmap, on one device and on several.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

AXIS = "devices"

# XLA:CPU takes optimization barriers away before it fuses, and then computes again in
# every reader what `models.ops` wants stored: leave them in.
_ON_CPU = {"xla_disable_hlo_passes": "cse_barrier_expander"}
# Its second library of matrix products is two to three times faster in bfloat16; in
# float32 it runs products of many small matrices on one core.
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_LIBRARY_FOR = {"float32": "", "bfloat16": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, where malloc is glibc's.

    XLA:CPU asks for a step's buffers, hundreds of megabytes, at every step; malloc
    would give them back to the system each time, which then clears every page anew: a
    tenth and more of a step's processor time.  One arena: every thread finds them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, -1),
        (_TOP_PAD, 2**26),
        (_ARENA_MAX, 1),
    ):
        libc.mallopt(option, value)


class DeviceError(ValueError):
    """Devices and batch size that do not go together."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        devices: at least one; of several processes, equally many of each, in their
            order.
        precision: of the matrix products that they will compute.
    """

    devices: tuple[jax.Device, ...]
    precision: str = "float32"

    @classmethod
    def local(
        cls, batch_size: int, limit: int | None = None, precision: str = "float32"
    ) -> Devices:
        """All devices of this process, or the first `limit` of them.

        Raises:
            DeviceError: they do not divide the batch size, or are fewer than `limit`.
        """
        return cls._of([jax.process_index()], batch_size, limit, precision)

    @classmethod
    def everywhere(
        cls, batch_size: int, limit: int | None = None, precision: str = "float32"
    ) -> Devices:
        """As `local`, of every process.

        Raises:
            DeviceError: see `local`; or the processes have not equally many.
        """
        return cls._of(range(jax.process_count()), batch_size, limit, precision)

    @classmethod
    def _of(cls, processes, batch_size, limit, precision) -> Devices:
        parts = [tuple(jax.local_devices(i)[:limit]) for i in processes]
        counts = {len(part) for part in parts}
        if limit and min(counts) < limit:
            raise DeviceError(
                f"config.train.num_devices={limit}, but there are {min(counts)}"
            )
        if len(counts) > 1:
            raise DeviceError(
                "the processes have different numbers of devices: set "
                f"config.train.num_devices={min(counts)}"
            )
        devices = sum(parts, ())
        if batch_size % len(devices):
            raise DeviceError(
                f"a batch of {batch_size} rows cannot be cut over {len(devices)} "
                "devices: set config.train.batch_size and config.eval.batch_size to "
                f"multiples of {len(devices)}"
            )
        return cls(devices, precision)

    @property
    def mine(self) -> list[jax.Device]:
        """Those of this process."""
        return [d for d in self.devices if d.process_index == jax.process_index()]

    def part(self, batch_size: int) -> slice:
        """The rows of a global batch that this process computes."""
        each, mine = batch_size // len(self.devices), self.mine
        first = self.devices.index(mine[0])
        return slice(first * each, (first + len(mine)) * each)

    @property
    def axis(self) -> str | None:
        """Name of the axis to sum over, None on one device."""
        return AXIS if len(self.devices) > 1 else None

    def compile(self, step: Callable, donate: bool = False) -> Callable:
        """jit or pmap of `step(carried, batch, constants)`."""
        donated = (0,) if donate else ()
        if self.axis is None:
            options = None
            if self.devices[0].platform == "cpu":
                options = _ON_CPU | {_LIBRARY: _LIBRARY_FOR[self.precision]}
            return jax.jit(step, donate_argnums=donated, compiler_options=options)
        return jax.pmap(
            step,
            axis_name=self.axis,
            in_axes=(0, 0, None),
            donate_argnums=donated,
            devices=self.devices,
        )

    def replicate(self, tree: PyTree) -> PyTree:
        """Copies a tree to every device of this process."""
        if self.axis is None:
            return jax.device_put(tree, self.devices[0])
        devices = np.array(self.mine)
        mesh = jax.sharding.Mesh(devices, (AXIS,))
        spec = jax.sharding.PartitionSpec(AXIS)
        stacked = jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x), (len(devices), *np.shape(x))), tree
        )
        return jax.device_put(stacked, jax.sharding.NamedSharding(mesh, spec))

    def first(self, tree: PyTree) -> PyTree:
        """One copy of a replicated tree."""
        return tree if self.axis is None else jax.tree.map(lambda x: x[0], tree)

    def shard(self, batch: dict[str, np.ndarray]) -> PyTree:
        """Cuts this process's [B, ...] into [devices, B / devices, ...]."""
        if self.axis is None:
            return batch
        n = len(self.mine)
        return {k: v.reshape(n, len(v) // n, *v.shape[1:]) for k, v in batch.items()}

    def gather(self, array: jax.Array) -> np.ndarray:
        """[devices, B / devices, ...] back to [B, ...] on the host."""
        array = np.asarray(array)
        return array if self.axis is None else array.reshape(-1, *array.shape[2:])


def side_by_side(step: Callable, number: int) -> Callable:
    """The step of so many trainings at once; itself for one.

    Carried, constants and what comes out are then [K, ...], arrays of the batch
    [B, K, ...], so that they are cut over devices as those of one training.
    """
    return step if number == 1 else jax.vmap(step, in_axes=(0, 1, 0))


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Trees of the same shapes -> one of arrays [K, ...]; itself for one."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def one_of(tree: PyTree, number: int, which: int) -> PyTree:
    """The tree `which` of so many that were stacked."""
    return tree if number == 1 else _picked(tree, which)


@jax.jit
def _picked(tree, which):
    return jax.tree.map(lambda x: x[which], tree)


def total(tree: PyTree, axis: str | None) -> PyTree:
    """Sum over devices inside a step; the identity on one device."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def mean(tree: PyTree, axis: str | None) -> PyTree:
    """Mean over devices inside a step; the identity on one device."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def gathered(array: jax.Array, axis: str | None) -> jax.Array:
    """The arrays of all devices end to end, [devices * n, ...]; itself on one."""
    return array if axis is None else jax.lax.all_gather(array, axis, tiled=True)
