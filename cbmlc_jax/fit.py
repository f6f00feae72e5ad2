"""From a config to a result row: the only way in which any model is fitted.

Neural models train (train.py), estimators are fitted once for each candidate setting;
both leave a history, of epochs or of candidates, from which the validation score
chooses.  Cross-fitting runs either of them on K folds and once more on all rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time

import jax
import ml_collections
import numpy as np
from jaxtyping import PyTree

from cbmlc_jax import (
    checkpoints,
    evaluate,
    files,
    mixture,
    models,
    processes,
    rngs,
    systems,
    train,
    workdirs,
)
from cbmlc_jax import config as config_lib
from cbmlc_jax import run as run_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.models import baselines


def train_and_evaluate(config, workdir: str, command: str) -> dict | None:
    """Fits, or resumes, and writes everything that docs/run.md lists to workdir.

    Returns:
        The result row, or None where the workdir holds a finished run already.

    Raises:
        RunError: the workdir is of another config, another process trains there, or the
            loss is not finite.
        CheckpointError, DataError, EmbeddingError, ProcessError: see there.
    """
    _check_processes(config)
    workdirs.check_single(config)
    with workdirs.held(workdir) if processes.is_first() else contextlib.nullcontext():
        return _train_and_evaluate(config, workdir, command)


def _train_and_evaluate(config, workdir: str, command: str) -> dict | None:
    if not processes.of_first(lambda: workdirs.claim(config, workdir)):
        return None

    def opened() -> run_lib.Run:
        if not processes.is_first():
            return run_lib.Run(config, workdir)
        with workdirs.released_on_error(workdir):
            return run_lib.Run(config, workdir)

    run = processes.first_then_others(opened)
    processes.check_equal("data set", run.task.dataset.fingerprint)
    row, text = complete(run, command)
    if processes.is_first():
        print(text)
    return row


def complete(run: run_lib.Run, command: str) -> tuple[dict, str]:
    """Fits, evaluates and writes everything to the run's workdir.

    Returns:
        The result row and the report.

    Raises:
        RunError, CheckpointError: see `train_and_evaluate`.
    """
    if processes.is_first():
        run_lib.write_inputs(run)
    if isinstance(run.system, systems.Mixture):
        run = _mix(run)
    elif isinstance(run.system, systems.Stack):
        run = _stack(run)
    elif run.config.train.crossfit:
        run = _cross_fit(run)
    history = fit(run)
    return processes.of_first(lambda: finish(run, history, command))


def _check_processes(config) -> None:
    """Several processes train one neural model, and all the same.

    Raises:
        ProcessError: see there.
    """
    if jax.process_count() == 1:
        return
    name, folds = config.model.name, config.train.crossfit
    if name not in models.MODELS or folds:
        raise processes.ProcessError(
            f"config.model.name={name}, config.train.crossfit={folds}: several "
            "processes train one neural model without cross-fitting; start one process"
        )
    settings = config_lib.flatten(config)
    for key in config_lib.INCIDENTAL:
        del settings[key]
    processes.check_equal("config", settings)


def finish(run: run_lib.Run, history: list[dict], command: str) -> tuple[dict, str]:
    """Evaluates the chosen epoch; writes what a finished run leaves.

    Returns:
        The result row and the report.
    """
    workdir = run.workdir
    params, best, _ = workdirs.chosen_params(workdir, run.system.like)
    row, text, records = run.finish(params, history, best, command)
    files.write_atomic(os.path.join(workdir, "report.txt"), text)
    files.write_jsonl(os.path.join(workdir, "details.jsonl"), records)
    files.write_jsonl(os.path.join(workdir, "results.jsonl"), [row])
    return row, text


def fit(run: run_lib.Run) -> list[dict]:
    """Fits what is not fitted yet into the run's checkpoints; returns the history."""
    if not processes.is_first():
        return train.fit([run], [None])[0]
    folder = os.path.join(run.workdir, "checkpoints")
    with contextlib.closing(checkpoints.Checkpoints(folder)) as store:
        if isinstance(run.system, systems.Mixture | systems.Stack):
            return store.history(store.epochs[-1])
        if isinstance(run.system, systems.Neural):
            return train.fit([run], [store])[0]
        return _search(run, store)


