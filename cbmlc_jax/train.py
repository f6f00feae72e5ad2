"""The one training loop: jitted or pmapped steps, resumable bit for bit."""

from __future__ import annotations

import contextlib
import os
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from cbmlc_jax import checkpoints, evaluate, losses, optim, results, rngs
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.parallel import total
from cbmlc_jax.progress import Progress


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


def train_and_evaluate(config, workdir: str, command: str) -> dict | None:
    """Trains, or resumes, and writes everything that the README lists to workdir.

    Returns:
        The result row, or None where the workdir holds a finished run already.

    Raises:
        RunError: the workdir is of another config, or the loss is not finite.
        CheckpointError, DataError, EmbeddingError: see there.
    """
    if not run_lib.claim(config, workdir):
        return None
    run = run_lib.Run(config, workdir)
    run_lib.write_inputs(run)
    store = checkpoints.Checkpoints(os.path.join(workdir, "checkpoints"))
    try:
        state, history = _start(run, store)
        history = _train(run, store, state, history)
        best = run_lib.choose_epoch(history)
        params = store.params(best, checkpoints.abstract(run.params))
        row, text = run.finish(params, history, best, command)
    finally:
        store.close()
    results.write_atomic(os.path.join(workdir, "report.txt"), text)
    results.write_jsonl(os.path.join(workdir, "results.jsonl"), [row])
    print(text)
    return row


def make_tx(config) -> optax.GradientTransformation:
    """The optimizer that config.optim describes."""
    frozen = () if config.embeddings.trainable else ("label_embeddings",)
    return optim.make_optimizer(
        learning_rate=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay,
        decoupled=config.optim.decoupled,
        frozen=frozen,
    )


def _start(
    run: run_lib.Run, store: checkpoints.Checkpoints
) -> tuple[TrainState, list[dict]]:
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


def _train(
    run: run_lib.Run, store, state: TrainState, history: list[dict]
) -> list[dict]:
    """Trains the epochs that are left; returns the history of all."""
    from tensorboardX import SummaryWriter

    config, task, devices = run.config, run.task, run.train_devices
    step = devices.compile(
        make_train_step(run.model, config, make_tx(config), devices.axis), donate=True
    )
    constants = {"graph": task.graph, "word_vectors": task.meta.label_vectors}
    steps_per_epoch = -(-len(task.train) // config.train.batch_size)
    done, epochs = len(history), config.train.num_epochs
    state = devices.replicate(state)
    metrics_path = os.path.join(run.workdir, "metrics.jsonl")
    results.write_jsonl(metrics_path, history)
    with (
        contextlib.closing(
            Progress(epochs, steps_per_epoch, done, config.train.progress)
        ) as progress,
        SummaryWriter(run.workdir, purge_step=done + 1 if done else None) as writer,
    ):
        for epoch in range(done + 1, epochs + 1):
            if run_lib.out_of_patience(history, config.train.patience):
                break
            start = time.perf_counter()
            state, loss = _epoch(run, step, state, constants, epoch, progress)
            seconds = time.perf_counter() - start
            selection = _select(run, state, epoch)
            line = {
                "epoch": epoch,
                "step": epoch * steps_per_epoch,
                "loss": loss,
                "selection": selection,
                "examples_per_second": round(len(task.train) / seconds, 1),
                "seconds": round(time.perf_counter() - start, 2),
            }
            history = [*history, line]
            results.write_jsonl(metrics_path, history)
            writer.add_scalar("train/loss", loss, epoch)
            if selection["score"] is not None:
                name = f"validation/{selection['rule']}_miF1"
                writer.add_scalar(name, selection["score"], epoch)
            writer.flush()
            progress.epoch(line)
            _save(run, store, state, history)
    return history


def _select(run: run_lib.Run, state: TrainState, epoch: int) -> dict:
    """The selection score of an epoch that is to be evaluated, else None."""
    settings, score = run.config.train, None
    rule = settings.selection
    due = epoch % settings.eval_every == 0 or epoch == settings.num_epochs
    if due and rule != "last":
        score, rule = evaluate.selection_score(run.validation(state.params), rule)
    return {"rule": rule, "score": score}


def _epoch(run: run_lib.Run, step, state, constants, epoch: int, progress: Progress):
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
                raise run_lib.RunError(
                    f"the loss is not finite in epoch {epoch}: lower "
                    "config.optim.learning_rate; the checkpoints before are intact"
                )
            progress.steps(len(waiting), summed / seen, config.train.batch_size)
            waiting = []
    return state, summed / seen


def _save(run: run_lib.Run, store, state: TrainState, history: list[dict]) -> None:
    """Saves a due or best epoch; keeps the newest ones and the best."""
    settings, epoch = run.config.train, history[-1]["epoch"]
    best = run_lib.choose_epoch(history)
    last = epoch == settings.num_epochs or run_lib.out_of_patience(
        history, settings.patience
    )
    if not (best == epoch or last or epoch % settings.checkpoint_every == 0):
        return
    state = run.train_devices.first(state)
    rest = {"step": state.step, "opt_state": state.opt_state}
    store.save(epoch, state.params, rest, history)
    store.keep_only({*store.epochs[-settings.keep :], best})
