"""The one training loop: jitted or pmapped steps, resumable bit for bit."""

from __future__ import annotations

import json
import os
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from cbmlc_jax import checkpoints, evaluate, losses, models, optim, results, rngs
from cbmlc_jax import config as config_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.parallel import Devices, total
from cbmlc_jax.progress import Progress


class TrainError(ValueError):
    """A run that cannot start or go on; the message says what to do."""


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: int32 [], optimizer steps done.
        params: model parameters.
        opt_state: Optax state.
    """

    step: Array
    params: PyTree
    opt_state: PyTree


def element_losses(settings, logits: Array, labels: Array) -> Array:
    """The loss of config.loss, element by element, [B, L]."""
    if settings.name == "bce":
        return losses.bce(logits, labels)
    return losses.asl(
        logits,
        labels,
        gamma_pos=settings.gamma_pos,
        gamma_neg=settings.gamma_neg,
        margin=settings.margin,
        stop_focal_gradient=settings.stop_focal_gradient,
    )


def make_train_step(model, config, tx: optax.GradientTransformation, axis: str | None):
    """Builds `step(state, batch, constants) -> (state, {"loss", "examples"})`.

    The objective of the global batch, whatever the number of devices:

        sum_i sum_l loss_il + w sum_t (the same of intermediate prediction t)
            [divided by (valid rows) L for loss.reduction=mean]
        + lambda context_penalty

    Args:
        model: linen module that returns `models.Outputs`.
        config: the run's config.
        tx: optimizer.
        axis: name of the device axis to sum over, or None.
    """
    settings, weight = config.loss, config.model.intermediate_weight
    dropout_key = rngs.stream(config.seed, "dropout")

    def data_loss(params, batch, graph, key):
        outputs = model.apply(
            {"params": params},
            batch["tokens"],
            graph,
            batch["rows"],
            rngs={"dropout": key},
        )
        labels = batch["labels"].astype(outputs.logits.dtype)

        def summed(logits):
            element = element_losses(settings, logits, labels)
            return losses.total(element, batch["mask"])

        loss = summed(outputs.logits)
        if outputs.intermediate is not None:
            loss += weight * jnp.sum(jax.vmap(summed)(outputs.intermediate))
        return loss

    def context_loss(params, word_vectors):
        embeddings = params["decoder"]["label_embeddings"]
        penalty = losses.context_penalty(embeddings, word_vectors, settings.cb_norm)
        return settings.cb_weight * penalty

    def step(state: TrainState, batch, constants):
        key = jax.random.fold_in(dropout_key, state.step)
        loss, grads = jax.value_and_grad(data_loss)(
            state.params, batch, constants["graph"], key
        )
        examples = jnp.sum(batch["mask"])
        loss, grads, examples = total((loss, grads, examples), axis)
        if settings.reduction == "mean":
            scale = 1 / (jnp.maximum(examples, 1) * batch["labels"].shape[-1])
            loss, grads = jax.tree.map(lambda x: x * scale, (loss, grads))
        if settings.cb_weight:
            # Outside the sum over devices: the context term counts once.
            context, more = jax.value_and_grad(context_loss)(
                state.params, constants["word_vectors"]
            )
            loss, grads = loss + context, jax.tree.map(jnp.add, grads, more)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, opt_state)
        return state, {"loss": loss, "examples": examples}

    return step


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


def train_and_evaluate(config, workdir: str, command: str) -> dict | None:
    """Trains, or resumes, and writes everything that the README lists to workdir.

    Returns:
        The result row, or None where the workdir holds a finished run already.

    Raises:
        TrainError: the workdir is of another config, or the loss is not finite.
        CheckpointError, DataError, EmbeddingError: see there.
    """
    if not claim(config, workdir):
        return None
    run = Run(config, workdir)
    write_inputs(run)
    store = checkpoints.Checkpoints(os.path.join(workdir, "checkpoints"))
    try:
        state, history = _start(run, store)
        history = _train(run, store, state, history)
        best = choose_epoch(history)
        params = store.params(best, checkpoints.abstract(run.params))
        row, text = run.finish(params, history, best, command)
    finally:
        store.close()
    results.write_atomic(os.path.join(workdir, "report.txt"), text)
    results.write_jsonl(os.path.join(workdir, "results.jsonl"), [row])
    print(text)
    return row


def claim(config, workdir: str) -> bool:
    """Writes config.json into a new workdir; checks it in one that exists.

    Returns:
        False where the run there is finished.

    Raises:
        TrainError: the workdir is of another config, or holds something else.
    """
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    mine = config_lib.flatten(config)
    if not os.path.exists(path):
        others = sorted(n for n in os.listdir(workdir) if not n.startswith("."))
        if others:
            raise TrainError(
                f"{workdir} is not empty and has no config.json ({others[0]} lies "
                "there): choose another --workdir"
            )
        results.write_atomic(path, json.dumps(mine, indent=2) + "\n")
        return True
    differing = config_lib.differences(mine, saved_config(workdir))
    if differing:
        raise TrainError(
            f"{workdir} holds a run of another config; these keys differ: "
            f"{', '.join(differing)}. Choose another --workdir"
        )
    return not os.path.exists(os.path.join(workdir, "results.jsonl"))


def saved_config(workdir: str) -> dict:
    """The flat config of a workdir.

    Raises:
        TrainError: there is none, or it is damaged.
    """
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise TrainError(f"{workdir} holds no run (no config.json there)") from None
    except ValueError as error:
        raise TrainError(f"{path} is damaged: {error}") from error


def trained_config(workdir: str):
    """The config of a workdir, to evaluate or predict here.

    Raises:
        TrainError, ConfigError: there is none, or it is of another version.
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


