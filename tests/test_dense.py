"""The encoder of real-valued features: against numpy, and what it must not change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbmlc_jax import models
from cbmlc_jax.models.encoders import DenseEncoder

F, WIDTH = 5, 8
RANDOM = np.random.default_rng(0)
MEAN = RANDOM.normal(0, 50, F).astype(np.float32)
SCALE = RANDOM.uniform(0.01, 20, F).astype(np.float32)
FEATURES = MEAN + SCALE * RANDOM.standard_normal((6, F)).astype(np.float32)


def encoder(**changes) -> DenseEncoder:
    settings = {"width": WIDTH, "num_layers": 2, "mean": MEAN, "scale": SCALE}
    return DenseEncoder(**{**settings, **changes})


def shaken(module: DenseEncoder) -> dict:
    """Parameters away from the zeros that biases start at."""
    start = jax.jit(module.init)(jax.random.key(0), {"features": FEATURES})["params"]
    moved = jax.tree.map(
        lambda p: np.asarray(p) + 0.1 * RANDOM.standard_normal(p.shape, np.float32),
        start,
    )
    kept = {k: np.asarray(v) for k, v in start.items() if k.startswith("feature_")}
    return {**moved, **kept}


def encode(module: DenseEncoder, params: dict, features=FEATURES, rows=None):
    """Memory [B, d] and valid [B, 1]; dropout where there are rows."""

    @jax.jit
    def apply(params, features, rows):
        return module.apply(
            {"params": params},
            {"features": features},
            rows,
            rngs={"dropout": jax.random.key(3)},
        )

    memory, valid = apply(params, features, rows)
    assert memory.shape == (len(features), 1, WIDTH)
    return np.asarray(memory)[:, 0], np.asarray(valid)


@pytest.mark.parametrize("layers", [0, 2])
def test_encoder_is_the_formula(layers):
    module = encoder(num_layers=layers, dropout=0.5)
    params = shaken(module)
    memory, valid = encode(module, params)
    z = (np.float64(FEATURES) - MEAN) / SCALE
    for name in ["layer_0", "layer_1"][:layers]:
        z = np.maximum(z @ params[name]["kernel"] + params[name]["bias"], 0)
    z = z @ params["map"]["kernel"] + params["map"]["bias"]
    assert set(params) == {
        *("feature_mean", "feature_scale", "map"),
        *["layer_0", "layer_1"][:layers],
    }
    assert valid.shape == (6, 1) and valid.dtype == bool and valid.all()
    np.testing.assert_allclose(memory, z, rtol=1e-4, atol=1e-5)


def test_mean_and_scale_are_constants_of_the_checkpoint():
    module = encoder()
    params = shaken(module)
    np.testing.assert_array_equal(params["feature_mean"], MEAN)
    np.testing.assert_array_equal(params["feature_scale"], SCALE)
    assert {"feature_mean", "feature_scale"} <= set(models.CONSTANT)

    def loss(params):
        memory, _ = module.apply({"params": params}, {"features": FEATURES})
        return jnp.sum(memory**2)

    for name, gradient in jax.jit(jax.grad(loss))(params).items():
        for leaf in jax.tree.leaves(gradient):
            assert bool((leaf != 0).any()) != name.startswith("feature_"), name
    # Prediction knows the shapes alone; the numbers come from the checkpoint.
    other = encoder(mean=np.zeros(F, np.float32), scale=np.ones(F, np.float32))
    expected, found = encode(module, params), encode(other, params)
    np.testing.assert_array_equal(found[0], expected[0])


def test_dropout_belongs_to_the_row_and_to_training():
    module = encoder(dropout=0.5)
    params = shaken(module)
    rows = np.arange(6, dtype=np.uint32)
    dropped, _ = encode(module, params, rows=rows)
    order = np.array([4, 2, 0, 1, 5, 3])
    found, _ = encode(module, params, FEATURES[order], rows[order])
    np.testing.assert_allclose(found, dropped[order], rtol=1e-4, atol=1e-5)
    other, _ = encode(module, params, rows=rows[::-1])
    assert not np.allclose(other, dropped, atol=1e-3)
    evaluated, _ = encode(module, params)
    assert not np.allclose(evaluated, dropped, atol=1e-3)
    without, _ = encode(encoder(), params, rows=rows)
    np.testing.assert_allclose(without, evaluated, rtol=1e-4, atol=1e-5)
