"""Grids of runs: what a sweep (experiments/sweep.py) expands, and how it chooses.

A config file has GRIDS = {name: [Block, ...]}.  A block stands for models x noise;
each pair is a cell, which is run with several seeds.  Where a block has candidates
(hyper-parameters), the first seed runs all of them, the validation score chooses one,
and the other seeds run that one alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence

from cbmlc_jax import config as config_lib

Changes = Mapping[str, object]  # flat keys of the config and their new values

# One number for everything that is random in a run.
SEED_KEYS = ("seed", "noise.seed", "data.split_seed")
# The paper's noise: (kind, rate); kinds without a rate have None.
_OTHERS = (("single_positive", None), ("combined", None))
_NAR = tuple(("nar", p) for p in (0.1, 0.2, 0.3, 0.4, 0.5))
TEXT_NOISE = (
    ("none", None),
    *(("ncar", p) for p in (0.01, 0.02, 0.03, 0.04, 0.05)),
    *_NAR,
    *_OTHERS,
)
IMAGE_NOISE = (
    ("none", None),
    *(("ncar", p) for p in (0.1, 0.2, 0.3, 0.4, 0.5)),
    *_NAR,
    *_OTHERS,
)
# Each kind once, at its default rate.
ONE_OF_EACH = (("none", None), ("ncar", None), ("nar", None), *_OTHERS)
# The paper's hyper-parameters (section 5): lambda, gamma+, gamma-, m.
CANDIDATES = {
    "loss.cb_weight": (0.001, 0.01, 0.1, 1.0),
    "loss.gamma_pos": (1.0, 2.0, 4.0),
    "loss.gamma_neg": (1.0, 2.0, 4.0),
    "loss.margin": (0.05, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """models x noise, each with all seeds.

    Attributes:
        models: what each model changes, e.g. {"model.name": "lamp"}; {}: nothing.
        noise: pairs (noise.kind, noise.rate); a rate of None is not set.
        preset: of the config file.
        candidates: key -> values; of their product one is chosen on validation.
        seeds: the first one chooses.
    """

    models: Sequence[Changes]
    noise: Sequence[tuple[str, float | None]]
    preset: str = ""
    candidates: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)


def linear(folds: int) -> list[Changes]:
    """Logistic regression without and with neighbours, cross-fitted in `folds`."""
    names = ("logistic_regression", "lr_knn")
    return [{"model.name": name, "train.crossfit": folds} for name in names]


def paper(
    models: Sequence[str | Changes], noise: Sequence = TEXT_NOISE, preset: str = ""
) -> list[Block]:
    """The paper's tables: CbMLC with its hyper-parameters chosen for each noise, and
    other models (names, or what they change) as published; five seeds."""
    others = [{"model.name": m} if isinstance(m, str) else m for m in models]
    return [
        Block([{}], noise, preset, CANDIDATES, range(5)),
        Block(others, noise, preset, seeds=range(5)),
    ]


def small(preset: str, models: Sequence[Changes], theirs: str = "") -> list[Block]:
    """A small preset of CbMLC, and other models with the preset `theirs`, under one
    noise of each kind, one seed."""
    return [Block([{}], ONE_OF_EACH, preset), Block(models, ONE_OF_EACH, theirs)]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: `python -m cbmlc_jax.main --config=CONFIG` with `changes`.

    Attributes:
        config: file and preset, as on the command line.
        changes: flat, as on the command line.
        delta: what the row's "config" will be.
        rate: what the row's noise rate will be.
        key: of the row; see `row_key`.
    """

    config: str
    changes: Changes
    delta: Changes
    rate: float
    key: str

    def flags(self) -> list[str]:
        """The command line."""
        changes = [f"--config.{k}={v}" for k, v in self.changes.items()]
        return [f"--config={self.config}", *changes]

    def __str__(self) -> str:
        changes = [f"{k}={v}" for k, v in self.changes.items() if k not in SEED_KEYS]
        return " ".join([self.config, *changes, f"seed={self.changes['seed']}"])


@dataclasses.dataclass(frozen=True)
class Cell:
    """What ends as one line of a table: a model under a noise.

    Attributes:
        grid: its name on the command line of the sweep.
        points: for each candidate a run of each seed.
    """

    grid: str
    points: tuple[tuple[Point, ...], ...]

    def choose(self, rows: Mapping[str, dict]) -> int | None:
        """The number of the candidate with the best validation score.

        Ties go to the earlier one; test metrics are not looked at.

        Args:
            rows: result rows by their keys.

        Returns:
            None where a candidate has no row yet.

        Raises:
            ConfigError: the scores cannot be compared.
        """
        if len(self.points) == 1:
            return 0
        found = [rows.get(runs[0].key) for runs in self.points]
        if None in found:
            return None
        selections = [row["selection"] for row in found]
        data = {(row["fingerprint"], row["selection"]["rule"]) for row in found}
        if len(data) > 1 or None in [s["score"] for s in selections]:
            raise config_lib.ConfigError(
                f"{self.grid}: the candidates of {self.points[0][0].changes} were not "
                "scored by one rule on the same data, so that none can be chosen: "
                "remove their rows, and their folders in the workdir"
            )
        return max(range(len(found)), key=lambda i: (selections[i]["score"], -i))


