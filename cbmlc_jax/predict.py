"""A checkpoint and a file of inputs -> labels and scores, without the data set."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from cbmlc_jax import (
    calibration,
    files,
    models,
    reading,
    rules,
    systems,
    task,
    validation,
    workdirs,
)
from cbmlc_jax import config as config_lib
from cbmlc_jax.data.dataset import DataError, Inputs
from cbmlc_jax.decision import Decision


class Predictor:
    """scores(inputs) of a run's chosen epoch, from its workdir alone.

    Args:
        workdir: of a run with a checkpoint.

    Raises:
        RunError, CheckpointError: there is no such run, or it is damaged.
    """

    def __init__(self, workdir: str):
        config = workdirs.trained_config(workdir)
        inputs = _inputs(workdir)
        self.label_names = inputs["label_names"]
        self.feature_names = inputs["feature_names"]
        self.kind = inputs["kind"]
        config = config_lib.settled(config, self.kind)
        self.config, num_features = config, inputs["num_features"]
        self.widths = inputs["widths"]
        # Runs of before did not write it.
        self.typical_length = max(1, inputs.get("typical_length", self.widths[0]))
        self.graph = _graph(inputs["graph"], inputs["graph_weights"])
        self.meta = models.Meta(
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
        self.system = systems.create(config, self.meta, self.widths, self.graph)
        self.params, _, _ = workdirs.chosen_params(workdir, self.system.like)

    def scores(self, inputs: Inputs) -> np.ndarray:
        """float32 [N, L] probabilities."""
        [inputs] = task.model_inputs(self.config, inputs, keep=False)
        return self.system.scores(self.params, inputs)

    def read(self, path: str) -> Iterator[Inputs]:
        """Inputs of a file in chunks; see `reading.read`.

        Raises:
            DataError: names the file and the line.
        """
        data = self.config.data
        return reading.read(path, self.kind, self.feature_names, self.label_names, data)


def _inputs(workdir: str) -> dict:
    """inputs.json of a run."""
    path = os.path.join(workdir, "inputs.json")
    try:
        with open(path, encoding="utf8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise workdirs.RunError(f"{path} cannot be read: {error}") from error


def _graph(
    neighbours: list | None, weights: list | None
) -> scipy.sparse.csr_array | None:
    if neighbours is None:
        return None
    ends = np.cumsum([0, *map(len, neighbours)])
    indices = np.array([j for row in neighbours for j in row], np.int32)
    values = np.ones(len(indices), bool)
    if weights is not None:
        values = np.array([w for row in weights for w in row], np.float32)
    shape = (len(neighbours), len(neighbours))
    return scipy.sparse.csr_array((values, indices, ends), shape)


def rule_of(values) -> rules.Rule:
    """The rule that the command line states, in flags of its fields' names."""
    fields = dataclasses.fields(rules.Rule)
    return rules.Rule(**{field.name: values[field.name].value for field in fields})


def choose(workdir: str, rule: rules.Rule) -> Decision:
    """The decision of a rule, from what the run left in its workdir.

    Raises:
        RuleError, ValidationError: see `rules.choose` and `validation.read`.
    """
    rule.check()
    rows = files.read_jsonl(os.path.join(workdir, "results.jsonl"))
    found = validation.read(workdir) if rule.reads_validation and rows else None
    return rules.choose(rule, rows[-1] if rows else None, found)


def reliability(workdir: str, protocol: str, target: str | None) -> None:
    """Prints how right the scores are on validation, with and without calibration;
    writes the whole table, also of each label, to `target` as JSON.

    Raises:
        RuleError, RunError, ValidationError: see there.
    """
    rule = rules.Rule(protocol, calibrate="platt")
    rule.check()
    workdirs.saved_config(workdir)
    rows = files.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if not rows:
        raise workdirs.RunError(f"{workdir} has no finished run: let it finish")
    found = validation.read(workdir)
    protocol = rules.protocol_of(protocol, rows[-1])
    rates = found.rates_for(protocol)
    names = _inputs(workdir)["label_names"]
    table = calibration.table(found.scores, found.labels, rates, names)
    print(calibration.report(table, rates), end="")
    if target:
        about = {"dataset": rows[-1]["dataset"], "model": rows[-1]["model"]}
        content = about | {"protocol": protocol, "reliability": table}
        files.write_atomic(target, json.dumps(content, indent=1) + "\n")


def predict_file(
    workdir: str,
    source: str | None,
    target: str | None,
    rule: rules.Rule = rules.RUNS,
    top_k: int | None = None,
) -> None:
    """Writes one JSON line a row: {"labels": [...], "scores": {label: score}}.

    Labels are those of the rule, best first; scores are of all labels or of the
    `top_k` best, best first.  `target` appears only when it is complete.

    Raises:
        DataError, RunError, RuleError, CheckpointError: see there.
    """
    if not source:
        raise DataError("--mode=predict needs --input, an ARFF or JSON lines file")
    if not os.path.exists(source):
        raise DataError(f"no such file: {source}")
    predictor = Predictor(workdir)
    rows = _rows(predictor, source, choose(workdir, rule), top_k)
    if target is None:
        sys.stdout.writelines(rows)
    else:
        files.write_atomic(target, rows)


def _rows(predictor, source, decision: Decision, top_k) -> Iterator[str]:
    for inputs in predictor.read(source):
        scores = predictor.scores(inputs)
        for row in decision.lines(predictor.label_names, scores, top_k):
            yield json.dumps(row) + "\n"
