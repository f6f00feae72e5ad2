"""The result row and its report for eyes."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy as np

import cbmlc_jax
from cbmlc_jax import config as config_lib
from cbmlc_jax import metrics, thresholds
from cbmlc_jax.task import Task, split_from

# Fields of a row that say how it was made, not what was found.
PROVENANCE = ("seconds", "versions", "command")


def versions() -> dict[str, str]:
    """Versions that a number depends on."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    # Of the code that runs, which need not be installed.
    found = {"cbmlc_jax": cbmlc_jax.__version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": platform.python_version()}


def make_row(
    config,
    task: Task,
    parts: dict,
    *,
    details: dict[str, str],
    selection: dict,
    epoch: int,
    params: int,
    seconds: dict[str, float],
    command: str,
    device: str,
) -> dict:
    """The result row, the same for every model; see docs/report.md for its fields."""
    return {
        "dataset": task.dataset.name,
        "fingerprint": task.dataset.fingerprint,
        "model": config.model.name,
        "preset": config.preset,
        "config": config_lib.delta(config),
        "seed": config.seed,
        "noise": {
            "kind": config.noise.kind,
            "rate": config_lib.noise_rate(config),
            "seed": config.noise.seed,
            "realised": task.realised["train"].summary(),
            "realised_validation": task.realised["validation"].summary(),
            **_repaired(task),
        },
        **parts,
        "rates": {
            "source": task.rates.source,
            "r0": task.rates.r0,
            "r1": task.rates.r1,
            "doubt": task.rates.doubt,
            "partial": task.rates.partial,
        },
        "embeddings": task.embeddings,
        "details": details,
        "selection": selection,
        "epoch": epoch,
        "rows": {
            "train": len(task.train),
            "validation": len(task.validation),
            "test": len(task.test),
        },
        "split": split_from(config, task.dataset),
        "params": params,
        "seconds": seconds,
        "versions": versions() | {"device": device},
        "command": command,
    }


def _repaired(task: Task) -> dict:
    if task.repaired is None:
        return {}
    return {"repaired": task.repaired.summary(task.noisy)}


def report(
    row: dict, test_scores: np.ndarray | None, task: Task, warnings: list[str] = ()
) -> str:
    """A result row as text: noise, protocols, ranking, worst and best ten labels."""
    noise, selection = row["noise"], row["selection"]
    lines = [
        f"{row['model']} on {row['dataset']}, seed {row['seed']}"
        + (f", preset {row['preset']}" if row["preset"] else ""),
        f"rows: {row['rows']['train']} train, {row['rows']['validation']} validation, "
        f"{row['rows']['test']} test; {row['params']:,} parameters",
        f"test rows {row['split']['test']}, validation {row['split']['validation']}",
        (_pairs(selection["settings"]) or f"epoch {row['epoch']}")
        + ", "
        + (
            f"chosen by {selection['rule']} {selection['metric']} = "
            f"{selection['score']:.4f}"
            if selection["score"] is not None
            else "the last one"
        ),
        "",
        f"noise: {noise['kind']}"
        + (f", nominal rate {noise['rate']:g}" if noise["rate"] else "")
        + f", seed {noise['seed']}",
    ]
    for name, key in (("train", "realised"), ("validation", "realised_validation")):
        r = noise[key]
        lines.append(
            f"  realised on {name:<10}  P(0->1) {r['p01']:.4f}   P(1->0) "
            f"{r['p10']:.4f}   entries {r['entries']:.2%}   rows {r['instances']:.1%}"
        )
    if fixed := noise.get("repaired"):
        lines.append(
            f"  trained on repaired labels ({fixed['how']}): {fixed['entries']} "
            "entries of all training rows differ"
        )
    if row["rates"]["source"] != "known":
        source, r0, r1 = (row["rates"][key] for key in ("source", "r0", "r1"))
        lines.append(f"  {source:<21}P(0->1) {r0:.4f}   P(1->0) {r1:.4f}")
    if row["embeddings"]:
        found = row["embeddings"]["coverage"]
        lines.append(
            f"word vectors: {row['embeddings']['source']}, "
            f"{row['embeddings']['dim']}-d; labels found whole {found['whole']}, "
            f"in part {found['partial']}, not at all {found['none']}"
        )
    if test_scores is not None:
        lines += _on_test(row, test_scores, task)
    lines += [f"warning: {w}" for w in warnings]
    return "\n".join(lines) + "\n"


def _on_test(row: dict, test_scores: np.ndarray, task: Task) -> list[str]:
    """The lines of protocols, ranking and labels."""
    lines = [
        "",
        f"{'threshold by':<16}"
        + "".join(f"{n:>8} {'at':>5}" for n in metrics.F1_NAMES),
    ]
    for protocol in thresholds.PROTOCOLS:
        lines.append(
            f"  {protocol:<14}"
            + "".join(
                f"{row['metrics'][protocol][n]:>8.4f} "
                f"{row['thresholds'][protocol][n]:>5.2f}"
                for n in metrics.F1_NAMES
            )
            + ("   (looks at the test labels)" if protocol == "oracle" else "")
        )
    expected = row["expected_f1_metrics"][row["selection"]["thresholds"]]
    lines += [
        f"  by the expected F1 of {of:<8} {_f1s(expected[key])}"
        for of, key in (("a row:", "per_row"), ("a label:", "per_label"))
    ]
    if "decoded_metrics" in row:
        lines.append(f"  the model's own rule: {_f1s(row['decoded_metrics'])}")
    return [
        *lines,
        "",
        "  ".join(f"{k} {v:.4f}" for k, v in row["ranking"].items()),
        "",
        *_labels(row, test_scores, task),
    ]


def _pairs(settings: dict) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in settings.items())


def _f1s(values: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.4f}" for k, v in values.items())


def _labels(row: dict, test_scores: np.ndarray, task: Task, shown: int = 10):
    """The worst and best labels at the honest threshold for maF1."""
    protocol = row["selection"]["thresholds"]
    threshold = row["thresholds"][protocol]["maF1"]
    counts = metrics.count(thresholds.apply(test_scores, threshold), task.test.labels)
    table = metrics.per_label(counts)
    order = np.argsort(table["f1"], kind="stable")
    order = order[table["support"][order] > 0]
    header = f"{'F1':>7}{'precision':>11}{'recall':>8}{'support':>9}  label"
    for title, some in (("worst", order[:shown]), ("best", order[::-1][:shown])):
        yield f"{title} {len(some)} labels on test, threshold {threshold} ({protocol})"
        yield header
        for i in some:
            yield (
                f"{table['f1'][i]:>7.3f}{table['precision'][i]:>11.3f}"
                f"{table['recall'][i]:>8.3f}{table['support'][i]:>9d}  "
                f"{task.dataset.label_names[i]}"
            )
        yield ""
