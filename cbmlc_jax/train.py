"""The one training loop: jitted or pmapped steps, resumable bit for bit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cbmlc_jax import checkpoints, processes, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax import steps as steps_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.parallel import one_of, side_by_side, stacked
from cbmlc_jax.progress import Log, Progress, Waited


def _start(
    run: run_lib.Run, store: checkpoints.Checkpoints | None, epoch: int
) -> tuple[steps_lib.TrainState, list[dict]]:
    """A fresh state for epoch 0, or that of a checkpoint with its history; in all
    processes that of the first, which alone has a store.

    Later checkpoints are deleted: their epochs are trained once more."""
    state, history = None, []
    if store is None:  # of the right shapes
        state = _fresh(run, jax.tree.map(jnp.zeros_like, run.system.like))
    else:
        store.keep_only({e for e in store.epochs if e <= epoch})
        if epoch:
            state, history = _restored(run, store, epoch)
        else:
            state = _fresh(run, run.system.init())
    return processes.tree_of_first(state), processes.of_first(lambda: history)


def _shared_epoch(stores: Sequence[checkpoints.Checkpoints | None]) -> int:
    """The newest epoch of which all have a checkpoint, or 0."""
    epochs = [set(store.epochs) for store in stores if store is not None]
    return max(set.intersection(*epochs), default=0) if epochs else 0


def _fresh(run: run_lib.Run, variables: PyTree) -> steps_lib.TrainState:
    params, stats = variables["params"], variables.get("batch_stats", {})
    tx = steps_lib.make_tx(run.config, _steps_per_epoch(run))
    step = jnp.zeros((), jnp.int32)
    # A copy: the step is given the buffers of both.
    averaging = run.config.optim.averaging
    average = jax.tree.map(jnp.copy, params) if averaging else {}
    return steps_lib.TrainState(step, params, stats, tx.init(params), average)


def _restored(
    run: run_lib.Run, store: checkpoints.Checkpoints, epoch: int
) -> tuple[steps_lib.TrainState, list[dict]]:
    variables = run.system.like
    params = variables["params"]
    tx = steps_lib.make_tx(run.config, _steps_per_epoch(run))
    averaging = bool(run.config.optim.averaging)
    like = checkpoints.abstract(jax.eval_shape(tx.init, params))
    step = checkpoints.abstract(jnp.zeros((), jnp.int32))
    expected = {"step": step, "opt_state": like}
    if averaging:
        expected["params"] = checkpoints.abstract(params)
    rest = store.rest(epoch, expected)
    variables = store.params(epoch, variables)
    scored = variables["params"]
    history = store.history(epoch)
    print(f"resuming {run.workdir} after epoch {epoch}", flush=True)
    state = steps_lib.TrainState(
        rest["step"],
        rest["params"] if averaging else scored,
        variables.get("batch_stats", {}),
        rest["opt_state"],
        scored if averaging else {},
    )
    return state, history


def _steps_per_epoch(run: run_lib.Run) -> int:
    return -(-len(run.task.train) // run.config.train.batch_size)


def ended(run: run_lib.Run, store: checkpoints.Checkpoints) -> bool:
    """Whether no epoch is left to train."""
    if not store.epochs:
        return False
    history = store.history(store.epochs[-1])
    return len(history) == run.last_epoch or run.out_of_patience(history)


def fit(
    runs: Sequence[run_lib.Run], stores: Sequence[checkpoints.Checkpoints | None]
) -> list[list[dict]]:
    """Trains the epochs that are left and saves them; returns the history of all.

    Several runs are trained side by side.  They go on from the newest epoch that all
    of them have saved; one that runs out of patience is computed on with the others,
    but leaves nothing any more.

    Args:
        runs: their data and models, alike but for their seeds.
        stores: of the runs; None in all processes but the first.

    Raises:
        RunError: the loss is not finite, or cannot be corrected for these rates.
        CheckpointError: see there.
    """
    epoch = _shared_epoch(stores)
    started = [_start(*each, epoch) for each in zip(runs, stores, strict=True)]
    histories = [history for _, history in started]
    run, done, steps = runs[0], len(histories[0]), _steps_per_epoch(runs[0])
    step, constants, batches = _program(runs, done * steps)
    state = run.system.train_devices.replicate(stacked([s for s, _ in started]))
    del started  # the step takes the memory of the state over
    shown = run.config.train.progress and stores[0] is not None
    progress = Progress(run.last_epoch, steps, done, shown)
    with contextlib.ExitStack() as stack:
        logs = [
            stack.enter_context(contextlib.closing(log))
            for log in _logs(runs, stores, histories, progress)
        ]
        for epoch in range(done + 1, run.last_epoch + 1):
            going = [
                i for i, r in enumerate(runs) if not r.out_of_patience(histories[i])
            ]
            if not going:
                break
            start = time.perf_counter()
            ours = Waited(itertools.islice(batches, steps))
            state, losses = _epoch(
                runs, going, step, state, constants, epoch, ours, progress
            )
            spent = time.perf_counter() - start
            for i in going:
                told = functools.partial(
                    _line, runs, i, state, epoch, losses[i], spent, ours.seconds
                )
                histories[i] = [*histories[i], processes.of_first(told)]
                logs[i].epoch(histories[i])
            _save(runs, stores, state, histories, going)
            processes.wait()
    return histories


def _program(runs: Sequence[run_lib.Run], start: int):
    """The compiled step, its constants, and the batches from step `start` on.

    Raises:
        RunError: see `fit`.
    """
    run, config = runs[0], runs[0].config
    devices, steps_per_epoch = run.system.train_devices, _steps_per_epoch(run)
    for rates in (r.task.rates for r in runs):
        by_rate = config.loss.name == "forward" and not config.noise.by_row
        if by_rate and not rates.usable:
            raise workdirs.RunError(
                f"{rates.reason}: choose another config.loss.name than forward"
            )
    step = steps_lib.make_train_step(
        run.system.model,
        config,
        steps_lib.make_tx(config, steps_per_epoch),
        devices.axis,
        steps_per_epoch=steps_per_epoch,
    )
    constants = [
        steps_lib.step_constants(
            r.config, r.system.graph, r.task.meta.label_vectors, r.task.rates
        )
        for r in runs
    ]
    sources = [
        pipeline.Epochs(
            r.training,
            config.train.batch_size,
            r.task.widths,
            r.config.seed,
            r.last_epoch,
            augment=config.data.augment and r.task.train.inputs.decodes,
            part=devices.part(config.train.batch_size),
        )
        for r in runs
    ]
    source = sources[0]
    if len(runs) > 1:
        source = pipeline.SideBySide(sources, run.task.widths)
    return (
        devices.compile(side_by_side(step, len(runs)), donate=True),
        stacked(constants),
        # The position in the data is the number of steps, which the checkpoint holds.
        pipeline.stream(source, start, config.data.workers),
    )


def _logs(runs, stores, histories, progress: Progress) -> list[Log]:
    """What each run tells of its epochs; of several, each line says of which."""
    several = len(runs) > 1
    return [
        Log(
            run.workdir if store is not None else None,
            history,
            progress,
            f"seed {run.config.seed}: " if several else "",
        )
        for run, store, history in zip(runs, stores, histories, strict=True)
    ]


def _one(
    runs: Sequence[run_lib.Run], which: int, state: steps_lib.TrainState
) -> steps_lib.TrainState:
    """The state of one of the runs."""
    return one_of(runs[0].system.train_devices.first(state), len(runs), which)


def _line(
    runs: Sequence[run_lib.Run],
    which: int,
    state: steps_lib.TrainState,
    epoch: int,
    loss: float,
    trained: float,
    waited: float,
) -> dict:
    """What the history of a run holds of an epoch; scores it where that is due.

    Args:
        runs: all.
        which: of them.
        state: of all.
        epoch, loss: of this one.
        trained: seconds of the epoch's steps; each of the runs has its share of them.
        waited: of these, seconds without a next batch.
    """
    start, run, share = time.perf_counter(), runs[which], trained / len(runs)
    params = _one(runs, which, state).variables
    selection = {"rule": run.config.train.selection, "score": None}
    if _due(run, epoch):
        selection = run.select(params, epoch)
    line = {
        "epoch": epoch,
        "step": epoch * _steps_per_epoch(run),
        "loss": loss,
        "selection": selection,
        "examples_per_second": round(len(run.task.train) / share, 1),
        "data_share": round(waited / trained, 4),
        "seconds": round(share + time.perf_counter() - start, 2),
    }
    if run.config.eval.curves and _due(run, epoch):
        line["mAP"] = run.watch(params)
    return line


def _due(run: run_lib.Run, epoch: int) -> bool:
    """Whether an epoch is to be evaluated."""
    return epoch % run.config.train.eval_every == 0 or epoch == run.last_epoch


def _epoch(
    runs: Sequence[run_lib.Run],
    going: list[int],
    step,
    state,
    constants,
    epoch: int,
    batches: Iterable[dict[str, np.ndarray]],
    progress: Progress,
):
    """One pass over the training rows; returns the state and each run's loss per row.

    Raises:
        RunError: the loss of a run that is still `going` is not finite.
    """
    config, devices = runs[0].config, runs[0].system.train_devices
    steps, waiting = _steps_per_epoch(runs[0]), []
    summed, seen = np.zeros(len(runs)), np.zeros(len(runs), int)
    for number, batch in enumerate(batches, 1):
        state, metrics = step(state, devices.shard(batch), constants)
        waiting.append(devices.first(metrics))
        # Seldom enough to keep the device busy, often enough to show progress (and
        # many virtual CPU devices deadlock when far more steps are in flight).
        if number % 8 == 0 or number == steps:
            for m in jax.device_get(waiting):
                rows = m["examples"]
                summed += m["loss"].astype(float) * (
                    1 if config.loss.reduction == "sum" else rows
                )
                seen += rows
            for i in going:
                if not np.isfinite(summed[i]):
                    whose = f" of seed {runs[i].config.seed}" if len(runs) > 1 else ""
                    raise workdirs.RunError(
                        f"the loss{whose} is not finite in epoch {epoch}: lower "
                        "config.optim.learning_rate; the checkpoints before are intact"
                    )
            rows = len(runs) * config.train.batch_size
            progress.steps(len(waiting), (summed / seen)[going].mean(), rows)
            waiting = []
    return state, (summed / seen).tolist()


def _save(
    runs: Sequence[run_lib.Run],
    stores,
    state: steps_lib.TrainState,
    histories,
    going: list[int],
) -> None:
    """Saves an epoch that is due or the best of one of the runs that are still
    `going`; keeps the newest ones and the best of each."""
    saving = [i for i in going if stores[i] is not None]
    if not any(_to_be_saved(runs[i], histories[i]) for i in saving):
        return
    for i in saving:
        one = _one(runs, i, state)
        rest = {"step": one.step, "opt_state": one.opt_state}
        if one.average:  # what scores is saved as `params`, what trains goes on here
            rest["params"] = one.params
        stores[i].save(histories[i][-1]["epoch"], one.variables, rest, histories[i])
    # When all have saved: they go on from an epoch that all of them have.
    for i in saving:
        newest = stores[i].epochs[-runs[i].config.train.keep :]
        stores[i].keep_only({*newest, workdirs.choose_epoch(histories[i])})


def _to_be_saved(run: run_lib.Run, history: list[dict]) -> bool:
    """Whether the newest epoch is due, the best or the last."""
    epoch = history[-1]["epoch"]
    best = workdirs.choose_epoch(history)
    last = epoch == run.last_epoch or run.out_of_patience(history)
    return best == epoch or last or epoch % run.config.train.checkpoint_every == 0
