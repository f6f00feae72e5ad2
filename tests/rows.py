"""Result rows as runs write them, for the tests of tables, figures and report."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from cbmlc_jax import details, metrics, thresholds
from experiments import records

LABELS = 6


def make(
    model: str = "cbmlc",
    data: str = "bibtex",
    noise: str = "none",
    rate: float = 0.0,
    seed: int = 0,
    score: float = 0.5,
    **config,
) -> dict:
    """A row whose honest miF1 is `score`; keys of the config with `__` for the dot."""
    delta = {"data.name": data, "model.name": model} | (
        {"seed": seed, "noise.seed": seed, "data.split_seed": seed} if seed else {}
    )
    delta |= {key.replace("__", "."): value for key, value in config.items()}
    f1s = {"ebF1": score - 0.1, "miF1": score, "maF1": score / 2}
    realised = {"p01": 0.01, "p10": 0.2, "entries": 0.02, "instances": 0.3}
    return {
        "dataset": data,
        "fingerprint": "f" * 64,
        "model": model,
        "preset": delta.get("preset", ""),
        "config": delta,
        "seed": seed,
        "noise": {
            "kind": noise,
            "rate": rate,
            "seed": seed,
            "realised": realised,
            "realised_validation": realised,
        },
        "metrics": {
            p: {n: v + 0.01 * (p == "oracle") for n, v in f1s.items()}
            for p in thresholds.PROTOCOLS
        },
        "thresholds": {
            p: dict.fromkeys(metrics.F1_NAMES, 0.25) for p in thresholds.PROTOCOLS
        },
        "ranking": {"mAP": 0.4, "P@1": 0.6, "P@3": 0.5, "P@5": 0.4},
        "rates": {"source": "known", "r0": 0.01, "r1": 0.2},
        "embeddings": None,
        "selection": {"rule": "corrected_val", "metric": "miF1", "score": 0.5},
        "epoch": 3,
        "rows": {"train": 80, "validation": 10, "test": 40},
        "params": 1234,
        "seconds": {"train": 10.0, "eval": 1.0},
        "versions": {"jax": "0.10.2", "device": "cpu"},
        "command": f"python -m cbmlc_jax.main --config=configs/{data}.py "
        f"--config.seed={seed} --workdir=runs/x",
    }


def with_predictions(row: dict, quality: float, seed: int = 0) -> dict:
    """Gives the row predictions, the F1s that they have; returns their record.

    `quality` is the share of entries that are predicted as they are.
    """
    labels = (np.random.default_rng(0).random((40, LABELS)) < 0.3).astype(np.uint8)
    right = np.random.default_rng(seed + 1).random(labels.shape) < quality
    scores = np.where(right, labels, 1 - labels).astype(np.float32)
    record = details.predictions(scores, labels, row["thresholds"]["corrected_val"])
    counts = metrics.count(scores > 0.5, labels)
    row["metrics"]["corrected_val"] = metrics.f1_scores(counts)
    row["details"] = row.get("details", {}) | {"predictions": record["sha256"]}
    return record


def with_embeddings(row: dict, seed: int = 7) -> dict:
    """Gives the row label embeddings; returns their record."""
    vectors = np.random.default_rng(seed).normal(size=(LABELS, 3))
    labels = np.random.default_rng(0).random((40, LABELS)) < 0.4
    names = tuple(f"label{i}" for i in range(LABELS))
    record = details.label_embeddings(vectors, names, labels)
    row["details"] = row.get("details", {}) | {"label_embeddings": record["sha256"]}
    return record


def write(folder: pathlib.Path, *lines: dict, name: str = "rows.jsonl") -> str:
    """A file of rows and records; its path."""
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(folder: pathlib.Path, *lines: dict) -> records.Records:
    """Rows and records as the commands read them."""
    return records.read([write(folder, *lines)])
