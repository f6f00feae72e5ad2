"""What a training step of ours costs: time, operations, memory."""

from __future__ import annotations

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import models, systems, task
from cbmlc_jax import steps as steps_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.models.neighbours import Neighbours

# (m, k, n) of the products of the peak: square ones, and one of a layer's shape.
GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 1024, 1024))


def matmul_flops(
    config, lengths: np.ndarray, meta: models.Meta, edges: int | None = None
) -> float:
    """Useful floating point operations of the matrix products of one training step.

    2 m k n for [m, k] x [k, n], three times for the forward and the backward pass;
    padded tokens are not counted, nor anything that is not a product (the readout is a
    sum over the width).  With n = sum_i s_i tokens, B rows, L labels, E encoder layers:

        E (8 n d^2 + 4 d sum_i s_i^2 + 4 n d f)                       encoder
        + T (4 B L d^2 + 4 n d^2 + 4 L n d + 4 B L d f)  input to labels; the first
              block's queries are the same for all rows: L instead of B L of them
        + T (8 B L d^2 + 4 B L^2 d + 4 B L d f)                       label to label

    Args:
        config: of a model made of a token encoder and the label graph decoder.
        lengths: [B] tokens in each row.
        meta: of the data.
        edges: of a label graph that is computed by lists, instead of the L^2.
    """
    settings = config.model
    d, f, blocks = settings.width, settings.ffn_width, settings.num_blocks
    labels, vectors = meta.label_vectors.shape
    tokens, rows = int(lengths.sum()), len(lengths)
    ffn = 4 * d * f
    encoder = tokens * ffn
    if settings.encoder.self_attention:
        encoder += 8 * tokens * d**2 + 4 * d * int((lengths**2).sum())
    queries = (1 + (blocks - 1) * rows) * labels  # all blocks together
    cross = blocks * (
        2 * rows * labels * d**2
        + 4 * tokens * d**2
        + 4 * labels * tokens * d
        + rows * labels * ffn
    )
    pairs = labels**2 if edges is None else edges
    agree = blocks * rows * (labels * (8 * d**2 + ffn) + 4 * pairs * d)
    vectors_map = 2 * labels * vectors * d if vectors != d else 0
    decoder = cross + 2 * queries * d**2 + agree + vectors_map
    return 3.0 * (settings.encoder.layers * encoder + decoder)


def gemm_peak(dtype, seconds: float) -> float:
    """The best GFLOP/s of a [m, k] x [k, n] product over GEMMS, summed in float32.

    Args:
        dtype: of both matrices.
        seconds: for each shape, and one product at least.
    """
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    best = 0.0
    for m, k, n in GEMMS:
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        product(a, b).block_until_ready()
        end, now = time.perf_counter() + seconds, 0.0
        while now < end:
            start = time.perf_counter()
            product(a, b).block_until_ready()
            now = time.perf_counter()
            best = max(best, 2e-9 * m * k * n / (now - start))
    return best


def reset_peak() -> None:
    """Lets the kernel forget this process's peak memory, where it may (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # then the peak is that since the process's start


def peak_mb() -> float:
    """Peak resident memory in MiB, since `reset_peak` where that works."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) / 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Ours:
    """The training step of cbmlc_jax.train on the first batches of an epoch.

    Args:
        config: validated.
        data: the config's.
        steps: so many batches.

    Attributes:
        batches: what train.py would be given.
        flops: of each batch.
        data_seconds: that each took to make.
        compile_seconds: of the shapes so far.
        temporary_mb: the most that a compiled shape asks for.
    """

    def __init__(self, config, data: task.Task, steps: int):
        self.system = systems.create(config, data.meta, data.widths, data.graph)
        self._devices = self.system.train_devices
        source = pipeline.Epochs(
            data.train, config.train.batch_size, data.widths, config.seed, steps
        )
        self.batches, self.data_seconds = [], []
        stream = pipeline.stream(source)
        for _ in range(steps):
            start = time.perf_counter()
            self.batches.append(next(stream))
            self.data_seconds.append(time.perf_counter() - start)
        lists = isinstance(self.system.graph, Neighbours)
        edges = data.graph.nnz if lists else None
        self.flops = [
            matmul_flops(config, (b["tokens"] > 0).sum(1)[b["mask"]], data.meta, edges)
            for b in self.batches
        ]
        self.variables = self.system.init()
        tx = steps_lib.make_tx(config, source.steps_per_epoch)
        self._step = self._devices.compile(
            steps_lib.make_train_step(
                self.system.model,
                config,
                tx,
                self._devices.axis,
                steps_per_epoch=source.steps_per_epoch,
            ),
            donate=True,
        )
        params, stats = self.variables["params"], self.variables.get("batch_stats", {})
        step = jnp.zeros((), jnp.int32)
        # A copy: the step takes its state's memory over.
        state = steps_lib.TrainState(step, params, stats, tx.init(params))
        self._state = self._devices.replicate(jax.tree.map(jnp.copy, state))
        vectors, rates = data.meta.label_vectors, data.rates
        self._constants = steps_lib.step_constants(
            config, self.system.graph, vectors, rates
        )
        self._compiled: dict = {}
        self.compile_seconds, self.temporary_mb = 0.0, 0.0

    @property
    def params(self):
        """After the steps so far."""
        return self._devices.first(self._state).params

    def width(self, number: int) -> int:
        """Padded length of a batch: one shape to compile."""
        return self.batches[number]["tokens"].shape[1]

    def firsts(self, numbers: list[int]) -> list[int]:
        """The first batch of each width."""
        return list({self.width(n): n for n in reversed(numbers)}.values())

    def compile(self, number: int) -> None:
        """Compiles the shape of a batch.

        Raises:
            ConfigError: it would not fit into the memory that is free.
        """
        arguments = self._arguments(number)
        start = time.perf_counter()
        compiled = self._step.lower(self._state, *arguments).compile()
        self.compile_seconds += time.perf_counter() - start
        needs = compiled.memory_analysis().temp_size_in_bytes / 2**20
        self.temporary_mb = max(self.temporary_mb, needs)
        free = free_mb()
        if free is not None and needs > 0.9 * free:
            raise config_lib.ConfigError(
                f"a step needs {needs:,.0f} MiB and {free:,.0f} MiB are free: lower "
                "config.train.batch_size or config.model.width"
            )
        self._compiled[self.width(number)] = compiled

    def step(self, number: int) -> tuple[float, float]:
        """Trains on a batch; returns seconds, and seconds of the processors."""
        compiled = self._compiled[self.width(number)]
        start, cpu = time.perf_counter(), time.process_time()
        self._state, metrics = compiled(self._state, *self._arguments(number))
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start, time.process_time() - cpu

    def _arguments(self, number: int):
        return self._devices.shard(self.batches[number]), self._constants


def free_mb() -> float | None:
    """MemAvailable of Linux in MiB, or None."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) / 1024
    except (OSError, KeyError):
        return None
