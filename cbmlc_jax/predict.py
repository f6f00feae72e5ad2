"""A checkpoint and a file of inputs -> labels and scores, without the data set."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from cbmlc_jax import models, results, systems, thresholds
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import arff, reuters
from cbmlc_jax.data.dataset import UNKNOWN, DataError, Ragged

LONGEST_LINE = 1 << 24  # characters of one JSON line
CHUNK = 4096  # rows scored at once: memory does not grow with the file


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
        self._feature_index = {n: i for i, n in enumerate(self.feature_names)}
        self._is_sequence = self.feature_names[0] == UNKNOWN
        meta = models.Meta(
            num_features=len(self.feature_names),
            label_vectors=np.zeros(
                (len(self.label_names), inputs["embedding_width"]), np.float32
            ),
            label_counts=np.array(inputs["label_counts"]),
            max_labels=inputs["max_labels"],
        )
        self._system = systems.create(
            config,
            meta,
            inputs["widths"],
            _graph(inputs["graph"], inputs["graph_weights"]),
        )
        self._params, _, _ = run_lib.chosen_params(workdir, self._system.like)

    def scores(self, inputs: Ragged) -> np.ndarray:
        """float32 [N, L] probabilities."""
        return self._system.scores(self._params, inputs)

    def read(self, path: str) -> Iterator[Ragged]:
        """Inputs of an ARFF file of the same header, or of JSON lines, in chunks.

        A JSON line holds `features`, a list of 0-based feature numbers or an object
        {feature name: value} whose non-zero values count, or `tokens`, a list of
        feature names of which unknown ones are left out.  A model of sequences takes
        `tokens` in their order, unknown ones as such, or `text`, which is cut into
        tokens as its training data were; of its `features`, only the list.

        Raises:
            DataError: names the file and the line.
        """
        if path.lower().endswith(".arff"):
            whole = arff.read_inputs(path, self.feature_names, self.label_names)
            for start in range(0, len(whole), CHUNK):
                yield whole.take(np.arange(start, min(start + CHUNK, len(whole))))
            return
        rows, unknown = [], 0
        for number, line in _lines(path):
            ids, missed = self._row(line, f"{path}, line {number}")
            rows.append(ids)
            unknown += missed
            if len(rows) == CHUNK:
                yield Ragged.from_rows(rows)
                rows = []
        if rows:
            yield Ragged.from_rows(rows)
        if unknown:
            print(
                f"note: {unknown} tokens are no feature of this model and were left "
                "out",
                file=sys.stderr,
            )

    def _row(self, line: str, where: str) -> tuple[list[int], int]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: no JSON ({error})") from None
        kinds = ["features", "tokens", *(["text"] if self._is_sequence else [])]
        if not isinstance(row, dict) or sum(kind in row for kind in kinds) != 1:
            raise DataError(
                f"{where}: expected an object with one of "
                + ", ".join(f"`{kind}`" for kind in kinds)
            )
        if "text" in row:
            if not isinstance(row["text"], str):
                raise DataError(f"{where}: `text` must be a string")
            row = {"tokens": reuters.tokens(row["text"])}
        if "tokens" in row:
            tokens = row["tokens"]
            if not _all(tokens, str):
                raise DataError(f"{where}: `tokens` must be a list of strings")
            if self._is_sequence:
                return [self._feature_index.get(t, 0) for t in tokens], 0
            known = [self._feature_index[t] for t in tokens if t in self._feature_index]
            return sorted(set(known)), len(tokens) - len(known)
        features = row["features"]
        if isinstance(features, dict) and not self._is_sequence:
            for name in features:
                if name not in self._feature_index:
                    raise DataError(f"{where}: {name!r} is no feature of this model")
            return sorted(self._feature_index[n] for n, v in features.items() if v), 0
        if not _all(features, int):
            raise DataError(f"{where}: `features` must be a list of feature numbers")
        for number in features:
            if not 0 <= number < len(self.feature_names):
                raise DataError(
                    f"{where}: feature {number} is not in 0.."
                    f"{len(self.feature_names) - 1}"
                )
        return features if self._is_sequence else sorted(set(features)), 0


def _all(values, kind: type) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in values
    )


def _lines(path: str) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf8") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise DataError(f"{path}, line {number}: longer than {LONGEST_LINE}")
            if line.strip():
                yield number, line


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
    rows = results.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if not rows:
        raise run_lib.RunError(
            f"{workdir} has no finished run, so no threshold was chosen: let it finish "
            "or give --threshold"
        )
    row = rows[-1]
    if protocol == "auto":
        protocol = "corrected_val"
        rates = thresholds.Rates(row["rates"]["r0"], row["rates"]["r1"])
        if not rates.usable:
            protocol = "noisy_val"
            warnings.warn(
                "the noise rates leave no information: the threshold is that of "
                "noisy_val, which is biased by the noise",
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
    if not os.path.isfile(source):
        raise DataError(f"no such file: {source}")
    if threshold is None:
        threshold = choose_threshold(workdir, protocol, metric)
    predictor = Predictor(workdir)
    rows = _rows(predictor, source, threshold, top_k)
    if target is None:
        sys.stdout.writelines(rows)
    else:
        results.write_atomic(target, rows)


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
