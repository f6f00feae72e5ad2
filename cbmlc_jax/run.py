"""A run: a config made ready, what is chosen in it, and what it comes to."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import jax
import numpy as np
import scipy.sparse
from jaxtyping import PyTree

from cbmlc_jax import config as config_lib
from cbmlc_jax import (
    details,
    evaluate,
    files,
    metrics,
    rates,
    results,
    rngs,
    row_noise,
    systems,
    thresholds,
    workdirs,
)
from cbmlc_jax import task as task_lib
from cbmlc_jax import validation as validation_lib
from cbmlc_jax.data import pipeline


@dataclasses.dataclass(frozen=True)
class OutOfFold:
    """What cross-fitting found on the training rows.

    Attributes:
        scores: float32 [N, L], each row by a model that did not see it.
        curve: selection score after each epoch (or of each candidate), the mean over
            the folds; None where it was not evaluated.
        rule: the protocol of these scores.
        seconds: that the folds took.
    """

    scores: np.ndarray
    curve: list[float | None]
    rule: str
    seconds: float = 0.0


class Run:
    """A config made ready to train or to evaluate.

    Args:
        config: validated.
        workdir: where everything of the run is written.
        task: of the config, where it is at hand.
        out_of_fold: scores that stand for those of the validation rows.
    """

    def __init__(
        self,
        config,
        workdir: str,
        task: task_lib.Task | None = None,
        out_of_fold: OutOfFold | None = None,
    ):
        workdirs.check_single(config)
        self.workdir, self.out_of_fold = workdir, out_of_fold
        self.task = task or built(config)
        self.config = config = config_lib.settled(config, self.task.dataset.kind)
        self.system = systems.create(
            config, self.task.meta, self.task.widths, self.task.graph
        )

    @property
    def last_epoch(self) -> int:
        """Where training ends: the folds' best epoch, or config.train.num_epochs."""
        curve = self.out_of_fold.curve if self.out_of_fold else []
        scored = [(score, -i) for i, score in enumerate(curve, 1) if score is not None]
        return -max(scored)[1] if scored else self.config.train.num_epochs

    @property
    def training(self) -> pipeline.Split:
        """The training rows; with config.noise.by_row, what was added to each."""
        task = self.task
        if not self.config.noise.by_row:
            return task.train
        return dataclasses.replace(task.train, added=task.added[task.train_rows])

    def out_of_patience(self, history: list[dict]) -> bool:
        """Whether the last evaluations brought nothing better; never after folds."""
        patience = 0 if self.out_of_fold else self.config.train.patience
        return out_of_patience(history, patience)

    def validation(self, params: PyTree) -> evaluate.Validation:
        """Scores of the validation rows with what the protocols need."""
        task = self.task
        if self.out_of_fold is not None:
            scores = self.out_of_fold.scores
        else:
            scores = self.system.scores(params, task.validation.inputs)
        scores = counted(scores, task.validation)
        return evaluate.Validation(
            scores=scores,
            labels=task.validation.labels,
            clean=task.validation_clean,
            prior=task.prior,
            rates=task.rates,
            labels_are_clean=self.config.noise.validation == "clean",
            grid=thresholds.FINE_GRID if self.out_of_fold else thresholds.GRID,
        )

    def select(self, params: PyTree, number: int) -> dict:
        """{"rule", "score"} of the epoch (or candidate) `number`, counted from 1."""
        if self.out_of_fold is not None:
            found = self.out_of_fold
            return {"rule": found.rule, "score": found.curve[number - 1]}
        rule = self.config.train.selection
        if rule == "last":
            return {"rule": rule, "score": None}
        score, rule = evaluate.selection_score(self.validation(params), rule)
        return {"rule": rule, "score": score}

    def watch(self, params: PyTree) -> dict[str, float]:
        """mAP on the training rows (labels as trained on) and on test.

        For the eye alone: nothing may be chosen by it.
        """
        task, found = self.task, {}
        for name, split in (("train", task.train), ("test", task.test)):
            scores = counted(self.system.scores(params, split.inputs), split)
            found[name] = metrics.mean_average_precision(scores, split.labels >= 0.5)
        return found

    def finish(
        self, params: PyTree, history: list[dict], best: int, command: str
    ) -> tuple[dict, str, list[dict]]:
        """Chooses thresholds; evaluates the chosen parameters on test, if there is;
        writes validation.npz.

        Returns:
            The result row, the report's text, and the records of `details`.
        """
        start = time.perf_counter()
        validation = self.validation(params)
        validation_lib.write(self.workdir, validation, self.task.validation.ignored)
        parts, warnings, scores = self._parts(params, validation)
        records = self._details(params, scores, parts["thresholds"]["corrected_val"])
        chosen = next(line for line in history if line["epoch"] == best)
        training = sum(line["seconds"] for line in history)
        if self.out_of_fold is not None:
            training += self.out_of_fold.seconds
        row = results.make_row(
            self.config,
            self.task,
            parts | _curves(history),
            details={record["record"]: record["sha256"] for record in records},
            selection={
                "rule": chosen["selection"]["rule"],
                "metric": "miF1",
                "score": chosen["selection"]["score"],
                "thresholds": "corrected_val",
                "settings": chosen.get("settings", {}),
            },
            epoch=best,
            params=systems.num_params(params),
            seconds={
                "train": round(training, 2),
                "eval": round(time.perf_counter() - start, 2),
            },
            command=command,
            device=jax.local_devices()[0].device_kind,
        )
        return row, results.report(row, scores, self.task, warnings), records

    def _parts(
        self, params: PyTree, validation: evaluate.Validation
    ) -> tuple[dict, list[str], np.ndarray | None]:
        """Parts of the row and warnings of `evaluate.protocols`; test scores."""
        test = self.task.test
        if not len(test):  # the rows were given to an estimator
            chosen, warnings = evaluate.choose(validation)
            return {"metrics": {}, "thresholds": chosen, "ranking": {}}, warnings, None
        scores, decoded = self.system.predict(params, test.inputs)
        scores = counted(scores, test)
        parts, warnings = evaluate.protocols(
            validation,
            scores,
            test.labels,
            decoded,
        )
        return parts, warnings, scores

    def _details(self, params: PyTree, scores, chosen: dict[str, float]) -> list[dict]:
        """What to keep of the test scores, if any, and of the label nodes."""
        task, records = self.task, []
        if scores is not None:
            records.append(details.predictions(scores, task.test.labels, chosen))
        neural = list(params["stack"].values()) if "stack" in params else [params]
        decoders = [v.get("params", {}).get("decoder", {}) for v in neural]
        if "label_embeddings" in decoders[0]:
            vectors = np.mean([d["label_embeddings"] for d in decoders], axis=0)
            names = task.dataset.label_names
            records.append(
                details.label_embeddings(vectors, names, task.train.labels >= 0.5)
            )
        return records


