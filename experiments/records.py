"""Result rows and the records beside them, read and put into groups.

Every command here reads JSON lines and nothing else: rows (`results.jsonl` of runs, or
many of them in one file) and records (`details.jsonl`), in any order and mixture.  Of
a sweep's candidates the chosen ones alone are taken.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import shlex
import sys

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import details, metrics
from cbmlc_jax.grids import SEED_KEYS

# What every row has, also one that an older version wrote.
FIELDS = ("dataset", "fingerprint", "model", "config", "seed", "noise", "metrics")
FIELDS += ("thresholds", "ranking", "selection", "epoch", "params", "seconds")
FIELDS += ("versions", "command")
HONEST, ORACLE = "corrected_val", "oracle"


class RecordError(ValueError):
    """A file of rows that cannot be read; the message says which and where."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that differ in nothing but their seeds.

    Attributes:
        rows: in the order of the files.
        variant: what tells it from the other groups of its model and setting.
    """

    rows: list[dict]
    variant: str = ""

    @property
    def first(self) -> dict:
        """A row that speaks for the others where the seeds do not matter."""
        return self.rows[0]

    @property
    def model(self) -> str:
        return self.first["model"]

    @property
    def noise(self) -> str:
        """Kind and rate, where it has one: "ncar 0.05"."""
        noise = self.first["noise"]
        return noise["kind"] + (f" {noise['rate']:g}" if noise["rate"] else "")

    @property
    def setting(self) -> tuple:
        """Groups of the same data, noise and rates may be held against each other."""
        row = self.first
        noise = {k: v for k, v in row["config"].items() if k.startswith("noise.")}
        noise.pop("noise.seed", None)
        data = (row["dataset"], row["fingerprint"], row["noise"]["kind"])
        return (*data, row["noise"]["rate"], str(sorted(noise.items())))

    @property
    def name(self) -> str:
        """Model and variant."""
        return f"{self.model} ({self.variant})" if self.variant else self.model

    def scores(self, protocol: str, metric: str) -> list[float]:
        """One F1 of each row."""
        return [row["metrics"][protocol][metric] for row in self.rows]

    def mean(self, protocol: str, metric: str) -> float:
        """The mean of `scores`."""
        return float(np.mean(self.scores(protocol, metric)))


@dataclasses.dataclass(frozen=True)
class Records:
    """Attributes: rows, and the records by their sha256."""

    rows: list[dict]
    by_digest: dict[str, dict]

    def groups(self) -> list[Group]:
        """In the order of their first row."""
        found = collections.defaultdict(list)
        for row in self.rows:
            found[_key(row, seeds=False)].append(row)
        groups = [Group(rows) for rows in found.values()]
        alike = collections.defaultdict(list)
        for group in groups:
            alike[(group.setting, group.model)].append(group)
        names = {id(g): variant(g, some) for some in alike.values() for g in some}
        return [dataclasses.replace(g, variant=names[id(g)]) for g in groups]

    def predictions(self, row: dict) -> details.Predictions | None:
        """Of a row, where they were kept and are here.

        Raises:
            RecordError: they do not give the row's F1s.
            DetailError: they are damaged.
        """
        record = self._record(row, "predictions")
        if record is None:
            return None
        found = details.read_predictions(record)
        for name, predicted in found.predicted.items():
            score = metrics.f1_scores(metrics.count(predicted, found.labels))[name]
            if abs(score - row["metrics"][HONEST][name]) > 1e-9:
                raise RecordError(
                    f"the predictions {record['sha256'][:12]} give {name} {score:.6f} "
                    f"and the row that names them {row['metrics'][HONEST][name]:.6f}"
                )
        return found

    def label_embeddings(self, row: dict) -> details.LabelEmbeddings | None:
        """Of a row, where they were kept and are here.

        Raises:
            DetailError: they are damaged.
        """
        record = self._record(row, "label_embeddings")
        return None if record is None else details.read_label_embeddings(record)

    def _record(self, row: dict, name: str) -> dict | None:
        return self.by_digest.get(row.get("details", {}).get(name, ""))


def read(paths: list[str]) -> Records:
    """Rows and records of the given files; of equal runs the last one.

    Raises:
        RecordError, OSError: names the file and the line.
    """
    rows, by_digest = {}, {}
    for path in paths:
        with open(path, encoding="utf8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    _take(text, f"{path}, line {number}", rows, by_digest)
    chosen = [r for r in rows.values() if r.get("sweep", {}).get("chosen", True)]
    return Records(chosen, by_digest)


def _take(text: str, place: str, rows: dict, by_digest: dict) -> None:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{place} is no JSON: {error}") from error
    if not isinstance(line, dict):
        raise RecordError(f"{place} is no result row and no record")
    if "record" in line:
        by_digest[str(line.get("sha256"))] = line
        return
    missing = [name for name in FIELDS if name not in line]
    if missing:
        raise RecordError(f"{place} is no result row: it has no {', '.join(missing)}")
    key = _key(line, seeds=True)
    if key in rows and rows[key]["metrics"] != line["metrics"]:
        print(f"{place} stands over an earlier run of its config", file=sys.stderr)
    rows[key] = line


def _key(row: dict, seeds: bool) -> tuple:
    left_out = config_lib.RETIRED if seeds else (*config_lib.RETIRED, *SEED_KEYS)
    delta = sorted((k, v) for k, v in row["config"].items() if k not in left_out)
    noise = (row["noise"]["kind"], row["noise"]["rate"])
    return (row["dataset"], row["fingerprint"], row["model"], *noise, str(delta))


def variant(group: Group, alike: list[Group]) -> str:
    """The preset, and the settings in which groups of this preset differ."""
    mine = group.first["config"]
    deltas = [other.first["config"] for other in alike]
    deltas = [delta for delta in deltas if delta.get("preset") == mine.get("preset")]
    differing = sorted(
        k
        for k in mine
        if k not in (*SEED_KEYS, *config_lib.RETIRED, "preset")
        and any(d.get(k) != mine[k] for d in deltas)
    )
    words = [str(mine["preset"])] if mine.get("preset") else []
    return ", ".join([*words, *(f"{k}={mine[k]}" for k in differing)])


def flags(row: dict) -> str:
    """The command line of a row without its folders, seeds and progress bar."""
    try:
        words = shlex.split(row["command"])[3:]
    except ValueError:  # no command line of a shell
        return row["command"]
    left_out = tuple(f"--config.{k}=" for k in (*SEED_KEYS, *config_lib.INCIDENTAL))
    kept = [w for w in words if not w.startswith((*left_out, "--workdir="))]
    return shlex.join(kept)
