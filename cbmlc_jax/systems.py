"""What every model looks like to the rest: `scores(variables, inputs)`.

The variables of a model are all that it learnt, a tree of arrays.

`Neural` is trained by gradient (train.py), `Fitted` in one call (fit.py), `Mixture` and
`Stack` are made of others; evaluation, checkpoints and prediction do not know which
they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from cbmlc_jax import backbones, mixture, models, rngs
from cbmlc_jax import config as config_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.decision import Calibration
from cbmlc_jax.models import baselines, neighbours
from cbmlc_jax.parallel import Devices

Scores = Float[np.ndarray, "rows labels"]
# Label nodes that are computed at once: 51 rows of 159 labels, 8 of 983.  Of each, some
# 40 vectors of the model's width wait for the backward pass.
LABEL_NODES = 2**13
Decoded = Bool[np.ndarray, "rows labels"] | None


class Neural:
    """A linen module on its devices, scored in batches of few static shapes.

    Args:
        config: validated.
        meta: what the model has to know of the data.
        widths: bucket widths.
        graph: [L, L] label graph or None.

    Attributes:
        graph: as the model is given it.

    Raises:
        DeviceError: the devices do not divide the batch.
    """

    def __init__(self, config, meta: models.Meta, widths: list[int], graph):
        limit, precision = config.train.num_devices, config.train.matmul_precision
        batch_size = config.train.batch_size
        self.train_devices = Devices.everywhere(batch_size, limit, precision)
        self._devices = Devices.local(config.eval.batch_size, limit, precision)
        self._batch_size, self._widths = config.eval.batch_size, widths
        self._workers = config.data.workers
        self._seed, self._meta = config.seed, meta
        self.graph = neighbours.as_argument(graph)
        self._encoder = config.model.encoder
        self.model = models.create_model(config, meta)
        self._init = jax.jit(self.model.init)  # traced once for `init` and `like`

        def step(variables, batch, graph):
            def score(inputs):
                outputs = self.model.apply(variables, inputs, graph)
                return jax.nn.sigmoid(outputs.logits), outputs.decoded

            inputs = model_inputs(batch)
            rows = len(next(iter(inputs.values())))
            parts = num_parts(config.model.name, rows, len(meta.label_vectors))
            if parts == 1:
                return score(inputs)
            scored = jax.lax.map(score, cut(inputs, parts))
            return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), scored)

        self._step = self._devices.compile(step)

    def share(self, other: Neural) -> None:
        """Scores with the compiled program of `other`, which differs in its seed."""
        self._step = other._step

    def init(self) -> PyTree:
        """Initial variables: random, but for an image network with given weights.

        Raises:
            WeightsError: the weights are missing, damaged or of another network.
        """
        keys, batch = _init_arguments(self._seed, self._meta)
        variables = self._init(keys, **batch)
        network, given = self._encoder.name, self._encoder.weights
        if network in models.BACKBONES and given != backbones.RANDOM:
            variables = backbones.into(variables, self._encoder)
        return variables

    @property
    def like(self) -> PyTree:
        """Shapes and types of the variables."""
        keys, batch = _init_arguments(self._seed, self._meta)
        return self._init.eval_shape(keys, **batch)

    def scores(self, variables: PyTree, inputs: pipeline.Inputs) -> Scores:
        """float32 [N, L] probabilities, in the order of `inputs`."""
        return self.predict(variables, inputs)[0]

    def predict(
        self, variables: PyTree, inputs: pipeline.Inputs
    ) -> tuple[Scores, Decoded]:
        """Scores, and the labels that the model itself decodes, if it does."""
        variables = self._devices.replicate(variables)
        plan = pipeline.plan_batches(inputs.lengths, self._batch_size, self._widths)
        results: list[np.ndarray | None] = [None, None]
        source = pipeline.Batches(inputs, plan, None)
        batches = pipeline.stream(source, workers=self._workers)
        for rows, batch in zip(plan.rows, batches, strict=True):
            out = self._step(variables, self._devices.shard(batch), self.graph)
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


def num_parts(name: str, rows: int, labels: int) -> int:
    """In how many parts a model computes the rows of a batch, so that they fit.

    The least that divides them and leaves LABEL_NODES nodes, or two rows (one, where
    their number is odd).  Models without a node for every label of a row do not need
    it.
    """
    if name not in models.LABEL_NODES:
        return 1
    fewest = 2 if rows % 2 == 0 else 1
    most = min(max(LABEL_NODES // labels, fewest), rows)
    return rows // max(r for r in range(1, most + 1) if rows % r == 0)


def cut(batch: PyTree, parts: int) -> PyTree:
    """Arrays [B, ...] -> [parts, B / parts, ...]."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def summed(function: Callable, batch: PyTree, parts: int) -> PyTree:
    """The sum of function(part) over the parts of a batch, one after the other."""
    if parts == 1:
        return function(batch)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, function(part)), None

    cuts = cut(batch, parts)
    like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cuts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(add, zeros, cuts)[0]


def model_inputs(batch: dict) -> dict:
    """The arrays of a batch that a model scores."""
    return {name: batch[name] for name in models.INPUTS if name in batch}


def init_variables(model: nn.Module, seed: int, meta: models.Meta) -> PyTree:
    """{"params": tree, "batch_stats": tree where there are any}, at random.

    One compiled program; its stream is named "params".
    """
    keys, batch = _init_arguments(seed, meta)
    return jax.jit(model.init)(keys, **batch)


