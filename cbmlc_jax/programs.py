"""Scores as pure functions of jax, one for each model: what `export.py` writes.

A program reads its weights from a flat dict {"path/of/the/array": array}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float

from cbmlc_jax import artefact, models, systems
from cbmlc_jax.models import ops
from cbmlc_jax.models.baselines import kernel_ridge, lr_knn, mlknn, nearest
from cbmlc_jax.models.baselines.kernel_ridge import KernelRidge
from cbmlc_jax.models.baselines.label_prior import LabelPrior
from cbmlc_jax.models.baselines.logistic_regression import LogisticRegression
from cbmlc_jax.models.baselines.lr_knn import LRkNN
from cbmlc_jax.models.baselines.mlknn import MLkNN
from cbmlc_jax.models.baselines.seq2seq import Seq2Seq
from cbmlc_jax.models.baselines.sleec import SLEEC

PLATFORMS = ("cpu", "cuda", "tpu")
_EXACT = jax.lax.Precision.HIGHEST
Weights = dict[str, Array]
# Array of a batch -> (shape of one row, dtype), as `models.Meta.inputs`.
Rows = dict[str, tuple[tuple[int, ...], str]]


class ExportError(ValueError):
    """A run that cannot be exported; the message says why."""


class Program(NamedTuple):
    """A model.

    Attributes:
        weights: its arrays, float32, integers or bool.
        score: (weights, batch) -> float32 [B, L].
        wide: it computes in float64 in between.
    """

    weights: Weights
    score: Callable[[Weights, dict[str, Array]], Float[Array, "batch labels"]]
    wide: bool = False


def of(name: str, system: systems.System, params, meta: models.Meta) -> Program:
    """The program of a trained model.

    Args:
        name: config.model.name, for the message.
        system: what scores it here.
        params: its variables.
        meta: what it knows of the data.

    Raises:
        ExportError: it has no program.
    """
    if isinstance(system, systems.Mixture):
        return _mixture(system, params, meta)
    if isinstance(system, systems.Stack):
        return _stack(system, params, meta)
    if isinstance(system, systems.Fitted):
        estimator = system.candidates[0][1]
        if type(estimator) in ESTIMATORS:
            return ESTIMATORS[type(estimator)](estimator, params, meta)
    elif not isinstance(system.model, Seq2Seq):  # its decoding is no single pass
        return _neural(system, params)
    raise ExportError(f"{name} is not exported: use --mode=predict")


def lowered(program: Program, inputs: Rows) -> export.Exported:
    """The program (weights, inputs) -> scores [B, L] in StableHLO.

    B is any number of rows; the length of token rows is any multiple of
    `artefact.LANES`.
    """
    rows, length = export.symbolic_shape(f"b, {artefact.LANES}*s")
    tokens = ("tokens", "weights")
    like = {
        key: jax.ShapeDtypeStruct(
            (rows, length) if key in tokens else (rows, *shape), t
        )
        for key, (shape, t) in inputs.items()
    }
    # Inputs, weights and scores are float32 all the same.
    with ops.portable(), jax.enable_x64(program.wide):
        return export.export(jax.jit(program.score), platforms=PLATFORMS)(
            jax.eval_shape(lambda: program.weights), like
        )


def behind(network, variables, stages: int, program: Program, inputs: Rows) -> Program:
    """A program of features, behind the image network that makes them.

    Args:
        network: a `models.backbone.Backbone`.
        variables: of its first `stages` stages.
        stages: that are run.
        program: reads `features`.
        inputs: of the program.
    """
    called = lowered(program, inputs).call
    weights = _under("network", flat(variables)) | _under("model", program.weights)

    def score(weights, batch):
        variables = _nested(_inside("network", weights))
        features = network.apply(variables, batch["images"], stop=stages)
        return called(_inside("model", weights), {"features": features})

    return Program(weights, score)


def _mixture(system: systems.Mixture, params, meta: models.Meta) -> Program:
    """`Mixture.scores`; members that do not count are left out."""
    weights, parts = {}, []
    for name, share in params["weights"].items():
        if not float(share):
            continue
        member = of(name, system.members[name], params["members"][name], meta)
        weights |= _under(name, member.weights)
        # Lowered by itself: one computes in float64, another must not.
        parts.append((name, np.float32(share), lowered(member, meta.inputs).call))

    def score(weights, batch):
        return sum(
            share * called(_inside(name, weights), batch)
            for name, share, called in parts
        )

    return Program(weights, score)


def _stack(system: systems.Stack, params, meta: models.Meta) -> Program:
    """`Stack.scores`."""
    system.check(params)
    tops = {f"stack/{k}": _neural(system.top, v) for k, v in params["stack"].items()}
    weights, parts = {}, []
    for name, top in tops.items():
        weights |= _under(name, top.weights)
    for name, member in system.members.items():
        program = of(name, member, params["members"][name], meta)
        weights |= _under(name, program.weights)
        platt = [float(x) for x in params["calibration"][name]]
        parts.append((name, lowered(program, meta.inputs).call, *platt))

    def score(weights, batch):
        told = []
        for name, called, slope, shift in parts:
            s = jnp.clip(called(_inside(name, weights), batch), 1e-7, 1 - 1e-7)
            z = jnp.log(s) - jnp.log1p(-s)  # decision.logit
            told.append(jax.nn.sigmoid(slope * z + shift))
        scores = {"scores": jnp.stack(told, axis=-1)}
        each = [top.score(_inside(name, weights), scores) for name, top in tops.items()]
        return sum(each) / len(each)

    return Program(weights, score)


def _neural(system: systems.Neural, params) -> Program:
    def score(weights, batch):
        outputs = system.model.apply(_nested(weights), batch, system.graph)
        return jax.nn.sigmoid(outputs.logits)

    return Program(flat(params), score)


def flat(tree: dict, prefix: str = "") -> Weights:
    """{"params/decoder/...": array} of a nested dict."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[prefix + key] = np.asarray(value)
    return found


