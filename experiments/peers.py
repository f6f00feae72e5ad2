"""Other implementations of our training step, each in a process of its own.

`torch-*` is experiments/torch_peer.py on our batches; `lamp-*` is its layout "lamp", on
rows in any order that are padded to the longest of the batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbmlc_jax import config as config_lib
from cbmlc_jax import rngs, systems, task
from cbmlc_jax import steps as steps_lib
from cbmlc_jax.data import pipeline

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torch_peer.py")
PEERS = {
    "torch-f32": [],
    "torch-bf16": ["--dtype=bf16"],
    "torch-f32-compile": ["--compile"],
    "torch-bf16-compile": ["--dtype=bf16", "--compile"],
    "lamp-f32": ["--layout=lamp"],
    "lamp-bf16": ["--layout=lamp", "--dtype=bf16"],
}
# What torch_peer.py is written for; anything else would not be the same model.
WRITTEN_FOR = {
    "embeddings.trainable": True,
    "loss.cb_norm": "squared",
    "loss.name": "asl",
    "loss.reduction": "sum",
    "loss.stop_focal_gradient": False,
    "model.encoder.name": "set",
    "model.encoder.self_attention": True,
    "model.label_graph": "complete",
    "model.name": "cbmlc",
    "model.linear_path": False,
    "model.readout_tying": False,
    "model.token_dropout": 0.0,
    "optim.averaging": 0.0,
    "optim.clip_norm": 0.0,
    "optim.decay_times": 0,
    "optim.decoupled": False,
    "optim.name": "adam",
}


def chosen(names: str) -> list[str]:
    """The peers of --peer.

    Raises:
        ConfigError: one that is not known.
    """
    wanted = [n for n in names.split(",") if n]
    unknown = [n for n in wanted if n != "torch" and n not in PEERS]
    if unknown:
        raise config_lib.ConfigError(
            f"--peer={unknown[0]} is not one of torch (all), {', '.join(PEERS)}"
        )
    return list(PEERS) if "torch" in wanted else wanted


def check(config) -> None:
    """Whether torch_peer.py is the model of a config.

    Raises:
        ConfigError: it is not; the message names the key.
    """
    flat = config_lib.flatten(config)
    for key, value in WRITTEN_FOR.items():
        if flat[key] != value:
            raise config_lib.ConfigError(
                f"the peer knows config.{key}={value} only, not {flat[key]}"
            )


def batches_of(name: str, config, data: task.Task, ours: list[dict]) -> list[dict]:
    """What a peer trains on: our batches, or for lamp rows in any order."""
    if not name.startswith("lamp"):
        return ours
    widest, seed = [data.widths[-1]], config.seed
    order = pipeline.Epochs(
        data.train, config.train.batch_size, widest, seed, len(ours)
    )
    return [order[i] for i in range(len(ours))]


def write_job(folder: str, config, params, batches: list[dict]) -> str:
    """Writes what torch_peer.py reads; returns its path."""
    loss, settings = config.loss, config.model
    content = {
        "num_heads": settings.num_heads,
        "dropout": settings.dropout,
        "intermediate_weight": settings.intermediate_weight,
        "asl": [loss.gamma_pos, loss.gamma_neg, loss.margin],
        "cb_weight": loss.cb_weight,
        "learning_rate": config.optim.learning_rate,
        "beta2": config.optim.beta2,
        "weight_decay": config.optim.weight_decay,
    }
    arrays = {
        "params/" + "/".join(part.key for part in path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    for number, batch in enumerate(batches):
        for name in ("tokens", "labels", "mask"):
            arrays[f"batch/{number}/{name}"] = batch[name]
    path = os.path.join(folder, "job.npz")
    np.savez(path, settings=json.dumps(content), **arrays)
    return path


class Process:
    """A peer, waiting for commands.

    Args:
        python: interpreter with torch.
        job: of `write_job`.
        name: in PEERS.

    Raises:
        ConfigError: it does not start.
    """

    def __init__(self, python: str, job: str, name: str):
        # Threads that spin at a barrier are slow where another job has their core, and
        # would take ours while it is our turn.
        env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        # Large pages: a tenth and more of the peer's processor time is page faults.
        env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        # Its libraries' warnings are not ours to judge; shown where it fails.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, SCRIPT, job, *PEERS[name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self._name = name
        self.about = self._answer()

    def ask(self, command: str) -> dict:
        """Its answer to a line.

        Raises:
            ConfigError: it ended instead.
        """
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = [x.strip() for x in self._errors.read().splitlines() if x.strip()]
        # torch puts advice after the line that names the error.
        said = [x for x in said if "Error: " in x] or said or ["it said nothing"]
        raise config_lib.ConfigError(
            f"the peer {self._name} ended: {said[-1]}"
            " (--peer_python names a Python with torch; pip install '.[bench]')"
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def parity(config, data: task.Task, variables, batch: dict, peer: dict) -> float:
    """Largest relative difference between ours and a peer, without dropout.

    Of the loss of a batch before and after an update, of the norm of its gradient, and
    of the logits (the norm of the difference over the norm).

    Args:
        config: of the run.
        data: its data.
        variables: both sides' parameters.
        batch: as the peer had it.
        peer: its answer to `parity`.
    """
    config = config.copy_and_resolve_references()
    config.model.dropout = 0.0
    system = systems.create(config, data.meta, data.widths, data.graph)
    # The gradient of the last step stays in the state of the first transformation.
    tx = optax.chain(optax.trace(decay=0.0), steps_lib.make_tx(config, 1))
    step = jax.jit(
        steps_lib.make_train_step(system.model, config, tx, None, steps_per_epoch=1)
    )
    params = variables["params"]
    state = steps_lib.TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    vectors, rates = data.meta.label_vectors, data.rates
    constants = steps_lib.step_constants(config, system.graph, vectors, rates)
    after, first = step(state, batch, constants)
    _, second = step(after, batch, constants)
    norm = optax.global_norm(after.opt_state[0].trace)
    outputs = system.model.apply(
        variables,
        systems.model_inputs(batch),
        system.graph,
        batch["rows"],
        rngs={"dropout": rngs.stream(config.seed, "dropout")},
    )
    logits = outputs.logits[None]
    if outputs.intermediate is not None:
        logits = jnp.concatenate([outputs.intermediate, logits])
    theirs = np.load(peer["logits"], allow_pickle=False)
    pairs = zip(
        [float(first["loss"]), float(second["loss"]), float(norm)],
        [*peer["losses"], peer["grad_norm"]],
        strict=True,
    )
    apart = [abs(a - b) / abs(b) for a, b in pairs]
    apart.append(
        float(np.linalg.norm(logits - theirs[-len(logits) :]) / np.linalg.norm(logits))
    )
    return max(apart)
