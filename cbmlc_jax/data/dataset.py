"""The one form in which every data set reaches the rest of the package."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse

# The first feature name of a data set of sequences: ids in order, repeats kept, and
# this one for every word without a name.  Other data sets are of sets.
UNKNOWN = "<unk>"
TAKEN = 1 << 16  # rows that Ragged.take copies at once


class DataError(ValueError):
    """A data file or data option that the user has to mend; the message says how."""


class Inputs(Protocol):
    """What the rows of a data set are: token ids, real numbers or images.

    `batch` is what an encoder reads, `matrix` what an estimator reads.

    Attributes:
        decodes: batches take time to make and are made ahead, by `feed`; such inputs
            also have `augmented(rows, random)`, `batch` with random changes.
    """

    decodes: bool

    def __len__(self) -> int:
        """N rows."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: rows of like length share batches; 1 where all are alike."""

    def take(self, rows: np.ndarray) -> Inputs:
        """The given rows, in the given order."""

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Arrays of the rows, padded to `width`; row -1 fills the batch up."""

    def matrix(self, num_features: int) -> scipy.sparse.csr_array | np.ndarray:
        """float32 [N, num_features]."""

    def content(self) -> Iterator[bytes]:
        """What distinguishes these inputs from others, for the fingerprint."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of integer ids of different lengths, stored end to end.

    Row `i` is `values[offsets[i]:offsets[i + 1]]`.  Ids are 0-based; batches add 1
    so that 0 can pad.

    Attributes:
        values: int32 [total].
        offsets: int64 [N + 1], `offsets[0] == 0`, non-decreasing.
        weights: float32 [total], how much each id counts in its row (tf-idf), or None:
            each counts once.
    """

    values: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None
    decodes: ClassVar[bool] = False

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Joins a sequence of id sequences."""
        lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = np.fromiter((v for r in rows for v in r), np.int32, offsets[-1])
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, in the given order."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        values = np.empty(offsets[-1], self.values.dtype)
        weights = None
        if self.weights is not None:
            weights = np.empty(offsets[-1], self.weights.dtype)
        # In pieces: the numbers of places take more memory than what lies there.
        for start in range(0, len(rows), TAKEN):
            bounds = offsets[start : start + TAKEN + 1]
            here = slice(bounds[0], bounds[-1])
            # Position inside the result minus the row's start there, plus its start
            # here.
            first = self.offsets[:-1][rows[start : start + TAKEN]]
            index = np.arange(bounds[0], bounds[-1])
            index += np.repeat(first - bounds[:-1], np.diff(bounds))
            values[here] = self.values[index]
            if weights is not None:
                weights[here] = self.weights[index]
        return Ragged(values, offsets, weights)

    def matrix(self, num_features: int) -> scipy.sparse.csr_array:
        """float32 [N, num_features]: how often, or how much, each id counts."""
        import scipy.sparse  # here: serving reads this module, and has numpy alone

        weights = self.weights
        if weights is None:
            weights = np.ones(len(self.values), np.float32)
        # 32-bit offsets: scikit-learn reads no others.
        parts = (weights.copy(), self.values.copy(), self.offsets.astype(np.int32))
        matrix = scipy.sparse.csr_array(parts, shape=(len(self), num_features))
        matrix.sum_duplicates()
        return matrix

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [len(rows), width]: ids + 1, then zeros; row -1 is empty.

        With weights also `weights` float32 of that shape.

        Raises:
            ValueError: a row is longer than `width`.
        """
        start = self.offsets[:-1][rows]
        lengths = np.where(rows >= 0, self.lengths[rows], 0)
        if lengths.size and lengths.max() > width:
            raise ValueError(f"a row of {lengths.max()} ids does not fit {width}")
        column = np.arange(width)
        index = np.minimum(start[:, None] + column, max(len(self.values) - 1, 0))
        present = column < lengths[:, None]

        def padded(stored, dtype):
            stored = stored if len(stored) else np.zeros(1, dtype)
            return np.where(present, stored[index], 0).astype(dtype)

        batch = {"tokens": padded(self.values, np.int32) + present}
        if self.weights is not None:
            batch["weights"] = padded(self.weights, np.float32)
        return batch

    def content(self) -> Iterator[bytes]:
        """Ids, offsets and, where there are any, weights."""
        yield from _bytes(self.values, "<i4")
        yield from _bytes(self.offsets, "<i8")
        if self.weights is not None:
            yield from _bytes(self.weights, "<f4")


@dataclasses.dataclass(frozen=True)
class Dense:
    """Rows of real numbers, all of one shape.

    Attributes:
        values: float32 [N, F], or [N, height, width, F] maps of an image network.
    """

    values: np.ndarray
    decodes: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], all 1."""
        return np.ones(len(self), np.int64)

    def take(self, rows: np.ndarray) -> Dense:
        """The given rows, in the given order."""
        return Dense(self.values[rows])

    def matrix(self, num_features: int) -> np.ndarray:
        """float32 [N, F]; `num_features` is F."""
        return self.values.reshape(len(self), num_features)

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """`features` [len(rows), F]; row -1 repeats a row of the batch."""
        del width
        return {"features": self.values[filled(rows)]}

    def content(self) -> Iterator[bytes]:
        """The numbers."""
        yield from _bytes(self.values, "<f4")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rows that a model reads as what other models say of their labels.

    Attributes:
        inputs: the rows themselves, for `matrix`.
        scores: float32 [N, L, M], of M models, each in [0, 1].
    """

    inputs: Inputs
    scores: np.ndarray
    decodes: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], all 1."""
        return np.ones(len(self), np.int64)

    def take(self, rows: np.ndarray) -> Scored:
        """The given rows, in the given order."""
        return Scored(self.inputs.take(rows), self.scores[rows])

    def matrix(self, num_features: int) -> scipy.sparse.csr_array | np.ndarray:
        """Of the rows themselves."""
        return self.inputs.matrix(num_features)

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """`scores` [len(rows), L, M]; row -1 repeats a row of the batch."""
        del width
        return {"scores": self.scores[filled(rows)]}

    def content(self) -> Iterator[bytes]:
        """The rows, then the scores."""
        yield from self.inputs.content()
        yield from _bytes(self.scores, "<f4")


