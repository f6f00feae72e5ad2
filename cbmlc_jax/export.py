"""A run's model as an artefact that jax and numpy alone can serve: `--mode=export`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float

import cbmlc_jax
from cbmlc_jax import artefact, files, models, predict, results, rules
from cbmlc_jax.decision import Decision
from cbmlc_jax.models import ops
from cbmlc_jax.models.baselines import kernel_ridge, lr_knn

PLATFORMS = ("cpu", "cuda", "tpu")
_EXACT = jax.lax.Precision.HIGHEST
Weights = dict[str, Array]


class ExportError(ValueError):
    """A run that cannot be exported; the message says why."""


def export_run(workdir: str, target: str | None, rule: rules.Rule = rules.RUNS) -> None:
    """Writes the artefact of a finished run to the new folder `target`.

    Raises:
        ExportError: target exists, or the model has no exported form.
        RunError, RuleError, CheckpointError: see there.
    """
    if not target:
        raise ExportError("--mode=export needs --output, a new folder")
    if os.path.exists(target):
        raise ExportError(f"{target} exists: choose another --output")
    predictor = predict.Predictor(workdir)
    decision = predict.choose(workdir, rule)
    rows = files.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if not rows:
        raise ExportError(f"{workdir} has no finished run: let it finish")
    card = card_of(rows[-1], decision.chosen)
    write(target, predictor, decision, card, markdown(card))


def write(
    target: str,
    predictor: predict.Predictor,
    decision: Decision,
    card: dict,
    text: str,
) -> None:
    """Writes the folder of an artefact.

    Args:
        target: new folder.
        predictor: the model and what it knows of its data.
        decision: which labels are said.
        card, text: the model card, as JSON and for eyes.

    Raises:
        ExportError: see `exported`.
    """
    weights, program = exported(predictor)
    names = {"labels": predictor.label_names, "features": predictor.feature_names}
    content = {
        "model.stablehlo": bytes(program.serialize()),
        "weights.npz": _packed(weights),
        "vocabulary.json": _json(names),
        "decision.json": _json(decision.to_json()),
        "card.json": _json(card),
        "MODEL_CARD.md": text.encode(),
    }
    lengths = [-(-w // artefact.LANES) * artefact.LANES for w in predictor.widths]
    manifest = {
        "format": artefact.FORMAT,
        "made_by": f"cbmlc_jax {cbmlc_jax.__version__}",
        "jax": jax.__version__,
        "platforms": list(program.platforms),
        "kind": predictor.kind,
        "widths": sorted(set(lengths)),
        "typical_length": predictor.typical_length,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in content.items()
        },
    }
    _write_folder(target, content | {artefact.MANIFEST: _json(manifest)})
    size = sum(map(len, content.values())) / 1e6
    print(f"{target}: {size:.1f} MB for {', '.join(program.platforms)}")


def exported(predictor: predict.Predictor) -> tuple[Weights, export.Exported]:
    """The weights of a model, and the program (weights, inputs) -> scores [B, L].

    B is any number of rows; the length of token rows is any multiple of
    `artefact.LANES`.

    Raises:
        ExportError: the model has no exported form.
    """
    name, inputs = predictor.config.model.name, predictor.meta.inputs
    if predictor.kind == "images":
        raise ExportError(
            "models of images are not exported: label images with --mode=predict"
        )
    if name in models.MODELS and name != "seq2seq":
        weights, system = _flat(predictor.params), predictor.system

        def score(weights, batch):
            variables = _nested(weights)
            outputs = system.model.apply(variables, batch, system.graph)
            return jax.nn.sigmoid(outputs.logits)
    elif name in ESTIMATORS:
        weights, score = ESTIMATORS[name](predictor)
    else:
        known = sorted(set(models.MODELS) - {"seq2seq"} | set(ESTIMATORS))
        raise ExportError(
            f"{name} is not exported (of rows like these {', '.join(known)} are): use "
            "--mode=predict"
        )
    rows, length = export.symbolic_shape(f"b, {artefact.LANES}*s")
    tokens = ("tokens", "weights")
    like = {
        key: jax.ShapeDtypeStruct(
            (rows, length) if key in tokens else (rows, *shape), t
        )
        for key, (shape, t) in inputs.items()
    }
    # Inputs, weights and scores are float32 all the same.
    wide = jax.enable_x64(name in _IN_FLOAT64)
    with ops.portable(), wide:
        program = export.export(jax.jit(score), platforms=PLATFORMS)(
            jax.eval_shape(lambda: weights), like
        )
    return weights, program


def _flat(tree: dict, prefix: str = "") -> Weights:
    """{"params/decoder/...": array} of a nested dict."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = np.asarray(value)
    return flat


