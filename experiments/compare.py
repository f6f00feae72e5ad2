"""Two systems on the same data, noise and seeds: differences with their intervals.

    python -m experiments.compare --ours=model.name=stack,model.label_graph=complete \\
        --theirs=model.name=kernel_ridge ROWS.jsonl ... DETAILS.jsonl ...

A side is what its configs say, KEY=VALUE with commas between them; a key that a row
does not have is at its default.  Compared are the honest F1s over the seeds that both
have with predictions, by the paired bootstrap of bootstrap.py: the interval is of the
test rows, not of the seeds.
"""

from __future__ import annotations

import argparse

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors, metrics
from cbmlc_jax.grids import SEED_KEYS
from experiments import bootstrap, records, tables
from experiments.records import HONEST, Group, RecordError, Records


def sides(
    found: Records, ours: dict[str, str], theirs: dict[str, str]
) -> list[tuple[Group, Group]]:
    """Groups of both sides in the same setting, of which each has one.

    Raises:
        RecordError: an unknown key; no pair; or a side that is several systems.
    """
    known = config_lib.flatten(config_lib.base())
    for key in ours | theirs:
        if key not in known:
            raise RecordError(f"{key} is no key of the config")

    def chosen(wanted: dict[str, str]) -> dict[tuple, Group]:
        by_setting: dict[tuple, Group] = {}
        for group in found.groups():
            values = known | group.first["config"]
            if any(str(values[key]) != value for key, value in wanted.items()):
                continue
            other = by_setting.setdefault(group.setting, group)
            if other is not group:
                said = ",".join(f"{k}={v}" for k, v in wanted.items())
                raise RecordError(
                    f"{said} is both {other.name} and {group.name}: add a KEY=VALUE"
                )
        return by_setting

    mine, others = chosen(ours), chosen(theirs)
    pairs = [(mine[s], others[s]) for s in mine if s in others]
    if not pairs:
        raise RecordError("no data and noise that both sides have rows of")
    return pairs


def rows(
    found: Records, ours: Group, theirs: Group, resamples: int
) -> tuple[int, dict[str, bootstrap.Comparison]]:
    """The number of seeds that both have with predictions, and each F1's difference."""
    runs = []
    for group in (ours, theirs):
        by_seed = {}
        for row in group.rows:
            seeds = tuple(row["config"].get(key, 0) for key in SEED_KEYS)
            predictions = found.predictions(row)
            if predictions is not None:
                by_seed[seeds] = (row, predictions)
        runs.append(by_seed)
    shared = [seeds for seeds in runs[0] if seeds in runs[1]]
    if not shared:
        return 0, {}
    draws = [
        bootstrap.resampled([side[s][1] for s in shared], resamples) for side in runs
    ]

    def mean(side: dict, name: str) -> float:
        return np.mean([side[s][0]["metrics"][HONEST][name] for s in shared])

    return len(shared), {
        name: bootstrap.compare(
            float(mean(runs[0], name) - mean(runs[1], name)),
            draws[0][name],
            draws[1][name],
        )
        for name in metrics.F1_NAMES
    }


def lines(found: Records, pairs: list[tuple[Group, Group]], resamples: int):
    """Lines of a Markdown table, as they are computed."""
    header = ["data", "noise", "seeds", *metrics.F1_NAMES]
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join(["---"] * len(header)) + " |"
    for ours, theirs in pairs:
        seeds, compared = rows(found, ours, theirs, resamples)
        cells = [ours.first["dataset"], ours.noise, str(seeds)]
        for name in metrics.F1_NAMES:
            c = compared.get(name)
            low, high, p = ("", "", "") if c is None else (c.low, c.high, c.p)
            cells.append(
                "no predictions"
                if c is None
                else f"{tables.signed(c.difference)} [{tables.signed(low)}, "
                f"{tables.signed(high)}] p {tables.short(p, 4)}"
            )
        yield "| " + " | ".join(cells) + " |"


def _side(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(key and sign for key, sign, _ in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE,KEY=VALUE")
    return {key: value for key, _, value in parts}


def main() -> None:
    """Prints ours minus theirs for the rows in the given JSON lines files."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="ROWS.jsonl")
    parser.add_argument("--ours", type=_side, required=True, metavar="KEY=VALUE,...")
    parser.add_argument("--theirs", type=_side, required=True, metavar="KEY=VALUE,...")
    parser.add_argument("--resamples", type=int, default=bootstrap.RESAMPLES)
    arguments = parser.parse_args()
    with errors.explained():
        found = records.read(arguments.files)
        pairs = sides(found, arguments.ours, arguments.theirs)
        for line in lines(found, pairs, arguments.resamples):
            print(line, flush=True)


if __name__ == "__main__":
    main()
