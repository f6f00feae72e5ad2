"""Result rows -> the Markdown table of experiments/README.md.

    python -m experiments.tables experiments/results/baselines.jsonl

Rows that differ in their seeds alone stand in one line: mean, and +- the standard
deviation of miF1 by corrected_val.  Of a sweep's candidates the chosen one counts.
Reads result rows and nothing else.
"""

from __future__ import annotations

import collections
import shlex
import sys

import numpy as np

from cbmlc_jax import files, metrics, thresholds
from cbmlc_jax.grids import SEED_KEYS

# (data set, noise, model) -> ebF1/miF1/maF1 of the paper's Tables 1-3, by `oracle`.
PAPER = {
    ("bibtex", "none", "mlknn"): ".183/.178/.073",
    ("bibtex", "none", "sleec"): ".449/.407/.294",
    ("bibtex", "none", "seq2seq"): ".393/.384/.282",
    ("bibtex", "none", "lamp"): ".447/.473/.376",
    ("bibtex", "none", "mpvae"): ".453/.480/.386",
    ("bibtex", "none", "cbmlc"): ".457/.484/.401",
    ("bibtex", "single_positive", "cbmlc"): "-/.421/.305",
    ("bibtex", "combined", "cbmlc"): "-/.328/.199",
    ("delicious", "none", "mlknn"): ".259/.264/.053",
    ("delicious", "none", "sleec"): ".308/.333/.142",
    ("delicious", "none", "seq2seq"): ".320/.329/.166",
    ("delicious", "none", "lamp"): ".372/.386/.196",
    ("delicious", "none", "mpvae"): ".373/.393/.181",
    ("delicious", "none", "cbmlc"): ".356/.370/.198",
    ("reuters", "none", "seq2seq"): ".892/.855/.457",
    ("reuters", "none", "lamp"): ".895/.877/.560",
    ("reuters", "none", "cbmlc"): ".906/.889/.602",
}


def reported(rows: list[dict]) -> list[dict]:
    """Rows without candidates that a sweep did not choose, or not yet."""
    return [row for row in rows if row.get("sweep", {}).get("chosen", True)]


def group(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by everything but their seeds, in the order of their first appearance."""
    groups = collections.defaultdict(list)
    for row in rows:
        delta = sorted((k, v) for k, v in row["config"].items() if k not in SEED_KEYS)
        key = (row["dataset"], row["noise"]["kind"], row["model"], str(delta))
        groups[key].append(row)
    return dict(groups)


def flags(row: dict) -> str:
    """The command line of a row without its folders, seeds and progress bar."""
    words = shlex.split(row["command"])[3:]
    left_out = tuple(f"--config.{k}=" for k in (*SEED_KEYS, "train.progress"))
    kept = [w for w in words if not w.startswith((*left_out, "--workdir="))]
    return shlex.join(kept)


def _scores(rows: list[dict], values) -> str:
    """Means of the three F1s; `values` takes a row to {name: value}."""
    means = [np.mean([values(r)[n] for r in rows]) for n in metrics.F1_NAMES]
    return "/".join(f"{m:.3f}".lstrip("0") for m in means)


def lines(rows: list[dict]) -> list[str]:
    """The table, a line for each group."""
    header = ["data", "noise", "model", *thresholds.PROTOCOLS, "own rule", "paper"]
    header += ["P@1", "seeds", "seconds", "chosen", "parameters", "flags"]
    out = [header, ["---"] * len(header)]
    for (dataset, noise, model, _), some in group(rows).items():
        first = some[0]
        protocols = [
            _scores(some, lambda r, p=p: r["metrics"][p]) for p in thresholds.PROTOCOLS
        ]
        if len(some) > 1:
            values = [r["metrics"]["corrected_val"]["miF1"] for r in some]
            protocols[-1] += f" (miF1 ± {np.std(values, ddof=1):.3f})"
        seconds = np.mean([sum(r["seconds"].values()) for r in some])
        settings = first["selection"].get("settings", {})
        chosen = ", ".join(f"{k} {v:g}" for k, v in settings.items())
        out.append(
            [
                dataset,
                noise,
                model,
                *protocols,
                _scores(some, lambda r: r["decoded_metrics"])
                if "decoded_metrics" in first
                else "",
                PAPER.get((dataset, noise, model), ""),
                f"{np.mean([r['ranking']['P@1'] for r in some]):.3f}".lstrip("0"),
                str(len(some)),
                f"{seconds:.0f}",
                chosen or f"epoch {first['epoch']}",
                f"{first['params']:,}",
                f"`{flags(first)}`",
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in out]


def main(paths: list[str]) -> None:
    """Prints the table of the rows in the given JSON lines files."""
    if not paths:
        sys.exit("usage: python -m experiments.tables ROWS.jsonl ...")
    rows = [row for path in paths for row in files.read_jsonl(path)]
    print("\n".join(lines(reported(rows))))


if __name__ == "__main__":
    main(sys.argv[1:])
