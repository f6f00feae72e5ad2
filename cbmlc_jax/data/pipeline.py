"""Registry of data sets, the validation split, and batches of few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8

from cbmlc_jax import rngs
from cbmlc_jax.data.dataset import DataError, Dataset, Ragged, Split


def load(name: str, folder: str | None = None) -> Dataset:
    """Reads a data set by its registry name.

    Args:
        name: "synthetic", "bibtex", "delicious" or "reuters".
        folder: a data folder; None for the prepared cache or the download.

    Raises:
        DataError: unknown name, or files that are missing, broken or not the
            published ones.
    """
    if name == "synthetic":
        from cbmlc_jax.data import synthetic

        return synthetic.load()
    if name in ("bibtex", "delicious"):
        from cbmlc_jax.data import mulan

        return mulan.load(name, folder)
    if name == "reuters":
        from cbmlc_jax.data import reuters

        return reuters.load(folder)
    raise DataError(f"unknown data set {name!r}")


def split_rows(
    labels: UInt8[np.ndarray, "rows labels"],
    *,
    fraction: float,
    size: int | None,
    seed: int,
    stratified: bool = False,
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Draws floor(fraction * N) validation rows (or `size`) with a seed of their own.

    Args:
        labels: [N, L] as the user sees them (noisy); read only if `stratified`.
        fraction: of the rows.
        size: number of rows; stands over `fraction`.
        seed: of the split alone.
        stratified: spread each label's positives over both sides, rarest first.

    Returns:
        Row numbers of training and validation, both ascending.

    Raises:
        DataError: no row would be left for training or validation.
    """
    total = len(labels)
    wanted = size if size is not None else int(fraction * total)
    if not 0 < wanted < total:
        raise DataError(
            f"{wanted} validation rows of {total} training rows: set "
            "config.data.validation_size between 1 and one less than these"
        )
    order = rngs.generator(seed, "split").permutation(total)
    if stratified:
        chosen = _stratified(labels[order] != 0, wanted)
        validation = np.sort(order[chosen])
    else:
        validation = np.sort(order[:wanted])
    return np.setdiff1d(np.arange(total), validation), validation


def _stratified(labels: np.ndarray, wanted: int) -> np.ndarray:
    """Positions of `wanted` rows whose labels are spread as the whole's, greedily.

    The rarest label first: of its rows that are still free, the share that validation
    lacks goes there (at least one where it has two), the rest to training.
    """
    total, share = len(labels), wanted / len(labels)
    free = np.ones(total, bool)
    taken = np.zeros(total, bool)
    support = labels.sum(0)
    for label in np.argsort(support, kind="stable"):
        if support[label] < 2:
            continue
        target = max(1, round(share * support[label])) - taken[labels[:, label]].sum()
        rows = np.flatnonzero(free & labels[:, label])
        take = rows[: max(0, min(target, wanted - taken.sum()))]
        taken[take] = True
        free[rows] = False
    rest = np.concatenate([np.flatnonzero(free), np.flatnonzero(~free & ~taken)])
    taken[rest[: wanted - taken.sum()]] = True
    return np.flatnonzero(taken)