def _curves(history: list[dict]) -> dict:
    """What `Run.watch` saw, for a row; {} where it did not look."""
    seen = [line for line in history if "mAP" in line]
    if not seen:
        return {}
    curves = {f"{k}_mAP": [line["mAP"][k] for line in seen] for k in ("train", "test")}
    return {"curves": {"epoch": [line["epoch"] for line in seen]} | curves}


def counted(scores: np.ndarray, split: pipeline.Split) -> np.ndarray:
    """Scores with 0 where an entry is to be ignored: there it is a negative that no
    threshold predicts, and adds to no count of an F1 nor to any average precision."""
    if split.ignored is None:
        return scores
    return np.where(split.ignored, np.float32(0), scores)


def built(config, dataset: pipeline.Dataset | None = None) -> task_lib.Task:
    """The task of a config, with noise rates that are estimated where unknown, and
    those of each row where the config asks for them.

    Args:
        config: validated.
        dataset: stands for what the config names, where it is at hand.

    Raises:
        RunError: rates cannot be estimated from these rows.
        DataError, EmbeddingError, WeightsError: see `task.build`.
    """
    task = task_lib.build(config, dataset)
    by_row, known = config.noise.by_row, config.noise.known
    if known and not by_row:
        return task
    key, what = ("by_row=True", "noise") if by_row else ("known=False", "rates")
    rows = _matrix(task, task.inputs, f"config.noise.{key} estimates the {what}")
    scores = held_out_scores(rows, task.noisy, config.data.split_seed)
    found, added = rates.estimate(scores, task.noisy), None
    if by_row:
        mean = task.rates.r0 if known else found.r0
        added = row_noise.added(scores, task.noisy, mean)
        found = rates.of_careful_rows(found, scores, task.noisy, added)
    noise_rates = task.rates if known else found.rates
    return dataclasses.replace(task, added=added, rates=noise_rates)