def _search(run: run_lib.Run, store: checkpoints.Checkpoints) -> list[dict]:
    """Fits an estimator's candidates and saves the best one.

    The history has a line for each candidate; `epoch` is its number, from 1.
    """
    if store.epochs:
        return store.history(store.epochs[-1])
    split = run.training
    given = {"inputs": run.system.inputs(split.inputs), "labels": split.labels}
    if split.added is not None:
        given["added"] = split.added
    if split.ignored is not None and run.config.model.name in baselines.READS_IGNORED:
        given["ignored"] = split.ignored
    given |= _weights(run)
    rates = run.task.rates
    if run.config.model.name in baselines.TAKES_RATES and rates.usable:
        given["rates"] = rates.r0, rates.r1
    history, best = [], None
    for number, (settings, estimator) in enumerate(run.system.candidates, 1):
        start = time.perf_counter()
        params = None
        if run.out_of_fold is None:
            params = estimator.fit(**given)
        line = {
            "epoch": number,
            "settings": settings,
            "selection": run.select(params, number),
            "seconds": round(time.perf_counter() - start, 2),
        }
        history.append(line)
        if workdirs.choose_epoch(history) == number:
            best = params
        if run.config.train.progress:
            _show(line)
    chosen = workdirs.choose_epoch(history)
    if run.out_of_fold is not None:  # the folds have chosen: one fit is enough
        start = time.perf_counter()
        best = run.system.candidates[chosen - 1][1].fit(**given)
        history[chosen - 1]["seconds"] = round(time.perf_counter() - start, 2)
    store.save(chosen, best, {"candidate": np.array(chosen)}, history)
    files.write_jsonl(os.path.join(run.workdir, "metrics.jsonl"), history)
    return history


def _weights(run: run_lib.Run) -> dict[str, np.ndarray]:
    """The argument of an estimator's `fit` for weights of rows; {} without them."""
    weights, name = run.task.train.sample_weight, run.config.model.name
    if weights is None:
        return {}
    if run.config.noise.by_row and name in baselines.TAKES_WEIGHTS:
        raise workdirs.RunError(
            f"{name} with config.noise.by_row=True cannot weigh rows: leave one out"
        )
    if name not in baselines.TAKES_WEIGHTS:
        raise workdirs.RunError(f"{name} cannot weigh rows: leave sample_weight out")
    return {"weights": weights}


def _show(line: dict) -> None:
    settings = ", ".join(f"{k} {v:g}" for k, v in line["settings"].items())
    score = line["selection"]["score"]
    text = settings or "fitted"
    if score is not None:
        text += f": {line['selection']['rule']} miF1 {score:.4f}"
    print(f"{text}, {line['seconds']:.1f} s", flush=True)


def folds(rows: int, number: int, seed: int) -> list[np.ndarray]:
    """Cuts the row numbers into `number` random parts of like size, each sorted."""
    order = rngs.generator(seed, "folds").permutation(rows)
    return [np.sort(order[i::number]) for i in range(number)]


def _cross_fit(run: run_lib.Run) -> run_lib.Run:
    """Scores every training row by a model that did not see it.

    Fold k of K is a run of its own in `folds/k` (so that an interrupted one resumes):
    the rows of the fold validate, the others train.  Their mean selection score of
    each epoch (or candidate) chooses the one for the model on all rows.  The scores of
    a fold are those of its own best epoch, chosen on these rows: a little optimistic.

    Returns:
        The run on all rows, with these scores in the place of validation scores.
    """
    task, config = run.task, run.config
    number = config.train.crossfit
    quiet = ml_collections.ConfigDict(config)
    quiet.eval.curves = False  # of the model on all rows alone
    scores, curves, seconds = None, [], 0.0
    for k, held_out in enumerate(
        folds(len(task.noisy), number, config.data.split_seed), 1
    ):
        workdir = _fold(run.workdir, k)
        os.makedirs(workdir, exist_ok=True)
        if config.train.progress:
            print(f"fold {k} of {number}", flush=True)
        part = run_lib.Run(quiet, workdir, task_lib.fold(config, task, held_out))
        history = fit(part)
        params, _, _ = workdirs.chosen_params(workdir, part.system.like)
        values = part.system.scores(params, part.task.validation.inputs)
        if scores is None:
            scores = np.empty((len(task.noisy), values.shape[1]), np.float32)
        scores[held_out] = values
        curves.append([line["selection"]["score"] for line in history])
        rule = history[-1]["selection"]["rule"]
        seconds += sum(line["seconds"] for line in history)
    length = min(len(c) for c in curves)  # the folds' patience may differ
    curve = [
        None if None in column else float(np.mean(column))
        for column in zip(*(c[:length] for c in curves), strict=True)
    ]
    files.write_array(workdirs.out_of_fold_path(run.workdir), scores)
    found = run_lib.OutOfFold(scores, curve, rule, seconds)
    return run_lib.Run(config, run.workdir, task, found)


def _fold(workdir: str, k: int) -> str:
    """The workdir of fold k of a run, counted from 1."""
    return os.path.join(workdir, "folds", str(k))


@dataclasses.dataclass(frozen=True)
class _Members:
    """What the members of a mixture or stack came to.

    Attributes:
        variables: name -> of its chosen epoch or candidate.
        validations: name -> its scores of the validation rows.
        seconds: that they took.
    """

    variables: dict[str, PyTree]
    validations: dict[str, evaluate.Validation]
    seconds: float


