"""Registry of data sets, the validation split, and batches of few static shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import scipy.sparse
from jaxtyping import Int, UInt8

from cbmlc_jax import rngs
from cbmlc_jax.data.dataset import (
    DataError,
    Dataset,
    Dense,
    Inputs,
    Ragged,
    Scored,
    Split,
)


def load(settings, folder: str | None = None) -> Dataset:
    """Reads the data set that config.data describes.

    Args:
        settings: config.data; `name`, and what the data set of that name reads.
        folder: a data folder; None for the prepared cache or the download.

    Raises:
        DataError: files that are missing, broken or not the published ones.
    """
    return READERS[settings.name](settings, folder)


def _synthetic(settings, folder) -> Dataset:
    from cbmlc_jax.data import synthetic

    return synthetic.load()


def _mulan(settings, folder) -> Dataset:
    from cbmlc_jax.data import mulan

    return mulan.load(settings.name, folder)


def _reuters(settings, folder) -> Dataset:
    from cbmlc_jax.data import reuters

    return reuters.load(folder)


def _rcv1(settings, folder) -> Dataset:
    from cbmlc_jax.data import rcv1

    tokens, seed = settings.tokens, settings.split_seed
    return rcv1.load(folder, settings.variant, tokens=tokens, split_seed=seed)


def _voc(settings, folder) -> Dataset:
    from cbmlc_jax.data import voc

    return voc.load(
        folder,
        side=settings.side,
        difficult=settings.difficult,
        variant=settings.variant,
    )


def _own(settings, folder) -> Dataset:
    from cbmlc_jax.data import own

    return own.load(settings, folder)


def _memory(settings, folder) -> Dataset:
    raise DataError(
        "the rows of this run were given to an estimator and lie in no file: predict "
        "with --mode=predict, or load the folder with the estimator's load()"
    )


READERS = {
    "memory": _memory,
    "synthetic": _synthetic,
    "bibtex": _mulan,
    "delicious": _mulan,
    "emotions": _mulan,
    "reuters": _reuters,
    "rcv1": _rcv1,
    "voc": _voc,
    "own": _own,
}


def split_rows(
    labels: UInt8[np.ndarray, "rows labels"],
    *,
    fraction: float,
    size: int | None,
    seed: int,
    stratified: bool = False,
    stream: str = "split",
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Draws floor(fraction * N) validation rows (or `size`) with a seed of their own.

    Args:
        labels: [N, L] as the user sees them (noisy); read only if `stratified`.
        fraction: of the rows.
        size: number of rows; stands over `fraction`.
        seed: of the split alone.
        stratified: spread each label's positives over both sides, rarest first.
        stream: name of the random stream, another one for another split.

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
    order = rngs.generator(seed, stream).permutation(total)
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


class Batches:
    """The batches of a plan, by number: the inputs' arrays (`tokens` int32 [B, S] and
    perhaps `weights`, `features`, `images` or `scores`), `mask` bool [B], `rows` uint32
    [B] (the position in the global batch) and, where given, `labels` uint8 [B, L],
    `ignored` bool [B, L], `added` and `sample_weight` float32 [B].

    Args:
        inputs: N rows.
        plan: of these rows.
        split: their labels, or None.
        random: row -> the generator that its augmentation draws from, or None.
        part: the rows of each batch that are made.
    """

    def __init__(
        self,
        inputs: Inputs,
        plan: Plan,
        split: Split | None,
        random=None,
        part: slice = slice(None),
    ):
        self.inputs, self._plan, self._split = inputs, plan, split
        self._random, self._part = random, part

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.batch(number, self.width(number))

    def width(self, number: int) -> int:
        """The padded length of a batch."""
        return self._plan.widths[number]

    def batch(self, number: int, width: int) -> dict[str, np.ndarray]:
        """A batch, padded to `width`."""
        rows = self._plan.rows[number]
        positions = np.arange(len(rows), dtype=np.uint32)[self._part]
        rows = rows[self._part]
        mask = rows >= 0
        if self._random is None:
            batch = self.inputs.batch(rows, width)
        else:
            batch = self.inputs.augmented(rows, self._random)
        batch |= {"mask": mask, "rows": positions}
        if self._split is not None:
            for name in ("labels", "ignored", "added", "sample_weight"):
                values = getattr(self._split, name)
                if values is not None:
                    valid = mask if values.ndim == 1 else mask[:, None]
                    batch[name] = values[rows] * valid
        return batch


class Epochs:
    """The batches of a whole training, by number: its order is a function of the seed
    and of the epoch alone, so that it can be taken up anywhere.

    Args:
        split: training rows.
        batch_size: B.
        widths: ascending bucket widths.
        seed: of order and augmentation.
        epochs: passes over the rows.
        augment: draw crops anew in each epoch; for inputs that know how.
        part: the rows of each batch that are made; the others are another process's.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        widths: list[int],
        seed: int,
        epochs: int,
        augment: bool = False,
        part: slice = slice(None),
    ):
        self.inputs, self._split, self._batch_size = split.inputs, split, batch_size
        self._part = part
        self._widths, self._seed, self._epochs = widths, seed, epochs
        self._augment, self._lengths = augment, split.inputs.lengths
        self._current: tuple[int, Batches] | None = None
        self.steps_per_epoch = -(-len(split) // batch_size)

    def __len__(self) -> int:
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.batch(step, self.width(step))

    def width(self, step: int) -> int:
        """The padded length of a batch."""
        batches, number = self._at(step)
        return batches.width(number)

    def batch(self, step: int, width: int) -> dict[str, np.ndarray]:
        """A batch, padded to `width`."""
        batches, number = self._at(step)
        return batches.batch(number, width)

    def _at(self, step: int) -> tuple[Batches, int]:
        epoch, number = step // self.steps_per_epoch + 1, step % self.steps_per_epoch
        current = self._current  # read once: several threads may ask
        if current is None or current[0] != epoch:
            current = self._current = (epoch, self._epoch(epoch))
        return current[1], number

    def _epoch(self, epoch: int) -> Batches:
        order = rngs.generator(self._seed, "order", epoch)
        plan = plan_batches(self._lengths, self._batch_size, self._widths, order)
        random = None
        if self._augment:
            random = functools.partial(rngs.generator, self._seed, "augment", epoch)
        return Batches(self.inputs, plan, self._split, random, self._part)


class SideBySide:
    """The batches of K trainings, by number: every array is [B, K, ...].

    All have the width that the widest of them has, up to the next one of `widths`.

    Args:
        sources: K, of equally many steps.
        widths: ascending; each is one shape to compile.
    """

    def __init__(self, sources: list[Epochs], widths: list[int]):
        self.inputs, self._sources = sources[0].inputs, sources
        self._widths = widths

    def __len__(self) -> int:
        return len(self._sources[0])

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        widest = max(source.width(step) for source in self._sources)
        width = next((w for w in self._widths if w >= widest), widest)
        parts = [source.batch(step, width) for source in self._sources]
        return {name: np.stack([part[name] for part in parts], 1) for name in parts[0]}


def stream(
    source: Batches | Epochs | SideBySide, start: int = 0, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The batches from number `start` on, in their order.

    Args:
        source: where from.
        start: batches that were consumed before.
        workers: processes that decode images ahead; 0: threads of this one.
    """
    if source.inputs.decodes:
        from cbmlc_jax.data.feed import feed

        return feed(source, start, workers)
    return (source[number] for number in range(start, len(source)))


def label_graph(
    kind: str,
    labels: UInt8[np.ndarray, "rows labels"],
    names: tuple[str, ...],
    file: str | None = None,
) -> scipy.sparse.csr_array | None:
    """The edges of the label graph, self loops included.

    Args:
        kind: "complete" (None is returned), "self" (loops alone), "cooccurrence" (two
            labels that share a row of the noisy training labels), "file".
        labels: [N, L] noisy training labels.
        names: L label names.
        file: lines of `label<TAB>label`, undirected edges.

    Returns:
        bool [L, L] or None; L x L entries never lie in memory.

    Raises:
        DataError: the file is missing, or a line names no label.
    """
    if kind == "complete":
        return None
    edges = scipy.sparse.eye_array(labels.shape[1], format="csr", dtype=np.int32)
    if kind == "cooccurrence":
        present = scipy.sparse.csr_array(labels, dtype=np.int32)
        edges = edges + present.T @ present
    elif kind == "file":
        pairs = []
        index = {name: i for i, name in enumerate(names)}
        for number, line in enumerate(_lines(file), 1):
            pair = line.split("\t")
            if len(pair) != 2 or not all(name in index for name in pair):
                raise DataError(
                    f"{file}, line {number}: expected two label names with a tab "
                    f"between them, found {line!r}"
                )
            pairs.append([index[name] for name in pair])
        ends = np.array(pairs, np.int32).reshape(-1, 2).T
        told = scipy.sparse.coo_array((np.ones(ends.shape[1]), ends), edges.shape)
        edges = edges + told + told.T
    graph = scipy.sparse.csr_array(edges).astype(bool)
    graph.sort_indices()
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
    "Batches",
    "DataError",
    "Dataset",
    "Dense",
    "Epochs",
    "Inputs",
    "Plan",
    "SideBySide",
    "Ragged",
    "Scored",
    "Split",
    "bucket_widths",
    "label_graph",
    "load",
    "plan_batches",
    "split_rows",
    "stream",
]
