"""Orbax checkpoints: one a saved epoch, `params` as an item of its own.

    checkpoints/<epoch>/params    the parameters, all that evaluation needs
    checkpoints/<epoch>/rest      optimizer state and step, to resume
    checkpoints/<epoch>/history   JSON: what metrics.jsonl held when it was saved

Orbax writes beside the target and renames, so that a kill or a full disk leaves the
earlier checkpoints as they were.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

_SPARE = 8 << 20  # bytes beside the arrays: metadata, and the small files of a run
# Of several processes the first alone opens checkpoints; Orbax would wait for all.
_FIRST = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: created when needed.
        read_only: neither create it nor clean up after a kill.
    """

    def __init__(self, folder: str, read_only: bool = False):
        self.folder = os.path.abspath(folder)
        if read_only and not os.path.isdir(self.folder):
            raise CheckpointError(f"no checkpoints in {folder}: train there first")
        if not read_only:
            os.makedirs(self.folder, exist_ok=True)
        arrays = ocp.StandardCheckpointHandler(multiprocessing_options=_FIRST)
        rest = ocp.StandardCheckpointHandler(multiprocessing_options=_FIRST)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "params": arrays,
                "rest": rest,
                "history": ocp.JsonCheckpointHandler(multiprocessing_options=_FIRST),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=False,
                multiprocessing_options=_FIRST,
            ),
        )

    @property
    def epochs(self) -> list[int]:
        """Epochs that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, epoch: int, params: PyTree, rest: PyTree, history: list) -> None:
        """Writes one checkpoint.

        Raises:
            CheckpointError: it could not be written, e.g. the disk is full.
        """
        if jax.process_count() > 1:  # else Orbax takes them for parts of larger ones
            params, rest = jax.device_get((params, rest))
        needed = sum(np.size(x) * x.dtype.itemsize for x in jax.tree.leaves(params))
        needed += sum(np.size(x) * x.dtype.itemsize for x in jax.tree.leaves(rest))
        free = shutil.disk_usage(self.folder).free
        if free < needed + _SPARE:
            raise CheckpointError(
                f"the checkpoint of epoch {epoch} needs {needed >> 20} MB and there "
                f"are {free >> 20} MB on the disk of {self.folder}; the earlier ones "
                "are intact: make room and start the same command again to resume"
            )
        try:
            with _one_error():
                self._manager.save(
                    epoch,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardSave(params),
                        rest=ocp.args.StandardSave(rest),
                        history=ocp.args.JsonSave(history),
                    ),
                    force=True,
                )
                self._manager.wait_until_finished()
        except Exception as error:  # tensorstore wraps OSError in several types
            self._remove_unfinished()
            raise CheckpointError(
                f"could not save the checkpoint of epoch {epoch} in {self.folder} "
                f"({_reason(error)}); the earlier ones are intact: make room and "
                "start the same command again to resume"
            ) from error

    def keep_only(self, epochs: set[int]) -> None:
        """Deletes the checkpoints of all other epochs."""
        for epoch in self.epochs:
            if epoch not in epochs:
                self._manager.delete(epoch)

    def history(self, epoch: int) -> list:
        """The training history up to `epoch`."""
        return self._restore(epoch, history=ocp.args.JsonRestore())["history"]

    def params(self, epoch: int, like: PyTree | None) -> PyTree:
        """The parameters of `epoch`, shaped as the tree `like`; None: as saved."""
        if like is None:
            args = {"params": ocp.args.StandardRestore()}
        else:
            self._check(epoch, "params", like)
            args = {"params": ocp.args.StandardRestore(abstract(like))}
        return self._restore(epoch, **args)["params"]

    def rest(self, epoch: int, like: PyTree) -> PyTree:
        """Optimizer state and step of `epoch`, shaped as the abstract tree `like`."""
        args = {"rest": ocp.args.StandardRestore(like)}
        return self._restore(epoch, **args)["rest"]

    def _restore(self, epoch: int, **items):
        if epoch not in self.epochs:
            raise CheckpointError(f"{self.folder} has no checkpoint of epoch {epoch}")
        try:
            with _one_error():
                return self._manager.restore(epoch, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(epoch, error) from error

    def _check(self, epoch: int, item: str, like: PyTree) -> None:
        """Compares names and shapes before anything is read."""
        try:
            metadata = self._manager.item_metadata(epoch)[item]
            saved = getattr(metadata, "tree", metadata)
            theirs = _shapes(saved)
        except Exception as error:
            raise self._unreadable(epoch, error) from error
        mine = _shapes(like)
        for name in sorted(set(mine) | set(theirs)):
            if mine.get(name) != theirs.get(name):
                raise CheckpointError(
                    f"the checkpoint {self.folder}/{epoch} is of another model: "
                    f"{name} is {theirs.get(name, 'absent')} there and "
                    f"{mine.get(name, 'absent')} here"
                )

    def _unreadable(self, epoch: int, error: Exception) -> CheckpointError:
        """Whatever file of it is damaged, the arrays or what describes them."""
        return CheckpointError(
            f"the checkpoint {self.folder}/{epoch} cannot be read ({_reason(error)}): "
            "it is damaged or not of this program; delete its folder to go on from the "
            "one before"
        )

    def _remove_unfinished(self) -> None:
        for name in os.listdir(self.folder):
            if "orbax-checkpoint-tmp" in name:
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Where this fails our sentence alone reaches the user.

    Orbax closes its event loop on the first array that cannot be written or read; each
    array that is still under way then prints a traceback from a thread of its own.
    These threads outlast the error, and so does the hook that silences them.
    """
    hook, sys.unraisablehook = sys.unraisablehook, _without_closed_loops
    yield
    sys.unraisablehook = hook


def _without_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def abstract(tree: PyTree) -> PyTree:
    """Shapes and types of a tree, on the first device: a target to restore into."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def leaf(x):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
    )[0]
    return {
        "/".join(str(getattr(k, "key", k)) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _reason(error: Exception) -> str:
    """An error's first line, shortened; tensorstore names the cause at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"\s*\[\w+='.*$", "", text)  # tensorstore's appended details
    return text if len(text) <= 160 else f"{text[:50]} ... {text[-100:]}"
