"""How fast a training step is, and what it is held against: one JSON line a case.

    python -m experiments.bench --case=bibtex
    python -m experiments.bench --case=bibtex --peer=torch --peer_python=/PYTHON
    python -m experiments.bench --case=labels-983 --config.train.batch_size=8

Cases: the name of a file in configs/ (its step on its real batches), labels-N and
tokens-N (the same step on made-up rows with N labels, or N tokens each, or both:
labels-N-tokens-N), edges-N (as labels-N, on a graph of about 20 neighbours a label),
evaluate (the test rows of --config), startup, first-step.  `--config` and
`--config.KEY=VALUE` are as in cbmlc_jax.main.  It is a benchmark: it has no opinion
about its numbers.

Keys of a step's line:

    case           --case
    step_ms, step_ms_min   wall time of a step, median and least, each waited for
    cpu_ms         processor time of a step (all threads), median: less in the hands of
                   the other jobs of a shared machine than wall time is
    data_ms        making a batch, median: what the loop does between two steps
    flops          of the matrix products of a step, mean; see `matmul_flops`
    gemm_gflops, gemm_gflops_bf16   best product of large matrices in this process,
                   from float32 and from bfloat16 (summed in float32), GFLOP/s
    gemm_fraction  median over the steps of flops / seconds, over gemm_gflops
    compile_s      of all shapes, without a cache
    peak_mb        most memory (MiB) resident since the data was read; see `reset_peak`
    temporary_mb   of it, what the compiled step asks for beside its arguments
    peer, peer_step_ms, peer_cpu_ms, peer_peak_mb   another implementation, or null
    ratio, cpu_ratio   ours / peer, median over pairs timed one right after the other
    parity         largest relative difference between ours and the peer's loss, loss
                   after an update, norm of the gradient and logits; above --tolerance
                   nothing is compared
    not_available  why a compiled peer did not run (no C++ compiler); then alone
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl import app, flags, logging
from ml_collections import config_flags

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors, models, parallel, rngs, systems
from cbmlc_jax import task as task_lib
from cbmlc_jax.data import pipeline
from experiments import measure, peers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Made-up rows: so many tokens, labels; so many neighbours a label beside itself.
TOKENS, LABELS, NEIGHBOURS = 64, 159, 20


def define_flags() -> None:
    """Defines the flags; the default --config depends on --case."""
    text = flags.DEFINE_string
    text("case", "bibtex", "What to measure.")
    text("peer", "", "torch (all), or some of experiments/peers.py, with commas.")
    text("peer_python", sys.executable, "A Python that has torch.")
    flags.DEFINE_integer("steps", 24, "Timed steps.", 1)
    flags.DEFINE_integer("block", 2, "Steps of one side before the other's turn.", 1)
    flags.DEFINE_float("gemm_seconds", 1.0, "Each shape of the peak; 0: skip.", 0.0)
    flags.DEFINE_float("tolerance", 1e-4, "Of the parity with a peer, relative.", 0.0)
    flags.FLAGS(sys.argv, known_only=True)
    path = _config_path(flags.FLAGS.case)
    if not os.path.exists(path):
        path = _config_path("bibtex")
    config_flags.DEFINE_config_file("config", path, "As in main.", lock_config=True)


def _config_path(case: str) -> str:
    return os.path.join(ROOT, "configs", f"{case}.py")


def _growth(case: str) -> tuple[int, int, bool] | None:
    """Labels, tokens and whether on a graph, of labels-983; None for other cases."""
    pattern = r"(?:(labels|edges)-(\d+))?(?:(?:^|-)tokens-(\d+))?"
    found = re.fullmatch(pattern, case)
    if not case or not found:
        return None
    kind, labels, tokens = found.groups()
    return int(labels or LABELS), int(tokens or TOKENS), kind == "edges"


def grown(config, labels: int, tokens: int, edges: bool) -> task_lib.Task:
    """Made-up rows of equal length for the growth cases, in the clothes of a task.

    Args:
        config: gives batch size and seed; its data set is not read.
        labels, tokens: L, and tokens in a row.
        edges: on a graph of NEIGHBOURS edges a label at random; else on all pairs.
    """
    random = rngs.generator(config.seed, "bench")
    rows, features = 4 * config.train.batch_size, max(2000, tokens)
    ids = [random.permutation(features)[:tokens] for _ in range(rows)]
    present = (random.random((rows, labels)) < 3 / labels).astype(np.uint8)
    vectors = random.normal(size=(labels, 100)).astype(np.float32)
    embedded = config.copy_and_resolve_references()
    embedded.data.name = "synthetic"
    return dataclasses.replace(
        task_lib.build(embedded),
        train=pipeline.Split(pipeline.Ragged.from_rows(ids), present),
        meta=models.Meta(features, vectors, present.sum(0), labels),
        widths=[-(-tokens // 8) * 8],
        graph=_ring(random, labels) if edges else None,
    )


def _ring(random: np.random.Generator, labels: int) -> scipy.sparse.csr_array:
    """Symmetric edges: itself, and those beside a label in NEIGHBOURS / 2 orders."""
    pairs = [np.tile(np.arange(labels), (2, 1))]
    for _ in range(NEIGHBOURS // 2):
        order = random.permutation(labels)
        pairs += [np.stack([order, np.roll(order, 1)])]
    ends = np.concatenate(pairs + [x[::-1] for x in pairs], 1)
    values = np.ones(ends.shape[1], bool)
    return scipy.sparse.csr_array((values, ends), (labels, labels), dtype=bool)


def _data(case: str, config) -> task_lib.Task:
    growth = _growth(case)
    return grown(config, *growth) if growth else task_lib.build(config)


def _gemm_peaks() -> list[float]:
    """GFLOP/s from float32 and from bfloat16; nothing where --gemm_seconds=0."""
    seconds = flags.FLAGS.gemm_seconds
    dtypes = (jnp.float32, jnp.bfloat16) if seconds else ()
    return [measure.gemm_peak(dtype, seconds) for dtype in dtypes]


def step_lines(case: str, config) -> Iterator[dict]:
    """Our step alone, or in turns with each peer: one line each."""
    values = flags.FLAGS
    names = peers.chosen(values.peer)
    if names:
        peers.check(config)
    data = _data(case, config)
    gemm = _gemm_peaks()
    measure.reset_peak()
    ours = measure.Ours(config, data, values.steps)
    numbers = list(range(values.steps))
    for number in ours.firsts(numbers):
        ours.compile(number)
        ours.step(number)
    alone = [ours.step(n) for n in numbers] if not names else []
    memory = measure.peak_mb()
    # Other jobs come and go: the best of two times.
    gemm = [max(pair) for pair in zip(gemm, _gemm_peaks(), strict=True)]

    def line(numbers, times, compared):
        seconds, cpu = np.array(times).T
        flops = np.array([ours.flops[n] for n in numbers])
        rate = np.median(1e-9 * flops / seconds)
        return {
            "case": case,
            "steps": len(numbers),
            "step_ms": 1e3 * np.median(seconds),
            "step_ms_min": 1e3 * seconds.min(),
            "cpu_ms": 1e3 * np.median(cpu),
            "data_ms": 1e3 * np.median(ours.data_seconds),
            "flops": flops.mean(),
            "gemm_gflops": gemm[0] if gemm else None,
            "gemm_gflops_bf16": gemm[1] if gemm else None,
            "gemm_fraction": rate / gemm[0] if gemm else None,
            "compile_s": ours.compile_seconds,
            "peak_mb": memory,
            "temporary_mb": ours.temporary_mb,
            **compared,
        }

    if not names:
        yield line(numbers, alone, {"peer": None, "peer_step_ms": None, "ratio": None})
    for name in names:
        try:
            found = versus(name, config, data, ours, numbers)
        except config_lib.ConfigError as error:
            if "compile" not in name:
                raise
            # torch.compile wants a C++ compiler; the other peers do not.
            yield {"case": case, "peer": name, "not_available": str(error)}
            continue
        yield line(*found)


def versus(name: str, config, data, ours: measure.Ours, numbers: list[int]):
    """Times ours and a peer in turns, a few steps each; both have compiled before.

    A compiled peer takes a minute and more for each padded length: it and ours are
    timed on the commonest one alone.

    Returns:
        The batches' numbers, our times, and what a line says of the peer.

    Raises:
        ConfigError: the peer does not start, or is not the same model.
    """
    values = flags.FLAGS
    if "compile" in name:
        widths = [ours.width(n) for n in numbers]
        commonest = max(set(widths), key=lambda w: (widths.count(w), w))
        usable = [n for n in numbers if ours.width(n) == commonest]
        numbers = [usable[i % len(usable)] for i in range(len(numbers))]
    batches = peers.batches_of(name, config, data, ours.batches)
    with tempfile.TemporaryDirectory() as folder:
        job = peers.write_job(folder, config, ours.variables["params"], batches)
        with peers.Process(values.peer_python, job, name) as peer:
            first, answer = batches[numbers[0]], peer.ask(f"parity {numbers[0]}")
            apart = peers.parity(config, data, ours.variables, first, answer)
            if not apart <= values.tolerance:
                raise config_lib.ConfigError(
                    f"{name} is not the same model: it differs from ours by {apart:.1e}"
                    f", --tolerance={values.tolerance:g}"
                )
            start = time.perf_counter()
            peer.ask("step " + " ".join(map(str, ours.firsts(numbers))))
            warm_up = time.perf_counter() - start
            mine, theirs, pairs = [], [], []
            for at in range(0, len(numbers), values.block):
                some = numbers[at : at + values.block]
                a = [ours.step(n) for n in some]
                answer = peer.ask("step " + " ".join(map(str, some)))
                b = list(zip(answer["seconds"], answer["cpu"], strict=True))
                mine, theirs = mine + a, theirs + b
                pairs.append(np.sum(a, axis=0) / np.sum(b, axis=0))
    ratio, cpu_ratio = np.median(pairs, axis=0)
    seconds, cpu = np.array(theirs).T
    return (
        numbers,
        mine,
        {
            "peer": name,
            "peer_step_ms": 1e3 * np.median(seconds),
            "peer_step_ms_min": 1e3 * seconds.min(),
            "peer_cpu_ms": 1e3 * np.median(cpu),
            "peer_peak_mb": answer["peak_mb"],
            "peer_warm_up_s": warm_up,
            "peer_version": peer.about["ready"],
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "parity": apart,
        },
    )


def evaluate_line(case: str, config) -> dict:
    """Scores the test rows twice: with compiling, and without."""
    data = task_lib.build(config)
    system = systems.create(config, data.meta, data.widths, data.graph)
    variables = system.init()
    measure.reset_peak()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        system.scores(variables, data.test.inputs)
        seconds.append(time.perf_counter() - start)
    return {
        "case": case,
        "rows": len(data.test),
        "first_s": seconds[0],
        "again_s": seconds[1],
        "peak_mb": measure.peak_mb(),
    }


def first_step_line(case: str, config) -> dict:
    """One step from a cold process: for `startup`, which looks at the clock."""
    ours = measure.Ours(config, task_lib.build(config), 1)
    ours.compile(0)
    return {"case": case, "step_ms": 1e3 * ours.step(0)[0]}


def startup_line(case: str, arguments: list[str]) -> dict:
    """Seconds from the command to its end, in processes of their own.

    `first_step_s` is with a warm cache of compiled programs, `cold_first_step_s` with
    an empty one.
    """

    def seconds(*words: str, **env: str) -> float:
        start = time.perf_counter()
        command = [sys.executable, "-m", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True
        )
        # absl's --help ends with 1.
        if done.returncode and "--help" not in words:
            raise config_lib.ConfigError(f"{words[0]} failed: {done.stderr[-500:]}")
        return time.perf_counter() - start

    rest = [a for a in arguments if not a.startswith("--case")]
    with tempfile.TemporaryDirectory() as cache:
        env = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        first = ("experiments.bench", "--case=first-step", *rest)
        cold = seconds(*first, **env)
        warm = min(seconds(*first, **env) for _ in range(2))
    helped = min(seconds("cbmlc_jax.main", "--help") for _ in range(3))
    return {
        "case": case,
        "help_s": helped,
        "first_step_s": warm,
        "cold_first_step_s": cold,
    }


def main(argv: list[str]) -> None:
    """Prints the lines of --case."""
    if len(argv) > 1:
        raise config_lib.ConfigError(f"unknown argument {argv[1]!r}")
    values = flags.FLAGS
    if not values["verbosity"].present:
        logging.set_verbosity(logging.FATAL)
    parallel.keep_memory()  # as main does
    case, config = values.case, values.config
    config_lib.apply_published(config, set(values["config"].override_values))
    config_lib.validate(config)
    if case == "startup":
        lines = [startup_line(case, sys.argv[1:])]
    elif case == "evaluate":
        lines = [evaluate_line(case, config)]
    elif case == "first-step":
        lines = [first_step_line(case, config)]
    elif _growth(case) or os.path.exists(_config_path(case)):
        lines = step_lines(case, config)
    else:
        raise config_lib.ConfigError(
            f"--case={case} is none: a file of configs/ without its .py, labels-N, "
            "edges-N, tokens-N, evaluate, startup or first-step"
        )
    for line in lines:
        print(json.dumps({k: _short(v) for k, v in line.items()}), flush=True)


def _short(value):
    """Four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _parse(argv: list[str]) -> list[str]:
    with errors.in_flags():
        return flags.FLAGS(argv)


def run() -> None:
    """Entry point."""
    with errors.explained():
        with errors.in_flags():
            define_flags()
        app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
