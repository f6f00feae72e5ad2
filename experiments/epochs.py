"""Every epoch that a run kept, scored on test: was it the choice of the epoch?

    python -m cbmlc_jax.main ... --config.train.keep=100 --workdir=runs/x
    python -m experiments.epochs [--output=FILE] runs/x ...

prints the F1s of each checkpoint, and what each F1 would be

* with an epoch of its own, as in the code that the paper extends (LaMP's): that with
  the best F1, over the thresholds, by the protocol's validation labels.  With `oracle`
  epoch and threshold are the best on test: more than that no choice could give;
* at the epoch that the paper's own code would keep: the last one at which any of the
  three F1s, over the thresholds, on the noisy validation labels was the best so far.

To look at, as oracle is; the rows of results have one epoch for all F1s, by one rule.
`--output` writes a JSON line a run.
"""

from __future__ import annotations

import argparse
import contextlib
import os

from cbmlc_jax import checkpoints, errors, evaluate, files, thresholds, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax.metrics import F1_NAMES

# Of the run's row.
IDENTITY = (
    *("dataset", "fingerprint", "model", "preset", "config", "seed", "noise"),
    *("rates", "versions", "command"),
)


def measure(workdir: str) -> dict:
    """The line of a finished run that was not cross-fitted.

    Returns:
        What tells the run, from its row; "epochs": for each what `evaluate.protocols`
        gives; "own_epoch", "published_epoch": see the functions.

    Raises:
        RunError, CheckpointError, DataError: see there.
    """
    config = workdirs.trained_config(workdir)
    if config.train.crossfit:
        raise workdirs.RunError(f"{workdir} is cross-fitted: its folds chose the epoch")
    rows = files.read_jsonl(os.path.join(workdir, "results.jsonl"))
    if not rows:
        raise workdirs.RunError(f"{workdir} has no row yet: train there first")
    row, run = rows[-1], run_lib.Run(config, workdir)
    test, lines, reached = run.task.test, [], []
    folder = os.path.join(workdir, "checkpoints")
    with contextlib.closing(checkpoints.Checkpoints(folder, read_only=True)) as store:
        for epoch in store.epochs:
            params = store.params(epoch, run.system.like)
            validation = run.validation(params)
            scores = run_lib.counted(run.system.scores(params, test.inputs), test)
            parts, _ = evaluate.protocols(validation, scores, test.labels)
            found = {
                protocol: validation.curves(protocol)[0]
                for protocol in thresholds.PROTOCOLS[1:]
            }
            found["oracle"] = thresholds.f1_curves(scores, test.labels)
            lines.append({"epoch": epoch, **parts})
            reached.append(
                {p: {n: c[n].max() for n in F1_NAMES} for p, c in found.items()}
            )
    return {key: row[key] for key in IDENTITY} | {
        "epochs": lines,
        "own_epoch": own_epochs(lines, reached),
        "published_epoch": lines[published_epoch(reached)]["epoch"],
    }


def own_epochs(lines: list[dict], reached: list[dict]) -> dict:
    """{protocol: {F1: {"epoch", "value" on test}}}; ties go to the earlier epoch.

    Args:
        lines: {"epoch", "metrics"} of each epoch.
        reached: {protocol: {F1: the best over the thresholds}} of each epoch.
    """
    chosen = {}
    for protocol in thresholds.PROTOCOLS:
        chosen[protocol] = {}
        for name in F1_NAMES:
            best = max(
                range(len(lines)), key=lambda i: (reached[i][protocol][name], -i)
            )
            chosen[protocol][name] = {
                "epoch": lines[best]["epoch"],
                "value": lines[best]["metrics"][protocol][name],
            }
    return chosen


def published_epoch(reached: list[dict]) -> int:
    """The index of the last epoch with an F1 that no epoch before it exceeds."""
    best = dict.fromkeys(F1_NAMES, -1.0)
    kept = 0
    for i, found in enumerate(reached):
        for name in F1_NAMES:
            if found["noisy_val"][name] >= best[name]:
                best[name], kept = found["noisy_val"][name], i
    return kept


def table(line: dict) -> str:
    """The line for a person."""

    def f1s(values) -> str:
        return "/".join(f"{value:.3f}"[1:] for value in values)

    text = ["epoch  " + "  ".join(f"{p:14}" for p in thresholds.PROTOCOLS)]
    for epoch in line["epochs"]:
        cells = [f1s(epoch["metrics"][p].values()) for p in thresholds.PROTOCOLS]
        text.append(f"{epoch['epoch']:5}  " + "  ".join(f"{c:14}" for c in cells))
    own = [line["own_epoch"][p].values() for p in thresholds.PROTOCOLS]
    cells = [f1s(v["value"] for v in values) for values in own]
    text.append("  own  " + "  ".join(f"{c:14}" for c in cells))
    cells = ["/".join(str(v["epoch"]) for v in values) for values in own]
    text.append("   of  " + "  ".join(f"{c:14}" for c in cells))
    text.append(f"the paper's code would keep epoch {line['published_epoch']}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Prints a table a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--output", help="JSON lines")
    args = parser.parse_args(argv)
    with errors.explained():
        lines = []
        for workdir in args.workdirs:
            lines.append(measure(workdir))
            print(
                f"{workdir}, ebF1/miF1/maF1 on test\n{table(lines[-1])}\n", flush=True
            )
        if args.output:
            files.write_jsonl(args.output, lines)


if __name__ == "__main__":
    main()