def ready(cells: Sequence[Cell], rows: Mapping[str, dict]) -> tuple[list[Point], list]:
    """Runs that have no row yet.

    Args:
        cells: of all grids.
        rows: result rows by their keys.

    Returns:
        Those that can start now, in order, each once; and, for runs that wait for a
        choice, the run of another candidate with the same seed.
    """
    now, later = {}, []
    for cell in cells:
        chosen = cell.choose(rows)
        runs = [candidate[0] for candidate in cell.points]
        if chosen is None:
            later += cell.points[0][1:]
        else:
            runs += cell.points[chosen][1:]
        now |= {p.key: p for p in runs if p.key not in rows}
    return list(now.values()), later


def like(delta: Changes) -> tuple:
    """Runs whose deltas are equal in this take about as long."""
    keys = ("data.name", "data.variant", "preset", "model.name", "train.crossfit")
    return tuple(delta.get(k) for k in (*keys, "train.num_epochs"))


def row_key(delta: Changes, rate: float, version: str | None) -> str:
    """What identifies a result row: config, noise rate and version of this package.

    `rate` stands in the place of noise.rate, which may be left at its default.  A
    version of None lets rows of all versions count as the same.
    """
    settings = {k: v for k, v in delta.items() if k != "noise.rate"}
    identity = {"config": settings, "rate": rate, "cbmlc_jax": version}
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(name: str) -> tuple[list[Block], Callable]:
    """The blocks of `configs/x.py:grid`, and the file's get_config.

    Raises:
        ConfigError: no such file or grid.
    """
    path, _, grid = name.partition(":")
    if not os.path.isfile(path):
        raise config_lib.ConfigError(f"--grid={name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("cbmlc_grid", path)
    if spec is None or spec.loader is None:
        raise config_lib.ConfigError(f"--grid={name}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = getattr(module, "GRIDS", {})
    if grid not in known:
        raise config_lib.ConfigError(
            f"--grid={name}: {path} has no grid {grid!r}, but "
            + (", ".join(known) or "none at all")
        )
    return known[grid], module.get_config


def expand(
    name: str,
    blocks: Sequence[Block],
    get_config: Callable,
    version: str | None,
    extra: Changes | None = None,
) -> list[Cell]:
    """The cells of a grid, in the order of its blocks, each once.

    Args:
        name: `configs/x.py:grid`.
        blocks: of that grid.
        get_config: preset -> config.
        version: of this package, or None; see `row_key`.
        extra: changes of every run; they stand over those of the blocks.

    Raises:
        ConfigError: a key or value that a run would not accept.
    """
    path = name.partition(":")[0]
    cells = {}
    for block in blocks:
        candidates = _product(block.candidates)
        for (kind, rate), model in itertools.product(block.noise, block.models):
            base = {**model, "noise.kind": kind}
            if rate is not None:
                base["noise.rate"] = rate
            runs = {}
            for candidate in candidates:
                changes = {**base, **candidate, **(extra or {})}
                config = _settled(path, get_config(block.preset), changes)
                if len(candidates) > 1 and config.train.selection == "last":
                    raise config_lib.ConfigError(
                        f"{name}: train.selection=last gives no score to choose by"
                    )
                points = tuple(
                    _point(path, block.preset, changes, config, seed, version)
                    for seed in block.seeds
                )
                runs.setdefault(points[0].key, points)
            cells.setdefault(tuple(runs), Cell(name, tuple(runs.values())))
    return list(cells.values())


def _product(candidates: Mapping[str, Sequence]) -> list[Changes]:
    values = itertools.product(*candidates.values())
    return [dict(zip(candidates, v, strict=True)) for v in values]


def _settled(path: str, config, changes: Changes):
    """The config as main would make it of these changes."""
    try:
        config.update_from_flattened_dict(dict(changes))
        config_lib.settle(config, set(changes))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error.args[0]).split())
        raise config_lib.ConfigError(f"{path} with {changes}: {text}") from error
    return config


def _point(
    path: str, preset: str, changes: Changes, config, seed: int, version: str | None
) -> Point:
    seeds = dict.fromkeys(SEED_KEYS, seed)
    config.update_from_flattened_dict(seeds)
    delta, rate = config_lib.delta(config), config_lib.noise_rate(config)
    return Point(
        config=path + (f":{preset}" if preset else ""),
        changes={**changes, **seeds},
        delta=delta,
        rate=rate,
        key=row_key(delta, rate, version),
    )
