"""Several devices compute what one does: loss, gradient, dropout and update."""

from __future__ import annotations

import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import models, parallel, steps, thresholds
from cbmlc_jax.data import pipeline
from cbmlc_jax.data.dataset import Ragged

LABELS, FEATURES, BATCH, STEPS = 6, 20, 8, 20


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def tiny_config(changes: dict):
    c = config_lib.base()
    c.model.width, c.model.ffn_width, c.model.num_heads = 8, 16, 2
    c.model.encoder.layers = c.model.num_blocks = 1
    c.model.dropout = 0.3
    c.loss.cb_weight = 0.3
    c.optim.learning_rate, c.optim.weight_decay = 1e-2, 1e-3
    c.train.batch_size = BATCH
    c.mpvae.samples, c.mpvae.dropout = 3, 0.3
    c.update_from_flattened_dict(changes)
    return c


def trajectory(num_devices: int, changes: dict):
    """Losses and final parameters of 20 steps; the last batch is mostly padding."""
    config = tiny_config(changes)
    rng = np.random.default_rng(0)
    # 21 rows in batches of 8: the last has 5 valid rows, on 4 devices 2, 2, 1, 0.
    lengths = rng.integers(1, 9, 21)
    inputs = Ragged.from_rows([rng.permutation(FEATURES)[:n] for n in lengths])
    labels = (rng.random((21, LABELS)) < 0.4).astype(np.uint8)
    vectors = rng.normal(size=(LABELS, 5))
    model = models.create_model(config, running.meta(FEATURES, vectors))
    params = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), running.init_params(model, 0, LABELS)
    )
    devices = parallel.Devices(tuple(jax.devices()[:num_devices]))
    tx = steps.make_tx(config, steps_per_epoch=3)
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    state = devices.replicate(state)
    step = devices.compile(
        steps.make_train_step(
            model,
            config,
            tx,
            devices.axis,
            steps_per_epoch=3,
        )
    )
    rates = thresholds.Rates(0.05, 0.3)
    constants = steps.step_constants(config, None, vectors + 1.0, rates)
    losses = []
    while len(losses) < STEPS:
        plan = pipeline.plan_batches(inputs.lengths, BATCH, [8])
        source = pipeline.Batches(inputs, plan, pipeline.Split(inputs, labels))
        for batch in pipeline.stream(source):
            state, metrics = step(state, devices.shard(batch), constants)
            losses.append(float(devices.first(metrics)["loss"]))
    return np.array(losses), jax.device_get(devices.first(state))


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"loss.reduction": "sum"}, (4,)),
        pytest.param({"loss.reduction": "mean"}, (2, 4), marks=pytest.mark.slow),
        # Which entries are rejected depends on all of the batch.
        pytest.param(
            {"loss.name": "large_loss", "loss.rejected_per_epoch": 0.05},
            (4,),
            marks=pytest.mark.slow,
        ),
        # An objective of its own, with random draws by row.
        pytest.param(
            {
                "model.name": "mpvae",
                "loss.cb_weight": 0.0,
                "loss.reduction": "mean",
                "optim.learning_rate": 1e-3,
            },
            (4,),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sum", "mean", "large_loss", "mpvae"],
)
def test_devices_agree_with_one_device(float64, changes, counts):
    losses, state = trajectory(1, changes)
    # Three batches are one pass over the rows.
    assert losses[-3:].mean() < 0.9 * losses[:3].mean()
    for num_devices in counts:
        others, other = trajectory(num_devices, changes)
        np.testing.assert_allclose(others, losses, rtol=1e-9)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
            state.params,
            other.params,
        )
        assert int(other.step) == int(state.step)


def test_replicas_stay_equal():
    devices = parallel.Devices(tuple(jax.devices()[:4]))
    tree = {"a": np.arange(6.0).reshape(2, 3)}
    replicated = devices.replicate(tree)
    assert replicated["a"].shape == (4, 2, 3)
    for i in range(4):
        np.testing.assert_array_equal(replicated["a"][i], tree["a"])


def test_shard_and_gather_are_inverse():
    devices = parallel.Devices(tuple(jax.devices()[:4]))
    batch = {"x": np.arange(24).reshape(8, 3)}
    np.testing.assert_array_equal(devices.gather(devices.shard(batch)["x"]), batch["x"])


def test_batch_that_devices_do_not_divide():
    with pytest.raises(parallel.DeviceError, match="10 rows .* 4 devices"):
        parallel.Devices.local(10)
    with pytest.raises(parallel.DeviceError, match="there are 4"):
        parallel.Devices.local(10, 5)
    assert len(parallel.Devices.local(10, 2).devices) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_memory_that_is_kept_is_not_cleared_again():
    program = """
import resource, sys
import numpy as np
from cbmlc_jax import parallel
if sys.argv[1] == "keep":
    parallel.keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.full(2**24, 1.5)
    del array
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = [
        int(
            subprocess.check_output(
                [sys.executable, "-c", program, mode], cwd=running.ROOT
            )
        )
        for mode in ("keep", "give back")
    ]
    assert faults[0] < 0.1 * faults[1]  # 32,768 pages of 4 kB