def _nested(weights: Weights) -> dict:
    tree: dict = {}
    for path, value in weights.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def _under(name: str, weights: Weights) -> Weights:
    """The arrays with a name before their own."""
    return {f"{name}/{key}": value for key, value in weights.items()}


def _inside(name: str, weights: Weights) -> Weights:
    """What `_under` put there."""
    first = f"{name}/"
    return {
        key.removeprefix(first): value
        for key, value in weights.items()
        if key.startswith(first)
    }


def _float32(tree: dict) -> Weights:
    """`flat` with real numbers in float32: jax has no other ones by default."""
    return {
        name: a.astype(np.float32) if a.dtype == np.float64 else a
        for name, a in flat(tree).items()
    }


def _linear(estimator, params, meta) -> Program:
    """`LogisticRegression.scores`."""

    def score(weights, batch):
        z = _rescaled(weights, batch, meta.num_features, "scale/")
        return _regression(weights, z, "")

    return Program(_float32(params), score)


def _label_prior(estimator, params, meta) -> Program:
    """`LabelPrior.scores`."""

    def score(weights, batch):
        rows = next(iter(batch.values())).shape[0]
        return jnp.broadcast_to(weights["prior"][None], (rows, *weights["prior"].shape))

    return Program(_float32(params), score)


def _lr_knn(estimator: LRkNN, params, meta) -> Program:
    """`LRkNN.scores`; the stored rows stay sparse."""
    labels, known, worth = lr_knn.voters(
        params["labels"],
        *(params.get(name) for name in ("added", "weights", "ignored")),
    )
    weights = _listed(_float32({k: params[k] for k in ("linear", "rows")}))
    weights |= {"labels": labels, "worth": worth}
    if known is not None:
        weights["known"] = known
    stored = len(labels)
    neighbours = min(estimator.neighbours, stored)

    def score(weights, batch):
        z = _rescaled(weights, batch, meta.num_features, "linear/scale/")
        ours = _regression(weights, z, "linear/")
        cosine = _products(_rows(weights), _float64(_unit(z)), stored)
        cosine, chosen = jax.lax.top_k(cosine.astype(jnp.float32), neighbours)
        weight = jnp.clip(cosine, 0, 1) ** 2 * weights["worth"][chosen]

        def summed(values):
            values = values[chosen].astype(jnp.float32)
            return jnp.einsum("bk,bkl->bl", weight, values, precision=_EXACT)

        total = weight.sum(1, keepdims=True)
        if "known" in weights:
            total = summed(weights["known"])
        votes = summed(weights["labels"]) / jnp.maximum(total, 1e-12)
        return (1 - estimator.vote) * ours + estimator.vote * jnp.clip(votes, 0, 1)

    return Program(weights, score, wide=True)