def make_tx(config) -> optax.GradientTransformation:
    """The optimizer that config.optim describes."""
    frozen = () if config.embeddings.trainable else ("label_embeddings",)
    return optim.make_optimizer(
        learning_rate=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay,
        decoupled=config.optim.decoupled,
        frozen=frozen,
    )


def _start(run: Run, store: checkpoints.Checkpoints) -> tuple[TrainState, list[dict]]:
    """A fresh state, or that of the newest checkpoint with its history."""
    opt_state = make_tx(run.config).init(run.params)
    state = TrainState(jnp.zeros((), jnp.int32), run.params, opt_state)
    if not store.epochs:
        return state, []
    newest = store.epochs[-1]
    like = checkpoints.abstract(state)
    rest = store.rest(newest, {"step": like.step, "opt_state": like.opt_state})
    params = store.params(newest, like.params)
    history = store.history(newest)
    print(f"resuming {run.workdir} after epoch {newest}", flush=True)
    return TrainState(rest["step"], params, rest["opt_state"]), history


def _train(run: Run, store, state: TrainState, history: list[dict]) -> list[dict]:
    """Trains the epochs that are left; returns the history of all."""
    from tensorboardX import SummaryWriter

    config, task, devices = run.config, run.task, run.train_devices
    step = devices.compile(
        make_train_step(run.model, config, make_tx(config), devices.axis), donate=True
    )
    constants = {"graph": task.graph, "word_vectors": task.meta.label_vectors}
    steps_per_epoch = -(-len(task.train) // config.train.batch_size)
    progress = Progress(
        config.train.num_epochs, steps_per_epoch, len(history), config.train.progress
    )
    state = devices.replicate(state)
    metrics_path = os.path.join(run.workdir, "metrics.jsonl")
    results.write_jsonl(metrics_path, history)
    writer = SummaryWriter(
        run.workdir, purge_step=len(history) + 1 if history else None
    )
    for epoch in range(len(history) + 1, config.train.num_epochs + 1):
        if out_of_patience(history, config.train.patience):
            break
        start = time.perf_counter()
        state, loss = _epoch(run, step, state, constants, epoch, progress)
        seconds = time.perf_counter() - start
        due = epoch % config.train.eval_every == 0 or epoch == config.train.num_epochs
        rule, score = config.train.selection, None
        if due and rule != "last":
            validation = run.validation(state.params)
            score, rule = evaluate.selection_score(validation, rule)
        line = {
            "epoch": epoch,
            "step": epoch * steps_per_epoch,
            "loss": loss,
            "selection": {"rule": rule, "score": score},
            "examples_per_second": round(len(task.train) / seconds, 1),
            "seconds": round(time.perf_counter() - start, 2),
        }
        history = [*history, line]
        results.write_jsonl(metrics_path, history)
        writer.add_scalar("train/loss", loss, epoch)
        writer.add_scalar(
            "train/examples_per_second", line["examples_per_second"], epoch
        )
        if score is not None:
            writer.add_scalar(f"validation/{rule}_miF1", score, epoch)
        writer.flush()
        progress.epoch(line)
        _save(run, store, state, history)
    progress.close()
    writer.close()
    return history


def _epoch(run: Run, step, state, constants, epoch: int, progress: Progress):
    """One pass over the training rows; returns the state and the loss per row."""
    config, task, devices = run.config, run.task, run.train_devices
    plan = pipeline.plan_batches(
        task.train.inputs.lengths,
        config.train.batch_size,
        task.widths,
        rngs.generator(config.seed, "order", epoch),
    )
    summed, seen, waiting = 0.0, 0, []
    batches = pipeline.batches(task.train.inputs, task.train.labels, plan)
    for number, batch in enumerate(batches, 1):
        state, metrics = step(state, devices.shard(batch), constants)
        waiting.append(devices.first(metrics))
        # Seldom enough to keep the device busy, often enough to show progress (and
        # many virtual CPU devices deadlock when far more steps are in flight).
        if number % 8 == 0 or number == len(plan):
            for m in jax.device_get(waiting):
                rows = int(m["examples"])
                summed += float(m["loss"]) * (
                    1 if config.loss.reduction == "sum" else rows
                )
                seen += rows
            if not np.isfinite(summed):
                raise TrainError(
                    f"the loss is not finite in epoch {epoch}: lower "
                    "config.optim.learning_rate; the checkpoints before are intact"
                )
            progress.steps(len(waiting), summed / seen, config.train.batch_size)
            waiting = []
    return state, summed / seen


def _save(run: Run, store, state: TrainState, history: list[dict]) -> None:
    """Saves a due or best epoch; keeps the newest ones and the best."""
    settings, epoch = run.config.train, history[-1]["epoch"]
    best = choose_epoch(history)
    last = epoch == settings.num_epochs or out_of_patience(history, settings.patience)
    if not (best == epoch or last or epoch % settings.checkpoint_every == 0):
        return
    state = run.train_devices.first(state)
    rest = {"step": state.step, "opt_state": state.opt_state}
    store.save(epoch, state.params, rest, history)
    store.keep_only({*store.epochs[-settings.keep :], best})


def evaluate_checkpoint(workdir: str, data_dir: str | None, command: str) -> dict:
    """Restores the chosen epoch of a run, evaluates it again and compares.

    Args:
        workdir: of a run, finished or not.
        data_dir: stands over the config's data folder.
        command: for the row.

    Returns:
        The row that was computed; it also lies in `eval.jsonl`.

    Raises:
        TrainError, CheckpointError, DataError: see there.
    """
    config = trained_config(workdir)
    if data_dir:
        config.data.dir = data_dir
    store = checkpoints.Checkpoints(os.path.join(workdir, "checkpoints"), True)
    if not store.epochs:
        raise TrainError(f"{workdir} has no checkpoint yet: train there first")
    run = Run(config, workdir)
    history = store.history(store.epochs[-1])
    best = choose_epoch(history)
    params = store.params(best, checkpoints.abstract(run.params))
    row, text = run.finish(params, history, best, command)
    store.close()
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
