"""The one form in which every data set reaches the rest of the package."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import scipy.sparse

# The first feature name of a data set of sequences: ids in order, repeats kept, and
# this one for every word without a name.  Other data sets are of sets.
UNKNOWN = "<unk>"


class DataError(ValueError):
    """A data file or data option that the user has to mend; the message says how."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of integer ids of different lengths, stored end to end.

    Row `i` is `values[offsets[i]:offsets[i + 1]]`.  Ids are 0-based; batches add 1
    so that 0 can pad.

    Attributes:
        values: int32 [total].
        offsets: int64 [N + 1], `offsets[0] == 0`, non-decreasing.
    """

    values: np.ndarray
    offsets: np.ndarray

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
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Position inside the result minus the row's start there, plus its start here.
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Ragged(self.values[np.arange(offsets[-1]) + shift], offsets)

    def csr(self, num_ids: int) -> scipy.sparse.csr_array:
        """float32 [N, num_ids]: how often each id stands in each row."""
        # 32-bit offsets: scikit-learn reads no others.
        parts = (
            np.ones(len(self.values), np.float32),
            self.values.copy(),
            self.offsets.astype(np.int32),
        )
        matrix = scipy.sparse.csr_array(parts, shape=(len(self), num_ids))
        matrix.sum_duplicates()
        return matrix

    def padded(self, rows: np.ndarray, width: int) -> np.ndarray:
        """int32 [len(rows), width]: ids + 1, then zeros.

        Raises:
            ValueError: a row is longer than `width`.
        """
        lengths = self.lengths[rows]
        if lengths.size and lengths.max() > width:
            raise ValueError(f"a row of {lengths.max()} ids does not fit {width}")
        column = np.arange(width)
        index = np.minimum(
            self.offsets[:-1][rows][:, None] + column, max(len(self.values) - 1, 0)
        )
        present = column < lengths[:, None]
        values = self.values if len(self.values) else np.zeros(1, np.int32)
        return np.where(present, values[index] + 1, 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Split:
    """Inputs and their labels: N rows.

    Attributes:
        inputs: the features that are present in each row.
        labels: uint8 [N, L], 0 or 1.
    """

    inputs: Ragged
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """The given rows, in the given order."""
        return Split(self.inputs.take(rows), self.labels[rows])


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
    """

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    label_texts: tuple[str, ...]
    word_vectors: dict[str, np.ndarray] | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 of the content (names, ids, labels), however it was obtained."""
        digest = hashlib.sha256()
        for names in (self.label_names, self.feature_names):
            digest.update("\n".join(names).encode("utf8") + b"\0")
        for split in (self.train, self.test):
            for array, dtype in (
                (split.inputs.values, "<i4"),
                (split.inputs.offsets, "<i8"),
                (split.labels, "u1"),
            ):
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array.astype(dtype)).tobytes())
        return digest.hexdigest()