def _kernel_ridge(estimator: KernelRidge, params, meta) -> Program:
    """`KernelRidge.scores`; the stored rows stay sparse."""
    weights = _listed(_float32(params))
    stored = len(weights["first"])

    def product(a, b):
        return jnp.matmul(a, b, precision=_EXACT)

    def score(weights, batch):
        weights, batch = _float64((weights, batch))
        z = _rescaled(weights, batch, meta.num_features, "scale/")
        cosine = _cosines(weights, z, stored)
        kernel = cosine + kernel_ridge.SQUARE * cosine**2
        scores = weights["mean"][None] + product(kernel, weights["first"])
        if "second" in weights:
            above = jnp.maximum(scores - weights["level"], 0)
            near = product(_unit(above), weights["units"].T) ** 2
            kernel += estimator.scores_weight * near
            scores = weights["mean"][None] + product(kernel, weights["second"])
        return jnp.clip(scores, 0, 1).astype(jnp.float32)

    return Program(weights, score, wide=True)


def _mlknn(estimator: MLkNN, params, meta) -> Program:
    """`MLkNN.scores`; the stored rows stay sparse."""
    labels, posterior = np.asarray(params["labels"]), mlknn.posterior(params)
    weights = _listed(_float32({"rows": params["rows"]}))
    weights |= {"labels": labels, "posterior": posterior}
    if "rows/dense" in weights:
        weights |= _centred(weights["rows/dense"])
    stored, neighbours = len(labels), len(posterior) - 1

    def score(weights, batch):
        z = _matrix(batch, meta.num_features)
        chosen = _closest(weights, z, stored, neighbours)
        counts = _counts(weights["labels"], chosen)
        return jnp.take_along_axis(weights["posterior"], counts, axis=0)

    return Program(weights, score, wide=True)


def _sleec(estimator: SLEEC, params, meta) -> Program:
    """`SLEEC.scores`."""
    labels, weights = np.asarray(params["labels"]), {}
    for learner in range(estimator.learners):
        part = {k: np.asarray(v) for k, v in params[f"learner_{learner}"].items()}
        weights[f"{learner}/centres"] = part["centres"].astype(np.float32)
        for c, projection in enumerate(part["weights"]):
            members = np.flatnonzero(part["cluster"] == c)
            weights |= _under(
                f"{learner}/{c}",
                {"projection": projection, "members": members.astype(np.int32)}
                | _centred(part["embeddings"][members]),
            )
    weights["labels"] = labels

    def votes(weights, assigned, z, learner, c):
        """[B, L] of one cluster, 0 for rows of other ones."""
        ours = _inside(f"{learner}/{c}", weights)
        # Rounded in between, as there.
        queries = (z @ _float64(ours["projection"])).astype(jnp.float32)
        stored = len(ours["members"])
        chosen = _closest(ours, queries, stored, min(estimator.neighbours, stored))
        chosen = ours["members"][chosen]
        # Thresholds are often multiples of 1 / k as the scores are: to the last digit.
        share = _counts(weights["labels"], chosen).astype(z.dtype) / chosen.shape[1]
        return jnp.where((assigned == c)[:, None], share, 0)

    def score(weights, batch):
        z = _unit(_float64(_matrix(batch, meta.num_features)))
        total = 0.0
        for learner in range(estimator.learners):
            centres = _float64(weights[f"{learner}/centres"])
            distance = (centres**2).sum(1)[None] / 2 - z @ centres.T
            assigned = jnp.argmin(distance, axis=1)
            for c in range(len(centres)):
                total += votes(weights, assigned, z, learner, c)
        return (total / estimator.learners).astype(jnp.float32)

    return Program(weights, score, wide=True)


def _centred(rows: Float[np.ndarray, "stored width"]) -> Weights:
    """Dense rows as `nearest.by_distance` compares them."""
    centre = nearest.centre(rows)
    return {"rows/dense": (rows - centre).astype(np.float32), "rows/centre": centre}