@dataclasses.dataclass(frozen=True)
class Pixels(Dense):
    """Images that are decoded and of one size already.

    Attributes:
        values: uint8 [N, side, side, 3].
    """

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """`images` [len(rows), side, side, 3]; row -1 repeats a row of the batch."""
        del width
        return {"images": self.values[filled(rows)]}


def filled(rows: np.ndarray) -> np.ndarray:
    """Row numbers with each -1 replaced by one that is there, in turn.

    What is computed over a whole batch (batch normalisation) then sees real rows alone.
    """
    return np.resize(rows[rows >= 0], len(rows))


def _bytes(array: np.ndarray, dtype: str) -> Iterator[bytes]:
    yield repr(array.shape).encode()
    yield np.ascontiguousarray(array.astype(dtype, copy=False)).tobytes()


@dataclasses.dataclass(frozen=True)
class Split:
    """Inputs and their labels: N rows.

    Attributes:
        inputs: of each row.
        labels: uint8 [N, L], 0 or 1; in training perhaps float32, in [0, 1].
        ignored: bool [N, L], entries that count neither in training nor in a score
            (their label is 0); None: all count.
        added: float32 [N], the share of its negatives that noise turned on in each row;
            None: not known by rows.
        sample_weight: float32 [N], > 0, the factor of a row in the loss; None: 1.  It
            counts in the loss alone, in no score.
    """

    inputs: Inputs
    labels: np.ndarray
    ignored: np.ndarray | None = None
    added: np.ndarray | None = None
    sample_weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """The given rows, in the given order."""

        def taken(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[rows]

        return Split(
            self.inputs.take(rows),
            self.labels[rows],
            taken(self.ignored),
            taken(self.added),
            taken(self.sample_weight),
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set with its official split, as read: clean labels, no validation yet.

    Attributes:
        name: registry name, e.g. "bibtex".
        train, test: the official splits.
        label_names: L names as published (e.g. "TAG_2005").
        feature_names: F names; input ids index them.
        label_texts: L names as read by a person ("2005"), for the word vectors.
        word_vectors: the data set's own word vectors, or None (only `synthetic`).
        validation: int [n] rows of `train` that are set aside for validation, or None:
            they are drawn.
        test_from: where the test rows come from, for the result row.
    """

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    label_texts: tuple[str, ...]
    word_vectors: dict[str, np.ndarray] | None = None
    validation: np.ndarray | None = None
    test_from: str = "published"

    @property
    def kind(self) -> str:
        """ "set" of features, "weighted" set, "sequence", "numbers" or "images"."""
        inputs = self.train.inputs
        if isinstance(inputs, Ragged):
            if inputs.weights is not None:
                return "weighted"
            return "sequence" if self.feature_names[:1] == (UNKNOWN,) else "set"
        return "images" if inputs.decodes else "numbers"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the content (names, inputs, labels), however it was obtained."""
        digest = hashlib.sha256()
        for names in (self.label_names, self.feature_names):
            digest.update("\n".join(names).encode("utf8") + b"\0")
        for split in (self.train, self.test):
            for part in split.inputs.content():
                digest.update(part)
            for labels in (split.labels, split.ignored):
                if labels is not None:
                    for part in _bytes(labels, "u1"):
                        digest.update(part)
            if split.sample_weight is not None:
                for part in _bytes(split.sample_weight, "<f4"):
                    digest.update(part)
        return digest.hexdigest()