def _fit_members(run: run_lib.Run) -> _Members:
    """Fits the members, each a run of its own in `members/NAME`."""
    config, variables, validations, seconds = run.config, {}, {}, 0.0
    for name in run.system.members:
        workdir = os.path.join(run.workdir, "members", name)
        os.makedirs(workdir, exist_ok=True)
        if config.train.progress:
            print(f"member {name}", flush=True)
        part = run_lib.Run(config_lib.member(config, name), workdir, run.task)
        if config.train.crossfit:
            part = _cross_fit(part)
            seconds += part.out_of_fold.seconds
        history = fit(part)
        seconds += sum(line["seconds"] for line in history)
        variables[name], _, _ = workdirs.chosen_params(workdir, part.system.like)
        validations[name] = part.validation(variables[name])
    return _Members(variables, validations, seconds)


def _mix(run: run_lib.Run) -> run_lib.Run:
    """Fits the members of a mixture, chooses their weights by the corrected miF1 of the
    mixed validation scores, and saves all.

    Returns:
        The run; under cross-fitting with the mixed out-of-fold scores.
    """
    found, rule = _fit_members(run), _rule(run.config)
    scores = {name: v.scores for name, v in found.validations.items()}
    validation = next(iter(found.validations.values()))

    def value(mixed: np.ndarray) -> float:
        some = dataclasses.replace(validation, scores=mixed)
        return evaluate.selection_score(some, rule)[0]

    weights, score = mixture.choose(list(scores.values()), value)
    rule = evaluate.selection_score(validation, rule)[1]
    history = [
        {
            "epoch": 1,
            "settings": dict(zip(scores, weights, strict=True)),
            "selection": {"rule": rule, "score": score},
            "seconds": round(found.seconds, 2),
        }
    ]
    if run.config.train.progress:
        _show(history[0])
    kept = {n: np.float32(w) for n, w in zip(scores, weights, strict=True)}
    _save_once(run, 1, {"weights": kept, "members": found.variables}, history)
    if not run.config.train.crossfit:
        return run
    mixed = mixture.mixed(list(scores.values()), weights)
    files.write_array(workdirs.out_of_fold_path(run.workdir), mixed)
    out_of_fold = run_lib.OutOfFold(mixed, [score], rule)
    return run_lib.Run(run.config, run.workdir, run.task, out_of_fold)


def _stack(run: run_lib.Run) -> run_lib.Run:
    """Fits the members of a stack, then the models that read their scores, and saves
    all.

    The latter are the folds of a run of its own in `stack`, on the members' out-of-fold
    scores.  Those of the rows that they learn from are of members that may have seen
    labels of the held-out rows, never the other way round.

    Returns:
        The run with the out-of-fold scores of these models.
    """
    found, config, task = _fit_members(run), run.config, run.task
    rule = _rule(config)
    platt, told = {}, []
    for name, validation in found.validations.items():
        fitted = validation.calibrate("platt", rule)
        platt[name] = np.array([fitted.slope, fitted.shift], np.float32)
        told.append(systems.calibrated(validation.scores, platt[name]))
    workdir = os.path.join(run.workdir, "stack")
    os.makedirs(workdir, exist_ok=True)
    inputs = systems.scored(task.inputs, told)
    top = run_lib.Run(config, workdir, task_lib.with_inputs(config, task, inputs))
    like, out_of_fold = top.system.like, _cross_fit(top).out_of_fold
    tops = {
        str(k): workdirs.chosen_params(_fold(workdir, k), like)[0]
        for k in range(1, config.train.crossfit + 1)
    }
    scores = run_lib.counted(out_of_fold.scores, task.validation)
    score, rule = evaluate.selection_score(
        dataclasses.replace(validation, scores=scores), rule
    )
    selection = {"rule": rule, "score": score}
    history = [{"epoch": 1, "selection": selection, "seconds": 0.0}]
    variables = {"members": found.variables, "calibration": platt, "stack": tops}
    _save_once(run, 1, variables, history)
    files.write_array(workdirs.out_of_fold_path(run.workdir), out_of_fold.scores)
    seconds = out_of_fold.seconds + found.seconds
    out_of_fold = run_lib.OutOfFold(out_of_fold.scores, [score], rule, seconds)
    return run_lib.Run(run.config, run.workdir, run.task, out_of_fold)


def _rule(config) -> str:
    """The protocol by which what is made of other models is chosen."""
    rule = config.train.selection
    return "corrected_val" if rule == "last" else rule


def _save_once(
    run: run_lib.Run, epoch: int, variables: PyTree, history: list[dict]
) -> None:
    """The one checkpoint of a run that is made of others, and its metrics.jsonl."""
    folder = os.path.join(run.workdir, "checkpoints")
    with contextlib.closing(checkpoints.Checkpoints(folder)) as store:
        if not store.epochs:
            store.save(epoch, variables, {"candidate": np.array(epoch)}, history)
    files.write_jsonl(os.path.join(run.workdir, "metrics.jsonl"), history)