def _matrix(task: task_lib.Task, inputs: pipeline.Inputs, what: str):
    if not task.meta.num_features:
        raise workdirs.RunError(
            f"{what} from rows of numbers: freeze all of the image network and set "
            "config.model.encoder.cache_features=True"
        )
    return inputs.matrix(task.meta.num_features)


def estimated_rates(
    rows: scipy.sparse.csr_array | np.ndarray, noisy: np.ndarray, seed: int
) -> rates.Estimate:
    """Noise rates of the training labels by `rates.estimate`, whatever the model.

    Args:
        rows: float32 [N, F] inputs.
        noisy: uint8 [N, L] their labels.
        seed: of the folds.
    """
    return rates.estimate(held_out_scores(rows, noisy, seed), noisy)


def held_out_scores(
    rows: scipy.sparse.csr_array | np.ndarray, noisy: np.ndarray, seed: int
) -> np.ndarray:
    """float32 [N, L]: logistic regression, each row by one of the other four fifths.

    Args:
        rows: float32 [N, F] inputs.
        noisy: uint8 [N, L] their labels.
        seed: of the folds.
    """
    # Here: its packages take a second to import.
    from cbmlc_jax.models.baselines.logistic_regression import LogisticRegression

    # Of the C that validation chooses from: in the middle, and the lowest for dense
    # rows, which have many numbers for few rows.
    model = LogisticRegression(1.0 if scipy.sparse.issparse(rows) else 0.1)
    scores = np.empty(noisy.shape, np.float32)
    order = rngs.generator(seed, "rates").permutation(len(scores))
    for held_out in np.array_split(order, 5):
        others = np.setdiff1d(order, held_out)
        params = model.fit(rows[others], noisy[others])
        scores[held_out] = model.scores(params, rows[held_out])
    return scores


def out_of_patience(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better."""
    if not patience or not history:
        return False
    best = workdirs.choose_epoch(history)
    return (
        sum(
            1
            for h in history
            if h["epoch"] > best and h["selection"]["score"] is not None
        )
        >= patience
    )


def write_inputs(run: Run) -> None:
    """Writes inputs.json: what predict needs of the data, which may be gone then."""
    task, graph = run.task, run.task.graph
    weighted = graph is not None and graph.dtype != bool
    content = {
        "label_names": task.dataset.label_names,
        "feature_names": task.dataset.feature_names,
        "embedding_width": int(task.meta.label_vectors.shape[1]),
        "label_counts": task.meta.label_counts.tolist(),
        "max_labels": task.meta.max_labels,
        "kind": task.dataset.kind,
        "num_features": task.meta.num_features,
        "inputs": task.meta.inputs,
        "widths": task.widths,
        "typical_length": int(np.median(task.train.inputs.lengths)),
        "graph": None
        if graph is None
        else [x.tolist() for x in np.split(graph.indices, graph.indptr[1:-1])],
        "graph_weights": [x.tolist() for x in np.split(graph.data, graph.indptr[1:-1])]
        if weighted
        else None,
    }
    path = os.path.join(run.workdir, "inputs.json")
    files.write_atomic(path, json.dumps(content) + "\n")


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
    config = workdirs.trained_config(workdir)
    if data_dir:
        config.data.dir = data_dir
    run = Run(config, workdir, out_of_fold=saved_out_of_fold(config, workdir))
    params, best, history = workdirs.chosen_params(workdir, run.system.like)
    row, text, _ = run.finish(params, history, best, command)
    files.write_jsonl(os.path.join(workdir, "eval.jsonl"), [row])
    print(text)
    before = files.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if before:
        print(_compare(before[-1], row))
    return row


def saved_out_of_fold(config, workdir: str) -> OutOfFold | None:
    """The scores that a cross-fitted run left; None for a run without cross-fitting.

    Raises:
        RunError: they are missing or damaged.
    """
    if not config.train.crossfit:
        return None
    path = workdirs.out_of_fold_path(workdir)
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise workdirs.RunError(f"{path} cannot be read: {error}") from error
    return OutOfFold(scores, [], "")  # the history holds its curve


def _compare(before: dict, now: dict) -> str:
    changed = [
        key
        for key in sorted(set(before) | set(now))
        if key not in results.PROVENANCE and before.get(key) != now.get(key)
    ]
    if not changed:
        return "reproduces the row in results.jsonl exactly"
    return f"differs from the row in results.jsonl in: {', '.join(changed)}"
