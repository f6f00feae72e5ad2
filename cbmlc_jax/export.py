"""A run's model as an artefact that jax and numpy alone can serve: `--mode=export`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile

import jax
import numpy as np
from jax import export

import cbmlc_jax
from cbmlc_jax import (
    artefact,
    backbones,
    files,
    predict,
    programs,
    results,
    rules,
    task,
)
from cbmlc_jax.decision import Decision
from cbmlc_jax.programs import ExportError


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
        **({"side": predictor.config.data.side} if predictor.kind == "images" else {}),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in content.items()
        },
    }
    _write_folder(target, content | {artefact.MANIFEST: _json(manifest)})
    size = sum(map(len, content.values())) / 1e6
    print(f"{target}: {size:.1f} MB for {', '.join(program.platforms)}")


def exported(predictor: predict.Predictor) -> tuple[programs.Weights, export.Exported]:
    """The weights of a model, and the program (weights, inputs) -> scores [B, L].

    A model of cached features is exported with the frozen network before it.

    Raises:
        ExportError: the model has no exported form.
        WeightsError: those of the frozen network are missing or damaged.
    """
    config, meta = predictor.config, predictor.meta
    program = programs.of(config.model.name, predictor.system, predictor.params, meta)
    inputs = meta.inputs
    if predictor.kind == "images" and "images" not in inputs:
        stages = task.frozen_stages(config)
        frozen = backbones.frozen(config.model.encoder, stages, config.seed)
        program = programs.behind(*frozen, program, inputs)
        side = config.data.side
        inputs = {"images": ((side, side, 3), "uint8")}
    return program.weights, programs.lowered(program, inputs)


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


def _packed(arrays: programs.Weights) -> bytes:
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