def _nested(flat: Weights) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def _float32(tree: dict) -> Weights:
    """`_flat` with real numbers in float32: jax has no other ones by default."""
    return {
        name: a.astype(np.float32) if a.dtype == np.float64 else a
        for name, a in _flat(tree).items()
    }


def _linear(predictor: predict.Predictor):
    """`LogisticRegression.scores` in jax."""
    size = predictor.meta.num_features

    def score(weights, batch):
        return _regression(weights, _rescaled(weights, batch, size, "scale/"), "")

    return _float32(predictor.params), score


def _label_prior(predictor: predict.Predictor):
    """`LabelPrior.scores` in jax."""

    def score(weights, batch):
        rows = next(iter(batch.values())).shape[0]
        return jnp.broadcast_to(weights["prior"][None], (rows, *weights["prior"].shape))

    return _float32(predictor.params), score


def _lr_knn(predictor: predict.Predictor):
    """`LRkNN.scores` in jax; the stored rows stay sparse."""
    size, estimator = predictor.meta.num_features, predictor.system.candidates[0][1]
    params = predictor.params
    labels, known, worth = lr_knn.voters(
        params["labels"],
        *(params.get(name) for name in ("added", "weights", "ignored")),
    )
    weights = _float32({"linear": params["linear"], "rows": params["rows"]})
    weights = _listed(weights) | {"labels": labels, "worth": worth}
    if known is not None:
        weights["known"] = known
    stored = len(labels)
    neighbours = min(estimator.neighbours, stored)

    def score(weights, batch):
        z = _rescaled(weights, batch, size, "linear/scale/")
        ours = _regression(weights, z, "linear/")
        nearest, chosen = jax.lax.top_k(_cosines(weights, z, stored), neighbours)
        weight = jnp.clip(nearest, 0, 1) ** 2 * weights["worth"][chosen]

        def summed(values):
            values = values[chosen].astype(jnp.float32)
            return jnp.einsum("bk,bkl->bl", weight, values, precision=_EXACT)

        total = weight.sum(1, keepdims=True)
        if "known" in weights:
            total = summed(weights["known"])
        votes = summed(weights["labels"]) / jnp.maximum(total, 1e-12)
        return (1 - estimator.vote) * ours + estimator.vote * jnp.clip(votes, 0, 1)

    return weights, score


def _kernel_ridge(predictor: predict.Predictor):
    """`KernelRidge.scores` in jax, in float64; the stored rows stay sparse."""
    size, estimator = predictor.meta.num_features, predictor.system.candidates[0][1]
    weights = _listed(_float32(predictor.params))
    stored = len(weights["first"])

    def product(a, b):
        return jnp.matmul(a, b, precision=_EXACT)

    def score(weights, batch):
        weights, batch = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a,
            (weights, batch),
        )
        z = _rescaled(weights, batch, size, "scale/")
        cosine = _cosines(weights, z, stored)
        kernel = cosine + kernel_ridge.SQUARE * cosine**2
        scores = weights["mean"][None] + product(kernel, weights["first"])
        if "second" in weights:
            above = jnp.maximum(scores - weights["level"], 0)
            norm = jnp.linalg.norm(above, axis=1, keepdims=True)
            units = above / jnp.where(norm > 0, norm, 1)
            near = product(units, weights["units"].T) ** 2
            kernel += estimator.scores_weight * near
            scores = weights["mean"][None] + product(kernel, weights["second"])
        return jnp.clip(scores, 0, 1).astype(jnp.float32)

    return weights, score


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
        rows = weights["rows/dense"]
        norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / jnp.where(norm > 0, norm, 1)
        return jnp.matmul(z, rows.T, precision=_EXACT)
    terms = z.T[weights["rows/indices"]] * weights["rows/data"][:, None]
    return jax.ops.segment_sum(
        terms, weights["rows/row"], stored, indices_are_sorted=True
    ).T


