"""Several seeds of one config, trained side by side as one program.

Replica k of K is the run with config.seed, noise.seed and data.split_seed moved by k.
It leaves in `WORKDIR/k` what a run of its own would leave, its config and row included.
"""

from __future__ import annotations

import contextlib
import os

import jax
from jaxtyping import PyTree

from cbmlc_jax import checkpoints, fit, processes, train, workdirs
from cbmlc_jax import config as config_lib
from cbmlc_jax import run as run_lib
from cbmlc_jax.grids import SEED_KEYS


def train_and_evaluate(config, workdir: str, command: str) -> list[dict]:
    """Trains, or resumes, the config.train.num_replicas seeds that are not finished.

    Args:
        config: validated.
        workdir: of the folders 0, 1, ...
        command: for the rows.

    Returns:
        The rows of these seeds.

    Raises:
        RunError: a folder is of another config, another process trains there, the seeds
            cannot be stacked, or a loss is not finite.
        CheckpointError, DataError, EmbeddingError, ProcessError: see there.
    """
    if jax.process_count() > 1:
        raise processes.ProcessError(
            f"config.train.num_replicas={config.train.num_replicas} takes one process: "
            "leave --coordinator out, or train one seed"
        )
    if os.path.exists(os.path.join(workdir, "config.json")):
        raise workdirs.RunError(
            f"{workdir} holds a run of one seed: choose another --workdir for "
            f"config.train.num_replicas={config.train.num_replicas}"
        )
    folders = [os.path.join(workdir, str(k)) for k in range(config.train.num_replicas)]
    with contextlib.ExitStack() as held:
        # Each seed's, too: a single run can go on in one of them.
        for folder in (workdir, *folders):
            held.enter_context(workdirs.held(folder))
        return _train_and_evaluate(config, folders, command)


def _train_and_evaluate(config, folders: list[str], command: str) -> list[dict]:
    runs = []
    for folder, one in zip(folders, _of_each_seed(config), strict=True):
        if workdirs.claim(one, folder):
            with workdirs.released_on_error(folder):
                runs.append(run_lib.Run(one, folder))
        else:
            print(f"{folder} holds a finished run: see report.txt there")
    for other in runs[1:]:
        _check_alike(runs[0], other)
        other.system.share(runs[0].system)
    for run in runs:
        run_lib.write_inputs(run)
    rows = []
    for run, history in zip(runs, _fit(runs), strict=True):
        row, text = fit.finish(run, history, command)
        rows.append(row)
        print(text)
    return rows


def _of_each_seed(config) -> list:
    """The config of each replica, as if it were started alone."""
    found = []
    for k in range(config.train.num_replicas):
        one = config.copy_and_resolve_references()
        seeds = {key: config_lib.flatten(config)[key] + k for key in SEED_KEYS}
        one.update_from_flattened_dict(seeds | {"train.num_replicas": 1})
        found.append(one)
    return found


def _fit(runs: list[run_lib.Run]) -> list[list[dict]]:
    """Trains those that have epochs left together; the histories of all."""
    with contextlib.ExitStack() as stack:
        stores = [
            stack.enter_context(contextlib.closing(checkpoints.Checkpoints(folder)))
            for folder in (os.path.join(run.workdir, "checkpoints") for run in runs)
        ]
        pairs = list(zip(runs, stores, strict=True))
        left = [pair for pair in pairs if not train.ended(*pair)]
        if left:
            train.fit(*zip(*left, strict=True))
        return [store.history(store.epochs[-1]) for store in stores]


def _check_alike(one: run_lib.Run, other: run_lib.Run) -> None:
    """Whether both can be computed by one program.

    Raises:
        RunError: their shapes differ.
    """
    mine, theirs = _shapes(one), _shapes(other)
    for name, value in mine.items():
        if value != theirs[name]:
            raise workdirs.RunError(
                f"seeds {one.config.seed} and {other.config.seed} differ in the "
                f"{name}, and cannot be trained side by side: leave out "
                "config.train.num_replicas, and start a run for each seed"
            )


def _shapes(run: run_lib.Run) -> dict[str, object]:
    """What has to be the same for all seeds: the shape of what is stacked."""
    split = run.training
    arrays = {
        name: None if values is None else values.dtype
        for name in ("labels", "ignored", "added", "sample_weight")
        for values in [getattr(split, name)]
    }
    return {
        "number of training rows": len(run.task.train),
        "shapes of the parameters": _tree_shapes(run.system.like),
        "edges of the label graph": _tree_shapes(run.system.graph),
        "kind of their labels": arrays,
    }


def _tree_shapes(tree: PyTree) -> object:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype) for x in leaves]
