"""Latency of an exported model, for batches of 1 and 64 rows.

    python -m experiments.latency --config=configs/bibtex.py

exports the model of a config with its initial weights, of which the time does not
depend, and prints what `python -m cbmlc_jax.serving --bench` prints for an artefact.
Rows have the median length of the training rows.
"""

from __future__ import annotations

import json
import os
import tempfile
import types

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors, export, serving, systems
from cbmlc_jax import task as task_lib
from cbmlc_jax.decision import Decision


def measure(config, repeats: int) -> list[dict]:
    """The lines of `serving.latency`.

    Args:
        config: validated, of a neural model.
        repeats: timed batches.
    """
    task = task_lib.build(config)
    config = config_lib.settled(config, task.dataset.kind)
    system = systems.create(config, task.meta, task.widths, task.graph)
    predictor = types.SimpleNamespace(
        config=config,
        meta=task.meta,
        kind=task.dataset.kind,
        system=system,
        params=system.init(),
        graph=task.graph,
        widths=task.widths,
        typical_length=int(np.median(task.train.inputs.lengths)),
        label_names=task.dataset.label_names,
        feature_names=task.dataset.feature_names,
    )
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "artefact")
        export.write(target, predictor, Decision(0.5), {}, "")
        return serving.latency(serving.Artefact(target), (1, 64), repeats)


def main(argv: list[str]) -> None:
    """Prints a JSON line a batch size."""
    values = flags.FLAGS
    config = values.config
    config_lib.settle(config, set(values["config"].override_values))
    for line in measure(config, values.repeats):
        print(json.dumps(line), flush=True)


def run() -> None:
    """Entry point."""
    with errors.explained():
        with errors.in_flags():
            config_flags.DEFINE_config_file("config", None, "As in main.")
            flags.DEFINE_integer("repeats", 50, "Timed batches.", 1)
        app.run(main)


if __name__ == "__main__":
    run()
