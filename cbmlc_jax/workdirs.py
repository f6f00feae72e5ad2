"""The folder of a run: claimed, and read again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from cbmlc_jax import checkpoints, files, validation
from cbmlc_jax import config as config_lib


class RunError(ValueError):
    """A run that cannot start or go on; the message says what to do."""


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Makes a workdir and keeps other processes that hold it out.

    The lock is on the folder itself; the system takes it back from a process that ends,
    however it ends.

    Raises:
        RunError: another process has it.
    """
    os.makedirs(workdir, exist_ok=True)
    folder = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is training in {workdir}: wait until it has ended, "
                "or choose another --workdir"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def claim(config, workdir: str) -> bool:
    """Writes config.json into a new workdir; checks it in one that exists.

    Returns:
        False where the run there is finished.

    Raises:
        RunError: the workdir is of another config, or holds something else.
    """
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    mine = config_lib.flatten(config)
    if not os.path.exists(path):
        others = sorted(n for n in os.listdir(workdir) if not n.startswith("."))
        if others:
            raise RunError(
                f"{workdir} is not empty and has no config.json ({others[0]} lies "
                "there): choose another --workdir"
            )
        files.write_atomic(path, json.dumps(mine, indent=2) + "\n")
        return True
    differing = config_lib.differences(mine, saved_config(workdir))
    if differing:
        raise RunError(
            f"{workdir} holds a run of another config; these keys differ: "
            f"{', '.join(differing)}. Choose another --workdir"
        )
    return not os.path.exists(os.path.join(workdir, "results.jsonl"))


def check_single(config) -> None:
    """A run is of one seed: `replicas` gives each of several a config of its own."""
    number = config.train.num_replicas
    if number > 1:
        raise RunError(
            f"config.train.num_replicas={number} is for `cbmlc_jax.main` with "
            "--mode=train alone: leave it out here"
        )


@contextlib.contextmanager
def released_on_error(workdir: str) -> Iterator[None]:
    """Takes `claim` back where what follows fails before it has left anything.

    So that the same command, with the mistake mended, can have the same workdir.
    """
    try:
        yield
    except BaseException:
        if os.listdir(workdir) == ["config.json"]:
            os.remove(os.path.join(workdir, "config.json"))
        raise


def saved_config(workdir: str) -> dict:
    """The flat config of a workdir.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf8") as file:
            return json.load(file)
    except FileNotFoundError:
        first = os.path.join(workdir, "0")
        if os.path.exists(os.path.join(first, "config.json")):
            raise RunError(
                f"{workdir} holds several seeds: give one's, --workdir={first}"
            ) from None
        raise RunError(f"{workdir} holds no run (no config.json there)") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def trained_config(workdir: str):
    """The config of a workdir, to evaluate or predict here.

    Raises:
        RunError, ConfigError: there is none, or it is of another version.
    """
    config = config_lib.restore(saved_config(workdir))
    if (config.train.num_devices or 1) > len(jax.local_devices()):
        config.train.num_devices = None  # trained on a larger machine
    return config


def chosen_params(workdir: str, like: PyTree) -> tuple[PyTree, int, list[dict]]:
    """The parameters of the chosen epoch, that epoch, and the history.

    Args:
        workdir: of a run, finished or not.
        like: a tree of the parameters' shapes and types; None for those of the file.

    Raises:
        RunError, CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = os.path.join(workdir, "checkpoints")
    with contextlib.closing(checkpoints.Checkpoints(folder, read_only=True)) as store:
        if not store.epochs:
            raise RunError(f"{workdir} has no checkpoint yet: train there first")
        history = store.history(store.epochs[-1])
        best = choose_epoch(history)
        return store.params(best, like), best, history


def choose_epoch(history: list[dict]) -> int:
    """The epoch with the best selection score, ties to the earlier; else the last."""
    scored = [h for h in history if h["selection"]["score"] is not None]
    if not scored or scored[-1]["selection"]["rule"] == "last":
        return history[-1]["epoch"]
    return max(scored, key=lambda h: (h["selection"]["score"], -h["epoch"]))["epoch"]


def out_of_fold_path(workdir: str) -> str:
    """Where cross-fitting leaves its scores [N, L]."""
    return os.path.join(workdir, validation.OUT_OF_FOLD)
