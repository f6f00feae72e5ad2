"""A run and its working directory: claimed, described, chosen from, evaluated again."""

from __future__ import annotations

import contextlib
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cbmlc_jax import checkpoints, evaluate, models, results, rngs
from cbmlc_jax import config as config_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.parallel import Devices


class RunError(ValueError):
    """A run that cannot start or go on; the message says what to do."""


def init_params(model, seed: int) -> PyTree:
    """Initial parameters: one compiled program, its stream named "params"."""
    tokens = jnp.ones((1, 8), jnp.int32)
    return jax.jit(model.init)(rngs.stream(seed, "params"), tokens)["params"]


class Run:
    """A config made ready to train or to evaluate.

    Args:
        config: validated.
        workdir: where everything of the run is written.
    """

    def __init__(self, config, workdir: str):
        self.config, self.workdir = config, workdir
        limit = config.train.num_devices
        self.train_devices = Devices.local(config.train.batch_size, limit)
        eval_devices = Devices.local(config.eval.batch_size, limit)
        self.task = task_lib.build(config)
        self.model = models.create_model(config.model, self.task.meta)
        self.scorer = evaluate.Scorer(
            self.model,
            eval_devices,
            config.eval.batch_size,
            self.task.widths,
            self.task.graph,
        )
        self.params = init_params(self.model, config.seed)
        self.num_params = sum(int(np.size(x)) for x in jax.tree.leaves(self.params))

    def validation(self, replicated_params) -> evaluate.Validation:
        """Scores of the validation rows with what the protocols need."""
        task = self.task
        return evaluate.Validation(
            scores=self.scorer(replicated_params, task.validation.inputs),
            labels=task.validation.labels,
            clean=task.validation_clean,
            prior=task.prior,
            rates=task.rates,
            labels_are_clean=self.config.noise.validation == "clean",
        )

    def finish(self, params: PyTree, history: list[dict], best: int, command: str):
        """Evaluates the chosen parameters on test.

        Returns:
            The result row and the report's text.
        """
        start = time.perf_counter()
        replicated = self.train_devices.replicate(params)
        validation = self.validation(replicated)
        test = self.task.test
        scores = self.scorer(replicated, test.inputs)
        parts, warnings = evaluate.protocols(
            validation,
            scores,
            test.labels,
            per_label=self.config.eval.per_label_thresholds,
        )
        chosen = next(line for line in history if line["epoch"] == best)
        row = results.make_row(
            self.config,
            self.task,
            parts,
            selection={
                "rule": chosen["selection"]["rule"],
                "metric": "miF1",
                "score": chosen["selection"]["score"],
                "thresholds": "corrected_val",
            },
            epoch=best,
            params=self.num_params,
            seconds={
                "train": round(sum(line["seconds"] for line in history), 2),
                "eval": round(time.perf_counter() - start, 2),
            },
            command=command,
            device=jax.local_devices()[0].device_kind,
        )
        return row, results.report(row, scores, self.task, warnings)


def choose_epoch(history: list[dict]) -> int:
    """The epoch with the best selection score, ties to the earlier; else the last."""
    scored = [h for h in history if h["selection"]["score"] is not None]
    if not scored or scored[-1]["selection"]["rule"] == "last":
        return history[-1]["epoch"]
    return max(scored, key=lambda h: (h["selection"]["score"], -h["epoch"]))["epoch"]


def out_of_patience(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better."""
    if not patience or not history:
        return False
    best = choose_epoch(history)
    return (
        sum(
            1
            for h in history
            if h["epoch"] > best and h["selection"]["score"] is not None
        )
        >= patience
    )


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
        results.write_atomic(path, json.dumps(mine, indent=2) + "\n")
        return True
    differing = config_lib.differences(mine, saved_config(workdir))
    if differing:
        raise RunError(
            f"{workdir} holds a run of another config; these keys differ: "
            f"{', '.join(differing)}. Choose another --workdir"
        )
    return not os.path.exists(os.path.join(workdir, "results.jsonl"))


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


def write_inputs(run: Run) -> None:
    """Writes inputs.json: what predict needs of the data, which may be gone then."""
    task = run.task
    content = {
        "label_names": task.dataset.label_names,
        "feature_names": task.dataset.feature_names,
        "embedding_width": int(task.meta.label_vectors.shape[1]),
        "widths": task.widths,
        "graph": None
        if task.graph is None
        else [np.flatnonzero(row).tolist() for row in task.graph],
    }
    path = os.path.join(run.workdir, "inputs.json")
    results.write_atomic(path, json.dumps(content) + "\n")


def chosen_params(workdir: str, like: PyTree) -> tuple[PyTree, int, list[dict]]:
    """The parameters of the chosen epoch, that epoch, and the history.

    Args:
        workdir: of a run, finished or not.
        like: a tree of the parameters' shapes and types.

    Raises:
        RunError, CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = os.path.join(workdir, "checkpoints")
    with contextlib.closing(checkpoints.Checkpoints(folder, read_only=True)) as store:
        if not store.epochs:
            raise RunError(f"{workdir} has no checkpoint yet: train there first")
        history = store.history(store.epochs[-1])
        best = choose_epoch(history)
        return store.params(best, checkpoints.abstract(like)), best, history


def evaluate_checkpoint(workdir: str, data_dir: str | None, command: str) -> dict:
    """Restores the chosen epoch of a run, evaluates it again and compares.

    Args:
        workdir: of a run, finished or not.
        data_dir: stands over the config's data folder.
        command: for the row.

    Returns:
        The row that was computed; it also lies in `eval.jsonl`.

    Raises:
        RunError, CheckpointError, DataError: see there.
    """
    config = trained_config(workdir)
    if data_dir:
        config.data.dir = data_dir
    run = Run(config, workdir)
    params, best, history = chosen_params(workdir, run.params)
    row, text = run.finish(params, history, best, command)
    results.write_jsonl(os.path.join(workdir, "eval.jsonl"), [row])
    print(text)
    before = results.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if before:
        print(_compare(before[-1], row))
    return row


def _compare(before: dict, now: dict) -> str:
    changed = [
        key
        for key in sorted(set(before) | set(now))
        if key not in results.PROVENANCE and before.get(key) != now.get(key)
    ]
    if not changed:
        return "reproduces the row in results.jsonl exactly"
    return f"differs from the row in results.jsonl in: {', '.join(changed)}"
