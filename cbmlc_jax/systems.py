"""What every model looks like to the rest: parameters and `scores(params, inputs)`.

`Neural` is trained by gradient (train.py), `Fitted` in one call (fit.py); evaluation,
checkpoints and prediction do not know which of the two they hold.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from cbmlc_jax import models, rngs
from cbmlc_jax.data import pipeline
from cbmlc_jax.models import baselines
from cbmlc_jax.parallel import Devices

Scores = Float[np.ndarray, "rows labels"]
Decoded = Bool[np.ndarray, "rows labels"] | None


class Neural:
    """A linen module on its devices, scored in batches of few static shapes.

    Args:
        config: validated.
        meta: what the model has to know of the data.
        widths: bucket widths.
        graph: [L, L] label graph or None.

    Raises:
        DeviceError: the devices do not divide the batch.
    """

    def __init__(self, config, meta: models.Meta, widths: list[int], graph):
        limit = config.train.num_devices
        self.train_devices = Devices.local(config.train.batch_size, limit)
        self._devices = Devices.local(config.eval.batch_size, limit)
        self._batch_size, self._widths = config.eval.batch_size, widths
        self._graph, self._seed = graph, config.seed
        self._num_labels = len(meta.label_vectors)
        self.model = models.create_model(config, meta)

        def step(params, batch, graph):
            outputs = self.model.apply({"params": params}, batch["tokens"], graph)
            return jax.nn.sigmoid(outputs.logits), outputs.decoded

        self._step = self._devices.compile(step)

    def init(self) -> PyTree:
        """Initial parameters."""
        return init_params(self.model, self._seed, self._num_labels)

    @property
    def like(self) -> PyTree:
        """Shapes and types of the parameters."""
        return jax.eval_shape(self.init)

    def scores(self, params: PyTree, inputs: pipeline.Ragged) -> Scores:
        """float32 [N, L] probabilities, in the order of `inputs`."""
        return self.predict(params, inputs)[0]

    def predict(
        self, params: PyTree, inputs: pipeline.Ragged
    ) -> tuple[
        Float[np.ndarray, "rows labels"], Bool[np.ndarray, "rows labels"] | None
    ]:
        """Scores, and the labels that the model itself decodes, if it does."""
        params = self._devices.replicate(params)
        plan = pipeline.plan_batches(inputs.lengths, self._batch_size, self._widths)
        results: list[np.ndarray | None] = [None, None]
        batches = pipeline.batches(inputs, None, plan)
        for rows, batch in zip(plan.rows, batches, strict=True):
            out = self._step(params, self._devices.shard(batch), self._graph)
            for i, array in enumerate(out):
                if array is None:
                    continue
                values = self._devices.gather(array)
                if results[i] is None:
                    results[i] = np.empty((len(inputs), values.shape[1]), values.dtype)
                results[i][rows[rows >= 0]] = values[rows >= 0]
        if results[0] is None:
            return np.empty((0, 0), np.float32), None
        return results[0].astype(np.float32), results[1]


def init_params(model: nn.Module, seed: int, num_labels: int = 1) -> PyTree:
    """Initial parameters: one compiled program, its stream named "params"."""
    # As in training, so that what reads the labels is there; no draw but that of
    # "params" reaches the parameters.
    keys = {n: rngs.stream(seed, n) for n in ("params", "dropout", "sample")}
    batch = {
        "tokens": jnp.ones((1, 8), jnp.int32),
        "rows": jnp.zeros(1, jnp.uint32),
        "labels": jnp.ones((1, num_labels), jnp.uint8),
    }
    return jax.jit(model.init)(keys, **batch)["params"]


class Fitted:
    """An estimator, or several that validation chooses from.

    Args:
        config: validated.
        meta: what the model has to know of the data.

    Attributes:
        candidates: (settings, estimator); they differ in how they fit, not in scores.
        like: None, the shapes of its parameters are the data's.
    """

    like = None

    def __init__(self, config, meta: models.Meta):
        self.candidates = baselines.candidates(config)
        self._num_features = meta.num_features
        self._decodes = config.model.name in baselines.DECIDES_AT_HALF

    def inputs(self, inputs: pipeline.Ragged):
        """As the estimators read them."""
        return inputs.csr(self._num_features)

    def scores(self, params: PyTree, inputs: pipeline.Ragged) -> Scores:
        """float32 [N, L], in the order of `inputs`."""
        return self.candidates[0][1].scores(params, self.inputs(inputs))

    def predict(
        self, params: PyTree, inputs: pipeline.Ragged
    ) -> tuple[
        Float[np.ndarray, "rows labels"], Bool[np.ndarray, "rows labels"] | None
    ]:
        """Scores, and the labels that the model itself decodes, if it does."""
        scores = self.scores(params, inputs)
        return scores, scores > 0.5 if self._decodes else None


def create(config, meta: models.Meta, widths: list[int], graph) -> Neural | Fitted:
    """The system that config.model names."""
    if config.model.name in models.MODELS:
        return Neural(config, meta, widths, graph)
    return Fitted(config, meta)


def num_params(params: PyTree) -> int:
    """Number of numbers in a tree of parameters."""
    return sum(int(np.size(x)) for x in jax.tree.leaves(params))
