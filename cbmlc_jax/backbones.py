"""Image networks with given weights: put into a model, or run once over a data set."""

from __future__ import annotations

import hashlib
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cbmlc_jax import files, models, weights
from cbmlc_jax.data import pipeline
from cbmlc_jax.models import pretrained
from cbmlc_jax.parallel import Devices

LARGEST = 8 << 30  # bytes of cached features
RANDOM = "random"  # config.model.encoder.weights: not trained before
_VERSION = 1  # of what the cache holds: part of its key


def weights_path(settings) -> str:
    """The file that config.model.encoder.weights means: a path, or "package".

    Raises:
        WeightsError: the package is not installed, or there is no such file.
    """
    if settings.weights == "package":
        return weights.package_path(settings.name)
    if not os.path.isfile(settings.weights):
        raise weights.WeightsError(
            f"config.model.encoder.weights: there is no file {settings.weights}"
        )
    return settings.weights


def _loaded(variables: PyTree, settings) -> PyTree:
    """The network's variables with the numbers of the weights file in them."""
    path = weights_path(settings)
    try:
        return pretrained.fit_into(variables, pretrained.from_torch(weights.read(path)))
    except ValueError as error:
        raise weights.WeightsError(f"{path}: {error}") from error


def into(variables: PyTree, settings) -> PyTree:
    """A model's variables with the weights of config.model.encoder in its network.

    Raises:
        WeightsError: they are missing, damaged or of another network.
    """
    own = {k: v.get("encoder", {}).get("backbone") for k, v in variables.items()}
    if not any(own.values()):
        return variables  # all of the network was computed beforehand
    loaded = _loaded(own, settings)
    return {
        k: v | {"encoder": v["encoder"] | {"backbone": loaded[k]}}
        for k, v in variables.items()
    }


def features(
    images: pipeline.Inputs,
    settings,
    *,
    side: int,
    stages: int,
    seed: int,
    batch_size: int,
    workers: int,
    cache_dir: str | None,
) -> pipeline.Dense:
    """What the first `stages` stages of a network make of each image, computed once.

    Images are seen as in evaluation.  The result is kept in `cache_dir` under the
    sha256 of the images' content, the weights and all that matters besides.

    Args:
        images: N images.
        settings: config.model.encoder.
        side: of the square that images are resized to, for the key alone.
        stages: of the network; with all of them the features are its pooled output.
        seed: of the weights where no file is given.
        batch_size: images at once.
        workers: processes that decode.
        cache_dir: is made when needed; None: nothing is kept.

    Raises:
        WeightsError: as `into`.
        DataError: an image cannot be read, or the features would be too large to keep.
    """
    network = models.create_backbone(settings)
    stages = min(stages, network.num_stages)
    if cache_dir is None:
        values = _compute(network, images, settings, stages, seed, batch_size, workers)
        return pipeline.Dense(values)
    digest = hashlib.sha256()
    for part in images.content():
        digest.update(part)
    given = f"random {seed}"
    if settings.weights != RANDOM:
        given = weights.sha256(weights_path(settings))
    key = {"version": _VERSION, "network": settings.name, "stages": stages}
    key |= {"side": side, "weights": given, "images": digest.hexdigest()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = os.path.join(cache_dir, f"features-{name[:32]}.npy")
    if os.path.exists(path):
        try:
            return pipeline.Dense(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise pipeline.DataError(
                f"{path} is damaged ({error}): delete it and run again"
            ) from error
    print(f"computing the features of {len(images)} images, once", flush=True)
    values = _compute(network, images, settings, stages, seed, batch_size, workers)
    os.makedirs(cache_dir, exist_ok=True)
    files.write_array(path, values)
    return pipeline.Dense(values)


def frozen(settings, stages: int, seed: int) -> tuple[nn.Module, PyTree, int]:
    """The network that `features` runs, its variables and the number of its stages.

    Args:
        settings: config.model.encoder.
        stages: of the network; its variables are those of no others.
        seed: of the weights where no file is given.

    Raises:
        WeightsError: as `into`.
    """
    network = models.create_backbone(settings)
    stages = min(stages, network.num_stages)
    example = jnp.zeros((1, 32, 32, 3), jnp.uint8)  # no shape depends on the side
    variables = _variables(network, settings, seed, example)
    names = [name for names, _ in network.stages()[:stages] for name in names]
    kept = {
        kind: {name: tree[name] for name in names if name in tree}
        for kind, tree in variables.items()
    }
    return network, kept, stages


def _variables(network, settings, seed: int, example) -> PyTree:
    variables = jax.jit(network.init)(jax.random.key(seed), example)
    if settings.weights != RANDOM:
        variables = _loaded(variables, settings)
    return variables


def _compute(network, images, settings, stages, seed, batch_size, workers):
    plan = pipeline.plan_batches(images.lengths, batch_size, [8])
    source = pipeline.Batches(images, plan, None)
    example = jnp.asarray(images.batch(np.zeros(1, int), 8)["images"])
    variables = _variables(network, settings, seed, example)
    devices = Devices.local(batch_size)

    def step(variables, batch, _):
        return network.apply(variables, batch["images"], stop=stages)

    step = devices.compile(step)
    variables, values = devices.replicate(variables), None
    for rows, batch in zip(
        plan.rows, pipeline.stream(source, workers=workers), strict=True
    ):
        batch = {"images": batch["images"]}
        out = devices.gather(step(variables, devices.shard(batch), None))
        if values is None:
            shape = (len(images), *out.shape[1:])
            if np.prod(shape) * 4 > LARGEST:
                raise pipeline.DataError(
                    f"the features of {len(images)} images after {stages} stages take "
                    f"{int(np.prod(shape)) * 4 >> 30} GB: freeze more stages, or set "
                    "config.model.encoder.cache_features=False"
                )
            values = np.empty(shape, np.float32)
        values[rows[rows >= 0]] = out[rows >= 0]
    return values
