"""What a run keeps beside its row, for comparisons and figures: details.jsonl.

    {"record": "predictions", "sha256", "shape": [N, L], "labels", "ebF1", ...}
        test labels and what is predicted at the honest threshold of each F1, as bits
    {"record": "label_embeddings", "sha256", "names", "counts", "pairs", "vectors", ...}
        e_l of a model that has them, and the labels that go together most often

The row names its records by their sha256, so that files of rows and of records can be
joined, moved and concatenated.  Arrays are base64 of zlib: 10-50 kB a run on bibtex.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from cbmlc_jax import metrics, thresholds

MOST_ENTRIES = 1 << 28  # of an array in a record: three times those of RCV1
PAIRS = 100  # most co-occurring pairs of labels (paper, figure 4)


class DetailError(ValueError):
    """A record that is damaged; the message says of what it is."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Attributes: labels [N, L] bool, and {F1: predicted [N, L] bool}."""

    labels: np.ndarray
    predicted: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LabelEmbeddings:
    """The label nodes of a trained model.

    Attributes:
        names: of the labels.
        counts: [L] positives among the training rows, as training saw them.
        pairs: [K, 2] labels that occur together most often there, the most first.
        vectors: float32 [L, P].
    """

    names: tuple[str, ...]
    counts: np.ndarray
    pairs: np.ndarray
    vectors: np.ndarray


def predictions(
    scores: Float[np.ndarray, "rows labels"],
    labels: Int[np.ndarray, "rows labels"],
    chosen: dict[str, float],
) -> dict:
    """The record of test predictions.

    Args:
        scores, labels: [N, L] of the test rows.
        chosen: {F1: threshold}.
    """
    arrays = {"labels": np.packbits(labels != 0)} | {
        name: np.packbits(thresholds.apply(scores, chosen[name]))
        for name in metrics.F1_NAMES
    }
    return _record({"record": "predictions", "shape": list(labels.shape)}, arrays)


def read_predictions(record: dict) -> Predictions:
    """The inverse of `predictions`.

    Raises:
        DetailError: it is damaged.
    """
    rows, labels = _shape(record)
    packed = _arrays(record, ("labels", *metrics.F1_NAMES), -(-rows * labels // 8))
    bits = {
        name: np.unpackbits(array, count=rows * labels).reshape(rows, labels).view(bool)
        for name, array in packed.items()
    }
    return Predictions(bits.pop("labels"), bits)


def label_embeddings(
    vectors: Float[np.ndarray, "labels width"],
    names: tuple[str, ...],
    labels: Int[np.ndarray, "rows labels"],
) -> dict:
    """The record of a model's label embeddings.

    Args:
        vectors: [L, P].
        names: of the labels.
        labels: [N, L] of the training rows, as training sees them.
    """
    fields = {
        "record": "label_embeddings",
        "shape": list(vectors.shape),
        "names": list(names),
        "counts": labels.sum(0, dtype=np.int64).tolist(),
        "pairs": top_pairs(labels).tolist(),
    }
    return _record(fields, {"vectors": np.ascontiguousarray(vectors, "<f4")})


def read_label_embeddings(record: dict) -> LabelEmbeddings:
    """The inverse of `label_embeddings`.

    Raises:
        DetailError: it is damaged.
    """
    size, width = _shape(record)
    vectors = _arrays(record, ("vectors",), 4 * size * width)["vectors"]
    return LabelEmbeddings(
        names=tuple(record["names"]),
        counts=np.array(record["counts"]),
        pairs=np.array(record["pairs"], int).reshape(-1, 2),
        vectors=vectors.view("<f4").reshape(size, width),
    )


def top_pairs(
    labels: Int[np.ndarray, "rows labels"], number: int = PAIRS
) -> Int[np.ndarray, "pairs two"]:
    """[K, 2] the pairs i < j that occur together in most rows, the most first.

    Ties go to the lower i, then j; pairs that never meet are left out.
    """
    used = scipy.sparse.csr_array(labels != 0, dtype=np.int64)
    together = np.triu((used.T @ used).toarray(), 1)
    first, second = np.nonzero(together)
    order = np.argsort(-together[first, second], kind="stable")[:number]
    return np.stack([first[order], second[order]], 1)


def pair_distance(found: LabelEmbeddings) -> float:
    """Mean distance of the pairs over the norm of the element-wise maximum of E.

        mean_(i,j) ||e_i - e_j|| / || max_l e_l ||     (paper, figure 4)

    The maximum is taken over labels for each of the P coordinates, as the authors'
    plotting code does, so that spaces of different scale can be compared.
    """
    e = found.vectors.astype(np.float64)
    distances = np.linalg.norm(e[found.pairs[:, 0]] - e[found.pairs[:, 1]], axis=1)
    return float(distances.mean() / np.linalg.norm(e.max(0)))


def _record(fields: dict, arrays: dict[str, np.ndarray]) -> dict:
    """The fields, their signature, and the arrays as text."""
    text = {
        name: base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
        for name, array in arrays.items()
    }
    return {"record": fields["record"], "sha256": _digest(fields, arrays)} | (
        fields | text
    )


def _digest(fields: dict, arrays: dict[str, np.ndarray]) -> str:
    """sha256 of the content; not of its compressed form, which is the library's."""
    found = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def _arrays(record: dict, names: tuple[str, ...], size: int) -> dict[str, np.ndarray]:
    """{name: `size` bytes}, checked against the signature.

    Never more bytes than those in memory, whatever the record says.
    """
    arrays = {}
    for name in names:
        try:
            packed = base64.b64decode(record[name], validate=True)
            data = zlib.decompressobj().decompress(packed, size + 1)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise DetailError(f"{_title(record)}: {name} cannot be read") from error
        if len(data) != size:
            raise DetailError(f"{_title(record)}: {name} is not of its shape")
        arrays[name] = np.frombuffer(data, np.uint8)
    fields = {k: v for k, v in record.items() if k not in (*names, "sha256")}
    if record.get("sha256") != _digest(fields, arrays):
        raise DetailError(f"{_title(record)}: it is not what its run wrote")
    return arrays


def _shape(record: dict) -> tuple[int, int]:
    shape = record.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(n) is int and n > 0 for n in shape)
        or shape[0] * shape[1] > MOST_ENTRIES
    ):
        raise DetailError(f"{_title(record)}: no shape, or one too large")
    return shape[0], shape[1]


def _title(record: dict) -> str:
    name, digest = str(record.get("record"))[:20], str(record.get("sha256"))[:12]
    return f"the record {digest} of {name} is damaged"
