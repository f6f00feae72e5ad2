"""What training several seeds side by side gains over taking turns.

    python -m experiments.seeds --config=configs/bibtex.py:fast --numbers=2,4

A JSON line for each number of seeds, of times of a step and seed in ms: step_ms and
cpu_ms (wall and processor) side by side, turns_step_ms and turns_cpu_ms one after the
other; ratio and cpu_ratio, the median over pairs timed in turns, below 1 where side by
side is faster; wider, the padded width side by side over that of each alone.
"""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors, parallel, systems, task
from cbmlc_jax import steps as steps_lib
from cbmlc_jax.data import pipeline


class Timed:
    """A training step of K seeds, whose state stays on the device.

    Args:
        config: validated, of one seed.
        data: of all seeds; here they differ in the order of the rows alone.
        system: of the config.
        number: K.
    """

    def __init__(self, config, data: task.Task, system: systems.Neural, number: int):
        self._devices = devices = system.train_devices
        tx = steps_lib.make_tx(config, 1)
        step = steps_lib.make_train_step(
            system.model, config, tx, devices.axis, steps_per_epoch=1
        )
        self._step = devices.compile(parallel.side_by_side(step, number), donate=True)
        params = system.init()["params"]
        state = steps_lib.TrainState(
            jnp.zeros((), jnp.int32), params, {}, tx.init(params)
        )
        # Copies: the step takes its state's memory over.
        states = [jax.tree.map(jnp.copy, state) for _ in range(number)]
        self._state = devices.replicate(parallel.stacked(states))
        vectors, rates = data.meta.label_vectors, data.rates
        constants = steps_lib.step_constants(config, system.graph, vectors, rates)
        self._constants = parallel.stacked([constants] * number)

    def step(self, batch) -> np.ndarray:
        """Seconds of a step, and those of the processors."""
        start, cpu = time.perf_counter(), time.process_time()
        batch = self._devices.shard(batch)
        self._state, metrics = self._step(self._state, batch, self._constants)
        jax.block_until_ready((self._state, metrics))
        return np.array([time.perf_counter() - start, time.process_time() - cpu])


def measure(config, data: task.Task, number: int, steps: int) -> dict:
    """Both ways in turns, each shape compiled before; medians over the steps."""
    system = systems.create(config, data.meta, data.widths, data.graph)
    batch_size, seeds = config.train.batch_size, range(number)
    sources = [
        pipeline.Epochs(data.train, batch_size, data.widths, config.seed + k, 1)
        for k in seeds
    ]
    both = pipeline.SideBySide(sources, data.widths)
    ways = Timed(config, data, system, number), Timed(config, data, system, 1)
    batches = [(both[n], [source[n] for source in sources]) for n in range(steps)]
    for together, alone in batches:
        ways[0].step(together)
        for batch in alone:
            ways[1].step(batch)
    found = []
    for together, alone in batches:
        turns = sum(ways[1].step(batch) for batch in alone)
        found.append(np.stack([ways[0].step(together), turns]) / number)
    (wall, cpu), (turns_wall, turns_cpu) = 1e3 * np.median(found, 0)
    ratios = np.array([side / turns for side, turns in found])
    widths = [
        (x["tokens"].shape[2], [y["tokens"].shape[1] for y in z]) for x, z in batches
    ]
    wider = sum(w for w, _ in widths) / np.mean([w for _, some in widths for w in some])
    return {
        "seeds": number,
        "step_ms": round(wall, 1),
        "cpu_ms": round(cpu, 1),
        "turns_step_ms": round(turns_wall, 1),
        "turns_cpu_ms": round(turns_cpu, 1),
        "ratio": round(np.median(ratios[:, 0]), 3),
        "cpu_ratio": round(np.median(ratios[:, 1]), 3),
        "wider": round(wider / steps, 3),
    }


def main(argv: list[str]) -> None:
    """Prints a JSON line for each number of seeds."""
    values = flags.FLAGS
    parallel.keep_memory()
    logging.set_verbosity(logging.FATAL)
    config_lib.settle(values.config, set(values["config"].override_values))
    data = task.build(values.config)
    config = config_lib.settled(values.config, data.dataset.kind)
    for number in values.numbers:
        print(json.dumps(measure(config, data, int(number), values.steps)), flush=True)


def run() -> None:
    """Entry point."""
    with errors.explained():
        with errors.in_flags():
            config_flags.DEFINE_config_file("config", None, "As in main; of tokens.")
            flags.DEFINE_list("numbers", ["2", "4"], "Seeds.")
            flags.DEFINE_integer("steps", 20, "Timed steps.", 1)
        app.run(main)


if __name__ == "__main__":
    run()