def _rescaled(
    weights: Weights, batch: dict[str, Array], size: int, prefix: str
) -> Float[Array, "batch features"]:
    """`logistic_regression.rescale` of a batch: tf-idf of length 1, or standardised."""
    if "features" in batch:
        mean, deviation = weights[f"{prefix}mean"], weights[f"{prefix}deviation"]
        return (batch["features"] - mean[None]) / deviation[None]
    tokens = batch["tokens"]
    given = batch.get("weights", jnp.ones(tokens.shape, jnp.float32))

    def counts(tokens, given):  # id 0, the padding, falls off
        return jnp.zeros(size + 1, given.dtype).at[tokens].add(given)[1:]

    z = jax.vmap(counts)(tokens, given) * weights[f"{prefix}idf"][None]
    norm = jnp.linalg.norm(z, axis=1, keepdims=True)
    return z / jnp.where(norm > 0, norm, 1)


def _regression(weights: Weights, z: Array, prefix: str) -> Array:
    logits = jnp.matmul(z, weights[f"{prefix}weights"], precision=_EXACT)
    return jax.nn.sigmoid(logits + weights[f"{prefix}bias"][None])


ESTIMATORS = {
    "kernel_ridge": _kernel_ridge,
    "label_prior": _label_prior,
    "logistic_regression": _linear,
    "lr_knn": _lr_knn,
}

_IN_FLOAT64 = ("kernel_ridge",)

LIMITS = (
    "Thresholds and probabilities hold for rows drawn as the training rows were.",
    "corrected_val and corrected precision assume noise rates that do not depend on "
    "the row; under single-positive labels, or where a last positive was restored, "
    "they come out too high.",
    "F1s are against the test labels as they are: for a user's own data these are as "
    "noisy as the others.",
    "Words or features that training did not see are left out or unknown.",
)


def card_of(row: dict, chosen: dict) -> dict:
    """What has to be known of a model, as JSON.

    Args:
        row: result row of its run.
        chosen: how its labels are chosen.
    """
    kept = ("dataset", "fingerprint", "model", "preset", "config", "seed", "rows")
    kept += ("split", "noise", "rates", "metrics", "thresholds", "ranking")
    kept += ("embeddings", "selection", "epoch", "params", "command")
    return {key: row[key] for key in kept} | {
        "decision": chosen,
        "versions": {"training": row["versions"], "export": results.versions()},
        "limits": list(LIMITS),
    }


def markdown(card: dict) -> str:
    """The model card for eyes."""
    noise, rates, rows = card["noise"], card["rates"], card["rows"]
    lines = [
        f"# {card['model']} on {card['dataset']}",
        "",
        f"* data: {card['dataset']}, sha256 `{card['fingerprint']}`; {rows['train']} "
        f"rows for training, {rows['validation']} for validation "
        f"({card['split']['validation']}), {rows['test']} for test "
        f"({card['split']['test']})",
        f"* noise: {noise['kind']}; realised P(0->1) {noise['realised']['p01']:.4f}, "
        f"P(1->0) {noise['realised']['p10']:.4f}; rates used: {rates['r0']:.4f}, "
        f"{rates['r1']:.4f} ({rates['source']})"
        + (f", doubtful: {rates['doubt']}" if rates.get("doubt") else ""),
        f"* parameters: {card['params']:,}; chosen: epoch {card['epoch']} by "
        f"{card['selection']['rule']}",
        "* labels are said by "
        + ", ".join(f"{k} {v}" for k, v in card["decision"].items()),
        f"* made by `{card['command']}`",
        "",
        "| on test, threshold by | ebF1 | miF1 | maF1 |",
        "| --- | --- | --- | --- |",
    ]
    for protocol, f1s in card["metrics"].items():
        shown = " | ".join(f"{f1s[n]:.4f}" for n in ("ebF1", "miF1", "maF1"))
        lines.append(f"| {protocol} | {shown} |")
    lines += [
        "",
        ", ".join(f"{name} {value:.4f}" for name, value in card["ranking"].items())
        + ". `oracle` looks at the test labels.",
        "",
        "## Limits",
        "",
        *(f"* {limit}" for limit in card["limits"]),
        "",
        "## Versions",
        "",
    ]
    for when, versions in card["versions"].items():
        lines.append(f"* {when}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    return "\n".join(lines) + "\n"


def _packed(arrays: Weights) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _write_folder(target: str, content: dict[str, bytes]) -> None:
    parent = os.path.dirname(os.path.abspath(target))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=parent, prefix=".writing-")
    try:
        for name, data in content.items():
            files.write_atomic(os.path.join(temporary, name), data)
        os.chmod(temporary, 0o755)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