def _init_arguments(seed: int, meta: models.Meta) -> tuple[dict, dict]:
    """The keys and the batch of one row that variables are drawn with."""
    # As in training, so that what reads the labels is there; no draw but that of
    # "params" reaches the parameters.
    keys = {n: rngs.stream(seed, n) for n in ("params", "dropout", "sample")}
    batch = {
        "inputs": {
            name: jnp.ones((1, *shape), dtype)
            for name, (shape, dtype) in meta.inputs.items()
        },
        "rows": jnp.zeros(1, jnp.uint32),
        "labels": jnp.ones((1, len(meta.label_vectors)), jnp.uint8),
    }
    return keys, batch


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

    def inputs(self, inputs: pipeline.Inputs):
        """As the estimators read them."""
        return inputs.matrix(self._num_features)

    def scores(self, params: PyTree, inputs: pipeline.Inputs) -> Scores:
        """float32 [N, L], in the order of `inputs`."""
        return self.candidates[0][1].scores(params, self.inputs(inputs))

    def predict(
        self, params: PyTree, inputs: pipeline.Inputs
    ) -> tuple[Scores, Decoded]:
        """Scores, and the labels that the model itself decodes, if it does."""
        scores = self.scores(params, inputs)
        return scores, scores > 0.5 if self._decodes else None


class Mixture:
    """A weighted mean of the scores of other systems.

    Its variables are {"weights": {name: []}, "members": {name: variables}}.

    Args:
        config: validated.
        meta, widths, graph: of each member, see `Neural`.

    Attributes:
        members: name -> system.
        like: None, those of the members are in the file.
    """

    like = None

    def __init__(self, config, meta: models.Meta, widths: list[int], graph):
        self.members = _members(config, meta, widths, graph)

    def scores(self, variables: PyTree, inputs: pipeline.Inputs) -> Scores:
        """float32 [N, L], in the order of `inputs`."""
        weights = {name: float(w) for name, w in variables["weights"].items()}
        count = {name: w for name, w in weights.items() if w}
        scores = [
            self.members[name].scores(variables["members"][name], inputs)
            for name in count
        ]
        return mixture.mixed(scores, list(count.values()))

    def predict(
        self, variables: PyTree, inputs: pipeline.Inputs
    ) -> tuple[Scores, Decoded]:
        """Scores; a mixture decodes nothing itself."""
        return self.scores(variables, inputs), None


class VariablesError(ValueError):
    """Variables of another version; the message says what to do."""


class Stack:
    """Neural models that read the scores of other systems, `models.stack`.

    The members' scores are made probabilities of the clean label first (`calibrated`):
    one that was trained on noisy labels as they are says the noisy one's.  The score is
    the mean of the models that learnt from all folds but one.

    Its variables are {"members": {name: variables}, "calibration": {name: [slope,
    shift]}, "stack": {fold: variables}}.

    Args:
        config: validated.
        meta, widths, graph: of each member, see `Neural`.

    Attributes:
        members: name -> system.
        top: reads their scores.
        like: None, those of the members are in the file.
    """

    like = None

    def __init__(self, config, meta: models.Meta, widths: list[int], graph):
        self.members = _members(config, meta, widths, graph)
        shape = (len(meta.label_vectors), len(self.members))
        meta = dataclasses.replace(meta, inputs={"scores": (shape, "float32")})
        self.top = Neural(config, meta, [1], graph)

    def scores(self, variables: PyTree, inputs: pipeline.Inputs) -> Scores:
        """float32 [N, L], in the order of `inputs`.

        Raises:
            VariablesError: see `check`.
        """
        self.check(variables)
        told = [
            calibrated(
                member.scores(variables["members"][name], inputs),
                variables["calibration"][name],
            )
            for name, member in self.members.items()
        ]
        inputs, tops = scored(inputs, told), variables["stack"].values()
        return np.mean([self.top.scores(top, inputs) for top in tops], axis=0)

    def predict(
        self, variables: PyTree, inputs: pipeline.Inputs
    ) -> tuple[Scores, Decoded]:
        """Scores; a stack decodes nothing itself."""
        return self.scores(variables, inputs), None

    def check(self, variables: PyTree) -> None:
        """Raises VariablesError where the variables are of a version before 0.3.0."""
        if "calibration" not in variables:
            raise VariablesError(
                "this stack was trained by a version before 0.3.0: train it again, in "
                "another --workdir"
            )


def _members(config, meta, widths, graph) -> dict[str, System]:
    """Of a mixture or a stack, by name."""
    return {
        name: create(config_lib.member(config, name), meta, widths, graph)
        for name in config_lib.members(config)
    }


def calibrated(scores: Scores, platt: Float[np.ndarray, " 2"]) -> Scores:
    """float32 sigmoid(slope logit(score) + shift) of platt = [slope, shift]."""
    slope, shift = map(float, platt)
    return Calibration("platt", slope, shift).apply(scores).astype(np.float32)


def scored(inputs: pipeline.Inputs, told: list[Scores]) -> pipeline.Scored:
    """Rows as a stack reads them: [N, L] of each member in the order of the config."""
    return pipeline.Scored(inputs, np.stack(told, axis=-1))


System = Neural | Fitted | Mixture | Stack


def create(config, meta: models.Meta, widths: list[int], graph) -> System:
    """The system that config.model names; of a stack whose rows are scores already,
    the model that reads them."""
    if config.model.name == "stack" and "scores" not in meta.inputs:
        return Stack(config, meta, widths, graph)
    if config.model.name == "mixture":
        return Mixture(config, meta, widths, graph)
    if config.model.name in models.MODELS:
        return Neural(config, meta, widths, graph)
    return Fitted(config, meta)


def num_params(variables: PyTree) -> int:
    """Number of parameters; running statistics are none."""
    params = variables.get("params", variables)
    return sum(int(np.size(x)) for x in jax.tree.leaves(params))
