"""Planted flips, found: precision and average precision of three rankings.

    python -m experiments.label_issues --data=bibtex --cache=runs/issues
    python -m experiments.label_issues --table

A cell is a data set, a kind of noise and a rate.  Its out-of-fold scores are computed
once, kept in `--cache`, and ranked by

    issues     `cbmlc_jax.find_label_issues`, rates estimated
    given      the same, with the rates that the injector realised
    plain      |given label - score|
    cleanlab   find_multilabel_issues_per_class (which find_label_issues asks): what it
               flags first, each part by self-confidence; skipped where not installed

over entries (row, label), and over rows for a change in any label.  A row for each cell
is appended to experiments/label_issues.jsonl; `--table` prints them.  Needs the
package extra `compare` for cleanlab.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import zipfile

import numpy as np

import cbmlc_jax
from cbmlc_jax import config as config_lib
from cbmlc_jax import errors, files, fit, issues, noise, task
from cbmlc_jax.models import baselines

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "label_issues.jsonl")
CELLS = (
    *(("ncar", rate) for rate in (0.01, 0.03, 0.05)),
    *(("nar", rate) for rate in (0.1, 0.3, 0.5)),
    ("single_positive", 0.0),
    ("combined", 0.0),
)
# Model, folds and C of each data set: what is affordable there on two cores.
MODELS = {
    "bibtex": ("lr_knn", 5, 1.0),
    "emotions": ("lr_knn", 5, 0.1),
    "reuters": ("logistic_regression", 3, 1.0),
    "delicious": ("mlknn", 3, 1.0),
}
RANKINGS = ("issues", "given", "plain", "cleanlab")


class CacheError(ValueError):
    """A file of the cache that has to be deleted; the message names it."""


def cell_config(data: str, kind: str, rate: float, seed: int):
    """The config whose scores a cell ranks."""
    path = os.path.join(os.path.dirname(HERE), "configs", f"{data}.py")
    spec = importlib.util.spec_from_file_location("cbmlc_issues_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    name, folds, cost = MODELS[data]
    changes = {
        "model.name": name,
        "train.crossfit": folds,
        "logistic_regression.cost": cost,
        "noise.kind": kind,
        "noise.seed": seed,
    }
    if rate:
        changes["noise.rate"] = rate
    config.update_from_flattened_dict(changes)
    config_lib.settle(config, set(changes))
    return config


def cell(data: str, kind: str, rate: float, seed: int, cache: str) -> dict:
    """Out-of-fold scores, noisy and clean labels [N, L]; computed once.

    Raises:
        CacheError: the file of the cell is damaged.
        DataError: see `task.load`.
    """
    path = os.path.join(cache, f"{data}-{kind}-{rate}-{seed}.npz")
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in ("scores", "noisy", "clean")}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CacheError(f"{path} is damaged ({error}): delete it") from error
    config = cell_config(data, kind, rate, seed)
    dataset = task.load(config)
    noisy = task.noisy_labels(config, dataset)
    rows = dataset.train.inputs.matrix(len(dataset.feature_names))
    [(_, estimator)] = baselines.candidates(config)
    scores = np.empty(noisy.shape, np.float32)
    everything = np.arange(len(scores))
    for held_out in fit.folds(len(scores), config.train.crossfit, 0):
        others = np.setdiff1d(everything, held_out)
        params = estimator.fit(rows[others], noisy[others])
        scores[held_out] = estimator.scores(params, rows[held_out])
    found = {"scores": scores, "noisy": noisy, "clean": dataset.train.labels}
    os.makedirs(cache, exist_ok=True)
    files.write_arrays(path, found)
    return found


def measure(data: str, kind: str, rate: float, seed: int, cache: str) -> dict:
    """A row of the results file."""
    found = cell(data, kind, rate, seed, cache)
    scores, noisy, clean = (found[name] for name in ("scores", "noisy", "clean"))
    wrong, realised = noisy != clean, noise.realised(clean, noisy)
    start = time.perf_counter()
    ours = issues.find_label_issues(noisy, scores)
    seconds = time.perf_counter() - start
    known = issues.find_label_issues(noisy, scores, (realised.p01, realised.p10))
    gap = np.abs(noisy - scores)
    entries = {"issues": ours.wrong, "given": known.wrong, "plain": gap}
    by_row = {name: _any(entries[name]) for name in ("issues", "given")}
    by_row["plain"] = gap.max(1)
    versions = {"cbmlc_jax": cbmlc_jax.__version__, "numpy": np.__version__}
    if importlib.util.find_spec("cleanlab"):
        entries["cleanlab"], by_row["cleanlab"] = _cleanlab(noisy, scores)
        versions["cleanlab"] = importlib.import_module("cleanlab").__version__
    model, folds, cost = MODELS[data]
    changed = wrong.any(1)
    return {
        "dataset": data,
        "kind": kind,
        "rate": rate,
        "seed": seed,
        "scores": {"model": model, "folds": folds, "cost": cost},
        "realised": realised.summary(),
        "flips": realised.changed,
        "rates": {"r0": ours.rates.r0, "r1": ours.rates.r1, "doubt": ours.rates.doubt},
        "related": ours.related,
        "expected": round(ours.expected, 1),
        "doubtful": {
            "entries": int(ours.doubtful.sum()),
            "wrong": int((ours.doubtful & wrong).sum()),
        },
        "entries": {n: _scored(s, wrong) for n, s in entries.items()},
        "rows": {n: _scored(s[:, None], changed[:, None]) for n, s in by_row.items()},
        "seconds": round(seconds, 2),
        "versions": versions,
    }


def _any(wrong: np.ndarray) -> np.ndarray:
    """[N], in the order of P(any label of the row is wrong), were they independent."""
    return -np.log1p(-np.minimum(wrong.astype(np.float64), 1 - 1e-12)).sum(1)


def _scored(score: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    precision, average = issues.precision(score, wrong)
    return {"precision": round(precision, 4), "average": round(average, 4)}


def _cleanlab(noisy: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, L] of entries and [N] of rows that have cleanlab's order."""
    from cleanlab.multilabel_classification import filter as cleanlab

    given = [np.flatnonzero(row).tolist() for row in noisy]
    probabilities = scores.astype(np.float64)
    flagged = cleanlab.find_multilabel_issues_per_class(given, probabilities, n_jobs=1)
    ranked = cleanlab.find_label_issues(
        given, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    gap = np.abs(noisy - scores)  # 1 - self-confidence
    rows = gap.max(1)
    rows[ranked] = 2 + np.arange(len(ranked), 0, -1)
    return gap + 2.0 * flagged, rows


def table(rows: list[dict]) -> str:
    """Markdown: entries' precision at the number of flips / average precision."""
    lines = [
        "| | noise | flips | rates: estimated, realised | "
        + " | ".join(RANKINGS)
        + " | rows: issues, plain, cleanlab |",
        "| --- | --- | --- | --- |" + " --- |" * (len(RANKINGS) + 1),
    ]
    for row in rows:
        real = row["realised"]
        rate = f" {row['rate']:g}" if row["rate"] else ""
        cells = []
        for name in RANKINGS:
            text = _pair(row["entries"].get(name))
            above = name == "issues" and all(
                row["entries"][name][k] > row["entries"][o][k]
                for k in ("precision", "average")
                for o in ("plain", "cleanlab")
                if o in row["entries"]
            )
            cells.append(f"**{text}**" if above else text)
        seed = f", seed {row['seed']}" if row["seed"] else ""
        by_row = ", ".join(
            _short(row["rows"][n]["average"]) if n in row["rows"] else "not run"
            for n in ("issues", "plain", "cleanlab")
        )
        lines.append(
            f"| {row['dataset']} | {row['kind']}{rate}{seed} | {row['flips']} | "
            f"{_rates(row['rates']['r0'], row['rates']['r1'])}, "
            f"{_rates(real['p01'], real['p10'])} | {' | '.join(cells)} | {by_row} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:.3f}".lstrip("0")


def _rates(r0: float, r1: float) -> str:
    return f"{_short(r0)}/{_short(r1)}"


def _pair(scores: dict | None) -> str:
    if scores is None:
        return "not run"
    return f"{_short(scores['precision'])}/{_short(scores['average'])}"


def main() -> None:
    """Measures the cells that have no row yet, or prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.label_issues",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument("--data", choices=sorted(MODELS), help="measure on this")
    parser.add_argument("--kind", choices=sorted({k for k, _ in CELLS}))
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--cache", default="runs/issues", help="folder of the scores")
    parser.add_argument("--results", default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print all rows")
    arguments = parser.parse_args()
    with errors.explained():
        rows = files.read_jsonl(arguments.results)
        for kind, rate in CELLS if arguments.data else ():
            key = (arguments.data, kind, rate, arguments.seed)
            done = [(r["dataset"], r["kind"], r["rate"], r["seed"]) for r in rows]
            if key in done or (arguments.kind and kind != arguments.kind):
                continue
            rows.append(measure(*key, arguments.cache))
            files.write_jsonl(arguments.results, rows)
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        if arguments.table:
            print(table(rows), end="")


if __name__ == "__main__":
    main()
