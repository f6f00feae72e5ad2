"""Several seeds side by side against runs of one seed each."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
import running

from cbmlc_jax import checkpoints, files, fit, replicas, results, train
from cbmlc_jax import config as config_lib
from cbmlc_jax import run as run_lib

SEEDS = 3
# Long training rows are padded to other widths than short ones, so that batches of one
# step differ; patience of one evaluation ends the seeds at different epochs.
CHANGES = {
    "data.length_buckets": 3,
    "loss.name": "forward",
    "model.token_dropout": 0.1,
    "optim.averaging": 0.9,
    "train.num_epochs": 4,
    "train.patience": 1,
    "train.num_replicas": SEEDS,
}
# Widths change the order in which float32 adds; 4 epochs are 112 steps of Adam.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "together"
    config = running.tiny_config(**CHANGES)
    rows = replicas.train_and_evaluate(config, str(workdir), "test")
    assert [row["seed"] for row in rows] == list(range(SEEDS))
    return workdir


def of_one_seed(seed: int, **changes):
    seeds = {"seed": seed, "noise.seed": seed, "data.split_seed": seed}
    changes = CHANGES | seeds | {"train.num_replicas": 1} | changes
    return running.tiny_config(**changes)


def chosen(workdir: pathlib.Path) -> list[np.ndarray]:
    params, _, _ = run_lib.chosen_params(str(workdir), None)
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def test_each_seed_is_the_run_of_that_seed(together, tmp_path):
    ends = set()
    for seed in range(SEEDS):
        alone, one = tmp_path / str(seed), together / str(seed)
        row = fit.train_and_evaluate(of_one_seed(seed), str(alone), "test")
        [found] = files.read_jsonl(str(one / "results.jsonl"))
        print(max(np.abs(a-b).max() for a, b in zip(chosen(one), chosen(alone), strict=True)), row["epoch"], found["epoch"])
        for name in results.PROVENANCE:
            row.pop(name), found.pop(name)
        print({k for k in row if row[k] != found[k]})
        ends.add(len(files.read_jsonl(str(one / "metrics.jsonl"))))
    print(ends)
    assert 0