def _closest(weights: Weights, z: Array, stored: int, k: int) -> Array:
    """`nearest.by_distance`: numbers of the stored rows [B, k]."""
    rows = _rows(weights)
    if "rows/dense" in rows:
        z -= weights["rows/centre"][None]
        square = (rows["rows/dense"] ** 2).sum(1)
    else:
        square = _by_row(rows, rows["rows/data"] ** 2, stored)
    near = 2 * _products(rows, _float64(z), stored) - square[None]
    return jax.lax.top_k(near.astype(jnp.float32), k)[1]


def _rows(weights: Weights) -> Weights:
    """The stored rows in float64."""
    return _float64({k: v for k, v in weights.items() if k.startswith("rows/")})


def _float64(tree):
    """Real numbers in float64, for programs that are `wide`."""
    return jax.tree.map(
        lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, tree
    )


def _counts(labels: Array, chosen: Array) -> Array:
    """int32 [B, L]: how many of the chosen rows [B, k] have each label."""
    return labels[chosen].sum(1, dtype=jnp.int32)


def _unit(z: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    """Rows of length 1; rows of 0 stay."""
    norm = jnp.linalg.norm(z, axis=1, keepdims=True)
    return z / jnp.where(norm > 0, norm, 1)


def _listed(weights: Weights) -> Weights:
    """Packed sparse rows, with the row of each number in the place of the ends."""
    if "rows/dense" in weights:
        return weights
    weights = dict(weights)
    lengths = np.diff(weights.pop("rows/indptr"))
    weights["rows/row"] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    weights["rows/indices"] = weights["rows/indices"].astype(np.int32)
    del weights["rows/shape"]
    return weights


def _cosines(
    weights: Weights, z: Float[Array, "batch features"], stored: int
) -> Float[Array, "batch stored"]:
    """Cosines of rows with the stored ones, of which sparse ones are of length 1."""
    z /= jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-30)
    if "rows/dense" in weights:
        weights = {"rows/dense": _unit(weights["rows/dense"])}
    return _products(weights, z, stored)


def _products(
    weights: Weights, z: Float[Array, "batch features"], stored: int
) -> Float[Array, "batch stored"]:
    """Inner products of rows with the stored ones."""
    if "rows/dense" in weights:
        return jnp.matmul(z, weights["rows/dense"].T, precision=_EXACT)
    terms = z.T[weights["rows/indices"]] * weights["rows/data"][:, None]
    return _by_row(weights, terms, stored).T


def _by_row(weights: Weights, terms: Array, stored: int) -> Array:
    """Sums [stored, ...] over the numbers of each stored sparse row."""
    rows = weights["rows/row"]
    return jax.ops.segment_sum(terms, rows, stored, indices_are_sorted=True)


def _rescaled(
    weights: Weights, batch: dict[str, Array], size: int, prefix: str
) -> Float[Array, "batch features"]:
    """`logistic_regression.rescale` of a batch: tf-idf of length 1, or standardised."""
    z = _matrix(batch, size)
    if "features" in batch:
        mean, deviation = weights[f"{prefix}mean"], weights[f"{prefix}deviation"]
        return (z - mean[None]) / deviation[None]
    if f"{prefix}idf" in weights:
        return _unit(z * weights[f"{prefix}idf"][None])
    z = jnp.where(z > 1, 1 + jnp.log(jnp.maximum(z, 1)), z)
    return _unit(z * weights[f"{prefix}sublinear_idf"][None])


def _matrix(batch: dict[str, Array], size: int) -> Float[Array, "batch features"]:
    """`Inputs.matrix` of a batch: how much each feature counts in a row."""
    if "features" in batch:
        return batch["features"]
    tokens = batch["tokens"]
    given = batch.get("weights", jnp.ones(tokens.shape, jnp.float32))

    def counts(tokens, given):  # id 0, the padding, falls off
        return jnp.zeros(size + 1, given.dtype).at[tokens].add(given)[1:]

    return jax.vmap(counts)(tokens, given)


def _regression(weights: Weights, z: Array, prefix: str) -> Array:
    logits = jnp.matmul(z, weights[f"{prefix}weights"], precision=_EXACT)
    return jax.nn.sigmoid(logits + weights[f"{prefix}bias"][None])


ESTIMATORS = {
    KernelRidge: _kernel_ridge,
    LRkNN: _lr_knn,
    LabelPrior: _label_prior,
    LogisticRegression: _linear,
    MLkNN: _mlknn,
    SLEEC: _sleec,
}
