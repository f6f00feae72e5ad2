"""A checkpoint and a file of inputs -> labels and scores, without the data set."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import files, models, reading, systems, task, thresholds
from cbmlc_jax import run as run_lib
from cbmlc_jax.data.dataset import DataError, Inputs


class Predictor:
    """scores(inputs) of a run's chosen epoch, from its workdir alone.

    Args:
        workdir: of a run with a checkpoint.

    Raises:
        RunError, CheckpointError: there is no such run, or it is damaged.
    """

    def __init__(self, workdir: str):
        config = run_lib.trained_config(workdir)
        path = os.path.join(workdir, "inputs.json")
        try:
            with open(path, encoding="utf8") as file:
                inputs = json.load(file)
        except (OSError, ValueError) as error:
            raise run_lib.RunError(f"{path} cannot be read: {error}") from error
        self.label_names = inputs["label_names"]
        self.feature_names = inputs["feature_names"]
        self._kind = inputs["kind"]
        config = config_lib.settled(config, self._kind)
        self._config, num_features = config, inputs["num_features"]
        meta = models.Meta(
            num_features=num_features,
            label_vectors=np.zeros(
                (len(self.label_names), inputs["embedding_width"]), np.float32
            ),
            label_counts=np.array(inputs["label_counts"]),
            max_labels=inputs["max_labels"],
            inputs={k: (tuple(v[0]), v[1]) for k, v in inputs["inputs"].items()},
            # Those of training are in the checkpoint.
            feature_mean=np.zeros(num_features, np.float32),
            feature_scale=np.ones(num_features, np.float32),
        )
        self._system = systems.create(
            config,
            meta,
            inputs["widths"],
            _graph(inputs["graph"], inputs["graph_weights"]),
        )
        self._params, _, _ = run_lib.chosen_params(workdir, self._system.like)

    def scores(self, inputs: Inputs) -> np.ndarray:
        """float32 [N, L] probabilities."""
        [inputs] = task.model_inputs(self._config, inputs, keep=False)
        return self._system.scores(self._params, inputs)

    def read(self, path: str) -> Iterator[Inputs]:
        """Inputs of a file in chunks; see `reading.read`.

        Raises:
            DataError: names the file and the line.
        """
        data = self._config.data
        return reading.read(
            path, self._kind, self.feature_names, self.label_names, data
        )


def _graph(neighbours: list | None, weights: list | None) -> np.ndarray | None:
    if neighbours is None:
        return None
    size = len(neighbours)
    graph = np.zeros((size, size), bool if weights is None else np.float32)
    for i, row in enumerate(neighbours):
        graph[i, row] = True if weights is None else weights[i]
    return graph


def choose_threshold(workdir: str, protocol: str, metric: str) -> float:
    """The threshold of a protocol, from the run's result row.

    "auto" is corrected_val where the noise rates are known or reliably estimated and
    leave information, else noisy_val with a warning.

    Raises:
        RunError: the run is not finished, so that it has no thresholds yet.
    """
    rows = files.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if not rows:
        raise run_lib.RunError(
            f"{workdir} has no finished run, so no threshold was chosen: let it finish "
            "or give --threshold"
        )
    row = rows[-1]
    if protocol == "auto":
        protocol = "corrected_val"
        found = row["rates"]
        doubt = found.get("doubt", "")
        rates = thresholds.Rates(found["r0"], found["r1"], found["source"], doubt)
        if not rates.usable:
            protocol = "noisy_val"
            warnings.warn(
                f"{rates.reason}: the threshold is that of noisy_val, which is biased "
                "by the noise",
                stacklevel=2,
            )
    return row["thresholds"][protocol][metric]


def predict_file(
    workdir: str,
    source: str | None,
    target: str | None,
    *,
    protocol: str = "auto",
    metric: str = "miF1",
    threshold: float | None = None,
    top_k: int | None = None,
) -> None:
    """Writes one JSON line a row: {"labels": [...], "scores": {label: score}}.

    Labels are those with score >= threshold, best first; scores are of all labels or
    of the `top_k` best, best first.  `target` appears only when it is complete.

    Raises:
        DataError, RunError, CheckpointError: see there.
    """
    if not source:
        raise DataError("--mode=predict needs --input, an ARFF or JSON lines file")
    if not os.path.exists(source):
        raise DataError(f"no such file: {source}")
    if threshold is None:
        threshold = choose_threshold(workdir, protocol, metric)
    predictor = Predictor(workdir)
    rows = _rows(predictor, source, threshold, top_k)
    if target is None:
        sys.stdout.writelines(rows)
    else:
        files.write_atomic(target, rows)


def _rows(predictor, source, threshold, top_k) -> Iterator[str]:
    names = np.array(predictor.label_names)
    for inputs in predictor.read(source):
        scores = predictor.scores(inputs)
        chosen = thresholds.apply(scores, threshold)
        order = np.argsort(-scores, axis=1, kind="stable")
        for score, mine, ranked in zip(scores, chosen, order, strict=True):
            shown = ranked if top_k is None else ranked[:top_k]
            row = {
                "labels": names[ranked[mine[ranked]]].tolist(),
                "scores": {names[i]: round(float(score[i]), 6) for i in shown},
            }
            yield json.dumps(row) + "\n"