def bucket_widths(lengths: Int[np.ndarray, " rows"], buckets: int) -> list[int]:
    """The widths, at most `buckets` multiples of 8, that pad the rows least.

    Each width is one shape to compile.  Exact, by dynamic programming over the
    distinct lengths: cost(j) = min_i cost(i) + width_j * #{rows in (width_i, width_j]}.
    """
    rounded = np.maximum(8, -(-lengths // 8) * 8)
    widths, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # step[i, j]: all rows of distinct widths i..j-1 padded to widths[j-1].
    step = (before[None, 1:] - before[:-1, None]) * widths[None, :].astype(float)
    step[np.tril_indices(len(widths), -1)] = np.inf
    cost, origin = step[0], []
    for _ in range(min(buckets, len(widths)) - 1):
        options = np.concatenate([[np.inf], cost[:-1]])[:, None] + step
        origin.append(options.argmin(0))
        cost = np.minimum(options.min(0), cost)
        origin[-1][cost < options.min(0)] = 0
    chosen, j = [], len(widths)
    for choice in [*reversed(origin), np.zeros(len(widths), int)]:
        if j == 0:
            break
        chosen.append(int(widths[j - 1]))
        j = choice[j - 1]
    return sorted(chosen)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows form which batch.

    Attributes:
        rows: int64 [batches, B], row numbers; -1 where the last batch is padded.
        widths: [batches], the padded length of each batch.
    """

    rows: np.ndarray
    widths: list[int]

    def __len__(self) -> int:
        return len(self.widths)


def plan_batches(
    lengths: Int[np.ndarray, " rows"],
    batch_size: int,
    widths: list[int],
    shuffle: np.random.Generator | None = None,
) -> Plan:
    """Groups rows of like length into batches; every row once, the last one padded.

    Args:
        lengths: [N] ids in each row.
        batch_size: B.
        widths: ascending bucket widths.
        shuffle: draws the order of rows and batches; None keeps rows by length.
    """
    order = np.arange(len(lengths))
    if shuffle is not None:
        order = shuffle.permutation(order)
    longest = int(lengths.max(initial=0))
    widths = list(widths)
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    bucket = np.searchsorted(widths, lengths[order])
    order = order[np.argsort(bucket, kind="stable")]
    padding = -len(order) % batch_size
    rows = np.concatenate([order, np.full(padding, -1)]).reshape(-1, batch_size)
    bucket = np.searchsorted(widths, np.where(rows >= 0, lengths[rows], 0).max(1))
    if shuffle is not None:
        position = shuffle.permutation(len(rows))
        rows, bucket = rows[position], bucket[position]
    return Plan(rows, [widths[b] for b in bucket])


def batches(
    inputs: Ragged, labels: UInt8[np.ndarray, "rows labels"] | None, plan: Plan
) -> Iterator[dict[str, np.ndarray]]:
    """Padded batches: `tokens` int32 [B, S], `mask` bool [B], `rows` uint32 [B] (the
    position in the global batch) and, where given, `labels` uint8 [B, L]."""
    for rows, width in zip(plan.rows, plan.widths, strict=True):
        mask = rows >= 0
        tokens = inputs.padded(np.maximum(rows, 0), width)
        batch = {
            "tokens": np.where(mask[:, None], tokens, 0),
            "mask": mask,
            "rows": np.arange(len(rows), dtype=np.uint32),
        }
        if labels is not None:
            batch["labels"] = np.where(mask[:, None], labels[np.maximum(rows, 0)], 0)
        yield batch


def label_graph(
    kind: str,
    labels: UInt8[np.ndarray, "rows labels"],
    names: tuple[str, ...],
    file: str | None = None,
) -> np.ndarray | None:
    """The edges of the label graph, self loops included.

    Args:
        kind: "complete" (None is returned), "self" (loops alone), "cooccurrence" (two
            labels that share a row of the noisy training labels), "file".
        labels: [N, L] noisy training labels.
        names: L label names.
        file: lines of `label<TAB>label`, undirected edges.

    Returns:
        bool [L, L] or None.

    Raises:
        DataError: the file is missing, or a line names no label.
    """
    if kind == "complete":
        return None
    graph = np.eye(labels.shape[1], dtype=bool)
    if kind == "cooccurrence":
        present = labels.astype(np.float32)
        graph |= present.T @ present > 0
    elif kind == "file":
        index = {name: i for i, name in enumerate(names)}
        for number, line in enumerate(_lines(file), 1):
            pair = line.split("\t")
            if len(pair) != 2 or not all(name in index for name in pair):
                raise DataError(
                    f"{file}, line {number}: expected two label names with a tab "
                    f"between them, found {line!r}"
                )
            a, b = (index[name] for name in pair)
            graph[a, b] = graph[b, a] = True
    return graph


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf8") as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the label graph {path}: {error}") from error


__all__ = [
    "DataError",
    "Dataset",
    "Plan",
    "Ragged",
    "Split",
    "batches",
    "bucket_widths",
    "label_graph",
    "load",
    "plan_batches",
    "split_rows",
]
