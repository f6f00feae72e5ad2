"""The benchmark: what it counts, and that a peer must be the same model."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from running import forks, tiny_config

from cbmlc_jax import config as config_lib
from cbmlc_jax import systems, task
from cbmlc_jax.data import pipeline
from cbmlc_jax.models import attention, ops
from experiments import bench, measure, peers


def products(jaxpr) -> float:
    """2 m k n of every matrix product in a jaxpr, those of inner functions too.

    But for products with a vector, which are sums in disguise (`ops`).
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            summed = np.prod([equation.invars[0].aval.shape[i] for i in left])
            shape = equation.outvars[0].aval.shape
            if 1 not in shape[-2:]:
                total += 2 * summed * np.prod(shape)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += products(inner)
    return total


@pytest.mark.parametrize("self_attention", [True, False])
def test_counted_products_are_those_of_the_program(self_attention, monkeypatch):
    for module in (attention, ops):
        monkeypatch.setattr(module, "LANES", 1)  # labels are padded otherwise
    config = tiny_config(
        **{
            "model.width": 24,
            "model.ffn_width": 20,
            "model.num_blocks": 3,
            "model.encoder.layers": 2,
            "model.encoder.self_attention": self_attention,
        }
    )
    data = task.build(config)
    system = systems.create(config, data.meta, data.widths, data.graph)
    tokens = 1 + np.arange(5 * 16, dtype=np.int32).reshape(5, 16)  # no padding
    variables = jax.eval_shape(system.init)

    def loss(params):
        outputs = system.model.apply({"params": params}, {"tokens": tokens})
        return outputs.logits.sum() + outputs.intermediate.sum()

    program = jax.make_jaxpr(jax.grad(loss))(variables["params"])
    lengths = np.full(5, 16)
    assert measure.matmul_flops(config, lengths, data.meta) == products(program.jaxpr)


def test_padding_is_not_counted():
    config = tiny_config()
    meta = task.build(config).meta
    ours = measure.matmul_flops(config, np.array([3, 9]), meta)
    padded = measure.matmul_flops(config, np.array([9, 9]), meta)
    alone = [measure.matmul_flops(config, np.array([n]), meta) for n in (3, 9)]
    shared = measure.matmul_flops(config, np.array([], int), meta)
    assert ours < padded
    # Rows add up, but for what is done once for all of them.
    assert ours == alone[0] + alone[1] - shared


def test_what_is_timed_is_the_training_step():
    """Two steps of the batches that training would see change the parameters."""
    config = tiny_config(**{"model.encoder.layers": 0})
    ours = measure.Ours(config, task.build(config), 2)
    before = jax.tree.map(np.array, ours.params)
    for number in range(2):
        ours.compile(number)
        ours.step(number)
    moved = jax.tree.map(lambda a, b: (a != b).any(), before, ours.params)
    assert all(jax.tree.leaves(moved)) and len(ours.flops) == 2


@pytest.mark.slow
def test_a_line_of_a_made_up_case():
    """The whole command, on one shape of its own; the other tests see its parts."""
    flags = {
        "model.width": 8,
        "model.ffn_width": 8,
        "model.num_heads": 2,
        "model.num_blocks": 1,
        "model.encoder.layers": 1,
        "train.batch_size": 4,
    }
    words = [f"--config.{k}={v}" for k, v in flags.items()]
    words += ["--case=labels-7", "--steps=3", "--gemm_seconds=0"]
    done = forks().run("experiments.bench", *words)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(x) for x in done.stdout.splitlines()]
    assert line["case"] == "labels-7" and line["steps"] == 3
    config = tiny_config(**flags)
    data = bench.grown(config, 7, 64, False)
    assert data.train.labels.shape == (16, 7)
    wanted = measure.matmul_flops(config, np.full(4, 64), data.meta)
    assert line["flops"] == float(f"{wanted:.4g}")
    assert 0 < line["step_ms_min"] <= line["step_ms"]
    assert line["gemm_gflops"] is None and line["gemm_fraction"] is None
    assert line["peak_mb"] > line["temporary_mb"] > 0
    assert line["peer"] is None and line["ratio"] is None


def test_only_the_same_model_is_compared():
    peers.check(config_lib.base())
    with pytest.raises(config_lib.ConfigError, match="loss.name=asl only, not bce"):
        peers.check(tiny_config(**{"loss.name": "bce"}))
    assert peers.chosen("torch") == list(peers.PEERS)
    with pytest.raises(config_lib.ConfigError, match="--peer=jax"):
        peers.chosen("torch-f32,jax")


def test_a_peer_that_does_not_start():
    with pytest.raises(config_lib.ConfigError, match="ended: it said nothing"):
        peers.Process("false", "job.npz", "torch-f32")


@pytest.mark.parametrize("name", ["torch-f32", "lamp-f32"])
def test_parity_with_torch(name, tmp_path):
    python = os.environ.get("CBMLC_TORCH_PYTHON", sys.executable)
    there = subprocess.run([python, "-c", "import torch"], capture_output=True)
    if there.returncode:
        pytest.skip(f"{python} has no torch; set CBMLC_TORCH_PYTHON")
    config = tiny_config(
        **{"model.num_blocks": 2, "train.batch_size": 8, "model.dropout": 0.2}
    )
    data = task.build(config)
    source = pipeline.Epochs(data.train, 8, data.widths, 0, 1)
    batch = source[0]
    batch["mask"][-1] = False
    batches = peers.batches_of(name, config, data, [batch])
    variables = systems.create(config, data.meta, data.widths, data.graph).init()

    def apart(settings):
        job = peers.write_job(str(tmp_path), settings, variables["params"], batches)
        with peers.Process(python, job, name) as peer:
            answer = peer.ask("parity 0")
            seconds = peer.ask("step 0 0")["seconds"]
        assert len(seconds) == 2 and min(seconds) > 0
        return peers.parity(config, data, variables, batches[0], answer)

    assert apart(config) < 1e-4
    other = config.copy_and_resolve_references()
    other.loss.margin = 0.06
    assert apart(other) > 1e-4
    other = config.copy_and_resolve_references()
    other.optim.learning_rate = 0.02
    assert apart(other) > 1e-4


def test_peak_of_products(monkeypatch):
    monkeypatch.setattr(measure, "GEMMS", ((64, 32, 16),))
    ticks = iter(np.arange(0.0, 9.0, 0.5))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    # Half a second for each product, on this clock.
    assert measure.gemm_peak(np.float32, 2.0) == 2e-9 * 64 * 32 * 16 / 0.5


def test_cases_of_growth():
    assert bench._growth("labels-983") == (983, 64, False)
    assert bench._growth("edges-983-tokens-32") == (983, 32, True)
    assert bench._growth("tokens-512") == (159, 512, False)
    assert bench._growth("bibtex") is bench._growth("labels-x") is None
    graph = bench.grown(tiny_config(), 300, 5, True).graph
    assert (graph != graph.T).nnz == 0 and graph.diagonal().all()
    assert 19 < graph.nnz / 300 - 1 <= 20
